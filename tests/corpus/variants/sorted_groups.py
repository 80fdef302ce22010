"""Tokens sorted by expert: split and concatenated, sliced between offsets, or given to a grouped matmul."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.variants.base import Block, E, H, I, K, ListBlock, StackedBlock, variant, x2d


@variant("argsort_bincount_split", "bincount().tolist(), split, cat, index_put back by the permutation")
class ArgsortSplit(ListBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        flat = ids.view(-1)
        order = flat.argsort()
        counts = torch.bincount(flat, minlength=E).tolist()
        parts = x[order // K].split(counts, dim=0)
        y = torch.cat([expert(p) for expert, p in zip(self.experts, parts, strict=True)], dim=0)
        slots = torch.empty_like(y)
        slots[order] = y
        return (slots.view(*ids.shape, H) * w.unsqueeze(-1)).sum(dim=1).view_as(hidden)


@variant("argsort_of_argsort", "inverse permutation by a second argsort", inputs=x2d)
class ArgsortTwice(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        order = torch.argsort(ids.flatten(), stable=True)
        inverse = torch.argsort(order)
        counts = F.one_hot(ids.flatten(), E).sum(0).tolist()
        rows = x.repeat_interleave(K, dim=0)[order]
        y = torch.cat([ex(p) for ex, p in zip(self.experts, torch.split(rows, counts), strict=True)])
        return torch.einsum("tkh,tk->th", y[inverse].view(-1, K, H), w)


@variant("sort_weighted_scatter_reduce", "weights sorted along, scatter_reduce(sum) to the tokens", inputs=x2d)
class ScatterReduce(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        sorted_ids, order = ids.reshape(-1).sort(stable=True)
        tok = order.div(K, rounding_mode="floor")
        counts = torch.histc(sorted_ids.float(), bins=E, min=0, max=E - 1).long().tolist()
        y = torch.cat([self.expert(e, p) for e, p in enumerate(x[tok].split(counts))])
        y = y * w.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).scatter_reduce(0, tok.unsqueeze(-1).expand(-1, H), y, "sum")


@variant(
    "cumsum_slices",
    "slices tokens[start:end] between host offsets, results into a buffer's slices",
    inputs=x2d,
)
class CumsumSlices(StackedBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        order = ids.view(-1).argsort(stable=True)
        counts = torch.bincount(ids.view(-1), minlength=E)
        ends = counts.cumsum(0)
        tok = order // K
        out = torch.zeros_like(x)
        for e in range(E):
            rows = tok[ends[e] - counts[e] : ends[e]]
            share = w.view(-1)[order[ends[e] - counts[e] : ends[e]]]
            out.index_add_(0, rows, self.expert(e, x[rows]) * share.unsqueeze(-1))
        return out


@variant("slot_major_sort", "ids transposed before the flatten: slots k-major, tokens by % T", inputs=x2d)
class SlotMajor(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        n = x.shape[0]
        flat = ids.t().reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.zeros(E, dtype=torch.long).scatter_add(0, flat, torch.ones_like(flat)).tolist()
        rows = torch.cat([x] * K)[order]
        y = torch.cat([ex(p) for ex, p in zip(self.experts, rows.split(counts), strict=True)])
        back = torch.zeros_like(y).index_copy(0, order, y).view(K, n, H)
        return (back * w.t().unsqueeze(-1)).sum(0)


class _Fused(Block):
    """gate_up [E, H, 2I] and down [E, I, H]: the order grouped_mm wants."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.empty(E, H, 2 * I)), nn.Parameter(torch.empty(E, I, H))

    def ffn(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.ffn(x @ self.gate_up[e]) @ self.down[e]


# torch's fake kernel of grouped_mm takes bfloat16 only, with 16-byte aligned strides.
class _FusedAligned(_Fused):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.empty(E, H, 2 * 16)), nn.Parameter(torch.empty(E, 16, H))


@variant("private_grouped_mm", "torch._grouped_mm, offsets by bincount().cumsum", inputs=x2d, dtype=torch.bfloat16)
class PrivateGrouped(_FusedAligned):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        order = ids.flatten().argsort(stable=True)
        offs = torch.bincount(ids.flatten(), minlength=E).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(x[order // K], self.gate_up, offs=offs)
        y = torch._grouped_mm(self.ffn(h), self.down, offs=offs)
        y = y * w.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // K, y)


@variant("functional_grouped_mm", "F.grouped_mm, offsets by one_hot, gather back", inputs=x2d, dtype=torch.bfloat16)
class FunctionalGrouped(_FusedAligned):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        order = torch.argsort(ids.view(-1), stable=True)
        offs = F.one_hot(ids, E).sum(dim=(0, 1)).cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(x.repeat_interleave(K, 0)[order], self.gate_up, offs=offs)
        y = F.grouped_mm(self.ffn(h), self.down, offs=offs)
        return (y[order.argsort()].view(-1, K, H) * w.unsqueeze(-1)).sum(1)


@variant(
    "grouped_mm_biases",
    "grouped_mm plus bias[sorted ids], offsets by searchsorted",
    inputs=x2d,
    dtype=torch.bfloat16,
)
class GroupedBiases(_FusedAligned):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_bias, self.down_bias = (
            nn.Parameter(torch.empty(E, 2 * 16)),
            nn.Parameter(torch.empty(E, H)),
        )

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.ffn(x @ self.gate_up[e] + self.gate_up_bias[e]) @ self.down[e] + self.down_bias[e]

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        key, order = torch.sort(ids.view(-1), stable=True)
        offs = torch.searchsorted(key, torch.arange(E), right=True).int()
        h = F.grouped_mm(x[order // K], self.gate_up, offs=offs) + self.gate_up_bias[key]
        y = F.grouped_mm(self.ffn(h), self.down, offs=offs) + self.down_bias[key]
        slots = torch.zeros_like(y).index_copy(0, order, y)
        return (slots.view(*ids.shape, H) * w.unsqueeze(-1)).sum(1)


@variant("offsets_by_comparison", "offsets = (sorted ids[:, None] <= arange(E)).sum(0), host slices", inputs=x2d)
class OffsetsCompared(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        key, order = ids.flatten().sort(stable=True)
        ends = (key[:, None] <= torch.arange(E)).sum(0).tolist()
        counts = [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        y = torch.cat([self.expert(e, p) for e, p in enumerate(x[order // K].split(counts))])
        y = y * w.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, order // K, y)
