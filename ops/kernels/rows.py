"""Movers of rows around the GEMMs, bound by memory: into sorted order, and sums of a token's rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def spread_kernel(
    x, rows, route_w, out, counts, firsts, tokens, H, stride_x, K: tl.constexpr, EPILOGUE: tl.constexpr, READS_W: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out[rows[t, k]] = EPILOGUE(x[t], w[t, k]), or x[t] where that is None: a token is read once and written for each of its slots.

    x [T, H], rows int32 [T, K], route_w [T, K], out [P, H]. Grid (T + PARTS * E, column blocks): programs behind the tokens' write zeros
    behind an expert's rows, up to the end of its blocks of ROWS, every PARTS-th row each.
    """
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PARTS > 0:  # noqa: SIM102  (what follows is only known on the device)
        if t >= tokens:
            behind = (t - tokens).to(tl.int32)
            _clear(out, counts, firsts, behind // PARTS, behind % PARTS, cols, H, PARTS, ROWS)
            return
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
def _clear(out, counts, firsts, expert, part, cols, WIDTH, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in columns of the rows behind an expert's last."""
    count = tl.load(counts + expert)
    first = tl.load(firsts + expert).to(tl.int64)
    for row in tl.range(count + part, (count + ROWS - 1) // ROWS * ROWS, PARTS):
        tl.store(out + (first + row) * WIDTH + cols, tl.zeros(cols.shape, out.dtype.element_ty), mask=cols < WIDTH)


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


@triton.jit
def unspread_kernel(
    x, drows, rows, route_w, dx, dw, H, stride_x, stride_dx, K: tl.constexpr, KP: tl.constexpr, ADJOINT: tl.constexpr,
    READS_W: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Backward of spread_kernel with an epilogue: dx[t] and dw[t, k] from the gradients of the rows that t was written to. Grid (T,).

    x [T, H], drows [P, H], rows int32 [T, K], route_w, dw (float32, or None) [T, K], dx [T, H]. Sums in float32, in the order of k.
    """
    t = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, KP)
    per_slot = tl.zeros([KP], tl.float32)
    for first in tl.range(0, H, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        value = tl.load(x + t * stride_x + cols, mask=cols < H, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            row = tl.load(rows + t * K + k).to(tl.int64)
            used = (cols < H) & (row >= 0)
            g = tl.load(drows + row * H + cols, mask=used, other=0.0).to(tl.float32)
            w = value
            if READS_W:
                w = tl.load(route_w + t * K + k).to(tl.float32) + tl.zeros([BLOCK], tl.float32)
            _, dvalue, _, per_column = ADJOINT(value, value, value, value, w, g)
            total += tl.where(used, dvalue, 0.0)
            per_slot += tl.where(slot == k, tl.sum(tl.where(used, per_column, 0.0)), 0.0)
        tl.store(dx + t * stride_dx + cols, total.to(dx.dtype.element_ty), mask=cols < H)
    if dw is not None:
        tl.store(dw + t * K + slot, per_slot, mask=slot < K)
