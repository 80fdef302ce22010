"""Launches of the movers of rows in the batched format, which read and write only rows within the counts: capacity costs nothing."""

from __future__ import annotations

from typing import Any

import torch

from moe_compile.ops.replay import start

from .plan import Plan

STEP = 16  # rows that a program takes at a time
COLUMNS = 1024  # of a program
MOST_STEPS = 16  # programs of an expert's rows
E4M3 = torch.float8_e4m3fn
GROUP = 128  # columns that share a scale


def dequantize(rows_RH: Any, scales_RB: Any, counts_E: Any, expected: int, dtype: torch.dtype) -> Any:
    """e4m3 rows with scales float32 [R, ceil(H / 128)], in dtype again."""
    from .batched_rows import dequantize_kernel

    (rows, hidden), experts = rows_RH.shape, counts_E.shape[0]
    out = torch.empty((rows, hidden), dtype=dtype, device=rows_RH.device)
    if out.numel():
        start(
            dequantize_kernel, _grid(rows, experts, expected, -(-hidden // COLUMNS)),
            rows_RH, scales_RB, counts_E, out, rows // experts, hidden, rows_RH.stride(0), *scales_RB.stride(), STEP=STEP, BLOCK=COLUMNS,
            num_warps=8,
        )  # fmt: skip
    return out


def turn_scales(scales_RB: Any, plan: Plan) -> Any:
    """float32 [ceil(H / 128), R] as the GEMMs read them, of scales [R, ceil(H / 128)] that came with rows."""
    from .batched_rows import turn_scales_kernel

    (rows, groups), experts = scales_RB.shape, plan.counts.shape[0]
    out = torch.empty((groups, rows), dtype=torch.float32, device=scales_RB.device)
    if out.numel():
        start(
            turn_scales_kernel, _grid(rows, experts, plan.likely),
            scales_RB, plan.counts, out, rows // experts, groups, rows, *scales_RB.stride(), STEP=STEP,
            GROUPS=1 << (groups - 1).bit_length(), num_warps=4,
        )  # fmt: skip
    return out


def quantize(x_RH: Any, grouped: bool, plan: Plan) -> tuple[Any, Any]:
    """(e4m3 [R, H], float32 scales [ceil(H / 128), R]), or not grouped a scale a row: [1, R]."""
    from .batched_rows import quantize_used_kernel

    (rows, hidden), experts = x_RH.shape, plan.counts.shape[0]
    out = torch.empty((rows, hidden), dtype=E4M3, device=x_RH.device)
    block = COLUMNS if grouped else max(GROUP, 1 << (hidden - 1).bit_length())
    step = max(1, STEP * COLUMNS // block)
    scales = torch.empty((-(-hidden // GROUP) if grouped else 1, rows), dtype=torch.float32, device=x_RH.device)
    if out.numel():
        start(
            quantize_used_kernel, _grid(rows, experts, plan.likely, -(-hidden // block), step),
            x_RH, plan.counts, out, scales, rows // experts, hidden, rows, x_RH.stride(0), STEP=step, GROUP=GROUP if grouped else block,
            BLOCK=block, BY_HAND=x_RH.device.type == "cpu", num_warps=8,
        )  # fmt: skip
    return out, scales


def _grid(rows: int, experts: int, expected: int, blocks: int = 1, step: int = STEP) -> tuple[int, ...]:
    """(experts, programs for the rows of each, column blocks): enough for twice the rows that an expert is likely to have."""
    likely = -(-2 * expected // experts)
    programs = max(1, min(-(-rows // experts // step), -(-likely // step), MOST_STEPS))
    return experts, programs, blocks
