"""Rows into the form that scaled_gemm.py multiplies: in sorted order, quantised, or in runs."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3(values, BY_HAND: tl.constexpr):
    """float32 to the nearest e4m3; beyond 448 it is 448, NaN is anything: its scale tells.

    BY_HAND: for Triton's interpreter, whose cast does not carry.
    """
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    if BY_HAND:
        scaled = values * 1048577.0  # 2^20 + 1: what is left of 24 bits are 4
        normal = scaled - (scaled - values)
        small = (values + 24576.0) - 24576.0  # multiples of 2^-9
        values = tl.where(tl.abs(values) < 0.015625, small, normal)
    return values.to(tl.float8e4nv)


@triton.jit
def scales_of(values):
    """float32 of rows of values: the largest magnitude / 448, 1 for zeros, NaN where one is infinite or NaN, so that all of them are."""
    amax = tl.max(tl.where(values == values, tl.abs(values), float("inf")), 1)
    return tl.where(amax > 0, amax / 448.0, 1.0) + (amax - amax)


@triton.jit
def in_runs(first, COUNT: tl.constexpr, RUNS: tl.constexpr):
    """[COUNT]: places of columns first.. (a multiple of COUNT <= 128), these in the order RUNS * j, RUNS * j + 1, ... themselves."""
    at = tl.arange(0, COUNT)
    run = at // (COUNT // RUNS)
    return first // 128 * 128 + run * (128 // RUNS) + first % 128 // RUNS + at % (COUNT // RUNS)


@triton.jit
def _changed(values, t, k, route_w, K: tl.constexpr, EPILOGUE: tl.constexpr, READS_W: tl.constexpr):
    """float32 of a token's values as slot (t, k) has them."""
    wide = values.to(tl.float32)
    if EPILOGUE is not None:
        w = wide
        if READS_W:
            w = tl.load(route_w + t * K + k).to(tl.float32)
        wide = EPILOGUE(wide, wide, wide, wide, w)
    return wide


@triton.jit
def _scaled(values, GROUPS: tl.constexpr, GROUP: tl.constexpr, BY_HAND: tl.constexpr):
    """(e4m3 [GROUPS * GROUP], float32 [GROUPS] scales)."""
    grouped = values.reshape(GROUPS, GROUP)
    scales = scales_of(grouped)
    return e4m3(grouped / scales[:, None], BY_HAND).reshape(GROUPS * GROUP), scales


@triton.jit
def quantize_kernel(
    x, rows, route_w, out, scales, H, P, stride_x, K: tl.constexpr, EPILOGUE: tl.constexpr, READS_W: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """out[rows[t, k]] = e4m3 of x[t] (EPILOGUE: of that of x[t] and w[t, k], rounded to DTYPE), scales[g, row] of each GROUP columns.

    x [T, H], rows int32 [T, K], out [P, H], scales [ceil(H / GROUP), P]. GROUP == BLOCK >= H: one scale a row.
    """
    GROUPS: tl.constexpr = BLOCK // GROUP
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    values = tl.load(x + t * stride_x + cols, mask=cols < H, other=0.0)
    payload, found = _scaled(values.to(tl.float32), GROUPS, GROUP, BY_HAND)
    for k in tl.static_range(K):
        row = tl.load(rows + t * K + k).to(tl.int64)
        if EPILOGUE is not None:
            changed = _changed(values, t, k, route_w, K, EPILOGUE, READS_W).to(DTYPE).to(tl.float32)
            payload, found = _scaled(tl.where(cols < H, changed, 0.0), GROUPS, GROUP, BY_HAND)
        tl.store(out + row * H + cols, payload, mask=(cols < H) & (row >= 0))
        tl.store(scales + groups.to(tl.int64) * P + row, found, mask=(groups * GROUP < H) & (row >= 0))


@triton.jit
def take_kernel(
    x, given, rows, out, scales, H, G, P, stride_x, stride_t, stride_g, K: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Rows that are e4m3 already: out[rows[t, k]] = x[t], scales[g, rows[t, k]] = given[t, g], g < G <= GROUPS."""
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    groups = tl.arange(0, GROUPS)
    mine = (groups < G) & (tl.program_id(1) == 0)
    values = tl.load(x + t * stride_x + cols, mask=cols < H)
    found = tl.load(given + t * stride_t + groups * stride_g, mask=mine, other=0.0)
    for k in tl.static_range(K):
        row = tl.load(rows + t * K + k).to(tl.int64)
        tl.store(out + row * H + cols, values, mask=(cols < H) & (row >= 0))
        tl.store(scales + groups.to(tl.int64) * P + row, found, mask=mine & (row >= 0))


@triton.jit
def runs_kernel(
    x, rows, route_w, out, H, WIDE, stride_x, K: tl.constexpr, EPILOGUE: tl.constexpr, READS_W: tl.constexpr, RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[rows[t, k]] = x[t] in runs (EPILOGUE: as in quantize_kernel), zeros behind column H. out [P, WIDE]."""
    t = tl.program_id(0).to(tl.int64)
    to = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = to % 128
    cols = to - inside + inside % (128 // RUNS) * RUNS + inside // (128 // RUNS)
    values = tl.load(x + t * stride_x + cols, mask=cols < H, other=0.0)
    for k in tl.static_range(K):
        row = tl.load(rows + t * K + k).to(tl.int64)
        changed = values
        if EPILOGUE is not None:
            changed = tl.where(cols < H, _changed(values, t, k, route_w, K, EPILOGUE, READS_W), 0.0).to(out.dtype.element_ty)
        tl.store(out + row * WIDE + to, changed, mask=(to < WIDE) & (row >= 0))
