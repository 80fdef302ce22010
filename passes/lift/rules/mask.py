"""Boolean masks: nonzero enumerates the points where a condition holds."""

from __future__ import annotations

from ..algebra import compare, distinct_slots, subst
from ..expr import ZERO, Enum, Expr, Refused, Var, is_const, raw
from ..index import is_bool, sel
from ..value import Value, broadcast
from ._base import RULES, rule


def is_mask(e: Expr) -> bool:
    """A truth value, not an index (the node's dtype would say it as well)."""
    return (is_bool(e) and not is_const(e)) or (e.op == "sum" and distinct_slots(e) and is_bool(e.args[1]))


def enumerate_(mask: Value) -> Var:
    if any(v.size is None for v in mask.vars()):
        raise Refused("nonzero over a data-dependent dimension")
    t = {v: v.fresh() for v in mask.vars()}
    return Var(None, Enum(tuple(tuple(t[v] for v in d) for d in mask.dims), subst(mask.expr, t)))


def expand_masks(idx) -> list[Value | None]:
    """Boolean masks become the columns of their nonzero."""
    out: list[Value | None] = []
    for v in idx:
        if v is not None and v.dims and is_mask(v.expr):
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


@rule("masked_select.default")
def _masked_select(it, node, x: Value, mask: Value):
    dims, (e, m) = broadcast(x, mask)
    return RULES["index.Tensor"](it, node, Value(dims, e), [Value(dims, m)])
