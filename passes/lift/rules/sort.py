"""Sorting ids: a permutation, known only by what it sorts."""

from __future__ import annotations

from ..expr import Refused, Var, make_order
from ..index import is_int, perm
from ..sizes import prod
from ..value import Value
from ._base import rule
from .segments import key_at


@rule("sort.default", "sort.stable", "argsort.default", "argsort.stable")
def _sort(it, node, x: Value, *args, stable=False, descending=False, dim=-1):
    if descending or any(a is True for a in args) or len(x.dims) != 1 or not is_int(x.expr):
        raise Refused("a sort of something else than a vector of ids")
    order = make_order(x.vars(), x.expr)
    spelled = f"{node.target} stable={stable}"
    if it.sorts.setdefault(order, spelled) != spelled:
        raise Refused("the same ids are sorted by two different sorts: the permutations may differ")
    r = Var(prod(order.sizes))
    out = [Value(((r,),), key_at(order, perm(order, r))), Value(((r,),), perm(order, r))]
    return out[1] if "argsort" in str(node.target) else out
