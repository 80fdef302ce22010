"""The kernel of collect: rows back to the ranks that own their tokens, and each token's sum. PHASE: as in push.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

from .signals import ARRIVED, BACK, LANDED, LAST_COLLECT, OP, STARTED, TICKET, rows_of, tell_all, wait, wait_for_peers, words_of


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
    to = rows_of(addresses, BACK, src, rows.dtype, W)
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
    words = words_of(addresses, LANDED, src, rank * M + j_U, W)
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
    words = words_of(addresses, LANDED, rank, d_1W * M + place_TW, W)
    awaited = (place_TW >= 0) & ((d_1W != rank) | SLOTS)
    _, good = wait(words, awaited, op, d_1W + 0 * t_T1, state, status, timeout_ns, 2, TIMER)
    cols = tl.arange(0, BLOCK)
    back = rows_of(addresses, BACK, rank, rows.dtype, W)
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
def draw(state):
    """The next item: whoever runs takes it, so that one running program is enough."""
    return tl.atomic_add(state + TICKET, 1, sem="relaxed", scope="gpu").to(tl.int32)


@triton.jit
def begin_collect(addresses, state, status, rank, timeout_ns, W: tl.constexpr, WP: tl.constexpr, PHASE: tl.constexpr, TIMER: tl.constexpr):
    """(number of this op, the program's first item). Right after another collect, all peers must have begun: they read the rows before."""
    pid = tl.program_id(0)
    op = tl.load(state + OP) + 1
    last = tl.load(state + LAST_COLLECT)
    item = draw(state)
    if PHASE != 2:
        if pid == tl.num_programs(0) - 1:
            tell_all(addresses, STARTED, rank, op, W, WP)
        if PHASE == 0:  # noqa: SIM102  decided when compiled
            if last == op - 1:
                wait_for_peers(addresses, STARTED, op, rank, state, status, timeout_ns, W, WP, 2, TIMER)
    return op, item


@triton.jit
def finish_collect(
    addresses, state, status, rank, op, timeout_ns, W: tl.constexpr, WP: tl.constexpr, PHASE: tl.constexpr, TIMER: tl.constexpr
):
    """One program makes sure that all peers have begun this op; the last to end counts it. Rows were released with their flags."""
    pid = tl.program_id(0)
    if (PHASE != 1) & (pid == tl.num_programs(0) - 1):
        wait_for_peers(addresses, STARTED, op, rank, state, status, timeout_ns, W, WP, 2, TIMER)
    tl.debug_barrier()
    if tl.atomic_add(state + ARRIVED, 1, sem="relaxed", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(state + ARRIVED, 0)
        tl.store(state + TICKET, 0)
        if PHASE != 1:
            tl.store(state + LAST_COLLECT, op)
            tl.store(state + OP, op)


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
    op, item = begin_collect(addresses, state, status, rank, timeout_ns, W, WP, PHASE, TIMER)
    peer = tl.arange(0, WP)
    most = tl.max(tl.load(table + (T + 1) * W + peer, mask=peer < W, other=0))
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
        item = draw(state)  # while the rows are on their way
        if u >= 0:
            _flag_rows(addresses, M, rank, op, src, first, stop, W, BT)
        else:
            _sum_tile(rows, table, out, addresses, state, status, T, M, rank, op, v, timeout_ns, W, WP, WIDTH, BLOCK, BT, SLOTS, TIMER)
    finish_collect(addresses, state, status, rank, op, timeout_ns, W, WP, PHASE, TIMER)
