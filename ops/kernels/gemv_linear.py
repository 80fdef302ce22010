"""The last layer for a few tokens where it is a plain product: all slots of a token at a time, their weights read before anything is waited
for, and one sum over slots and inputs at the end."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_gemm import matrix, tile_columns


@triton.jit
def linear_kernel(
    a, w, ids, sum_w, out, E, IN, WIDTH, stride_a, stride_sum_w, stride_e, stride_i, stride_o, START: tl.constexpr, STEP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, SHARE: tl.constexpr, WEIGHTED: tl.constexpr, W_FROM: tl.constexpr, W_TYPE: tl.constexpr,
    DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k sum_w[t, k] * a's row of slot (t, k) @ w[expert]. Grid (column tiles, T). a [T*K // SHARE, IN], ids [T*K].

    BK covers IN, KP a token's K slots: [KP, BN, BK] stand in registers.
    """
    t = tl.program_id(1)
    k = tl.arange(0, KP)
    slot = t * K + k
    expert = tl.load(ids + slot, mask=k < K, other=-1)
    valid = (k < K) & (expert >= 0) & (expert < E)
    base = matrix(w, tl.where(valid, expert, 0), stride_e, W_FROM, W_TYPE)
    cols = START + STEP * tile_columns(tl.program_id(0), WIDTH, BN)
    i = tl.arange(0, BK)
    inside = valid[:, None] & (i < IN)[None, :]
    at = base[:, None, None] + (cols[:, None] * stride_o + i[None, :] * stride_i)[None, :, :]
    weights = tl.load(at, mask=inside[:, None, :], other=0.0)
    by = valid.to(tl.float32)
    if WEIGHTED:
        by = tl.load(sum_w + t * stride_sum_w + k, mask=valid, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    rows = tl.load(a + (slot // SHARE).to(tl.int64)[:, None] * stride_a + i[None, :], mask=inside, other=0.0).to(DTYPE).to(tl.float32)
    total = tl.sum(tl.sum(weights.to(DTYPE).to(tl.float32) * rows[:, None, :], 2) * by[:, None], 0)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(out + t.to(tl.int64) * WIDTH + j, total.to(out.dtype.element_ty), mask=j < WIDTH)
