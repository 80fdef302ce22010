"""Op permute_experts_combine: permute_experts_unpermute and the local combine in one, for inference.

    out[t] = sum_k w[t, k] * f_e(x[t])

y [T, K, O] is never written: on a CPU that saves 7 to 13 % of a layer (page faults, a scatter and a pass over y;
benchmarks/notes.md). Where a gradient is needed it is the two ops, so it is always right to call. A provider without a
kernel for it runs its permute_experts_unpermute, and the sum follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import combine, experts, registry
from ._register import below_autograd, register_op

NAME = experts.COMBINED
SCHEMA = (
    f"{NAME}(Tensor x_TH, Tensor order_N, Tensor offsets_E, Tensor? topk_weights_TK, Tensor[] weights, Tensor[] biases, str program, "
    "str weight_layout, str bias_layout, int top_k, Tensor? combine_weights_TK, ScalarType? out_dtype, str provider) -> Tensor out_TO"
)


def _kernel(*args: Any) -> Any:
    *inputs, combine_weights, out_dtype, provider = args
    call = experts.prepare(*inputs)
    experts.check_slots(call)
    if combine_weights is not None and combine_weights.shape != (call.x.shape[0], call.top_k):
        raise ValueError(f"combine_weights must be [T, K] = [{call.x.shape[0]}, {call.top_k}], got {tuple(combine_weights.shape)}")
    out_dtype = _out_dtype(call, combine_weights, out_dtype)
    kernels = registry.get("experts", provider).kernels
    if NAME in kernels:
        return kernels[NAME](call, combine_weights, out_dtype)
    return combine.local(registry.kernel("experts", provider, experts.NAME)(call), combine_weights, [], out_dtype)


def _fake(*args: Any) -> Any:
    *inputs, combine_weights, out_dtype, _ = args
    call = experts.prepare(*inputs)
    tokens, _, width = call.out_shape
    return call.x.new_empty((tokens, width), dtype=_out_dtype(call, combine_weights, out_dtype))


def _out_dtype(call: experts.Call, combine_weights: Any, out_dtype: Any) -> Any:
    y_dtype = call.values[-1].dtype
    if out_dtype is not None:
        return out_dtype
    return y_dtype if combine_weights is None else torch.promote_types(y_dtype, combine_weights.dtype)


def _autograd(*args: Any) -> Any:
    *inputs, combine_weights, out_dtype, provider = args
    x, _, _, topk_weights, weights, biases = inputs[:6]
    tensors = (x, topk_weights, combine_weights, *weights, *biases)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        y_TKO = experts.OP.overload(*inputs, provider)
        return combine.OP.overload(y_TKO, combine_weights, [], out_dtype, "local")
    with below_autograd():
        return OP.overload(*args)


OP = register_op(SCHEMA, _kernel, _fake, _autograd)


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider: those of the experts, with and without weights of the sum."""
    for args in experts.sample_inputs(device, dtype):
        yield *args, None, None
        yield *args, torch.full((args[0].shape[0], args[-1]), 0.5, dtype=dtype, device=device), torch.float32
