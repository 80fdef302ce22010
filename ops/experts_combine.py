"""Op permute_experts_combine: permute_experts_unpermute and the local combine in one.

    out[t] = sum_k w[t, k] * f_e(x[t])

y [T, K, O] is never brought into slot order. On a CPU that saves 7 to 13 % of a layer's forward (page faults, a scatter and a pass
over y; benchmarks/notes.md), and in training it is not kept either: where f ends in a product e @ W, the gradient of w is
sum((grad @ W.T) * e), of which grad @ W.T is needed anyway. A provider without kernels for it is called through the two ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import combine, experts, registry
from ._register import below_autograd, register_op

NAME = experts.COMBINED
ARGS = f"{experts.ARGS_WITHOUT_PROVIDER}, Tensor? combine_weights_TK, ScalarType? out_dtype, str provider"
SCHEMA = f"{NAME}({ARGS}) -> Tensor out_TO"
SAVING_SCHEMA = f"{experts.COMBINED_SAVING}({ARGS}, bool[] needs_grad) -> (Tensor out_TO, Tensor[] saved)"
BACKWARD_SCHEMA = f"{experts.COMBINED_BACKWARD}(Tensor grad_TO, Tensor[] saved, {ARGS}, bool[] needs_grad) -> Tensor[]"


def prepare(*args: Any) -> tuple[experts.Call, Any]:
    """The call, and the dtype of out, from the op's arguments without the provider."""
    *inputs, combine_weights, out_dtype = args
    call = experts.combined(experts.prepare(*inputs), combine_weights)
    y_dtype = call.values[-1].dtype
    if out_dtype is None:
        out_dtype = y_dtype if combine_weights is None else torch.promote_types(y_dtype, combine_weights.dtype)
    return call, out_dtype


def _kernel(*args: Any) -> Any:
    call, out_dtype = prepare(*args[:-1])
    experts.check_slots(call)
    kernels = registry.get("experts", args[-1]).kernels
    if NAME in kernels:
        return kernels[NAME](call, out_dtype)
    y_TKO = registry.kernel("experts", args[-1], experts.NAME)(call)
    return combine.local(y_TKO, call.combine_weights, [], out_dtype)


def _fake(*args: Any) -> Any:
    call, out_dtype = prepare(*args[:-1])
    tokens, _, width = call.out_shape
    return call.x.new_empty((tokens, width), dtype=out_dtype)


def _saving_kernel(*args: Any) -> tuple[Any, list[Any]]:
    *inputs, provider, needs_grad = args
    call, out_dtype = prepare(*inputs)
    experts.check_slots(call)
    out, saved = registry.kernel("experts", provider, experts.COMBINED_SAVING)(call, out_dtype, needs_grad)
    return out, saved


def _saving_fake(*args: Any) -> tuple[Any, list[Any]]:
    *inputs, provider, needs_grad = args
    return _fake(*inputs, provider), experts.new_saved(prepare(*inputs)[0], provider, needs_grad)


def _backward_kernel(grad_TO: Any, saved: list[Any], *args: Any) -> list[Any]:
    call, grad, kernel = backward_of(experts.COMBINED_BACKWARD, grad_TO, *args)
    found: list[Any] = kernel(call, grad, saved, args[-1])
    return found


def backward_of(name: str, grad_TO: Any, *args: Any) -> tuple[experts.Call, Any, Any]:
    """(the call, its gradient, the provider's kernel), from the arguments of an op of the backward."""
    *inputs, provider, _ = args
    call, _ = prepare(*inputs)
    experts.check_slots(call)
    # Products are taken in y's dtype; where it is narrower than out's, its gradient is rounded to it, as in autograd.
    return call, grad_TO.to(call.values[-1].dtype), registry.kernel("experts", provider, name)


def _backward_fake(grad_TO: Any, saved: list[Any], *args: Any) -> list[Any]:
    *inputs, _, needs_grad = args
    return experts.empty_grads(prepare(*inputs)[0], needs_grad)


class _Differentiable(torch.autograd.Function):
    """Forward by the saving op, as for the experts alone."""

    @staticmethod
    def forward(ctx: Any, num_weights: int, rest: tuple[Any, ...], *tensors: Any) -> Any:
        x, _, _, topk_weights, *params, combine_weights = range(2, 2 + len(tensors))
        ctx.needs = [ctx.needs_input_grad[at] for at in (x, topk_weights, *params, combine_weights)]
        ctx.num_weights, ctx.rest = num_weights, rest
        with below_autograd():
            out, saved = SAVING_OP.overload(*arguments(num_weights, rest, tensors), ctx.needs)
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad_TO: Any) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: checkpointing unpacks each only once
        saved, tensors = kept[: ctx.num_saved], kept[ctx.num_saved :]
        with below_autograd():
            found = BACKWARD_OP.overload(grad_TO, list(saved), *arguments(ctx.num_weights, ctx.rest, tensors), ctx.needs)
        grads = experts.first_derivatives(found, ctx.needs, tensors)
        return None, None, grads[0], None, None, *grads[1:]


def arguments(num_weights: int, rest: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The op's arguments again, from its tensors in one row and the others."""
    x, order, offsets, topk_weights, *params, combine_weights = tensors
    *texts, out_dtype, provider = rest
    return (
        x, order, offsets, topk_weights, params[:num_weights], params[num_weights:], *texts, combine_weights, out_dtype, provider
    )  # fmt: skip


def _autograd(*args: Any) -> Any:
    x, order, offsets, topk_weights, weights, biases, *texts, combine_weights, out_dtype, provider = args
    tensors = (x, order, offsets, topk_weights, *weights, *biases, combine_weights)
    if not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)):
        with below_autograd():
            return OP.overload(*args)
    experts.refuse_gradients(texts[1])
    from . import experts_two_steps

    if experts_two_steps.takes(provider):
        return experts_two_steps.apply(len(weights), (*texts, out_dtype, provider), tensors)
    if experts.COMBINED_SAVING in registry.get("experts", provider).kernels:
        return _Differentiable.apply(len(weights), (*texts, out_dtype, provider), *tensors)
    y_TKO = experts.OP.overload(*args[:-3], provider)
    return combine.OP.overload(y_TKO, combine_weights, [], out_dtype, "local")


OP = register_op(SCHEMA, _kernel, _fake, _autograd, replays=registry.replays("experts", -1))
SAVING_OP = register_op(SAVING_SCHEMA, _saving_kernel, _saving_fake, replays=registry.replays("experts", -2))
BACKWARD_OP = register_op(BACKWARD_SCHEMA, _backward_kernel, _backward_fake, replays=registry.replays("experts", -2))


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider: those of the experts, with and without weights of the sum."""
    for args in experts.sample_inputs(device, dtype):
        yield *args, None, None
        yield *args, torch.full((args[0].shape[0], args[-1]), 0.5, dtype=dtype, device=device), torch.float32
