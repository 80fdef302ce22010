"""The functions of ops/functions.py as Triton functions of the same names, on float32 values (or booleans of comparisons).

Attributes are constexpr. NaN behaves as in torch: maximum, minimum, clamp and relu hand it on.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(a):
    """A comparison's result as 0 or 1."""
    return a.to(tl.float32)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def sub(a, b):
    return a - b


@triton.jit
def mul(a, b):
    return a * b


@triton.jit
def div(a, b):
    return a / b


@triton.jit
def neg(a):
    return -a


@triton.jit
def abs(a):
    return tl.where(a < 0, -a, a)


@triton.jit
def square(a):
    return a * a


@triton.jit
def pow(a, EXPONENT: tl.constexpr):
    """Whole exponents up to 16 by multiplication, so that negative bases are right; others as exp(e * log(a)), NaN for a < 0."""
    whole: tl.constexpr = (EXPONENT % 1 == 0) & (EXPONENT <= 16) & (EXPONENT >= -16)
    if whole:
        result = a * 0 + 1
        for _ in tl.static_range(int(EXPONENT) if EXPONENT > 0 else int(-EXPONENT)):
            result = result * a
        if EXPONENT < 0:
            result = 1 / result
    else:
        result = tl.exp(EXPONENT * tl.log(a))
    return result


@triton.jit
def sqrt(a):
    return tl.sqrt(a)


@triton.jit
def rsqrt(a):
    return 1 / tl.sqrt(a)


@triton.jit
def exp(a):
    return tl.exp(a)


@triton.jit
def log(a):
    return tl.log(a)


@triton.jit
def erf(a):
    return tl.erf(a)


@triton.jit
def sin(a):
    return tl.sin(a)


@triton.jit
def cos(a):
    return tl.cos(a)


@triton.jit
def _root(a):
    """The square root of sigmoid(a). A division and exp see to ends of their range that do not matter here, which takes twice as long."""
    return tl.rsqrt(1 + tl.exp2(a * -1.4426950408889634))


@triton.jit
def sigmoid(a):
    root = _root(a)
    return root * root


@triton.jit
def tanh(a):
    """Odd, from exp of a negative number: no overflow; a series where 1 - exp cancels."""
    magnitude = tl.where(a < 0, -a, a)
    decay = tl.exp(-2 * magnitude)
    far = (1 - decay) / (1 + decay)
    squared = a * a
    near = magnitude * (1 - squared * (1 / 3 - squared * (2 / 15 - squared * (17 / 315))))
    value = tl.where(magnitude < 0.1, near, far)
    return tl.where(a < 0, -value, value)


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def clamp(a, LOW: tl.constexpr, HIGH: tl.constexpr):
    if LOW is not None:
        a = tl.where(a < LOW, LOW, a)
    if HIGH is not None:
        a = tl.where(a > HIGH, HIGH, a)
    return a


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def lt(a, b):
    return a < b


@triton.jit
def le(a, b):
    return a <= b


@triton.jit
def gt(a, b):
    return a > b


@triton.jit
def ge(a, b):
    return a >= b


@triton.jit
def eq(a, b):
    return a == b


@triton.jit
def ne(a, b):
    return a != b


@triton.jit
def silu(a):
    root = _root(a)
    return a * root * root


@triton.jit
def gelu(a):
    return 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))


@triton.jit
def gelu_tanh(a):
    return 0.5 * a * (1 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))


@triton.jit
def relu(a):
    return tl.where(a < 0, 0.0, a)


@triton.jit
def leaky_relu(a, SLOPE: tl.constexpr):
    return tl.where(a > 0, a, a * SLOPE)


@triton.jit
def elu(a, ALPHA: tl.constexpr):
    return tl.where(a > 0, a, ALPHA * (tl.exp(a) - 1))


@triton.jit
def softplus(a, BETA: tl.constexpr, HIGH: tl.constexpr):
    """Without loss where exp(a) is small beside 1."""
    e = tl.exp(tl.minimum(a * BETA, HIGH))
    u = 1 + e
    value = tl.where(u == 1, e, tl.log(u) * (e / (u - 1))) / BETA
    return tl.where((a * BETA > HIGH) | (a != a), a, value)


@triton.jit
def hardsigmoid(a):
    return clamp(a + 3, 0.0, 6.0) / 6


@triton.jit
def hardswish(a):
    return a * clamp(a + 3, 0.0, 6.0) / 6


@triton.jit
def mish(a):
    return a * tanh(softplus(a, 1.0, 20.0))
