"""What an element expression of the lifter means: one number, computed one index at a time in float64.

A second, deliberately naive reading of `passes/lift/expr.py` that shares no code with its simplifications, so that a wrong lemma
shows.  Iverson brackets are read as brackets: where one is 0 the rest of the product is not looked at (it may be out of range).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.passes.lift.expr import Enum, Expr, Order, Segment, Var
from moe_compile.passes.lift.value import Value

Env = dict[Var, int]

CONDITIONS = {"eq", "ne", "lt", "le", "gt", "ge", "not"}
COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
FUNCTIONS = {
    "silu": F.silu, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp, "rsqrt": torch.rsqrt,
    "sqrt": torch.sqrt, "neg": torch.neg, "softplus": F.softplus, "erf": torch.erf, "abs": torch.abs, "log": torch.log,
    "square": torch.square, "floor": torch.floor, "sin": torch.sin, "cos": torch.cos, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "mish": F.mish, "log1p": torch.log1p, "expm1": torch.expm1, "reciprocal": torch.reciprocal,
    "exp2": torch.exp2, "e4m3": lambda t: t.to(torch.uint8).view(torch.float8_e4m3fn).double(),
}  # fmt: skip


class Undefined(Exception):
    """The expression reads uninitialised memory, or an element outside of a tensor."""


class Evaluator:
    """`tensors`: FX node (or any key of `Leaf.nodes`) -> real tensor; `sizes`: size symbol -> number."""

    def __init__(self, tensors: Mapping[Any, Tensor], sizes: Mapping[Any, int] | None = None):
        self.tensors, self.sizes = tensors, dict(sizes or {})
        self._sorted: dict[Any, list[int]] = {}
        self._enumerated: dict[Any, list[tuple[int, ...]]] = {}
        self._elements: dict[Any, Any] = {}

    # ------------------------------------------------------------ extents and domains
    def size(self, s: Any) -> int:
        if s is None:
            raise Undefined("an extent that depends on data")
        return s if isinstance(s, int) else int(s.subs(self.sizes))

    def rows_of(self, v: Var, env: Env) -> range:
        """The values of an index variable."""
        if isinstance(v.domain, Enum):
            return range(len(self.points(v.domain, env)))
        if isinstance(v.domain, Segment):
            return range(len(self.segment(v.domain, env)))
        return range(self.size(v.size))

    def points(self, domain: Enum, env: Env) -> list[tuple[int, ...]]:
        """Where the condition of a nonzero holds, row-major: a coordinate per dimension."""
        vs = [v for d in domain.dims for v in d]
        key = (domain, *self._outer(domain.cond, env, vs))
        if key not in self._enumerated:
            found = []
            for at in self.assignments(vs):
                if self(domain.cond, {**env, **at}):
                    found.append(tuple(self._flat([(at[v], v.size) for v in d]) for d in domain.dims))
            self._enumerated[key] = found
        return self._enumerated[key]

    def segment(self, domain: Segment, env: Env) -> list[int]:
        """Sorted positions whose key is the segment's."""
        keys, order = self.keys(domain.order, env), self.permutation(domain.order, env)
        return [position for position, row in enumerate(order) if keys[row] == domain.index]

    def keys(self, order: Order, env: Env) -> list[Any]:
        return [self(order.expr, {**env, **at}) for at in self.assignments(order.vars)]

    def permutation(self, order: Order, env: Env) -> list[int]:
        """Rows in the order of a stable sort of the key."""
        key = (order, *self._outer(order.expr, env, order.vars))
        if key not in self._sorted:
            keys = self.keys(order, env)
            self._sorted[key] = sorted(range(len(keys)), key=lambda row: keys[row])
        return self._sorted[key]

    def assignments(self, vs: Sequence[Var]) -> Iterable[Env]:
        for at in itertools.product(*(self.rows_of(v, {}) for v in vs)):
            yield dict(zip(vs, at))

    def _outer(self, e: Expr, env: Env, bound: Iterable[Var]) -> tuple:
        return tuple((v, env[v]) for v in sorted(e.free - set(bound), key=lambda v: v.id))

    def _flat(self, digits: Iterable[tuple[int, Any]]) -> int:
        total = 0
        for d, n in digits:
            total = total * self.size(n) + d
        return total

    # ------------------------------------------------------------ elements
    def __call__(self, e: Expr, env: Env) -> Any:
        key = (e, *self._outer(e, env, ()))
        if key not in self._elements:
            self._elements[key] = self._element(e, env)
        return self._elements[key]

    def _element(self, e: Expr, env: Env) -> Any:
        a = e.args
        if isinstance(e, Var):
            return env[e]
        found = getattr(self, f"op_{e.op}", None)
        if found is not None:
            return found(env, *a)
        if e.op in COMPARE:
            return int(COMPARE[e.op](self(a[0], env), self(a[1], env)))
        if e.op in FUNCTIONS:
            return FUNCTIONS[e.op](torch.tensor(float(self(a[0], env)), dtype=torch.float64)).item()
        raise Undefined(f"no meaning for {e.op}")

    def op_const(self, env: Env, c: Any) -> Any:
        return int(c) if isinstance(c, bool) else c

    def op_size(self, env: Env, s: Any) -> int:
        return self.size(s)

    def op_rows(self, env: Env, *vs: Var) -> int:
        return math.prod(len(self.rows_of(v, env)) for v in vs)

    def op_load(self, env: Env, leaf: Any, *index: Expr) -> Any:
        at = [self(i, env) for i in index]
        if len(leaf.nodes) > 1:
            tensor, at = self.tensors[leaf.nodes[at[0]]], at[1:]
        else:
            tensor = self.tensors[leaf.nodes[0]]
        if any(i != int(i) or not 0 <= i < n for i, n in zip(at, tensor.shape)):
            raise Undefined(f"{leaf}{at} of shape {tuple(tensor.shape)}")
        return self._number(tensor[tuple(int(i) for i in at)])

    def _number(self, t: Tensor) -> Any:
        return float(t) if t.is_floating_point() else int(t)

    def op_undef(self, env: Env) -> Any:
        raise Undefined("an uninitialised element")

    # ------------------------------------------------------------ arithmetic
    def op_add(self, env: Env, *xs: Expr) -> Any:
        return sum(self(x, env) for x in xs)

    def op_mul(self, env: Env, *xs: Expr) -> Any:
        conditions = [x for x in xs if x.op in CONDITIONS]
        if any(self(x, env) == 0 for x in conditions):
            return 0
        return math.prod(self(x, env) for x in xs if x.op not in CONDITIONS)

    def op_div(self, env: Env, a: Expr, b: Expr) -> Any:
        x = torch.tensor(float(self(a, env)), dtype=torch.float64)
        return (x / float(self(b, env))).item()

    def op_not(self, env: Env, x: Expr) -> int:
        return int(not self(x, env))

    def op_where(self, env: Env, c: Expr, a: Expr, b: Expr) -> Any:
        return self(a if self(c, env) else b, env)

    def op_maximum(self, env: Env, a: Expr, b: Expr) -> Any:
        return max(self(a, env), self(b, env))

    def op_minimum(self, env: Env, a: Expr, b: Expr) -> Any:
        return min(self(a, env), self(b, env))

    def op_clamp(self, env: Env, x: Expr, lo: Any, hi: Any) -> Any:
        v = self(x, env)
        v = v if lo is None else max(v, lo)
        return v if hi is None else min(v, hi)

    def op_pow(self, env: Env, x: Expr, p: Expr) -> Any:
        return torch.tensor(float(self(x, env)), dtype=torch.float64).pow(self(p, env)).item()

    def op_gelu(self, env: Env, x: Expr, approximate: str = "none") -> Any:
        return F.gelu(torch.tensor(float(self(x, env)), dtype=torch.float64), approximate=approximate).item()

    def op_leaky_relu(self, env: Env, x: Expr, slope: Expr) -> Any:
        v = self(x, env)
        return v if v > 0 else v * self(slope, env)

    def op_elu(self, env: Env, x: Expr, alpha: Expr) -> Any:
        v = self(x, env)
        return v if v > 0 else math.expm1(v) * self(alpha, env)

    def op_cast(self, env: Env, x: Expr, dtype: torch.dtype) -> Any:
        v = self(x, env)
        t = torch.tensor(v, dtype=torch.float64 if isinstance(v, float) else torch.int64)
        return self._number(t.to(dtype))

    def op_stop(self, env: Env, x: Expr) -> Any:
        return self(x, env)

    # ------------------------------------------------------------ indices
    def op_mix(self, env: Env, *args: Any) -> int:
        return self._flat((self(d, env), n) for d, n in zip(args[::2], args[1::2]))

    def op_idiv(self, env: Env, x: Expr, n: Any) -> int:
        return int(self(x, env) // self.size(n))

    def op_mod(self, env: Env, x: Expr, n: Any) -> int:
        return int(self(x, env) % self.size(n))

    def op_sel(self, env: Env, i: Expr, *parts: Expr) -> Any:
        at = self(i, env)
        if not 0 <= at < len(parts):
            raise Undefined(f"part {at} of {len(parts)}")
        return self(parts[at], env)

    def op_perm(self, env: Env, order: Order, r: Expr) -> int:
        return self.permutation(order, env)[self._inside(r, order, env)]

    def op_inv(self, env: Env, order: Order, s: Expr) -> int:
        return self.permutation(order, env).index(self._inside(s, order, env))

    def _inside(self, r: Expr, order: Order, env: Env) -> int:
        at, n = self(r, env), math.prod(map(self.size, order.sizes))
        if not 0 <= at < n:
            raise Undefined(f"row {at} of {n} sorted rows")
        return at

    def op_count(self, env: Env, order: Order, v: Expr) -> int:
        return sum(k == self(v, env) for k in self.keys(order, env))

    def op_below(self, env: Env, order: Order, v: Expr) -> int:
        return sum(k < self(v, env) for k in self.keys(order, env))

    def op_coord(self, env: Env, r: Var, j: int) -> int:
        return self.points(r.domain, env)[env[r]][j]

    def op_moved(self, env: Env, r: Var, key: Any, by: int) -> int:
        here = self._unsorted(self.points(r.domain, env), by)
        return sorted(here).index(here[env[r]])

    def op_nth(self, env: Env, r: Var, key: Any, by: int, j: int) -> int:
        return sorted(self._unsorted(self.points(r.domain, env), by))[env[r]][j]

    def _unsorted(self, points: list[tuple[int, ...]], by: int) -> list[tuple[int, ...]]:
        """Points that were sorted by a coordinate, which stands first since, with that coordinate where it was."""
        return [(*p[1 : by + 1], p[0], *p[by + 1 :]) for p in points]

    def op_seg(self, env: Env, r: Var) -> int:
        return self.segment(r.domain, env)[env[r]]

    # ------------------------------------------------------------ binders
    def op_sum(self, env: Env, v: Var, body: Expr) -> Any:
        return sum(self(body, {**env, v: i}) for i in self.rows_of(v, env))

    def op_scat(self, env: Env, v: Var | None, cond: Expr, src: Expr, base: Expr) -> Any:
        inner = [env] if v is None else [{**env, v: i} for i in self.rows_of(v, env)]
        hits = [at for at in inner if self(cond, at)]
        if len(hits) > 1:
            raise Undefined("two rows are scattered to one element")
        return self(src, hits[0]) if hits else self(base, env)

    def op_softmax(self, env: Env, v: Var, body: Expr, k: Expr) -> Any:
        scores = torch.tensor([float(self(body, {**env, v: i})) for i in self.rows_of(v, env)], dtype=torch.float64)
        return scores.softmax(0)[self(k, env)].item()

    # ------------------------------------------------------------ whole tensors
    def tensor(self, value: Value) -> Tensor:
        """All elements of a `Value`, as float64."""
        vs = value.vars()
        shape = [math.prod(len(self.rows_of(v, {})) for v in d) for d in value.dims]
        flat = [float(self(value.expr, at)) for at in self.assignments(vs)]
        return torch.tensor(flat, dtype=torch.float64).reshape(shape)


def close(a: Any, b: Any, tolerance: float = 1e-7) -> bool:
    """Equal to rounding; NaN equals NaN."""
    return a == b or (a != a and b != b) or abs(a - b) <= tolerance * (1 + max(abs(a), abs(b)))
