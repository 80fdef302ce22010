"""Kernels of the batched format: a row for every slot, sorted by expert where it arrives, and back. PHASE: as in push.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .collect import begin_collect, draw, finish_collect
from .signals import (
    ARRIVED,
    BACK,
    BATCHED,
    COUNTED,
    COUNTS,
    LANDED,
    LAST_PUSH,
    OP,
    PUSHED,
    SOURCES,
    arrive,
    rows_of,
    tell_all,
    wait,
    wait_for_peers,
    words_of,
)


@triton.jit
def _count_slots(ids, slots, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr):
    """int32 [EP]: how many of the ids [slots] name each expert."""
    counts = tl.zeros([EP], tl.int32)
    lane = tl.arange(0, BN)
    first = slots * 0
    while first < slots:
        expert = tl.load(ids + first + lane, mask=first + lane < slots, other=-1).to(tl.int32)
        valid = (expert >= 0) & (expert < E)
        counts += tl.histogram(tl.where(valid, expert, 0), EP, mask=valid)
        first += BN
    return counts


@triton.jit
def _tell_counts(ids, addresses, slots, rank, op, W: tl.constexpr, WP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr):
    """This rank's slots of every expert to all ranks, in the buffer of odd or even ops."""
    counts = _count_slots(ids, slots, E, EP, BN)
    expert = tl.arange(0, EP)
    for d in tl.static_range(W):
        to = rows_of(addresses, COUNTS, (rank + d) % W, tl.pointer_type(tl.int32), W)
        tl.store(to + ((op % 2) * W + rank) * E + expert, counts, mask=expert < E)
    tl.debug_barrier()
    tell_all(addresses, COUNTED, rank, op, W, WP)


@triton.jit
def _batched_places(
    ids, addresses, t, slots, rank, op, W: tl.constexpr, WP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Where the token's slots stand in their experts' rows: after those of lower ranks and of earlier slots. Experts [KP], or E."""
    k = tl.arange(0, KP)
    expert = tl.load(ids + t * K + k, mask=k < K, other=-1).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < E), expert, E)
    n = tl.arange(0, BN)[:, None]
    every = tl.load(ids + n, mask=n < slots, other=-1).to(tl.int32)
    place = tl.sum(((every == expert[None, :]) & (n < t * K + k[None, :])).to(tl.int32), axis=0)
    src = tl.arange(0, WP)[:, None]
    counts = rows_of(addresses, COUNTS, rank, tl.pointer_type(tl.int32), W) + (op % 2) * W * E
    earlier = tl.load(counts + src * E + expert[None, :], mask=(src < rank) & (expert[None, :] < E), other=0)
    return expert, place + tl.sum(earlier, axis=0)


@triton.jit
def _push_slots(
    source, addresses, t, expert_K, place_K, rank, M, C, W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr,
    EL: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token's row to each of its experts, and from where it came; nothing beyond the capacity C."""
    k_K = tl.arange(0, KP)
    cols = tl.arange(0, BLOCK)
    values = tl.load(source + t.to(tl.int64) * H + cols, mask=cols < H, other=0.0)
    for i in tl.static_range(K):
        k = (t + rank + i) % K
        expert = tl.sum(tl.where(k_K == k, expert_K, 0))
        place = tl.sum(tl.where(k_K == k, place_K, 0))
        if (expert < E) & (place < C):
            d = expert // EL
            row = (expert % EL).to(tl.int64) * C + place
            tl.store(rows_of(addresses, BATCHED, d, source.dtype, W) + row * H + cols, values, mask=cols < H)
            tl.store(rows_of(addresses, SOURCES, d, tl.pointer_type(tl.int32), W) + row, rank * M * K + t * K + k)


@triton.jit
def _total_counts(addresses, counts, status, rank, op, C, W: tl.constexpr, E: tl.constexpr, EL: tl.constexpr, EP: tl.constexpr):
    """counts [EL] of this rank's experts, and the number of rows that no rank has room for: the same on all ranks."""
    expert = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    of = rows_of(addresses, COUNTS, rank, tl.pointer_type(tl.int32), W) + (op % 2) * W * E
    for src in tl.static_range(W):
        total += tl.load(of + src * E + expert, mask=expert < E, other=0)
    mine = (expert // EL == rank) & (expert < E)
    tl.store(counts + expert - rank * EL, tl.minimum(total, C), mask=mine)
    beyond = tl.arange(0, EP)
    tl.store(counts + beyond, tl.zeros([EP], tl.int32), mask=(beyond < EL) & (beyond + rank * EL >= E))
    dropped = tl.sum(tl.maximum(total - C, 0)).to(tl.int64)
    if dropped > 0:
        tl.store(status + 3, tl.load(status + 3) + dropped)


@triton.jit(do_not_specialize=["T", "M", "C", "rank", "timeout_ns"])
def push_batched_kernel(
    source, ids, places, counts, addresses, state, status, T, M, C, rank, timeout_ns, W: tl.constexpr, WP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, EL: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    PHASE: tl.constexpr, TIMER: tl.constexpr,
):  # fmt: skip
    """One batched dispatch: a row for every slot, to [expert, place]. PHASE 1 tells the counts, 2 sends the rows, 3 waits for them.

    places int32 [T, K] (expert * C + place; -1: no expert, or dropped) and counts int32 [EL] are written. BN >= T*K.
    """
    pid = tl.program_id(0)
    op = tl.load(state + OP) + 1
    if (PHASE <= 1) & (pid == 0):
        _tell_counts(ids, addresses, T * K, rank, op, W, WP, E, EP, BN)
    if (PHASE == 0) | (PHASE == 2):
        wait_for_peers(addresses, COUNTED, op, rank, state, status, timeout_ns, W, WP, 4, TIMER)
        t = pid - 1
        while (t >= 0) & (t < T):
            k = tl.arange(0, KP)
            expert, place = _batched_places(ids, addresses, t, T * K, rank, op, W, WP, K, KP, E, BN)
            tl.store(places + t * K + k, tl.where((expert < E) & (place < C), expert * C + place, -1), mask=k < K)
            _push_slots(source, addresses, t, expert, place, rank, M, C, W, K, KP, E, EL, H, BLOCK)
            t += tl.num_programs(0) - 1
        if arrive(state) == tl.num_programs(0) - 1:
            _total_counts(addresses, counts, status, rank, op, C, W, E, EL, EP)
            tell_all(addresses, PUSHED, rank, op << 32, W, WP)
            tl.store(state + ARRIVED, 0)
            if PHASE == 0:
                _finish_batched(addresses, state, status, rank, op, timeout_ns, W, WP, TIMER)
    if PHASE == 3:
        _finish_batched(addresses, state, status, rank, op, timeout_ns, W, WP, TIMER)


@triton.jit
def _finish_batched(addresses, state, status, rank, op, timeout_ns, W: tl.constexpr, WP: tl.constexpr, TIMER: tl.constexpr):
    wait_for_peers(addresses, PUSHED, op << 32, rank, state, status, timeout_ns, W, WP, 1, TIMER)
    tl.store(state + LAST_PUSH, op)
    tl.store(state + OP, op)


@triton.jit
def _return_slot(
    rows, counts, addresses, M, C, rank, u, W: tl.constexpr, K: tl.constexpr, EL: tl.constexpr, EQ: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The u-th row of all experts back to its token's rank, to place t*K+k there. Returns both."""
    expert = tl.arange(0, EQ)
    held = tl.load(counts + expert, mask=expert < EL, other=0)
    before = (tl.cumsum(held, 0) <= u) & (expert < EL)
    row = tl.sum(before.to(tl.int32)).to(tl.int64) * C + u - tl.sum(tl.where(before, held, 0))
    source = tl.load(rows_of(addresses, SOURCES, rank, tl.pointer_type(tl.int32), W) + row)
    src = source // (M * K)
    slot = source % (M * K)
    cols = tl.arange(0, BLOCK)
    value = tl.load(rows + row * WIDTH + cols, mask=cols < WIDTH, other=0.0)
    tl.store(rows_of(addresses, BACK, src, rows.dtype, W) + slot.to(tl.int64) * WIDTH + cols, value, mask=cols < WIDTH)
    return src, slot


@triton.jit
def _sum_slots(
    rows, places, weights, out, addresses, state, status, rank, op, t, C, timeout_ns, W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    EL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TIMER: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k weights[t, k] * row of slot (t, k), in float32, once they are all here."""
    k = tl.arange(0, KP)
    place = tl.load(places + t * K + k, mask=k < K, other=-1)
    words = words_of(addresses, LANDED, rank, t * K + k, W)
    _, good = wait(words, place >= 0, op, place // (C * EL), state, status, timeout_ns, 2, TIMER)
    cols = tl.arange(0, BLOCK)
    back = rows_of(addresses, BACK, rank, rows.dtype, W)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(K):
        here = tl.load(places + t * K + i) >= 0
        weight = tl.where(here, tl.load(weights + t * K + i), 0.0)
        total += weight * tl.load(back + (t * K + i).to(tl.int64) * WIDTH + cols, mask=(cols < WIDTH) & here, other=0.0).to(tl.float32)
    total = tl.where(good > 0, total, float("nan"))
    tl.store(out + t.to(tl.int64) * WIDTH + cols, total.to(out.dtype.element_ty), mask=cols < WIDTH)


@triton.jit(do_not_specialize=["T", "M", "C", "rank", "timeout_ns"])
def collect_batched_kernel(
    rows, places, counts, weights, out, addresses, state, status, T, M, C, rank, timeout_ns, W: tl.constexpr, WP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, EL: tl.constexpr, EQ: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PHASE: tl.constexpr,
    TIMER: tl.constexpr,
):  # fmt: skip
    """One batched collect: rows [EL, C, O] back to their slots, weighted and added up there. Items as in collect_kernel, rows first."""
    op, item = begin_collect(addresses, state, status, rank, timeout_ns, W, WP, PHASE, TIMER)
    expert = tl.arange(0, EQ)
    units = tl.sum(tl.load(counts + expert, mask=expert < EL, other=0))
    tiles = T
    if PHASE == 1:
        tiles = 0
    if PHASE == 2:
        units = 0
    while item < units + tiles:
        if item < units:
            src, slot = _return_slot(rows, counts, addresses, M, C, rank, item, W, K, EL, EQ, WIDTH, BLOCK)
            item = draw(state)  # while the row is on its way
            tl.debug_barrier()
            tl.atomic_xchg(words_of(addresses, LANDED, src, slot, W), op, sem="release", scope="sys")
        else:
            t = item - units
            item = draw(state)
            _sum_slots(rows, places, weights, out, addresses, state, status, rank, op, t, C, timeout_ns, W, K, KP, EL, WIDTH, BLOCK, TIMER)
    finish_collect(addresses, state, status, rank, op, timeout_ns, W, WP, PHASE, TIMER)
