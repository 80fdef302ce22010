"""The nvlink exchange's kernels in Triton's interpreter on CPU tensors: all ranks in one process, one after the other.

Triton reads TRITON_INTERPRET when a kernel is defined, so the cases run in one subprocess, `python test_nvlink_kernels.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases

CASES = Cases(__file__)
POISON, GUARD = 0x7F, 4096  # what the workspace holds at first, and bytes behind it that nothing may touch


class Ranks:
    """The exchanges of W ranks over ordinary memory, poisoned."""

    def __init__(self, world: int, **options: Any) -> None:
        from moe_compile.ops.comm.peer import engine, launch, signals, workspace

        settings = {"max_tokens": 8, "hidden": 32, "top_k": 3, "num_experts": 8, "dtype": torch.float32, **options}
        shape = launch.Shape(
            world, *(settings[n] for n in ("max_tokens", "hidden", "top_k", "num_experts", "dtype")), settings.get("quant", "none"),
            settings.get("batched_capacity", 0),
        )  # fmt: skip
        layout = workspace.Layout.of(shape.region_sizes(signals.REGIONS))
        whole = [torch.full((layout.nbytes + 64 + GUARD,), POISON, dtype=torch.uint8) for _ in range(world)]
        whole = [memory[-memory.data_ptr() % 64 :][: layout.nbytes + GUARD] for memory in whole]
        memories, self.guards = [memory[: layout.nbytes] for memory in whole], [memory[layout.nbytes :] for memory in whole]
        addresses = layout.addresses([memory.data_ptr() for memory in memories], "cpu")
        self.world, self.settings = world, settings
        self.exchanges = [
            engine.NvlinkEngine(
                None,
                workspace=workspace.Workspace(
                    rank,
                    world,
                    list(range(world)),
                    layout,
                    memory,
                    addresses,
                    workspace.new_state("cpu"),
                    torch.zeros(8, dtype=torch.int64),
                ),
                **settings,
            )
            for rank, memory in enumerate(memories)
        ]
        for exchange in self.exchanges:
            exchange._workspace.clear()

    def run(self, prepare: Callable[[Any, int], Any]) -> list[Any]:
        """One call on every rank: part 1 of all, then part 2 of all, and so on."""
        calls = [prepare(exchange, rank) for rank, exchange in enumerate(self.exchanges)]
        for phase in range(1, 1 + calls[0].phases):
            for call in calls:
                call.launch(phase)
        assert all((guard == POISON).all() for guard in self.guards), "a kernel wrote beyond the workspace"
        return [call.result() for call in calls]

    def dispatch(self, x: list[Any], ids: list[Any], weights: list[Any] | None = None, copy: bool = False) -> list[Any]:
        weights = weights or [[] for _ in x]
        return self.run(lambda exchange, rank: exchange.prepare_dispatch(x[rank], ids[rank], weights[rank], copy))


def tokens(
    ranks: Ranks, counts: list[int], seed: int = 0, low: int = -1, dtype: torch.dtype | None = None
) -> tuple[list[Any], list[Any], list[Any]]:
    """x, ids (low..E, both ends no expert if low is -1; repeats occur) and one weight of every rank."""
    generator = torch.Generator().manual_seed(seed)
    settings = ranks.settings
    x = [torch.randn((n, settings["hidden"]), generator=generator).to(settings["dtype"]) for n in counts]
    ids = [torch.randint(low, settings["num_experts"] + (low < 0), (n, settings["top_k"]), generator=generator) for n in counts]
    return x, [each.to(dtype or torch.int64) for each in ids], [torch.rand((n, settings["top_k"]), generator=generator) for n in counts]


def owner(ranks: Ranks, ids: Any) -> Any:
    """The rank of each id's expert, or -1."""
    experts = ranks.settings["num_experts"]
    return torch.where((ids >= 0) & (ids < experts), ids // -(-experts // ranks.world), -1)


def goes_to(ranks: Ranks, ids: Any, rank: int) -> Any:
    """Numbers of the tokens that have an expert on the rank."""
    return (owner(ranks, ids) == rank).any(1).nonzero().squeeze(1)


def expect_ids(ranks: Ranks, ids: list[Any], rank: int) -> Any:
    most, local = ranks.settings["max_tokens"], -(-ranks.settings["num_experts"] // ranks.world)
    out = torch.full((ranks.world, most, ranks.settings["top_k"]), -1, dtype=torch.int32)
    for src, each in enumerate(ids):
        sent = each[goes_to(ranks, each, rank)]
        out[src, : len(sent)] = torch.where(owner(ranks, sent) == rank, sent - rank * local, -1).int()
    return out.flatten(0, 1)


def check_dispatch(ranks: Ranks, x: list[Any], ids: list[Any], weights: list[Any], got: list[Any]) -> None:
    most = ranks.settings["max_tokens"]
    for rank, received in enumerate(got):
        torch.testing.assert_close(received.ids, expect_ids(ranks, ids, rank), rtol=0, atol=0)
        for src in range(ranks.world):
            sent = goes_to(ranks, ids[src], rank)
            here = slice(src * most, src * most + len(sent))
            assert torch.equal(plain(received)[here], x[src][sent]) or ranks.settings.get("quant") == "fp8"
            # (The interpreter halves the 1 in 50 values whose e4m3 mantissa rounds up to the next power of two.)
            near = torch.isclose(plain(received)[here].float(), x[src][sent].float(), rtol=7e-2, atol=2e-2)
            assert near.sum() >= 0.95 * near.numel()
            local = received.ids[here] >= 0
            for weight in received.weights:
                torch.testing.assert_close(weight[here], torch.where(local, weights[src][sent], 0), rtol=0, atol=0)


def plain(received: Any) -> Any:
    """rows without quantisation."""
    if received.rows.dtype != torch.float8_e4m3fn:
        return received.rows
    return (received.rows.float().unflatten(1, (-1, 128)) * received.scales.unsqueeze(2)).flatten(1)


def expect_collect(ranks: Ranks, ids: list[Any], rows: list[Any], src: int, count: int) -> Any:
    out = torch.zeros((count, rows[0].shape[1]), dtype=torch.float64)
    for rank in range(ranks.world):
        sent = goes_to(ranks, ids[src], rank)
        first = src * ranks.settings["max_tokens"]
        out[sent] += rows[rank][first : first + len(sent)].double()
    return out


def check_collect(ranks: Ranks, ids: list[Any], handles: list[Any], seed: int, width: int | None = None) -> None:
    settings = ranks.settings
    generator = torch.Generator().manual_seed(seed)
    shape = ranks.world * settings["max_tokens"], width or settings["hidden"]
    rows = [torch.randn(shape, generator=generator).to(settings["dtype"]) for _ in range(ranks.world)]
    out = ranks.run(lambda exchange, rank: exchange.prepare_collect(rows[rank], handles[rank], torch.float32))
    for src, each in enumerate(out):
        torch.testing.assert_close(each.double(), expect_collect(ranks, ids, rows, src, len(ids[src])), rtol=1e-5, atol=1e-5)


def exchange_once(ranks: Ranks, counts: list[int], seed: int = 0, ids: list[Any] | None = None, dtype: torch.dtype | None = None) -> None:
    x, some, weights = tokens(ranks, counts, seed, dtype=dtype)
    ids = some if ids is None else ids
    got = ranks.dispatch(x, ids, [[w, w] for w in weights])
    check_dispatch(ranks, x, ids, weights, got)
    check_collect(ranks, ids, [each.handle for each in got], seed)


@CASES.add((2, [8, 8]), (4, [8, 5, 3, 8]), (2, [0, 8]), (2, [1, 0]), (2, [0, 0]), (3, [7, 1, 2]), (1, [5]), (8, [1, 2, 3, 4, 5, 6, 7, 8]))
def random_routing(world: int, counts: list[int]) -> None:
    exchange_once(Ranks(world), counts)


@CASES.add((torch.bfloat16,), (torch.float16,), (torch.float32,))
def dtypes(dtype: torch.dtype) -> None:
    exchange_once(Ranks(2, dtype=dtype, hidden=48), [8, 5], dtype=torch.int32)


@CASES.add((0,), (5,), (-1,), (8,))
def all_tokens_one_expert(expert: int) -> None:
    """Also no token anywhere (-1, 8: no expert)."""
    ranks = Ranks(2)
    exchange_once(ranks, [8, 6], ids=[torch.full((n, 3), expert) for n in (8, 6)])


@CASES.add((9, 4), (5, 2), (3, 4))
def uneven_experts(experts: int, world: int) -> None:
    """The last ranks have fewer experts, or none."""
    exchange_once(Ranks(world, num_experts=experts), [8] * world)


@CASES.add()
def repeated_ids() -> None:
    exchange_once(Ranks(2), [3, 2], ids=[torch.tensor([[1, 1, 1], [0, 7, 0], [7, 7, -1]]), torch.tensor([[4, 4, 0], [-1, -1, 3]])])


@CASES.add((2,), (4,))
def many_calls(world: int) -> None:
    """Buffers and signals are used again; fewer tokens leave no ids of earlier calls behind."""
    ranks = Ranks(world)
    generator = torch.Generator().manual_seed(3)
    for seed in range(6):
        exchange_once(ranks, torch.randint(0, 9, (world,), generator=generator).tolist(), seed)


@CASES.add()
def views_and_clones() -> None:
    ranks = Ranks(2)
    x, ids, _ = tokens(ranks, [8, 8])
    view, clone = ranks.dispatch(x, ids), ranks.dispatch(x, ids, copy=True)
    kept = [each.rows.clone() for each in clone]
    ranks.dispatch([-each for each in x], ids)
    assert all(torch.equal(a.rows, b) for a, b in zip(clone, kept)), "a clone changed"
    sent = int((view[0].ids >= 0).any(1).sum())
    assert sent
    assert not torch.equal(view[0].rows, kept[0]), "a view must show the last call's rows"


@CASES.add((32,), (8,), (20,))
def send_and_collect_other_width(width: int) -> None:
    """Backward: rows of another tensor by the same handle, then their sum."""
    ranks = Ranks(2)
    x, ids, _ = tokens(ranks, [7, 4])
    handles = [each.handle for each in ranks.dispatch(x, ids)]
    other = [torch.randn((n, width)) for n in (7, 4)]
    rows = ranks.run(lambda exchange, rank: exchange.prepare_send(other[rank], handles[rank]))
    for rank, each in enumerate(rows):
        for src in range(2):
            sent = goes_to(ranks, ids[src], rank)
            assert torch.equal(each[src * 8 : src * 8 + len(sent)], other[src][sent])
            assert not each[src * 8 + len(sent) : src * 8 + 8].any(), "holes must be zero"
    check_collect(ranks, ids, handles, 0, width)
    check_collect(ranks, ids, handles, 1, width)


@CASES.add((128, [5, 8]), (384, [8, 1]))
def fp8(hidden: int, counts: list[int]) -> None:
    ranks = Ranks(2, hidden=hidden, quant="fp8", dtype=torch.bfloat16)
    x, ids, weights = tokens(ranks, counts)
    x[0] *= 100
    x[1][0] = 0
    got = ranks.dispatch(x, ids, [[w] for w in weights])
    check_dispatch(ranks, x, ids, weights, got)
    check_collect(ranks, ids, [each.handle for each in got], 0)


@CASES.add((513, 2, 0), (70, 4, 16))
def more_than_fused(most: int, world: int, fused: int) -> None:
    """Places found by the kernel of their own, several programs; fused: the limit set to so many tokens."""
    ranks = Ranks(world, max_tokens=most, hidden=8, num_experts=16)
    with fused_up_to(fused):
        exchange_once(ranks, [most, *[3] * (world - 1)])


@contextlib.contextmanager
def fused_up_to(count: int) -> Iterator[None]:
    """0: as it is."""
    from moe_compile.ops.comm.peer import engine

    with mock.patch.object(engine, "FUSED_TOKENS", count or engine.FUSED_TOKENS):
        yield


@CASES.add((1,), (3,))
def split_rows(splits: int) -> None:
    ranks = Ranks(2, hidden=384)
    for exchange in ranks.exchanges:
        exchange.tuning.push_splits = splits
    exchange_once(ranks, [8, 5])


@CASES.add()
def collect_slots() -> None:
    """Rows that are weighted sums of slots, never written."""
    ranks = Ranks(2)
    x, ids, weights = tokens(ranks, [8, 6])
    got = ranks.dispatch(x, ids, [[w] for w in weights])
    generator = torch.Generator().manual_seed(5)
    slots, places, rows = [], [], []
    for received in got:
        used = received.ids >= 0
        number = int(used.sum())
        place = torch.full(used.shape, -1, dtype=torch.int32)
        place[used] = torch.randperm(number, generator=generator).int()
        slots.append(torch.randn((max(1, number), 32), generator=generator))
        places.append(place)
        weight = torch.where(used, received.weights[0], 0)
        rows.append((slots[-1][place.clamp(min=0).long()] * weight.unsqueeze(2)).sum(1))
    weight = [each.weights[0].clone() for each in got]
    out = ranks.run(lambda exchange, rank: exchange.prepare_collect(slots[rank], got[rank].handle, None, (places[rank], weight[rank])))
    for src, each in enumerate(out):
        torch.testing.assert_close(each.double(), expect_collect(ranks, ids, rows, src, len(ids[src])), rtol=1e-5, atol=1e-5)


@CASES.add()
def items_of_collect() -> None:
    """Every unit and every tile once, both ascending, and a tile never before the units that other ranks' tiles of its tokens need."""
    import triton
    import triton.language as tl

    from moe_compile.ops.comm.peer.collect import _kind_of_item

    globals().update(tl=tl, _kind_of_item=_kind_of_item)  # where the interpreter looks names up

    @triton.jit
    def kinds(out, units, tiles, peers, ahead):
        item = tl.program_id(0)
        unit, tile = _kind_of_item(item, units, tiles, peers, ahead)
        tl.store(out + item * 2, unit)
        tl.store(out + item * 2 + 1, tile)

    for groups, peers, tiles, ahead in itertools.product((0, 1, 3, 6), (1, 3), (0, 1, 4, 7), (0, 2, 9)):
        units = groups * peers
        out = torch.full((max(1, units + tiles), 2), -9, dtype=torch.int32)
        kinds[(units + tiles,)](out, units, tiles, peers, ahead) if units + tiles else None
        items = out[: units + tiles].tolist()
        assert [unit for unit, _ in items if unit >= 0] == list(range(units))
        assert [tile for unit, tile in items if unit < 0] == list(range(tiles))
        sent = 0
        for unit, tile in items:
            sent += unit >= 0
            assert unit >= 0 or sent >= min(groups, tile + 1) * peers


@CASES.add((1, 4), (64, 2), (600, 8))
def lags(lag: int, tile: int) -> None:
    ranks = Ranks(2, max_tokens=90, hidden=8)
    for exchange in ranks.exchanges:
        exchange.tuning.lag, exchange.tuning.tile = lag, tile
    with fused_up_to(16):
        exchange_once(ranks, [90, 71])


def batched_once(ranks: Ranks, counts: list[int], seed: int, ids: list[Any] | None = None, overflow: int = 0) -> int:
    """A batched exchange against the plain formula; number of rows dropped."""
    from moe_compile.ops.comm.peer.workspace import CapacityExceeded

    x, some, weights = tokens(ranks, counts, seed)
    ids, capacity, world = some if ids is None else ids, ranks.settings["batched_capacity"], ranks.world
    local = -(-ranks.settings["num_experts"] // world)
    got = ranks.run(lambda exchange, rank: exchange.prepare_dispatch_batched(x[rank], ids[rank]))
    for exchange in ranks.exchanges if overflow else ():
        raises(CapacityExceeded, f"{overflow} rows", exchange.check)
    expected = [torch.zeros((n, 32), dtype=torch.float64) for n in counts]
    y, dropped = [torch.randn((local, capacity, 32)) for _ in range(world)], 0
    for expert in range(local * world):
        rank, slot = divmod(expert, local)
        wanted = [
            (src, t, k)
            for src in range(world)
            for t, k in (ids[src] == expert).nonzero().tolist()
            if expert < ranks.settings["num_experts"]
        ]
        dropped += max(0, len(wanted) - capacity)
        assert int(got[rank].counts[slot]) == min(len(wanted), capacity)
        for place, (src, t, k) in enumerate(wanted[:capacity]):
            assert torch.equal(got[rank].rows[slot, place], x[src][t])
            expected[src][t] += weights[src][t, k].double() * y[rank][slot, place].double()
    out = ranks.run(lambda exchange, rank: exchange.prepare_collect_batched(y[rank], weights[rank], got[rank].handle, torch.float32))
    for a, b in zip(out, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    return dropped


@CASES.add((2, [8, 5]), (4, [8, 0, 3, 8]), (2, [0, 0]), (1, [7]))
def batched(world: int, counts: list[int]) -> None:
    ranks = Ranks(world, batched_capacity=8 * 3 * world)
    for seed in range(3):
        assert batched_once(ranks, counts, seed) == 0


@CASES.add((9, 4), (5, 4))
def batched_uneven(experts: int, world: int) -> None:
    batched_once(Ranks(world, num_experts=experts, batched_capacity=24 * world), [8] * world, 1)


@CASES.add((48,), (7,), (17,))
def experts_between_batched_calls(capacity: int) -> None:
    """Rows are multiplied where they arrived, in memory full of poison, and come back from there."""
    from moe_compile.ops import experts, experts_batched, experts_triton

    ranks = Ranks(2, batched_capacity=capacity)
    x, ids, weights = tokens(ranks, [8, 5], low=0)
    w = torch.randn((8, 32, 32)) / 6
    got = ranks.run(lambda exchange, rank: exchange.prepare_dispatch_batched(x[rank], ids[rank]))
    y = []
    for rank, each in enumerate(got):
        batch = experts_batched.Batch(each.counts, capacity, 20, 4 * capacity)
        call = experts.prepare_unsorted(each.rows.flatten(0, 1), 4, None, [w[4 * rank :][:4]], [], "relu(mm(0, x))", "eio", "", 1)
        y.append(experts_triton.KERNELS[experts_batched.NAME](call, batch).view(4, capacity, 32))
    out = ranks.run(lambda exchange, rank: exchange.prepare_collect_batched(y[rank], weights[rank], got[rank].handle, torch.float32))
    most = torch.bincount(torch.cat([each.flatten() for each in ids]), minlength=8).max()
    for src, found in enumerate(out if capacity >= most else ()):
        rows = torch.relu(torch.einsum("th,tkhi->tki", x[src].double(), w.double()[ids[src]]))
        torch.testing.assert_close(found.double(), (rows * weights[src].double().unsqueeze(2)).sum(1), rtol=1e-4, atol=1e-4)
    assert all(found.isfinite().all() for found in out)


@CASES.add()
def batched_and_plain() -> None:
    """Both formats in turn share buffers and numbering."""
    ranks = Ranks(2, batched_capacity=48)
    for seed in range(3):
        batched_once(ranks, [5, 8], seed)
        exchange_once(ranks, [8, 2], seed)


@CASES.add()
def batched_overflow() -> None:
    """Rows beyond the capacity are dropped, memory beyond is untouched, every rank raises once and goes on."""
    ranks = Ranks(2, batched_capacity=4)
    ids = [torch.tensor([[0, 7, 1]] * 4), torch.tensor([[0, 7, 7]] * 3)]
    assert batched_once(ranks, [4, 3], 0, ids, overflow=9) == 3 + 6


@CASES.add()
def timeout() -> None:
    """A peer that never sends: the call ends, the next one says who was missing."""
    from moe_compile.ops.comm.peer.workspace import ExchangeTimeout

    ranks = Ranks(2)
    x, ids, _ = tokens(ranks, [4, 4])
    call = ranks.exchanges[0].prepare_dispatch(x[0], ids[0])
    call.launch(1)
    call.launch(2)
    with pytest.raises(ExchangeTimeout, match="rank 1") as caught:
        ranks.exchanges[0].dispatch(x[0], ids[0])
    assert (caught.value.stage, caught.value.peer, caught.value.ranks) == ("dispatch", 1, [0, 1])


@CASES.add()
def collect_timeout_poisons() -> None:
    ranks = Ranks(2)
    x, ids, _ = tokens(ranks, [4, 4], low=0)
    ids[0][:, 0], ids[0][:, 1] = 0, 7
    got = ranks.dispatch(x, ids)
    call = ranks.exchanges[0].prepare_collect(torch.ones((16, 32)), got[0].handle)
    call.launch(1)
    call.launch(2)
    assert call.result().isnan().all()


def raises(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        call()


@CASES.add()
def errors() -> None:
    exchange = Ranks(2).exchanges[0]
    x, ids = torch.randn((4, 32)), torch.zeros((4, 3), dtype=torch.int64)
    handle = [torch.zeros((6, 2), dtype=torch.int32)]
    for kind, words, call in (
        (ValueError, "max_tokens=8", lambda: exchange.dispatch(torch.randn((9, 32)), torch.zeros((9, 3), dtype=torch.int64))),
        (ValueError, "x must be [4, 32]", lambda: exchange.dispatch(x[:, :16], ids)),
        (ValueError, "contiguous", lambda: exchange.dispatch(torch.randn((32, 4)).t(), ids)),
        (ValueError, "made for torch.float32", lambda: exchange.dispatch(x.bfloat16(), ids)),
        (ValueError, "int32 or int64", lambda: exchange.dispatch(x, ids.short())),
        (ValueError, "ids must be [4, 3]", lambda: exchange.dispatch(x, ids[:, :2])),
        (ValueError, "at most 2", lambda: exchange.dispatch(x, ids, [x, x, x])),
        (ValueError, "float32, got", lambda: exchange.dispatch(x, ids, [ids])),
        (ValueError, "16 bytes", lambda: exchange.send(torch.randn((4, 3)), handle)),
        (ValueError, "4", lambda: exchange.send(torch.randn((3, 32)), handle)),
        (ValueError, "needs", lambda: exchange.send(torch.randn((4, 64)), handle)),
        (ValueError, "handle", lambda: exchange.collect(torch.randn((16, 32)), [])),
        (ValueError, "rows must be [16, 32]", lambda: exchange.collect(torch.randn((8, 32)), handle)),
        (ValueError, "1 to 8 ranks", lambda: Ranks(9)),
        (ValueError, "max_tokens", lambda: Ranks(2, max_tokens=1 << 16)),
        (ValueError, "16 bytes", lambda: Ranks(2, hidden=33)),
        (ValueError, "multiple of 128", lambda: Ranks(2, quant="fp8")),
        (ValueError, "'fp4'", lambda: Ranks(2, quant="fp4")),
        (ValueError, "float64", lambda: Ranks(2, dtype=torch.float64)),
    ):
        raises(kind, words, call)  # type: ignore[arg-type]
    exchange.destroy()
    exchange.destroy()
    raises(RuntimeError, "destroyed", lambda: exchange.dispatch(x, ids))


test_in_interpreter = CASES.test()


if __name__ == "__main__":
    CASES.main()
