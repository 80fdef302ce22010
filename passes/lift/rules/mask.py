"""Boolean masks: nonzero enumerates the points where a condition holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from ..algebra import compare, replace, subst
from ..expr import ONE, ZERO, Enum, Expr, Refused, Var, factors, is_const, raw
from ..index import digits, inside, is_bool, sel
from ..positions import Facts, within
from ..sizes import Size
from ..value import Value
from ._base import rule


def enumerate_(mask: Value) -> Var:
    if any(v.size is None for v in mask.vars()):
        raise Refused("nonzero over a data-dependent dimension")
    t = {v: v.fresh() for v in mask.vars()}
    return Var(None, Enum(tuple(tuple(t[v] for v in d) for d in mask.dims), subst(mask.expr, t)))


def conditions(e: Expr) -> Facts:
    """What holds in each of the rows, found by masks, that e is an expression of."""
    rows = [v for v in e.free if isinstance(v.domain, Enum)]
    return frozenset(f for r in rows for f in _tests(r))


def in_rows(e: Expr, n: Size) -> bool:
    """Is e an index of n rows?"""
    return inside(e, n) or within(e, n, conditions(e))


def where_hit(e: Expr, r: Var) -> Expr:
    """e over the rows r of a mask: the mask itself holds in each of them."""
    tests = _tests(r)
    return replace(e, dict.fromkeys(tests, ONE)) if tests else e


def _tests(r: Var) -> list[Expr]:
    at: dict[Var, Expr] = {}
    for j, d in enumerate(r.domain.dims):
        if d:
            at.update(zip(d, digits(raw("coord", r, j), [v.size for v in d])))
    return [f for f in factors(subst(r.domain.cond, at)) if is_bool(f) and not is_const(f)]


def expand_masks(idx: Sequence[Value | None], nodes: Sequence[Node | None]) -> list[Value | None]:
    """Boolean masks (the nodes' dtypes tell them from indices) become the columns of their nonzero."""
    out: list[Value | None] = []
    for v, n in zip(idx, nodes):
        if v is not None and n is not None and n.meta["val"].dtype in (torch.bool, torch.uint8):
            r = enumerate_(v)
            out += [Value(((r,),), raw("coord", r, j)) for j in range(len(v.dims))]
        else:
            out.append(v)
    return out


@rule("nonzero.default")
def _nonzero(it, node, mask: Value):
    if (rows := it.all_hit(node, mask)) is not None:
        return rows
    r = enumerate_(mask if is_bool(mask.expr) else Value(mask.dims, compare("ne", mask.expr, ZERO)))
    n = len(mask.dims)
    which = Var(n)
    return Value(((r,), (which,) if n > 1 else ()), sel(which, *[raw("coord", r, j) for j in range(n)]))
