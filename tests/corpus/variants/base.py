"""What all variants share: sizes, registration, a router, and the per-token loop that each must equal."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# All different, so that a confusion of two axes is a shape error or a wrong number and never an accident.
H, I, E, K, T = 24, 20, 4, 2, 12  # noqa: E741


def x2d(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype)


def x3d(dtype: torch.dtype = torch.float32) -> Tensor:
    return x2d(dtype).view(2, T // 2, H)


def x4d(dtype: torch.dtype = torch.float32) -> Tensor:
    return x2d(dtype).view(2, 2, T // 4, H)


@dataclass(frozen=True)
class Variant:
    """One way of writing an MoE layer: `build()` gives the seeded module, `inputs()` its one argument."""

    name: str
    family: str
    note: str
    cls: type[nn.Module]
    inputs: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Block:
        torch.manual_seed(0)
        module = self.cls(**self.kwargs)
        for p in module.parameters():
            nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.1)
        return module.to(self.dtype).eval()


VARIANTS: dict[str, Variant] = {}


def variant(name: str, note: str, inputs: Callable[[], Tensor] = x3d, dtype: torch.dtype = torch.float32, **kw: Any):
    """Register the decorated class under `name`; the family is the file that registers it."""
    family = sys._getframe(1).f_globals["__name__"].rsplit(".", 1)[-1]

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        source = inputs if dtype is torch.float32 else (lambda: inputs().to(dtype))
        VARIANTS[name] = Variant(name, family, note, cls, source, dtype, kw)
        return cls

    return register


def per_token(x_TH: Tensor, w_TK: Tensor, ids_TK: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """out[t] = sum_k w[t, k] * expert(ids[t, k], x[t]), one token and one slot at a time."""
    rows = []
    for x, weights, ids in zip(x_TH, w_TK, ids_TK.tolist(), strict=True):
        rows.append(sum(w * expert(e, x) for w, e in zip(weights, ids, strict=True)))
    return torch.stack(rows)


class Block(nn.Module):
    """A router and E experts; `route` and `expert` are the meaning, a variant's `forward` the spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(F.softmax(self.gate(x_TH), dim=-1), K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x)

    def around(self, hidden: Tensor, out: Tensor) -> Tensor:
        """What the block does with the sum over experts (nothing, a residual, a shared expert, ...)."""
        return out

    def reference(self, hidden: Tensor) -> Tensor:
        """The block's output by `per_token`, on tokens of any leading shape."""
        x = hidden.reshape(-1, hidden.shape[-1])
        out = per_token(x, *self.route(x), self.expert)
        return self.around(hidden, out.reshape(*hidden.shape[:-1], out.shape[-1]))

    def oracle(self, hidden: Tensor) -> Tensor:
        """`reference` of a float64 copy."""
        return copy.deepcopy(self).double().reference(hidden.double())


class SwiGLU(nn.Module):
    """down(act(gate(x)) * up(x)), the usual expert."""

    def __init__(self, h: int = H, i: int = I, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False) -> None:
        super().__init__()
        self.act = act
        self.gate_proj = nn.Linear(h, i, bias=bias)
        self.up_proj = nn.Linear(h, i, bias=bias)
        self.down_proj = nn.Linear(i, h, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """fc2(act(fc1(x))) with biases."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, o: int = H) -> None:
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(H, I)
        self.fc2 = nn.Linear(I, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ListBlock(Block):
    """Experts in a ModuleList."""

    def __init__(self, make: Callable[[], nn.Module] = SwiGLU) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make() for _ in range(E))


class StackedBlock(Block):
    """Experts in three stacked parameters, [out, in]: w1 [E, I, H], w3 [E, I, H], w2 [E, H, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(E, I, H))
        self.w3 = nn.Parameter(torch.empty(E, I, H))
        self.w2 = nn.Parameter(torch.empty(E, H, I))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1[e])) * F.linear(x, self.w3[e]), self.w2[e])
