"""ids and rows as communication libraries take them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- ids
def clean_ids(ids_TK: Any, num_experts: int, dtype: Any) -> Any:
    """The ids in a dense tensor of their own, -1 for those outside of [0, E)."""
    return torch.where((ids_TK >= 0) & (ids_TK < num_experts), ids_TK, -1).to(dtype).contiguous()


def last_slots(ids_TK: Any) -> Any:
    """int64 [T, K]: the last of a token's slots that has the same id."""
    slots = torch.arange(ids_TK.shape[1], device=ids_TK.device)
    return torch.where(ids_TK.unsqueeze(2) == ids_TK.unsqueeze(1), slots, 0).amax(2)


def without_repeats(ids_TK: Any, last_TK: Any) -> Any:
    """The ids, -1 where a later slot of the token has the same."""
    return torch.where(last_TK == torch.arange(ids_TK.shape[1], device=ids_TK.device), ids_TK, -1)


# ---------------------------------------------------------------- rows as bytes
def pack(rows_TX: Any, granule: int) -> Any:
    """bfloat16 [T, n]: the rows' bytes, zeros up to a multiple of `granule` bytes. Dispatches copy bytes, whatever they mean."""
    rows_TX = rows_TX.contiguous() if rows_TX.stride(-1) == 1 else rows_TX.clone(memory_format=torch.contiguous_format)
    extra = -(rows_TX.shape[1] * rows_TX.element_size()) % granule
    if rows_TX.dtype == torch.bfloat16:
        return F.pad(rows_TX, (0, extra // 2)) if extra else rows_TX
    return F.pad(rows_TX.view(torch.uint8), (0, extra)).view(torch.bfloat16)


def unpack(packed: Any, width: int, dtype: Any) -> Any:
    """What `pack` made bytes of: [R, width]."""
    if dtype == torch.bfloat16:
        return packed[:, :width].contiguous()
    return packed.view(torch.uint8)[:, : width * dtype.itemsize].contiguous().view(dtype)


def widen(rows_RX: Any, step: int) -> Any:
    """The rows, zeros behind, with a multiple of `step` columns."""
    extra = -rows_RX.shape[1] % step
    return F.pad(rows_RX, (0, extra)) if extra else rows_RX.contiguous()
