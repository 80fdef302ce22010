"""Kernels behind plan.py: counting sort of slots by expert, and the padded rows and blocks of the sorted slots.

E in an expert's place means none. EP >= E is the power of two that vectors over experts have. A pointer that is None is not written.
No index passes 2**31 - 1: tiles and chunks are powers of two, so the last tile of N <= 2**31 - 1 slots ends at 2**31 - 1 or before.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

FIELD = tl.constexpr(0xFFFF)  # of the words of _ends; plan.py keeps one launch below 2**15 slots


@triton.jit
def _experts_of(ids, p, N, E: tl.constexpr):
    """int32: the expert of each slot p, E where it has none and behind the last slot. Compared in the ids' own width."""
    given = tl.load(ids + p, mask=p < N, other=-1)
    return tl.where((given >= 0) & (given < E), given, E).to(tl.int32)


@triton.jit
def _count(expert, E: tl.constexpr, EP: tl.constexpr):
    """int32 [EP]: how many of the slots each expert has. At least 32 slots a warp, and 32 bins: fewer would be counted twice."""
    hit = expert < E
    return tl.histogram(tl.where(hit, expert, 0), EP, mask=hit)


@triton.jit
def _tell(counts_EP, num_blocks, counts, firsts, offsets, BR: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """What is known of the call as a whole."""
    e = tl.arange(0, EP)
    if num_blocks is not None:
        tl.store(num_blocks, tl.sum((counts_EP + (BR - 1)) // BR))
    if counts is not None:
        tl.store(counts + e, counts_EP, mask=e < E)
    if firsts is not None:
        padded = (counts_EP + (BR - 1)) // BR * BR
        tl.store(firsts + e, tl.cumsum(padded, 0) - padded, mask=e < E)
    if offsets is not None:
        tl.store(offsets + e, tl.cumsum(counts_EP, 0), mask=e < E)


@triton.jit
def _leave_out(p, none, place, slot_rows, order):
    """Slots p without an expert (where none): no row, and their places behind all others."""
    if slot_rows is not None:
        tl.store(slot_rows + p, tl.full(p.shape, -1, tl.int32), mask=none)
    if order is not None:
        tl.store(order + place, p.to(tl.int64), mask=none)


# One launch


@triton.jit
def _ends(counts_EP, BR: tl.constexpr, EP: tl.constexpr):
    """int64 [EP]: block behind the expert's last, slots up to its end, e + 1 and its own slots, in 16 (the third in 12) bits each.

    The words of the experts ascend in each of the first three, so that of block b's expert is the least whose first field is > b.
    """
    counts = counts_EP.to(tl.int64)
    steps = (((counts + (BR - 1)) // BR) << 44) | (counts << 28) | (1 << 16)
    return tl.cumsum(steps, 0) | counts


@triton.jit
def _place_block(
    p, expert, ends_EP, b, slots, slot_rows, blocks, order, BR: tl.constexpr, BRP: tl.constexpr
):  # fmt: skip
    """Block b: which expert it has, the slots in its rows, and -1 behind them. A block behind the last has no expert and no slots."""
    end = tl.min(tl.where((ends_EP >> 44) > b, ends_EP, 1 << 62), 0)
    e = ((end >> 16) & 0xFFF).to(tl.int32) - 1
    count = (end & FIELD).to(tl.int32)
    first = (b - (end >> 44).to(tl.int32) + (count + (BR - 1)) // BR) * BR  # of the expert's slots
    mine = (expert == e).to(tl.int32)
    rank = tl.cumsum(mine, 0) - mine - first
    here = (mine > 0) & (rank >= 0) & (rank < BR)
    if slots is not None:
        tl.store(slots + b * BR + rank, p, mask=here)
        tl.store(slot_rows + p, b * BR + rank, mask=here)
        r = tl.arange(0, BRP)
        tl.store(slots + b * BR + r, tl.full([BRP], -1, tl.int32), mask=(r < BR) & ((r >= count - first) | (e < 0)))
        if e >= 0:
            tl.store(blocks + b * 2, e)
            tl.store(blocks + b * 2 + 1, b * BR)
    if order is not None:
        start = ((end >> 28) & FIELD).to(tl.int32) - count
        tl.store(order + start + first + rank, p.to(tl.int64), mask=here)


@triton.jit(do_not_specialize=["N", "B"])
def sort_once_kernel(
    ids, slots, slot_rows, blocks, num_blocks, counts, firsts, order, offsets, N, B, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, BRP: tl.constexpr,
):  # fmt: skip
    """N <= BN slots, up to B blocks. Program 0 tells the counts and leaves slots out; the others take blocks in turn.

    Every program counts all slots by itself, so none waits for another and nothing must be cleared. Without slots: BR >= N, so that a
    block is an expert that has slots, and only order and offsets are written.
    """
    pid = tl.program_id(0)
    p = tl.arange(0, BN)
    expert = _experts_of(ids, p, N, E)
    counts_EP = _count(expert, E, EP)
    if pid == 0:
        _tell(counts_EP, num_blocks, counts, firsts, offsets, BR, E, EP)
        none = (expert == E) & (p < N)
        _leave_out(p, none, tl.sum(counts_EP) + tl.cumsum(none.to(tl.int32), 0) - 1, slot_rows, order)
    else:
        ends_EP = _ends(counts_EP, BR, EP)
        b = pid - 1
        while b < B:
            _place_block(p, expert, ends_EP, b, slots, slot_rows, blocks, order, BR, BRP)
            b += tl.num_programs(0) - 1


# Several launches: chunks of slots are counted, their counts become places, and the slots of each chunk are ranked


@triton.jit(do_not_specialize=["N", "steps"])
def count_kernel(ids, table, N, steps, E: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """table [chunks, E]: slots of each expert in each chunk of steps * TILE slots."""
    chunk = tl.program_id(0)
    counts_EP = tl.zeros([EP], tl.int32)
    step = steps * 0
    while step < steps:
        p = (chunk * steps + step) * TILE + tl.arange(0, TILE)
        counts_EP += _count(_experts_of(ids, p, N, E), E, EP)
        step += 1
    e = tl.arange(0, EP)
    tl.store(table + chunk.to(tl.int64) * E + e, counts_EP, mask=e < E)


@triton.jit(do_not_specialize=["G"])
def scan_kernel(table, counts, G, E: tl.constexpr, BG: tl.constexpr, BE: tl.constexpr):
    """In place: slots in a chunk become slots in earlier chunks; counts [E] the sums over all G chunks. BE experts a program."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    before_BE = tl.zeros([BE], tl.int32)
    first = G * 0
    while first < G:
        g = first + tl.arange(0, BG)
        at = table + g.to(tl.int64)[:, None] * E + e[None, :]
        inside = (g < G)[:, None] & (e < E)[None, :]
        held = tl.load(at, mask=inside, other=0)
        tl.store(at, before_BE[None, :] + tl.cumsum(held, 0) - held, mask=inside)
        before_BE += tl.sum(held, 0)
        first += BG
    tl.store(counts + e, before_BE, mask=e < E)


@triton.jit
def _add_chunks(table, chunk, G, E: tl.constexpr, EP: tl.constexpr, BG: tl.constexpr):
    """(slots of each expert in earlier chunks, in all G), where no kernel has summed the table up. int32 [EP] each."""
    e = tl.arange(0, EP)
    before_EP = tl.zeros([EP], tl.int32)
    counts_EP = tl.zeros([EP], tl.int32)
    first = G * 0
    while first < G:
        g = (first + tl.arange(0, BG))[:, None]
        held = tl.load(table + g.to(tl.int64) * E + e[None, :], mask=(g < G) & (e < E)[None, :], other=0)
        counts_EP += tl.sum(held, 0)
        before_EP += tl.sum(tl.where(g < chunk, held, 0), 0)
        first += BG
    return before_EP, counts_EP


@triton.jit
def _ranks(ids, first, expert, N, E: tl.constexpr, TILE: tl.constexpr):
    """int32 [TILE]: slots of the same expert before each slot of the tile, by comparing all pairs."""
    lane = tl.arange(0, TILE)
    other = _experts_of(ids, first + lane, N, E)
    same = (other[:, None] == expert[None, :]) & (lane[:, None] < lane[None, :])
    return tl.sum(same.to(tl.int32), axis=0)


@triton.jit
def _place_chunk(
    ids, before_EP, counts_EP, slots, slot_rows, order, chunk, N, steps, E: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """The chunk's slots to their rows and places, tile by tile; before_EP: slots of each expert before the chunk."""
    padded = (counts_EP + (BR - 1)) // BR * BR
    row_EP = tl.cumsum(padded, 0) - padded
    start_EP = tl.cumsum(counts_EP, 0) - counts_EP
    none_at = tl.sum(counts_EP) + chunk * steps * TILE - tl.sum(before_EP)  # place of the next slot without an expert
    step = steps * 0
    while step < steps:
        first = (chunk * steps + step) * TILE
        p = first + tl.arange(0, TILE)
        expert = _experts_of(ids, p, N, E)
        hit = expert < E
        rank = _ranks(ids, first, expert, N, E, TILE)
        _leave_out(p, (expert == E) & (p < N), none_at + rank, slot_rows, order)
        e = tl.where(hit, expert, 0)
        if slots is not None:
            row = tl.gather(row_EP + before_EP, e, 0) + rank
            tl.store(slots + row, p, mask=hit)
            tl.store(slot_rows + p, row, mask=hit)
        if order is not None:
            tl.store(order + tl.gather(start_EP + before_EP, e, 0) + rank, p.to(tl.int64), mask=hit)
        if steps > 1:
            held_EP = _count(expert, E, EP)
            before_EP += held_EP
            none_at += TILE - tl.sum(held_EP)
        step += 1


@triton.jit
def _find_blocks(b, counts_EP, BR: tl.constexpr, EP: tl.constexpr):
    """Of blocks b: (expert, first of its slots, its slots, first place of its slots in order); behind the last block EP, 0, 0, and any."""
    of_EP = (counts_EP + (BR - 1)) // BR
    ends_EP = tl.cumsum(of_EP, 0)
    e = tl.sum((ends_EP[None, :] <= b[:, None]).to(tl.int32), axis=1)
    at = tl.minimum(e, EP - 1)
    first = tl.where(e < EP, (b - tl.gather(ends_EP - of_EP, at, 0)) * BR, 0)
    count = tl.where(e < EP, tl.gather(counts_EP, at, 0), 0)
    return e, first, count, tl.gather(tl.cumsum(counts_EP, 0) - counts_EP, at, 0)


@triton.jit
def _fill_blocks(
    b, counts_EP, given, slots, slot_rows, blocks, N, B, BR: tl.constexpr, BRP: tl.constexpr, EP: tl.constexpr
):  # fmt: skip
    """Entries of blocks b, and -1 into their rows behind the expert's slots; given (the order, or None): what stands in the other rows."""
    e, first, count, start = _find_blocks(b, counts_EP, BR, EP)
    entry = blocks + b.to(tl.int64) * 2
    tl.store(entry, e, mask=(b < B) & (e < EP))
    tl.store(entry + 1, b * BR, mask=(b < B) & (e < EP))
    r = tl.arange(0, BRP)
    row = b[:, None] * BR + r[None, :]
    inside = (b < B)[:, None] & (r < BR)[None, :]
    place = first[:, None] + r[None, :]
    used = place < count[:, None]
    tl.store(slots + row, tl.full(row.shape, -1, tl.int32), mask=inside & (place >= count[:, None]))
    if given is not None:
        slot = tl.load(given + start[:, None] + place, mask=inside & used, other=-1)
        tl.store(slots + row, slot.to(tl.int32), mask=inside & used)
        tl.store(slot_rows + slot, row, mask=inside & used & (slot >= 0) & (slot < N))


@triton.jit(do_not_specialize=["N", "B", "G", "F", "steps"])
def place_kernel(
    ids, table, totals, slots, slot_rows, blocks, num_blocks, counts, firsts, order, offsets, N, B, G, F, steps, E: tl.constexpr,
    EP: tl.constexpr, TILE: tl.constexpr, BR: tl.constexpr, BRP: tl.constexpr, NB: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """F programs fill NB blocks each, then one program a chunk places its slots. totals: counts [E] from scan_kernel, None without it."""
    pid = tl.program_id(0)
    chunk = pid - F
    if totals is not None:
        e = tl.arange(0, EP)
        counts_EP = tl.load(totals + e, mask=e < E, other=0)
        before_EP = tl.load(table + chunk.to(tl.int64) * E + e, mask=(e < E) & (chunk >= 0), other=0)
    else:
        before_EP, counts_EP = _add_chunks(table, chunk, G, E, EP, BG)
    if pid == 0:
        _tell(counts_EP, num_blocks, counts, firsts, offsets, BR, E, EP)
    if chunk >= 0:
        _place_chunk(ids, before_EP, counts_EP, slots, slot_rows, order, chunk, N, steps, E, EP, TILE, BR)
    elif slots is not None:
        _fill_blocks(pid * NB + tl.arange(0, NB), counts_EP, None, slots, slot_rows, blocks, N, B, BR, BRP, EP)


# From an order that is given


@triton.jit(do_not_specialize=["N", "B", "L"])
def fill_kernel(
    order, offsets, slots, slot_rows, blocks, num_blocks, counts, firsts, N, B, L, E: tl.constexpr, EP: tl.constexpr, BR: tl.constexpr,
    BRP: tl.constexpr, NB: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A plan from an order of L slots, NB blocks a program. REST > 0: the slots behind the last expert's have no row, REST at once."""
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    ends = tl.load(offsets + e, mask=e < E, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    counts_EP = ends - starts
    if pid == 0:
        _tell(counts_EP, num_blocks, counts, firsts, None, BR, E, EP)
    _fill_blocks(pid * NB + tl.arange(0, NB), counts_EP, order, slots, slot_rows, blocks, N, B, BR, BRP, EP)
    if REST > 0:
        first = tl.load(offsets + E - 1).to(tl.int64) + pid * REST
        while first < L:
            place = first + tl.arange(0, REST)
            slot = tl.load(order + place, mask=place < L, other=-1)
            tl.store(slot_rows + slot, tl.full([REST], -1, tl.int32), mask=(slot >= 0) & (slot < N))
            first += tl.num_programs(0) * REST


# From counts: rows that lie in the batched format


@triton.jit
def _mapped(of, counts, size, FROM, TO, ROWS: tl.constexpr):
    """of [size]: the place among TO rows an expert of each place among FROM rows an expert, -1 where the expert has none."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < size:
        p = first + tl.arange(0, ROWS)
        inside = p < size
        e = tl.where(inside, p // FROM, 0)
        held = tl.minimum(tl.load(counts + e, mask=inside, other=0), tl.minimum(FROM, TO))
        place = p - e * FROM
        tl.store(of + p, tl.where(place < held, e * TO + place, -1).to(tl.int32), mask=inside)
        first += tl.num_programs(0) * ROWS


@triton.jit(do_not_specialize=["C", "S", "B"])
def counts_kernel(
    given, slots, slot_rows, blocks, num_blocks, counts, firsts, C, S, B, E: tl.constexpr, EP: tl.constexpr, BR: tl.constexpr,
    NB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A plan of the first given[e] of C rows an expert, which has S >= BR rows in the plan (in place: S == C, and slots is None).

    NB blocks a program; each begins at most at S - BR, so that none reaches into the rows of the expert behind.
    """
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    counts_EP = tl.minimum(tl.maximum(tl.load(given + e, mask=e < E, other=0), 0), C)
    if pid == 0:
        _tell(counts_EP, None, counts, None, None, BR, E, EP)
        tl.store(num_blocks, tl.minimum(tl.sum((counts_EP + (BR - 1)) // BR), B))
        tl.store(firsts + e, e * S, mask=e < E)
    b = pid * NB + tl.arange(0, NB)
    expert, first, _, _ = _find_blocks(b, counts_EP, BR, EP)
    inside = (b < B) & (expert < E)
    entry = blocks + b.to(tl.int64) * 2
    tl.store(entry, expert, mask=inside)
    tl.store(entry + 1, expert * S + tl.minimum(first, S - BR), mask=inside)
    _mapped(slot_rows, given, E * C.to(tl.int64), C, S, ROWS)
    if slots is not None:
        _mapped(slots, given, E * S.to(tl.int64), S, C, ROWS)
