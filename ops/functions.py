"""The functions an expert program may call: one row each with forward, derivatives and result type.

A row is `name: Function(forward, partials, ...)`. forward(*operands, *attrs) is the torch function itself, so that a
program means what the eager code meant (operators rather than torch.add: they take a number on either side). partials[i](grad, out, *operands, *attrs) is the adjoint of operand i; the
aten *_backward functions are used where autograd uses them, so gradients agree with eager's to the bit.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
Partial = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Function:
    """One row of the table.

    forward: torch function of the operands (rows or numbers) and then the attributes (numbers or None).
    partials: one adjoint an operand; None where the derivative is zero.
    attrs: default of each attribute; `...` marks one that must be given.
    result: "promote" (operands' common type), "float" (the same, integers become the default float), "bool".
    """

    forward: Callable[..., Any]
    partials: tuple[Partial | None, ...]
    attrs: tuple[Any, ...] = ()
    result: str = "promote"


def _unary(forward: Callable[..., Any], partial: Partial, *attrs: Any, result: str = "float") -> Function:
    return Function(forward, (partial,), attrs, result)


def _compare(forward: Callable[..., Any]) -> Function:
    return Function(forward, (None, None), result="bool")


def _clamp_partial(g: Any, y: Any, a: Any, lo: Any, hi: Any) -> Any:
    """Autograd passes the gradient through at the bounds themselves, and stops it for NaN."""
    keep = torch.ones_like(a, dtype=torch.bool)
    if lo is not None:
        keep = keep & (a >= lo)
    if hi is not None:
        keep = keep & (a <= hi)
    return torch.where(keep, g, 0)


def _pow_partial(g: Any, y: Any, a: Any, exponent: Any) -> Any:
    return torch.zeros_like(g) if exponent == 0 else g * (exponent * a.pow(exponent - 1))


def _share(loses: Any, ties: Any, g: Any) -> Any:
    """maximum and minimum give half of the gradient to each side of a tie, as autograd does."""
    return torch.where(ties, g / 2, g).masked_fill(loses, 0)


def _gelu_tanh(a: Any) -> Any:
    return torch.nn.functional.gelu(a, approximate="tanh")


_TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)

FUNCTIONS: dict[str, Function] = {
    # arithmetic (the operators + - * / and unary minus are the first five)
    "add": Function(operator.add, (lambda g, y, a, b: g, lambda g, y, a, b: g)),
    "sub": Function(operator.sub, (lambda g, y, a, b: g, lambda g, y, a, b: -g)),
    "mul": Function(operator.mul, (lambda g, y, a, b: g * b, lambda g, y, a, b: g * a)),
    "div": Function(operator.truediv, (lambda g, y, a, b: g / b, lambda g, y, a, b: -g * (a / b) / b), result="float"),
    "neg": _unary(torch.neg, lambda g, y, a: -g, result="promote"),
    "abs": _unary(torch.abs, lambda g, y, a: g * a.sgn(), result="promote"),
    "square": _unary(torch.square, lambda g, y, a: g * (a * 2.0), result="promote"),
    "pow": _unary(torch.pow, _pow_partial, ..., result="promote"),
    "sqrt": _unary(torch.sqrt, lambda g, y, a: g / (2 * y)),
    "rsqrt": _unary(torch.rsqrt, lambda g, y, a: -0.5 * g * y.pow(3)),
    "exp": _unary(torch.exp, lambda g, y, a: g * y),
    "log": _unary(torch.log, lambda g, y, a: g / a),
    "erf": _unary(torch.erf, lambda g, y, a: _TWO_OVER_SQRT_PI * torch.exp(-(a.pow(2))) * g),
    "sin": _unary(torch.sin, lambda g, y, a: g * a.cos()),
    "cos": _unary(torch.cos, lambda g, y, a: g * -a.sin()),
    "tanh": _unary(torch.tanh, lambda g, y, a: aten.tanh_backward(g, y)),
    "sigmoid": _unary(torch.sigmoid, lambda g, y, a: aten.sigmoid_backward(g, y)),
    # choices
    "maximum": Function(
        torch.maximum, (lambda g, y, a, b: _share(a < b, a == b, g), lambda g, y, a, b: _share(a > b, a == b, g))
    ),
    "minimum": Function(
        torch.minimum, (lambda g, y, a, b: _share(a > b, a == b, g), lambda g, y, a, b: _share(a < b, a == b, g))
    ),
    "clamp": _unary(torch.clamp, _clamp_partial, ..., ..., result="promote"),
    "where": Function(
        torch.where,
        (None, lambda g, y, c, a, b: torch.where(c, g, 0), lambda g, y, c, a, b: torch.where(c, 0, g)),
        result="where",
    ),
    "lt": _compare(operator.lt),
    "le": _compare(operator.le),
    "gt": _compare(operator.gt),
    "ge": _compare(operator.ge),
    "eq": _compare(operator.eq),
    "ne": _compare(operator.ne),
    # activations
    "silu": _unary(torch.nn.functional.silu, lambda g, y, a: aten.silu_backward(g, a)),
    "gelu": _unary(torch.nn.functional.gelu, lambda g, y, a: aten.gelu_backward(g, a)),
    "gelu_tanh": _unary(_gelu_tanh, lambda g, y, a: aten.gelu_backward(g, a, approximate="tanh")),
    "relu": _unary(torch.relu, lambda g, y, a: aten.threshold_backward(g, y, 0), result="promote"),
    "leaky_relu": _unary(
        torch.nn.functional.leaky_relu, lambda g, y, a, s: aten.leaky_relu_backward(g, a, s, False), 0.01
    ),
    "elu": _unary(
        torch.nn.functional.elu, lambda g, y, a, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, False, a), 1.0
    ),
    "softplus": _unary(
        torch.nn.functional.softplus,
        lambda g, y, a, beta, threshold: aten.softplus_backward(g, a, beta, threshold),
        1.0,
        20.0,
    ),
    "hardsigmoid": _unary(torch.nn.functional.hardsigmoid, lambda g, y, a: aten.hardsigmoid_backward(g, a)),
    "hardswish": _unary(torch.nn.functional.hardswish, lambda g, y, a: aten.hardswish_backward(g, a)),
    "mish": _unary(torch.nn.functional.mish, lambda g, y, a: aten.mish_backward(g, a)),
}
