"""Whole blocks as repositories and tutorials have them, that stand in no other family."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from corpus.variants.base import MLP, Block, E, H, I, K, ListBlock, StackedBlock, SwiGLU, per_token, variant, x2d, x3d


@variant("lists_of_tokens", "Python lists of tokens and weights, one an expert, filled token by token", inputs=x2d)
class ListsOfTokens(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        rows, shares = defaultdict(list), defaultdict(list)
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                rows[e].append(t)
                shares[e].append(w[t, k])
        out = torch.zeros_like(x)
        for e, members in rows.items():
            at = torch.tensor(members, device=x.device)
            out.index_add_(0, at, self.experts[e](x[at]) * torch.stack(shares[e]).unsqueeze(-1))
        return out


@variant("switch_index_lists", "labml.ai's Switch: rows of all experts first, top 1, int(capacity) that drops nothing", inputs=x3d)
class SwitchIndexLists(ListBlock):
    def __init__(self) -> None:
        super().__init__(MLP)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.max(self.gate(x).softmax(-1), dim=-1)
        return w.unsqueeze(-1), ids.unsqueeze(-1)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, routes = torch.max(self.gate(x).softmax(-1), dim=-1)
        rows = [torch.eq(routes, e).nonzero(as_tuple=True)[0] for e in range(E)]
        results = [self.experts[e](x[rows[e], :]) for e in range(E)]
        out = x.new_zeros(x.shape)
        for e in range(E):
            out[rows[e], :] = results[e]
        return (out * w.view(-1, 1)).view_as(hidden)


@variant("permuted_by_library", "Megatron: index_select by sorted ids, split by counts, index_copy back", inputs=x3d)
class PermutedByLibrary(StackedBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=E).tolist()
        parts = torch.split(x.index_select(0, order // K), counts)
        y = torch.cat([self.expert(e, part) for e, part in enumerate(parts)])
        y = torch.zeros_like(y).index_copy(0, order, y).reshape(-1, K, H)
        return (y * w.unsqueeze(-1)).sum(1).view_as(hidden)


@variant("stacked_functional_call", "modules' parameters stacked, functional_call of one of them under vmap", inputs=x2d)
class StackedFunctionalCall(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        names = [n for n, _ in self.experts[0].named_parameters()]
        stacked = {n: torch.stack([dict(e.named_parameters())[n] for e in self.experts]) for n in names}

        def run(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.experts[0], parameters, (x,))

        every = torch.vmap(run)(stacked).permute(1, 0, 2)
        return (every.gather(1, ids.unsqueeze(-1).expand(-1, -1, H)) * w.unsqueeze(-1)).sum(1)


@variant("low_rank_beside_a_layer", "MixLoRA: adapters of experts beside a layer of all, `if rows.numel() == 0`", inputs=x3d)
class LowRankBesideALayer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.scaling = nn.Linear(H, H), 2.0
        self.down = nn.ModuleList(nn.Linear(H, 4, bias=False) for _ in range(E))
        self.up = nn.ModuleList(nn.Linear(4, H, bias=False) for _ in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.up[e](self.down[e](x)) * self.scaling

    def around(self, hidden: Tensor, out: Tensor) -> Tensor:
        return self.base(hidden) + out

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        delta = torch.zeros_like(x)
        for e in range(E):
            rows, slot = torch.where(ids == e)
            if rows.numel() == 0:
                continue
            delta[rows] += w[rows, slot, None] * self.expert(e, x[rows])
        return self.base(hidden) + delta.view_as(hidden)


@variant("second_above_threshold", "st-moe: the second expert only where its share is above a threshold", inputs=x2d)
class SecondAboveThreshold(ListBlock):
    threshold = 0.4

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        keep = torch.cat([torch.ones_like(w[:, :1], dtype=torch.bool), w[:, 1:] > self.threshold], -1)
        return w * keep, ids

    def forward(self, x: Tensor) -> Tensor:
        w, ids = super().route(x)
        keep = torch.cat([torch.ones_like(w[:, :1], dtype=torch.bool), w[:, 1:] > self.threshold], -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where((ids == e) & keep)
            if len(t) == 0:
                continue
            out = out.index_add(0, t, w[t, k].unsqueeze(-1) * expert(x[t]))
        return out


class _OfOneToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(SwiGLU(H, I) for _ in range(E))

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            out = out + w[k] * self.each[ids[k].item()](x)
        return out


@variant("module_of_one_token", "the experts' module is called token by token, and goes through the token's ids itself", inputs=x2d)
class ModuleOfOneToken(Block):
    def __init__(self) -> None:
        super().__init__()
        self.experts = _OfOneToken()

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts.each[e](x)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return torch.stack([self.experts(x[t], ids[t], w[t]) for t in range(x.shape[0])])


@variant("one_choice_a_sequence", "routed by the mean of a sequence: a Python loop over sequences, experts[ids[b, k]](x[b])", inputs=x3d)
class OneChoiceASequence(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden.mean(dim=1))
        outs = []
        for b in range(hidden.size(0)):
            outs.append(sum(w[b, k] * self.experts[ids[b, k]](hidden[b]) for k in range(K)))
        return torch.stack(outs, dim=0)

    def reference(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden.mean(dim=1))
        tokens, length = hidden.reshape(-1, H), hidden.shape[1]
        out = per_token(tokens, w.repeat_interleave(length, 0), ids.repeat_interleave(length, 0), self.expert)
        return out.view_as(hidden)
