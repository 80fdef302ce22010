"""The calculus: element expressions and index variables.

An `Expr` is an interned (op, args) node, so equal terms are the same object.  Binders (`sum`, `scat`, `softmax`) hold their variable in
args[0].  The table of interned terms lives as long as one lift (`fresh_table`), so that nothing piles up between compilations.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .sizes import Size

_ids = itertools.count()
_table: dict[Any, Expr] = {}
_orders: dict[Any, Order] = {}
_stacks: dict[Any, Leaf] = {}

BINDERS = {"sum", "scat", "softmax"}


class Refused(Exception):
    """A rule does not cover this; the message is the reason shown to the user."""


class Expr:
    __slots__ = ("args", "free", "op")
    op: str
    args: tuple[Any, ...]
    free: frozenset[Var]

    def __repr__(self) -> str:
        return show(self)


class Var(Expr):
    """Index variable over range(size), or over `domain` (Enum or Segment) when the extent depends on data (size None)."""

    __slots__ = ("domain", "id", "size")

    def __init__(self, size: Size, domain: Any = None):
        self.op, self.args, self.size, self.domain, self.id = "var", (), size, domain, next(_ids)
        self.free = frozenset((self,))

    def fresh(self) -> Var:
        return Var(self.size, self.domain)


class Leaf:
    """A tensor kept closed: one FX node, or a stack of nodes (one an expert).

    Facts: the range of routing ids, distinct along the last dim; limits of any integers; constant: the elements, where they are known;
    dequantised: computed from quantised numbers; rank: what it counts, where it is a running count; total: where it is a count in all.
    """

    rank: Rank | None = None
    total: Total | None = None

    def __init__(
        self,
        nodes: list,
        shape: tuple,
        range: tuple | None = None,
        distinct: bool = False,
        integer: bool = False,
        limits: tuple | None = None,
        constant: Any = None,
        dequantised: bool = False,
    ):
        self.nodes, self.shape, self.range, self.distinct, self.integer = nodes, shape, range, distinct, integer
        self.limits, self.constant, self.dequantised = limits, constant, dequantised

    def __repr__(self) -> str:
        return self.nodes[0].name + (f"..x{len(self.nodes)}" if len(self.nodes) > 1 else "")


class Rank:
    """A running count: how often `mask` (0 or 1, over `dims`) holds along dimension `along`, up to and with each place."""

    def __init__(self, dims: tuple[tuple[Var, ...], ...], mask: Expr, along: int):
        self.dims, self.mask, self.along = dims, mask, along


class Total:
    """A count in all: at how many of the places `over` the mask (0 or 1) holds, for each index of `dims`."""

    def __init__(self, dims: tuple[tuple[Var, ...], ...], over: list[Var], mask: Expr):
        self.dims, self.over, self.mask = dims, over, mask


class Enum:
    """Rows of nonzero: the points of `dims` (a tuple of var tuples) where `cond` holds, in row-major order.

    order: the sort by the first coordinate that brought them there, where points of one index may follow each other in another order.
    """

    def __init__(self, dims: tuple, cond: Expr, order: str = ""):
        self.dims, self.cond, self.order = dims, cond, order
        self.parent: tuple[Enum, int] | None = None  # (whole, i): these are the rows of `whole` whose first coordinate is i
        self.key = ("enum", tuple(tuple(v.size for v in d) for d in dims), alpha(cond, [v for d in dims for v in d]), order)


class Segment:
    """Rows of the sorted key whose key equals `index`."""

    def __init__(self, order: Order, index: int):
        self.order, self.index = order, index
        self.key = ("segment", order.key, index)


class Order:
    """The permutation that sorts `expr` (an integer key over `vars`, flattened row-major); `make_order` interns them."""

    def __init__(self, vars: Iterable[Var], expr: Expr, key: Any):
        self.vars, self.expr, self.key = tuple(vars), expr, key
        self.sizes = tuple(v.size for v in self.vars)

    def __repr__(self) -> str:
        return "P"


@contextlib.contextmanager
def fresh_table() -> Iterator[None]:
    """Terms built inside are forgotten at the end; nests."""
    global _table, _orders, _stacks
    saved = _table, _orders, _stacks
    _table, _orders, _stacks = dict(_constants), {}, {}
    try:
        yield
    finally:
        _table, _orders, _stacks = saved


def make_order(vars: Sequence[Var], expr: Expr) -> Order:
    key = ("order", tuple(v.size for v in vars), alpha(expr, vars))
    return _orders.setdefault(key, Order(vars, expr, key))


def make_stack(leaves: Sequence[Leaf]) -> Leaf:
    """One tensor an expert, as one leaf; the same for the same tensors."""
    whole = all((leaf.integer, leaf.limits) == (leaves[0].integer, leaves[0].limits) for leaf in leaves)
    facts = (leaves[0].integer, leaves[0].limits) if whole else (False, None)
    nodes = [leaf.nodes[0] for leaf in leaves]
    made = Leaf(nodes, (len(nodes), *leaves[0].shape), integer=facts[0], limits=facts[1])
    return _stacks.setdefault((tuple(nodes), facts), made)


def raw(op: str, *args: Any) -> Expr:
    """Intern without simplification."""
    key = (op, *((type(a), a) if not isinstance(a, Expr) else a for a in args))
    e = _table.get(key)
    if e is None:
        e = Expr()
        e.op, e.args = op, args
        free: frozenset[Var] = frozenset().union(*(a.free for a in args if isinstance(a, Expr)))
        e.free = free - {args[0]} if op in BINDERS and isinstance(args[0], Var) else free
        _table[key] = e
    return e


def const(c: Any) -> Expr:
    return raw("const", c)


ZERO, ONE, UNDEF = const(0), const(1), raw("undef")
_constants = dict(_table)


def is_const(e: Expr, v: Any = None) -> bool:
    return e.op == "const" and (v is None or e.args[0] == v)


def factors(e: Expr) -> list[Expr]:
    return list(e.args) if e.op == "mul" else [e]


def terms(e: Expr) -> list[Expr]:
    return list(e.args) if e.op == "add" else [e]


def children(e: Expr) -> Iterator[Expr]:
    return (a for a in e.args if isinstance(a, Expr))


def subexprs(e: Expr, seen: set[Expr] | None = None) -> Iterator[Expr]:
    """All different sub-expressions, parents first."""
    seen = set() if seen is None else seen
    if e in seen:
        return
    seen.add(e)
    yield e
    for a in children(e):
        yield from subexprs(a, seen)


def loads(e: Expr) -> Iterator[Expr]:
    return (x for x in subexprs(e) if x.op == "load")


def alpha(e: Expr, order: Sequence[Var] = ()) -> Any:
    """Structural key of e with free variables numbered by `order` and bound variables by nesting."""

    def go(x: Any, names: dict) -> Any:
        if not isinstance(x, Expr):
            return x.key if isinstance(x, Order) else x
        if isinstance(x, Var):
            return ("v", names.get(x, ("free", x.id)))
        if x.op in BINDERS and isinstance(v := x.args[0], Var):
            names = {**names, v: ("b", len(names), v.size, v.domain and v.domain.key)}
        return (x.op, *(go(a, names) for a in x.args))

    return go(e, {v: i for i, v in enumerate(order)})


def show(e: Any) -> str:
    """Readable form, for logs and refusal reasons."""
    if not isinstance(e, Expr):
        return str(e)
    a = e.args
    if e.op == "const":
        return f"{a[0]:g}" if isinstance(a[0], float) else str(a[0])
    if isinstance(e, Var):
        return f"i{e.id}" if e.size is not None else f"r{e.id}"
    if e.op == "load":
        return f"{a[0]}[{', '.join(map(show, a[1:]))}]"
    if e.op in ("add", "mul"):
        return "(" + {"add": " + ", "mul": " * "}[e.op].join(map(show, a)) + ")"
    if e.op == "eq":
        return f"[{show(a[0])}={show(a[1])}]"
    if e.op == "sum":
        return f"sum_{show(a[0])}:{a[0].size} {show(a[1])}"
    return f"{e.op}({', '.join(map(show, a))})"
