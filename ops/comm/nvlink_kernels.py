"""Triton kernels of the nvlink exchange. Every rank runs the same sequence of operations ("ops", numbered from 1 on the device).

Addresses of peers' memory come as int64 [regions, W] (see REGIONS); signals are int64 words that only grow. PHASE splits an op for
tests that run the ranks one after the other in one process: 0 is the whole op, 1 its sending half, 2 its waiting half.
The argument why no rank overwrites what another still reads stands in nvlink.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

# Regions of the workspace, in the order of the address table.
REGIONS = (
    "started", "pushed", "landed", "ids", "weights_0", "weights_1", "scales", "rows", "back", "counts", "counted", "sources", "batched",
)  # fmt: skip
STARTED = tl.constexpr(0)  # [W] the op that each peer has begun
PUSHED = tl.constexpr(1)  # [W] op << 32 | rows, once all rows of that peer are here
LANDED = tl.constexpr(2)  # [W*M] (batched: [M*K]) the op whose row of `back` is here
IDS = tl.constexpr(3)  # int32 [W*M, K]
WEIGHTS = tl.constexpr(4)  # float32 [W*M, K], two of them
SCALES = tl.constexpr(6)  # float32 [W*M, H/128]
ROWS = tl.constexpr(7)  # [W*M, H]
BACK = tl.constexpr(8)  # [W*M, O] (batched: [M*K, O])
COUNTS = tl.constexpr(9)  # int32 [2, W, E] slots of each expert on each rank, of odd and even ops
COUNTED = tl.constexpr(10)  # [W] the op whose counts are here
SOURCES = tl.constexpr(11)  # int32 [EL, C] where a batched row came from: rank * M*K + slot
BATCHED = tl.constexpr(12)  # [EL, C, H]

# Words of this rank's own state.
OP = tl.constexpr(0)
LAST_PUSH = tl.constexpr(1)
LAST_COLLECT = tl.constexpr(2)
ARRIVED = tl.constexpr(3)
BROKEN = tl.constexpr(4)
CLOCK = tl.constexpr(5)
TICKET = tl.constexpr(6)
HIGH = tl.constexpr(8)  # [W] rows of each peer whose ids are not yet -1 again

POLLS = tl.constexpr(64)  # between two looks at the clock


@triton.jit
def _address(addresses, region, peer, W: tl.constexpr):
    return tl.load(addresses + region * W + peer)


@triton.jit
def _rows_of(addresses, region, peer, like: tl.constexpr, W: tl.constexpr):
    """A peer's region as a pointer of like's type; without the hint Triton emits scalar stores to it."""
    return tl.multiple_of(_address(addresses, region, peer, W).to(like), 16)


@triton.jit
def _words_of(addresses, region, peer, index, W: tl.constexpr):
    return _address(addresses, region, peer, W).to(tl.pointer_type(tl.int64)) + index


@triton.jit
def _tell_all(addresses, region, rank, value, W: tl.constexpr, WP: tl.constexpr):
    """value (one, or one a peer) into word `rank` of the region on every peer, after everything this program wrote or acquired."""
    peer = tl.arange(0, WP)
    base = tl.load(addresses + region * W + peer, mask=peer < W, other=0)
    words = base.to(tl.pointer_type(tl.int64)) + rank
    tl.atomic_xchg(words, tl.zeros([WP], tl.int64) + value, mask=peer < W, sem="release", scope="sys")


@triton.jit
def _clock(state):
    """Nanoseconds, the same in all threads: an atomic runs in one of them and is broadcast. The value is the last caller's."""
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    return tl.atomic_max(state + CLOCK, now, sem="relaxed", scope="gpu")


@triton.jit
def _give_up(late, peer, state, status, STAGE: tl.constexpr):
    tl.store(status + 1, tl.min(tl.where(late, peer, 1 << 20)).to(tl.int64))
    tl.store(status + 2, tl.load(state + OP) + 1)
    tl.store(status, STAGE)
    tl.store(state + BROKEN, 1)


@triton.jit
def _wait(words, mask, level, peer, state, status, timeout_ns, STAGE: tl.constexpr, TIMER: tl.constexpr):
    """Until every masked word (own memory, written by `peer`) is >= level, then all that its writer released is visible.

    Returns the words and 1, or 0 if the time ran out (at once if it ever did before).
    """
    none = tl.zeros(mask.shape, tl.int64)
    seen = tl.atomic_add(words, none, mask=mask, sem="acquire", scope="sys")
    waiting = tl.max((mask & (seen < level)).to(tl.int32))
    polls = 0
    start = tl.load(state + BROKEN) * 0
    good = 1
    while waiting > 0:
        seen = tl.atomic_add(words, none, mask=mask, sem="acquire", scope="sys")
        waiting = tl.max((mask & (seen < level)).to(tl.int32))
        polls += 1
        if polls % POLLS == 0:
            late = waiting > 0
            if TIMER:
                now = _clock(state)
                if polls == POLLS:
                    start = _clock(state)
                elif tl.load(state + BROKEN) == 0:
                    late = late & (now - start > timeout_ns)
            if late & ((polls > POLLS) | (not TIMER)):
                _give_up(mask & (seen < level), peer, state, status, STAGE)
                good = 0
                waiting = 0
    tl.debug_barrier()
    return seen, good


@triton.jit
def _wait_for_peers(
    addresses, region, level, rank, state, status, timeout_ns, W: tl.constexpr, WP: tl.constexpr,
    STAGE: tl.constexpr, TIMER: tl.constexpr,
):  # fmt: skip
    peer = tl.arange(0, WP)
    words = _words_of(addresses, region, rank, peer, W)
    return _wait(words, peer < W, level, peer, state, status, timeout_ns, STAGE, TIMER)


@triton.jit
def _arrive(state):
    """Number of programs that ended before this one. The last sees, and may release, what all of them wrote."""
    tl.debug_barrier()
    before = tl.atomic_add(state + ARRIVED, 1, sem="acq_rel", scope="sys")
    tl.debug_barrier()
    return before


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
    """e4m3 [BLOCK] and the float32 scale of each 128 columns."""
    groups = tl.reshape(values.to(tl.float32), [BLOCK // 128, 128])
    most = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-20)
    scale = most / 448.0
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
            tl.store(_rows_of(addresses, ROWS, d, tl.pointer_type(values.dtype), W) + row * H + cols, values, mask=inside)
            if QUANT:
                to = _rows_of(addresses, SCALES, d, tl.pointer_type(tl.float32), W)
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
    own = _rows_of(addresses, IDS, rank, tl.pointer_type(tl.int32), W)
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
    seen, _ = _wait_for_peers(addresses, PUSHED, level, rank, state, status, timeout_ns, W, WP, 1, TIMER)
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
            _tell_all(addresses, STARTED, rank, op, W, WP)
            if FUSED:
                low, high = tl.sum(_fields(bits)), tl.sum(_fields(bits >> 4))
                for d in tl.static_range(W):
                    tl.store(table + T * W + d, _field(low, high, pid + d))
        else:
            if PHASE == 0:  # noqa: SIM102  decided when compiled
                if tl.load(state + LAST_PUSH) == op - 1:
                    _wait_for_peers(addresses, STARTED, op, rank, state, status, timeout_ns, W, WP, 3, TIMER)
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
        if _arrive(state) == tl.num_programs(0) - 1:
            peer = tl.arange(0, WP)
            sent = tl.load(table + T * W + peer, mask=peer < W, other=0)
            _tell_all(addresses, PUSHED, rank, (op << 32) | sent.to(tl.int64), W, WP)
            if PHASE == 0:
                _finish_push(addresses, table, state, status, T, M, rank, op, timeout_ns, W, WP, K, META, TIMER)
            else:
                tl.store(state + ARRIVED, 0)


@triton.jit
def _row_to_return(rows, places, weights, row, cols, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """Row `row` of rows [R, O]; or (SLOTS) sum_k weights[row, k] * rows[places[row, k]] in float32, places -1 left out."""
    if SLOTS:
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            place = tl.load(places + row * K + k).to(tl.int64)
            weight = tl.load(weights + row * K + k)
            value = tl.load(rows + place * WIDTH + cols, mask=(cols < WIDTH) & (place >= 0), other=0.0)
            total += tl.where(place >= 0, weight, 0.0) * value.to(tl.float32)
        value = total.to(rows.dtype.element_ty)
    else:
        value = tl.load(rows + row * WIDTH + cols, mask=cols < WIDTH, other=0.0)
    return value


@triton.jit
def _rows_of_unit(table, T, rank, u, unit, W: tl.constexpr, SLOTS: tl.constexpr):
    """Unit u: the rank its rows came from, and the first and last of them."""
    peers: tl.constexpr = W if SLOTS or W == 1 else W - 1
    group = u // peers
    src = (rank + 1 + (u + group) % peers) % W
    first = group * unit
    return src, first, tl.minimum(first + unit, tl.load(table + (T + 1) * W + src))


@triton.jit
def _return_rows(
    rows, places, weights, addresses, M, rank, src, first, stop, W: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    to = _rows_of(addresses, BACK, src, rows.dtype, W)
    j = first
    while j < stop:
        value = _row_to_return(rows, places, weights, (src * M + j).to(tl.int64), cols, K, WIDTH, BLOCK, SLOTS)
        tl.store(to + (rank * M + j).to(tl.int64) * WIDTH + cols, value, mask=cols < WIDTH)
        j += 1


@triton.jit
def _flag_rows(addresses, M, rank, op, src, first, stop, W: tl.constexpr, UP: tl.constexpr):
    """Tells their rank that rows first..stop are back, after all that this program stored."""
    tl.debug_barrier()
    j_U = first + tl.arange(0, UP)
    words = _words_of(addresses, LANDED, src, rank * M + j_U, W)
    tl.atomic_xchg(words, tl.zeros([UP], tl.int64) + op, mask=j_U < stop, sem="release", scope="sys")


@triton.jit
def _kind_of_item(item, units, tiles, peers, ahead):
    """Which unit, or -1, and which tile the item is: `ahead` groups of units first, then a tile after each group, then the rest."""
    groups = units // peers
    lead = tl.minimum(ahead, groups)
    mixed = tl.minimum(groups - lead, tiles)
    inside = item - lead * peers
    after = inside - mixed * (peers + 1)
    rest = units - (lead + mixed) * peers
    turn = inside // (peers + 1)
    step = inside % (peers + 1)
    unit = tl.where(step < peers, (lead + turn) * peers + step, -1)
    tile = turn
    unit = tl.where(after >= 0, tl.where(after < rest, (lead + mixed) * peers + after, -1), unit)
    tile = tl.where(after >= 0, mixed + after - rest, tile)
    return tl.where(inside < 0, item, unit), tile


@triton.jit
def _sum_tile(
    rows, table, out, addresses, state, status, T, M, rank, op, v, timeout_ns,
    W: tl.constexpr, WP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
    TIMER: tl.constexpr,
):  # fmt: skip
    """BT tokens: waits for their rows from all ranks, then adds them up in float32. NaN if a row did not come in time."""
    t_T1 = (v * BT + tl.arange(0, BT))[:, None]
    d_1W = tl.arange(0, WP)[None, :]
    place_TW = tl.load(table + t_T1 * W + d_1W, mask=(t_T1 < T) & (d_1W < W), other=-1)
    words = _words_of(addresses, LANDED, rank, d_1W * M + place_TW, W)
    awaited = (place_TW >= 0) & ((d_1W != rank) | SLOTS)
    _, good = _wait(words, awaited, op, d_1W + 0 * t_T1, state, status, timeout_ns, 2, TIMER)
    cols = tl.arange(0, BLOCK)
    back = _rows_of(addresses, BACK, rank, rows.dtype, W)
    t = v * BT
    while t < tl.minimum(v * BT + BT, T):
        total = tl.zeros([BLOCK], tl.float32)
        for d in tl.static_range(W):
            place = tl.load(table + t * W + d)
            row = (d * M + place).to(tl.int64)
            base = back if SLOTS else tl.multiple_of(tl.where(d == rank, rows.to(tl.int64), back.to(tl.int64)).to(rows.dtype), 16)
            total += tl.load(base + row * WIDTH + cols, mask=(cols < WIDTH) & (place >= 0), other=0.0).to(tl.float32)
        total = tl.where(good > 0, total, float("nan"))
        tl.store(out + t.to(tl.int64) * WIDTH + cols, total.to(out.dtype.element_ty), mask=cols < WIDTH)
        t += 1


@triton.jit
def _finish_collect(
    addresses, state, status, rank, op, timeout_ns, W: tl.constexpr, WP: tl.constexpr, PHASE: tl.constexpr, TIMER: tl.constexpr
):
    """One program makes sure that all peers have begun this op; the last to end counts it. Rows were released with their flags."""
    pid = tl.program_id(0)
    if (PHASE != 1) & (pid == tl.num_programs(0) - 1):
        _wait_for_peers(addresses, STARTED, op, rank, state, status, timeout_ns, W, WP, 2, TIMER)
    tl.debug_barrier()
    if tl.atomic_add(state + ARRIVED, 1, sem="relaxed", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(state + ARRIVED, 0)
        tl.store(state + TICKET, 0)
        if PHASE != 1:
            tl.store(state + LAST_COLLECT, op)
            tl.store(state + OP, op)


@triton.jit
def _draw(state):
    """The next item: whoever runs takes it, so that one running program is enough."""
    return tl.atomic_add(state + TICKET, 1, sem="relaxed", scope="gpu").to(tl.int32)


@triton.jit(do_not_specialize=["T", "M", "rank", "lag", "timeout_ns"])
def collect_kernel(
    rows, places, weights, table, out, addresses, state, status, T, M, rank, lag, timeout_ns, W: tl.constexpr, WP: tl.constexpr,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr, PHASE: tl.constexpr,
    TIMER: tl.constexpr,
):  # fmt: skip
    """One collect: every received row back to its rank, and every token's rows added up as they come.

    Programs draw items: units of rows of each peer, and tiles of tokens, both in ascending order, a tile `lag` rows or more after the
    units of its numbers. No deadlock, even if other kernels leave room for a single program: a tile of tokens < t waits only for
    rows j < t (a token's place never exceeds its number), and before a unit of first row j only tiles of tokens < j were drawn. So the
    waiting tile of the lowest tokens waits for units that run, or that the next free program draws.
    """
    pid = tl.program_id(0)
    op = tl.load(state + OP) + 1
    last = tl.load(state + LAST_COLLECT)
    peer = tl.arange(0, WP)
    most = tl.max(tl.load(table + (T + 1) * W + peer, mask=peer < W, other=0))
    item = _draw(state)
    if PHASE != 2:
        if pid == tl.num_programs(0) - 1:
            _tell_all(addresses, STARTED, rank, op, W, WP)
        if PHASE == 0:  # noqa: SIM102  decided when compiled
            if last == op - 1:
                _wait_for_peers(addresses, STARTED, op, rank, state, status, timeout_ns, W, WP, 2, TIMER)
    peers: tl.constexpr = W if SLOTS or W == 1 else W - 1
    units = tl.cdiv(most, BT) * (W if SLOTS else W - 1)
    tiles = tl.cdiv(T, BT)
    if PHASE == 1:
        tiles = 0
    if PHASE == 2:
        units = 0
    while item < units + tiles:
        u, v = _kind_of_item(item, units, tiles, peers, lag // BT)
        src, first, stop = _rows_of_unit(table, T, rank, tl.maximum(u, 0), BT, W, SLOTS)
        if u >= 0:
            _return_rows(rows, places, weights, addresses, M, rank, src, first, stop, W, K, WIDTH, BLOCK, SLOTS)
        item = _draw(state)  # while the rows are on their way
        if u >= 0:
            _flag_rows(addresses, M, rank, op, src, first, stop, W, BT)
        else:
            _sum_tile(rows, table, out, addresses, state, status, T, M, rank, op, v, timeout_ns, W, WP, WIDTH, BLOCK, BT, SLOTS, TIMER)
    _finish_collect(addresses, state, status, rank, op, timeout_ns, W, WP, PHASE, TIMER)


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
        to = _rows_of(addresses, COUNTS, (rank + d) % W, tl.pointer_type(tl.int32), W)
        tl.store(to + ((op % 2) * W + rank) * E + expert, counts, mask=expert < E)
    tl.debug_barrier()
    _tell_all(addresses, COUNTED, rank, op, W, WP)


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
    counts = _rows_of(addresses, COUNTS, rank, tl.pointer_type(tl.int32), W) + (op % 2) * W * E
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
            tl.store(_rows_of(addresses, BATCHED, d, source.dtype, W) + row * H + cols, values, mask=cols < H)
            tl.store(_rows_of(addresses, SOURCES, d, tl.pointer_type(tl.int32), W) + row, rank * M * K + t * K + k)


@triton.jit
def _total_counts(addresses, counts, status, rank, op, C, W: tl.constexpr, E: tl.constexpr, EL: tl.constexpr, EP: tl.constexpr):
    """counts [EL] of this rank's experts, and the number of rows that no rank has room for: the same on all ranks."""
    expert = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    of = _rows_of(addresses, COUNTS, rank, tl.pointer_type(tl.int32), W) + (op % 2) * W * E
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
        _wait_for_peers(addresses, COUNTED, op, rank, state, status, timeout_ns, W, WP, 4, TIMER)
        t = pid - 1
        while (t >= 0) & (t < T):
            k = tl.arange(0, KP)
            expert, place = _batched_places(ids, addresses, t, T * K, rank, op, W, WP, K, KP, E, BN)
            tl.store(places + t * K + k, tl.where((expert < E) & (place < C), expert * C + place, -1), mask=k < K)
            _push_slots(source, addresses, t, expert, place, rank, M, C, W, K, KP, E, EL, H, BLOCK)
            t += tl.num_programs(0) - 1
        if _arrive(state) == tl.num_programs(0) - 1:
            _total_counts(addresses, counts, status, rank, op, C, W, E, EL, EP)
            _tell_all(addresses, PUSHED, rank, op << 32, W, WP)
            tl.store(state + ARRIVED, 0)
            if PHASE == 0:
                _finish_batched(addresses, state, status, rank, op, timeout_ns, W, WP, TIMER)
    if PHASE == 3:
        _finish_batched(addresses, state, status, rank, op, timeout_ns, W, WP, TIMER)


@triton.jit
def _finish_batched(addresses, state, status, rank, op, timeout_ns, W: tl.constexpr, WP: tl.constexpr, TIMER: tl.constexpr):
    _wait_for_peers(addresses, PUSHED, op << 32, rank, state, status, timeout_ns, W, WP, 1, TIMER)
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
    source = tl.load(_rows_of(addresses, SOURCES, rank, tl.pointer_type(tl.int32), W) + row)
    src = source // (M * K)
    slot = source % (M * K)
    cols = tl.arange(0, BLOCK)
    value = tl.load(rows + row * WIDTH + cols, mask=cols < WIDTH, other=0.0)
    tl.store(_rows_of(addresses, BACK, src, rows.dtype, W) + slot.to(tl.int64) * WIDTH + cols, value, mask=cols < WIDTH)
    return src, slot


@triton.jit
def _sum_slots(
    rows, places, weights, out, addresses, state, status, rank, op, t, C, timeout_ns, W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    EL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TIMER: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k weights[t, k] * row of slot (t, k), in float32, once they are all here."""
    k = tl.arange(0, KP)
    place = tl.load(places + t * K + k, mask=k < K, other=-1)
    words = _words_of(addresses, LANDED, rank, t * K + k, W)
    _, good = _wait(words, place >= 0, op, place // (C * EL), state, status, timeout_ns, 2, TIMER)
    cols = tl.arange(0, BLOCK)
    back = _rows_of(addresses, BACK, rank, rows.dtype, W)
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
    pid = tl.program_id(0)
    op = tl.load(state + OP) + 1
    last = tl.load(state + LAST_COLLECT)
    expert = tl.arange(0, EQ)
    units = tl.sum(tl.load(counts + expert, mask=expert < EL, other=0))
    item = _draw(state)
    if PHASE != 2:
        if pid == tl.num_programs(0) - 1:
            _tell_all(addresses, STARTED, rank, op, W, WP)
        if PHASE == 0:  # noqa: SIM102  decided when compiled
            if last == op - 1:
                _wait_for_peers(addresses, STARTED, op, rank, state, status, timeout_ns, W, WP, 2, TIMER)
    tiles = T
    if PHASE == 1:
        tiles = 0
    if PHASE == 2:
        units = 0
    while item < units + tiles:
        if item < units:
            src, slot = _return_slot(rows, counts, addresses, M, C, rank, item, W, K, EL, EQ, WIDTH, BLOCK)
            item = _draw(state)  # while the row is on its way
            tl.debug_barrier()
            tl.atomic_xchg(_words_of(addresses, LANDED, src, slot, W), op, sem="release", scope="sys")
        else:
            t = item - units
            item = _draw(state)
            _sum_slots(rows, places, weights, out, addresses, state, status, rank, op, t, C, timeout_ns, W, K, KP, EL, WIDTH, BLOCK, TIMER)
    _finish_collect(addresses, state, status, rank, op, timeout_ns, W, WP, PHASE, TIMER)
