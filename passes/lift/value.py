"""A tensor on the abstract side: one tuple of index variables per dimension, and its element as an expression over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .algebra import subst
from .expr import Expr, Refused, Var, const
from .index import digits, mix
from .sizes import Size, prod, quotient


class Value:
    """`dims`: one tuple of `Var`s per dimension (its mixed-radix product; size 1 = the empty tuple).  `expr`: the element."""

    __slots__ = ("dims", "expr")

    def __init__(self, dims: Sequence[Sequence[Var]], expr: Expr):
        self.dims, self.expr = tuple(tuple(d) for d in dims), expr

    def vars(self) -> list[Var]:
        return [v for d in self.dims for v in d]

    def sizes(self, i: int) -> tuple[Size, ...]:
        return tuple(v.size for v in self.dims[i])

    def extent(self, i: int) -> Size:
        return prod(self.sizes(i))

    def index(self, i: int) -> Expr:
        """The index of dimension i as an expression."""
        return index_of(self.dims[i])

    def at(self, i: int, e: Expr) -> Expr:
        """Element expression with dimension i indexed by e."""
        return subst(self.expr, dict(zip(self.dims[i], digits(e, self.sizes(i)))) if self.dims[i] else {})

    def refine(self, i: int, sizes: Sequence[Size]) -> Value:
        """Split the variables of dimension i so that their sizes are `sizes`."""
        if self.sizes(i) == tuple(sizes) or None in self.sizes(i):
            return self
        new = [Var(s) for s in sizes]
        table, k = {}, 0
        for v in self.dims[i]:
            part: list[Var] = []
            while prod(p.size for p in part) != v.size:
                if k == len(new):
                    raise Refused(f"a dimension of {v.size} cannot be split into {tuple(sizes)}")
                part.append(new[k])
                k += 1
            table[v] = index_of(part)
        if self.dims[i] and k != len(new):  # (a dimension of extent 1 broadcasts)
            raise Refused(f"a dimension of {self.extent(i)} cannot be split into {tuple(sizes)}")
        return Value((*self.dims[:i], tuple(new), *self.dims[i + 1 :]), subst(self.expr, table))

    def renamed(self) -> Value:
        t = {v: v.fresh() for v in self.vars()}
        return Value([[t[v] for v in d] for d in self.dims], subst(self.expr, t))


def index_of(vars: Sequence[Var]) -> Expr:
    return vars[0] if len(vars) == 1 else mix(*[x for v in vars for x in (v, v.size)])


def common(sa: Sequence[Size], sb: Sequence[Size]) -> tuple[Size, ...]:
    """Coarsest sizes that refine both mixed radices."""
    if None in sa or None in sb:
        if tuple(sa) == tuple(sb):
            return tuple(sa)
        if len(sa) != 1 or len(sb) != 1:
            raise Refused("a data-dependent dimension is merged with another")
        return tuple(sa)
    a, b, out = list(sa), list(sb), []
    while a and b:
        x, y = a.pop(), b.pop()
        if x == y:
            out.append(x)
        elif (q := quotient(y, x)) is not None:
            out.append(x)
            b.append(q)
        elif (q := quotient(x, y)) is not None:
            out.append(y)
            a.append(q)
        else:
            raise Refused(f"a dimension is factored in two incompatible ways, {tuple(sa)} and {tuple(sb)}")
    if any(s != 1 for s in a + b):
        raise Refused(f"dimensions of different extents, {tuple(sa)} and {tuple(sb)}")
    return tuple(s for s in reversed(out) if s != 1)


def same_domain(a: Var, b: Var) -> bool:
    return a.size == b.size and (a.domain and a.domain.key) == (b.domain and b.domain.key)


def broadcast(*operands: Any) -> tuple[list[tuple[Var, ...]], list[Expr]]:
    """Bring Values (or numbers) to common dims, renaming and splitting variables: the dims, and the expressions over them."""
    vals = [v if isinstance(v, Value) else Value((), v if isinstance(v, Expr) else const(v)) for v in operands]
    rank = max(len(v.dims) for v in vals)
    vals = [Value(((),) * (rank - len(v.dims)) + v.dims, v.expr) for v in vals]
    for i in range(rank):
        sizes = None
        for v in vals:
            if v.dims[i]:
                sizes = v.sizes(i) if sizes is None else common(sizes, v.sizes(i))
        if sizes is not None:
            vals = [v.refine(i, sizes) if v.dims[i] else v for v in vals]
    dims = [next((v.dims[i] for v in vals if v.dims[i]), ()) for i in range(rank)]
    seen = [v for d in dims for v in d]
    if len(set(seen)) < len(seen):  # one operand may lend the same variable to two dims: start from fresh ones
        dims = [tuple(v.fresh() for v in d) for d in dims]
    return dims, [onto(v, dims) for v in vals]


def onto(v: Value, dims: Sequence[Sequence[Var]]) -> Expr:
    """v's expression with its variables renamed to those of dims."""
    table = {}
    for mine, theirs in zip(v.dims, dims):
        for a, b in zip(mine, theirs):
            if not same_domain(a, b):
                raise Refused("rows found by one mask meet rows found by another, and nothing says that they are the same rows")
            table[a] = b
    return subst(v.expr, table)
