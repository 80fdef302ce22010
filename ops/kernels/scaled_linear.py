"""gemv_linear.py for weights of a byte: the last layer for a few tokens where it is a plain product. A program takes one column for all
slots of a token, its weights are there before anything is waited for, and scales are applied to sums."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .unpack import number


@triton.jit
def scaled_linear_kernel(
    a, w, s, ids, sum_w, out, E, IN, STEPS, WIDTH, stride_a, stride_sum_w, stride_e, stride_i, stride_o, scale_e, scale_i, scale_o,
    START: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SHARE: tl.constexpr, WEIGHTED: tl.constexpr,
    KIND: tl.constexpr, W_SCALES: tl.constexpr, OUT_BLOCK: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, j] = sum_k sum_w[t, k] * a's row of slot (t, k) @ w[expert][:, j]. Grid (WIDTH, T). a [T*K // SHARE, IN], ids [T*K].

    G groups of Q inputs with one scale cover IN, KP a token's K slots. w, s: values and scales as in scaled_gemm.py.
    """
    j = tl.program_id(0)
    t = tl.program_id(1)
    k = tl.arange(0, KP)
    slot = t * K + k
    expert = tl.load(ids + slot, mask=k < K, other=-1)
    valid = (k < K) & (expert >= 0) & (expert < E)
    expert = tl.where(valid, expert, 0).to(tl.int64)
    column = START + STEP * j
    g = tl.arange(0, G)
    i = g[None, :, None] * Q + tl.arange(0, Q)[None, None, :]
    used = valid[:, None, None]
    inside = used if EVEN else used & (i < IN)
    tile = tl.load(w + expert[:, None, None] * stride_e + column.to(tl.int64) * stride_o + i * stride_i, mask=inside, other=0.0)
    scales = tl.zeros([KP, G], tl.float32)
    if W_SCALES != "once":
        at = s + expert[:, None] * scale_e + (column // OUT_BLOCK) * scale_o + g[None, :] * scale_i
        scales = tl.load(at, mask=valid[:, None] & (g < STEPS)[None, :], other=0.0).to(tl.float32)
    by = valid.to(tl.float32)
    if WEIGHTED:
        by = tl.load(sum_w + t * stride_sum_w + k, mask=valid, other=0.0).to(tl.float32)
    if W_SCALES == "once":
        by *= tl.load(s + expert * scale_e + column * scale_o).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    rows = tl.load(a + (slot // SHARE).to(tl.int64)[:, None, None] * stride_a + i, mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(number(tile, 0, KIND, DTYPE, 1.0, False).to(tl.float32) * rows, 2)
    if W_SCALES != "once":
        sums *= scales
    total = tl.sum(tl.where(valid, tl.sum(sums, 1) * by, 0.0), 0)
    tl.store(out + t.to(tl.int64) * WIDTH + j, total.to(out.dtype.element_ty))
