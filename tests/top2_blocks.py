"""Two choices that share the experts' buffers, as GShard has them: second choices stand behind all first ones, what is beyond C is dropped.

`mutation` names the one thing that differs from the original.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, E = 8, 4


class Top2(nn.Module):
    """Buffers [E, C] by one-hot dispatch and combine tensors [T, E, C]."""

    capacity = 3

    def __init__(self, mutation: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mutation = mutation
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * H) * 0.3), nn.Parameter(torch.randn(E, 2 * H, H) * 0.3)

    def experts(self, rows_ECH: Tensor) -> Tensor:
        return torch.bmm(torch.relu(torch.bmm(rows_ECH, self.up)), self.down)

    def limit(self, tokens: int) -> int:
        return self.capacity


class Sharded(Top2):
    """As in GShard, DeepSpeed and fairseq: the tokens of all sequences share the buffers; weights are renormalised after dropping."""

    capacity = 7

    def forward(self, hidden: Tensor) -> Tensor:
        m, x = self.mutation, hidden.reshape(-1, H)
        gates = self.gate(x).softmax(-1)
        c = self.limit(x.shape[0])
        mask1 = F.one_hot(gates.argmax(1), E)
        rest = gates.masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot((gates if m == "first_again" else rest).argmax(1), E)
        at1, at2 = self.positions(mask1, mask2, c)
        if m == "renorm_before":
            w1, w2 = self.weights(gates, mask1, mask2)
        mask1 = mask1 * (torch.le if m == "one_more_first" else torch.lt)(at1, c)
        mask2 = mask2 * (torch.le if m == "one_more_second" else torch.lt)(at2, c - (m == "one_less_second"))
        if m != "renorm_before":
            w1, w2 = self.weights(gates, mask1, mask2)
        rows = c + (m in ("one_more_first", "one_more_second"))
        place1, place2 = (at1 * mask1).sum(1), (at2 * mask2).sum(1)
        combine = torch.einsum("t,te,tc->tec", w1, mask1.to(x), F.one_hot(place1, rows).to(x))
        combine = combine + torch.einsum("t,te,tc->tec", w2, mask2.to(x), F.one_hot(place2, rows).to(x))
        dispatch = combine if m == "dispatch_weighted" else combine.bool().to(x)
        y = self.experts(torch.einsum("tec,th->ech", dispatch, x))
        return torch.einsum("tec,ech->th", combine, y).view_as(hidden)

    def positions(self, mask1: Tensor, mask2: Tensor, c: int) -> tuple[Tensor, Tensor]:
        m = self.mutation
        at1, at2 = mask1.cumsum(0) - 1, mask2.cumsum(1 if m == "counts_over_experts" else 0) - 1
        if m == "counted_separately":
            return at1, at2
        before = {
            "behind_second": mask2,
            "behind_kept": mask1 * (at1 < c),
            "behind_fewer": mask1 * (at1 < c - 1),
            "behind_other_experts": mask1.roll(1, 1),
            "behind_half": mask1[: mask1.shape[0] // 2],
        }.get(m or "", mask1)
        first = before.sum(1 if m == "summed_over_experts" else 0, keepdim=True)
        return at1, at2 + (first if m != "one_before" else first - 1)

    def weights(self, gates: Tensor, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        w1, w2 = (gates * mask1).sum(1), (gates * mask2).sum(1)
        if self.mutation == "renorm_none":
            return w1, w2
        total = (w1 + w2).clamp(min=torch.finfo(gates.dtype).eps)
        return (w2 if self.mutation == "weights_swapped" else w1) / total, w2 / total


class GrowingSharded(Sharded):
    """A capacity made of the number of tokens."""

    def limit(self, tokens: int) -> int:
        return max(2, math.ceil(tokens / E))


SHARDED = (
    "first_again", "one_more_first", "one_more_second", "one_less_second", "renorm_before", "renorm_none", "weights_swapped",
    "dispatch_weighted", "counts_over_experts", "counted_separately", "behind_second", "behind_kept", "behind_fewer",
    "behind_other_experts", "behind_half", "summed_over_experts", "one_before",
)  # fmt: skip


class Sequences(Top2):
    """As in lucidrains' code: buffers for each sequence, second choices behind the first ones that are kept, renormalised before."""

    policy = "all"

    def forward(self, x: Tensor) -> Tensor:
        m, c = self.mutation, self.limit(x.shape[1])
        gates = self.gate(x).softmax(-1)
        (g1, i1), (g2, i2), mask1, mask2 = self.choices(gates)
        place1 = (mask1.cumsum(-2) - mask1) * mask1
        mask1 = mask1 * (place1 < c).to(x)
        first = mask1.sum(-2, keepdim=True)
        kept1, place1 = mask1.sum(-1), place1.sum(-1)
        first = first.sum(0, keepdim=True) if m == "behind_all_sequences" else first * (m != "counted_separately")
        place2 = mask2.cumsum(-2) - mask2 + first
        place2 = place2 if m == "places_unmasked" else place2 * mask2
        mask2 = mask2 * (place2 < c).to(x) if m != "second_never_dropped" else mask2
        kept2, place2 = mask2.sum(-1), place2.sum(-1)
        if m == "renorm_after":
            g1, g2 = self.renormed(g1 * kept1, g2 * kept2)
        combine = self.slot(g1 * kept1, i1, place1, c) + self.slot(g2 * (kept1 if m == "other_kept" else kept2), i2, place2, c)
        rows = torch.einsum("bnd,bnec->ebcd", x, combine.bool().to(combine))
        y = self.experts(rows.reshape(E, -1, H)).reshape(rows.shape)
        return torch.einsum("ebcd,bnec->bnd", y, combine)

    def choices(self, gates: Tensor):
        g1, i1 = (t.squeeze(-1) for t in gates.topk(1, dim=-1))
        mask1 = F.one_hot(i1, E).to(gates)
        g2, i2 = (t.squeeze(-1) for t in (gates * (1 - mask1)).topk(1, dim=-1))
        mask2 = F.one_hot(i2, E).to(gates)
        if self.mutation != "renorm_after":
            g1, g2 = self.renormed(g1, g2)
        if self.policy == "random":
            mask2 = mask2 * (torch.zeros_like(g2).uniform_(0.0, 1.0) < g2 / 0.2).to(g2).unsqueeze(-1)
        if self.policy == "threshold":
            mask2 = mask2 * (g2 > 0.3).to(g2).unsqueeze(-1)
        return (g1, i1), (g2, i2), mask1, mask2

    def renormed(self, g1: Tensor, g2: Tensor) -> tuple[Tensor, Tensor]:
        total = g1 + g2 + 1e-9
        return g1 / total, g2 / total

    def slot(self, w: Tensor, ids: Tensor, place: Tensor, c: int) -> Tensor:
        rows = (place.long().unsqueeze(-1) == torch.arange(c)).to(w.dtype)
        return w[..., None, None] * F.one_hot(ids, E)[..., None] * rows[..., None, :]


class SequencesAtRandom(Sequences):
    policy = "random"


class SequencesThreshold(Sequences):
    policy = "threshold"


SEQUENCES = ("behind_all_sequences", "counted_separately", "places_unmasked", "second_never_dropped", "renorm_after", "other_kept")


class ByMask(nn.Module):
    """Experts, of which the loop calls those whose number stands somewhere in a mask [T, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * H) * 0.3), nn.Parameter(torch.randn(E, 2 * H, H) * 0.3)

    def forward(self, x: Tensor, mask_TE: Tensor, weights_TE: Tensor) -> Tensor:
        hot = F.one_hot(mask_TE, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in torch.greater(hot.sum((-1, -2)), 0).nonzero():
            column, tok = torch.where(hot[e].squeeze(0))
            rows = torch.relu(x[tok] @ self.up[e[0]]) @ self.down[e[0]]
            out.index_add_(0, tok, rows * weights_TE[tok, column, None])
        return out


class Masked(Sharded):
    """As NLLB's layers are written now: the loop takes the first choices' mask for ids, so that experts 0 and 1 do all the work."""

    capacity = 5

    def __init__(self, mutation: str | None = None) -> None:
        super().__init__(mutation)
        del self.up, self.down
        self.loop = ByMask()

    def forward(self, hidden: Tensor) -> Tensor:
        m, x, c = self.mutation, hidden.reshape(-1, H), self.capacity
        gates = self.gate(x).softmax(-1)
        mask1 = F.one_hot(gates.argmax(-1), E)
        mask2 = F.one_hot(gates.masked_fill(mask1.bool(), float("-inf")).argmax(-1), E)
        at1, at2 = self.positions(mask1, mask2, c)
        mask1 = mask1 * (torch.le if m == "one_more_first" else torch.lt)(at1, c)
        mask2 = mask2 * (torch.le if m == "one_more_second" else torch.lt)(at2, c)
        w1, w2 = self.weights(gates, mask1, mask2)
        weights = w1[:, None] * mask1 + w2[:, None] * (mask2 if m != "second_by_first" else mask1)
        return self.loop(x, mask2 if m == "second_mask" else mask1, weights).view_as(hidden)


MASKED = ("one_more_first", "one_more_second", "second_by_first", "second_mask", "counted_separately", "behind_second", "one_before")


class Overwritten(Sharded):
    """As NLLB's layers were written before: a copy of the masked tokens for each expert, whose rows the expert's output replaces."""

    capacity, dropped = 5, 0.2

    def forward(self, hidden: Tensor) -> Tensor:
        x, c = hidden.reshape(-1, H), self.capacity
        gates = self.gate(x).softmax(-1)
        mask1 = F.one_hot(gates.argmax(-1), E)
        mask2 = F.one_hot(gates.masked_fill(mask1.bool(), float("-inf")).argmax(-1), E)
        at1, at2 = self.positions(mask1, mask2, c)
        mask1, mask2 = mask1 * torch.lt(at1, c), mask2 * torch.lt(at2, c)
        w1, w2 = self.weights(gates, mask1, mask2)
        weights = w1[:, None] * mask1 + w2[:, None] * mask2
        return self.replaced(x, weights, weights.bool()).view_as(hidden)

    def replaced(self, x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        m = self.mutation
        rows = x.expand(E, *x.shape).clone() if m == "rows_kept" else torch.einsum("th,te->eth", x, mask)
        for e in range(E - (m == "one_expert_less")):
            mine = mask[:, (e + 1) % E if m == "rows_of_next" else e]
            w = weights[mine].sum(-1) if m == "weights_together" else weights[mine, e]
            y = torch.relu((x[mine] if m == "reads_tokens" else rows[e, mine]) @ self.up[e]) @ self.down[e] * (1 - self.dropped)
            y = torch.einsum("t,th->th", w, y)
            rows[e, mine] = rows[e, mine] + y if m == "added" else y
        return rows.amax(0) if m == "largest" else rows.sum(0)


OVERWRITTEN = ("rows_kept", "one_expert_less", "rows_of_next", "reads_tokens", "weights_together", "added", "largest", "counted_separately")
