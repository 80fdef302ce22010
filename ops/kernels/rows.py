"""Movers of rows around the GEMMs, bound by memory: into sorted order, and sums of a token's rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_kernel(
    x, rows, route_w, out, H, stride_x, K: tl.constexpr, EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[rows[t, k]] = EPILOGUE(x[t], w[t, k]), or x[t] where that is None: a token is read once and written for each of its slots.

    x [T, H], rows int32 [T, K], route_w [T, K], out [P, H].
    """
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + t * stride_x + cols, mask=cols < H)
    for k in tl.static_range(K):
        row = tl.load(rows + t * K + k).to(tl.int64)
        changed = values
        if EPILOGUE is not None:
            wide = values.to(tl.float32)
            w = wide
            if READS_W:
                w = tl.load(route_w + t * K + k).to(tl.float32)
            changed = EPILOGUE(wide, wide, wide, wide, w).to(out.dtype.element_ty)
        tl.store(out + row * H + cols, changed, mask=(cols < H) & (row >= 0))


@triton.jit
def sum_kernel(
    y, rows, weights, out, WIDTH, stride_w, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """out[t] = sum_k weights[t, k] * y[rows[t, k]] in float32, in the order of k; rows -1 are left out.

    y [P, O], rows int32 [T, K], weights [T, K] or (not WEIGHTED) anything, out [T, O].
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + t * K + k).to(tl.int64)
        value = tl.load(y + row * WIDTH + cols, mask=(cols < WIDTH) & (row >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            value = tl.where(row >= 0, tl.load(weights + t * stride_w + k).to(tl.float32), 0.0) * value
        total += value
    tl.store(out + t * WIDTH + cols, total.to(out.dtype.element_ty), mask=cols < WIDTH)
