"""Random element expressions for the property tests of the lifter, each built twice: as it is written, and through the constructors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from evaluator import Evaluator
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compile.passes.lift.algebra import add, compare, divide, eq, mul, negate, scat, sub, sum_, unary, where
from moe_compile.passes.lift.expr import Enum, Expr, Leaf, Order, Segment, Var, const, make_order, raw
from moe_compile.passes.lift.index import count, digits, idiv, inv, mix, mod, perm, sel

# More of them: LIFT_EXAMPLES=5000 pytest tests/test_lift_algebra.py
FEW = settings(
    max_examples=int(os.environ.get("LIFT_EXAMPLES", "80")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
SYMBOL = sympy.Symbol("s0", integer=True, positive=True)
OTHER = sympy.Symbol("s1", integer=True, positive=True)


class Pair(NamedTuple):
    """The same expression without and with simplification."""

    plain: Expr
    simple: Expr


class Stub:
    """Stands for the FX node that a leaf reads."""

    def __init__(self, name: str):
        self.name = name


def leaf(name: str, tensor: Tensor, range: tuple | None = None, distinct: bool = False, shape: tuple | None = None) -> Leaf:
    shape = tuple(tensor.shape) if shape is None else shape
    return Leaf([Stub(name)], shape, range, distinct, not tensor.is_floating_point())


def dyadic(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Multiples of 1/8 in -2 .. 2: sums and products are exact, so that rounding never decides a comparison."""
    return torch.randint(-16, 17, shape, generator=g, dtype=torch.float64) / 8


def routing_ids(tokens: int, top_k: int, experts: int, distinct: bool, g: torch.Generator) -> Tensor:
    if distinct:
        return torch.rand(tokens, experts, generator=g).topk(top_k, dim=-1).indices
    return torch.randint(0, experts, (tokens, top_k), generator=g)


@dataclass
class World:
    """Sizes, tensors and free variables of one example.

    `T` may be a symbol; the tensors have its number of rows.  `scale` holds powers of two, `anything` integers without a known range.
    """

    T: Any
    K: int
    E: int
    H: int
    ids: Leaf
    w: Leaf
    x: Leaf
    dense: Leaf
    scale: Leaf
    anything: Leaf
    order: Order
    evaluator: Evaluator
    free: list[Var]

    @property
    def sizes(self) -> list[Any]:
        return [self.T, self.K, self.E, self.H, self.T * self.K]

    @property
    def constants(self) -> list[int]:
        return [n for n in self.sizes if isinstance(n, int)]


@st.composite
def worlds(draw: st.DrawFn, symbolic: bool = False) -> World:
    tokens, experts, hidden = draw(st.sampled_from([2, 3, 1])), draw(st.sampled_from([3, 2, 4, 1])), draw(st.sampled_from([2, 4, 1]))
    top_k, distinct = draw(st.sampled_from([k for k in (2, 3, 1) if k <= experts])), draw(st.booleans())
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    T = SYMBOL if symbolic else tokens
    ids, w = routing_ids(tokens, top_k, experts, distinct, g), dyadic((tokens, top_k), g)
    x, dense = dyadic((tokens, hidden), g), dyadic((tokens, experts), g)
    scale = 2.0 ** torch.randint(-2, 3, (tokens,), generator=g).double()
    anything = torch.randint(-3, 7, (tokens,), generator=g)
    leaves = [
        leaf("ids", ids, (0, experts), distinct, (T, top_k)), leaf("w", w, shape=(T, top_k)), leaf("x", x, shape=(T, hidden)),
        leaf("dense", dense, shape=(T, experts)), leaf("scale", scale, shape=(T,)), leaf("anything", anything, shape=(T,)),
    ]  # fmt: skip
    t, k = Var(T), Var(top_k)
    order = make_order([t, k], raw("load", leaves[0], t, k))
    tensors = dict(zip((a.nodes[0] for a in leaves), (ids, w, x, dense, scale, anything)))
    free = [Var(T), Var(top_k), Var(experts), Var(hidden), Var(T * top_k)]
    return World(T, top_k, experts, hidden, *leaves, order, Evaluator(tensors, {SYMBOL: tokens}), free)


class Grower:
    """Draws expressions whose variables are those in scope."""

    def __init__(self, draw: Any, world: World):
        self.draw, self.world = draw, world

    def one_of(self, options: list[Any]) -> Any:
        return options[self.draw(st.integers(0, len(options) - 1))]

    def grow(self, options: list[Callable[[], Pair]]) -> Pair:
        return self.one_of(options)()

    # ------------------------------------------------------------ indices: integers in range(n)
    def number(self, n: Any, depth: int, scope: list[Any]) -> Pair:
        """An index in range(n), or an integer that may be anywhere."""
        if self.draw(st.integers(0, 2)):
            return self.index(n, depth, scope)
        a = self.load(self.world.anything, 0, scope)
        b = self.index(n, max(depth - 1, 0), scope)
        c = const(self.draw(st.sampled_from([-1, -2, 1])))
        more = self.one_of([[], [a], [same(c), b], [a, same(c)]])
        return Pair(raw("add", b.plain, *[m.plain for m in more]), add(b.simple, *[m.simple for m in more])) if more else a

    def index(self, n: Any, depth: int, scope: list[Any]) -> Pair:
        options: list[Callable[[], Pair]] = [lambda v=v: same(v) for v in scope if isinstance(v, Var) and v.size == n] * 2
        options += [lambda c=c: same(c) for c, size in coordinates(scope) if size == n] * 3
        options.append(lambda: same(const(self.draw(st.integers(0, n - 1)) if isinstance(n, int) else 0)))
        if depth > 0:
            options += self._composite(n, depth - 1, scope)
        return self.grow(options)

    def _composite(self, n: Any, depth: int, scope: list[Any]) -> list[Callable[[], Pair]]:
        w = self.world
        options = [lambda: self._mod(n, depth, scope), lambda: self._idiv(n, depth, scope), lambda: self._sel(n, depth, scope)]
        if n == w.E:
            options += [lambda: self.ids(depth, scope)] * 3
        if n == w.T * w.K:
            options += [lambda: self._sorted(n, depth, scope), lambda: self._mix([w.T, w.K], depth, scope)] * 2
        if isinstance(n, int) and n % 2 == 0:
            options.append(lambda: self._mix([n // 2, 2], depth, scope))
        if isinstance(n, int) and n > 1:
            options.append(lambda: self._shifted(n, depth, scope))
        return options

    def _mod(self, n: Any, depth: int, scope: list[Any]) -> Pair:
        a = self.number(self.one_of(self.world.sizes), depth, scope)
        return Pair(raw("mod", a.plain, n), mod(a.simple, n))

    def _idiv(self, n: Any, depth: int, scope: list[Any]) -> Pair:
        by = self.one_of([self.world.K, 2, 3])
        a = self.index(n * by, depth, scope)
        return Pair(raw("idiv", a.plain, by), idiv(a.simple, by))

    def _mix(self, sizes: list[Any], depth: int, scope: list[Any]) -> Pair:
        ds = [(self.index if n == 1 else self.number)(n, depth, scope) for n in sizes]
        plain = [y for d, n in zip(ds, sizes) for y in (d.plain, n)]
        return Pair(raw("mix", *plain), mix(*[y for d, n in zip(ds, sizes) for y in (d.simple, n)]))

    def _sel(self, n: Any, depth: int, scope: list[Any]) -> Pair:
        i = self.index(2, depth, scope)
        a, b = self.index(n, depth, scope), self.index(n, depth, scope)
        return Pair(raw("sel", i.plain, a.plain, b.plain), sel(i.simple, a.simple, b.simple))

    def _shifted(self, n: int, depth: int, scope: list[Any]) -> Pair:
        by = self.draw(st.integers(1, n - 1))
        a = self.index(n - by, depth, scope)
        return Pair(raw("add", a.plain, const(by)), add(a.simple, const(by)))

    def _sorted(self, n: Any, depth: int, scope: list[Any]) -> Pair:
        op, f = self.one_of([("perm", perm), ("inv", inv)])
        a = self.index(n, depth, scope)
        return Pair(raw(op, self.world.order, a.plain), f(self.world.order, a.simple))

    def ids(self, depth: int, scope: list[Any]) -> Pair:
        return self.load(self.world.ids, depth, scope)

    def load(self, leaf: Leaf, depth: int, scope: list[Any]) -> Pair:
        at = [self.index(n, depth, scope) for n in leaf.shape]
        return Pair(raw("load", leaf, *[a.plain for a in at]), raw("load", leaf, *[a.simple for a in at]))

    # ------------------------------------------------------------ conditions
    def equation_in(self, v: Var, depth: int, scope: list[Any]) -> Pair:
        """[a(v) = b] as scatter, sort and enumerate code makes it: v itself, its digits, a mixed index, a sorted row, a sorted key."""
        w, n = self.world, v.size
        parts = self.one_of([d for d in (1, 2, 3) if isinstance(n, int) and n % d == 0] or [1])
        parts = self.one_of([parts, parts, 2])
        sides: list[Callable[[], tuple[Any, Pair]]] = [lambda: (n, same(v))]
        if isinstance(n, int):
            sides.append(lambda: (-(-n // parts), Pair(raw("idiv", v, parts), idiv(v, parts))))
            sides.append(lambda: (parts, Pair(raw("mod", v, parts), mod(v, parts))))
            sides.append(lambda: self._mixed(v, depth, scope))
        if n == w.T * w.K:
            sides += [lambda: (n, Pair(raw("perm", w.order, v), perm(w.order, v))), lambda: (w.E, self.sorted_key(v))] * 2
        size, a = self.one_of(sides)()
        b = self.number(size, depth, self.one_of([scope, scope, [*scope, v]]))
        pair = Pair(raw("eq", a.plain, b.plain), eq(a.simple, b.simple))
        return pair if self.draw(st.booleans()) else Pair(raw("eq", b.plain, a.plain), eq(b.simple, a.simple))

    def _mixed(self, v: Var, depth: int, scope: list[Any]) -> tuple[Any, Pair]:
        other = self.number(2, depth, scope)
        args = [(v, v.size), (other, 2)] if self.draw(st.booleans()) else [(other, 2), (v, v.size)]
        plain = [y for d, n in args for y in (d.plain if isinstance(d, Pair) else d, n)]
        simple = [y for d, n in args for y in (d.simple if isinstance(d, Pair) else d, n)]
        return v.size * 2, Pair(raw("mix", *plain), mix(*simple))

    def sorted_key(self, v: Var) -> Pair:
        """ids at sorted row v."""
        w = self.world
        plain = raw("perm", w.order, v)
        at = [raw("idiv", plain, w.K), raw("mod", plain, w.K)]
        return Pair(raw("load", w.ids, *at), raw("load", w.ids, *digits(perm(w.order, v), (w.T, w.K))))

    def condition(self, depth: int, scope: list[Any]) -> Pair:
        options = [lambda: self._equation(depth - 1, scope)] * 3 + [lambda: self._comparison(depth - 1, scope)]
        if depth > 0:
            options += [lambda: self._not(depth - 1, scope), lambda: self._both(depth - 1, scope), lambda: self._nonzero(depth - 1, scope)]
        return self.grow(options)

    def _equation(self, depth: int, scope: list[Any]) -> Pair:
        n = self.one_of(self.world.sizes)
        a = self.number(n, depth, scope)
        b = self.grow([lambda: self.number(n, depth, scope), lambda: same(const(self.draw(st.sampled_from([0, 1, 2, 7, -1, 0.5]))))])
        return Pair(raw("eq", a.plain, b.plain), eq(a.simple, b.simple))

    def _comparison(self, depth: int, scope: list[Any]) -> Pair:
        op, n = self.one_of(["lt", "le", "gt", "ge", "ne"]), self.one_of(self.world.sizes)
        a = self.number(n, depth, scope)
        b = self.grow([lambda: self.number(n, depth, scope), lambda: same(const(self.draw(st.sampled_from([0, 1, 3, -1, 0.5]))))])
        return Pair(raw(op, a.plain, b.plain), compare(op, a.simple, b.simple))

    def _nonzero(self, depth: int, scope: list[Any]) -> Pair:
        op, a = self.one_of(["ne", "gt", "eq"]), self.scalar(depth, scope)
        simple = eq(a.simple, const(0)) if op == "eq" else compare(op, a.simple, const(0))
        return Pair(raw(op, a.plain, const(0)), simple)

    def _not(self, depth: int, scope: list[Any]) -> Pair:
        a = self.condition(depth, scope)
        return Pair(raw("not", a.plain), negate(a.simple))

    def _both(self, depth: int, scope: list[Any]) -> Pair:
        a, b = self.condition(depth, scope), self.condition(depth, scope)
        return Pair(raw("mul", a.plain, b.plain), mul(a.simple, b.simple))

    # ------------------------------------------------------------ numbers
    def scalar(self, depth: int, scope: list[Any]) -> Pair:
        w = self.world
        options = [lambda a=a: self.load(a, min(depth, 1), scope) for a in (w.w, w.x, w.dense)]
        options.append(lambda: same(const(self.draw(st.sampled_from([0, 1, 2, -1, 0.0, 1.0, 0.5, -1.5])))))
        if depth > 0:
            options += [
                lambda: self.condition(depth - 1, scope), lambda: self._add(depth - 1, scope), lambda: self._sub(depth - 1, scope),
                lambda: self._product(depth - 1, scope), lambda: self._product(depth - 1, scope), lambda: self._divide(depth - 1, scope),
                lambda: self._unary(depth - 1, scope), lambda: self._where(depth - 1, scope), lambda: self._choose(depth - 1, scope),
                *[lambda: self._sum(depth - 1, scope)] * 3, *[lambda: self.slot_sum(depth - 1, scope)] * 3,
                lambda: self._scatter(depth - 1, scope), lambda: self._count(depth - 1, scope),
                lambda: self.sorted_sum(depth - 1, scope),
            ]  # fmt: skip
        return self.grow(options)

    def _add(self, depth: int, scope: list[Any]) -> Pair:
        xs = [self.scalar(depth, scope) for _ in range(self.draw(st.integers(2, 3)))]
        return Pair(raw("add", *[a.plain for a in xs]), add(*[a.simple for a in xs]))

    def _sub(self, depth: int, scope: list[Any]) -> Pair:
        a, b = self.scalar(depth, scope), self.scalar(depth, scope)
        return Pair(raw("add", a.plain, raw("mul", const(-1), b.plain)), sub(a.simple, b.simple))

    def _product(self, depth: int, scope: list[Any]) -> Pair:
        xs = [self.scalar(depth, scope) for _ in range(self.draw(st.integers(2, 3)))]
        return Pair(raw("mul", *[a.plain for a in xs]), mul(*[a.simple for a in xs]))

    def _divide(self, depth: int, scope: list[Any]) -> Pair:
        a, b = self.scalar(depth, scope), self.load(self.world.scale, 0, scope)
        return Pair(raw("div", a.plain, b.plain), divide(a.simple, b.simple))

    def _unary(self, depth: int, scope: list[Any]) -> Pair:
        a, (op, *extra) = self.scalar(depth, scope), self.one_of(self.one_of(UNARY))
        return Pair(raw(op, a.plain, *extra), unary(op, a.simple, *extra))

    def _where(self, depth: int, scope: list[Any]) -> Pair:
        c, a, b = self.condition(depth, scope), self.scalar(depth, scope), self.scalar(depth, scope)
        return Pair(raw("where", c.plain, a.plain, b.plain), where(c.simple, a.simple, b.simple))

    def _choose(self, depth: int, scope: list[Any]) -> Pair:
        i = self.index(2, depth, scope)
        a, b = self.scalar(depth, scope), self.scalar(depth, scope)
        return Pair(raw("sel", i.plain, a.plain, b.plain), sel(i.simple, a.simple, b.simple))

    def _count(self, depth: int, scope: list[Any]) -> Pair:
        a = self.index(self.world.E, depth, scope)
        return Pair(raw("count", self.world.order, a.plain), count(self.world.order, a.simple))

    # ------------------------------------------------------------ binders
    def _sum(self, depth: int, scope: list[Any]) -> Pair:
        v = self.grow([lambda: Var(self.one_of(self.world.sizes)), lambda: self.rows(depth), lambda: self.segment()])  # type: ignore[arg-type,return-value]
        body = self.scalar(depth, [*scope, v])  # type: ignore[list-item]
        if v.size is not None and self.draw(st.booleans()):  # type: ignore[union-attr]
            test = self.equation_in(v, min(depth, 1), scope)  # type: ignore[arg-type]
            body = Pair(raw("mul", test.plain, body.plain), mul(test.simple, body.simple))
        return Pair(raw("sum", v, body.plain), sum_(v, body.simple))  # type: ignore[arg-type]

    def sorted_sum(self, depth: int, scope: list[Any]) -> Pair:
        """A sum over sorted rows, perhaps not all, of what stands at the unsorted row, perhaps times what depends on the position."""
        w = self.world
        v = Var(self.one_of([w.T * w.K, w.T * w.K, w.T]))
        at = Pair(raw("perm", w.order, v), perm(w.order, v))
        plain = [raw("idiv", at.plain, w.K), raw("mod", at.plain, w.K)]
        f = [Pair(raw("load", w.w, *plain), raw("load", w.w, *digits(at.simple, (w.T, w.K))))]
        if self.draw(st.booleans()):
            f.append(self.sorted_test(v, depth, scope))
        if self.draw(st.booleans()):
            f.append(self.scalar(depth, [*scope, v]))
        return Pair(raw("sum", v, raw("mul", *[a.plain for a in f])), sum_(v, mul(*[a.simple for a in f])))

    def sorted_test(self, v: Var, depth: int, scope: list[Any]) -> Pair:
        """[ids at sorted row v = e]"""
        key, e = self.sorted_key(v), self.number(self.world.E, depth, scope)
        return Pair(raw("eq", key.plain, e.plain), eq(key.simple, e.simple))

    def rows(self, depth: int) -> Var:
        """A variable over the rows of a nonzero."""
        dims = self.one_of([((self.world.T,), (self.world.K,)), ((self.world.T, self.world.K),), ((self.world.E,), (self.world.T,))])
        vs = tuple(tuple(Var(n) for n in d) for d in dims)
        test = self.condition(depth, [v for d in vs for v in d])
        return Var(None, Enum(vs, test.simple))

    def segment(self) -> Var:
        return Var(None, Segment(self.world.order, self.draw(st.integers(0, self.world.E - 1))))

    def slot_sum(self, depth: int, scope: list[Any]) -> Pair:
        """sum_k [ids[t, k] = e] g(k), perhaps over fewer slots."""
        t, e = self.index(self.world.T, 0, scope), self.index(self.world.E, 0, scope)
        return self._slot_sum_at(t, e, depth, scope)

    def slots(self, depth: int, t: Pair, e: Pair, scope: list[Any]) -> Pair:
        """An expression of what is scattered to one (token, expert): where most of the lemmas about sparse sums meet."""
        if depth == 0:
            return self._slot_sum_at(t, e, 0, scope)
        a = self.slots(depth - 1, t, e, scope)
        what = self.draw(st.integers(0, 8))
        if what <= 2:
            b = self.slots(depth - 1, t, e, scope)
            return Pair(raw("mul", a.plain, b.plain), mul(a.simple, b.simple))
        if what == 3:
            b = self.slots(depth - 1, t, e, scope)
            return Pair(raw("add", a.plain, b.plain), add(a.simple, b.simple))
        if what == 4:
            (op, *extra) = self.one_of(self.one_of(UNARY))
            return Pair(raw(op, a.plain, *extra), unary(op, a.simple, *extra))
        if what == 5:
            b = self.load(self.world.scale, 0, scope)
            return Pair(raw("div", a.plain, b.plain), divide(a.simple, b.simple))
        if what == 6:
            b = self.slots(depth - 1, t, e, scope)
            c = Pair(raw("ne", b.plain, const(0)), compare("ne", b.simple, const(0)))
            return Pair(raw("where", c.plain, a.plain, const(0)), where(c.simple, a.simple, const(0)))
        if what == 7:
            c = Pair(raw("gt", a.plain, const(0)), compare("gt", a.simple, const(0)))
            return Pair(raw("mul", c.plain, a.plain), mul(c.simple, a.simple))
        b = self.scalar(1, scope)
        return Pair(raw("mul", b.plain, a.plain), mul(b.simple, a.simple))

    def _slot_sum_at(self, t: Pair, e: Pair, depth: int, scope: list[Any]) -> Pair:
        k = Var(self.draw(st.sampled_from(range(self.world.K, 0, -1))))
        if not self.draw(st.integers(0, 7)):
            e = self.index(self.world.E, 1, [*scope, k])
        g = self.grow([lambda: same(const(1)), lambda: self._slot_value(t, k), lambda: self.scalar(depth, [*scope, k])])
        tests = [raw("load", self.world.ids, a, k) for a in t]
        plain = raw("sum", k, raw("mul", raw("eq", tests[0], e.plain), g.plain))
        return Pair(plain, sum_(k, mul(eq(tests[1], e.simple), g.simple)))

    def _slot_value(self, t: Pair, k: Var) -> Pair:
        return Pair(raw("load", self.world.w, t.plain, k), raw("load", self.world.w, t.simple, k))

    def _scatter(self, depth: int, scope: list[Any]) -> Pair:
        """A slot's value in its expert's column, something else in the others; only where the ids are known to be distinct."""
        if not self.world.ids.distinct:
            return self.slot_sum(depth, scope)
        k, t, e = Var(self.world.K), self.index(self.world.T, 0, scope), self.index(self.world.E, 0, scope)
        src, base = self.scalar(depth, [*scope, k]), self.scalar(min(depth, 1), scope)
        tests = [raw("load", self.world.ids, a, k) for a in t]
        plain = raw("scat", k, raw("eq", tests[0], e.plain), src.plain, base.plain)
        return Pair(plain, scat(k, eq(tests[1], e.simple), src.simple, base.simple))


UNARY: list[list[tuple]] = [
    [("sigmoid",), ("softplus",), ("cos",), ("mish",)],
    [("cast", torch.float32), ("cast", torch.bfloat16), ("stop",), ("floor",)],
    [("silu",), ("relu",), ("tanh",), ("neg",), ("erf",), ("abs",), ("square",), ("gelu", "none"), ("gelu", "tanh"),
     ("leaky_relu", const(0.125)), ("elu", const(1.5))],
]  # fmt: skip


def same(e: Expr) -> Pair:
    return Pair(e, e)


def coordinates(scope: list[Any]) -> list[tuple[Expr, Any]]:
    """The integers that a data-dependent row in scope stands for, with their ranges."""
    found: list[tuple[Expr, Any]] = []
    for v in scope:
        if isinstance(v.domain, Enum):
            for j, d in enumerate(v.domain.dims):
                n: Any = 1
                for u in d:
                    n = n * u.size
                found.append((raw("coord", v, j), n))
        elif isinstance(v.domain, Segment):
            n = 1
            for s in v.domain.order.sizes:
                n = n * s
            found.append((raw("seg", v), n))
    return found
