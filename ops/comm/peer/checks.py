"""What the engine's calls take: each check raises ValueError naming the argument, its value, the limit and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .launch import GROUP, Shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANKS = 8
MAX_TOKENS = 65535  # places are counted in 16 bits
MAX_HIDDEN = 16384
MAX_BATCHED_SLOTS = 8192  # T * K of one rank: every program looks at all of them


def check_shape(shape: Shape) -> None:
    if not 1 <= shape.world <= MAX_RANKS:
        raise ValueError(f"the nvlink exchange takes 1 to {MAX_RANKS} ranks of one host, the group has {shape.world}")
    if not 1 <= shape.max_tokens <= MAX_TOKENS:
        raise ValueError(f"max_tokens must be 1 to {MAX_TOKENS}, got {shape.max_tokens}")
    if shape.dtype not in DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {shape.dtype}")
    if not 1 <= shape.hidden <= MAX_HIDDEN or shape.hidden * shape.dtype.itemsize % 16:
        raise ValueError(f"hidden must be 1 to {MAX_HIDDEN} and a multiple of 16 bytes, got {shape.hidden} of {shape.dtype}; pad it")
    if shape.quant not in ("none", "fp8"):
        raise ValueError(f"quant must be 'none' or 'fp8', got {shape.quant!r}")
    if shape.fp8 and shape.hidden % GROUP:
        raise ValueError(f"quant 'fp8' needs hidden to be a multiple of {GROUP}, got {shape.hidden}")
    if shape.top_k < 1 or shape.num_experts < 1:
        raise ValueError(f"top_k and num_experts must be at least 1, got {shape.top_k} and {shape.num_experts}")
    if not 0 <= shape.capacity * shape.num_experts < 1 << 31:
        raise ValueError(f"batched_capacity must be 0 or more and below 2**31 / num_experts, got {shape.capacity}")


def check_tensor(name: str, tensor: Any, shape: tuple[int, ...], device: Any) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the exchange is on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def check_rows(name: str, rows: Any, shape: tuple[int, int], device: Any) -> None:
    check_tensor(name, rows, shape, device)
    width = shape[1]
    if rows.dtype not in DTYPES or width * rows.dtype.itemsize % 16 or not 0 < width <= MAX_HIDDEN:
        raise ValueError(
            f"{name} must have rows of bfloat16, float16 or float32 and of a multiple of 16 bytes, 1 to {MAX_HIDDEN} columns, got "
            f"{tuple(rows.shape)} {rows.dtype}; pad the last dimension"
        )
    if rows.data_ptr() % 16:
        raise ValueError(f"{name} must start at a multiple of 16 bytes, it starts at {rows.data_ptr():#x}; clone it")


def check_tokens(shape: Shape, x: Any, ids: Any, weights: Sequence[Any], device: Any) -> None:
    tokens = x.shape[0] if x.dim() == 2 else 0
    check_rows("x", x, (tokens, shape.hidden), device)
    if x.dtype != shape.dtype:
        raise ValueError(f"x is {x.dtype}, the exchange was made for {shape.dtype}")
    if tokens > shape.max_tokens:
        raise ValueError(f"x has {tokens} tokens, the exchange was made for max_tokens={shape.max_tokens}; make it with a larger one")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    if len(weights) > 2:
        raise ValueError(f"at most 2 weight tensors travel with the rows, got {len(weights)}")
    check_tensor("ids", ids, (tokens, shape.top_k), device)
    for weight in weights:
        check_weights("weights", weight, (tokens, shape.top_k), device)


def check_weights(name: str, weights: Any, shape: tuple[int, int], device: Any) -> None:
    check_tensor(name, weights, shape, device)
    if weights.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {weights.dtype}")


def check_slots(shape: Shape, places: Any, weights: Any, device: Any) -> None:
    check_tensor("places", places, (shape.rows, shape.top_k), device)
    if places.dtype != torch.int32:
        raise ValueError(f"places must be torch.int32, got {places.dtype}")
    check_weights("weights", weights, (shape.rows, shape.top_k), device)


def check_batched(shape: Shape) -> None:
    if shape.capacity < 1:
        raise ValueError("the exchange was made without room for the batched format; give NvlinkEngine a batched_capacity")
    if shape.quant != "none":
        raise ValueError(f"the batched format carries rows as they are, the exchange was made with quant {shape.quant!r}")


def table_of(shape: Shape, handle: list[Any], tokens: int | None = None) -> Any:
    """The table int32 [T + 2, W] of a dispatch's handle; tokens: how many it must be of."""
    table = handle[0] if handle else None
    if table is None or table.dim() != 2 or table.shape[1] != shape.world or table.shape[0] < 2 or table.dtype != torch.int32:
        raise ValueError(f"handle must be the one that dispatch of an exchange of {shape.world} ranks returned, got {handle!r}")
    if tokens is not None and table.shape[0] - 2 != tokens:
        raise ValueError(f"x has {tokens} tokens, the handle's dispatch had {table.shape[0] - 2}")
    return table
