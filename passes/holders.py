"""Which node of the user's graph holds a tensor, or the value of an expression."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .decisions import tensor_of
from .lift import Refused
from .lift.expr import Expr, Var, alpha
from .lift.places import told
from .lift.sizes import Size, prod, shape_of
from .lift.value import Value, common
from .region import MoERegion


def holder(region: MoERegion, aten: Node) -> Node:
    """A Dynamo node whose value (when it had just run) is that of an ATen node."""
    table = _holders(region)
    if aten in table:
        return table[aten]
    raise Refused(f"what is computed within a call of {told(aten)} is needed outside of it")


def _holders(region: MoERegion) -> dict[Node, Node]:
    cached = region.__dict__.get("_holder_table")
    if cached is None:
        cached = {}
        for n in [*region.inputs, *region.nodes]:
            a = region.trace.at_def.get(n)
            if isinstance(a, Node):
                cached.setdefault(a, n)
        region.__dict__["_holder_table"] = cached
    return cached


def find_node(region: MoERegion, e: Expr, vs: list[Var], columns: Size) -> Node | None:
    """A node before the root whose elements, row-major, are e over vs, and that nothing has changed since.

    Of several, one that already has the shape [rows, columns].
    """
    sizes = tuple(v.size for v in vs)
    key, found = alpha(e, vs), None
    for n in [*region.inputs, *region.nodes]:
        t = tensor_of(n)
        if t is None or prod(shape_of(t)) != prod(sizes) or not _unchanged(region, n) or not _holds(region, n, key, sizes):
            continue
        if t.dim() == 2 and shape_of(t)[1] == columns:
            return n
        found = found or n
    return found


def _unchanged(region: MoERegion, n: Node) -> bool:
    a = region.trace.at_def.get(n)
    # what the root accumulates onto is itself again once the old code is gone (rewrite.py checks that it goes)
    return isinstance(a, Node) and n is not region.root and (region.now.get(n, a) is a or n is region.target)


def _holds(region: MoERegion, n: Node, key: Any, sizes: tuple[Size, ...]) -> bool:
    try:
        value = region.interp.value(region.trace.at_def[n])
        flat = Value((tuple(value.vars()),), value.expr)
        flat = flat.refine(0, common(flat.sizes(0), sizes))
    except Refused:
        return False
    return flat.sizes(0) == tuple(s for s in sizes if s != 1) and alpha(flat.expr, flat.vars()) == key
