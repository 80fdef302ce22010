"""Buffers of C rows an expert, as libraries have them: rows by number, a spare row, tokens without room passed on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.variants.base import MLP, E, H, ListBlock, StackedBlock, variant, x3d

C = 4  # so that some tokens have no room


def shares(ids_NK: Tensor, capacity: int) -> Tensor:
    """Which slots have room, slot by slot in the order in which they are counted."""
    used, kept = [0] * E, []
    for row in ids_NK.tolist():
        kept.append([])
        for e in row:
            kept[-1].append(float(used[e] < capacity))
            used[e] += 1
    return torch.tensor(kept)


class Top1(ListBlock):
    def __init__(self) -> None:
        super().__init__(MLP)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.max(self.gate(x).softmax(-1), dim=-1)
        return w.unsqueeze(-1), ids.unsqueeze(-1)

    def others(self, x: Tensor, w: Tensor) -> Tensor:
        """What a token without room gets."""
        return x * w

    def reference(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        kept = shares(ids, C).to(x)
        out = torch.stack([self.experts[int(e)](row) for e, row in zip(ids, x)]) * w
        return torch.where(kept > 0, out, self.others(x, w)).view_as(hidden)


@variant("switch_dropped_keep_their_row", "labml.ai's Switch with capacity: rows cut off, the others copied", inputs=x3d)
class SwitchDropped(Top1):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, routes = torch.max(self.gate(x).softmax(-1), dim=-1)
        rows = [torch.eq(routes, e).nonzero(as_tuple=True)[0] for e in range(E)]
        dropped, out = [], x.new_zeros(x.shape)
        for e in range(E):
            if len(rows[e]) <= C:
                continue
            dropped.append(rows[e][C:])
            rows[e] = rows[e][:C]
        results = [self.experts[e](x[rows[e], :]) for e in range(E)]
        for e in range(E):
            out[rows[e], :] = results[e]
        if dropped:
            rest = torch.cat(dropped)
            out[rest, :] = x[rest, :]
        return (out * w.view(-1, 1)).view_as(hidden)


@variant("buffers_and_a_spare_row", "as Tutel: expert * C + position, one row behind all for tokens without room", inputs=x3d)
class SpareRow(Top1):
    def others(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.gate(x).softmax(-1).max(-1)
        hot = F.one_hot(ids, E)
        place = ((hot.cumsum(0) - 1) * hot).sum(1)
        row = torch.where(place < C, ids * C + place, E * C)
        buffers = x.new_zeros(E * C + 1, H)
        buffers[row] = x
        rows = torch.stack([expert(mine) for expert, mine in zip(self.experts, buffers[:-1].view(E, C, H))])
        rows = torch.cat([rows.view(E * C, H), x.new_zeros(1, H)])
        return (rows[row] * w.unsqueeze(-1)).view_as(hidden)


@variant("choices_behind_each_other", "as st-moe: each choice stands behind those before it that have room", inputs=x3d)
class BehindEachOther(StackedBlock):
    def reference(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        kept = shares(ids.t().reshape(-1, 1), C).view(ids.shape[1], -1).t().to(x)
        y = torch.stack([torch.stack([self.expert(int(e), row) for e in chosen]) for chosen, row in zip(ids, x)])
        return (y * (w * kept).unsqueeze(-1)).sum(1).view_as(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        combine, before = x.new_zeros(len(x), E, C), x.new_zeros(1, E)
        for k in range(ids.shape[1]):
            mask = F.one_hot(ids[:, k], E).to(x)
            place = (mask.cumsum(0) - mask + before) * mask
            mask = mask * (place < C)
            before = before + mask.sum(0, keepdim=True)
            at = F.one_hot((place * mask).sum(-1).long(), C).to(x)
            combine = combine + w[:, k, None, None] * mask.unsqueeze(-1) * at.unsqueeze(1)
        buffers = torch.einsum("tec,th->ech", combine.bool().to(x), x)
        y = torch.stack([self.expert(e, buffers[e]) for e in range(E)])
        return torch.einsum("tec,ech->th", combine, y).view_as(hidden)
