"""Weights gathered per token and slot, then small matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.variants.base import E, H, I, K, StackedBlock, variant, x2d
from corpus.variants.dense import _Biased


@variant("slot_loop_gather_bmm", "for k in range(K): bmm with w[ids[:, k]]", inputs=x2d)
class SlotLoopGather(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for k in range(K):
            e = ids[:, k]
            a = torch.bmm(self.w1[e], x.unsqueeze(-1))
            b = torch.bmm(self.w3[e], x.unsqueeze(-1))
            out = out + w[:, k : k + 1] * torch.bmm(self.w2[e], F.silu(a) * b).squeeze(-1)
        return out


@variant("index_select_weights", "w.index_select(0, ids.flatten()).view(T, K, ...), matmul")
class IndexSelect(StackedBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        pick = lambda p: p.index_select(0, ids.flatten()).view(*ids.shape, *p.shape[1:])  # noqa: E731
        rows = x[:, None, :, None]
        h = F.silu(pick(self.w1) @ rows) * (pick(self.w3) @ rows)
        y = (pick(self.w2) @ h).squeeze(-1)
        return (w.unsqueeze(-1) * y).sum(-2).view_as(hidden)


@variant("embedding_weights", "F.embedding of flattened expert parameters", inputs=x2d)
class Embedding(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        w1 = F.embedding(ids, self.w1.flatten(1)).view(*ids.shape, I, H)
        w3 = F.embedding(ids, self.w3.flatten(1)).view(*ids.shape, I, H)
        w2 = F.embedding(ids, self.w2.flatten(1)).view(*ids.shape, H, I)
        h = F.silu(torch.einsum("th,tkih->tki", x, w1)) * torch.einsum("th,tkih->tki", x, w3)
        return torch.einsum("tki,tkhi,tk->th", h, w2, w)


@variant("gather_baddbmm", "baddbmm with gathered weights and biases")
class GatherBaddbmm(_Biased):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        e = ids.reshape(-1)
        rows = x.repeat_interleave(K, dim=0).unsqueeze(1)
        h = F.gelu(torch.baddbmm(self.b1[e].unsqueeze(1), rows, self.w1[e]))
        y = torch.baddbmm(self.b2[e].unsqueeze(1), h, self.w2[e]).squeeze(1)
        return (y.view(*ids.shape, H) * w.unsqueeze(-1)).sum(1).view_as(hidden)


@variant("gather_expand_reshape", "x.unsqueeze(1).expand(-1, K, -1).reshape(T * K, H) instead of repeat_interleave")
class GatherExpand(_Biased):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        rows = x.unsqueeze(1).expand(-1, K, -1).reshape(-1, 1, H)
        e = ids.flatten()
        h = F.gelu(torch.bmm(rows, self.w1[e]).squeeze(1) + self.b1[e])
        y = torch.bmm(h.unsqueeze(1), self.w2[e]).squeeze(1) + self.b2[e]
        y = y * w.flatten().unsqueeze(-1)
        return y.view(-1, K, H).sum(1).view_as(hidden)


@variant("gather_broadcast_sum", "(x[:, None, :, None] * w1[ids]).sum(2): a matmul by hand", inputs=x2d)
class GatherBroadcastSum(_Biased):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        h = F.gelu((x[:, None, :, None] * self.w1[ids]).sum(2) + self.b1[ids])
        y = (h.unsqueeze(-1) * self.w2[ids]).sum(-2) + self.b2[ids]
        return (y * w[:, :, None]).sum(1)


@variant("one_hot_weight_mix", "weights mixed by one-hot einsum instead of indexing", inputs=x2d)
class OneHotMix(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        hot = F.one_hot(ids, E).to(x.dtype)
        w1 = torch.einsum("tke,eih->tkih", hot, self.w1)
        w3 = torch.einsum("tke,eih->tkih", hot, self.w3)
        w2 = torch.einsum("tke,ehi->tkhi", hot, self.w2)
        h = F.silu(torch.einsum("tkih,th->tki", w1, x)) * torch.einsum("tkih,th->tki", w3, x)
        return (torch.einsum("tkhi,tki->tkh", w2, h) * w[..., None]).sum(1)


@variant("gather_chunked_tokens", "the tokens in two halves, results concatenated", inputs=x2d)
class GatherChunks(_Biased):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.part(rows) for rows in x.chunk(2)])

    def part(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        h = F.gelu(torch.einsum("th,tkhi->tki", x, self.w1[ids]) + self.b1[ids])
        return torch.einsum("tk,tkh->th", w, torch.einsum("tki,tkih->tkh", h, self.w2[ids]) + self.b2[ids])
