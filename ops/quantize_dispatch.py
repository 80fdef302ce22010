"""Stage op quantize_dispatch: which slots each expert has, and (for comm providers that move rows) their rows.

order    slot numbers n = t*K + k sorted stably by expert; slots whose id is not in [0, E) come last
offsets  end of each expert's run in order, the `offs` of torch's grouped_mm
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import registry
from ._register import below_autograd, register_composite, register_op

NAME = "quantize_dispatch"
SCHEMA = (
    f"{NAME}(Tensor x_TH, Tensor ids_TK, int num_experts, str quant, str provider) -> "
    "(Tensor rows, Tensor scales, Tensor order, Tensor offsets, Tensor[] handle)"
)
QUANT = ("none",)


def counting_sort(ids_TK: Any, num_experts: int, in_range: bool = False) -> tuple[Any, Any]:
    """order int64 [N], offsets int32 [E]. Reads nothing back to the host, so it can be captured in a CUDA graph.

    in_range: no id is outside of [0, E).
    """
    ids = ids_TK.reshape(-1)
    keys = ids if in_range else torch.where(ids < 0, num_experts, ids)  # ids >= E sort behind the experts by themselves
    sorted_keys, order = torch.sort(keys, stable=True)
    experts = torch.arange(num_experts, dtype=sorted_keys.dtype, device=ids.device)
    return order, torch.searchsorted(sorted_keys, experts, right=True, out_int32=True)


def local(x_TH: Any, ids_TK: Any, num_experts: int, quant: str) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Provider "local": the experts read x itself, so rows and scales have no rows, and there is no handle."""
    order, offsets = counting_sort(ids_TK, num_experts)
    return x_TH.new_empty((0, x_TH.shape[-1])), x_TH.new_empty(0, dtype=torch.float32), order, offsets, []


def _kernel(x_TH: Any, ids_TK: Any, num_experts: int, quant: str, provider: str) -> Any:
    if quant not in QUANT:
        raise ValueError(f"quant {quant!r} is not supported; supported: {', '.join(QUANT)}")
    if ids_TK.dim() != 2 or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64 [T, K], got {ids_TK.dtype} {tuple(ids_TK.shape)}")
    return registry.kernel("comm", provider, NAME)(x_TH, ids_TK, num_experts, quant)


def _fake(x_TH: Any, ids_TK: Any, num_experts: int, quant: str, provider: str) -> Any:
    slots = ids_TK.shape[0] * ids_TK.shape[1]
    order = ids_TK.new_empty((slots,), dtype=torch.int64)
    offsets = ids_TK.new_empty((num_experts,), dtype=torch.int32)
    return x_TH.new_empty((0, x_TH.shape[-1])), x_TH.new_empty(0, dtype=torch.float32), order, offsets, []


def _autograd(*args: Any) -> Any:
    """Provider local moves no rows, so nothing that it returns has a gradient."""
    with below_autograd():
        return OP.overload(*args)


OP = register_op(SCHEMA, _kernel, _fake, _autograd)


def _sort_kernel(ids_TK: Any, num_experts: int, in_range: bool) -> tuple[Any, Any, Any, Any]:
    ids, top_k = ids_TK.reshape(-1), ids_TK.shape[1]
    order, offsets = counting_sort(ids, num_experts, in_range)
    tokens = order.div(top_k, rounding_mode="floor") if top_k else order.clone()
    return order, offsets, tokens, torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))


def _sort_fake(ids_TK: Any, num_experts: int, in_range: bool) -> tuple[Any, Any, Any, Any]:
    def slots() -> Any:
        return ids_TK.new_empty((ids_TK.shape[0] * ids_TK.shape[1],), dtype=torch.int64)

    return slots(), ids_TK.new_empty((num_experts,), dtype=torch.int32), slots(), slots()


# order and offsets as above; each sorted slot's token; each slot's place in order. in_range: every id is known to be in [0, E).
SORT_SCHEMA = (
    "sort_slots(Tensor ids_TK, int num_experts, bool in_range) -> (Tensor order_N, Tensor offsets_E, Tensor tokens_N, Tensor places_N)"
)
SORT_OP = register_op(SORT_SCHEMA, _sort_kernel, _sort_fake)
INLINE_SORT_OP = register_composite(SORT_SCHEMA.replace("sort_slots", "sort_slots_inline"), _sort_kernel)


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider: plain, duplicates with ids of no expert, no tokens."""
    x = torch.ones((3, 4), dtype=dtype, device=device)
    yield x, torch.tensor([[0, 3], [3, 1], [2, 0]], device=device), 4, "none"
    yield x, torch.tensor([[1, 1], [-1, 7], [0, 4]], device=device), 4, "none"
    yield x[:0], torch.empty((0, 2), dtype=torch.int64, device=device), 4, "none"
