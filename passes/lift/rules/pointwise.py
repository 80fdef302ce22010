"""Pointwise arithmetic, comparisons, casts."""

from __future__ import annotations

from typing import Any

import torch

from ..algebra import add, compare, divide, eq, mul, negate, sub, unary, where, zero_or_one
from ..expr import ZERO, Expr, Refused, Var, const, is_const, loads, raw
from ..index import bounds, idiv, is_bool, is_int, mod
from ..value import Value, broadcast
from ._base import RULES, rule
from .bits import masked


def _pointwise(f):
    def go(it, node, *args, alpha=1, **kw):
        if alpha != 1 or any(v not in (None, False) for v in kw.values()):
            raise Refused(f"{node.target} with extra arguments")
        if f in (add, sub) and node.meta["val"].dtype == torch.bool:
            raise Refused("a sum of truth values")
        dims, es = broadcast(*args)
        return Value(dims, _in_range(f(*es), node.meta["val"].dtype))

    return go


def _in_range(e: Expr, dtype: torch.dtype) -> Expr:
    """e, unless a small integer type may be too small for it: what is beyond wraps around."""
    if dtype.is_floating_point or dtype.itemsize > 2 or dtype == torch.bool or _holds(e, dtype):
        return e
    raise Refused(f"arithmetic that may not fit in {str(dtype).removeprefix('torch.')}")


def _simple(name: str):
    return lambda *es: raw(name, *es)


_BINARY = {
    "add.Scalar": add, "sub.Tensor": sub, "sub.Scalar": sub, "mul.Tensor": mul, "mul.Scalar": mul,
    "eq.Scalar": eq, "where.self": where, "where.ScalarOther": where, "where.ScalarSelf": where, "where.Scalar": where,
    "maximum.default": _simple("maximum"), "minimum.default": _simple("minimum"),
}  # fmt: skip
for _n, _f in _BINARY.items():
    RULES[_n] = _pointwise(_f)
added, _equal = _pointwise(add), _pointwise(eq)
for _op in ("lt", "le", "gt", "ge", "ne"):
    for _kind in ("Scalar", "Tensor"):
        RULES[f"{_op}.{_kind}"] = _pointwise((lambda op: lambda a, b: compare(op, a, b))(_op))
for _n in ("silu", "sigmoid", "relu", "tanh", "neg", "exp", "rsqrt", "sqrt", "erf", "abs", "log", "hardswish", "hardsigmoid", "mish",
           "sin", "cos", "log1p", "expm1", "reciprocal"):  # fmt: skip
    RULES[_n + ".default"] = _pointwise((lambda n: lambda a: unary(n, a))(_n))


@rule("eq.Tensor")
def _eq(it, node, a, b, **kw):
    """one_hot of a mask of choices: its 0 and 1 are ids of the first two experts."""
    if isinstance(a, Value) and isinstance(b, Value) and isinstance(b.expr, Var) and (ids := _mask_as_ids(it, node.args[0], a)) is not None:
        a = ids
    return _equal(it, node, a, b, **kw)


def _mask_as_ids(it, node, x: Value) -> Value | None:
    if not isinstance(node, torch.fx.Node) or str(node.target) != "aten.unsqueeze.default" or not zero_or_one(x.expr) or is_const(x.expr):
        return None
    mask, last = node.args[0], len(x.dims) - 1
    if mask.meta["val"].dtype != torch.int64 or node.args[1] not in (-1, last):
        return None
    it.facts[mask] = ((0, 2), False)
    ids = it.leaf(mask)
    return Value((*ids.dims, ()), ids.expr)


@rule("pow.Tensor_Scalar")
def _pow(it, node, x: Value, p):
    if p == 2:
        return Value(x.dims, unary("square", x.expr))
    return Value(x.dims, raw("pow", x.expr, const(p)))


@rule("softplus.default")
def _softplus(it, node, x: Value, beta=1, threshold=20):
    if beta != 1 or threshold != 20:
        raise Refused("softplus with another beta or threshold")
    return Value(x.dims, unary("softplus", x.expr))


@rule("leaky_relu.default")
def _leaky_relu(it, node, x: Value, slope=0.01):
    return Value(x.dims, unary("leaky_relu", x.expr, const(slope)))


@rule("elu.default")
def _elu(it, node, x: Value, alpha=1.0, scale=1, input_scale=1):
    if scale != 1 or input_scale != 1:
        raise Refused("elu with scales (selu)")
    return Value(x.dims, unary("elu", x.expr, const(alpha)))


@rule("gelu.default")
def _gelu(it, node, x: Value, approximate="none"):
    return Value(x.dims, unary("gelu", x.expr, approximate))


@rule(
    "bitwise_and.Tensor",
    "logical_and.default",
    "logical_not.default",
    "bitwise_not.default",
    "bitwise_or.Tensor",
    "logical_or.default",
)
def _logic(it, node, *args):
    """Logic, where the operands are truth values (on integers the same ops work on bits)."""
    if any(a.meta["val"].dtype != torch.bool for a in node.all_input_nodes):
        if (mask := _constant_mask(node, args)) is not None:
            return masked(*mask)
        raise Refused("a bitwise operation on integers")
    dims, es = broadcast(*args)
    name = str(node.target)
    if "not" in name:
        return Value(dims, negate(*es))
    if "and" in name:
        return Value(dims, mul(*es))
    return Value(dims, negate(mul(*[negate(e) for e in es])))


def _constant_mask(node: torch.fx.Node, args: tuple) -> tuple[Value, int] | None:
    """x & constant, the constant as a tensor of one element."""
    if "bitwise_and" not in str(node.target):
        return None
    for x, m in (args, args[::-1]):
        if isinstance(m, Value) and is_const(m.expr) and isinstance(m.expr.args[0], int) and not m.dims:
            return x, m.expr.args[0]
    return None


@rule("rsub.Scalar")
def _rsub(it, node, x: Value, s, alpha=1):
    if alpha != 1:
        raise Refused("rsub with alpha")
    return Value(x.dims, sub(const(s), x.expr))


@rule("div.Tensor", "div.Scalar")
def _div(it, node, a, b):
    dims, (x, y) = broadcast(a, b)
    if is_const(y) and y.args[0] != 0:
        if y.args[0] == 1:
            return Value(dims, x)
        if not is_int(x):
            return Value(dims, mul(x, const(1 / y.args[0])))
    return Value(dims, divide(x, y))


@rule("floor_divide.default", "div.Tensor_mode", "div.Scalar_mode")
def _floor_divide(it, node, a, b, rounding_mode="floor"):
    dims, (x, y) = broadcast(a, b)
    bx = bounds(x)
    if not (is_const(y) and isinstance(y.args[0], int) and y.args[0] > 0 and bx and bx[0] >= 0) or rounding_mode is None:
        raise Refused("integer division outside the index calculus")
    return Value(dims, idiv(x, y.args[0]))


@rule("floor.default")
def _floor(it, node, x: Value):
    e = x.expr
    if e.op == "div" and is_const(e.args[1]) and is_int(e.args[0]) and (bounds(e.args[0]) or (-1,))[0] >= 0:
        n = e.args[1].args[0]
        if n > 0 and float(n).is_integer():
            return Value(x.dims, idiv(e.args[0], int(n)))
    return Value(x.dims, unary("floor", e))


@rule("remainder.Scalar")
def _remainder(it, node, x: Value, n):
    if not isinstance(n, int) or n <= 0 or not is_int(x.expr) or (bounds(x.expr) or (-1,))[0] < 0:
        raise Refused("a remainder outside the index calculus")
    return Value(x.dims, mod(x.expr, n))


@rule("clamp.default", "clamp_min.default", "clamp_max.default")
def _clamp(it, node, x: Value, *limits: Any, **kw: Any):
    """One rule for the three spellings; a clamp that the known range satisfies is nothing."""
    names = {"clamp_min": ["min"], "clamp_max": ["max"]}.get(node.target.overloadpacket.__name__, ["min", "max"])
    given = {**dict(zip(names, limits)), **kw}
    lo, hi = (_limit(given.get(end)) for end in ("min", "max"))
    if isinstance(lo, Value | Expr) or isinstance(hi, Value):
        raise Refused("clamp by a tensor")
    if isinstance(hi, Expr):
        return Value(x.dims, raw("clamp", x.expr, lo, hi))
    b = bounds(x.expr)
    if b and (lo is None or b[0] >= lo) and (hi is None or (isinstance(b[1], int) and b[1] - 1 <= hi)):
        return x
    return Value(x.dims, raw("clamp", x.expr, lo, hi))


def _limit(limit: Any) -> Any:
    """A number, or the extent that an upper limit is made of."""
    if isinstance(limit, Value) and not limit.dims and limit.expr.op in ("const", "size"):
        return limit.expr.args[0] if limit.expr.op == "const" else limit.expr
    return limit


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(it, node, x: Value, mask: Value, value):
    dims, (a, m, v) = broadcast(x, mask, value)
    return Value(dims, where(m, v, a))


@rule("_to_copy.default")
def _to_copy(it, node, x: Value, dtype=None, **kw):
    src = node.args[0].meta["val"].dtype
    if node.args[0].meta["val"].device != node.meta["val"].device and not all(y.args[0].constant is not None for y in loads(x.expr)):
        raise Refused("a copy to another device")
    if dtype is None or dtype == src:
        return x
    return Value(x.dims, cast(x.expr, dtype))


def cast(e: Expr, dtype: torch.dtype) -> Expr:
    """Small exact integers (ids, counts, one-hot) are the same in every dtype that holds them; floats keep the cast."""
    if dtype == torch.bool:
        return compare("ne", e, ZERO)
    if is_bool(e):
        return e
    if is_int(e):
        return e if (exact(e, dtype) if dtype.is_floating_point else _holds(e, dtype)) else raw("cast", e, dtype)
    if not dtype.is_floating_point:
        return raw("cast", e, dtype)
    return unary("cast", e, dtype)


def _holds(e: Expr, dtype: torch.dtype) -> bool:
    """Does an integer dtype hold e's range?  Index types are taken to hold every count: the original relies on it, too."""
    if dtype in (torch.int64, torch.int32):
        return True
    b, info = bounds(e), torch.iinfo(dtype)
    return b is not None and isinstance(b[1], int) and info.min <= b[0] and b[1] - 1 <= info.max


_EXACT = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}


def largest_exact(dtype: torch.dtype) -> int:
    """All integers up to this one are exact in a dtype."""
    return _EXACT.get(dtype, 0) if dtype.is_floating_point or dtype == torch.bool else torch.iinfo(dtype).max


def exact(e: Expr, dtype: torch.dtype) -> bool:
    """Are all integers in e's range exact in this floating dtype?"""
    limit = _EXACT.get(dtype, 0)
    b = bounds(e)
    if b is not None and isinstance(b[1], int):
        return max(abs(b[0]), b[1] - 1) <= limit
    # counts of rows: exact up to 16 million rows in float32, beyond which the original's own count is wrong
    return limit >= 2**24


@rule("clone.default", "alias.default", "contiguous.default", "lift_fresh_copy.default", "lift_fresh.default")
def _same(it, node, x: Value, *a, **k):
    return x


@rule("detach.default")
def _detach(it, node, x: Value):
    return Value(x.dims, unary("stop", x.expr) if it.training else x.expr)
