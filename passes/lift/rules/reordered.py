"""Rows of nonzero sorted by one of their coordinates: `nonzero(gates).sort(0)` brings them expert by expert.

moved   the row, in the order before, of each row in the order behind the sort
nth     a coordinate of the row, in the order before, that has the same number

No ATen op is registered here; sort.py and gather.py call these.
"""

from __future__ import annotations

from ..algebra import subst
from ..expr import UNDEF, Enum, Expr, Refused, Var, raw
from ..index import sel
from ..value import Value


def sorted_rows(x: Value, spelled: str) -> list[Value] | None:
    """[sorted, order] of one coordinate of a mask's rows, or of the table of all coordinates; None for anything else."""
    if not x.dims or len(x.dims[0]) != 1 or not isinstance(x.dims[0][0].domain, Enum):
        return None
    (r,), n = x.dims[0], len(x.dims[0][0].domain.dims)
    columns = [raw("coord", r, j) for j in range(n)]
    if len(x.dims) == 1 and x.expr in columns:
        by, which = columns.index(x.expr), None
    elif len(x.dims) == 2 and len(x.dims[1]) == 1 and x.expr is sel(x.dims[1][0], *columns):
        by, which = n - 1, x.dims[1][0]
    else:
        return None
    row = Var(None, _by(r.domain, by, spelled))
    values, order = raw("coord", row, 0), raw("moved", row, r.domain.key, by)
    if which is None:
        return [Value(((row,),), values), Value(((row,),), order)]
    # Each column is sorted by itself: the first one was already, of those between nothing is known.
    first, between = raw("nth", row, r.domain.key, by, 0), [UNDEF] * (n - 2)
    table = [[first, *between, values], [UNDEF, *between, order]]
    return [Value(((row,), (which,)), sel(which, *each)) for each in table]


def _by(rows: Enum, coordinate: int, spelled: str) -> Enum:
    """The same points, by that coordinate first; how those of one index follow each other is the sort's own affair."""
    fresh = {v: v.fresh() for d in rows.dims for v in d}
    dims = tuple(tuple(fresh[v] for v in rows.dims[j]) for j in _first(coordinate, len(rows.dims)))
    return Enum(dims, subst(rows.cond, fresh), f"{rows.order}, {spelled}" if rows.order else spelled)


def _first(coordinate: int, n: int) -> list[int]:
    return [coordinate, *(j for j in range(n) if j != coordinate)]


def moved_rows(x: Value, d: int, index: Expr) -> dict[Expr, Expr] | None:
    """x[index] where the index says at which row of x's each row of a sorted order stood: what is to be put in place of what."""
    if index.op != "moved" or len(x.dims[d]) != 1:
        return None
    (r,), (row, key, by) = x.dims[d], index.args
    if not isinstance(r.domain, Enum) or not isinstance(row, Var):
        raise Refused("rows are taken in the order of other rows")
    old, n = ("coord", r) if r.domain.key == key else ("nth", r, key, by), len(r.domain.dims)
    return {raw(*old, j): raw("coord", row, i) for i, j in enumerate(_first(by, n))}


__all__ = ["moved_rows", "sorted_rows"]
