"""Loops over experts that pick their tokens by a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.variants.base import MLP, E, H, I, K, ListBlock, StackedBlock, SwiGLU, variant, x2d, x4d


@variant("mask_any_setitem", "(ids == e).any(-1); out[mask] = out[mask] + w * expert(x[mask])")
class MaskAny(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = ids == e
            mask = hit.any(dim=-1)
            share = (w * hit).sum(-1, keepdim=True)
            out[mask] = out[mask] + share[mask] * expert(x[mask])
        return out.view_as(hidden)


@variant("mask_three_axes_added_to", "makeMoE: a mask of batch and sequence, gates of all experts, `out[mask] += expert(rows) * gate`")
class MaskThreeAxes(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.gate(hidden)
        top, ids = logits.topk(K, dim=-1)
        gates = F.softmax(torch.full_like(logits, float("-inf")).scatter(-1, ids, top), dim=-1).view(-1, E)
        x, out = hidden.view(-1, H), torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            flat = mask.view(-1)
            if flat.any():
                out[mask] += (expert(x[flat]) * gates[flat, e].unsqueeze(1)).squeeze(1)
        return out


@variant("mask_slots_buffer", "for k, for e: y[ids[:, k] == e] = expert(x[...]); out + w[:, k] * y: one slot after the other", inputs=x2d)
class MaskSlotsBuffer(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for k in range(K):
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                mask = ids[:, k] == e
                y[mask] = expert(x[mask])
            out = out + w[:, k : k + 1] * y
        return out


@variant("mask_slots_where", "for k: w[:, k] * sum over e of where(ids[:, k] == e, expert(x), 0)", inputs=x2d)
class MaskSlotsWhere(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = 0
        for k in range(K):
            y = sum(torch.where((ids[:, k] == e).unsqueeze(-1), expert(x), 0.0) for e, expert in enumerate(self.experts))
            out = out + w[:, k].unsqueeze(-1) * y
        return out


@variant("mask_slots_stacked", "the slots' sums over experts are stacked, weighted and summed as one", inputs=x2d)
class MaskSlotsStacked(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        each = []
        for k in range(K):
            each.append(sum(torch.where((ids[:, k] == e).unsqueeze(-1), expert(x), 0.0) for e, expert in enumerate(self.experts)))
        return (torch.stack(each, dim=1) * w.unsqueeze(-1)).sum(1)


@variant("mask_weight_column", "every expert on every token, times sum_k w * (ids == e)")
class MaskColumn(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden)
        out = 0
        for e, expert in enumerate(self.experts):
            share = torch.where(ids == e, w, torch.zeros_like(w)).sum(dim=-1, keepdim=True)
            out = out + share * expert(hidden)
        return out


@variant("mask_where_select", "torch.where(selected, w * expert(x), 0) for every expert", inputs=x2d)
class MaskWhere(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = ids.eq(e)
            y = expert(x) * (w * hit.to(w.dtype)).sum(1, keepdim=True)
            out = out + torch.where(hit.any(1, keepdim=True), y, torch.zeros_like(y))
        return out


@variant("mask_index_put", "nonzero(as_tuple=True), index_put_ with accumulate", inputs=x2d)
class MaskIndexPut(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = x.new_zeros(x.shape)
        for e in range(E):
            tok, slot = (ids == e).nonzero(as_tuple=True)
            out.index_put_((tok,), self.expert(e, x[tok]) * w[tok, slot].unsqueeze(1), accumulate=True)
        return out


@variant("mask_nonzero_scatter_add", "2-D nonzero, columns of it, scatter_add_ with an expanded index")
class MaskScatterAdd(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, -2)
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            pos = torch.nonzero(ids == e)
            tok, slot = pos[:, 0], pos[:, 1]
            y = self.experts[e](x.index_select(0, tok)) * w[tok, slot][:, None]
            out.scatter_add_(0, tok[:, None].expand(-1, H), y)
        return out.view(hidden.shape)


@variant("slot_then_expert", "for each slot, for each expert: out[mask] += w[mask, k] * expert(x[mask])")
class SlotThenExpert(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for k in range(K):
            for e, expert in enumerate(self.experts):
                mask = ids[:, k] == e
                out[mask] += w[mask, k].unsqueeze(-1) * expert(x[mask])
        return out.reshape(hidden.shape)


@variant("expert_then_slot", "the two loops the other way round, index_add_ by nonzero().squeeze(-1)", inputs=x2d)
class ExpertThenSlot(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            for k in range(K):
                tok = (ids[:, k] == e).nonzero().squeeze(-1)
                out.index_add_(0, tok, self.expert(e, x[tok]) * w[tok, k, None])
        return out


@variant("slot_outputs_stacked", "one [T, H] buffer a slot, stack, weighted sum")
class SlotStack(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        slots = []
        for k in range(K):
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                mask = ids[:, k] == e
                y[mask] = expert(x[mask])
            slots.append(y)
        return (torch.stack(slots, dim=1) * w.unsqueeze(-1)).sum(dim=1).view_as(hidden)


@variant("slot_masked_scatter", "masked_scatter instead of y[mask] = ...", inputs=x2d)
class SlotMaskedScatter(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for k in range(K):
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                mask = ids[:, k] == e
                y = y.masked_scatter(mask.unsqueeze(-1).expand_as(y), expert(x[mask]))
            out = out + w[:, k : k + 1] * y
        return out


@variant(
    "pairs_flat_select",
    "flat (token, slot) pairs: tok = arange.repeat_interleave(K), sel = (flat == e).nonzero()",
)
class PairsFlat(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        flat, flat_w = ids.flatten(), w.flatten()
        tok = torch.arange(x.shape[0], device=x.device).repeat_interleave(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sel = (flat == e).nonzero().squeeze(1)
            out.index_add_(0, tok[sel], expert(x[tok[sel]]) * flat_w[sel, None])
        return out.view_as(hidden)


@variant(
    "pairs_flat_floordiv",
    "y[flat == e] = expert(...) in slot order, tokens by // K, weighted einsum",
    inputs=x2d,
)
class PairsFloorDiv(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        flat = ids.reshape(-1)
        y = x.new_zeros(flat.numel(), H)
        for e in range(E):
            n = torch.where(flat == e)[0]
            y[n] = self.expert(e, x[n // K])
        return torch.einsum("tkh,tk->th", y.view(-1, K, H), w)


@variant("switch_top1_max", "top-1 by max(-1); out[mask] = expert(x[mask]); times the probability")
class SwitchMax(ListBlock):
    def __init__(self) -> None:
        super().__init__(MLP)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p, i = F.softmax(self.gate(x), -1).max(-1, keepdim=True)
        return p, i

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        p, i = F.softmax(self.gate(x), dim=-1).max(dim=-1)
        out = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            mask = i == e
            out[mask] = expert(x[mask])
        return (out * p.unsqueeze(-1)).view_as(hidden)


@variant("switch_argmax_index_copy", "top-1 by argmax, probability by gather, index_copy_", inputs=x2d)
class SwitchArgmax(SwitchMax):
    def forward(self, x: Tensor) -> Tensor:
        p = torch.softmax(self.gate(x), dim=1)
        i = p.argmax(dim=1)
        p = p.gather(1, i[:, None])
        out = torch.zeros_like(x)
        for e in range(E):
            tok = torch.nonzero(i == e).view(-1)
            out.index_copy_(0, tok, p[tok] * self.experts[e](x[tok]))
        return out


@variant("module_dict", "experts in a ModuleDict, called by name")
class Dict(ListBlock):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{e}": SwiGLU() for e in range(E)})

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts[f"expert_{e}"](x)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in range(E):
            slot, tok = torch.where(mask[e])
            y = getattr(self.experts, f"expert_{e}")(x[tok])
            out.index_add_(0, tok, y * w[tok, slot, None])
        return out.view_as(hidden)


@variant("parameter_list", "three ParameterLists and x @ w", inputs=x4d)
class ParamList(ListBlock):
    def __init__(self) -> None:
        super().__init__()
        del self.experts
        self.gates = nn.ParameterList(nn.Parameter(torch.empty(H, I)) for _ in range(E))
        self.ups = nn.ParameterList(nn.Parameter(torch.empty(H, I)) for _ in range(E))
        self.downs = nn.ParameterList(nn.Parameter(torch.empty(I, H)) for _ in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return (F.silu(x @ self.gates[e]) * (x @ self.ups[e])) @ self.downs[e]

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out[tok] += self.expert(e, x[tok]) * w[tok, slot, None]
        return out.reshape(hidden.shape)


@variant("one_hot_gates_loop", "gates[T, E] = (one_hot * w).sum(1), then out += gates[:, e, None] * expert(x)")
class OneHotGates(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        gates = (F.one_hot(ids, E).to(w.dtype) * w.unsqueeze(-1)).sum(1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out += gates[:, e, None] * expert(x)
        return out.view_as(hidden)


@variant("dense_gates_masked_rows", "gates[T, E] dense; rows of it that are > 0 visit the expert")
class GatesPositive(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        gates = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tok = gates[:, e].nonzero().squeeze(-1)
            out.index_add_(0, tok, gates[tok, e].unsqueeze(-1) * expert(x[tok]))
        return out.view_as(hidden)


@variant("sum_of_generators", "sum(...) of a generator, each term a dense product")
class SumGenerator(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        w, ids = self.route(hidden)
        share = [((ids == e) * w).sum(-1, keepdim=True) for e in range(E)]
        return sum(expert(hidden) * g for expert, g in zip(self.experts, share, strict=True))
