"""Backward of y = h @ W with h = EPILOGUE(products, biases, w), for rows sorted by expert (see launch_backward.py), and of weights.

reverse_kernel   from grad @ W.T and the saved products: the products' gradients, h * scale (which W's gradient needs), and for each row
                 sum(grad @ W.T * h), the gradient of its scale, and that of w
weight_kernel    for each expert A.T @ B over its rows
column_kernel    for each expert the sum over its rows
bias_dot_kernel  what a bias of the last layer adds to the gradient of scale
Rows without a slot are zero in what is written, and are not read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_gemm import biases_of, matrix, places_of


@triton.jit(do_not_specialize=["programs"])
def reverse_kernel(
    dh, b0, b1, route_w, scale, z0, z1, dz0, dz1, h, dscale, dw, slots, blocks, num_blocks, counts, firsts, ends, programs, WIDTH,
    stride_dh, eb0, eb1, stride_z0, stride_z1, START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    ADJOINT: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Back through an epilogue: products' gradients, h and the rows' own gradients. Grid `programs`, each taking ROWS rows in turn.

    dh [P, WIDTH], without the rows' scale; scale float [T*K] or None; z_i [N, OUT] saved products in the order of slots; dz_i [P, OUT]
    their gradients; h [P, WIDTH] times the scale, or None, may be dh itself; dscale, dw float32 [T*K] or None, for slots that have a row.
    """
    PIECES: tl.constexpr = BM // ROWS
    for piece in tl.range(tl.program_id(0), tl.load(num_blocks) * PIECES, programs):
        block = piece // PIECES
        expert = tl.load(blocks + 2 * block)
        rows = tl.load(blocks + 2 * block + 1) + piece % PIECES * ROWS + tl.arange(0, ROWS)
        slot = tl.load(slots + rows)
        place, used = places_of(rows, expert, counts, firsts, ends)
        safe = tl.where(used, slot, 0)
        by = 1.0
        if scale is not None:
            by = tl.load(scale + safe, mask=used, other=0.0).to(tl.float32)[:, None]
        per_scale = tl.zeros([ROWS], tl.float32)
        per_route = tl.zeros([ROWS], tl.float32)
        for first in tl.range(0, WIDTH, BLOCK):
            j = first + tl.arange(0, BLOCK)
            inside = (j < WIDTH)[None, :] & used[:, None]
            at = rows.to(tl.int64)[:, None] * stride_dh + j[None, :]
            g = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
            p0 = tl.load(z0 + place[:, None] * stride_z0 + (START0 + STEP0 * j)[None, :], mask=inside, other=0.0).to(tl.float32)
            p1 = p0
            if z1 is not None:
                p1 = tl.load(z1 + place[:, None] * stride_z1 + (START1 + STEP1 * j)[None, :], mask=inside, other=0.0).to(tl.float32)
            cols = tl.where(j < WIDTH, j, 0)
            bias0, bias1 = biases_of(b0, b1, expert, cols, eb0, eb1, BSTART0, BSTEP0, BSTART1, BSTEP1, BIASES, p0)
            weight = p0
            if READS_W:
                weight = tl.load(route_w + safe).to(tl.float32)[:, None]
            value, dp0, dp1, per_w = ADJOINT(p0, p1, bias0, bias1, weight, g * by)
            _put(dz0, dp0, rows, used, j, WIDTH, stride_z0, START0, STEP0)
            if z1 is not None:
                _put(dz1, dp1, rows, used, j, WIDTH, stride_z1, START1, STEP1)
            if h is not None:
                _put(h, value * by, rows, used, j, WIDTH, stride_dh, 0, 1)
            if dscale is not None:
                per_scale += tl.sum(tl.where(inside, g * value, 0.0), 1)
            if dw is not None:
                per_route += tl.sum(tl.where(inside, per_w, 0.0), 1)
        if dscale is not None:
            tl.store(dscale + safe, per_scale, mask=used)
        if dw is not None:
            tl.store(dw + safe, per_route, mask=used)


@triton.jit
def _put(out, value, rows, used, j, WIDTH, stride, START: tl.constexpr, STEP: tl.constexpr):
    """Columns of [P, OUT], zero where there is no slot."""
    to = out + rows.to(tl.int64)[:, None] * stride + (START + STEP * j)[None, :]
    tl.store(to, tl.where(used[:, None], value, 0.0).to(out.dtype.element_ty), mask=(j < WIDTH)[None, :] & (rows >= 0)[:, None])


@triton.jit
def _side(rows, first, k, count, col0, limit, stride, FROM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BK, BN] of an expert's rows k..k+BK. By descriptor also rows of padding, which are zero on at least one of both sides."""
    if FROM == "tma":
        tile = rows.load([first + k, col0])
    else:
        r = k + tl.arange(0, BK)
        cols = col0 + tl.arange(0, BN)
        at = rows + (first + r).to(tl.int64)[:, None] * stride + cols[None, :]
        tile = tl.load(at, mask=(r < count)[:, None] & (cols < limit)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["tiles_a", "tiles_b", "programs", "E"])
def weight_kernel(
    a, b, out, counts, firsts, HA, HB, tiles_a, tiles_b, programs, E, stride_a, stride_b, stride_e, stride_ha,
    A_FROM: tl.constexpr, B_FROM: tl.constexpr, OUT_FROM: tl.constexpr,
    OUT_TYPE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """out[e][i, j] = sum over rows r of expert e of a[r, i] * b[r, j], j next to each other. Grid `programs`.

    a, b [P, .], their padding finite, and zero in one of both. A_FROM, B_FROM: "tma", or "rows" by address. OUT_FROM: "stack" for
    [E, HA, HB], or "table" of addresses.
    """
    per_expert = tiles_a * tiles_b
    for t in tl.range(tl.program_id(0), E * per_expert, programs, flatten=FLAT):
        expert = t // per_expert
        inside = t % per_expert
        i0 = (inside % tiles_a) * BM
        j0 = (inside // tiles_a) * BN
        count = tl.load(counts + expert)
        first = tl.load(firsts + expert)
        acc = tl.zeros([BM, BN], tl.float32)
        for step in tl.range(0, tl.maximum((count + BK - 1) // BK, 1)):  # one at least: loops that become one need it
            left = _side(a, first, step * BK, count, i0, HA, stride_a, A_FROM, BM, BK).to(DTYPE)
            right = _side(b, first, step * BK, count, j0, HB, stride_b, B_FROM, BN, BK).to(DTYPE)
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        acc = tl.where(count > 0, acc, 0.0)
        i = i0 + tl.arange(0, BM)
        j = j0 + tl.arange(0, BN)
        to = matrix(out, expert, stride_e, OUT_FROM, OUT_TYPE) + i.to(tl.int64)[:, None] * stride_ha + j.to(tl.int64)[None, :]
        tl.store(to, acc.to(OUT_TYPE), mask=(i < HA)[:, None] & (j < HB)[None, :])


@triton.jit
def column_kernel(
    rows, scale, out, slots, counts, firsts, WIDTH, stride, stride_out, BK: tl.constexpr, BLOCK: tl.constexpr
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
        values = _side(rows, first, k, count, tl.program_id(1) * BLOCK, WIDTH, stride, "rows", BLOCK, BK).to(tl.float32)
        if scale is not None:
            slot = tl.load(slots + first + r, mask=used, other=0)
            values *= tl.load(scale + slot, mask=used, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(values, 0)
    tl.store(out + expert.to(tl.int64) * stride_out + j, total.to(out.dtype.element_ty), mask=j < WIDTH)


@triton.jit
def bias_dot_kernel(
    grad, b, out, slots, blocks, num_blocks, WIDTH, stride, stride_b, BM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[slot of r] += sum_j grad[r, j] * b[expert of r, j], in float32, of rows that have one. Grid: as many blocks as there can be."""
    block = tl.program_id(0)
    if block < tl.load(num_blocks):
        expert = tl.load(blocks + 2 * block)
        r = tl.load(blocks + 2 * block + 1) + tl.arange(0, BM)
        slot = tl.load(slots + r)
        used = slot >= 0
        total = tl.zeros([BM], tl.float32)
        for k in tl.range(0, WIDTH, BLOCK):
            j = k + tl.arange(0, BLOCK)
            bias = tl.load(b + expert.to(tl.int64) * stride_b + j, mask=j < WIDTH, other=0.0).to(tl.float32)
            at = grad + r.to(tl.int64)[:, None] * stride + j[None, :]
            rows = tl.load(at, mask=used[:, None] & (j < WIDTH)[None, :], other=0.0).to(tl.float32)
            total += tl.sum(rows * bias[None, :], 1)
        tl.store(out + slot, tl.load(out + slot, mask=used, other=0.0) + total, mask=used)
