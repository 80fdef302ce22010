"""Which exchange is chosen: measured tables before formulas, another one for few tokens than for many, a graph for each range."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import parallel_cases as cases
import pytest
import torch
from ranks import Ranks

from moe_compile.ops import registry
from moe_compile.ops.comm import costs
from moe_compile.ops.comm.measured import SHIPPED
from moe_compile.ops.comm.setup import Setup
from moe_compile.ops.registry import Problem
from moe_compile.passes import select

PROBLEM = Problem("comm", "cpu", torch.bfloat16, hidden=7168, num_experts=256, top_k=8, tokens=128, world=2)
KEY = costs.Key("cpu", 2, "none")


@pytest.fixture(autouse=True)
def nothing_calibrated() -> Iterator[None]:
    yield
    costs.forget()


def use(**points: dict[int, float]) -> None:
    costs.use(KEY, costs.Table(costs.REFERENCE, "a test", points))


def test_a_size_between_two_measured_ones_costs_between() -> None:
    points = {128: 50.0, 1152: 250.0}
    assert [costs.interpolated(points, t) for t in (1, 128, 640, 1152, 2176)] == [50, 50, 150, 250, 450]


def test_a_layer_is_read_where_as_many_bytes_move() -> None:
    use(allgather={128: 50.0, 1152: 250.0})
    half = dataclasses.replace(PROBLEM, hidden=3584, tokens=1280)  # half the width, so as 640 tokens
    assert costs.measured("allgather", half) == 150
    assert costs.measured("allgather", dataclasses.replace(PROBLEM, world=4)) is None
    assert costs.measured("alltoall", PROBLEM) is None


def test_rows_grow_as_each_provider_sends_them() -> None:
    few = dataclasses.replace(PROBLEM, top_k=1)
    read = {name: costs.tokens_in(costs.REFERENCE, name, few) / 128 for name in ("allgather", "nvlink", "deepep_ll")}
    assert read["allgather"] == 1
    assert read["deepep_ll"] == pytest.approx(1 / 8)
    assert read["nvlink"] == pytest.approx(1 / costs.ranks_of_token(2, 8))


def test_the_measured_cheapest_is_chosen_and_the_report_says_so() -> None:
    use(allgather={128: 50.0, 4096: 1000.0}, alltoall={128: 90.0, 4096: 800.0})
    few = select.choose(PROBLEM, ("comm",))
    assert few.providers["comm"] == "allgather"
    assert few.losers["comm"]["alltoall"] == "slower (90 us measured, allgather 50)"
    assert select.choose(dataclasses.replace(PROBLEM, tokens=4096), ("comm",)).providers["comm"] == "alltoall"


def test_a_table_survives_json() -> None:
    table = costs.Table(costs.Shape(2048, 4, 2), "here", {"nvlink": {1: 18.0, 128: 48.5}})
    assert costs.from_json(costs.to_json(KEY, table)) == (KEY, table)


@pytest.mark.parametrize(("name", "family"), [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("cpu", "cpu")])
def test_a_device_is_known_by_its_kind(name: str, family: str) -> None:
    assert costs.device_family(name) == family


def test_shipped_tables_name_providers_and_grow_with_tokens() -> None:
    known = {p.name for p in registry.providers("comm")}
    assert SHIPPED
    for table in SHIPPED.values():
        assert set(table.points) <= known & set(costs.GROWTH)
        for points in table.points.values():
            assert all(us > 0 for us in points.values())
            assert points[max(points)] > points[min(points)]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as found:
        yield found


def test_a_calibration_is_used_and_kept(two: Ranks) -> None:
    assert two.run(cases.calibrated) == [({"allgather": [4, 64], "alltoall": [4, 64]}, True)] * 2


def test_decode_and_prefill_of_one_model_take_different_exchanges(two: Ranks) -> None:
    """A model compiled for any number of tokens: few go by all-gather, many by all-to-all, each a graph of its own."""
    for found in two.run(cases.sizes_apart):
        assert found == [(4, "allgather"), (512, "alltoall"), (6, "allgather"), (700, "alltoall"), (3, "allgather")]


def test_losers_of_batched_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that read routing weights do not get a batched provider, however cheap."""
    cheap: Any = registry.Provider("cheap", "comm", {"slots": lambda setup: 1}, lambda p: 0.0)
    monkeypatch.setitem(registry._providers, ("comm", "cheap"), cheap)
    assert select.choose(PROBLEM, ("comm",)).providers["comm"] == "cheap"
    other = select.choose(PROBLEM, ("comm",), weights_inside=True)
    assert other.providers["comm"] != "cheap"
    assert "read" in other.losers["comm"]["cheap"]


@pytest.mark.parametrize(("device", "tokens", "graphs", "wanted"), [
    ("cuda", 128, True, True), ("cuda", 128, False, False), ("cuda", 4096, False, True), ("cpu", 4096, True, False),
])  # fmt: skip
def test_an_exchange_gets_a_stream_of_its_own_where_that_pays(device: str, tokens: int, graphs: bool, wanted: bool) -> None:
    with torch._subclasses.FakeTensorMode():
        out = torch.empty((tokens, 2048), dtype=torch.bfloat16, device=device)
    assert select.overlaps(out, Setup("0", 2048, 8, 128, cuda_graphs=graphs)) is wanted
