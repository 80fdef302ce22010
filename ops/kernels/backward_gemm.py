"""Backward of y = h @ W with h = EPILOGUE(products, biases, w), for rows sorted by expert (see launch_backward.py), and of weights.

reverse_kernel   dh = scale * (grad @ W.T), and from it and the saved products, in registers: the products' gradients, h * scale (which W's
                 gradient needs), and for each row sum(grad @ W.T * h), the gradient of its scale, and that of w
weight_kernel    for each expert A.T @ B over its rows
column_kernel    for each expert the sum over its rows
bias_dot_kernel  what a bias of the last layer adds to the gradient of scale
Rows without a slot are zero in what is written, and are not read.
"""

# ruff: noqa: SIM108  (Triton decides such an if when it compiles; of an expression it compiles both sides)
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_gemm import biases_of, dot, matrix, pick, places_of, row_tile, tile_columns, weight_tile


@triton.jit
def _saved(z, place, used, j, WIDTH, stride, START: tl.constexpr, STEP: tl.constexpr):
    """[BM, BN] float32 of a saved product, zero where there is no slot."""
    at = z + place[:, None] * stride + (START + STEP * j)[None, :]
    return tl.load(at, mask=used[:, None] & (j < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put(out, value, rows, used, j, WIDTH, stride, START: tl.constexpr, STEP: tl.constexpr):
    """Columns of [P, OUT], zero where there is no slot."""
    to = out + rows.to(tl.int64)[:, None] * stride + (START + STEP * j)[None, :]
    tl.store(to, tl.where(used[:, None], value, 0.0).to(out.dtype.element_ty), mask=(j < WIDTH)[None, :] & (rows >= 0)[:, None])


@triton.jit
def _reverse_tile(
    grad, w, b0, b1, route_w, scale, z0, z1, dz0, dz1, h, dscale, dw, slots, blocks, counts, firsts, ends, block, n, padded,
    IN, WIDTH, stride_grad, e0, i0, o0, eb0, eb1, stride_z0, stride_z1, stride_h,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    ADJOINT: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, SHARE: tl.constexpr,
    W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert = tl.load(blocks + 2 * block)
    row0 = tl.load(blocks + 2 * block + 1)
    rows = row0 + tl.arange(0, BM)
    cols = tile_columns(n, WIDTH, BN)
    slot = tl.load(slots + rows)
    place, used = places_of(rows, expert, counts, firsts, ends)
    safe = tl.where(used, slot, 0)
    at = grad + (safe // SHARE).to(tl.int64)[:, None] * stride_grad
    if W_FROM == "tma":
        base = w
    else:
        base = matrix(w, expert, e0, W_FROM, W_TYPE)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, IN, BK):
        g = row_tile(grad, at, row0, k, IN, BM, BK, "gather", EVEN, DTYPE)
        tile = weight_tile(w, base, cols, k, (expert, n * BN), i0, o0, IN, W_FROM, BN, BK, EVEN, TRANSPOSED, DTYPE)
        acc = dot(g, tile, acc, False, PRECISION)
    j = n * BN + tl.arange(0, BN)
    p0 = _saved(z0, place, used, j, WIDTH, stride_z0, START0, STEP0)
    p1 = p0
    if z1 is not None:
        p1 = _saved(z1, place, used, j, WIDTH, stride_z1, START1, STEP1)
    bias0, bias1 = biases_of(b0, b1, expert, cols, eb0, eb1, BSTART0, BSTEP0, BSTART1, BSTEP1, BIASES, p0)
    weight = p0
    if READS_W:
        weight = tl.load(route_w + safe).to(tl.float32)[:, None]
    scaled = acc
    by = 1.0
    if scale is not None:
        by = tl.load(scale + safe).to(tl.float32)[:, None]
        scaled = acc * by
    value, dp0, dp1, per_w = ADJOINT(p0, p1, bias0, bias1, weight, scaled)
    _put(dz0, dp0, rows, used, j, WIDTH, stride_z0, START0, STEP0)
    if z1 is not None:
        _put(dz1, dp1, rows, used, j, WIDTH, stride_z1, START1, STEP1)
    if h is not None:
        _put(h, value * by, rows, used, j, WIDTH, stride_h, 0, 1)
    inside = (j < WIDTH)[None, :] & used[:, None]
    if dscale is not None:
        tl.store(dscale + n.to(tl.int64) * padded + rows, tl.sum(tl.where(inside, acc * value, 0.0), 1))
    if dw is not None:
        tl.store(dw + n.to(tl.int64) * padded + rows, tl.sum(tl.where(inside, per_w, 0.0), 1))


@triton.jit(do_not_specialize=["num_tiles", "programs", "padded"])
def reverse_kernel(
    grad, w, b0, b1, route_w, scale, z0, z1, dz0, dz1, h, dscale, dw, slots, blocks, num_blocks, counts, firsts, ends, num_tiles, programs,
    padded, IN, WIDTH, stride_grad, e0, i0, o0, eb0, eb1, stride_z0, stride_z1, stride_h,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    ADJOINT: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, SHARE: tl.constexpr,
    W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid `programs`, each taking tiles in turn.

    grad [T, IN], a row for SHARE slots; w: the following layer's, its outputs IN read as inputs; scale float [T*K] or None; z_i [N, OUT]
    saved products in the order of slots, dz_i [P, OUT] their gradients; h [P, WIDTH] or None; dscale, dw float32 [num_tiles, P] or None:
    summed over a tile's columns, for rows that have a slot.
    """
    count = tl.load(num_blocks)
    for t in tl.range(tl.program_id(0), count * num_tiles, programs):
        block, n = pick(t, count, num_tiles, GROUP)
        _reverse_tile(
            grad, w, b0, b1, route_w, scale, z0, z1, dz0, dz1, h, dscale, dw, slots, blocks, counts, firsts, ends, block, n, padded,
            IN, WIDTH, stride_grad, e0, i0, o0, eb0, eb1, stride_z0, stride_z1, stride_h, START0, STEP0, START1, STEP1, BSTART0, BSTEP0,
            BSTART1, BSTEP1, ADJOINT, READS_W, BIASES, SHARE, W_FROM, W_TYPE, DTYPE, TRANSPOSED, EVEN, PRECISION, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _operand(rows, slots, r, used, cols, limit, stride, SHARE: tl.constexpr):
    """[BK, N] of rows r: of [P, .] as they are, or (SHARE) of one row for so many slots; zero where there is no slot."""
    if SHARE > 0:
        slot = tl.load(slots + r, mask=used, other=0)
        at = rows + (slot // SHARE).to(tl.int64)[:, None] * stride
    else:
        at = rows + r.to(tl.int64)[:, None] * stride
    return tl.load(at + cols[None, :], mask=used[:, None] & (cols < limit)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tiles_a", "tiles_b", "programs"])
def weight_kernel(
    a, b, out, slots, counts, firsts, HA, HB, tiles_a, tiles_b, programs, stride_a, stride_b, stride_e, stride_ha, stride_hb,
    E: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, OUT_FROM: tl.constexpr, OUT_TYPE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[e][i, j] = sum over rows r of expert e of a[r, i] * b[r, j]. Grid `programs`. out: stacked, or a table of addresses."""
    per_expert = tiles_a * tiles_b
    for t in tl.range(tl.program_id(0), E * per_expert, programs):
        expert = t // per_expert
        inside = t % per_expert
        i = (inside % tiles_a) * BM + tl.arange(0, BM)
        j = (inside // tiles_a) * BN + tl.arange(0, BN)
        count = tl.load(counts + expert)
        first = tl.load(firsts + expert)
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, count, BK):
            r = k + tl.arange(0, BK)
            used = r < count
            left = _operand(a, slots, first + r, used, i, HA, stride_a, SHARE_A).to(DTYPE)
            right = _operand(b, slots, first + r, used, j, HB, stride_b, SHARE_B).to(DTYPE)
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        to = matrix(out, expert, stride_e, OUT_FROM, OUT_TYPE) + i.to(tl.int64)[:, None] * stride_ha + j.to(tl.int64)[None, :] * stride_hb
        tl.store(to, acc.to(OUT_TYPE), mask=(i < HA)[:, None] & (j < HB)[None, :])


@triton.jit
def column_kernel(
    rows, scale, out, slots, counts, firsts, WIDTH, stride, stride_out, SHARE: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[e, j] = sum over rows of expert e of rows[r, j], in float32, times scale [T*K] of the slots if given. Grid (E, column tiles)."""
    expert = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + expert)
    first = tl.load(firsts + expert)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.range(0, count, BK):
        r = k + tl.arange(0, BK)
        used = r < count
        values = _operand(rows, slots, first + r, used, j, WIDTH, stride, SHARE).to(tl.float32)
        if scale is not None:
            slot = tl.load(slots + first + r, mask=used, other=0)
            values *= tl.load(scale + slot, mask=used, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(values, 0)
    tl.store(out + expert.to(tl.int64) * stride_out + j, total.to(out.dtype.element_ty), mask=j < WIDTH)


@triton.jit
def bias_dot_kernel(
    grad, b, out, slots, blocks, num_blocks, WIDTH, stride, stride_b, SHARE: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[r] += sum_j grad[r, j] * b[expert of r, j], in float32; grad a row for SHARE slots. Grid: as many blocks as there can be."""
    block = tl.program_id(0)
    if block < tl.load(num_blocks):
        expert = tl.load(blocks + 2 * block)
        r = tl.load(blocks + 2 * block + 1) + tl.arange(0, BM)
        used = tl.load(slots + r) >= 0
        total = tl.zeros([BM], tl.float32)
        for k in tl.range(0, WIDTH, BLOCK):
            j = k + tl.arange(0, BLOCK)
            bias = tl.load(b + expert.to(tl.int64) * stride_b + j, mask=j < WIDTH, other=0.0).to(tl.float32)
            total += tl.sum(_operand(grad, slots, r, used, j, WIDTH, stride, SHARE).to(tl.float32) * bias[None, :], 1)
        tl.store(out + r, tl.load(out + r, mask=used, other=0.0) + total, mask=used)
