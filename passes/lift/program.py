"""From a body expression to the expert's program text (the language of `moe_compile.ops.program`).

A *row expression* is an element expression of one row's vector: a function of the feature variables `feat`, of the row's variables and of
the routing id.  `Builder.vec` spells it; on the way it collects the token `x`, the inner routing weight `w`, the weights and the biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .algebra import mul, refresh, replace
from .expr import Expr, Refused, Var, alpha, factors, is_const, loads, subexprs
from .index import is_bool
from .normal import is_id
from .param import Digit, Param
from .places import computed
from .quantized import Reading, is_numbers, outer_loads, own_factors, recognised
from .sizes import Size, prod
from .value import index_of

UNARY = {"silu", "relu", "sigmoid", "tanh", "neg", "exp", "rsqrt", "sqrt", "softplus", "erf", "abs", "log", "square", "stop", "sin", "cos",
         "hardswish", "hardsigmoid", "mish"}  # fmt: skip
BINARY = {"maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne"}


@dataclass
class Builder:
    """Collects what a program refers to.  `rows`: the token's variables; `slots`: those of the top-k slots; `ids`: the routing id."""

    rows: Sequence[Var]
    slots: Sequence[Var]
    ids: Expr
    strip_casts: bool = False
    x: tuple[Expr, tuple[Var, ...]] | None = None
    w: Expr | None = None
    weights: list[Param] = field(default_factory=list)
    biases: list[Param] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # "x", "w", "mm0", "b1": read by the program, and of those
    live: set[str] = field(default_factory=set)  # read where gradients flow
    _stopped: int = 0
    _expert: dict[Expr, bool] = field(default_factory=dict)

    # ------------------------------------------------------------ what an expression depends on
    def expert_load(self, e: Expr) -> bool:
        """An element of the selected expert's parameters: indexed by the id and a feature, and by nothing else of the row.

        A value per expert without a feature (a scale) is a scalar of the slot, like the routing weight.
        """
        if e.op != "load" or not any(self.ids is d for a in e.args[1:] for d in _digits(a)):
            return False
        others = [d for a in e.args[1:] for d in _digits(a) if d is not self.ids]
        return any(d.free for d in others) and not any(d.free & self._row_vars() for d in others)

    def _row_vars(self) -> set[Var]:
        return set(self.rows) | set(self.slots)

    def has_expert(self, e: Expr) -> bool:
        if e not in self._expert:
            self._expert[e] = self.expert_load(e) or any(self.has_expert(a) for a in e.args if isinstance(a, Expr))
        return self._expert[e]

    # ------------------------------------------------------------ spelling
    def vec(self, e: Expr, feat: tuple[Var, ...]) -> str:
        if is_const(e):
            return number(e.args[0])
        if not self.has_expert(e):
            return self.outside(e, feat)
        if e.op == "sum":
            return self.linear(e, feat)
        if self.expert_load(e):
            return self.bias(e, feat)
        if e.op == "mul":
            return self.product(e, feat)
        return self.pointwise(e, feat)

    def product(self, e: Expr, feat: tuple[Var, ...]) -> str:
        """Factors without an expert's parameter are taken together: the row's scalars, and what depends on the feature."""
        if (scaled := self._scaled_sum(e, feat)) is not None:
            return scaled
        plain = [f for f in factors(e) if not self.has_expert(f)]
        scalar = [f for f in plain if not f.free & set(feat) and not is_const(f)]
        parts = [f for f in plain if is_const(f)]
        parts += [mul(*scalar)] if scalar else []
        parts += [mul(*fs)] if (fs := [f for f in plain if f.free & set(feat)]) else []
        parts += [f for f in factors(e) if self.has_expert(f)]
        return " * ".join(self.factor(f, feat) for f in parts)

    def factor(self, f: Expr, feat: tuple[Var, ...]) -> str:
        text = self.vec(f, feat)
        return f"({text})" if f.op == "add" else text

    def pointwise(self, e: Expr, feat: tuple[Var, ...]) -> str:
        a = e.args
        if e.op == "add":
            return " + ".join(self.vec(x, feat) for x in a)
        if e.op == "stop":
            return self.stopped(a[0], feat)
        if e.op in UNARY:
            return f"{e.op}({self.vec(a[0], feat)})"
        if e.op in BINARY:
            return f"{e.op}({self.vec(a[0], feat)}, {self.vec(a[1], feat)})"
        if e.op == "gelu":
            return f"{'gelu_tanh' if a[1] == 'tanh' else 'gelu'}({self.vec(a[0], feat)})"
        if e.op == "cast":
            return f"cast({self.vec(a[0], feat)}, {dtype_name(a[1])!r})"
        if e.op == "clamp" and not isinstance(a[2], Expr):
            return f"clamp({self.vec(a[0], feat)}, {number(a[1])}, {number(a[2])})"
        if e.op in ("pow", "leaky_relu", "elu") and is_const(a[1]):
            return f"{e.op}({self.vec(a[0], feat)}, {number(a[1].args[0])})"
        if e.op == "div":
            return f"({self.vec(a[0], feat)}) / ({self.vec(a[1], feat)})"
        if e.op == "reciprocal":
            return f"1.0 / ({self.vec(a[0], feat)})"
        if e.op == "where":
            return f"where({', '.join(self.vec(x, feat) for x in a)})"
        raise Refused(f"`{e.op}` inside the expert's function")

    def stopped(self, e: Expr, feat: tuple[Var, ...]) -> str:
        self._stopped += 1
        text = f"stop({self.vec(e, feat)})"
        self._stopped -= 1
        return text

    def reads(self, name: str) -> None:
        self.used.add(name)
        if not self._stopped:
            self.live.add(name)

    # ------------------------------------------------------------ the token, the routing weight
    def outside(self, e: Expr, feat: tuple[Var, ...]) -> str:
        """An expression without any expert's parameter."""
        on_slot = bool(e.free & set(self.slots)) or any(x is self.ids for x in subexprs(e))
        on_feature = bool(e.free & set(feat))
        if not on_feature:
            if self.rows and not e.free & self._row_vars():
                raise Refused(f"a factor that belongs to no row: {computed(e)}")
            return self.as_w(e)
        if not on_slot and (e.free & self._row_vars() or not self.rows):  # a single token has no variable
            return self.as_x(e, feat)
        if on_slot and e.op in UNARY | {"mul", "add", "cast"}:
            return self.product(e, feat) if e.op == "mul" and len(self._split(e, feat)) > 1 else self._through(e, feat)
        raise Refused("the experts' input depends on the slot, not only on the token")

    def _split(self, e: Expr, feat: tuple[Var, ...]) -> list[Expr]:
        scalar = [f for f in factors(e) if not f.free & set(feat)]
        return [mul(*fs) for fs in (scalar, [f for f in factors(e) if f.free & set(feat)]) if fs]

    def _through(self, e: Expr, feat: tuple[Var, ...]) -> str:
        if e.op == "mul":
            raise Refused("the experts' input depends on the slot, not only on the token")
        return self.pointwise(e, feat)

    def as_w(self, e: Expr) -> str:
        if is_bool(e):
            raise Refused(f"a condition inside the expert's function: {computed(e)}")
        if self.w is not None and self.w is not e:
            raise Refused("two different routing weights inside the experts")
        self.w = e
        self.reads("w")
        return "w"

    def as_x(self, e: Expr, feat: tuple[Var, ...]) -> str:
        if self.strip_casts and e.op == "cast":
            return f"cast({self.as_x(e.args[0], feat)}, {dtype_name(e.args[1])!r})"
        e, feat = _one_feature(e, feat)
        if self.x is None:
            self.x = (e, feat)
        elif alpha(self.x[0], self.x[1]) != alpha(e, feat) or [v.size for v in self.x[1]] != [v.size for v in feat]:
            raise Refused("the expert's layers read different inputs")
        self.reads("x")
        return "x"

    # ------------------------------------------------------------ parameters
    def linear(self, e: Expr, feat: tuple[Var, ...], scales: Sequence[Expr] = ()) -> str:
        """sum over the input features of operand * weight; scales: factors of the sum that belong to a quantised weight."""
        vs, body = opened(e)
        if self._numbers(body, vs):
            param, order, operand = self._dequantised(body, feat, vs, scales)
        else:
            param, order, operand = self._plain(body, feat, vs)
        if not operand.free & set(vs):
            raise Refused("a sum of an expert's weights that multiplies no input")
        rows = self.vec(operand, order)  # inner layers are numbered first
        j = numbered(self.weights, param)
        self.reads(f"mm{j}")
        return columns(f"mm({j}, {rows})", param)

    def _plain(self, body: Expr, feat: tuple[Var, ...], vs: list[Var]) -> tuple[Param, tuple[Var, ...], Expr]:
        """The weight of a sum, its input features in the weight's order, and what it multiplies."""
        mine = [f for f in factors(body) if self.expert_load(_uncast(f)) and set(vs) <= f.free]
        if len(mine) != 1:
            what = "not a linear layer of the selected expert (a norm over its features, say, or a layer that all share)"
            raise Refused(f"a sum inside the experts that is {what}")
        order = tuple(d for a in _uncast(mine[0]).args[1:] for d in _digits(a) if isinstance(d, Var) and d in vs)
        return self.param(_uncast(mine[0]), feat, vs), order, mul(*[f for f in factors(body) if f is not mine[0]])

    # ------------------------------------------------------------ quantised weights
    def _own(self, e: Expr) -> bool:
        return own_factors(e, self.ids, self._row_vars())

    def _numbers(self, body: Expr, vs: list[Var]) -> list[Expr]:
        """The factors of a sum's body that read quantised numbers of the expert."""
        return [f for f in factors(body) if self._own(f) and set(vs) & f.free and any(map(is_numbers, outer_loads(f)))]

    def _dequantised(self, body: Expr, feat: tuple[Var, ...], vs: list[Var], scales: Sequence[Expr]) -> tuple[Param, tuple[Var, ...], Expr]:
        own = [f for f in factors(body) if self._own(f)]
        param, order = recognised([*own, *scales], Reading(self.ids, feat, vs), lambda load, ins: self.param(load, feat, ins))
        return param, tuple(order), mul(*[f for f in factors(body) if f not in own])

    def _scaled_sum(self, e: Expr, feat: tuple[Var, ...]) -> str | None:
        """s * sum_i x_i q_i with s of the expert alone: the scale of a quantised weight, taken out of the sum."""
        for f in factors(e):
            if _uncast(f).op == "sum":
                vs, body = opened(_uncast(f))
                scales = [g for g in factors(e) if g is not f and self._own(g)]
                if scales and self._numbers(body, vs):
                    text = self.linear(_uncast(f), feat, scales)
                    text = text if f.op == "sum" else f"cast({text}, {dtype_name(f.args[1])!r})"
                    rest = [g for g in factors(e) if g is not f and g not in scales]
                    return f"{self.factor(mul(*rest), feat)} * {text}" if rest else text
        return None

    def bias(self, e: Expr, feat: tuple[Var, ...]) -> str:
        param = self.param(e, feat, [])
        j = numbered(self.biases, param)
        self.reads(f"b{j}")
        return columns(f"b({j})", param)

    def param(self, load: Expr, feat: Sequence[Var], ins: Sequence[Var]) -> Param:
        leaf, idx = load.args[0], load.args[1:]
        shape = leaf.shape
        if len(leaf.nodes) > 1:
            if idx[0] is not self.ids:
                raise Refused("a list of experts that is not indexed by the routing id")
            idx, shape = idx[1:], shape[1:]
        dims = tuple(tuple(self.digit(d, n, feat, ins) for d, n in _sized(a, s)) for a, s in zip(idx, shape))
        seen = [d for a in idx for d in _digits(a) if d in set(feat)]
        if seen != list(feat):
            raise Refused("an expert's output features are in another order than the weight's")
        if sorted(map(id, ins)) != sorted(id(d) for a in idx for d in _digits(a) if d in set(ins)):
            raise Refused("an expert's input features are not those of the weight")
        p = Param(leaf, dims)
        if p.letters.count("e") != (0 if p.listed else 1):
            raise Refused("a weight that is indexed by the routing id twice")
        return p

    def digit(self, d: Expr, size: Size, feat: Sequence[Var], ins: Sequence[Var]) -> Digit:
        if d is self.ids:
            return Digit("e", size)
        if is_const(d):
            return Digit("c", size, d.args[0])
        if isinstance(d, Var) and d in set(ins):
            return Digit("i", size)
        if isinstance(d, Var) and d in set(feat):
            return Digit("o", size)
        raise Refused(f"a weight is indexed by {computed(d)}")


def opened(e: Expr) -> tuple[list[Var], Expr]:
    """The variables and the body of nested sums."""
    vs: list[Var] = []
    while e.op == "sum":
        v, e = refresh(e)
        vs.append(v)
    return vs, e


def _uncast(e: Expr) -> Expr:
    """A weight cast once: the stage op casts weights to the rows' dtype, which a matrix product requires to be the same."""
    return e.args[0] if e.op == "cast" else e


def _digits(a: Expr) -> tuple[Expr, ...]:
    return a.args[::2] if a.op == "mix" else (a,)


def _sized(a: Expr, size: Size) -> list[tuple[Expr, Size]]:
    return list(zip(a.args[::2], a.args[1::2])) if a.op == "mix" else [(a, size)]


def _one_feature(e: Expr, feat: tuple[Var, ...]) -> tuple[Expr, tuple[Var, ...]]:
    """Features that are only used as one merged index become one variable."""
    if len(feat) < 2:
        return e, feat
    v = Var(prod(f.size for f in feat))
    merged = replace(e, {index_of(feat): v})
    return (merged, (v,)) if not merged.free & set(feat) else (e, feat)


def columns(text: str, p: Param) -> str:
    """The columns of a full linear that are used: a block, or every n-th."""
    out = [d for d in p.digits if d.role in "oc"]
    fixed = [i for i, d in enumerate(out) if d.role == "c" and d.size != 1]
    if not fixed:
        return text
    total = prod(d.size for d in out)
    strides = [prod(d.size for d in out[i + 1 :]) for i in range(len(out))]
    start = sum(out[i].at * strides[i] for i in fixed)
    width = prod(d.size for d in out if d.role == "o")
    if fixed == list(range(len(fixed))):
        return f"cols({text}, {start}, {start + width}, 1)"
    if fixed == list(range(len(out) - len(fixed), len(out))):
        return f"cols({text}, {start}, {total}, {strides[fixed[0] - 1] if fixed[0] else total})"
    raise Refused("an expert's output features are spread over its weight in another way than blocks or steps")


def numbered(known: list[Param], p: Param) -> int:
    """Index of the parameter; those that differ only in the columns used are one."""
    key = p.key()
    for j, q in enumerate(known):
        if q.key() == key:
            return j
    known.append(p)
    return len(known) - 1


def number(c: Any) -> str:
    return "None" if c is None else repr(float(c)) if isinstance(c, bool) else repr(c)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["Builder", "Digit", "Param", "is_id", "loads", "number"]
