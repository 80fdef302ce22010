"""Every naive style keeps its values and gradients; what is one graph is rewritten, unless written down."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from corpus import styles
from corpus.expected import STYLE_GRAPHS, STYLE_LEFT, STYLE_REFUSED, STYLE_REGIONS
from corpus.harness import distance, dynamo_graphs, error, left_over, observe, worst
from corpus.variants import VARIANTS
from torch import Tensor, nn

import moe_compile

NAMES = [*styles.CASES, *VARIANTS]


@dataclass
class Style:
    module: nn.Module
    x: Tensor
    half: bool  # rounds to bfloat16 or float16 somewhere

    def other_input(self, seed: int) -> Tensor:
        return torch.randn(self.x.shape, generator=torch.Generator().manual_seed(seed)).to(self.x.dtype)


def load(name: str) -> Style:
    if name in VARIANTS:
        variant = VARIANTS[name]
        half = variant.dtype in (torch.bfloat16, torch.float16) or "bf16" in name or "autocast" in name
        return Style(variant.build(), variant.inputs(), half)
    case = styles.CASES[name]
    (x,) = case.inputs()
    return Style(case.factory(), x, x.dtype is torch.bfloat16)


def regions(name: str) -> int:
    """How many rewritten regions the style should have."""
    if name in STYLE_REFUSED or name in STYLE_LEFT:
        return 0
    return STYLE_REGIONS.get(name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_kept(name):
    style, report = load(name), moe_compile.RewriteReport()
    torch._dynamo.reset()
    left: list[str] = []

    def inner(gm, _):
        left.extend(left_over(gm))
        return gm.forward

    compiled = moe_compile.compile(style.module, inner=inner, report=report)
    for seed in (7, 8):
        x = style.other_input(seed)
        reset_buffers = {n: b.clone() for n, b in style.module.named_buffers()}
        want = observe(style.module, style.module, x, grad=True)
        after = {n: b.clone() for n, b in style.module.named_buffers()}
        for n, b in style.module.named_buffers():
            b.copy_(reset_buffers[n])
        got = observe(compiled, style.module, x, grad=True)
        largest, of = worst(got, want)
        assert largest < (5e-2 if style.half else 1e-4), (of, str(report))
        assert distance(got, want) < (5e-3 if style.half else 1e-5), str(report)
        assert all(error(b, after[n]) == 0 for n, b in style.module.named_buffers()), "buffers differ"
    assert len(report.rewritten) == regions(name), str(report)
    assert not left, left


@pytest.mark.parametrize("name", ["slot_then_expert", *(n for n in NAMES if n.startswith("mask_slots"))])
def test_slots_written_out_one_by_one_are_one_sum(name):
    style = load(name)
    report = moe_compile.explain(style.module)(style.x)
    assert [r.top_k for r in report.rewritten] == [2], str(report)


@pytest.mark.parametrize("name", [n for n in NAMES if n in STYLE_REFUSED])
def test_refusal_says_why(name):
    style = load(name)
    report = moe_compile.explain(style.module)(style.x)
    assert not report.rewritten
    reasons = [str(region.reason) for region in report.refused] or report.notes
    assert reasons
    assert all(reasons)
    assert any(STYLE_REFUSED[name] in reason for reason in reasons), reasons
    assert all(region.where for region in report.refused), str(report)


@pytest.mark.parametrize("name", STYLE_GRAPHS)
def test_what_is_not_one_graph_says_so(name):
    style = load(name)
    report = moe_compile.explain(style.module)(style.x)
    notes = "; ".join(report.notes + [str(region.reason) for region in report.refused])
    assert bool(report.rewritten) == (name not in STYLE_LEFT), str(report)
    assert STYLE_LEFT.get(name, "is captured from a recording") in notes, str(report)


def test_expectations_name_styles_that_exist():
    assert {*STYLE_GRAPHS, *STYLE_LEFT, *STYLE_REFUSED, *STYLE_REGIONS} <= {*NAMES}


@pytest.mark.parametrize("name", [n for n in NAMES if n in STYLE_GRAPHS])
def test_dynamo_makes_these_graphs(name):
    """The expectation is about Dynamo; if torch learns to capture one, its rewrite is expected next."""
    style = load(name)
    assert dynamo_graphs(style.module, style.x) == STYLE_GRAPHS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_its_oracle(name):
    """The corpus itself: each spelling computes the formula, one token and slot at a time in float64."""
    style = load(name)
    with torch.no_grad():
        out = style.module(style.x)
    got = out if torch.is_tensor(out) else out[0]
    want = style.module.oracle(style.x)
    assert float((got.double() - want).abs().max() / want.abs().max()) < (2e-2 if style.half else 1e-5)
