"""Constants."""

from __future__ import annotations

import torch

from ..expr import ONE, UNDEF, ZERO, Expr, Refused, Var, const, is_const
from ..value import Value
from ._base import filled, known_shape, out_shape, rule


@rule("zeros.default", "zeros_like.default", "new_zeros.default", "zero.default")
def _zeros(it, node, *a, **k):
    shape = out_shape(node)
    if None in shape and any(isinstance(s, Value) and is_const(s.expr, 0) for s in (a[-1] if isinstance(a[-1], list | tuple) else ())):
        return Value([(Var(0),) if n is None else (Var(n),) for n in shape], ZERO)  # proved empty
    return _like(node, a, ZERO)


@rule("ones.default", "ones_like.default", "new_ones.default")
def _ones(it, node, *a, **k):
    return _like(node, a, ONE)


def _like(node, a: tuple, e: Expr) -> Value:
    """Filled, or like a tensor whose rows are known to us."""
    if None in out_shape(node) and len(a) == 1 and isinstance(a[0], Value):
        return Value(a[0].renamed().dims, e)
    return filled(node, e)


@rule("full.default", "full_like.default", "new_full.default", "fill.Scalar")
def _full(it, node, x, *a, **k):
    value = a[-1] if a else k["fill_value"]
    if isinstance(value, Value):
        return filled(node, value.expr)
    return _like(node, (x,), const(torch.tensor(value, dtype=node.meta["val"].dtype).item()))


@rule("empty.memory_format", "empty_like.default", "new_empty.default")
def _empty(it, node, *a, **k):
    return _like(node, a, UNDEF)


@rule("scalar_tensor.default")
def _scalar(it, node, x, **k):
    return Value((), const(torch.tensor(x, dtype=node.meta["val"].dtype).item()) if not isinstance(x, Value) else x.expr)


@rule("arange.default", "arange.start", "arange.start_step")
def _arange(it, node, *a, **k):
    start, step = (a[0] if len(a) > 1 else 0), (a[2] if len(a) > 2 else 1)
    shape = known_shape(node)
    if isinstance(start, Value):
        start = start.expr.args[0] if is_const(start.expr) else None
    if start != 0 or step != 1:
        raise Refused("an arange that does not start at 0 by step 1")
    if shape[0] == 1:
        return Value([()], ZERO)
    v = Var(shape[0])
    return Value([(v,)], v)
