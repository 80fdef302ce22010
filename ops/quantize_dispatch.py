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


def counting_sort(ids_TK: Any, num_experts: int) -> tuple[Any, Any]:
    """order int64 [N], offsets int32 [E]. Reads nothing back to the host, so it can be captured in a CUDA graph."""
    ids = ids_TK.reshape(-1)
    keys = torch.where(ids < 0, num_experts, ids)  # ids >= E sort behind the experts by themselves
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
INLINE_OP = register_composite(SCHEMA.replace(NAME, NAME + "_inline"), _kernel)  # for a provider that is torch code


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider: plain, duplicates with ids of no expert, no tokens."""
    x = torch.ones((3, 4), dtype=dtype, device=device)
    yield x, torch.tensor([[0, 3], [3, 1], [2, 0]], device=device), 4, "none"
    yield x, torch.tensor([[1, 1], [-1, 7], [0, 4]], device=device), 4, "none"
    yield x[:0], torch.empty((0, 2), dtype=torch.int64, device=device), 4, "none"
