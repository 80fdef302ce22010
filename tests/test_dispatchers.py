"""Rows in the order of their experts, by tables of gates and lists of the experts that are hit: rewritten, or left as they are."""

from __future__ import annotations

import pytest
import torch
from corpus.harness import observe, worst
from dispatch_blocks import NOT_RECORDED, OTHERWISE, RIGHT
from torch import Tensor, nn

import moe_compile
from moe_compile.probing.errors import NotProbed
from moe_compile.probing.probe import program_for


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = cls()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def width(module: nn.Module) -> int:
    return module.gate.weight.shape[1]


def inputs(module: nn.Module, n: int, seed: int) -> Tensor:
    shape = (3, n, width(module)) if hasattr(module, "batched") else (n, width(module))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(module: nn.Module, xs: list[Tensor]) -> moe_compile.RewriteReport:
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    fast = moe_compile.compile(module, inner="eager", report=report, fullgraph=True)
    for x in xs:
        want, got = observe(module, module, x, grad=True), observe(fast, module, x, grad=True)
        assert worst(got, want)[0] < 1e-4, (worst(got, want), str(report))
    return report


@pytest.mark.parametrize("name", RIGHT)
def test_dispatcher_is_rewritten_in_training(name):
    module = build(RIGHT[name]).train()
    report = compare(module, [inputs(module, n, seed) for seed, n in enumerate((12, 7, 12))])
    assert report.rewritten, str(report)
    assert all(r.top_k == 2 for r in report.rewritten)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_says_something_else_keeps_its_meaning(name):
    module = build(OTHERWISE[name]).eval()
    compare(module, [inputs(module, 12, 0)])


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_matters_where_an_expert_is_not_hit_is_not_recorded(name):
    cls, reason = NOT_RECORDED[name]
    module = build(cls)
    with pytest.raises(NotProbed, match=reason):
        program_for(module, (inputs(module, 12, 0),), {})


def test_gates_that_are_zero_for_a_chosen_expert_add_nothing():
    """Probabilities that are too small for float32: values and gradients, the router's too, are eager's."""
    module = build(RIGHT["Dispatched"]).eval()
    x = inputs(module, 12, 0) * 300
    with torch.no_grad():
        assert (module.gates(x) > 0).sum(1).min() < 2
    assert compare(module, [x, inputs(module, 12, 1)]).rewritten


def test_experts_without_tokens_and_equal_scores():
    module = build(RIGHT["Dispatched"]).eval()
    x = inputs(module, 12, 0)
    assert compare(module, [x[:1].expand_as(x).clone(), torch.zeros_like(x), x]).rewritten


def test_gates_of_either_sign_do_not_run():
    """The sizes count positive gates, the rows those that are not zero: eager raises, so there is nothing to rewrite."""

    class Signed(RIGHT["Dispatched"]):
        def probabilities(self, x: Tensor) -> Tensor:
            return self.gate(x)

    module = build(Signed).eval()
    x = inputs(module, 12, 0)
    report = moe_compile.RewriteReport()
    with torch.no_grad(), pytest.raises(RuntimeError):
        module(x)
    with torch.no_grad(), pytest.raises(RuntimeError):
        moe_compile.compile(module, inner="eager", report=report)(x)
    assert not report.rewritten
