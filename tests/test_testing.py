"""The assertions for users' tests, and the normal form they compare."""

from __future__ import annotations

import fakes
import pytest
import torch

from moe_compile import passes
from moe_compile.passes.diff import Names, coloured, normal_form, unified
from moe_compile.testing import assert_graph_diff, assert_rewritten, op_count

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def rewrites(monkeypatch):
    monkeypatch.setattr(passes, "run", fakes.rewrite_relu, raising=False)


def captured(function, *inputs, **kwargs):
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, **kwargs)(*inputs)
    return graphs[0]


x = torch.ones(5, 8)


def test_assert_rewritten_accepts_tensor_tuple_and_mapping(rewrites):
    model = fakes.Model()
    for inputs in (x, (x,), {"x": x}):
        assert len(assert_rewritten(model, inputs, n=2).rewritten) == 2
    assert_rewritten(model, x)


def test_assert_rewritten_fails_with_the_report(rewrites, monkeypatch):
    with pytest.raises(AssertionError, match=r"3 MoE block.*\n.*2 found, 2 rewritten"):
        assert_rewritten(fakes.Model(), x, n=3)
    monkeypatch.setattr(passes, "run", fakes.refuse_all)
    with pytest.raises(AssertionError, match="the gate is not a gate"):
        assert_rewritten(fakes.Model(), x)


def test_assert_graph_diff(rewrites):
    def model(x):
        return torch.relu(x + 1)

    expected = """
--- graph 0 before
+++ graph 0 after
@@
-relu = relu(add)  # f32[5, 8]
-return (relu,)
+clamp_min = clamp_min(add, 0)  # f32[5, 8]
+return (clamp_min,)
"""
    assert_graph_diff(model, x, expected)
    with pytest.raises(AssertionError):
        assert_graph_diff(model, x, expected.replace("clamp_min", "clamp"))


def test_op_count(rewrites):
    gm = captured(fakes.Model(), x)
    assert op_count(gm, "relu") == 2
    assert op_count(gm, "linear") == 2
    assert op_count(gm, "rel") == 0
    report = assert_rewritten(fakes.Model(), x)
    assert op_count(report, "clamp_min") == 2
    assert op_count(report, "relu") == 0
    report = assert_rewritten(lambda x: torch.relu(x).mul(2), x)
    assert op_count(report, "mul") == 1


def test_normal_form_names_parameters_operations_and_types():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.ReLU())

    def forward(x):
        return model(x)[:, 1:3].reshape(-1).to(torch.bfloat16)

    assert normal_form(captured(model, x)) == (
        "0.weight = input  # f32[4, 8]\n"
        "args.0 = input  # f32[5, 8]\n"
        "linear = linear(args.0, 0.weight, None)  # f32[5, 4]\n"
        "relu = relu(linear, inplace=False)  # f32[5, 4]\n"
        "return (relu,)\n"
    )
    lines = normal_form(captured(forward, x)).splitlines()
    assert lines[-4:] == [
        "getitem = getitem(relu, (:, 1:3))  # f32[5, 2]",
        "reshape = getitem.reshape(-1)  # f32[10]",
        "to = reshape.to(bf16)  # bf16[10]",
        "return (to,)",
    ]


def test_normal_form_numbers_symbols_by_appearance():
    def function(a, b):
        return a.sum() + b.sum() * b.shape[0] + a.nonzero().sum()

    def text():
        torch._dynamo.reset()
        return normal_form(captured(function, torch.ones(3), torch.ones(7), dynamic=True, fullgraph=True))

    first = text()
    assert first == text()
    assert "a = input  # f32[s0]" in first
    assert "b = input  # f32[s1]" in first
    assert "i64[u0, 1]" in first


def test_normal_form_shows_nested_graphs():
    from torch.utils.checkpoint import checkpoint

    gm = captured(lambda x: checkpoint(torch.relu, x, use_reentrant=False), x.clone().requires_grad_())
    assert "    relu = relu(x" in normal_form(gm)


def test_names_of_what_stays_survive_an_edit():
    gm, names = captured(fakes.Model(), x), Names()
    before = normal_form(gm, names)
    first = gm.graph.find_nodes(op="call_function", target=torch.nn.functional.linear)[0]
    with gm.graph.inserting_after(first):
        new = gm.graph.call_function(torch.neg, (first,))
    first.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    changed = [line for line in unified(before, normal_form(gm, names), context=0).splitlines() if line[0] in "+-"][2:]
    assert changed == [
        "-relu = relu(linear)  # f32[5, 8]",
        "+neg = neg(linear)",
        "+relu = relu(neg)  # f32[5, 8]",
    ]


def test_coloured_diff_has_a_style_for_each_kind_of_line():
    text = coloured("--- a\n+++ b\n@@ -1 +1 @@\n-old\n+new\n same\n")
    styles = [str(span.style) for span in text.spans]
    assert styles == ["bold", "bold", "cyan", "red", "green", "dim"]
