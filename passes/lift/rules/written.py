"""Rows of buffers that are overwritten: by the positions of tokens no two go to one row, but for a row of those that have no room."""

from __future__ import annotations

from ..algebra import eq, mul, replace, subst, sum_, where
from ..expr import ONE, UNDEF, Enum, Expr, Var, factors, is_const, raw
from ..positions import within
from ..ranks import collapse, counted
from ..value import Value, common, index_of
from .mask import conditions


def room(e: Expr) -> tuple[Expr, Expr, Expr | None]:
    """(condition, row, row of all others) of where(condition, row, number); without others: (1, e, None)."""
    if e.op == "where":
        c, a, b = e.args
        for test, row, other in ((c, a, b), (raw("not", c), b, a)):
            if is_const(other) or other.op == "size":
                return test, row, other
    return ONE, e, None


def goes_to_rows_of_its_own(base: Value, idx: Value) -> Expr | None:
    """The row that may be written several times (1 for none), where all other rows are proved to be written once at most; else None.

    Only of rows that hold nothing yet: zeros, or memory that nothing was written to.
    """
    e = idx.expr
    if not counted(e) or not (is_const(base.expr, 0) or base.expr is UNDEF):
        return None
    kept, row, others = room(e)
    if others is not None and not within(row, others.args[0], conditions(e).union(factors(kept))):
        return None
    vs, row, kept = _over_places(idx, row, kept)
    if vs is None or not _once(row, vs, kept):
        return None
    return ONE if others is None else others


def _over_places(idx: Value, row: Expr, kept: Expr) -> tuple[list[Var] | None, Expr, Expr]:
    """The variables of the rows, where a mask's rows are all places that meet its condition."""
    vs = [v for d in idx.dims for v in d]
    if len(vs) == 1 and isinstance(vs[0].domain, Enum):
        (r,), domain = vs, vs[0].domain
        at = {raw("coord", r, j): index_of(d) for j, d in enumerate(domain.dims)}
        row, kept = replace(row, at), mul(domain.cond, replace(kept, at))
        return (None if r in row.free | kept.free else [v for d in domain.dims for v in d]), row, kept
    return (None if any(v.domain is not None for v in vs) else vs), row, kept


def _once(row: Expr, vs: list[Var], kept: Expr) -> bool:
    """Is each kept place the only one that goes to its row?"""
    other = {v: v.fresh() for v in vs}
    same = mul(subst(kept, other), eq(subst(row, other), row))
    for v in other.values():
        same = sum_(v, same)
    return collapse(mul(kept, same)) in (kept, collapse(kept))


def marked(out: Value, others: Expr) -> Value:
    """The row that several may write holds what nobody can tell."""
    if others is ONE:
        return out
    return Value(out.dims, where(eq(out.index(0), others), UNDEF, out.expr))


def aligned(idx: Value, vals: Value) -> tuple[Value, Value]:
    """The index and the values over the same rows."""
    if not vals.dims[0]:
        return idx, Value((tuple(v.fresh() for v in idx.dims[0]), *vals.dims[1:]), vals.expr)
    sizes = common(idx.sizes(0), vals.sizes(0))
    return idx.refine(0, sizes), vals.refine(0, sizes)


__all__ = ["aligned", "goes_to_rows_of_its_own", "marked"]
