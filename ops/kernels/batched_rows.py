"""Movers of rows in the batched format, [E * C, H] of which each expert's first counts[e] hold something: no other is read or written.

Grid (E, S, column blocks): the S programs of an expert take STEP of its rows at a time, in turn.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .scaled_rows import _scaled as scaled_groups


@triton.jit
def dequantize_kernel(
    rows, scales, counts, out, C, H, stride_r, stride_s, stride_g, STEP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[r] = rows[r] * scales[r, column // 128]. rows e4m3 [E * C, H], scales float32 [E * C, ceil(H / 128)]."""
    e = tl.program_id(0)
    count = tl.minimum(tl.load(counts + e), C)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    groups = tl.program_id(2) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    first = tl.program_id(1) * STEP
    while first < count:
        place = first + tl.arange(0, STEP)
        r = e.to(tl.int64) * C + place
        inside = (place < count)[:, None] & (cols < H)[None, :]
        values = tl.load(rows + r[:, None] * stride_r + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        of_group = (place < count)[:, None] & (groups * 128 < H)[None, :]
        scale = tl.load(scales + r[:, None] * stride_s + groups[None, :] * stride_g, mask=of_group, other=0.0)
        wide = values.reshape(STEP, BLOCK // 128, 128) * scale[:, :, None]
        tl.store(out + r[:, None] * H + cols[None, :], wide.reshape(STEP, BLOCK).to(out.dtype.element_ty), mask=inside)
        first += tl.num_programs(1) * STEP


@triton.jit
def turn_scales_kernel(scales, counts, out, C, G, P, stride_s, stride_g, STEP: tl.constexpr, GROUPS: tl.constexpr):
    """out[g, r] = scales[r, g], out float32 [G, P]; grid (E, S), G <= GROUPS."""
    e = tl.program_id(0)
    count = tl.minimum(tl.load(counts + e), C)
    g = tl.arange(0, GROUPS)
    first = tl.program_id(1) * STEP
    while first < count:
        place = first + tl.arange(0, STEP)
        r = e.to(tl.int64) * C + place
        inside = (place < count)[:, None] & (g < G)[None, :]
        found = tl.load(scales + r[:, None] * stride_s + g[None, :] * stride_g, mask=inside, other=0.0)
        tl.store(out + g.to(tl.int64)[None, :] * P + r[:, None], found, mask=inside)
        first += tl.num_programs(1) * STEP


@triton.jit
def quantize_used_kernel(
    x, counts, out, scales, C, H, P, stride_x, STEP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr
):  # fmt: skip
    """out[r] = e4m3 of x[r], scales[g, r] of each GROUP columns. x [E * C, H], out [P, H], scales [ceil(H / GROUP), P]."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    e = tl.program_id(0)
    count = tl.minimum(tl.load(counts + e), C)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    g = tl.program_id(2) * GROUPS + tl.arange(0, GROUPS)
    first = tl.program_id(1) * STEP
    while first < count:
        place = first + tl.arange(0, STEP)
        r = e.to(tl.int64) * C + place
        inside = (place < count)[:, None] & (cols < H)[None, :]
        values = tl.load(x + r[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        payload, found = scaled_groups(values.reshape(STEP * BLOCK), STEP * GROUPS, GROUP, BY_HAND)
        tl.store(out + r[:, None] * H + cols[None, :], payload.reshape(STEP, BLOCK), mask=inside)
        kept = (place < count)[:, None] & (g * GROUP < H)[None, :]
        tl.store(scales + g.to(tl.int64)[None, :] * P + r[:, None], found.reshape(STEP, GROUPS), mask=kept)
        first += tl.num_programs(1) * STEP
