"""The kernels that sort slots by expert, against torch: in Triton's interpreter on CPU tensors, and on a GPU where there is one.

Triton reads TRITON_INTERPRET when a kernel is defined, so the cases run in one subprocess, `python test_plan_kernels.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases

CASES = Cases(__file__)
POISON, GUARD = 0x7F7F7F7F, 64  # what new memory holds, and its words before and behind that nothing may touch
SMALL = {"tile": 32, "count_tile": 32, "chunks": 8, "direct_chunks": 4, "scan": (4, 4), "fill_rows": 64, "programs": 5}
WAYS = {
    "once": {},
    "once_few": {"programs": 2},
    "two": {"one_launch": 0, "tile": 64, "direct_chunks": 1 << 20},
    "three": {"one_launch": 0, "tile": 32, "direct_chunks": 0, "scan": (4, 8), "fill_rows": 64},
    "long_two": {**SMALL, "one_launch": 0, "chunks": 3},
    "long_three": {**SMALL, "one_launch": 0},
}


def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of poison, and what stands beside it stays so."""
    plain, whole = torch.empty, []

    def empty(size: int, *, dtype: torch.dtype, device: Any) -> Any:
        words = dtype.itemsize // 4
        memory = plain(size * words + 2 * GUARD, dtype=torch.int32, device=device).fill_(POISON)
        whole.append((memory, size * words))
        return memory[GUARD : GUARD + size * words].view(dtype)

    with mock.patch("torch.empty", empty):
        yield
    for memory, words in whole:
        assert (memory[:GUARD] == POISON).all()
        assert (memory[GUARD + words :] == POISON).all(), "a kernel wrote beyond its memory"


@contextlib.contextmanager
def tuned(**values: Any) -> Iterator[None]:
    from moe_compile.ops.kernels import plan

    with mock.patch.object(plan, "TUNING", dataclasses.replace(plan.TUNING, **values)):
        yield


def draw(tokens: int, top_k: int, experts: int, kind: str = "mixed", dtype: torch.dtype = torch.int64, seed: int = 0) -> Any:
    """ids [T, K]: mixed (some are no expert), all of one expert, few experts hit, none."""
    generator = torch.Generator().manual_seed(seed)
    low, high = {"mixed": (-2, experts + 2), "uniform": (0, experts), "few": (experts // 2, experts // 2 + 2)}.get(kind, (0, 1))
    ids = torch.randint(low, high, (tokens, top_k), generator=generator)
    if kind in ("one", "none"):
        ids = torch.full_like(ids, experts - 1 if kind == "one" else -1)
    if kind == "skewed":
        ids = (torch.rand((tokens, top_k), generator=generator) ** 4 * experts).long()
    return ids.to(dtype).to(device())


def expect_order(ids: Any, experts: int) -> tuple[Any, Any]:
    flat = ids.reshape(-1).long()
    keys = torch.where((flat >= 0) & (flat < experts), flat, experts)
    counts = torch.bincount(keys, minlength=experts + 1)[:experts]
    return torch.sort(keys, stable=True)[1], counts.cumsum(0).int()


def expect_plan(order: Any, offsets: Any, slots: int, bound: int, block_rows: int) -> tuple[Any, Any, Any]:
    """(slots, rows, blocks), by the definition."""
    of_row, of_slot, blocks, begin = [-1] * (bound * block_rows), [-1] * slots, [], 0
    order, ends = order.tolist(), offsets.tolist()
    for expert, end in enumerate(ends):
        for first in range(begin, end, block_rows):
            row = len(blocks) * block_rows
            blocks.append((expert, row))
            for place in range(first, min(end, first + block_rows)):
                of_row[row + place - first], of_slot[order[place]] = order[place], row + place - first
        begin = end
    return torch.tensor(of_row), torch.tensor(of_slot), torch.tensor(blocks, dtype=torch.int64).view(-1, 2)


def check_plan(got: Any, ids_order: Any, offsets: Any, slots: int, experts: int, block_rows: int) -> None:
    from moe_compile.ops.kernels import plan

    bound = plan.blocks_bound(len(ids_order), experts, block_rows)
    of_row, of_slot, blocks = expect_plan(ids_order, offsets, slots, bound, block_rows)
    assert got.block_rows == block_rows
    assert all(each.dtype == torch.int32 for each in got[:6])
    assert got.blocks.shape == (bound, 2)
    assert got.num_blocks.tolist() == [len(blocks)]
    assert got.counts.tolist() == offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    blocks_before = [0, *itertools.accumulate(-(-count // got.block_rows) for count in got.counts.tolist())]
    assert got.firsts.tolist() == [count * got.block_rows for count in blocks_before[:-1]]
    assert torch.equal(got.slots.cpu().long(), of_row.long())
    assert torch.equal(got.rows.cpu().long(), of_slot.long())
    assert torch.equal(got.blocks[: len(blocks)].cpu().long(), blocks)


def check(ids: Any, experts: int, block_rows: int) -> None:
    """Both functions, and the plan from the order, against torch."""
    from moe_compile.ops.kernels import plan

    order, offsets = expect_order(ids, experts)
    with poisoned():
        sorted_ids = plan.sort_ids(ids, experts)
        plain = plan.plan_of_ids(ids, experts, block_rows)
        both = plan.plan_of_ids(ids, experts, block_rows, order=True)
    for got in (sorted_ids, (both.order, both.offsets)):
        assert [each.dtype for each in got] == [torch.int64, torch.int32]
        assert torch.equal(got[0], order)
        assert torch.equal(got[1], offsets)
    assert (plain.order, plain.offsets) == (None, None)
    for planned in (plain, both):
        check_plan(planned, order, offsets, ids.numel(), experts, block_rows)


@CASES.add(*itertools.product(WAYS, (1, 7, 20)))
def kinds(way: str, experts: int) -> None:
    with tuned(**WAYS[way]):
        for seed, kind in enumerate(("mixed", "uniform", "one", "few", "none", "skewed")):
            check(draw(22, 3, experts, kind, (torch.int32, torch.int64)[(seed + experts) % 2], seed), experts, 16 if seed % 2 else 8)


@CASES.add(*itertools.product(WAYS, (100, 1024)))
def many_experts(way: str, experts: int) -> None:
    with tuned(**{**WAYS[way], "programs": 9}):
        check(draw(9, 8, experts), experts, 16)


@CASES.add(*itertools.product(WAYS, (1, 3, 24, 200)))
def blocks_of(way: str, block_rows: int) -> None:
    """Rows that are no power of two, one row, and more than there are slots."""
    with tuned(**WAYS[way]):
        check(draw(13, 5, 6), 6, block_rows)


@CASES.add(*itertools.product(WAYS, ((0, 3), (1, 1), (3, 1), (1, 9), (5, 9), (129, 1))))
def sizes(way: str, shape: tuple[int, int]) -> None:
    """No slots, one, odd numbers, K = 1 and K = E."""
    with tuned(**WAYS[way]):
        check(draw(*shape, 9), 9, 8)


@CASES.add(*((way,) for way in WAYS))
def every_expert_of_every_token(way: str) -> None:
    with tuned(**WAYS[way]):
        ids = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(9)])
        check(ids.to(device()), 16, 8)


@CASES.add(*((way,) for way in WAYS))
def wide_ids(way: str) -> None:
    """Ids whose low 32 bits would be experts."""
    ids = torch.tensor([[1 << 32, 2, -(1 << 32) + 1, 1 << 31, (1 << 32) + 3, 0, -(1 << 63), (1 << 63) - 1]] * 9, device=device())
    with tuned(**WAYS[way]):
        check(ids, 4, 4)


@CASES.add(*((way,) for way in WAYS))
def strided(way: str) -> None:
    with tuned(**WAYS[way]):
        check(draw(40, 6, 5)[::2, 1:5], 5, 8)
        check(draw(4, 40, 5).t(), 5, 8)


@CASES.add(*itertools.product((0, 1, 50), (1, 3, 16), (True, False)))
def from_order(tokens: int, block_rows: int, whole: bool) -> None:
    """An order of all slots, or without those that have no expert."""
    from moe_compile.ops.kernels import plan

    with tuned(fill_rows=64):
        for kind, experts in (("mixed", 5), ("none", 3), ("one", 40)):
            ids = draw(tokens, 3, experts, kind)
            order, offsets = expect_order(ids, experts)
            given = order if whole else order[: int(offsets[-1])]
            with poisoned():
                got = plan.plan_of_order(given, offsets, ids.numel(), block_rows)
            check_plan(got, given, offsets, ids.numel(), experts, block_rows)
            if block_rows >= plan.LEAST_ROWS:
                same_when_opened_again(got, given, offsets, ids.numel(), block_rows)


def same_when_opened_again(wanted: Any, order: Any, offsets: Any, slots: int, block_rows: int) -> None:
    """A plan that is kept for other calls is the plan, with room for blocks of other sizes."""
    from moe_compile.ops.kernels import plan

    with poisoned():
        kept = plan.kept_plan(order, offsets, slots, block_rows)
    again = plan.open_plan(kept.words, order.shape[0], slots, offsets.shape[0], block_rows)
    assert kept.words.shape[0] == plan.kept_words(order.shape[0], slots, offsets.shape[0])
    assert again.slots.shape[0] == plan.kept_rows(order.shape[0], offsets.shape[0]) >= wanted.slots.shape[0]
    used = int(wanted.num_blocks)
    for name in ("rows", "num_blocks", "counts", "firsts"):
        assert torch.equal(getattr(again, name), getattr(wanted, name)), name
    assert torch.equal(again.blocks[:used], wanted.blocks[:used])
    assert torch.equal(again.slots[: used * block_rows], wanted.slots[: used * block_rows])


@CASES.add((0, 16), (1, 16), (7, 3), (16, 16), (37, 16), (130, 32))
def from_counts(capacity: int, block_rows: int) -> None:
    """Rows of the batched format: their blocks, which never reach into another expert's rows, and which rows hold something."""
    from moe_compile.ops.kernels import plan

    generator = torch.Generator().manual_seed(capacity)
    for experts, kind in itertools.product((1, 5, 40), ("mixed", "all", "none")):
        counts = {"mixed": torch.randint(0, capacity + 1, (experts,), generator=generator), "all": torch.full((experts,), capacity)}
        held = counts.get(kind, torch.zeros(experts)).int()
        most = int(held.sum()) if experts == 5 else None
        with tuned(fill_rows=64, programs=5), poisoned():
            got = plan.plan_of_counts(held.to(device()), capacity, block_rows, expected=9, most=most)
        assert got.in_place == (capacity == 0 or capacity >= block_rows)
        assert got.likely == 9
        check_counts(got, held.tolist(), capacity, capacity if got.in_place else block_rows)


def check_counts(got: Any, counts: list[int], capacity: int, room: int) -> None:
    """room: rows of an expert in the plan."""
    rows, slots, blocks = [-1] * (len(counts) * capacity), [-1] * (len(counts) * room), []
    for e, count in enumerate(counts):
        for place in range(count):
            rows[e * capacity + place] = e * room + place
            slots[e * room + place] = e * capacity + place
        blocks += [[e, e * room + min(first, room - got.block_rows)] for first in range(0, count, got.block_rows)]
    assert got.rows.tolist() == rows
    assert got.slots.tolist() == slots
    assert got.num_blocks.tolist() == [len(blocks)]
    assert got.blocks[: len(blocks)].tolist() == blocks
    assert got.counts.tolist() == counts
    assert not rows or got.firsts.tolist() == [e * room for e in range(len(counts))]


@CASES.add()
def again() -> None:
    """Calls of all ways in turn, the same bits each time, nothing left over from the one before."""
    for seed in range(3):
        ids = draw(17, 3, 12, "mixed", seed=seed)
        for way in WAYS.values():
            with tuned(**way):
                check(ids, 12, 8)


@CASES.add()
def bound() -> None:
    """No routing needs more blocks, and one needs that many."""
    from moe_compile.ops.kernels import plan

    def partitions(slots: int, experts: int) -> Iterator[tuple[int, ...]]:
        if experts == 1:
            yield (slots,)
            return
        for own in range(slots + 1):
            yield from ((own, *rest) for rest in partitions(slots - own, experts - 1))

    for slots, experts, rows in itertools.product(range(9), (1, 2, 4), (1, 2, 3, 16)):
        most = max(sum(-(-count // rows) for count in counts) for counts in partitions(slots, experts))
        assert plan.blocks_bound(slots, experts, rows) == most <= slots // rows + min(experts, slots)


@CASES.add()
def errors() -> None:
    from moe_compile.ops.kernels import plan

    ids = torch.zeros((2, 2), dtype=torch.int64, device=device())
    order, offsets = expect_order(ids, 2)
    huge = torch.empty((1,), dtype=torch.int32, device=device()).expand(1 << 16, 1 << 15)
    for words, call in (
        ("int32 or int64 [T, K], got torch.int16 [2, 2]", lambda: plan.sort_ids(ids.short(), 2)),
        ("got torch.int64 [4]", lambda: plan.plan_of_ids(ids.view(-1), 2, 8)),
        ("num_experts must be 1 to 1024, got 0", lambda: plan.sort_ids(ids, 0)),
        ("counting_sort for more", lambda: plan.plan_of_ids(ids, 1025, 8)),
        ("block_rows must be 1 to 1024, got 0", lambda: plan.plan_of_ids(ids, 2, 0)),
        ("got 2048", lambda: plan.plan_of_order(order, offsets, 4, 2048)),
        ("at most 2147483647 slots", lambda: plan.sort_ids(huge, 2)),
        ("take smaller blocks", lambda: plan.plan_of_ids(huge[:-1], 1024, 512)),
        ("order must be int64 [N], got torch.int32", lambda: plan.plan_of_order(order.int(), offsets, 4, 8)),
        ("offsets must be int32 [E], got torch.int64", lambda: plan.plan_of_order(order, offsets.long(), 4, 8)),
        ("order has 4 slots, there are num_slots=3", lambda: plan.plan_of_order(order, offsets, 3, 8)),
        ("on one device", lambda: plan.plan_of_order(order, offsets.to("meta"), 4, 8)),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def test_without_gpu_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_compile.ops.kernels import plan

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on a GPU, is on cpu; .*counting_sort"):
        plan.sort_ids(torch.zeros((2, 2), dtype=torch.int64), 4)


test_in_interpreter = CASES.test()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES.functions)
def test_on_gpu(name: str) -> None:
    CASES.functions[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{}, {"direct_chunks": 0}, {"one_launch": 0, "direct_chunks": 1 << 20}, {"one_launch": 1 << 14}])
@pytest.mark.parametrize("slots", [2048, 4096, 8192, 16384, 32768, 131072, 1 << 20])
def test_many_slots_on_gpu(slots: int, way: dict[str, Any]) -> None:
    """Twice the same bits, and those of torch."""
    from moe_compile.ops.kernels import plan

    for experts, kind, rows in ((8, "uniform", 128), (128, "skewed", 64), (256, "mixed", 16), (1000, "one", 128)):
        ids = draw(slots // 8, 8, experts, kind, seed=slots)
        order, offsets = expect_order(ids, experts)
        with tuned(**way), poisoned():
            first, second = (plan.plan_of_ids(ids, experts, rows, order=True) for _ in range(2))
            both = plan.sort_ids(ids, experts)
            given = plan.plan_of_order(order, offsets, slots, rows)
        assert torch.equal(both[0], order)
        assert torch.equal(both[1], offsets)
        for got, want in zip((first.order, first.offsets, *first[:2], first.counts), (order, offsets, *second[:2], second.counts)):
            assert torch.equal(got, want)
        check_by_torch(first, order, offsets, experts, rows)
        check_by_torch(given, order, offsets, experts, rows)


def check_by_torch(got: Any, order: Any, offsets: Any, experts: int, rows: int) -> None:
    """check_plan for many slots: rows of all slots at once."""
    counts = offsets.diff(prepend=offsets.new_zeros(1)).long()
    blocks = (counts + rows - 1) // rows
    expert = torch.arange(experts, device=counts.device).repeat_interleave(counts)
    starts = ((blocks.cumsum(0) - blocks) * rows - (offsets.long() - counts))[expert]
    row = starts + torch.arange(len(expert), device=counts.device)
    of_slot = torch.full_like(got.rows, -1)
    of_slot[order[: len(row)]] = row.int()
    of_row = torch.full_like(got.slots, -1)
    of_row[row] = order[: len(row)].int()
    assert torch.equal(got.counts.long(), counts)
    assert torch.equal(got.rows, of_slot)
    assert torch.equal(got.slots, of_row)
    number = int(blocks.sum())
    assert got.num_blocks.tolist() == [number]
    assert torch.equal(got.blocks[:number, 0].long(), torch.arange(experts, device=counts.device).repeat_interleave(blocks))
    assert torch.equal(got.blocks[:number, 1].long(), torch.arange(number, device=counts.device) * rows)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [16, 2048, 8192, 131072])
def test_replayed_graph_sorts_other_ids(slots: int) -> None:
    from moe_compile.ops.kernels import plan

    ids = draw(slots // 8, 8, 64)
    for _ in range(2):
        plan.plan_of_ids(ids, 64, 32, order=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = plan.plan_of_ids(ids, 64, 32, order=True)
        given = plan.plan_of_order(got.order, got.offsets, slots, 32)
    for seed, kind in enumerate(("mixed", "one", "none", "skewed", "mixed")):
        ids.copy_(draw(slots // 8, 8, 64, kind, seed=seed + 1))
        graph.replay()
        order, offsets = expect_order(ids, 64)
        assert torch.equal(got.order, order)
        assert torch.equal(got.offsets, offsets)
        check_by_torch(got, order, offsets, 64, 32)
        check_by_torch(given, order, offsets, 64, 32)


if __name__ == "__main__":
    CASES.main()
