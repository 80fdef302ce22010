"""A router in one kernel: scores, the best experts and their weights of a few tokens, all in registers.

As ops/route.py defines it, rounded where torch rounds. Of experts with the same score the first ones are taken, as torch.topk does on
GPUs with one row a block, and NaN counts as the largest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .pointwise import sigmoid, softplus

LOWEST = tl.constexpr(-(2**31))  # below the key of every number


@triton.jit
def _rounded(a, DTYPE: tl.constexpr):
    return a.to(DTYPE).to(tl.float32)


@triton.jit
def _keys(a):
    """int32 in the order of float32 numbers, NaN last."""
    bits = a.to(tl.int32, bitcast=True)
    return tl.where(a != a, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _best(keys, places, NONE: tl.constexpr):
    """The place of each row's largest key [T]: the first of several."""
    top = tl.max(keys, 1)[:, None]
    return tl.min(tl.where(keys == top, places, NONE), 1)


@triton.jit
def _scores(x, inside, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    if SCORE == "softmax":
        e = tl.where(inside, tl.exp(x - tl.max(tl.where(inside, x, float("-inf")), 1)[:, None]), 0.0)
        s = e / tl.sum(e, 1)[:, None]
    elif SCORE == "sigmoid":
        s = sigmoid(x)
    elif SCORE == "sqrtsoftplus":
        s = tl.sqrt(_rounded(softplus(x, 1.0, 20.0), DTYPE))
    else:
        s = x
    return _rounded(s, DTYPE)


@triton.jit
def _group_scores(
    choice, keys, places, inside, SIZE: tl.constexpr, GROUPS: tl.constexpr, SUM: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr,
    BE: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Keys [BT, BG] of the groups' scores: the largest of their experts', or (SUM) the sum of the two largest."""
    groups = tl.arange(0, BG)[None, :]
    found = tl.full([BT, BG], LOWEST, tl.int32)
    for g in tl.static_range(GROUPS):
        own = tl.where(inside & (places // SIZE == g), keys, LOWEST)
        first = _best(own, places, BE)[:, None]
        if SUM:
            second = _best(tl.where(places == first, LOWEST, own), places, BE)[:, None]
            value = tl.sum(tl.where((places == first) | (places == second), choice, 0.0), 1)
            key = _keys(_rounded(value, DTYPE))
        else:
            key = tl.max(own, 1)
        found = tl.where(groups == g, key[:, None], found)
    return found


@triton.jit
def _outside(
    choice, keys, places, inside, SIZE: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr, SUM: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Which experts [BT, BE] are in none of the TOP best groups."""
    left = _group_scores(choice, keys, places, inside, SIZE, GROUPS, SUM, DTYPE, BT, BE, BG)
    numbers = tl.arange(0, BG)[None, :]
    out = inside & tl.full([BT, BE], 1, tl.int1)
    for _ in range(TOP):
        g = _best(left, numbers, BG)[:, None]
        out = out & (places // SIZE != g)
        left = tl.where(numbers == g, LOWEST, left)
    return out


@triton.jit
def _normalized(
    picked, used, NORMALIZE: tl.constexpr, EPS: tl.constexpr, CLAMPS: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    if NORMALIZE == "softmax":
        e = tl.where(used, tl.exp(picked - tl.max(tl.where(used, picked, float("-inf")), 1)[:, None]), 0.0)
        picked = _rounded(e / tl.sum(e, 1)[:, None], DTYPE)
    elif NORMALIZE == "sum":
        total = _rounded(tl.sum(tl.where(used, picked, 0.0), 1), DTYPE)
        if CLAMPS:
            total = _rounded(tl.where(total < EPS, EPS, total), DTYPE)
        elif EPS != 0.0:
            total = _rounded(total + EPS, DTYPE)
        picked = _rounded(picked / total[:, None], DTYPE)
    if SCALE != 1.0:
        picked = _rounded(picked * SCALE, DTYPE)
    return picked


@triton.jit
def route_kernel(
    logits, bias, weights, ids, T, stride_t, stride_e, E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, NORMALIZE: tl.constexpr,
    EPS: tl.constexpr, CLAMPS: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr, SUM: tl.constexpr,
    FILL: tl.constexpr, BIASED: tl.constexpr, OF_CHOICE: tl.constexpr, SCORES: tl.constexpr, CHOICES: tl.constexpr, BT: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """weights [T, K], ids [T, K] of logits [T, E] and bias [E]. SCORES, CHOICES: the dtypes of scores, and of them with the bias."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    places = tl.arange(0, BE)[None, :]
    inside = (places < E) & (rows < T)
    x = tl.load(logits + (rows.to(tl.int64) * stride_t + places * stride_e), mask=inside, other=0.0).to(tl.float32)
    scores = _scores(_rounded(x, SCORES), places < E, SCORE, SCORES)
    choice = scores
    if BIASED:
        choice = _rounded(scores + tl.load(bias + places, mask=places < E, other=0.0).to(tl.float32), CHOICES)
    keys = tl.where(places < E, _keys(choice), LOWEST)
    if GROUPS > 1:
        out = _outside(choice, keys, places, places < E, E // GROUPS, GROUPS, TOP, SUM, CHOICES, BT, BE, BG)
        choice = _rounded(tl.where(out, FILL, choice), CHOICES)
        keys = tl.where(places < E, _keys(choice), LOWEST)
    weighing = choice if OF_CHOICE else scores
    slots = tl.arange(0, BK)[None, :]
    picked = tl.zeros([BT, BK], tl.float32)
    chosen = tl.zeros([BT, BK], tl.int32)
    for k in range(K):
        best = _best(keys, places, BE)[:, None]
        value = tl.sum(tl.where(places == best, weighing, 0.0), 1)[:, None]
        picked = tl.where(slots == k, value, picked)
        chosen = tl.where(slots == k, best, chosen)
        keys = tl.where(places == best, LOWEST, keys)
    picked = _normalized(picked, slots < K, NORMALIZE, EPS, CLAMPS, SCALE, CHOICES if OF_CHOICE else SCORES)
    at = rows.to(tl.int64) * K + slots
    given = (slots < K) & (rows < T)
    tl.store(weights + at, picked.to(weights.dtype.element_ty), mask=given)
    tl.store(ids + at, chosen.to(tl.int64), mask=given)
