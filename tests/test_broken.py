"""What the plain backend name tells of MoE blocks that Dynamo cannot trace."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compile import broken, logs


class Breaks(nn.Module):
    """A block whose form Dynamo takes or not."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2, -1)
        return self.combined(x, w, ids)

    def combined(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if self.form == "whole":
            for e, expert in enumerate(self.experts):
                out = out + expert(x) * (w * (ids == e)).sum(-1, keepdim=True)
            return out
        if self.form == "counts":
            order, first = ids.flatten().argsort(), 0
            for e, count in enumerate(torch.bincount(ids.flatten(), minlength=4).tolist()):
                tokens = order[first : first + count]
                out.index_add_(0, tokens // 2, self.experts[e](x[tokens // 2]) * w.flatten()[tokens, None])
                first += count
            return out
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() == 0:
                continue
            out[t] += expert(x[t]) * w[t, k, None]
        return out


class Stack(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Breaks(form) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Plain(nn.Module):
    """Breaks, and has no experts."""

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for i in range(3):
            if x.sum() > i:
                continue
            total = total + x[x[:, 0].nonzero()[:, 0]].sum()
        return total


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Any:
    broken.tell()  # of what other tests compiled
    logs.forget()
    caplog.clear()
    torch._dynamo.reset()
    broken.listen()

    def messages(model: nn.Module) -> list[str]:
        compiled, x = torch.compile(model, backend="moe_compile"), torch.randn(9, 16)
        with torch.no_grad(), caplog.at_level(logging.WARNING, "moe_compile"):
            torch.testing.assert_close(compiled(x), model(x))
            compiled(x)
            broken.tell()
        return [each.getMessage() for each in caplog.records if "Dynamo cannot trace" in each.getMessage()]

    return messages


@pytest.mark.parametrize("model", [Stack, Breaks])
@pytest.mark.parametrize("form", ["counts", "empty"])
def test_a_block_that_dynamo_breaks_is_told_once(form: str, model: Any, told: Any) -> None:
    (message,) = told(model(form))
    assert "Breaks" in message
    assert __file__ in message
    assert "moe_compile.compile(model), or @moe_compile.moe on Breaks" in message


@pytest.mark.parametrize("model", [Stack("whole"), Plain()])
def test_nothing_is_told_of_others(model: nn.Module, told: Any) -> None:
    assert told(model) == []


def test_the_name_listens() -> None:
    from torch._dynamo.callback import callback_handler

    torch._dynamo.reset()
    torch.compile(Stack("whole"), backend="moe_compile")(torch.randn(9, 16))
    assert broken._compilation_ended in callback_handler.end_callbacks
