"""Op local_experts: dispatch, experts and combine of one rank in one, for inference.

    out[t] = sum_k w[t, k] * f_ids[t, k](x[t])

No order of slots is handed from stage to stage, so a provider sorts them as its kernels want them, or not at all for a few tokens.
passes/fuse.py writes it where the experts' provider has a kernel for it and no gradient is wanted; by others it is the stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import combine, experts, experts_combine, quantize_dispatch, registry
from ._register import below_autograd, register_op

NAME = experts.LOCAL
SCHEMA = (
    f"{NAME}(Tensor x_TH, Tensor ids_TK, int num_experts, Tensor? topk_weights_TK, Tensor[] weights, Tensor[] biases, str program, "
    "str weight_layout, str bias_layout, Tensor? combine_weights_TK, ScalarType? out_dtype, str provider) -> Tensor out_TO"
)


def prepare(*args: Any) -> tuple[experts.Call, Any]:
    """The call without an order, and the dtype of out."""
    x, ids, num_experts, *inputs, combine_weights, out_dtype, _ = args
    call = experts.prepare_unsorted(x, num_experts, *(*inputs, ids.shape[1]))
    dtype = combine.result_dtype(x.new_empty(0, dtype=call.values[-1].dtype), combine_weights, out_dtype)
    return experts.combined(call, combine_weights), dtype


def _kernel(*args: Any) -> Any:
    ids, num_experts, provider = args[1], args[2], args[-1]
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64) or ids.shape[0] != args[0].shape[0]:
        raise ValueError(f"ids must be int32 or int64 [{args[0].shape[0]}, K], got {ids.dtype} {tuple(ids.shape)}")
    kernels = registry.get("experts", provider).kernels
    call, out_dtype = prepare(*args)
    if NAME in kernels:
        return kernels[NAME](call, ids, num_experts, out_dtype)
    return _by_stages(*args)


def _by_stages(*args: Any) -> Any:
    x, ids, num_experts, *params, combine_weights, out_dtype, provider = args
    _, _, order, offsets, *_ = quantize_dispatch.OP.overload(x, ids, num_experts, "none", "local")
    return experts_combine.OP.overload(x, order, offsets, *params, ids.shape[1], combine_weights, out_dtype, provider)


def _autograd(*args: Any) -> Any:
    """Gradients come from the stages."""
    x, _, _, inner, weights, biases, *_, combine_weights, _, _ = args
    tensors = (x, inner, *weights, *biases, combine_weights)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        return _by_stages(*args)
    with below_autograd():
        return OP.overload(*args)


def _fake(*args: Any) -> Any:
    call, out_dtype = prepare(*args)
    return call.x.new_empty((call.x.shape[0], call.values[-1].width), dtype=out_dtype)


OP = register_op(SCHEMA, _kernel, _fake, _autograd, replays=registry.replays("experts", -1))


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Any:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(device, dtype)

    ids = torch.tensor([[0, 2], [1, -1], [2, 3]], device=device)
    weights, gate = [rand(3, 12, 8), rand(3, 8, 6)], "mm(1, silu(cols(mm(0, x), 0, 6, 1)) * cols(mm(0, x), 6, 12, 1))"
    yield rand(3, 8), ids, 3, None, weights, [], gate, "eoi,eoi", "", rand(3, 2), None
    yield rand(3, 8), ids.int(), 3, rand(3, 2), weights, [], f"w * {gate}", "eoi,eoi", "", None, torch.float32
