"""Experts chosen by numbers of the data: what is left of a division is a choice; near misses keep their meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile

H, E, VOCABULARY = 8, 4, 50


class Hashed(nn.Module):
    def __init__(self, mutation: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mutation = mutation
        self.embedding = nn.Embedding(VOCABULARY, H)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * H) * 0.3), nn.Parameter(torch.randn(E, 2 * H, H) * 0.3)
        self.register_buffer("table", torch.randint(0, E, (VOCABULARY,)))

    def chosen(self, tokens: Tensor) -> Tensor:
        m = self.mutation
        if m == "table":
            return self.table[tokens]
        ids = tokens * 7 + 3
        if m == "negative":
            ids = -ids
        if m == "rounds_to_zero":
            return torch.fmod(-ids, E).abs()
        ids = ids % (E + {"one_less": -1, "one_more": 1}.get(m or "", 0))
        if m == "shifted":
            ids = (ids + 1).clamp(max=E - 1)
        if m == "written":
            ids[0] = E + 3
        if m == "of_positions":
            ids = torch.arange(len(tokens)) % E
        return ids

    def forward(self, tokens: Tensor) -> Tensor:
        x, ids = self.embedding(tokens.reshape(-1)), self.chosen(tokens.reshape(-1))
        out = torch.zeros_like(x)
        for e in range(E):
            rows = torch.where(ids == e)[0]
            out.index_add_(0, rows, torch.relu(x[rows] @ self.up[e]) @ self.down[e])
        return out


class Gathered(Hashed):
    def forward(self, tokens: Tensor) -> Tensor:
        x, ids = self.embedding(tokens.reshape(-1)), self.chosen(tokens.reshape(-1))
        return torch.einsum("tio,ti->to", self.down[ids], torch.einsum("tio,ti->to", self.up[ids], x).relu())


class Dense(Hashed):
    def forward(self, tokens: Tensor) -> Tensor:
        x, hot = self.embedding(tokens.reshape(-1)), F.one_hot(self.chosen(tokens.reshape(-1)), E).to(self.up)
        y = torch.einsum("eti,eio->eto", torch.einsum("th,ehi->eti", x, self.up).relu(), self.down)
        return torch.einsum("eto,te->to", y, hot)


def rewritten(module: nn.Module) -> tuple[int, str]:
    torch._dynamo.reset()
    report, draw = moe_compile.RewriteReport(), torch.Generator().manual_seed(1)
    compiled = moe_compile.compile(module, inner="eager", report=report)
    for n in (18, 5):
        tokens = torch.randint(0, VOCABULARY, (2, n), generator=draw)
        got, want = compiled(tokens), module(tokens)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        direction = torch.randn(want.shape, generator=draw)
        for a, b in zip(*(torch.autograd.grad(y, list(module.parameters()), direction) for y in (got, want))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return len(report.rewritten), str(report)


@pytest.mark.parametrize(("style", "mutation"), [(Hashed, "negative"), (Gathered, None), (Dense, None)])
def test_what_is_left_of_a_division_is_a_choice(style, mutation):
    assert rewritten(style(mutation))[0] > 0


@pytest.mark.parametrize("mutation", ["one_less", "one_more", "shifted", "written", "of_positions", "rounds_to_zero"])
def test_near_misses_keep_their_meaning(mutation):
    rewritten(Hashed(mutation))


def test_a_table_may_hold_any_number():
    done, report = rewritten(Hashed("table"))
    assert not done
    assert "the caller chooses" in report


class Scored(Hashed):
    """A choice by scores beside: the remainder is taken of it, and is none by itself."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.reshape(-1))
        w, ids = (x @ self.up[0]).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            rows, slot = torch.where((ids + tokens.reshape(-1, 1)) % E == e)
            out.index_add_(0, rows, (torch.relu(x[rows] @ self.up[e]) @ self.down[e]) * w[rows, slot, None])
        return out


def test_scores_beside():
    rewritten(Scored())
