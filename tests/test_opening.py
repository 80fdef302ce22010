"""Exchanges are opened when a graph is compiled, and a failure on the device is told at once."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from moe_compile import opening
from moe_compile.errors import ParallelError
from moe_compile.ops.comm import watch


def graph_with(provider: str, device: str) -> GraphModule:
    """quantize_dispatch of x on a device, by a provider."""
    graph = Graph()
    x, ids = graph.placeholder("x"), graph.placeholder("ids")
    with torch._subclasses.FakeTensorMode():
        x.meta["example_value"] = torch.empty((3, 4), device=device)
    rows = graph.call_method("relu", (x,))  # says nothing of its own
    dispatch = torch.ops.moe_compile.quantize_dispatch.default
    for setup in ("a setup", "a setup", "another"):
        graph.call_function(dispatch, (rows, ids, 4, "none", provider, [], setup))
    graph.call_function(dispatch, (rows, ids, 4, "none", "local"))
    graph.output(rows)
    return GraphModule(torch.nn.Module(), graph)


def test_each_exchange_of_a_graph_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(opening, "exchange_of", lambda *args: opened.append(args))
    opening.open_exchanges(graph_with("nvlink", "cuda"))
    assert [(name, setup, device.type) for name, setup, device in opened] == [("nvlink", "a setup", "cuda"), ("nvlink", "another", "cuda")]


def test_nothing_is_opened_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "exchange_of", lambda *args: pytest.fail("opened"))
    opening.open_exchanges(graph_with("alltoall", "cpu"))


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_no_room_is_an_error_of_the_compilation_with_the_way_out(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def full(*args: Any) -> None:
        raise kind("7.50 GiB wanted, 2.00 free")

    monkeypatch.setattr(opening, "exchange_of", full)
    with pytest.raises(ParallelError, match=r"nvlink: no room.*7\.50 GiB wanted.*max_tokens_per_rank"):
        opening.open_exchanges(graph_with("nvlink", "cuda"))


def test_a_workspace_is_cleared_before_any_peer_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks meet once the workspace is open, and whoever comes first writes at once: what is cleared later is lost."""
    import types

    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    from moe_compile.ops.comm.peer import engine, workspace

    memory, met = torch.empty(0, dtype=torch.uint8), []

    def empty(nbytes: int, dtype: Any, device: Any) -> Any:
        memory.set_(torch.full((nbytes,), 0xAB, dtype=torch.uint8))
        return memory

    def meet(group: Any, value: int, device: Any) -> int:
        met.append(memory.clone())
        return value

    monkeypatch.setattr(symmetric_memory, "empty", empty)
    monkeypatch.setattr(symmetric_memory, "rendezvous", lambda *args: types.SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * 2))
    monkeypatch.setattr(workspace, "_least", meet)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(engine, "_device_of", lambda: torch.device("cpu"))
    monkeypatch.setattr(engine, "_world_of", lambda group: 2)
    own = engine.NvlinkEngine(None, max_tokens=4, hidden=16, top_k=2, num_experts=4, dtype=torch.float32)
    assert torch.equal(met[-1], memory)
    layout = own.layout()
    for region, value in (("ids", 0xFF), ("started", 0), ("pushed", 0), ("landed", 0), ("counted", 0)):
        offset, nbytes = layout.regions[region]
        assert (memory[offset : offset + nbytes] == value).all(), region


class Engine:
    """What watch() asks of an engine."""

    def __init__(self) -> None:
        self.alive, self.told = True, None

    def failure(self) -> Exception | None:
        return self.told


def test_a_failed_exchange_is_logged_at_once_and_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    engine, gone = Engine(), Engine()
    gone.alive = False
    gone.told = RuntimeError("of a destroyed one")
    try:
        watch.watch(engine)
        watch.watch(gone)
        engine.told = RuntimeError("collect waited 4 s for rank 1 of ranks [0, 1]")
        until = time.monotonic() + 5
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        watch.stop()
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [str(engine.told)]
