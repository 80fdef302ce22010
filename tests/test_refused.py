"""A block that is refused as a part of a whole model is not lifted again in every piece that Dynamo makes of it then."""

from __future__ import annotations

import sys

import pytest
import torch
from probed_blocks import Block, H
from torch import nn

import moe_compile
import moe_compile.passes.run


class Normed(Block):
    """Experts with a norm inside are no linear layers."""

    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t])
            out.index_add_(0, t, y / y.norm(dim=-1, keepdim=True) * w[t, k, None])
        return out


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.tanh()) + x


@pytest.fixture
def lifted(monkeypatch):
    run = sys.modules["moe_compile.passes.run"]
    seen, find = [], run.find_region

    def counted(gm, decision, *args):
        seen.append(decision)
        return find(gm, decision, *args)

    monkeypatch.setattr(run, "find_region", counted)
    return seen


def lifts(lifted, levels: int) -> int:
    torch._dynamo.reset()
    model = Normed()
    for _ in range(levels):
        model = Nested(model)
    del lifted[:]
    moe_compile.compile(model, inner="eager")(torch.randn(7, H))
    return len(lifted)


def test_models_around_a_refused_block_do_not_lift_it_again(lifted):
    assert lifts(lifted, 5) == lifts(lifted, 1)


def test_refused_block_runs_as_it_was():
    torch._dynamo.reset()
    model = Nested(Nested(Nested(Normed())))
    report = moe_compile.RewriteReport()
    fast = moe_compile.compile(model, inner="eager", report=report)
    x = torch.randn(7, H)
    torch.testing.assert_close(fast(x), model(x))
    assert not report.rewritten
    assert any("no rule for linalg_vector_norm" in note for note in report.notes)
    for n in (9, 4):
        x = torch.randn(n, H)
        torch.testing.assert_close(fast(x), model(x))


def test_other_blocks_of_the_same_class_are_looked_at(lifted):
    torch._dynamo.reset()
    refused, fine = Nested(Normed()), Nested(Nested(Plain()))
    report = moe_compile.RewriteReport()
    for model in (refused, fine):
        fast = moe_compile.compile(model, inner="eager", report=report)
        x = torch.randn(7, H)
        torch.testing.assert_close(fast(x), model(x))
    assert len(report.rewritten) == 1


class Plain(Block):
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            self.add(out, x, w, ids, e)
        return out
