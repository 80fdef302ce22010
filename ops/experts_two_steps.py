"""The backward of permute_experts_combine in two ops, for providers that keep large products for it.

    reverse     from the gradient of out and the saved products to what stands between: gradients of the products, and what else is needed
    gradients   from that to the gradients of x, weights, biases

Autograd frees what a node saved or was given when the node's backward is done. In nodes of their own the saved products are gone before
the gradients of the weights need memory, and what the last products' gradients need is gone before those of the first ones do; in eager
mode and (as ops) in a compiled graph. Nodes of parameters compute nothing: their outputs are tokens without memory, in the shapes of what
their backward gets as gradients. The layer is computed before the nodes are made, so that a device that waits has work while they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import experts, registry
from ._register import below_autograd, register_op
from .experts_combine import ARGS, SAVING_OP, arguments, backward_of, prepare

REVERSE_SCHEMA = f"{experts.REVERSE}(Tensor grad_TO, Tensor[] saved, {ARGS}, bool[] needs_grad) -> Tensor[]"
GRADIENTS_SCHEMA = f"{experts.GRADIENTS}(Tensor[] carried, Tensor[] shared, {ARGS}, bool[] needs_grad) -> Tensor[]"


def takes(provider: str) -> bool:
    """Has the provider kernels for both?"""
    return experts.REVERSE in registry.get("experts", provider).kernels


def _reverse_kernel(grad_TO: Any, saved: list[Any], *args: Any) -> list[Any]:
    call, grad, kernel = backward_of(experts.REVERSE, grad_TO, *args)
    found: list[Any] = kernel(call, grad, saved, args[-1])
    return found


def _reverse_fake(grad_TO: Any, saved: list[Any], *args: Any) -> list[Any]:
    *inputs, provider, needs_grad = args
    types = registry.kernel("experts", provider, experts.CARRIED)(prepare(*inputs)[0], needs_grad)
    return [grad_TO.new_empty(shape, dtype=dtype) for shape, dtype in types]


def _gradients_kernel(carried: list[Any], shared: list[Any], *args: Any) -> list[Any]:
    *inputs, provider, needs_grad = args
    call, _ = prepare(*inputs)
    experts.check_slots(call)
    found: list[Any] = registry.kernel("experts", provider, experts.GRADIENTS)(call, carried, shared, needs_grad)
    return found


def _gradients_fake(carried: list[Any], shared: list[Any], *args: Any) -> list[Any]:
    *inputs, _, needs_grad = args
    return experts.empty_grads(prepare(*inputs)[0], needs_grad)


class _Parameters(torch.autograd.Function):
    """Gives tokens for some of what stands between, and takes their gradients to those of some parameters, which need no other."""

    @staticmethod
    def forward(
        ctx: Any, num_weights: int, rest: tuple[Any, ...], needs: tuple[bool, ...], types: tuple[Any, ...], num_shared: int, *tensors: Any
    ) -> Any:
        ctx.num_weights, ctx.rest, ctx.needs, ctx.wanted = num_weights, rest, needs, [each is not None for each in types]
        ctx.num_shared = num_shared
        ctx.save_for_backward(*tensors)
        x = tensors[num_shared]
        return tuple(x.new_empty((), dtype=each[1]).expand(each[0]) for each in types if each)  # no kernel: they are never read

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        kept, part = ctx.saved_tensors, iter(given)
        shared, tensors = kept[: ctx.num_shared], kept[ctx.num_shared :]
        carried = [next(part) if wanted else tensors[0].new_empty(0) for wanted in ctx.wanted]
        with below_autograd():
            found = GRADIENTS_OP.overload(carried, list(shared), *arguments(ctx.num_weights, ctx.rest, tensors), ctx.needs)
        grads = experts.first_derivatives(found, ctx.needs, tensors)
        return *(None for _ in range(5 + ctx.num_shared)), grads[0], None, None, *grads[1:]


class _Sum(torch.autograd.Function):
    """Gives out, which is computed already, and keeps what was saved for its backward, which gives the tokens' gradients."""

    @staticmethod
    def forward(
        ctx: Any, num_weights: int, rest: tuple[Any, ...], needs: tuple[bool, ...], of: tuple[int, ...], done: list[Any], *tensors: Any
    ) -> Any:
        """done: out and the saved tensors; emptied, so that nothing but this node holds them."""
        ctx.num_weights, ctx.rest, ctx.needs, ctx.of = num_weights, rest, needs, of
        out, *saved = done
        done.clear()
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved, *tensors[len(of) :])
        return out

    @staticmethod
    def backward(ctx: Any, grad_TO: Any) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: checkpointing unpacks each only once
        saved, tensors = kept[: ctx.num_saved], kept[ctx.num_saved :]
        with below_autograd():
            carried = REVERSE_OP.overload(grad_TO, list(saved), *arguments(ctx.num_weights, ctx.rest, tensors), ctx.needs)
        return None, None, None, None, None, *(carried[at] for at in ctx.of), *(None for _ in tensors)


def apply(num_weights: int, rest: tuple[Any, ...], tensors: Sequence[Any]) -> Any:
    """out [T, O], differentiable. tensors: the op's, in one row (experts_combine.arguments); at least one of them needs a gradient."""
    x, _, _, topk_weights, *params, combine_weights = tensors
    needs = tuple(each is not None and each.requires_grad for each in (x, topk_weights, *params, combine_weights))
    *inputs, provider = arguments(num_weights, rest, tensors)
    with below_autograd():
        out, saved = SAVING_OP.overload(*inputs, provider, needs)
    call, _ = prepare(*inputs)
    shared = saved[len(saved) - len(experts.shared_types(call, provider)) :]
    done = [out, *saved]
    del out, saved
    types = registry.kernel("experts", provider, experts.CARRIED)(call, needs)
    last, last_needs = registry.kernel("experts", provider, experts.LAST)(call)
    tokens: list[Any] = []
    of: list[int] = []
    for late in (False, True):  # nodes run from the newest on: the last products' first
        part = tuple(need and own == late for need, own in zip(needs, last_needs, strict=True))
        if any(part):
            wanted = [at for at, own in enumerate(last) if own == late]
            of += wanted
            own_types = tuple(t if at in wanted else None for at, t in enumerate(types))
            tokens += _Parameters.apply(num_weights, rest, part, own_types, len(shared), *shared, *tensors)
    fixed = [None if each is None else each.detach() for each in tensors]
    return _Sum.apply(num_weights, rest, needs, tuple(of), done, *tokens, *fixed)


REVERSE_OP = register_op(REVERSE_SCHEMA, _reverse_kernel, _reverse_fake, replays=registry.replays("experts", -2))
GRADIENTS_OP = register_op(GRADIENTS_SCHEMA, _gradients_kernel, _gradients_fake, replays=registry.replays("experts", -2))
