"""The report: what it says of regions, graphs and graph breaks, as text, as JSON and as a diff; and `explain`."""

from __future__ import annotations

import dataclasses
import json
import logging

import fakes
import pytest
import torch

import moe_compile
from moe_compile import RewriteReport, passes
from moe_compile.report import GraphReport, RegionReport

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rewrites(monkeypatch):
    monkeypatch.setattr(passes, "run", fakes.rewrite_relu, raising=False)


@pytest.fixture
def refuses(monkeypatch):
    monkeypatch.setattr(passes, "run", fakes.refuse_all, raising=False)


def report():
    done = RegionReport(
        rewritten=True,
        where="model.py:10",
        module="layers.0.moe",
        formula="y = W2 silu(W1 x)",
        router="softmax, top 2",
        num_experts=8,
        top_k=2,
        providers={"experts": "cpu_grouped"},
        losers={"experts": {"cuda_grouped_mm": "needs a CUDA device"}},
        validation="5 routings, largest error 1e-7",
        nodes_before=90,
        nodes_after=7,
    )
    left = RegionReport(False, reason="`tanh_` at model.py:12 has no rule", where="model.py:11")
    graph = GraphReport(0, 100, 17, [done, left], {"lift": 0.25}, "a = b\n", "a = c\n", ["seen twice"])
    return RewriteReport([graph], ["model.py:3: .item()"], ["no probe"], 1.5)


def test_text_says_what_why_and_how_long():
    text = str(report())
    for part in (
        "MoE blocks: 2 found, 1 rewritten, 1 left as they were",
        "graphs: 1, graph breaks: 1, compiled in 1.50 s",
        "graph 0: 100 -> 17 nodes (lift 250.0 ms)",
        "rewritten  model.py:10  (layers.0.moe)",
        "top 2 of 8",
        "experts = cpu_grouped; not cuda_grouped_mm: needs a CUDA device",
        "reason     `tanh_` at model.py:12 has no rule",
        "graph break: model.py:3: .item()",
        "note: no probe",
    ):
        assert part in text


def test_json_holds_everything():
    assert dataclasses.asdict(RewriteReport.from_json(report().to_json())) == dataclasses.asdict(report())
    assert json.loads(report().to_json())["graphs"][0]["regions"][0]["module"] == "layers.0.moe"


def test_regions_are_sorted_into_rewritten_and_refused():
    assert [region.where for region in report().rewritten] == ["model.py:10"]
    assert [region.where for region in report().refused] == ["model.py:11"]


def test_diff_shows_changed_lines_only():
    assert report().diff().splitlines()[-2:] == ["-a = b", "+a = c"]
    assert RewriteReport([GraphReport(before="a\n", after="a\n")]).diff() == ""


# ---------------------------------------------------------------- explain


def test_explain_reports_graphs_regions_and_diff(rewrites, x):
    explained = moe_compile.explain(fakes.Model())(x)
    assert len(explained.graphs) == 1
    assert len(explained.rewritten) == 2
    assert explained.graph_breaks == []
    changed = [line for line in explained.diff(0).splitlines() if line[0] in "+-"][2:]
    assert sorted(changed) == [
        "+clamp_min = clamp_min(linear, 0)  # f32[5, 8]",
        "+clamp_min_1 = clamp_min(linear_1, 0)  # f32[5, 8]",
        "+linear_1 = linear(clamp_min, second.weight, second.bias)  # f32[5, 8]",
        "+return (clamp_min_1,)",
        "-linear_1 = linear(relu, second.weight, second.bias)  # f32[5, 8]",
        "-relu = relu(linear)  # f32[5, 8]",
        "-relu_1 = relu(linear_1)  # f32[5, 8]",
        "-return (relu_1,)",
    ]


def test_explain_compiles_afresh_each_time(rewrites, x):
    model = fakes.Model()
    for _ in range(2):
        assert len(moe_compile.explain(model)(x).graphs) == 1


def test_explain_keeps_what_was_captured_and_refused(refuses, x):
    def loop(x):
        return torch.relu(x)[torch.nonzero(x[:, 0] > 0)[:, 0]]

    explained = moe_compile.explain(loop)(x)
    assert len(explained.graphs) == 1
    assert [region.reason for region in explained.refused] == ["the gate is not a gate"]
    assert "captures this frame again without" in explained.graphs[0].notes[0]
    plain = moe_compile.explain(loop, capture_flags=False)(x)
    assert len(plain.graphs) == 2
    assert len(plain.graph_breaks) == 1


def test_explain_counts_breaks_that_depend_on_data(rewrites, x):
    def loop(x):
        for row in torch.nonzero(x[:, 0] > 0):
            x = x + row
        return x

    explained = moe_compile.explain(loop)(x)
    assert len(explained.graph_breaks) == 1
    assert __file__ in explained.graph_breaks[0]


def test_explain_counts_each_break_of_one_place(rewrites, x):
    def loop(x):
        for _ in range(3):
            x = x + 1
            torch._dynamo.graph_break()
        return x

    first, second = (moe_compile.explain(loop)(x).graph_breaks for _ in range(2))
    assert len(first) == len(second) >= 1


@torch.compiler.disable
def hidden(x):
    return x + 1


@pytest.mark.parametrize("capture_flags", [True, False])
def test_explain_says_when_the_backend_was_never_called(rewrites, x, capture_flags):
    explained = moe_compile.explain(lambda x: hidden(x), capture_flags=capture_flags)(x)
    assert explained.graphs == []
    assert "Dynamo handed over no graph" in explained.notes[0]
    assert "disable" in explained.notes[0]
    assert "no graph" in str(explained)


def test_explain_says_when_dynamo_is_off(rewrites, x):
    with torch.compiler.set_stance("force_eager"):
        explained = moe_compile.explain(fakes.Model())(x)
    assert "Dynamo is disabled" in explained.notes[0]


def test_explain_says_when_no_routing_was_found(refuses, x):
    assert "no routing decision" in moe_compile.explain(lambda x: x + 1)(x).notes[0]


def test_explain_leaves_dynamos_loggers_as_they_were(rewrites, x):
    from moe_compile.explaining import _BREAK_LOGS, _FRAME_LOG

    loggers = [logging.getLogger(name) for name in (*_BREAK_LOGS, _FRAME_LOG)]
    before = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    with pytest.raises(ZeroDivisionError):
        moe_compile.explain(lambda x: x + 1 // 0)(x)
    assert [(log.level, log.propagate, list(log.handlers)) for log in loggers] == before
