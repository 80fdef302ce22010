"""Sorting ids: a permutation, known only by what it sorts."""

from __future__ import annotations

from ..algebra import same_rows
from ..expr import Refused, Var, make_order
from ..index import inv, is_int, perm
from ..sizes import prod
from ..value import Value
from ._base import dim_of, rule
from .reordered import sorted_rows
from .segments import key_at


def _inverse(x: Value) -> Value | None:
    """Sorting a permutation: the sorted keys are 0, 1, 2, ... and the new permutation is its inverse."""
    e, vs = x.expr, x.vars()
    if e.op != "perm" or len(vs) != 1 or e.args[1] is not vs[0] or not same_rows(e.args[0], vs[0]):
        return None
    s = Var(vs[0].size)
    return Value(((s,),), inv(e.args[0], s))


def _enumerated(node, x: Value, dim: int, stable: bool) -> list[Value] | None:
    """The rows of a mask, sorted by one of their coordinates."""
    rows = dim_of(dim, len(x.dims)) == 0
    return sorted_rows(x, "" if stable else f"{node.target} of {len(x.dims)}") if rows else None


@rule("sort.default", "sort.stable", "argsort.default", "argsort.stable")
def _sort(it, node, x: Value, *args, stable=False, descending=False, dim=-1):
    descending = descending or any(a is True for a in args)
    if not descending and (rows := _enumerated(node, x, next((a for a in args if type(a) is int), dim), stable)) is not None:
        return rows[1] if "argsort" in str(node.target) else rows
    if descending or len(x.dims) != 1 or not is_int(x.expr):
        raise Refused("a sort of something else than a vector of ids")
    if (back := _inverse(x)) is not None:
        return back if "argsort" in str(node.target) else [Value(back.dims, back.vars()[0]), back]
    order = make_order(x.vars(), x.expr)
    spelled = f"{node.target} stable={stable}"
    if it.sorts.setdefault(order, spelled) != spelled:
        raise Refused("the same ids are sorted by two different sorts: the permutations may differ")
    r = Var(prod(order.sizes))
    out = [Value(((r,),), key_at(order, perm(order, r))), Value(((r,),), perm(order, r))]
    return out[1] if "argsort" in str(node.target) else out
