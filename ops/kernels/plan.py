"""Where the slots' rows stand when they are sorted by expert and each block of rows has one expert: found on the device, without a sort.

Rows of the batched format, [E, capacity, H] with counts, stay where they are: one small kernel finds their blocks (plan_of_counts).
Of ids there are three ways by the number of slots N, all stable (slots of an expert keep their order), so results are the same bits:
one launch      every program counts all slots for itself, then places a few blocks; programs share nothing, so nothing is cleared before
two launches    chunks of slots are counted; then each chunk adds up the counts of all chunks and places its slots
three launches  the same with the counts added up between the two, once chunks are many
Nothing is read by the host and no state outlives a call, so that calls can be captured in CUDA graphs and replayed with other ids.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch

from moe_compile.ops.replay import start

from .tiles import power

MAX_EXPERTS = 1024  # vectors over all experts stand in registers
MAX_BLOCK_ROWS = 1024
SPARE = 2  # times the likely number of blocks, beyond which programs take tiles in turn
KEPT_BLOCK = 128  # rows of the largest blocks in training
LEAST_ROWS = 16  # of a block that GEMMs have tiles for
MAX_SLOTS = 2**31 - 1  # slots are int32
MAX_ROWS = 2**31 - 2048  # so that no sum with a block's rows, or with the blocks of a program, passes 2**31 - 1
MAX_ONE_LAUNCH = 1 << 14  # what the packed words of plan_kernels._ends can count
FOUND = 8192  # blocks times experts that a program compares to find its blocks
ALIGN = 32  # int32 words: each tensor of a plan starts on a cache line of its own


class Plan(NamedTuple):
    """Device tensors of one sorted call, P = blocks_bound(N, E, block_rows) * block_rows; of plan_of_counts: as it says."""

    slots: Any  # int32 [P]: slot n = t*K + k of each padded row, -1 in rows without one (also in those behind the last block)
    rows: Any  # int32 [N]: row of each slot, -1 without an expert, or left out of the order
    blocks: Any  # int32 [B, 2]: (expert, first row) of each block, experts ascending; undefined behind num_blocks
    num_blocks: Any  # int32 [1]
    counts: Any  # int32 [E]: slots of each expert
    firsts: Any  # int32 [E]: its first row
    block_rows: int
    order: Any = None  # int64 [N] and offsets int32 [E] as sort_ids gives them, where plan_of_ids was asked for them
    offsets: Any = None
    in_place: bool = False  # the rows of x are those of the plan, so slots and rows are one tensor: n, or -1
    expected: int = 0  # slots that tiles are chosen by; 0: all
    words: Any = None  # int32: what all of these are views of, where it is kept for another call (kept_plan)

    @property
    def likely(self) -> int:
        """Slots that tiles are chosen by."""
        return self.expected or int(self.rows.shape[0])

    @property
    def sparse(self) -> bool:
        """Can there be many more blocks than are likely, so that a program for each would mostly start for nothing?"""
        return self.in_place and self.blocks.shape[0] > SPARE * (min(self.counts.shape[0], self.likely) + self.likely // self.block_rows)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Launch sizes, reasoned for an H200 (132 multiprocessors), powers of two but for the first three."""

    one_launch: int = 4096  # the most slots of one launch
    programs: int = 128  # of the one launch, beside the one that takes what has no block
    direct_chunks: int = 64  # the most chunks whose counts each program adds up itself
    chunks: int = 1024  # the most there are; more slots make them longer
    tile: int = 128  # slots ranked at once, each against all of the tile
    count_tile: int = 1024  # slots counted at once
    scan: tuple[int, int] = (512, 8)  # chunks and experts of a tile of the scan
    fill_rows: int = 1024  # rows of the blocks that one program fills
    once_each: int = 4  # slots of a thread
    once_warps: int = 16  # at most, as all that follow
    count_warps: int = 4
    scan_warps: int = 8
    place_warps: int = 4


TUNING = Tuning()


@functools.lru_cache(maxsize=256)
def supports(device: Any, num_experts: int) -> str | None:
    """None if kernels with vectors over all experts run on a CUDA device, else why not."""
    if (why := limits(num_experts)) is not None:
        return why
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0, {device} has {major}.{minor}"


def limits(num_experts: int) -> str | None:
    """What forbids such kernels on any device, Triton's interpreter too."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None if 1 <= num_experts <= MAX_EXPERTS else f"takes 1 to {MAX_EXPERTS} experts, got {num_experts}"


def blocks_bound(slots: int, num_experts: int, block_rows: int) -> int:
    """The most blocks that so many slots can have, which some routing needs: (N - h) // R + h with h = min(E, N), R = block_rows.

    An expert with c >= 1 slots has ceil(c / R) = (c - 1) // R + 1 blocks, one with none has none. Over the j <= h experts that have
    slots the sum is at most (N - j) // R + j, as a sum of floors is at most the floor of the sum, and that does not fall when j grows.
    One slot for each of h - 1 experts and all others for one more needs that many.
    """
    hit = min(num_experts, slots)
    return (slots - hit) // block_rows + hit


def plan_of_ids(ids_TK: Any, num_experts: int, block_rows: int, *, order: bool = False) -> Plan:
    """ids int32 or int64; any outside of [0, num_experts) is no expert, and experts may repeat in a row. order: also give sort_ids'."""
    ids = _flat(ids_TK, num_experts)
    plan = _new_plan(ids.shape[0], ids.shape[0], num_experts, block_rows, ids.device)
    if order:
        plan = plan._replace(**_new_order(ids, num_experts))
    _sort(ids, num_experts, plan)
    return plan


def sort_ids(ids_TK: Any, num_experts: int) -> tuple[Any, Any]:
    """order int64 [N]: slots sorted stably by expert, those without one last. offsets int32 [E]: end of each expert's run in it."""
    ids = _flat(ids_TK, num_experts)
    new = _new_order(ids, num_experts)
    _sort(ids, num_experts, Plan(None, None, None, None, None, None, 0, **new))
    return new["order"], new["offsets"]


def kept_rows(slots: Any, num_experts: int) -> Any:
    """P that is enough for blocks of any number of rows up to KEPT_BLOCK, of which the host may know the slots as a symbol alone."""
    hit = torch.sym_min(slots, num_experts)
    return ((slots - hit) // KEPT_BLOCK + hit) * KEPT_BLOCK


def kept_words(given: Any, num_slots: Any, num_experts: int) -> Any:
    """int32 words of a plan with P = kept_rows(given, num_experts), for blocks of any number of rows from LEAST_ROWS to KEPT_BLOCK."""
    return sum(_room(size) for size in _kept_sizes(given, num_slots, num_experts))


def plan_of_order(order_N: Any, offsets_E: Any, num_slots: int, block_rows: int) -> Plan:
    """A plan from sort_ids' results, or from an order that leaves out slots without an expert (which ones is not known here)."""
    _check_order(order_N, offsets_E, num_slots)
    plan = _new_plan(order_N.shape[0], num_slots, offsets_E.shape[0], block_rows, order_N.device)
    return _of_order(plan, order_N, offsets_E, num_slots)


def kept_plan(order_N: Any, offsets_E: Any, num_slots: int, block_rows: int) -> Plan:
    """As plan_of_order, with P = kept_rows: its words can be kept, and opened again by other calls of the same order."""
    _check_order(order_N, offsets_E, num_slots)
    given, num_experts = order_N.shape[0], offsets_E.shape[0]
    new = torch.empty if given else torch.zeros
    words = new(kept_words(given, num_slots, num_experts), dtype=torch.int32, device=order_N.device)
    return _of_order(open_plan(words, given, num_slots, num_experts, block_rows), order_N, offsets_E, num_slots)


def open_plan(words: Any, given: int, num_slots: int, num_experts: int, block_rows: int) -> Plan:
    """The plan that kept_plan wrote. given: slots of its order."""
    _check_block_rows(block_rows)
    _check_rows(kept_rows(given, num_experts), given, num_experts, block_rows)
    views = _views(words, _kept_sizes(given, num_slots, num_experts))
    bound = views[0].shape[0] // block_rows
    return Plan(views[0], views[1], views[2][: 2 * bound].view(bound, 2), views[3], views[4], views[5], block_rows, words=words)


def _kept_sizes(given: Any, num_slots: Any, num_experts: int) -> tuple[Any, ...]:
    padded = kept_rows(given, num_experts)
    return padded, num_slots, 2 * (padded // LEAST_ROWS), 1, num_experts, num_experts


def _of_order(plan: Plan, order_N: Any, offsets_E: Any, num_slots: int) -> Plan:
    given = order_N.shape[0]
    if given < num_slots:
        plan.rows.fill_(-1)
    if given:
        _fill(plan, order_N.contiguous(), offsets_E.contiguous(), given == num_slots)
    return plan


def plan_of_counts(counts_E: Any, capacity: int, block_rows: int, *, expected: int = 0, most: int | None = None) -> Plan:
    """A plan of rows [E * capacity] of the batched format: expert e's are its first counts[e] (int32) from e * capacity on.

    They are computed in place where a block fits into the capacity: P = N = E * capacity. The last block of an expert begins early enough
    to end within its capacity, so it may share rows with the block before; both compute the same for them. Where a block is
    larger, each expert has one, and rows are read through slots: P = E * block_rows.
    expected: slots that tiles are chosen by; most: what all counts come to at the most. Neither changes a result.
    """
    _check_counts(counts_E, capacity, block_rows)
    num_experts, in_place = counts_E.shape[0], capacity >= block_rows or not capacity
    places, room = num_experts * capacity, capacity if in_place else block_rows
    _check_places(num_experts * max(room, capacity), num_experts, capacity, block_rows)
    slots = places if most is None else max(0, min(most, places))
    bound = min(num_experts * -(-capacity // block_rows), blocks_bound(slots, num_experts, block_rows))
    sizes = (0 if in_place else num_experts * room, places, 2 * bound, 1, num_experts, num_experts)
    views = _split(sizes, counts_E.device, zero=not places)
    plan = Plan(
        views[1] if in_place else views[0], views[1], views[2].view(bound, 2), views[3], views[4], views[5], block_rows,
        in_place=in_place, expected=expected,
    )  # fmt: skip
    if places:
        _find_in_place(plan, counts_E.contiguous(), capacity, room)
    return plan


def block_within(block_rows: int, capacity: int) -> int:
    """Rows of blocks that fit into an expert's capacity, if any of at least 16 do."""
    while block_rows > capacity and block_rows > LEAST_ROWS:
        block_rows //= 2
    return block_rows


# What is given


def _flat(ids_TK: Any, num_experts: int) -> Any:
    """Contiguous ids [N], checked."""
    if ids_TK.dim() != 2 or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64 [T, K], got {ids_TK.dtype} {list(ids_TK.shape)}; convert or reshape them")
    _check_device("ids", ids_TK)
    _check_experts(num_experts)
    _check_slots(ids_TK.shape[0] * ids_TK.shape[1])
    return ids_TK.reshape(-1)


def _check_order(order: Any, offsets: Any, num_slots: int) -> None:
    if order.dim() != 1 or order.dtype != torch.int64:
        raise ValueError(f"order must be int64 [N], got {order.dtype} {list(order.shape)}; take that of quantize_dispatch")
    if offsets.dim() != 1 or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 [E], got {offsets.dtype} {list(offsets.shape)}; take those of quantize_dispatch")
    if order.shape[0] > num_slots:
        raise ValueError(f"order has {order.shape[0]} slots, there are num_slots={num_slots}; give T*K of the call that it is from")
    if order.device != offsets.device:
        raise ValueError(f"order is on {order.device}, offsets are on {offsets.device}; they must be on one device")
    _check_device("order", order)
    _check_experts(offsets.shape[0])
    _check_slots(num_slots)


def _check_counts(counts: Any, capacity: int, block_rows: int) -> None:
    if counts.dim() != 1 or counts.dtype != torch.int32:
        raise ValueError(f"counts must be int32 [E], got {counts.dtype} {list(counts.shape)}; take those that the exchange brought")
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    _check_device("counts", counts)
    _check_experts(counts.shape[0])
    _check_block_rows(block_rows)


def _check_places(places: int, num_experts: int, capacity: int, block_rows: int) -> None:
    if places > MAX_ROWS:
        raise ValueError(
            f"{num_experts} experts with a capacity of {capacity} in blocks of block_rows={block_rows} are {places} rows, more than "
            f"{MAX_ROWS}; give them less capacity"
        )


def _check_block_rows(block_rows: int) -> None:
    if not 1 <= block_rows <= MAX_BLOCK_ROWS:
        raise ValueError(f"block_rows must be 1 to {MAX_BLOCK_ROWS}, got {block_rows}")


def _check_device(name: str, tensor: Any) -> None:
    if tensor.device.type in ("cpu", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{name} must be on a GPU, is on {tensor.device}; on other devices use quantize_dispatch.counting_sort")


def _check_experts(num_experts: int) -> None:
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts must be 1 to {MAX_EXPERTS}, got {num_experts}; use quantize_dispatch.counting_sort for more")


def _check_slots(slots: int) -> None:
    if not 0 <= slots <= MAX_SLOTS:
        raise ValueError(f"a call takes at most {MAX_SLOTS} slots T*K, got {slots}; split the tokens")


# What is made


def _check_rows(rows: int, given: int, num_experts: int, block_rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(
            f"{given} slots of {num_experts} experts in blocks of block_rows={block_rows} can need {rows} rows, more than "
            f"{MAX_ROWS}; split the tokens or take smaller blocks"
        )


def _new_plan(given: int, slots: int, num_experts: int, block_rows: int, device: Any) -> Plan:
    """A plan of `slots` slots of which `given` can have an expert; undefined if there are any, else that of no slots."""
    _check_block_rows(block_rows)
    bound = blocks_bound(given, num_experts, block_rows)
    _check_rows(bound * block_rows, given, num_experts, block_rows)
    views = _split((bound * block_rows, slots, 2 * bound, 1, num_experts, num_experts), device, zero=not given)
    return Plan(views[0], views[1], views[2].view(bound, 2), views[3], views[4], views[5], block_rows)


def _split(sizes: tuple[int, ...], device: Any, zero: bool) -> list[Any]:
    """int32 tensors of these sizes in one allocation."""
    return _views((torch.zeros if zero else torch.empty)(sum(map(_room, sizes)), dtype=torch.int32, device=device), sizes)


def _room(size: Any) -> Any:
    return (size + ALIGN - 1) // ALIGN * ALIGN


def _views(words: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Parts of these sizes, one behind the other."""
    return [each[:size] for each, size in zip(words.split([_room(size) for size in sizes]), sizes)]


def _new_order(ids: Any, num_experts: int) -> dict[str, Any]:
    """order and offsets, each a tensor of its own since ops return them."""
    new = torch.empty if ids.shape[0] else torch.zeros
    return {
        "order": torch.empty(ids.shape[0], dtype=torch.int64, device=ids.device),
        "offsets": new(num_experts, dtype=torch.int32, device=ids.device),
    }


# How it is launched


@functools.cache
def _warps(elements: int, most: int) -> int:
    """Each warp has at least 32 elements, as tl.histogram needs."""
    return max(1, min(most, elements // 32))


def _sort(ids: Any, num_experts: int, plan: Plan) -> None:
    """Fill a plan; what is None in it is left out."""
    if not ids.shape[0]:
        return
    with torch.cuda.device_of(ids):
        if ids.shape[0] <= min(TUNING.one_launch, MAX_ONE_LAUNCH):
            _sort_once(ids, num_experts, plan)
        else:
            _sort_chunks(ids, num_experts, plan)


def _bound(plan: Plan) -> int:
    return 0 if plan.blocks is None else plan.blocks.shape[0]


def _experts_padded(num_experts: int) -> int:
    return max(32, power(num_experts))


def _once_lanes(slots: int) -> int:
    """Few sizes, so that few kernels are compiled."""
    return next((size for size in (128, 512, 2048, 4096) if slots <= size), MAX_ONE_LAUNCH)


def _sort_once(ids: Any, num_experts: int, plan: Plan) -> None:
    from .plan_kernels import sort_once_kernel

    slots = ids.shape[0]
    lanes = _once_lanes(slots)
    rows, blocks = (plan.block_rows, _bound(plan)) if plan.slots is not None else (lanes, min(num_experts, slots))
    start(
        sort_once_kernel, (1 + min(blocks, TUNING.programs),),
        ids, plan.slots, plan.rows, plan.blocks, plan.num_blocks, plan.counts, plan.firsts, plan.order, plan.offsets, slots, blocks,
        E=num_experts, EP=_experts_padded(num_experts), BN=lanes, BR=rows, BRP=power(rows),
        num_warps=_warps(lanes // TUNING.once_each, TUNING.once_warps),
    )  # fmt: skip


def _sort_chunks(ids: Any, num_experts: int, plan: Plan) -> None:
    from .plan_kernels import count_kernel, place_kernel, scan_kernel

    slots, tile, padded = ids.shape[0], TUNING.tile, _experts_padded(num_experts)
    steps = power(-(-slots // (tile * TUNING.chunks)))
    chunks = -(-slots // (tile * steps))
    scanned = chunks > TUNING.direct_chunks
    table, totals = _split((chunks * num_experts, num_experts), ids.device, zero=False)
    count_tile = min(TUNING.count_tile, tile * steps)
    start(
        count_kernel, (chunks,),
        ids, table, slots, tile * steps // count_tile, E=num_experts, EP=padded, TILE=count_tile,
        num_warps=_warps(count_tile, TUNING.count_warps),
    )  # fmt: skip
    counts = plan.counts
    if scanned:
        totals, counts = (totals if counts is None else counts), None
        chunks_at_once, experts_at_once = TUNING.scan
        start(
            scan_kernel, (-(-num_experts // experts_at_once),),
            table, totals, chunks, E=num_experts, BG=min(chunks_at_once, power(chunks)), BE=experts_at_once, num_warps=TUNING.scan_warps,
        )  # fmt: skip
    rows = plan.block_rows or 1
    blocks_at_once, fills = _fills(_bound(plan), rows, padded)
    start(
        place_kernel, (fills + chunks,),
        ids, table, totals if scanned else None, plan.slots, plan.rows, plan.blocks, plan.num_blocks, counts, plan.firsts, plan.order,
        plan.offsets, slots, _bound(plan), chunks, fills, steps, E=num_experts, EP=padded, TILE=tile, BR=rows, BRP=power(rows),
        NB=blocks_at_once, BG=max(1, min(TUNING.direct_chunks, 4096 // padded)), num_warps=_warps(tile, TUNING.place_warps),
    )  # fmt: skip


def _fills(bound: int, block_rows: int, padded: int) -> tuple[int, int]:
    """(blocks that one program fills, programs)."""
    at_once = max(4, min(TUNING.fill_rows // power(block_rows), FOUND // padded))
    return at_once, -(-bound // at_once)


def _find_in_place(plan: Plan, counts: Any, capacity: int, room: int) -> None:
    """room: rows of an expert in the plan."""
    from .plan_kernels import counts_kernel

    padded, bound, places = _experts_padded(counts.shape[0]), _bound(plan), plan.rows.shape[0]
    blocks_at_once, fills = _fills(bound, plan.block_rows, padded)
    programs = max(fills, min(TUNING.programs, -(-max(places, plan.slots.shape[0]) // TUNING.fill_rows)))
    with torch.cuda.device_of(counts):
        start(
            counts_kernel, (programs,),
            counts, None if plan.in_place else plan.slots, plan.rows, plan.blocks, plan.num_blocks, plan.counts, plan.firsts, capacity,
            room, bound, E=counts.shape[0], EP=padded, BR=plan.block_rows, NB=blocks_at_once, ROWS=power(TUNING.fill_rows),
            num_warps=TUNING.place_warps,
        )  # fmt: skip


def _fill(plan: Plan, order: Any, offsets: Any, whole: bool) -> None:
    """whole: order names all slots, so also those that have no row."""
    from .plan_kernels import fill_kernel

    padded = _experts_padded(offsets.shape[0])
    blocks_at_once, fills = _fills(_bound(plan), plan.block_rows, padded)
    with torch.cuda.device_of(order):
        start(
            fill_kernel, (fills,),
            order, offsets, plan.slots, plan.rows, plan.blocks, plan.num_blocks, plan.counts, plan.firsts, plan.rows.shape[0], _bound(plan),
            order.shape[0], E=offsets.shape[0], EP=padded, BR=plan.block_rows, BRP=power(plan.block_rows),
            NB=blocks_at_once, REST=TUNING.fill_rows if whole else 0, num_warps=TUNING.place_warps,
        )  # fmt: skip
