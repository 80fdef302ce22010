"""A choice that is made again for each expert is one decision; what differs from it stays one of its own."""

from __future__ import annotations

import pytest
import torch
from blocks import graph_of
from torch import Tensor, nn

import moe_compile
from moe_compile.passes.repeated import merge

H, E = 8, 4


class Loop(nn.Module):
    """Masks of an argmax in a loop over experts."""

    def __init__(self, mutation: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mutation = mutation
        self.gate = nn.Linear(H, E)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 2 * H), nn.ReLU(), nn.Linear(2 * H, H)) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        p, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = p.argmax(-1) == e
            out[hit] += expert(x[hit]) * p[hit][:, e : e + 1]
        return out


class TopK(Loop):
    def chosen(self, p: Tensor, e: int) -> tuple[Tensor, Tensor]:
        m = self.mutation
        if m == "more_for_one":
            return p.topk(3 if e == 2 else 2, dim=-1)
        if m == "scores_written" and e == 2:
            p += torch.arange(E) * 0.1
        if m == "without_gradient" and e == 2:
            with torch.no_grad():
                return p.topk(2, dim=-1)
        w, ids = p.topk(2, dim=-1)
        if m == "weights_written":
            w *= 0.5 + e
        return w, ids

    def forward(self, x: Tensor) -> Tensor:
        p, out = self.gate(x).softmax(-1).clone(), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            w, ids = self.chosen(p, e)
            out = out + expert(x) * (w / w.sum(-1, keepdim=True) * (ids == e)).sum(-1, keepdim=True)
        return out


def compared(module: nn.Module) -> moe_compile.RewriteReport:
    torch._dynamo.reset()
    report, draw = moe_compile.RewriteReport(), torch.Generator().manual_seed(1)
    compiled = moe_compile.compile(module, inner="eager", report=report)
    for n in (9, 1):
        x = torch.randn((n, H), generator=draw)
        got, want = compiled(x), module(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        direction = torch.randn(want.shape, generator=draw)
        pairs = zip(*(torch.autograd.grad(y, list(module.parameters()), direction, allow_unused=True) for y in (got, want)))
        for a, b in pairs:
            torch.testing.assert_close(*(torch.zeros(1) if g is None else g for g in (a, b)), rtol=1e-4, atol=1e-5)
    return report


@pytest.mark.parametrize("style", [Loop, TopK])
def test_one_decision(style):
    report = compared(style())
    assert report.rewritten
    assert not report.refused


@pytest.mark.parametrize("mutation", ["more_for_one", "scores_written", "without_gradient", "weights_written"])
def test_near_misses_keep_their_meaning(mutation):
    compared(TopK(mutation))


def test_what_is_not_rewritten_stays_as_it_was():
    gm = graph_of(lambda s: s.topk(2)[0] + s.argmax(-1, True) * s.topk(2)[0] * s.argmax(-1, True), torch.randn(5, E))
    before = str(gm.graph)
    merged = merge(gm.graph)
    assert len(merged.nodes) == 3  # the second topk, its values, the second argmax
    assert str(gm.graph) != before
    merged.undo()
    assert str(gm.graph) == before


@pytest.mark.parametrize(
    "code",
    [
        lambda s: s.topk(2)[0].sum() + s.topk(3)[0].sum(),
        lambda s: s.argmax(-1).sum() + s.argmax(0).sum(),
        lambda s: s.argmax(-1).sum() + s.add_(1).argmax(-1).sum(),
        lambda s: s.topk(2)[0].mul_(2).sum() + s.topk(2)[0].sum(),
        lambda s: s.sort(-1)[1] + s.sort(-1, True)[1],
        lambda s: (s.argmax(-1), s.argmax(-1)),  # who gets both may write into one
        lambda s: (s.topk(2)[0], s.topk(2)[0].T),
    ],
)
def test_others_are_not_merged(code):
    assert not merge(graph_of(code, torch.randn(5, E)).graph).nodes
