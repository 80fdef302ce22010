"""The grouped GEMM of one layer: rows sorted by expert, in blocks that belong to one expert each, and an epilogue in registers.

    out[r, j] = EPILOGUE(products, biases, w)   products[i] = (rows[r] @ weight_i[expert])[START_i + STEP_i * j]

Weights are read where they are (W_FROM): "tma" through a descriptor of a stacked tensor, "stack" by its strides, "table" at the addresses
of one tensor an expert. FORM: how the columns of the products lie: "one" product; "apart", two, each by itself; "halves", the first and
the second half of one weight's columns, by one descriptor box over its view [2E, I, IN]; "pairs", every other column of one weight.
Rows (A_FROM): "gather" x [T, IN] through slots, "rows" sorted rows by address, "tma" sorted rows through a descriptor. SKIP: padding
that would be gathered is zeros, which nothing reads; else it repeats the first row of its block, which costs no mask.
SWAP: weights are the M side of the tensor core's product, for blocks of few rows.
"""

# ruff: noqa: SIM108  (Triton decides such an if when it compiles; of an expression it compiles both sides)
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_columns(n, LIMIT, BN: tl.constexpr):
    """BN columns from tile n on; those beyond the limit repeat the first, and are not stored."""
    j = n * BN + tl.arange(0, BN)
    return tl.where(j < LIMIT, j, 0)


@triton.jit
def matrix(w, expert, stride_e, FROM: tl.constexpr, TYPE: tl.constexpr):
    """Where an expert's matrix starts."""
    if FROM == "table":
        base = tl.multiple_of(tl.load(w + expert).to(tl.pointer_type(TYPE)), 16)
    else:
        base = w + expert.to(tl.int64) * stride_e
    return base


@triton.jit
def weight_tile(
    w, base, cols, k, row, stride_i, stride_o, IN, FROM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[N, BK]: columns of the expert's matrix, each along its inputs k..k+BK. row: (first, second) coordinate of a descriptor's box."""
    if FROM == "tma":
        if TRANSPOSED:
            tile = w.load([row[0], k, row[1]]).reshape(BK, N).T
        else:
            tile = w.load([row[0], row[1], k]).reshape(N, BK)
    else:
        ks = k + tl.arange(0, BK)
        at = base + (cols[:, None] * stride_o + ks[None, :] * stride_i)
        tile = tl.load(at) if EVEN else tl.load(at, mask=ks[None, :] < IN, other=0.0)
    return tile.to(DTYPE)


@triton.jit
def row_tile(a, at, row0, k, IN, BK: tl.constexpr, FROM: tl.constexpr, EVEN: tl.constexpr, used=None):
    """[BM, BK] of the block's rows. used: of which rows, the others are zero; None: of all."""
    if FROM == "tma":
        tile = a.load([row0, k])
    else:
        ks = k + tl.arange(0, BK)
        if used is not None:
            tile = tl.load(at + ks[None, :], mask=used[:, None] & (EVEN | (ks[None, :] < IN)), other=0.0)
        elif EVEN:
            tile = tl.load(at + ks[None, :])
        else:
            tile = tl.load(at + ks[None, :], mask=ks[None, :] < IN, other=0.0)
    return tile


@triton.jit
def dot(rows, weights, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BM, N] (SWAP: [N, BM]) += rows [BM, BK] @ weights [N, BK].T"""
    if SWAP:
        acc = tl.dot(weights, rows.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(rows, weights.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def parted(acc, BM: tl.constexpr, BN: tl.constexpr, FORM: tl.constexpr, SWAP: tl.constexpr):
    """Two products [BM, BN] from one accumulator of 2 * BN columns."""
    if FORM == "halves":
        first, second = tl.split(acc.reshape(2, BN, BM).permute(1, 2, 0) if SWAP else acc.reshape(BM, 2, BN).permute(0, 2, 1))
    else:
        first, second = tl.split(acc.reshape(BN, 2, BM).permute(0, 2, 1) if SWAP else acc.reshape(BM, BN, 2))
    if SWAP:
        first = first.T
        second = second.T
    return first, second


@triton.jit
def _bias(b, expert, cols, stride_e, START: tl.constexpr, STEP: tl.constexpr):
    """[1, BN] float32 of the expert's bias, stacked [E, O]."""
    return tl.load(b + expert.to(tl.int64) * stride_e + START + STEP * cols).to(tl.float32)[None, :]


@triton.jit
def biases_of(
    b0, b1, expert, cols, e0, e1, START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    COUNT: tl.constexpr, nothing,
):  # fmt: skip
    """Both biases, `nothing` in place of what a layer does not have."""
    first = nothing
    second = nothing
    if COUNT > 0:
        first = _bias(b0, expert, cols, e0, START0, STEP0)
    if COUNT > 1:
        second = _bias(b1, expert, cols, e1, START1, STEP1)
    return first, second


@triton.jit
def slot_of(ids, route_w, slot, E, READS_W: tl.constexpr):
    """(whether the slot has an expert, that expert or the first one, its routing weight or 1)."""
    expert = tl.load(ids + slot)
    valid = (expert >= 0) & (expert < E)
    weight = 1.0
    if READS_W:
        weight = tl.load(route_w + slot).to(tl.float32)
    return valid, tl.where(valid, expert, 0), weight


@triton.jit
def places_of(rows, expert, counts, firsts, ends):
    """(int64 places in the order of the rows, whether there is such a slot)."""
    count = tl.load(counts + expert)
    inside = rows - tl.load(firsts + expert)
    return (tl.load(ends + expert) - count + inside).to(tl.int64), inside < count


@triton.jit
def _save(z, box, value, place0, place, used, whole, n, WIDTH, stride, START: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr):
    """A product's columns into [N, OUT], where its rows stand in the order. box: a descriptor for blocks that have all rows, or None."""
    j = n * BN + tl.arange(0, BN)
    to = z + place[:, None] * stride + (START + STEP * j)[None, :]
    if box is not None:
        if whole:
            box.store([place0, START + n * BN], value.to(box.dtype))
        else:
            tl.store(to, value.to(z.dtype.element_ty), mask=used[:, None])
    else:
        tl.store(to, value.to(z.dtype.element_ty), mask=used[:, None] & (j < WIDTH)[None, :])


@triton.jit
def _tile(
    a, w0, w1, b0, b1, route_w, out, slots, blocks, block, n, IN, WIDTH, stride_a, stride_out,
    e0, i0, o0, e1, i1, o1, eb0, eb1, z0, z1, box0, box1, stride_z0, stride_z1, counts, firsts, ends,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, TOP_K: tl.constexpr,
    A_FROM: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr,
    FORM: tl.constexpr, TRANSPOSED: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, STORE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALF: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Tile n of a block."""
    expert = tl.load(blocks + 2 * block)
    row0 = tl.load(blocks + 2 * block + 1)
    rows = row0 + tl.arange(0, BM)
    cols = tile_columns(n, WIDTH, BN)
    N: tl.constexpr = BN if (FORM == "one") | (FORM == "apart") else 2 * BN
    at = a
    used = None
    if A_FROM == "gather":
        slot = tl.load(slots + rows)
        if SKIP:
            used = slot >= 0
        slot = tl.where(slot < 0, tl.load(slots + row0), slot)  # not one row for the padding of all experts: all would wait for it
        at = a + (slot // TOP_K).to(tl.int64)[:, None] * stride_a
    elif A_FROM == "rows":
        at = a + rows.to(tl.int64)[:, None] * stride_a
    if FORM == "pairs":
        wide = START0 + tile_columns(n, 2 * WIDTH, N)
    elif FORM == "halves":
        wide = cols  # by descriptor alone
    else:
        wide = START0 + STEP0 * cols
    if W_FROM == "tma":
        base0 = w0
        base1 = w1
    else:
        base0 = matrix(w0, expert, e0, W_FROM, W_TYPE)
        base1 = matrix(w1, expert, e1, W_FROM, W_TYPE)
    row = (expert, START0 + n * N)
    if FORM == "halves":
        row = (2 * expert, n * BN)
    acc = tl.zeros([N, BM] if SWAP else [BM, N], tl.float32)
    more = acc
    for k in tl.range(0, IN, BK):
        x = row_tile(a, at, row0, k, IN, BK, A_FROM, EVEN, used).to(DTYPE)
        w = weight_tile(w0, base0, wide, k, row, i0, o0, IN, W_FROM, N, BK, EVEN, TRANSPOSED, DTYPE)
        acc = dot(x, w, acc, SWAP, PRECISION)
        if FORM == "apart":
            u = weight_tile(
                w1, base1, START1 + STEP1 * cols, k, (expert, START1 + n * BN), i1, o1, IN, W_FROM, N, BK, EVEN, TRANSPOSED, DTYPE
            )
            more = dot(x, u, more, SWAP, PRECISION)
    if (FORM == "halves") | (FORM == "pairs"):
        p0, p1 = parted(acc, BM, BN, FORM, SWAP)
    else:
        p0 = acc.T if SWAP else acc
        p1 = more.T if SWAP else more
    if (z0 is not None) | (z1 is not None):
        place, used = places_of(rows, expert, counts, firsts, ends)
        place0 = tl.load(ends + expert) - tl.load(counts + expert) + row0 - tl.load(firsts + expert)
        whole = row0 + BM - tl.load(firsts + expert) <= tl.load(counts + expert)
        if z0 is not None:
            _save(z0, box0, p0, place0, place, used, whole, n, WIDTH, stride_z0, START0, STEP0, BN)
        if z1 is not None:
            _save(z1, box1, p1, place0, place, used, whole, n, WIDTH, stride_z1, START1, STEP1, BN)
    bias0, bias1 = biases_of(b0, b1, expert, cols, eb0, eb1, BSTART0, BSTEP0, BSTART1, BSTEP1, BIASES, p0)
    weight = p0
    if READS_W:
        slot = tl.load(slots + rows)
        weight = tl.load(route_w + tl.maximum(slot, 0)).to(tl.float32)[:, None]
    result = EPILOGUE(p0, p1, bias0, bias1, weight)
    if STORE == "tma":
        if HALF:  # two boxes: what is staged in shared memory is half as large
            left, right = tl.split(result.reshape(BM, 2, BN // 2).permute(0, 2, 1))
            out.store([row0, n * BN], left.to(out.dtype))
            out.store([row0, n * BN + BN // 2], right.to(out.dtype))
        else:
            out.store([row0, n * BN], result.to(out.dtype))
    else:
        j = n * BN + tl.arange(0, BN)
        to = out + rows.to(tl.int64)[:, None] * stride_out + j[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=(j < WIDTH)[None, :] & (rows >= 0)[:, None])


@triton.jit
def pick(t, num_blocks, num_tiles, GROUP: tl.constexpr):
    """Item t: GROUP blocks by all column tiles at a time, blocks fastest, so that blocks of one expert meet on a weight tile in L2."""
    wide = GROUP * num_tiles
    first = (t // wide) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    inside = t % wide
    return first + inside % size, inside // size


@triton.jit(do_not_specialize=["num_tiles", "programs"])
def layer_kernel(
    a, w0, w1, b0, b1, route_w, out, slots, blocks, num_blocks, IN, WIDTH, num_tiles, programs, stride_a, stride_out,
    e0, i0, o0, e1, i1, o1, eb0, eb1, z0, z1, box0, box1, stride_z0, stride_z1, counts, firsts, ends,
    START0: tl.constexpr, STEP0: tl.constexpr, START1: tl.constexpr, STEP1: tl.constexpr,
    BSTART0: tl.constexpr, BSTEP0: tl.constexpr, BSTART1: tl.constexpr, BSTEP1: tl.constexpr,
    EPILOGUE: tl.constexpr, READS_W: tl.constexpr, BIASES: tl.constexpr, TOP_K: tl.constexpr,
    A_FROM: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr, DTYPE: tl.constexpr,
    FORM: tl.constexpr, TRANSPOSED: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, STORE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALF: tl.constexpr, SKIP: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """All tiles of a layer. Grid: `programs` (PERSISTENT), else a program for each tile that there can be; those beyond the last end.

    rows [T, IN] or [P, IN]; weight_i [E, OUT, IN] in any layout; out [P, WIDTH]; slots int32 [P]; blocks int32 [B, 2] (expert, first row);
    num_blocks int32 [1]; route_w float [T*K]. Rows behind an expert's last are computed from anything. z_i: None, or [N, OUT] that gets
    the products' columns in the order of slots; box_i: its descriptor, or None. EARLY: the kernel before may still run; its results are
    waited for.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    count = tl.load(num_blocks)
    if PERSISTENT:
        for t in tl.range(tl.program_id(0), count * num_tiles, programs, flatten=True):
            block, n = pick(t, count, num_tiles, GROUP)
            _tile(
                a, w0, w1, b0, b1, route_w, out, slots, blocks, block, n, IN, WIDTH, stride_a, stride_out,
                e0, i0, o0, e1, i1, o1, eb0, eb1, z0, z1, box0, box1, stride_z0, stride_z1, counts, firsts, ends, START0, STEP0,
                START1, STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, READS_W, BIASES, TOP_K, A_FROM, W_FROM, W_TYPE, DTYPE, FORM,
                TRANSPOSED, SWAP, EVEN, PRECISION, STORE, BM, BN, BK, HALF, SKIP,
            )  # fmt: skip
    elif tl.program_id(0) < count * num_tiles:
        block, n = pick(tl.program_id(0), count, num_tiles, GROUP)
        _tile(
            a, w0, w1, b0, b1, route_w, out, slots, blocks, block, n, IN, WIDTH, stride_a, stride_out,
            e0, i0, o0, e1, i1, o1, eb0, eb1, z0, z1, box0, box1, stride_z0, stride_z1, counts, firsts, ends, START0, STEP0,
            START1, STEP1, BSTART0, BSTEP0, BSTART1, BSTEP1, EPILOGUE, READS_W, BIASES, TOP_K, A_FROM, W_FROM, W_TYPE, DTYPE, FORM,
            TRANSPOSED, SWAP, EVEN, PRECISION, STORE, BM, BN, BK, HALF, SKIP,
        )  # fmt: skip
