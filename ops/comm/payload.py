"""Rows on the wire: quantised to e4m3 with one float32 scale for 128 columns, and back."""

from __future__ import annotations

from typing import Any

import torch

from .._register import register_op
from .exchange import SCALE_BLOCK as BLOCK

LARGEST = 448.0  # of float8_e4m3fn
SCHEMA = "dequantize_rows(Tensor rows_RH, Tensor scales_RB, ScalarType dtype) -> Tensor"


def quantize_rows(x_TH: Any, quant: str) -> tuple[Any, Any]:
    """(rows, scales [T, ceil(H/128)] float32); without quantisation x itself and an empty tensor. Rows of zeros have scale 1."""
    if quant == "none":
        return x_TH, x_TH.new_empty((x_TH.shape[0], 0), dtype=torch.float32)
    tokens, hidden = x_TH.shape
    blocks = -(-hidden // BLOCK)
    padded = torch.nn.functional.pad(x_TH.float(), (0, blocks * BLOCK - hidden)).view(tokens, blocks, BLOCK)
    amax = padded.abs().amax(-1)
    scales = torch.where(amax > 0, amax / LARGEST, 1.0)
    rows = (padded / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return rows.flatten(1)[:, :hidden].contiguous(), scales


def dequantize(rows_RH: Any, scales_RB: Any, dtype: Any) -> Any:
    """The rows in dtype again, [R, H]."""
    if rows_RH.dtype == dtype:
        return rows_RH.clone()
    width = rows_RH.shape[1]
    wide = scales_RB.repeat_interleave(BLOCK, 1)[:, :width]
    return (rows_RH.float() * wide).to(dtype)


def _fake(rows_RH: Any, scales_RB: Any, dtype: Any) -> Any:
    return rows_RH.new_empty(rows_RH.shape, dtype=dtype)


OP = register_op(SCHEMA, dequantize, _fake)
