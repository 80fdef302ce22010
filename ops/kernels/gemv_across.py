"""Single slots by weights whose outputs lie next to each other in memory: [E, H, 2I] and [E, I, H], as GPT-OSS and Llama 4 have them.

A program's columns are read as they lie, some of them with many inputs at a time, and added up over the inputs at the end. The last layer
of a token has few columns: its slots, and parts of its inputs, are programs of their own, whose sums a second kernel adds up in a fixed
order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_gemm import biases_of, matrix, slot_of, tile_columns


@triton.jit
def _across(
    at, base, n, begin, end, IN, OUT, stride_i, stride_o, START: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """[BN] float32 of inputs begin..end: BN columns from START + n * BN on, neighbours in memory; those from OUT on are zeros."""
    j = n * BN + tl.arange(0, BN)
    inside = (j < OUT)[None, :]
    total = tl.zeros([BK, BN], tl.float32)
    for k in tl.range(begin, end, BK):
        ks = k + tl.arange(0, BK)
        x = (tl.load(at + ks) if EVEN else tl.load(at + ks, mask=ks < IN, other=0.0)).to(DTYPE).to(tl.float32)[:, None]
        mask = inside if EVEN else inside & (ks[:, None] < IN)
        w = tl.load(base + (ks[:, None] * stride_i + (START + j)[None, :] * stride_o), mask=mask, other=0.0)
        total += w.to(DTYPE).to(tl.float32) * x
    return tl.sum(total, 0)


@triton.jit
def products_across(
    at, base0, base1, n, IN, WIDTH, i0, o0, i1, o1, START0: tl.constexpr, START1: tl.constexpr, PRODUCTS: tl.constexpr,
    PAIRED: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Both products' [1, BN]. PAIRED: their columns take turns in one matrix, and are read as they lie."""
    if PAIRED:
        both = _across(at, base0, n, 0, IN, IN, 2 * WIDTH, i0, o0, START0 // 2 * 2, DTYPE, 2 * BN, BK, EVEN)
        even, odd = tl.split(tl.reshape(both, [BN, 2]))
        if START0 % 2 == 0:
            p0, p1 = even, odd
        else:
            p0, p1 = odd, even
    else:
        p0 = _across(at, base0, n, 0, IN, IN, WIDTH, i0, o0, START0, DTYPE, BN, BK, EVEN)
        p1 = p0
        if PRODUCTS > 1:
            p1 = _across(at, base1, n, 0, IN, IN, WIDTH, i1, o1, START1, DTYPE, BN, BK, EVEN)
    return p0[None, :], p1[None, :]


@triton.jit
def parts_kernel(
    a, w, ids, parts, E, IN, WIDTH, INPUTS, stride_a, stride_e, stride_i, stride_o, START: tl.constexpr, SHARE: tl.constexpr,
    W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """parts[s, n] = product of slot n over inputs s * INPUTS..(s + 1) * INPUTS, those without an expert stay. Grid (column tiles, N, S).

    a [N // SHARE, IN], ids [N], parts float32 [S, N, WIDTH]. INPUTS is a multiple of BK.
    """
    if PDL:
        if WAITS:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n, slot, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(ids + slot)
    if (expert >= 0) & (expert < E):
        base = matrix(w, expert, stride_e, W_FROM, W_TYPE)
        at = a + (slot // SHARE).to(tl.int64) * stride_a
        begin = s * INPUTS
        end = tl.minimum(begin + INPUTS, IN)
        value = _across(at, base, n, begin, end, IN, WIDTH, stride_i, stride_o, START, DTYPE, BN, BK, EVEN)
        j = n * BN + tl.arange(0, BN)
        tl.store(parts + (s * tl.num_programs(1) + slot).to(tl.int64) * WIDTH + j, value, mask=j < WIDTH)


@triton.jit
def sum_parts_kernel(
    parts, b0, b1, route_w, ids, sum_w, out, E, N, WIDTH, stride_sum_w, eb0, eb1,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr, EPILOGUE: tl.constexpr, READS_W: tl.constexpr,
    BIASES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k sum_w[t, k] * epilogue(sum_s parts[s, (t, k)]). Grid (column tiles, T). parts [S, N, WIDTH], out [T, WIDTH]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(1)
    cols = tile_columns(tl.program_id(0), WIDTH, BN)
    j = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    total = tl.zeros([1, BN], tl.float32)
    for k in tl.static_range(K):
        slot = t * K + k
        valid, inside, weight = slot_of(ids, route_w, slot, E, READS_W)
        p = tl.zeros([1, BN], tl.float32)
        for s in tl.static_range(S):
            p += tl.load(parts + (s * N + slot).to(tl.int64) * WIDTH + j, mask=valid & (j < WIDTH), other=0.0)
        bias0, bias1 = biases_of(b0, b1, inside, cols, eb0, eb1, BSTART0, BSTEP0, BSTART1, BSTEP1, BIASES, p)
        value = EPILOGUE(p, p, bias0, bias1, weight)
        if WEIGHTED:
            value *= tl.load(sum_w + t * stride_sum_w + k).to(tl.float32)
        total += tl.where(valid, value, 0.0)
    tl.store(out + t.to(tl.int64) * WIDTH + j, total.to(out.dtype.element_ty), mask=j < WIDTH)
