"""One layer for a few slots, each by itself: no sorting, no padding, weights read once a slot. For one token, or little more.

Bound by reading weights. The last layer's kernel adds up a token's slots; it may start while the one before runs (PDL: programmatic
dependent launch), and reads its first weights before it waits for that.
"""

# ruff: noqa: SIM108  (Triton decides such an if when it compiles; of an expression it compiles both sides)
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .gemv_across import products_across
from .grouped_gemm import biases_of, matrix, slot_of, tile_columns


@triton.jit
def _weights(base, cols, ks, stride_i, stride_o, IN, EVEN: tl.constexpr):
    """[BN, BK] of an expert's matrix."""
    at = base + (cols[:, None] * stride_o + ks[None, :] * stride_i)
    return tl.load(at) if EVEN else tl.load(at, mask=ks[None, :] < IN, other=0.0)


@triton.jit
def _slot(
    a, w0, w1, b0, b1, expert, row, weight, cols, first, n, IN, WIDTH, stride_a, e0, i0, o0, e1, i1, o1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, BIASES: tl.constexpr, PRODUCTS: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ACROSS: tl.constexpr, PAIRED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """[1, BN] float32 of one slot. first: the first weights [BN, BK] of product 0, if they are there already (GIVEN)."""
    base0 = matrix(w0, expert, e0, W_FROM, W_TYPE)
    base1 = matrix(w1, expert, e1, W_FROM, W_TYPE)
    at = a + row.to(tl.int64) * stride_a
    if ACROSS:
        p0, p1 = products_across(at, base0, base1, n, IN, WIDTH, i0, o0, i1, o1, START0, START1, PRODUCTS, PAIRED, DTYPE, BN, BK, EVEN)
    else:
        p0, p1 = _products(
            at, base0, base1, cols, first, IN, i0, o0, i1, o1, START0, STEP0, START1, STEP1, PRODUCTS, DTYPE, BN, BK, EVEN, GIVEN
        )
    bias0, bias1 = biases_of(b0, b1, expert, cols, eb0, eb1, BSTART0, BSTEP0, BSTART1, BSTEP1, BIASES, p0)
    return EPILOGUE(p0, p1, bias0, bias1, weight)


@triton.jit
def _products(
    at, base0, base1, cols, first, IN, i0, o0, i1, o1, START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    PRODUCTS: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Both products' [1, BN], a column's inputs in a row of registers."""
    p = tl.zeros([BN, BK], tl.float32)
    q = tl.zeros([BN, BK], tl.float32)
    for k in tl.range(0, IN, BK):
        ks = k + tl.arange(0, BK)
        x = (tl.load(at + ks) if EVEN else tl.load(at + ks, mask=ks < IN, other=0.0)).to(DTYPE).to(tl.float32)[None, :]
        if GIVEN:
            w = first
        else:
            w = _weights(base0, START0 + STEP0 * cols, ks, i0, o0, IN, EVEN)
        p += w.to(DTYPE).to(tl.float32) * x
        if PRODUCTS > 1:
            q += _weights(base1, START1 + STEP1 * cols, ks, i1, o1, IN, EVEN).to(DTYPE).to(tl.float32) * x
    p0 = tl.sum(p, 1)[None, :]
    p1 = tl.sum(q, 1)[None, :] if PRODUCTS > 1 else p0
    return p0, p1


@triton.jit
def slots_kernel(
    a, w0, w1, b0, b1, route_w, ids, out, E, IN, WIDTH, stride_a, e0, i0, o0, e1, i1, o1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, PRODUCTS: tl.constexpr, SHARE: tl.constexpr,
    W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    ACROSS: tl.constexpr, PAIRED: tl.constexpr, PDL: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """out[n] = the layer's row of slot n; others stay. Grid (column tiles, N). a [N // SHARE, IN], ids [N], out [N, WIDTH]."""
    if PDL:
        if WAITS:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(1)
    expert = tl.load(ids + slot)
    if (expert >= 0) & (expert < E):
        cols = tile_columns(tl.program_id(0), WIDTH, BN)
        weight = 1.0
        if READS_W:
            weight = tl.load(route_w + slot).to(tl.float32)
        result = _slot(
            a, w0, w1, b0, b1, expert, slot // SHARE, weight, cols, 0.0, tl.program_id(0), IN, WIDTH, stride_a, e0, i0, o0, e1, i1, o1,
            eb0, eb1, START0, STEP0, START1, STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, BIASES, PRODUCTS, W_FROM, W_TYPE, DTYPE,
            BN, BK, EVEN, ACROSS, PAIRED, False,
        )  # fmt: skip
        j = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
        tl.store(out + slot.to(tl.int64) * WIDTH + j, result.to(out.dtype.element_ty), mask=j < WIDTH)


@triton.jit
def tokens_kernel(
    a, w0, w1, b0, b1, route_w, ids, sum_w, out, E, IN, WIDTH, stride_a, stride_sum_w, e0, i0, o0, e1, i1, o1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, PRODUCTS: tl.constexpr, K: tl.constexpr, SHARE: tl.constexpr,
    WEIGHTED: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, ACROSS: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k sum_w[t, k] * the layer's row of slot (t, k). Grid (column tiles, T). a [T*K // SHARE, IN], out [T, WIDTH].

    WIDE: BK covers IN, so the first weights of the token's first slot can be read before anything is waited for.
    """
    t = tl.program_id(1)
    cols = tile_columns(tl.program_id(0), WIDTH, BN)
    first = tl.zeros([BN, BK], DTYPE)
    if WIDE:
        expert = tl.load(ids + t * K)
        inside = tl.where((expert >= 0) & (expert < E), expert, 0)
        first = _weights(matrix(w0, inside, e0, W_FROM, W_TYPE), START0 + STEP0 * cols, tl.arange(0, BK), i0, o0, IN, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([1, BN], tl.float32)
    for k in tl.static_range(K):
        slot = t * K + k
        valid, inside, weight = slot_of(ids, route_w, slot, E, READS_W)
        value = _slot(
            a, w0, w1, b0, b1, inside, slot // SHARE, weight, cols, first, tl.program_id(0), IN, WIDTH, stride_a, e0, i0, o0, e1, i1, o1,
            eb0, eb1, START0, STEP0, START1, STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, BIASES, PRODUCTS, W_FROM, W_TYPE, DTYPE,
            BN, BK, EVEN, ACROSS, PAIRED, WIDE & (k == 0),
        )  # fmt: skip
        if WEIGHTED:
            value *= tl.load(sum_w + t * stride_sum_w + k).to(tl.float32)
        total += tl.where(valid, value, 0.0)
    j = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    tl.store(out + t.to(tl.int64) * WIDTH + j, total.to(out.dtype.element_ty), mask=j < WIDTH)
