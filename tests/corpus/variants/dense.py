"""Every expert on every token, then a selection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.variants.base import MLP, Block, E, H, I, K, ListBlock, StackedBlock, variant, x2d


@variant("stack_gather", "stack all experts' outputs on dim 1, gather the selected ones")
class StackGather(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        y = torch.stack([expert(x) for expert in self.experts], dim=1)
        y = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, H))
        return (y * w.unsqueeze(-1)).sum(1).view_as(hidden)


@variant("stack_3d_gather", "the same without flattening: stack on dim 2 of [B, S, E, H]")
class Stack3dGather(ListBlock):
    def __init__(self) -> None:
        super().__init__(MLP)

    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden)
        y = torch.stack([expert(hidden) for expert in self.experts], dim=2)
        y = torch.gather(y, 2, ids[..., None].expand(*ids.shape, H))
        return torch.einsum("bskh,bsk->bsh", y, w)


@variant("stack_advanced_index", "y[arange(T)[:, None], ids]", inputs=x2d)
class StackIndex(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.stack([expert(x) for expert in self.experts], dim=1)
        y = y[torch.arange(x.shape[0], device=x.device)[:, None], ids]
        return torch.sum(y * w[..., None], dim=1)


@variant("stack_take_along_dim", "torch.take_along_dim on [E, T, H]", inputs=x2d)
class StackTake(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.stack([expert(x) for expert in self.experts])
        y = torch.take_along_dim(y, ids.t().unsqueeze(-1), dim=0)
        return (y * w.t().unsqueeze(-1)).sum(0)


@variant("one_hot_einsum_3", "einsum of one-hot, outputs and weights in one call", inputs=x2d)
class OneHotEinsum3(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        y = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.einsum("tke,teh,tk->th", F.one_hot(ids, E).to(x.dtype), y, w)


@variant("one_hot_einsum_2", "combine = einsum(w, one_hot), out = einsum(combine, y)")
class OneHotEinsum2(StackedBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden)
        combine = torch.einsum("bsk,bske->bse", w, F.one_hot(ids, E).float())
        a = torch.einsum("bsh,eih->bsei", hidden, self.w1)
        b = torch.einsum("bsh,eih->bsei", hidden, self.w3)
        y = torch.einsum("bsei,ehi->bseh", F.silu(a) * b, self.w2)
        return torch.einsum("bse,bseh->bsh", combine, y)


@variant("einsum_down_and_combine", "the down projection and the combine are one einsum", inputs=x2d)
class EinsumDownCombine(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        combine = torch.zeros(x.shape[0], E).scatter_(1, ids, w)
        h = F.silu(torch.einsum("th,eih->eti", x, self.w1)) * torch.einsum("th,eih->eti", x, self.w3)
        return torch.einsum("eti,ehi,te->th", h, self.w2, combine)


class _Biased(Block):
    """Stacked weights in [in, out] order with biases: w1 [E, H, I], b1 [E, I], w2 [E, I, H], b2 [E, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.empty(E, H, I)), nn.Parameter(torch.empty(E, I))
        self.w2, self.b2 = nn.Parameter(torch.empty(E, I, H)), nn.Parameter(torch.empty(E, H))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1[e] + self.b1[e]) @ self.w2[e] + self.b2[e]


@variant("baddbmm_all", "baddbmm with expanded input, scores [T, E] by scatter", inputs=x2d)
class BaddbmmAll(_Biased):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        scores = torch.zeros(x.size(0), E, dtype=w.dtype).scatter(-1, ids, w)
        h = torch.baddbmm(self.b1.unsqueeze(1), x.expand(E, *x.shape), self.w1)
        y = torch.baddbmm(self.b2.unsqueeze(1), F.gelu(h), self.w2)
        return (y * scores.t().unsqueeze(-1)).sum(0)


@variant("matmul_broadcast", "x[:, None, None, :] @ w1 broadcast over tokens and experts", inputs=x2d)
class MatmulBroadcast(_Biased):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        h = F.gelu(torch.matmul(x[:, None, None, :], self.w1) + self.b1[:, None, :])
        y = (torch.matmul(h, self.w2) + self.b2[:, None, :]).squeeze(2)
        y = y.gather(1, ids[:, :, None].expand(-1, -1, H))
        return torch.matmul(w.unsqueeze(1), y).squeeze(1)


@variant("unbind_dense", "zip of unbound weights, combine column by indexing")
class UnbindDense(StackedBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        combine = torch.zeros(x.shape[0], E).scatter_add_(1, ids, w)
        out = torch.zeros_like(x)
        for e, (w1, w3, w2) in enumerate(zip(self.w1.unbind(0), self.w3.unbind(0), self.w2.unbind(0), strict=True)):
            out = out + (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T * combine[:, e].unsqueeze(-1)
        return out.view_as(hidden)


@variant("flat_slab_chunk", "all experts in one [E * I, H] slab, chunked", inputs=x2d)
class FlatSlab(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(E * I, H)), nn.Parameter(torch.empty(E * I, H))

    def expert(self, e: int, x: Tensor) -> Tensor:
        rows = slice(e * I, (e + 1) * I)
        return F.relu(x @ self.up[rows].T) @ self.down[rows]

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        combine = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        parts = zip(self.up.chunk(E), self.down.chunk(E), combine.unbind(1), strict=True)
        return sum(F.relu(x @ u.T) @ d * c.unsqueeze(1) for u, d, c in parts)


@variant("flat_slab_view", "one matmul for all experts, view(T, E, I), block-weighted, one matmul back", inputs=x2d)
class FlatSlabView(FlatSlab):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        combine = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        h = F.relu(F.linear(x, self.up)).view(-1, E, I) * combine.unsqueeze(-1)
        return h.flatten(1) @ self.down


@variant(
    "masked_softmax_dense",
    "scatter the top logits into -inf, softmax, dense loop: the weights are a softmax over K",
)
class MaskedSoftmax(ListBlock):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, ids = self.gate(x).topk(K, dim=-1)
        return v.softmax(-1), ids

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.gate(hidden)
        top, ids = torch.topk(logits, K, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, ids, top)
        p = F.softmax(sparse, dim=-1)
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            out = out + p[..., e].unsqueeze(-1) * expert(hidden)
        return out


@variant("zeroed_scores_renormalised", "scores * mask, divided by their sum over E, dense matmul", inputs=x2d)
class ZeroedScores(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        p = F.softmax(self.gate(x), dim=-1)
        _, ids = p.topk(K, dim=-1)
        mask = torch.zeros_like(p).scatter_(1, ids, 1.0)
        p = p * mask
        p = p / p.sum(dim=-1, keepdim=True)
        y = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.bmm(p.unsqueeze(1), y).squeeze(1)


@variant("vmap_experts", "torch.vmap over stacked expert weights", inputs=x2d)
class Vmap(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        def ffn(w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
            return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

        w, ids = self.route(x)
        y = torch.vmap(ffn)(self.w1, self.w3, self.w2)
        y = y.transpose(0, 1).gather(1, ids.unsqueeze(-1).expand(-1, -1, H))
        return (y * w.unsqueeze(-1)).sum(1)


@variant(
    "conv1x1_experts",
    "image tokens [B, C, h, w], experts are 1x1 convolutions, dense loop",
    inputs=lambda: x2d().view(1, 3, 4, H).permute(0, 3, 1, 2).contiguous(),
)
class Conv1x1(Block):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Conv2d(H, I, 1), nn.ReLU(), nn.Conv2d(I, H, 1)) for _ in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x[:, None, None])[:, 0, 0]

    def reference(self, image: Tensor) -> Tensor:
        return super().reference(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, image: Tensor) -> Tensor:
        w, ids = self.route(image.permute(0, 2, 3, 1))
        out = torch.zeros_like(image)
        for e, expert in enumerate(self.experts):
            share = (w * (ids == e)).sum(-1)
            out = out + expert(image) * share.unsqueeze(1)
        return out


@variant("added_to_the_first", "early vLLM: every expert for every token, mul_ by its share, add_ to what the first one gave", inputs=x2d)
class AddedToTheFirst(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = None
        for e, expert in enumerate(self.experts):
            y = expert(x).mul_((w * (ids == e)).sum(dim=-1, keepdim=True))
            out = y if out is None else out.add_(y)
        return out
