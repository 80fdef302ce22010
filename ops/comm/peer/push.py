"""Kernels of dispatch and send: each token's row into the memory of each rank that has one of its experts.

PHASE splits an op for tests that run the ranks one after the other in one process: 0 is the whole op, 1 its sending half, 2 its
waiting half.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .signals import ARRIVED, HIGH, IDS, LAST_PUSH, OP, PUSHED, ROWS, SCALES, STARTED, WEIGHTS, arrive, rows_of, tell_all, wait_for_peers


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _ranks_of(ids, t_N, T, E: tl.constexpr, EL: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """int64 [N]: bit d is set where one of the token's experts lives on rank d."""
    k_1K = tl.arange(0, KP)[None, :]
    t_N1 = t_N[:, None]
    expert = tl.load(ids + t_N1.to(tl.int64) * K + k_1K, mask=(t_N1 < T) & (k_1K < K), other=-1).to(tl.int32)
    valid = (expert >= 0) & (expert < E)
    bit = valid.to(tl.int32) << (tl.where(valid, expert, 0) // EL)
    return tl.reduce(bit, 1, _or).to(tl.int64)


@triton.jit
def _fields(bits):
    """Bits 0..3 as 0 or 1 in four 16-bit fields, so that one sum counts for four ranks."""
    return (bits & 1) | ((bits & 2) << 15) | ((bits & 4) << 30) | ((bits & 8) << 45)


@triton.jit
def _field(low, high, d):
    return ((tl.where(d < 4, low, high) >> (16 * (d & 3)).to(tl.int64)) & 0xFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["T"])
def plan_kernel(
    ids, table, T, W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, EL: tl.constexpr, BT: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """table int32 [T+2, W]: rows 0..T-1 the token's place among those for that rank, or -1; row T their number. BT tokens a program."""
    p = tl.program_id(0)
    low, high = _count_before(ids, T, p * BT, W, K, KP, E, EL, BEFORE)
    t = p * BT + tl.arange(0, BT)
    bits = _ranks_of(ids, t, T, E, EL, K, KP)
    one_low, one_high = _fields(bits), _fields(bits >> 4)
    to_low, to_high = low + tl.cumsum(one_low, 0), high + tl.cumsum(one_high, 0)
    for d in tl.static_range(W):
        place = _field(to_low, to_high, p * 0 + d) - 1
        tl.store(table + t * W + d, tl.where(((bits >> d) & 1) != 0, place, -1), mask=t < T)
        if p == tl.num_programs(0) - 1:
            tl.store(table + T * W + d, tl.max(place) + 1)


@triton.jit
def _count_before(
    ids, T, stop, W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, EL: tl.constexpr, BEFORE: tl.constexpr
):
    """Tokens < stop for each rank, in 16-bit fields."""
    low = tl.zeros([BEFORE], tl.int64)
    high = tl.zeros([BEFORE], tl.int64)
    first = stop * 0
    while first < stop:
        bits = _ranks_of(ids, first + tl.arange(0, BEFORE), stop, E, EL, K, KP)
        low += _fields(bits)
        high += _fields(bits >> 4)
        first += BEFORE
    return tl.sum(low), tl.sum(high)


@triton.jit
def _quantised(values, BLOCK: tl.constexpr):
    """e4m3 [BLOCK] and the float32 scale of each 128 columns: NaN where one of them is infinite or NaN, so that all of them are."""
    groups = tl.reshape(values.to(tl.float32), [BLOCK // 128, 128])
    most = tl.maximum(tl.max(tl.where(groups == groups, tl.abs(groups), float("inf")), axis=1), 1e-20)
    scale = most / 448.0 + (most - most)
    inverse = 448.0 / most
    payload = groups * inverse[:, None]
    payload = tl.minimum(tl.maximum(payload, -448.0), 448.0).to(tl.float8e4nv)
    return tl.reshape(payload, [BLOCK]), scale


@triton.jit
def _store_row(
    values, addresses, table, t, split, rank, M, low, high, own, W: tl.constexpr, H: tl.constexpr, COLS: tl.constexpr,
    BLOCK: tl.constexpr, FUSED: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    """Columns split*COLS.. of token t to every rank that wants it, starting after this rank so that no link is everybody's first."""
    cols = split * COLS + tl.arange(0, BLOCK)
    inside = (cols < H) & (cols < split * COLS + COLS)
    if QUANT:
        values, scale = _quantised(values, BLOCK)
        group = split * (COLS // 128) + tl.arange(0, BLOCK // 128)
    for i in tl.static_range(W):
        d = (rank + 1 + i + t) % W
        if FUSED:  # noqa: SIM108  decided when compiled
            place = tl.where(((own >> d.to(tl.int64)) & 1) != 0, _field(low, high, d), -1)
        else:
            place = tl.load(table + t * W + d)
        if place >= 0:
            row = (rank * M + place).to(tl.int64)
            tl.store(rows_of(addresses, ROWS, d, tl.pointer_type(values.dtype), W) + row * H + cols, values, mask=inside)
            if QUANT:
                to = rows_of(addresses, SCALES, d, tl.pointer_type(tl.float32), W)
                tl.store(to + row * (H // 128) + group, scale, mask=(group < H // 128) & (group < (split + 1) * (COLS // 128)))


@triton.jit
def _store_meta(
    ids, weights_0, weights_1, addresses, table, t, rank, M, low, high, own, W: tl.constexpr, WP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, E: tl.constexpr, EL: tl.constexpr, NW: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """The token's ids and weights to every rank that gets its row; ids of other ranks' experts as -1. Writes the token's table row."""
    k = tl.arange(0, KP)
    at = t.to(tl.int64) * K + k
    expert = tl.load(ids + at, mask=k < K, other=-1).to(tl.int32)
    peer = tl.arange(0, WP)
    if FUSED:
        place = tl.where((((own >> peer.to(tl.int64)) & 1) != 0) & (peer < W), _field(low, high, peer), -1)
        tl.store(table + t * W + peer, place, mask=peer < W)
    else:
        place = tl.load(table + t * W + peer, mask=peer < W, other=-1)
    local = ((expert >= 0) & (expert < E))[None, :] & ((expert // EL)[None, :] == peer[:, None])
    to = (rank * M + place).to(tl.int64)[:, None] * K + k[None, :]
    here = (place >= 0)[:, None] & (k < K)[None, :]
    theirs = tl.load(addresses + IDS * W + peer, mask=peer < W, other=0).to(tl.pointer_type(tl.int32))
    tl.store(theirs[:, None] + to, tl.where(local, (expert[None, :] - peer[:, None] * EL), -1), mask=here)
    if NW > 0:
        _store_weights(weights_0, addresses, WEIGHTS, at, k, local, to, here, W, WP, K)
    if NW > 1:
        _store_weights(weights_1, addresses, WEIGHTS + 1, at, k, local, to, here, W, WP, K)


@triton.jit
def _store_weights(weights, addresses, region, at, k, local, to, here, W: tl.constexpr, WP: tl.constexpr, K: tl.constexpr):
    peer = tl.arange(0, WP)
    weight = tl.load(weights + at, mask=k < K, other=0.0)
    theirs = tl.load(addresses + region * W + peer, mask=peer < W, other=0).to(weights.dtype)
    tl.store(theirs[:, None] + to, tl.where(local, weight[None, :], 0.0), mask=here)


@triton.jit
def _fill_holes(addresses, state, now_W, M, rank, W: tl.constexpr, WP: tl.constexpr, K: tl.constexpr):
    """ids -1 in the rows that the last dispatch filled and this one did not, of all peers at once."""
    own = rows_of(addresses, IDS, rank, tl.pointer_type(tl.int32), W)
    peer = tl.arange(0, WP)
    before_W = tl.load(state + HIGH + peer, mask=peer < W, other=0).to(tl.int32)
    lane = tl.arange(0, 64)[None, :]
    start = (peer * M).to(tl.int64) * K + now_W * K
    holes_W = (before_W - now_W) * K
    most = tl.max(holes_W)
    first = most * 0
    while first < most:
        at = start[:, None] + first + lane
        tl.store(own + at, tl.full([WP, 64], -1, tl.int32), mask=first + lane < holes_W[:, None])
        first += 64
    tl.store(state + HIGH + peer, now_W.to(tl.int64), mask=peer < W)


@triton.jit
def _finish_push(
    addresses, table, state, status, T, M, rank, op, timeout_ns, W: tl.constexpr,
    WP: tl.constexpr, K: tl.constexpr, META: tl.constexpr, TIMER: tl.constexpr,
):  # fmt: skip
    level = op << 32
    seen, _ = wait_for_peers(addresses, PUSHED, level, rank, state, status, timeout_ns, W, WP, 1, TIMER)
    peer = tl.arange(0, WP)
    here = tl.where(seen >= level, seen & 0xFFFFFFFF, 0).to(tl.int32)
    tl.store(table + (T + 1) * W + peer, here, mask=peer < W)
    if META:
        _fill_holes(addresses, state, here, M, rank, W, WP, K)
    tl.store(state + LAST_PUSH, op)
    tl.store(state + OP, op)
    tl.store(state + ARRIVED, 0)


@triton.jit(do_not_specialize=["T", "M", "rank", "timeout_ns"])
def push_kernel(
    source, ids, weights_0, weights_1, table, addresses, state, status, T, M, rank,
    timeout_ns, W: tl.constexpr, WP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, EL: tl.constexpr,
    H: tl.constexpr, SPLITS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, FUSED: tl.constexpr,
    META: tl.constexpr, NW: tl.constexpr, QUANT: tl.constexpr, PHASE: tl.constexpr, TIMER: tl.constexpr,
):  # fmt: skip
    """One dispatch: rows of source [T, H] to the ranks of their experts, then a signal with their number, then the wait for the peers'.

    Program 0 only counts and tells; the others take (token, part of the row) in turn; the last to end signals and waits. FUSED finds
    the table [T+2, W] itself (T <= BT), else its rows 0..T are given. Row T+1 (rows that came from each rank) is written in any case.
    """
    pid = tl.program_id(0)
    op = tl.load(state + OP) + 1
    if PHASE == 2:
        _finish_push(addresses, table, state, status, T, M, rank, op, timeout_ns, W, WP, K, META, TIMER)
    else:
        lane = tl.arange(0, BT)
        bits = tl.zeros([BT], tl.int64)
        if FUSED:
            bits = _ranks_of(ids, lane, T, E, EL, K, KP)
        if pid == 0:
            tell_all(addresses, STARTED, rank, op, W, WP)
            if FUSED:
                low, high = tl.sum(_fields(bits)), tl.sum(_fields(bits >> 4))
                for d in tl.static_range(W):
                    tl.store(table + T * W + d, _field(low, high, pid + d))
        else:
            if PHASE == 0:  # noqa: SIM102  decided when compiled
                if tl.load(state + LAST_PUSH) == op - 1:
                    wait_for_peers(addresses, STARTED, op, rank, state, status, timeout_ns, W, WP, 3, TIMER)
            item = pid - 1
            while item < T * SPLITS:
                t = item // SPLITS
                split = item % SPLITS
                low = op * 0
                high = op * 0
                own = op * 0
                if FUSED:
                    before = lane < t
                    low = tl.sum(tl.where(before, _fields(bits), 0))
                    high = tl.sum(tl.where(before, _fields(bits >> 4), 0))
                    own = tl.sum(tl.where(lane == t, bits, 0))
                cols = split * COLS + tl.arange(0, BLOCK)
                inside = (cols < H) & (cols < split * COLS + COLS)
                values = tl.load(source + t.to(tl.int64) * H + cols, mask=inside, other=0.0)
                if META:  # noqa: SIM102  decided when compiled
                    if split == 0:
                        _store_meta(
                            ids, weights_0, weights_1, addresses, table, t, rank, M, low, high, own, W, WP, K, KP, E, EL, NW, FUSED
                        )  # fmt: skip
                _store_row(values, addresses, table, t, split, rank, M, low, high, own, W, H, COLS, BLOCK, FUSED, QUANT)
                item += tl.num_programs(0) - 1
        if arrive(state) == tl.num_programs(0) - 1:
            peer = tl.arange(0, WP)
            sent = tl.load(table + T * W + peer, mask=peer < W, other=0)
            tell_all(addresses, PUSHED, rank, (op << 32) | sent.to(tl.int64), W, WP)
            if PHASE == 0:
                _finish_push(addresses, table, state, status, T, M, rank, op, timeout_ns, W, WP, K, META, TIMER)
            else:
                tl.store(state + ARRIVED, 0)
