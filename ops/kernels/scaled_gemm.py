"""The grouped GEMM of one layer with quantised weights (quantized.py), blocks and epilogues as in grouped_gemm.py.

KIND "fp8": rows and weights are multiplied in e4m3, 128 inputs at a time; the tensor core adds those up with few bits, so each such sum is
added to a float32 accumulator. "int8", "int4", "fp4": weights become the rows' type in registers. A value's scale is applied to sums:
W_SCALES "step" to the sum of each 128 inputs, "once" to the whole; "inner" (fp4, 32 inputs a scale): to the weights, exactly, as these
scales are powers of two. A_SCALES: the rows' scales, "step", "once" or "none", [ceil(IN / 128), P] or [P].

FORM: "one", "apart" and "pairs" as there (halves are two products apart).

Numbers of 4 bits come PER to a unit of memory (4 to an int16, where inputs lie next to each other, else 2 to a byte), and are multiplied
in the order of the units' first numbers, second numbers, ...: the rows have in each 128 columns first the columns PER * j, then
PER * j + 1, and so on. IN is then a multiple of 128 for the rows, with zeros behind the last column.
"""

# ruff: noqa: SIM108  (Triton decides such an if when it compiles; of an expression it compiles both sides)
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_gemm import biases_of, dot, matrix, parted, pick, row_tile, tile_columns
from .scaled_rows import e4m3, in_runs, scales_of
from .unpack import FOLDED, numbers


@triton.jit
def _units(
    w, base, cols, unit, row, stride_i, stride_o, UNITS, FROM: tl.constexpr, N: tl.constexpr, BU: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """[N, BU] units of the weights' memory, from input unit `unit` on. row: (first, second) coordinate of a descriptor's box."""
    if FROM == "tma":
        if TRANSPOSED:
            tile = w.load([row[0], unit, row[1]]).reshape(BU, N).T
        else:
            tile = w.load([row[0], row[1], unit]).reshape(N, BU)
    else:
        us = unit + tl.arange(0, BU)
        at = base + (cols[:, None] * stride_o + us[None, :] * stride_i)
        if EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=us[None, :] < UNITS, other=0.0)
    return tile


@triton.jit
def _weight_scales(s, cols, first, step, stride_i, stride_o, STEPS, MODE: tl.constexpr, OUT_BLOCK: tl.constexpr, ONE: tl.constexpr):
    """What scales a step's weights: "step" float32 [N], or [1] where ONE scale holds for all columns, first on; "inner" uint8 [N, 4]."""
    if MODE == "step":
        if ONE:
            at = first // OUT_BLOCK + tl.arange(0, 1)
        else:
            at = cols // OUT_BLOCK
        scales = tl.load(s + at * stride_o + step * stride_i, mask=step + at * 0 < STEPS, other=0.0).to(tl.float32)
    elif MODE == "inner":
        group = step * 4 + tl.arange(0, 4)
        scales = tl.load(s + cols[:, None] * stride_o + group[None, :] * stride_i, mask=group[None, :] < STEPS, other=0)
    else:
        scales = 0.0
    return scales


@triton.jit
def _row_scales(s, rows, step, stride, STEPS, MODE: tl.constexpr):
    """float32 [BM] of a step; 0 behind the last."""
    scales = 0.0
    if MODE == "step":
        scales = tl.load(s + step.to(tl.int64) * stride + rows, mask=step + rows * 0 < STEPS, other=0.0)
    return scales


@triton.jit
def _scaled(part, acc, w_scales, a_scales, W_MODE: tl.constexpr, A_MODE: tl.constexpr, SWAP: tl.constexpr):
    """acc + part * the scales of its rows and columns."""
    if A_MODE == "step":
        if SWAP:
            both = a_scales[None, :]
            if W_MODE == "step":
                both = both * w_scales[:, None]
        else:
            both = a_scales[:, None]
            if W_MODE == "step":
                both = both * w_scales[None, :]
        acc += part * both
    elif W_MODE == "step":
        acc += part * (w_scales[:, None] if SWAP else w_scales[None, :])
    else:
        acc += part
    return acc


@triton.jit
def _scaled_once(acc, s, cols, stride_o, W_MODE: tl.constexpr, SWAP: tl.constexpr):
    if W_MODE == "once":
        scales = tl.load(s + cols * stride_o).to(tl.float32)
        acc = acc * (scales[:, None] if SWAP else scales[None, :])
    return acc


@triton.jit
def _step(
    x, units, w_scales, a_scales, acc, KIND: tl.constexpr, PER: tl.constexpr, W_SCALES: tl.constexpr, A_SCALES: tl.constexpr,
    DTYPE: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """acc with the sum of a step's inputs."""
    w = numbers(units, w_scales, KIND, PER, DTYPE, FAST)
    if (KIND == "fp8") | (W_SCALES == "step") | (A_SCALES == "step"):
        part = dot(x, w, tl.zeros(acc.shape, tl.float32), SWAP, PRECISION)
        acc = _scaled(part, acc, w_scales, a_scales, W_SCALES, A_SCALES, SWAP)
    else:
        acc = dot(x, w, acc, SWAP, PRECISION)
        # Reads the sum, so that Triton waits for it: else the next step's numbers overwrite the registers it is made of. No instruction.
        if ASSEMBLY & SWAP:
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _products(
    a, a_scales, w0, w1, s0, s1, rows, row0, at, expert, cols, n, IN, UNITS, STEPS, scale_stride,
    e0, i0, o0, e1, i1, o1, se0, si0, so0, se1, si1, so1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr, WIDTH,
    KIND: tl.constexpr, PER: tl.constexpr, W_SCALES: tl.constexpr, A_SCALES: tl.constexpr, OUT_BLOCK: tl.constexpr, ONE: tl.constexpr,
    A_FROM: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr, TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Two products [BM, BN] float32, of columns cols of tile n; one: the first twice."""
    N: tl.constexpr = 2 * BN if FORM == "pairs" else BN
    RUN: tl.constexpr = BK // PER
    FAST: tl.constexpr = ASSEMBLY & (PER == 4) & (tl.bfloat16 == DTYPE)
    TWO: tl.constexpr = FORM == "apart"
    if FORM == "pairs":
        wide0 = START0 + tile_columns(n, 2 * WIDTH, N)
    else:
        wide0 = START0 + STEP0 * cols
    wide1 = START1 + STEP1 * cols
    first0 = START0 + n * N
    first1 = START1 + n * BN
    if W_FROM == "tma":
        base0 = w0
        base1 = w1
    else:
        base0 = matrix(w0, expert, e0, W_FROM, W_TYPE)
        base1 = matrix(w1, expert, e1, W_FROM, W_TYPE)
    scales0 = s0 + expert.to(tl.int64) * se0
    scales1 = s1 + expert.to(tl.int64) * se1
    acc = tl.zeros([N, BM] if SWAP else [BM, N], tl.float32)
    more = acc
    step = row0 * 0
    ws0 = _weight_scales(scales0, wide0, first0, step, si0, so0, STEPS, W_SCALES, OUT_BLOCK, ONE)
    ws1 = ws0
    if TWO:
        ws1 = _weight_scales(scales1, wide1, first1, step, si1, so1, STEPS, W_SCALES, OUT_BLOCK, ONE)
    ra = _row_scales(a_scales, rows, step, scale_stride, STEPS, A_SCALES)
    for k in tl.range(0, IN, BK):
        # Scales of the next step are under way while this one is multiplied. Not those of "inner": kept from step to step they would
        # bind how the numbers lie in registers, which would then go through shared memory.
        step += 1
        now = step - 1 if W_SCALES == "inner" else step
        next0 = _weight_scales(scales0, wide0, first0, now, si0, so0, STEPS, W_SCALES, OUT_BLOCK, ONE)
        next1 = next0
        if TWO:
            next1 = _weight_scales(scales1, wide1, first1, now, si1, so1, STEPS, W_SCALES, OUT_BLOCK, ONE)
        if W_SCALES == "inner":
            ws0 = next0
            ws1 = next1
        next_a = _row_scales(a_scales, rows, step, scale_stride, STEPS, A_SCALES)
        x = row_tile(a, at, row0, k, IN, BK, A_FROM, EVEN)
        x = x if KIND == "fp8" else x.to(DTYPE)
        w = _units(w0, base0, wide0, k // PER, (expert, first0), i0, o0, UNITS, W_FROM, N, RUN, TRANSPOSED, EVEN)
        acc = _step(x, w, ws0, ra, acc, KIND, PER, W_SCALES, A_SCALES, DTYPE, SWAP, PRECISION, FAST, ASSEMBLY)
        if TWO:
            w = _units(w1, base1, wide1, k // PER, (expert, first1), i1, o1, UNITS, W_FROM, N, RUN, TRANSPOSED, EVEN)
            more = _step(x, w, ws1, ra, more, KIND, PER, W_SCALES, A_SCALES, DTYPE, SWAP, PRECISION, FAST, ASSEMBLY)
        if W_SCALES != "inner":
            ws0 = next0
            ws1 = next1
        ra = next_a
    if FAST & (KIND == "fp4"):
        acc *= FOLDED
        more *= FOLDED
    acc = _scaled_once(acc, scales0, wide0, so0, W_SCALES, SWAP)
    if TWO:
        more = _scaled_once(more, scales1, wide1, so1, W_SCALES, SWAP)
    if FORM == "pairs":
        p0, p1 = parted(acc, BM, BN, FORM, SWAP)
    else:
        p0 = acc.T if SWAP else acc
        p1 = p0
        if TWO:
            p1 = more.T if SWAP else more
    if A_SCALES == "once":
        ra = tl.load(a_scales + rows)
        p0 *= ra[:, None]
        p1 *= ra[:, None]
    return p0, p1


@triton.jit
def _store(
    out, out_scales, result, rows, row0, n, WIDTH, LIMIT, stride_out, scale_stride, OUT: tl.constexpr, RUNS: tl.constexpr,
    STORE: tl.constexpr, BY_HAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile in the form that the next layer reads. OUT "fp8": e4m3 and scales of 128 columns; RUNS > 1: in runs. Columns < LIMIT."""
    j = n * BN + tl.arange(0, BN)
    if (OUT == "fp8") | (RUNS > 1):
        result = tl.where((j < WIDTH)[None, :], result, 0.0)
    if OUT == "fp8":
        tl.static_assert(BN == 128, "a tile has the columns of one scale")
        scales = scales_of(result)
        result = e4m3(result * (1 / scales)[:, None], BY_HAND)
        tl.store(out_scales + n.to(tl.int64) * scale_stride + rows, scales, mask=(rows >= 0) & (n * BN < WIDTH))
    if RUNS > 1:
        tl.static_assert(BN <= 128, "runs are of 128 columns")
        result = result.reshape(BM, BN // RUNS, RUNS).permute(0, 2, 1).reshape(BM, BN)
        j = in_runs(n * BN, BN, RUNS)
    if STORE == "tma":
        out.store([row0, n * BN], result.to(out.dtype))
    else:
        to = out + rows.to(tl.int64)[:, None] * stride_out + j[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=(j < LIMIT)[None, :] & (rows >= 0)[:, None])


@triton.jit
def _tile(
    a, a_scales, w0, w1, s0, s1, b0, b1, route_w, out, out_scales, slots, blocks, block, n, IN, UNITS, STEPS, WIDTH, LIMIT,
    stride_a, stride_out, scale_stride, e0, i0, o0, e1, i1, o1, se0, si0, so0, se1, si1, so1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, W_SCALES: tl.constexpr, A_SCALES: tl.constexpr, OUT_BLOCK: tl.constexpr, ONE: tl.constexpr,
    A_FROM: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr, TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, OUT: tl.constexpr, RUNS: tl.constexpr,
    STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile n of a block."""
    expert = tl.load(blocks + 2 * block)
    row0 = tl.load(blocks + 2 * block + 1)
    rows = row0 + tl.arange(0, BM)
    cols = tile_columns(n, WIDTH, BN)
    at = a
    if A_FROM == "gather":
        slot = tl.load(slots + rows)
        slot = tl.where(slot < 0, tl.load(slots + row0), slot)  # as in grouped_gemm.py
        at = a + (slot // TOP_K).to(tl.int64)[:, None] * stride_a
    elif A_FROM == "rows":
        at = a + rows.to(tl.int64)[:, None] * stride_a
    p0, p1 = _products(
        a, a_scales, w0, w1, s0, s1, rows, row0, at, expert, cols, n, IN, UNITS, STEPS, scale_stride, e0, i0, o0, e1, i1, o1,
        se0, si0, so0, se1, si1, so1, START0, STEP0, START1, STEP1, WIDTH, KIND, PER, W_SCALES, A_SCALES, OUT_BLOCK, ONE, A_FROM, W_FROM,
        W_TYPE, DTYPE, FORM, TRANSPOSED, SWAP, EVEN, PRECISION, ASSEMBLY, BM, BN, BK,
    )  # fmt: skip
    weight = p0
    if READS_W:
        weight = tl.load(route_w + tl.maximum(tl.load(slots + rows), 0)).to(tl.float32)[:, None]
    bias0, bias1 = biases_of(b0, b1, expert, cols, eb0, eb1, BSTART0, BSTEP0, BSTART1, BSTEP1, BIASES, p0)
    result = EPILOGUE(p0, p1, bias0, bias1, weight)
    _store(out, out_scales, result, rows, row0, n, WIDTH, LIMIT, stride_out, scale_stride, OUT, RUNS, STORE, not ASSEMBLY, BM, BN)


@triton.jit(do_not_specialize=["num_tiles", "programs"])
def scaled_kernel(
    a, a_scales, w0, w1, s0, s1, b0, b1, route_w, out, out_scales, slots, blocks, num_blocks, IN, UNITS, STEPS, WIDTH, LIMIT, num_tiles,
    programs, stride_a, stride_out, scale_stride, e0, i0, o0, e1, i1, o1, se0, si0, so0, se1, si1, so1, eb0, eb1,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, TOP_K: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, W_SCALES: tl.constexpr, A_SCALES: tl.constexpr, OUT_BLOCK: tl.constexpr, ONE: tl.constexpr,
    A_FROM: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr, TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ASSEMBLY: tl.constexpr, OUT: tl.constexpr, RUNS: tl.constexpr,
    STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """All tiles of a layer; grid and blocks as of grouped_gemm.layer_kernel.

    w_i: units of the weights, UNITS along the inputs; s_i: their scales; STEPS: scales along the inputs, of weights and rows; scale_stride:
    P, rows of a_scales and of out_scales. ASSEMBLY: on a GPU, not in Triton's interpreter.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    count = tl.load(num_blocks)
    if PERSISTENT:
        for t in tl.range(tl.program_id(0), count * num_tiles, programs, flatten=True):
            block, n = pick(t, count, num_tiles, GROUP)
            _tile(
                a, a_scales, w0, w1, s0, s1, b0, b1, route_w, out, out_scales, slots, blocks, block, n, IN, UNITS, STEPS, WIDTH, LIMIT,
                stride_a, stride_out, scale_stride, e0, i0, o0, e1, i1, o1, se0, si0, so0, se1, si1, so1, eb0, eb1, START0, STEP0, START1,
                STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, READS_W, BIASES, TOP_K, KIND, PER, W_SCALES, A_SCALES, OUT_BLOCK, ONE,
                A_FROM, W_FROM, W_TYPE, DTYPE, FORM, TRANSPOSED, SWAP, EVEN, PRECISION, ASSEMBLY, OUT, RUNS, STORE, BM, BN, BK,
            )  # fmt: skip
    elif tl.program_id(0) < count * num_tiles:
        block, n = pick(tl.program_id(0), count, num_tiles, GROUP)
        _tile(
            a, a_scales, w0, w1, s0, s1, b0, b1, route_w, out, out_scales, slots, blocks, block, n, IN, UNITS, STEPS, WIDTH, LIMIT,
            stride_a, stride_out, scale_stride, e0, i0, o0, e1, i1, o1, se0, si0, so0, se1, si1, so1, eb0, eb1, START0, STEP0, START1,
            STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, READS_W, BIASES, TOP_K, KIND, PER, W_SCALES, A_SCALES, OUT_BLOCK, ONE,
            A_FROM, W_FROM, W_TYPE, DTYPE, FORM, TRANSPOSED, SWAP, EVEN, PRECISION, ASSEMBLY, OUT, RUNS, STORE, BM, BN, BK,
        )  # fmt: skip
