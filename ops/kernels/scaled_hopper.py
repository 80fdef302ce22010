"""The grouped GEMM of scaled_gemm.py for e4m3 rows and weights and blocks of 128 rows on Hopper, with roles for its warps, in Gluon.

One warp brings tiles of rows and weights by descriptors; two groups of four warps multiply 64 rows each with 128 columns twice: of a gate's
two products, or of two tiles next to each other, so that rows come once for both. The sums of 128 inputs have to leave the tensor core for
their scales, and while one group adds them up the other's products run. Rows, weights and results lie as descriptors take them: inputs next
to each other. Epilogues are the ones of scaled_gemm.py; there are no biases and no routing weights.

Gluon is Triton's language for kernels with explicit layouts; Triton's interpreter does not run it.
"""

# ruff: noqa: SIM113  (Triton has no enumerate)
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="no-untyped-call,misc"
# (Triton resolves the names in annotations as kernel globals, so only gl.constexpr can stand there.)

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .grouped_gemm import pick

bring = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9's names, and those before
take = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
NAN = gl.constexpr(tl.PropagateNan.ALL)
PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # from Triton 3.9 on


@gluon.jit
def _place(blocks, t, count, num_tiles, GROUP: gl.constexpr):
    """(expert, first row, column tile) of item t."""
    block, n = pick(t, count, num_tiles, GROUP)
    return gl.load(blocks + 2 * block), gl.load(blocks + 2 * block + 1), n


@gluon.jit
def _pieces(w_rows, MOST_STEPS: gl.constexpr):
    """[4, MOST_STEPS] of the same memory."""
    if PUBLIC:
        return w_rows.reinterpret(gl.float32, [4, MOST_STEPS], w_rows.layout)
    else:
        return w_rows._reinterpret(gl.float32, [4, MOST_STEPS], w_rows.layout)


@gluon.jit
def _bring_steps(
    a, w0, w1, a_scales, a_tiles, w_tiles, a_rows, full, empty, row0, first0, first1, steps, i, A_SCALES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loads of a tile's steps, each when there is room; i: of the first."""
    for step in range(steps):
        s = i % STAGES
        mbarrier.wait(empty.index(s), (i // STAGES & 1) ^ 1)
        ready = full.index(s)
        if A_SCALES == "step":
            mbarrier.expect(ready, 3 * 128 * 128 + 4 * 128)
            bring(a_scales, [step, row0], ready, a_rows.index(s))
        else:
            mbarrier.expect(ready, 3 * 128 * 128)
        bring(a, [row0, step * 128], ready, a_tiles.index(s))
        bring(w0, [first0, step * 128], ready, w_tiles.index(2 * s))
        bring(w1, [first1, step * 128], ready, w_tiles.index(2 * s + 1))
        i += 1
    return i


@gluon.jit
def _bring(
    a, w0, w1, a_scales, s0, s1, a_tiles, w_tiles, a_rows, w_rows, full, empty, w_full, w_empty, blocks, count, num_tiles, programs, steps,
    LAST, outs0, outs1, se0, si0, so0, se1, si1, so1, START0: gl.constexpr, START1: gl.constexpr, WIDE: gl.constexpr,
    W_SCALES: gl.constexpr, A_SCALES: gl.constexpr, OUT_BLOCK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    MOST_STEPS: gl.constexpr,
):  # fmt: skip
    """All loads of this program's tiles, as far ahead as there is room."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    each = gl.arange(0, MOST_STEPS, lanes)
    i = 0
    tile = 0
    for t in range(gl.program_id(0), count * num_tiles, programs):
        expert, row0, n = _place(blocks, t, count, num_tiles, GROUP)
        first0 = START0 + n * WIDE
        first1 = START1 + n * WIDE
        if W_SCALES == "step":
            of = tile % 2
            pieces = _pieces(w_rows, MOST_STEPS)
            at0 = s0 + expert.to(gl.int64) * se0 + gl.minimum(first0 // OUT_BLOCK, LAST) * so0
            at1 = s1 + expert.to(gl.int64) * se1 + gl.minimum(first1 // OUT_BLOCK, LAST) * so1
            scales0 = gl.load(at0 + each * si0, mask=each < steps, other=0.0).to(gl.float32)
            scales1 = gl.load(at1 + each * si1, mask=each < steps, other=0.0).to(gl.float32)
            mbarrier.wait(w_empty.index(of), (tile // 2 & 1) ^ 1)
            pieces.index(2 * of).store(scales0)
            pieces.index(2 * of + 1).store(scales1)
            mbarrier.arrive(w_full.index(of), count=1)
        i = _bring_steps(
            a, w0, w1, a_scales, a_tiles, w_tiles, a_rows, full, empty, row0, expert * outs0 + first0, expert * outs1 + first1, steps, i,
            A_SCALES, STAGES,
        )  # fmt: skip
        tile += 1


@gluon.jit
def _scales(a_rows, w_rows, s, at0, at1, lanes: gl.constexpr, W_SCALES: gl.constexpr, A_SCALES: gl.constexpr, HALF: gl.constexpr):
    """float32 [64] of a step's two products; at_i: where the weights' are. 1 where there are none in a step."""
    by0 = gl.full([64], 1.0, gl.float32, lanes)
    if A_SCALES == "step":
        by0 = a_rows.index(s).reshape([128]).slice(64 * HALF, 64).load(lanes)
        fence_async_shared()  # they come from shared memory before the copy that takes their place there, which waits for no load
    by1 = by0
    if W_SCALES == "step":
        by1 = by0 * w_rows.index(at1).load(lanes)
        by0 = by0 * w_rows.index(at0).load(lanes)
    return by0, by1


@gluon.jit
def _products(
    zero, a_tiles, w_tiles, a_rows, w_rows, full, empty, at0, at1, steps, i, W_SCALES: gl.constexpr, A_SCALES: gl.constexpr,
    STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Two float32 [64, 128] of all steps, i: of the first; at_i: where the first step's scales of weights are."""
    acc0 = zero
    acc1 = zero
    for step in range(steps):
        s = i % STAGES
        mbarrier.wait(full.index(s), i // STAGES & 1)
        rows = a_tiles.index(s).slice(64 * HALF, 64)
        part = warpgroup_mma(rows, w_tiles.index(2 * s).permute((1, 0)), zero, use_acc=False, is_async=True)
        by0, by1 = _scales(a_rows, w_rows, s, at0 + step, at1 + step, gl.SliceLayout(1, zero.type.layout), W_SCALES, A_SCALES, HALF)
        part = warpgroup_mma_wait(0, deps=[part])
        acc0 += part * by0[:, None]
        acc0, part = warpgroup_mma_wait(0, deps=[acc0, part])  # part is added up before the next one takes its registers
        part = warpgroup_mma(rows, w_tiles.index(2 * s + 1).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(s), count=1)
        acc1 += part * by1[:, None]
        i += 1
    return acc0, acc1, i


@gluon.jit
def _by_column(acc, s, START: gl.constexpr, cols, WIDTH, stride_o, W_SCALES: gl.constexpr):
    """acc times its columns' scales, where each column has one."""
    if W_SCALES == "once":
        acc = acc * gl.load(s + (START + cols) * stride_o, mask=cols < WIDTH, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def _larger(a, b):
    """Of both, or NaN."""
    return gl.maximum(a, b, propagate_nan=NAN)


@gluon.jit
def _store(out, room, out_scales, result, row0, rows, n, cols, WIDTH, scale_stride, OUT: gl.constexpr):
    """64 rows of a column tile, in the form that the next layer reads."""
    if OUT == "fp8":
        result = gl.where((cols < WIDTH)[None, :], result, 0.0)
        amax = gl.reduce(gl.abs(result), 1, _larger)
        scales = gl.where(amax > 0, amax / 448.0, 1.0) + (amax - amax)  # as scaled_rows.scales_of
        result = result * (1 / scales)[:, None]  # beyond 448 the conversion takes 448
        gl.store(out_scales + n.to(gl.int64) * scale_stride + rows, scales, mask=(rows >= 0) & (n * 128 < WIDTH))
    tma.store_wait(0)
    room.store(result.to(out.dtype))
    fence_async_shared()
    take(out, [row0, n * 128], room)


@gluon.jit
def _multiply(
    a_tiles, w_tiles, a_rows, w_rows, rooms, full, empty, w_full, w_empty, a_scales, s0, s1, out, out_scales, blocks, count, num_tiles,
    programs, steps, WIDTH, scale_stride, se0, so0, se1, so1, START0: gl.constexpr, START1: gl.constexpr, TWO: gl.constexpr,
    EPILOGUE: gl.constexpr, W_SCALES: gl.constexpr, A_SCALES: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, MOST_STEPS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Rows 64 * HALF on of this program's tiles."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    lanes = gl.arange(0, 64, gl.SliceLayout(1, mma))
    columns = gl.arange(0, 128, gl.SliceLayout(0, mma))
    zero = gl.zeros([64, 128], gl.float32, mma)
    room = rooms.index(HALF)
    i = 0
    tile = 0
    for t in range(gl.program_id(0), count * num_tiles, programs):
        expert, row0, n = _place(blocks, t, count, num_tiles, GROUP)
        row0 += 64 * HALF
        rows = row0 + lanes
        of = tile % 2
        if W_SCALES == "step":
            mbarrier.wait(w_full.index(of), tile // 2 & 1)
        p0, p1, i = _products(
            zero, a_tiles, w_tiles, a_rows, w_rows, full, empty, 2 * of * MOST_STEPS, (2 * of + 1) * MOST_STEPS, steps, i, W_SCALES,
            A_SCALES, STAGES, HALF,
        )  # fmt: skip
        if W_SCALES == "step":
            mbarrier.arrive(w_empty.index(of), count=1)
        if A_SCALES == "once":
            by_row = gl.load(a_scales + rows)
            p0 = p0 * by_row[:, None]
            p1 = p1 * by_row[:, None]
        at0 = s0 + expert.to(gl.int64) * se0
        at1 = s1 + expert.to(gl.int64) * se1
        if TWO:
            cols = n * 128 + columns
            p0 = _by_column(p0, at0, START0, cols, WIDTH, so0, W_SCALES)
            p1 = _by_column(p1, at1, START1, cols, WIDTH, so1, W_SCALES)
            _store(out, room, out_scales, EPILOGUE(p0, p1, p0, p0, p0), row0, rows, n, cols, WIDTH, scale_stride, OUT)
        else:
            cols = 2 * n * 128 + columns
            p0 = _by_column(p0, at0, START0, cols, WIDTH, so0, W_SCALES)
            _store(out, room, out_scales, EPILOGUE(p0, p0, p0, p0, p0), row0, rows, 2 * n, cols, WIDTH, scale_stride, OUT)
            cols += 128
            p1 = _by_column(p1, at0, START0, cols, WIDTH, so0, W_SCALES)
            _store(out, room, out_scales, EPILOGUE(p1, p1, p1, p1, p1), row0, rows, 2 * n + 1, cols, WIDTH, scale_stride, OUT)
        tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "programs"])
def hopper_kernel(
    a, a_scales, w0, w1, s0, s1, out, out_scales, blocks, num_blocks, steps, WIDTH, LAST, num_tiles, programs, outs0, outs1, scale_stride,
    se0, si0, so0, se1, si1, so1, START0: gl.constexpr, START1: gl.constexpr, TWO: gl.constexpr, EPILOGUE: gl.constexpr,
    W_SCALES: gl.constexpr, A_SCALES: gl.constexpr, OUT_BLOCK: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, MOST_STEPS: gl.constexpr,
):  # fmt: skip
    """All tiles of a layer, by `programs` programs.

    a [P, IN], w_i [E * outs_i, IN], out [P, LIMIT] descriptors of boxes [128, 128], [128, 128], [64, 128]; scales as in scaled_gemm.py,
    of rows with A_SCALES "step" a descriptor of boxes [1, 128]; LAST: the last block of columns with a scale; steps <= MOST_STEPS: of 128
    inputs. TWO products, and tiles of 128 columns; or one, w1 the same as w0, START1 = START0 + 128, and tiles of 256.
    """
    WIDE: gl.constexpr = 128 if TWO else 256
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, 128, 128], a.layout)
    w_tiles = gl.allocate_shared_memory(w0.dtype, [2 * STAGES, 128, 128], w0.layout)
    rooms = gl.allocate_shared_memory(out.dtype, [2, 64, 128], out.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    a_rows = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], flat)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_rows = gl.allocate_shared_memory(gl.float32, [4 * MOST_STEPS, 1], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    for s in gl.static_range(2):
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(w_empty.index(s), count=2)
    fence_async_shared()
    count = gl.load(num_blocks)
    gl.warp_specialize(
        [
            (_multiply, (
                a_tiles, w_tiles, a_rows, w_rows, rooms, full, empty, w_full, w_empty, a_scales, s0, s1, out, out_scales, blocks,
                count, num_tiles, programs, steps, WIDTH, scale_stride, se0, so0, se1, so1, START0, START1, TWO, EPILOGUE, W_SCALES,
                A_SCALES, OUT, GROUP, STAGES, MOST_STEPS, 0,
            )),
            (_multiply, (
                a_tiles, w_tiles, a_rows, w_rows, rooms, full, empty, w_full, w_empty, a_scales, s0, s1, out, out_scales, blocks,
                count, num_tiles, programs, steps, WIDTH, scale_stride, se0, so0, se1, so1, START0, START1, TWO, EPILOGUE, W_SCALES,
                A_SCALES, OUT, GROUP, STAGES, MOST_STEPS, 1,
            )),
            (_bring, (
                a, w0, w1, a_scales, s0, s1, a_tiles, w_tiles, a_rows, w_rows, full, empty, w_full, w_empty, blocks, count, num_tiles,
                programs, steps, LAST, outs0, outs1, se0, si0, so0, se1, si1, so1, START0, START1, WIDE, W_SCALES, A_SCALES, OUT_BLOCK,
                GROUP, STAGES, MOST_STEPS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
