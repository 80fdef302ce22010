"""The backward of permute_experts_combine in two ops, for providers that keep large products for it.

    reverse     from the gradient of out and the saved products to what stands between: gradients of the products, and what else is needed
    gradients   from that to the gradients of x, weights, biases

Autograd frees what a node saved when the node's backward is done. In two nodes the saved products are gone before the gradients of the
weights need their memory, in eager mode and (as two ops) in a compiled graph. The first node computes nothing: its outputs are tokens
without memory, in the shapes of what its backward gets as their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import experts, registry
from ._register import below_autograd, register_op
from .experts_combine import ARGS, SAVING_OP, arguments, prepare

REVERSE_SCHEMA = f"{experts.REVERSE}(Tensor grad_TO, Tensor[] saved, {ARGS}, bool[] needs_grad) -> Tensor[]"
GRADIENTS_SCHEMA = f"{experts.GRADIENTS}(Tensor[] carried, {ARGS}, bool[] needs_grad) -> Tensor[]"


def takes(provider: str) -> bool:
    """Has the provider kernels for both?"""
    return experts.REVERSE in registry.get("experts", provider).kernels


def _reverse_kernel(grad_TO: Any, saved: list[Any], *args: Any) -> list[Any]:
    *inputs, provider, needs_grad = args
    call, _ = prepare(*inputs)
    experts.check_slots(call)
    # Products are taken in y's dtype; where it is narrower than out's, its gradient is rounded to it, as in autograd.
    grad = grad_TO.to(call.values[-1].dtype)
    found: list[Any] = registry.kernel("experts", provider, experts.REVERSE)(call, grad, saved, needs_grad)
    return found


def _reverse_fake(grad_TO: Any, saved: list[Any], *args: Any) -> list[Any]:
    return [grad_TO.new_empty(shape, dtype=dtype) for shape, dtype in _types(*args)]


def _types(*args: Any) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """(shape, dtype) of what stands between."""
    *inputs, provider, needs_grad = args
    found: list[Any] = registry.kernel("experts", provider, experts.CARRIED)(prepare(*inputs)[0], needs_grad)
    return found


def _gradients_kernel(carried: list[Any], *args: Any) -> list[Any]:
    *inputs, provider, needs_grad = args
    call, _ = prepare(*inputs)
    experts.check_slots(call)
    found: list[Any] = registry.kernel("experts", provider, experts.GRADIENTS)(call, carried, needs_grad)
    return found


def _gradients_fake(carried: list[Any], *args: Any) -> list[Any]:
    *inputs, _, needs_grad = args
    return experts.empty_grads(prepare(*inputs)[0], needs_grad)


class _Parameters(torch.autograd.Function):
    """Gives tokens, and takes their gradients to those of the parameters."""

    @staticmethod
    def forward(ctx: Any, num_weights: int, rest: tuple[Any, ...], needs: tuple[bool, ...], *tensors: Any) -> Any:
        ctx.num_weights, ctx.rest, ctx.needs = num_weights, rest, needs
        ctx.save_for_backward(*tensors)
        x = tensors[0]
        types = _types(*arguments(num_weights, rest, tensors), needs)
        return tuple(x.new_empty((), dtype=dtype).expand(shape) for shape, dtype in types)  # no kernel: their values are never read

    @staticmethod
    def backward(ctx: Any, *carried: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        with below_autograd():
            found = GRADIENTS_OP.overload(list(carried), *arguments(ctx.num_weights, ctx.rest, tensors), ctx.needs)
        grads = experts.first_derivatives(found, ctx.needs, tensors)
        return None, None, None, grads[0], None, None, *grads[1:]


class _Sum(torch.autograd.Function):
    """Computes out and keeps products for its backward, which gives the tokens' gradients."""

    @staticmethod
    def forward(ctx: Any, num_weights: int, rest: tuple[Any, ...], needs: tuple[bool, ...], num_tokens: int, *tensors: Any) -> Any:
        own = tensors[num_tokens:]
        ctx.num_weights, ctx.rest, ctx.needs, ctx.num_tokens = num_weights, rest, needs, num_tokens
        with below_autograd():
            out, saved = SAVING_OP.overload(*arguments(num_weights, rest, own), needs)
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved, *own)
        return out

    @staticmethod
    def backward(ctx: Any, grad_TO: Any) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: checkpointing unpacks each only once
        saved, tensors = kept[: ctx.num_saved], kept[ctx.num_saved :]
        with below_autograd():
            carried = REVERSE_OP.overload(grad_TO, list(saved), *arguments(ctx.num_weights, ctx.rest, tensors), ctx.needs)
        return None, None, None, None, *carried, *(None for _ in tensors)


def apply(num_weights: int, rest: tuple[Any, ...], tensors: Sequence[Any]) -> Any:
    """out [T, O], differentiable. tensors: the op's, in one row (experts_combine.arguments); at least one of them needs a gradient."""
    x, _, _, topk_weights, *params, combine_weights = tensors
    needs = tuple(each is not None and each.requires_grad for each in (x, topk_weights, *params, combine_weights))
    tokens = _Parameters.apply(num_weights, rest, needs, *tensors)
    fixed = [None if each is None else each.detach() for each in tensors]
    return _Sum.apply(num_weights, rest, needs, len(tokens), *tokens, *fixed)


REVERSE_OP = register_op(REVERSE_SCHEMA, _reverse_kernel, _reverse_fake)
GRADIENTS_OP = register_op(GRADIENTS_SCHEMA, _gradients_kernel, _gradients_fake)
