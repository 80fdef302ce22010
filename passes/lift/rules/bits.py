"""Bits of integers, bytes read as another type, powers of two: what quantised weights are unpacked with."""

from __future__ import annotations

import torch

from ..algebra import add, mul
from ..expr import Expr, Refused, const, is_const, raw
from ..index import idiv, is_int, mod
from ..value import Value, broadcast
from ._base import rule

_EXPONENT_BIAS = 127  # of float8_e8m0fnu


def _number(x: object) -> int:
    """An integer operand that is a constant."""
    e = x.expr if isinstance(x, Value) else const(x)
    if not is_const(e) or not isinstance(e.args[0], int) or isinstance(e.args[0], bool):
        raise Refused("a bitwise operation by something else than a constant")
    return e.args[0]


def _integer(x: Value) -> Expr:
    if not is_int(x.expr):
        raise Refused("bits of something that is not known to be an integer")
    return x.expr


@rule("bitwise_and.Scalar")
def _and(it, node, x: Value, mask):
    """A mask of neighbouring bits: x div 2^low mod 2^bits (rounding down, so two's complement too), back in its place."""
    return masked(x, _number(mask))


def masked(x: Value, mask: int) -> Value:
    e = _integer(x)
    low = (mask & -mask).bit_length() - 1
    ones = mask >> low if mask > 0 else 0
    if mask <= 0 or ones & (ones + 1):
        raise Refused(f"a bitwise and with {mask}, which is no run of bits")
    return Value(x.dims, mul(const(1 << low), mod(idiv(e, 1 << low), ones + 1)))


@rule("__rshift__.Scalar", "bitwise_right_shift.Tensor_Scalar", "bitwise_right_shift.Tensor")
def _shift(it, node, x: Value, n):
    n = _number(n)
    if not 0 <= n < 8 * node.meta["val"].dtype.itemsize:
        raise Refused(f"a shift by {n} bits")
    return Value(x.dims, idiv(_integer(x), 1 << n))


@rule("view.dtype")
def _view_dtype(it, node, x: Value, dtype):
    was = node.args[0].meta["val"].dtype
    if was == dtype:
        return x
    if (was, dtype) == (torch.int8, torch.uint8):
        return Value(x.dims, mod(_integer(x), 256))
    if (was, dtype) == (torch.uint8, torch.int8):
        return Value(x.dims, add(mod(add(_integer(x), const(128)), 256), const(-128)))
    if (was, dtype) == (torch.uint8, torch.float8_e8m0fnu):
        return Value(x.dims, raw("exp2", add(_integer(x), const(-_EXPONENT_BIAS))))
    if dtype == torch.float8_e4m3fn and was in (torch.uint8, torch.int8):
        return Value(x.dims, raw("e4m3", _integer(x) if was == torch.uint8 else mod(_integer(x), 256)))
    raise Refused(f"{was} read as {dtype}")


@rule("exp2.default")
def _exp2(it, node, x: Value):
    return Value(x.dims, raw("exp2", x.expr))


@rule("pow.Scalar")
def _power(it, node, base, x: Value):
    if base != 2:
        raise Refused("a power of another number than 2")
    return Value(x.dims, raw("exp2", x.expr))


@rule("ldexp.Tensor")
def _ldexp(it, node, x: Value, exponent: Value):
    dims, (a, e) = broadcast(x, exponent)
    return Value(dims, mul(a, raw("exp2", e)))
