"""Adjoints of the functions in pointwise.py: NAME_i(g, y, a, b ..., attributes) is g times the derivative of the result y by operand i.

What is not here has a derivative of zero. Bounds and ties are as in ops/functions.py. All float32.
"""

# ruff: noqa: SIM108  (Triton decides such an if when it compiles; of an expression it compiles both sides)
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import operator

import triton
import triton.language as tl

from moe_compile.ops import functions

from . import pointwise

BOUNDS_PASS = tl.constexpr(functions.ABOVE is operator.ge)  # clamp's gradient at its bounds is one, as in the torch that runs


@triton.jit
def add_0(g, y, a, b):
    return g


@triton.jit
def add_1(g, y, a, b):
    return g


@triton.jit
def sub_0(g, y, a, b):
    return g


@triton.jit
def sub_1(g, y, a, b):
    return -g


@triton.jit
def mul_0(g, y, a, b):
    return g * b


@triton.jit
def mul_1(g, y, a, b):
    return g * a


@triton.jit
def div_0(g, y, a, b):
    return g / b


@triton.jit
def div_1(g, y, a, b):
    return -g * ((a / b) / b)


@triton.jit
def neg_0(g, y, a):
    return -g


@triton.jit
def abs_0(g, y, a):
    return tl.where(a > 0, g, tl.where(a < 0, -g, 0.0 * g))


@triton.jit
def square_0(g, y, a):
    return g * (a * 2)


@triton.jit
def pow_0(g, y, a, EXPONENT: tl.constexpr):
    if EXPONENT == 0:
        result = 0.0 * g
    else:
        result = g * (EXPONENT * pointwise.pow(a, EXPONENT - 1))
    return result


@triton.jit
def sqrt_0(g, y, a):
    return g / (2 * y)


@triton.jit
def rsqrt_0(g, y, a):
    return -0.5 * g * y * y * y


@triton.jit
def exp_0(g, y, a):
    return g * y


@triton.jit
def log_0(g, y, a):
    return g / a


@triton.jit
def erf_0(g, y, a):
    return 1.1283791670955126 * tl.exp(-(a * a)) * g


@triton.jit
def sin_0(g, y, a):
    return g * tl.cos(a)


@triton.jit
def cos_0(g, y, a):
    return -g * tl.sin(a)


@triton.jit
def tanh_0(g, y, a):
    return g * (1 - y * y)


@triton.jit
def sigmoid_0(g, y, a):
    return g * (1 - y) * y


@triton.jit
def _share(g, loses, ties):
    return tl.where(loses, 0.0, tl.where(ties, g / 2, g))


@triton.jit
def maximum_0(g, y, a, b):
    return _share(g, a < b, a == b)


@triton.jit
def maximum_1(g, y, a, b):
    return _share(g, a > b, a == b)


@triton.jit
def minimum_0(g, y, a, b):
    return _share(g, a > b, a == b)


@triton.jit
def minimum_1(g, y, a, b):
    return _share(g, a < b, a == b)


@triton.jit
def clamp_0(g, y, a, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Stops at NaN."""
    keep = a == a
    if LOW is not None:
        keep = keep & ((a >= LOW) if BOUNDS_PASS else (a > LOW))
    if HIGH is not None:
        keep = keep & ((a <= HIGH) if BOUNDS_PASS else (a < HIGH))
    return tl.where(keep, g, 0.0)


@triton.jit
def where_1(g, y, condition, a, b):
    return tl.where(condition, g, 0.0)


@triton.jit
def where_2(g, y, condition, a, b):
    return tl.where(condition, 0.0, g)


@triton.jit
def silu_0(g, y, a):
    s = 1 / (1 + tl.exp(-a))
    return g * s * (1 + a * (1 - s))


@triton.jit
def gelu_0(g, y, a):
    below = 0.5 * (1 + tl.erf(a * 0.7071067811865476))
    return g * (below + a * 0.3989422804014327 * tl.exp(-0.5 * a * a))


@triton.jit
def gelu_tanh_0(g, y, a):
    t = pointwise.tanh(0.7978845608028654 * (a + 0.044715 * a * a * a))
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * a * a)
    return g * (0.5 * (1 + t) + 0.5 * a * (1 - t * t) * slope)


@triton.jit
def relu_0(g, y, a):
    return tl.where(y <= 0, 0.0, g)


@triton.jit
def leaky_relu_0(g, y, a, SLOPE: tl.constexpr):
    return tl.where(a > 0, g, g * SLOPE)


@triton.jit
def elu_0(g, y, a, ALPHA: tl.constexpr):
    return tl.where(a > 0, g, g * ALPHA * tl.exp(a))


@triton.jit
def softplus_0(g, y, a, BETA: tl.constexpr, HIGH: tl.constexpr):
    return tl.where(a * BETA > HIGH, g, g / (1 + tl.exp(-(a * BETA))))


@triton.jit
def hardsigmoid_0(g, y, a):
    return tl.where((a > -3) & (a < 3), g / 6, 0.0)


@triton.jit
def hardswish_0(g, y, a):
    return tl.where(a < -3, 0.0, tl.where(a <= 3, g * (a / 3 + 0.5), g))


@triton.jit
def mish_0(g, y, a):
    t = pointwise.tanh(pointwise.softplus(a, 1.0, 20.0))
    s = 1 / (1 + tl.exp(-a))
    return g * (t + a * s * (1 - t * t))
