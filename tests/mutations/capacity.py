"""Styles with a capacity: buffers of C rows an expert, filled by position; what does not fit is dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mutations.base import E, Family, H

C = 5  # fewer than an even share, so that every routing drops something

POSITION = (
    "counts_from_one", "counts_exclusive", "counts_over_experts", "counts_backwards", "counts_everything", "counts_other_ids",
    "counts_next_token", "positions_halved", "positions_shifted", "positions_unmasked", "counts_in_uint8",
    "positions_clamped", "positions_clamped_short",
)  # fmt: skip
DROP = ("keeps_one_more", "keeps_one_less", "keeps_the_dropped", "keeps_all", "drops_by_next_token", "buffer_longer", "buffer_shorter")
BUFFER = (
    "renorm_after_drop", "dispatch_weighted", "combine_unweighted", "combine_next_token", "combine_next_row", "dispatch_next_token",
    "dispatch_next_row", "dispatch_everywhere", "buffer_rolled", "buffer_averaged", "combine_transposed",
)  # fmt: skip


SAME = ("counts_exclusive", "counts_in_uint8", "keeps_one_more", "keeps_all", "buffer_longer", "positions_clamped")


class Buffers(Family):
    """What the styles share: positions among the tokens of an expert, the drop, dispatch and combine masks [T, E, C], bmm experts."""

    own = (*POSITION, *DROP, *BUFFER)
    without = frozenset({"weights_thresholded", "duplicate_slots"})

    def positions(self, mask_TE: Tensor, dim: int = 0) -> Tensor:
        """Position of each token among those of each expert, counted along `dim`."""
        m = self.mutation
        if m == "counts_other_ids":
            mask_TE = mask_TE.roll(1, -1)
        if m == "counts_next_token":
            mask_TE = mask_TE.roll(1, dim)
        if m == "counts_everything":
            mask_TE = torch.ones_like(mask_TE)
        if m == "counts_in_uint8":
            return mask_TE.cumsum(dim, dtype=torch.uint8).long() - 1
        if m == "counts_backwards":
            return mask_TE.flip(dim).cumsum(dim).flip(dim) - 1
        counts = mask_TE.cumsum(1 - dim if m == "counts_over_experts" else dim)
        if m == "counts_exclusive":
            return counts - mask_TE
        return counts if m == "counts_from_one" else counts - 1

    def kept(self, position: Tensor, mask: Tensor) -> Tensor:
        """The mask without what is dropped."""
        m = self.mutation
        if m == "drops_by_next_token":
            position = position.roll(1, 0)
        if m == "keeps_the_dropped":
            return mask * (position >= C)
        return mask if m == "keeps_all" else mask * (position < C + (m == "keeps_one_more") - (m == "keeps_one_less"))

    def place(self, position: Tensor) -> Tensor:
        """The position's row in the buffer, one-hot."""
        m = self.mutation
        if m == "positions_halved":
            position = position // 2
        if m == "positions_shifted":
            position = position + 1
        if m in ("positions_clamped", "positions_clamped_short"):
            position = position.clamp(max=C - 1 - (m == "positions_clamped_short"))
        rows = torch.arange(C + (m == "buffer_longer") - (m == "buffer_shorter"))
        return (position.unsqueeze(-1) == rows).float()

    def at(self, position: Tensor, kept: Tensor) -> Tensor:
        return position if self.mutation == "positions_unmasked" else position * kept

    def experts(self, combine_TEC: Tensor, x: Tensor) -> Tensor:
        m = self.mutation
        dispatch = combine_TEC if m == "dispatch_weighted" else combine_TEC.bool().to(x.dtype)
        dispatch = dispatch.roll(1, 0) if m == "dispatch_next_token" else dispatch
        dispatch = dispatch.roll(1, 2) if m == "dispatch_next_row" else dispatch
        dispatch = dispatch.amax(1, keepdim=True).expand(-1, E, -1) if m == "dispatch_everywhere" else dispatch

        def linear(a: Tensor, j: int) -> Tensor:
            y, table = torch.bmm(a, self.weights(j).transpose(1, 2)), self.bias_table(j)
            return y if table is None else y + table.unsqueeze(1)

        y = self.vector(torch.einsum("tec,th->ech", dispatch, self.read(x)), torch.arange(E).unsqueeze(-1), linear)
        return torch.einsum("tec,ech->th", self.combine(combine_TEC), self.left(y))

    def combine(self, combine_TEC: Tensor) -> Tensor:
        m = self.mutation
        if m == "combine_unweighted":
            return combine_TEC.bool().float()
        if m == "combine_transposed":
            return combine_TEC.roll(1, 1)
        shift = {"combine_next_token": 0, "combine_next_row": 2}
        return combine_TEC.roll(1, shift[m]) if m in shift else combine_TEC

    def left(self, y_ECH: Tensor) -> Tensor:
        if self.mutation == "buffer_averaged":
            return y_ECH.mean(1, keepdim=True).expand_as(y_ECH)
        return y_ECH.roll(1, 1) if self.mutation == "buffer_rolled" else y_ECH

    def renormed(self, w: Tensor) -> Tensor:
        return w / w.sum(-1, keepdim=True).clamp(min=1e-6) if self.mutation == "renorm_after_drop" else w


class CapacityTopK(Buffers):
    """One mask [T, E] of all slots: scatter, cumsum over tokens, gates by scatter."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        mask = torch.zeros(x.shape[0], E, dtype=torch.int64).scatter(1, ids, 1)
        position = self.positions(mask)
        mask = self.kept(position, mask)
        gates = self.renormed(torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w) * mask)
        return self.experts(gates.unsqueeze(-1) * self.place(self.at(position, mask)), x).view_as(hidden)


class CapacitySlots(Buffers):
    """First choices before second ones: positions counted over [K, T], a mask for each slot, slots added up."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        mask = F.one_hot(ids, E).permute(1, 0, 2)
        position = self.positions(mask.reshape(-1, E)).view_as(mask)
        mask = self.kept(position, mask)
        row = self.at(position, mask).sum(-1)
        w = self.renormed(w * mask.sum(-1).t()).t()
        combine = (w[..., None] * mask).unsqueeze(-1) * self.place(row).unsqueeze(2)
        return self.experts(combine.sum(0), x).view_as(hidden)


class CapacityTop1(Buffers):
    """argmax, one mask, positions counted over the tokens; the weight is the largest probability."""

    without = Buffers.without | {
        "neighbour_slot", "slot_dropped", "slot_ids_shifted", "renorm_over_tokens", "no_renorm", "eps_large", "smallest_scores",
        "biased_choice", "biased_choice_and_weight",
    }  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        p = self.scores(x)
        ids = self.chosen(x, p.argmax(-1, keepdim=True)[:, 0].unsqueeze(-1))[:, 0]
        mask = F.one_hot(ids, E)
        position = self.positions(mask)
        mask = self.kept(position, mask)
        gate = self.renormed((p * mask).sum(-1, keepdim=True))
        gate = self.weighed(gate, ids.unsqueeze(-1))
        row = self.at(position, mask).sum(-1)
        return self.experts((gate * mask).unsqueeze(-1) * self.place(row).unsqueeze(1), x).view_as(hidden)


class CapacityMasks(CapacityTop1):
    """No buffers: each expert's rows are written where its mask holds; what is dropped stays zero."""

    own = (*POSITION[:9], *DROP[:5], "starts_from_rows", "mask_of_next_expert", "mask_of_next_token", "reads_next_token", "writes_all")
    without = CapacityTop1.without | {"counts_exclusive"}

    def forward(self, hidden: Tensor) -> Tensor:
        x, m = hidden.view(-1, H), self.mutation
        p = self.scores(x)
        ids = self.chosen(x, p.argmax(-1, keepdim=True)[:, 0].unsqueeze(-1))[:, 0]
        mask = F.one_hot(ids, E)
        position = self.positions(mask)
        at = self.kept(position // 2 if m == "positions_halved" else position + (m == "positions_shifted"), mask).bool()
        gate = self.weighed(p.max(-1, keepdim=True).values, ids.unsqueeze(-1))
        return (gate * self.filled(self.read(x), mask.bool() if m == "writes_all" else at)).view_as(hidden)

    def filled(self, x: Tensor, at: Tensor) -> Tensor:
        m = self.mutation
        out = x.clone() if m == "starts_from_rows" else torch.zeros_like(x)
        for e in range(E):
            here = at[:, (e + 1) % E] if m == "mask_of_next_expert" else at[:, e]
            here = here.roll(1, 0) if m == "mask_of_next_token" else here
            out[here] = self.expert(x.roll(1, 0)[here] if m == "reads_next_token" else x[here], e)
        return out


class CapacityChoices(CapacityTop1):
    """Two choices, the second of what the first leaves over, in the rows behind all first ones; renormalised after the drop."""

    own = (
        *Buffers.own, "counted_separately", "behind_second", "behind_kept", "behind_fewer", "behind_one_less", "behind_two_more",
        "first_again", "second_by_first", "renorm_before_drop",
    )  # fmt: skip
    same = ("counts_exclusive", "counts_in_uint8", "positions_clamped", "buffer_longer", "behind_kept")
    without = CapacityTop1.without | {"renorm_after_drop", "positions_halved"}

    def forward(self, hidden: Tensor) -> Tensor:
        x, m = hidden.view(-1, H), self.mutation
        p = self.scores(x)
        ids1 = self.chosen(x, p.argmax(-1, keepdim=True))[:, 0]
        mask1 = F.one_hot(ids1, E)
        ids2 = (p if m == "first_again" else p.masked_fill(mask1.bool(), float("-inf"))).argmax(-1)
        mask2 = F.one_hot(ids2, E)
        at1 = self.positions(mask1)
        at2 = self.positions(mask2) + self.before(mask1, mask2, at1)
        kept1, kept2 = self.kept(at1, mask1), self.kept(at2, mask2)
        both = (mask1, mask2) if m == "renorm_before_drop" else (kept1, kept2)
        w1, w2 = ((p * mask).sum(-1, keepdim=True) for mask in both)
        total = (w1 + w2).clamp(min=1e-6)
        gate1, gate2 = self.weighed(w1 / total, ids1.unsqueeze(-1)), w2 / total
        gates = (gate1 * kept1).unsqueeze(-1) * self.place(self.at(at1, kept1).sum(-1)).unsqueeze(1)
        kept2 = kept2 if m != "second_by_first" else kept1
        gates = gates + (gate2 * kept2).unsqueeze(-1) * self.place(self.at(at2, kept2).sum(-1)).unsqueeze(1)
        return self.experts(gates, x).view_as(hidden)

    def before(self, mask1: Tensor, mask2: Tensor, at1: Tensor) -> Tensor:
        """How many rows of each expert's buffer are the first choices'."""
        changed = {
            "counted_separately": mask1 * 0,
            "behind_second": mask2,
            "behind_kept": mask1 * (at1 < C),
            "behind_fewer": mask1 * (at1 < C - 2),
        }
        count = changed.get(self.mutation or "", mask1).sum(0, keepdim=True)
        return count + {"behind_one_less": -1, "behind_two_more": 2}.get(self.mutation or "", 0)


class CapacityFirstRows(CapacityTop1):
    """Each expert takes the first C tokens that chose it among their K: a running count of one column's mask, no buffers."""

    own = (
        "counts_exclusive", "counts_next_token", "counts_backwards", "counts_in_uint8", "keeps_one_more", "keeps_one_less",
        "keeps_all", "keeps_the_dropped", "drops_by_next_token", "counts_other_expert", "counts_every_token", "limit_of_each",
    )  # fmt: skip
    without = Buffers.without

    def forward(self, hidden: Tensor) -> Tensor:
        x, m = hidden.view(-1, H), self.mutation
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            mask = (ids == e).any(-1)
            counted = (ids == (e + 1) % E).any(-1) if m == "counts_other_expert" else mask
            counted = torch.ones_like(mask) if m == "counts_every_token" else counted
            position = self.positions(counted.long())
            here = self.kept(position + (e != 1) * (m == "limit_of_each"), mask.long()).bool()
            rows = torch.where(here)[0]
            gate = (w * (ids == e)).sum(-1, keepdim=True)
            out.index_add_(0, rows, self.expert(self.read(x)[rows], e) * gate[rows])
        return out.view_as(hidden)


__all__ = ["CapacityChoices", "CapacityFirstRows", "CapacityMasks", "CapacitySlots", "CapacityTop1", "CapacityTopK"]
