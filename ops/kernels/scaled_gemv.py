"""One layer with quantised weights for a few slots, each by itself: gemv.py with other weights. Rows are not quantised.

A program holds weights [BN, G, Q]: columns, groups of inputs with one scale, units of memory of a group (see scaled_gemm.py for PER).
"""

# ruff: noqa: SIM108  (Triton decides such an if when it compiles; of an expression it compiles both sides)
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_gemm import biases_of, matrix, slot_of, tile_columns
from .unpack import FOLDED, number, power_of_two


@triton.jit
def _units(base, cols, units, stride_i, stride_o, UNITS, EVEN: tl.constexpr):
    """[BN, G, Q]; units [1, G, Q]."""
    at = base + (cols[:, None, None] * stride_o + units * stride_i)
    return tl.load(at) if EVEN else tl.load(at, mask=units < UNITS, other=0.0)


@triton.jit
def _row(at, columns, IN, EVEN: tl.constexpr):
    """float32 of a row's columns."""
    x = tl.load(at + columns) if EVEN else tl.load(at + columns, mask=columns < IN, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _product(
    at, w, base, s, cols, IN, UNITS, STEPS, stride_i, stride_o, scale_i, scale_o, first, KIND: tl.constexpr, PER: tl.constexpr,
    W_SCALES: tl.constexpr, OUT_BLOCK: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, EVEN: tl.constexpr,
    FAST: tl.constexpr, DTYPE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """[1, BN] float32: the row at `at` times columns of a matrix. first: the first units, if they are there already (GIVEN)."""
    total = tl.zeros([BN, G, Q], tl.float32)
    inside = tl.arange(0, G)[None, :, None] * Q + tl.arange(0, Q)[None, None, :]
    for unit in tl.range(0, UNITS, G * Q):
        units = unit + inside
        if GIVEN:
            tile = first
        else:
            tile = _units(base, cols, units, stride_i, stride_o, UNITS, EVEN)
        factor = 1.0
        if W_SCALES != "once":
            group = unit // Q + tl.arange(0, G)
            scales = tl.load(
                s + (cols // OUT_BLOCK)[:, None] * scale_o + group[None, :] * scale_i, mask=group[None, :] < STEPS, other=0.0
            )[:, :, None]  # fmt: skip
            factor = power_of_two(scales, DTYPE, FAST) if W_SCALES == "inner" else scales.to(tl.float32)
        if PER == 1:
            part = number(tile, 0, KIND, DTYPE, factor, FAST).to(tl.float32) * _row(at, units, IN, EVEN)
        elif PER == 2:
            x0, x1 = tl.split(_row(at, units[:, :, :, None] * 2 + tl.arange(0, 2), IN, EVEN))
            part = number(tile, 0, KIND, DTYPE, factor, FAST).to(tl.float32) * x0
            part += number(tile, 1, KIND, DTYPE, factor, FAST).to(tl.float32) * x1
        else:
            even, odd = tl.split(_row(at, units[:, :, :, None] * 4 + tl.arange(0, 4), IN, EVEN).reshape(1, G, Q, 2, 2))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            part = number(tile, 0, KIND, DTYPE, factor, FAST).to(tl.float32) * x0
            part += number(tile, 1, KIND, DTYPE, factor, FAST).to(tl.float32) * x1
            part += number(tile, 2, KIND, DTYPE, factor, FAST).to(tl.float32) * x2
            part += number(tile, 3, KIND, DTYPE, factor, FAST).to(tl.float32) * x3
        total += part * factor if W_SCALES == "step" else part
    result = tl.sum(tl.sum(total, 2), 1)  # not of [BN, G * Q]: Triton 3.6 adds up the wrong lanes of some reshaped tiles
    if W_SCALES == "once":
        result *= tl.load(s + cols * scale_o).to(tl.float32)
    if FAST & (KIND == "fp4"):
        result *= FOLDED
    return result[None, :]


@triton.jit
def _slot(
    a, w0, w1, s0, s1, b0, b1, expert, row, weight, cols, first, IN, UNITS, STEPS, stride_a, e0, i0, o0, e1, i1, o1,
    se0, si0, so0, se1, si1, so1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, BIASES: tl.constexpr, PRODUCTS: tl.constexpr, KIND: tl.constexpr, PER: tl.constexpr, W_SCALES: tl.constexpr,
    OUT_BLOCK: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    DTYPE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """[1, BN] float32 of one slot."""
    at = a + row.to(tl.int64) * stride_a
    wide = expert.to(tl.int64)
    p0 = _product(
        at, w0, matrix(w0, expert, e0, "stack", None), s0 + wide * se0, START0 + STEP0 * cols, IN, UNITS, STEPS, i0, o0, si0, so0, first,
        KIND, PER, W_SCALES, OUT_BLOCK, BN, G, Q, EVEN, FAST, DTYPE, GIVEN,
    )  # fmt: skip
    p1 = p0
    if PRODUCTS > 1:
        p1 = _product(
            at, w1, matrix(w1, expert, e1, "stack", None), s1 + wide * se1, START1 + STEP1 * cols, IN, UNITS, STEPS, i1, o1, si1, so1,
            first, KIND, PER, W_SCALES, OUT_BLOCK, BN, G, Q, EVEN, FAST, DTYPE, False,
        )  # fmt: skip
    bias0, bias1 = biases_of(b0, b1, expert, cols, eb0, eb1, BSTART0, BSTEP0, BSTART1, BSTEP1, BIASES, p0)
    return EPILOGUE(p0, p1, bias0, bias1, weight)


@triton.jit
def scaled_slots_kernel(
    a, w0, w1, s0, s1, b0, b1, route_w, ids, out, E, IN, UNITS, STEPS, WIDTH, stride_a, e0, i0, o0, e1, i1, o1,
    se0, si0, so0, se1, si1, so1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, PRODUCTS: tl.constexpr, SHARE: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, W_SCALES: tl.constexpr, OUT_BLOCK: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
    Q: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """out[n] = the layer's row of slot n, as gemv.slots_kernel."""
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
            a, w0, w1, s0, s1, b0, b1, expert, slot // SHARE, weight, cols, 0, IN, UNITS, STEPS, stride_a, e0, i0, o0, e1, i1, o1, se0, si0,
            so0, se1, si1, so1, eb0, eb1, START0, STEP0, START1, STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, BIASES, PRODUCTS, KIND,
            PER, W_SCALES, OUT_BLOCK, BN, G, Q, EVEN, FAST, DTYPE, False,
        )  # fmt: skip
        j = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
        tl.store(out + slot.to(tl.int64) * WIDTH + j, result.to(out.dtype.element_ty), mask=j < WIDTH)


@triton.jit
def scaled_tokens_kernel(
    a, w0, w1, s0, s1, b0, b1, route_w, ids, sum_w, out, E, IN, UNITS, STEPS, WIDTH, stride_sum_w, stride_a, e0, i0, o0, e1, i1, o1,
    se0, si0, so0, se1, si1, so1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, PRODUCTS: tl.constexpr, SHARE: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, W_SCALES: tl.constexpr, OUT_BLOCK: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
    Q: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k sum_w[t, k] * the layer's row of slot (t, k), as gemv.tokens_kernel. WIDE: G groups cover the inputs."""
    t = tl.program_id(1)
    cols = tile_columns(tl.program_id(0), WIDTH, BN)
    first = tl.zeros([BN, G, Q], w0.dtype.element_ty)
    if WIDE:
        expert = tl.load(ids + t * K)
        inside = tl.where((expert >= 0) & (expert < E), expert, 0)
        units = tl.arange(0, G)[None, :, None] * Q + tl.arange(0, Q)[None, None, :]
        first = _units(matrix(w0, inside, e0, "stack", None), START0 + STEP0 * cols, units, i0, o0, UNITS, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([1, BN], tl.float32)
    for k in tl.static_range(K):
        slot = t * K + k
        valid, inside, weight = slot_of(ids, route_w, slot, E, READS_W)
        value = _slot(
            a, w0, w1, s0, s1, b0, b1, inside, slot // SHARE, weight, cols, first, IN, UNITS, STEPS, stride_a, e0, i0, o0, e1, i1, o1, se0,
            si0, so0, se1, si1, so1, eb0, eb1, START0, STEP0, START1, STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, BIASES, PRODUCTS,
            KIND, PER, W_SCALES, OUT_BLOCK, BN, G, Q, EVEN, FAST, DTYPE, WIDE & (k == 0),
        )  # fmt: skip
        if WEIGHTED:
            value *= tl.load(sum_w + t * stride_sum_w + k).to(tl.float32)
        total += tl.where(valid, value, 0.0)
    j = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    tl.store(out + t.to(tl.int64) * WIDTH + j, total.to(out.dtype.element_ty), mask=j < WIDTH)
