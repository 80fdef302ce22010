"""The functions an expert program may call: one row each with forward, derivatives and result type.

A row is `name: Function(forward, partials, ...)`. forward(*operands, *attrs) is the torch function itself, so that a program means
what the eager code meant (operators rather than torch.add: they take a number on either side).
partials[i].adjoint(grad, y, *operands, *attrs) is the adjoint of operand i, given the result y; the aten *_backward functions are
used where autograd uses them, so gradients agree with eager's to the bit.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._python_dispatch

aten = torch.ops.aten


class Partial(NamedTuple):
    """The adjoint of one operand, and which values it reads: y the result, a b c the operands in order.

    write(out, grad, y, *operands, *attrs) puts the same into out, for those where that saves a pass worth saving.
    """

    reads: str
    adjoint: Callable[..., Any]
    write: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Function:
    """One row of the table.

    forward: torch function of the operands (rows or numbers) and then the attributes (numbers or None).
    partials: one an operand; None where the derivative is zero.
    attrs: default of each attribute; `...` marks one that must be given.
    result: "promote" (operands' common type), "float" (the same, integers become the default float), "bool", "where".
    """

    forward: Callable[..., Any]
    partials: tuple[Partial | None, ...]
    attrs: tuple[Any, ...] = ()
    result: str = "promote"


def _unary(
    forward: Callable[..., Any],
    reads: str,
    adjoint: Callable[..., Any],
    *attrs: Any,
    result: str = "float",
    write: Callable[..., Any] | None = None,
) -> Function:
    return Function(forward, (Partial(reads, adjoint, write),), attrs, result)


def _binary(forward: Callable[..., Any], first: tuple[Any, ...], second: tuple[Any, ...], result: str = "promote") -> Function:
    return Function(forward, (Partial(*first), Partial(*second)), (), result)


def _compare(forward: Callable[..., Any]) -> Function:
    return Function(forward, (None, None), result="bool")


def _clamp_passes_bounds() -> bool:
    """Whether autograd's clamp has a gradient of one at its bounds: up to torch 2.13 it has, in 2.15 it has not."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        bound = torch.ones((), device="cpu", requires_grad=True)
        # The node itself, not autograd's engine: a process that forks later must not have started its threads.
        grad = torch.clamp(bound, max=1.0).grad_fn(torch.ones((), device="cpu"))
        return bool((grad[0] if isinstance(grad, tuple) else grad).item() == 1.0)


# a >= lo and a <= hi where the bounds pass a gradient, else a > lo and a < hi
ABOVE, BELOW = (operator.ge, operator.le) if _clamp_passes_bounds() else (operator.gt, operator.lt)


def _clamp_adjoint(g: Any, y: Any, a: Any, lo: Any, hi: Any) -> Any:
    """Stops at NaN, and at the bounds where the torch that runs does."""
    keep = torch.ones_like(a, dtype=torch.bool)
    if lo is not None:
        keep = keep & ABOVE(a, lo)
    if hi is not None:
        keep = keep & BELOW(a, hi)
    return torch.where(keep, g, 0)


def _pow_adjoint(g: Any, y: Any, a: Any, exponent: Any) -> Any:
    return torch.zeros_like(g) if exponent == 0 else g * (exponent * a.pow(exponent - 1))


def _share(loses: Any, ties: Any, g: Any) -> Any:
    """maximum and minimum give half of the gradient to each side of a tie, as autograd does."""
    return torch.where(ties, g / 2, g).masked_fill(loses, 0)


def _gelu_tanh(a: Any) -> Any:
    return F.gelu(a, approximate="tanh")


_TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)

FUNCTIONS: dict[str, Function] = {
    # arithmetic; the operators + - * / and unary minus are the first five
    "add": _binary(operator.add, ("", lambda g, y, a, b: g), ("", lambda g, y, a, b: g)),
    "sub": _binary(operator.sub, ("", lambda g, y, a, b: g), ("", lambda g, y, a, b: -g)),
    "mul": _binary(
        operator.mul,
        ("b", lambda g, y, a, b: g * b, lambda out, g, y, a, b: torch.mul(g, b, out=out)),
        ("a", lambda g, y, a, b: g * a, lambda out, g, y, a, b: torch.mul(g, a, out=out)),
    ),
    "div": _binary(
        operator.truediv,
        ("b", lambda g, y, a, b: g / b),
        ("ab", lambda g, y, a, b: -g * ((a / b) / b)),
        result="float",
    ),
    "neg": _unary(torch.neg, "", lambda g, y, a: -g, result="promote"),
    "abs": _unary(torch.abs, "a", lambda g, y, a: g * a.sgn(), result="promote"),
    "square": _unary(torch.square, "a", lambda g, y, a: g * (a * 2.0), result="promote"),
    "pow": _unary(torch.pow, "a", _pow_adjoint, ..., result="promote"),
    "sqrt": _unary(torch.sqrt, "y", lambda g, y, a: g / (2 * y)),
    "rsqrt": _unary(torch.rsqrt, "y", lambda g, y, a: -0.5 * g * y.pow(3)),
    "exp": _unary(torch.exp, "y", lambda g, y, a: g * y),
    "log": _unary(torch.log, "a", lambda g, y, a: g / a),
    "erf": _unary(torch.erf, "a", lambda g, y, a: _TWO_OVER_SQRT_PI * torch.exp(-(a.pow(2))) * g),
    "sin": _unary(torch.sin, "a", lambda g, y, a: g * a.cos()),
    "cos": _unary(torch.cos, "a", lambda g, y, a: g * -a.sin()),
    "tanh": _unary(torch.tanh, "y", lambda g, y, a: aten.tanh_backward(g, y)),
    "sigmoid": _unary(torch.sigmoid, "y", lambda g, y, a: aten.sigmoid_backward(g, y)),
    # choices
    "maximum": _binary(
        torch.maximum,
        ("ab", lambda g, y, a, b: _share(a < b, a == b, g)),
        ("ab", lambda g, y, a, b: _share(a > b, a == b, g)),
    ),
    "minimum": _binary(
        torch.minimum,
        ("ab", lambda g, y, a, b: _share(a > b, a == b, g)),
        ("ab", lambda g, y, a, b: _share(a < b, a == b, g)),
    ),
    "clamp": _unary(torch.clamp, "a", _clamp_adjoint, ..., ..., result="promote"),
    "where": Function(
        torch.where,
        (
            None,
            Partial("a", lambda g, y, c, a, b: torch.where(c, g, 0)),
            Partial("a", lambda g, y, c, a, b: torch.where(c, 0, g)),
        ),
        result="where",
    ),
    "lt": _compare(operator.lt),
    "le": _compare(operator.le),
    "gt": _compare(operator.gt),
    "ge": _compare(operator.ge),
    "eq": _compare(operator.eq),
    "ne": _compare(operator.ne),
    # activations
    "silu": _unary(
        F.silu,
        "a",
        lambda g, y, a: aten.silu_backward(g, a),
        write=lambda out, g, y, a: aten.silu_backward.grad_input(g, a, grad_input=out),
    ),
    "gelu": _unary(
        F.gelu,
        "a",
        lambda g, y, a: aten.gelu_backward(g, a),
        write=lambda out, g, y, a: aten.gelu_backward.grad_input(g, a, grad_input=out),
    ),
    "gelu_tanh": _unary(_gelu_tanh, "a", lambda g, y, a: aten.gelu_backward(g, a, approximate="tanh")),
    "relu": _unary(torch.relu, "y", lambda g, y, a: aten.threshold_backward(g, y, 0), result="promote"),
    "leaky_relu": _unary(F.leaky_relu, "a", lambda g, y, a, s: aten.leaky_relu_backward(g, a, s, False), 0.01),
    "elu": _unary(F.elu, "a", lambda g, y, a, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, False, a), 1.0),
    "softplus": _unary(F.softplus, "a", lambda g, y, a, beta, high: aten.softplus_backward(g, a, beta, high), 1.0, 20.0),
    "hardsigmoid": _unary(F.hardsigmoid, "a", lambda g, y, a: aten.hardsigmoid_backward(g, a)),
    "hardswish": _unary(F.hardswish, "a", lambda g, y, a: aten.hardswish_backward(g, a)),
    "mish": _unary(F.mish, "a", lambda g, y, a: aten.mish_backward(g, a)),
}
