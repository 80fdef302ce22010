"""Rows of buffers addressed by expert * C + position, tokens without room that keep their own row, positions of several choices.

`mutation` names the one thing that differs from the original.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, E, C = 8, 4, 3


class Rows(nn.Module):
    """One choice a token; positions among the tokens of its expert."""

    def __init__(self, mutation: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mutation = mutation
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * H) * 0.3), nn.Parameter(torch.randn(E, 2 * H, H) * 0.3)

    def experts(self, rows_NH: Tensor) -> Tensor:
        """Rows of all experts' buffers, one behind the other."""
        return torch.bmm(torch.relu(torch.bmm(rows_NH.reshape(E, -1, H), self.up)), self.down).reshape(-1, H)

    def one(self, x: Tensor, e: int) -> Tensor:
        return torch.relu(x @ self.up[e]) @ self.down[e]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.mutation
        w, ids = self.gate(x).softmax(-1).max(-1)
        hot = F.one_hot(ids, num_classes=E)
        if m == "counts_backwards":
            return w, ids, ((hot.flip(0).cumsum(0).flip(0) - 1) * hot).sum(1)
        if m == "counts_all_tokens":
            return w, ids, torch.arange(len(x))
        if m == "counts_next_token":
            return w, ids, (hot.roll(1, 0).cumsum(0) * hot).sum(1)
        counts = hot.cumsum(0) - int(m != "counts_from_one")
        return w, ids, (counts * hot).sum(1)

    def rows_of(self, ids: Tensor, place: Tensor) -> Tensor:
        m = self.mutation
        if m == "expert_innermost":
            return place * E + ids
        if m == "last_place_first":
            return ids * C + (C - 1 - place)
        return ids * (C - (m == "buffers_overlap")) + place


class Spare(Rows):
    """Tokens without room go to a row behind all buffers, which nobody computes; what they take out is zero."""

    def forward(self, hidden: Tensor) -> Tensor:
        m, x = self.mutation, hidden.reshape(-1, H)
        w, ids, place = self.routed(x)
        room = place <= C if m == "one_too_many" else place < C - (m == "one_less")
        row = torch.where(room, self.rows_of(ids, place), E * C - (m == "spare_row_is_used"))
        base = torch.ones if m == "rows_of_ones" else torch.zeros
        buffers = base(E * C + 1, H, dtype=x.dtype)
        if m == "added":
            buffers = buffers.index_add(0, row, x)
        elif m == "scattered":
            buffers = buffers.scatter(0, row[:, None].expand(-1, H), x)
        else:
            buffers[row] = x
        y = self.experts(buffers[1:] if m == "first_row_left_out" else buffers[:-1])
        last = y.mean(0, keepdim=True) if m == "others_take_the_mean" else torch.zeros(1, H, dtype=x.dtype)
        y = F.pad(y, (0, 0, 0, 1)) if m == "padded" else torch.cat([y, last])
        return (y[row.roll(1, 0) if m == "takes_next_row" else row] * w[:, None]).view_as(hidden)


SPARE = (
    "counts_from_one", "counts_backwards", "counts_all_tokens", "counts_next_token", "expert_innermost", "last_place_first",
    "buffers_overlap", "one_too_many", "one_less", "spare_row_is_used", "rows_of_ones", "first_row_left_out", "others_take_the_mean",
    "takes_next_row",
)  # fmt: skip


class Kept(Rows):
    """Only tokens that have room are written, and written back; the others are zero, or keep their own row."""

    def forward(self, hidden: Tensor) -> Tensor:
        m, x = self.mutation, hidden.reshape(-1, H)
        w, ids, place = self.routed(x)
        at = (place >= C if m == "those_without_room" else place < C).nonzero().squeeze(-1)
        place = place.clamp(max=C - 1) if m == "those_without_room" else place
        row = self.rows_of(ids, place)[at]
        buffers = x.new_zeros(E * C, H) + (m == "rows_of_ones")
        if m == "added":
            buffers = buffers.index_add(0, row, x[at])
        elif m == "added_twice":
            buffers = buffers.index_add(0, row, x[at]).index_add(0, row, x[at])
        else:
            buffers = buffers.index_copy(0, row, (x.roll(1, 0) if m == "writes_next_token" else x)[at])
        y = self.experts(buffers)[row] * w[at, None]
        out = x.clone() if m in ("passed_on", "passed_on_and_added") else torch.zeros_like(x)
        if m == "passed_on_and_added":
            out[at] += y
        else:
            out[(at + 1) % len(x) if m == "back_to_next_token" else at] = y
        return out.view_as(hidden)


KEPT = ("those_without_room", "rows_of_ones", "added_twice", "writes_next_token", "passed_on_and_added", "back_to_next_token",
        "buffers_overlap")  # fmt: skip


class Pairs(Kept):
    """The same with two indices, by masks."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids, place = self.routed(x)
        room = place < C
        buffers = x.new_zeros(E, C, H)
        buffers[ids[room], place[room]] = x[room]
        y = self.experts(buffers).view(E, C, H)
        out = x.clone()
        out[room] = y[ids[room], place[room]] * w[room].unsqueeze(-1)
        return out.view_as(hidden)


class Clamped(Rows):
    """A row for each token, in range by a clamp; tokens without room add nothing to it and take nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        m, x = self.mutation, hidden.reshape(-1, H)
        w, ids, place = self.routed(x)
        room = place < C
        row = self.rows_of(ids, place.clamp(max=C - (2 if m == "clamped_short" else 1)))
        buffers = x.new_zeros(E * C, H).index_add(0, row, x if m == "all_are_added" else x * room[:, None])
        y = self.experts(buffers)[row]
        return (y * (w if m == "all_take" else w * room)[:, None]).view_as(hidden)


CLAMPED = ("clamped_short", "all_are_added", "all_take")


class Passing(Rows):
    """As Switch layers in transformers: what has no room stays as it was in a copy; a capacity for each sequence."""

    def forward(self, x: Tensor) -> Tensor:
        m = self.mutation
        p = self.gate(x).softmax(-1)
        hot = F.one_hot(p.argmax(-1), E)
        mask = hot * ((hot.roll(1, -1) if m == "counts_next_expert" else hot).cumsum(-2) <= C)
        w = p.max(-1).values.unsqueeze(-1)
        out = {"doubled": 2 * x, "next_token": x.roll(1, 1)}.get(m or "", x.clone())
        for e in range(E):
            mine = mask[..., (e + 1) % E if m == "mask_of_next" and e == 1 else e].bool()
            rows = (out if m == "reads_what_it_wrote" else x)[mine]
            out[mine] = self.one(rows, e) + (out[mine] if m == "added" else 0)
        return out * (w / w.detach() if m == "gradient_only" else w)


PASSING = ("counts_next_expert", "doubled", "next_token", "mask_of_next", "reads_what_it_wrote", "added")


class Cut(Rows):
    """As in labml.ai's Switch layers: lists of rows, cut; the rest is copied."""

    def forward(self, hidden: Tensor) -> Tensor:
        m, x = self.mutation, hidden.reshape(-1, H)
        w, ids = self.gate(x).softmax(-1).max(-1)
        capacity = int(1.2 * len(x) / E)
        out, rest = x.new_zeros(x.shape), []
        for e in range(E):
            rows = torch.eq(ids, e).nonzero(as_tuple=True)[0]
            if m == "last_come":
                rows = rows.flip(0)
            rest.append(rows[capacity:])
            rows = rows[:capacity]
            out[rows] = self.one(x[rows], e)
        rest = torch.cat(rest)
        out[rest] = x[rest.flip(0) if m == "rest_mixed" else rest]
        return (out * w.view(-1, 1)).view_as(hidden)


CUT = ("last_come", "rest_mixed")


class Choices(Rows):
    """As in st-moe: choices one after the other, each behind all of those before that are kept, in buffers of each sequence."""

    top_k = 3

    def forward(self, x: Tensor) -> Tensor:
        m = self.mutation
        w, ids = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        w, hot = w / w.sum(-1, keepdim=True), F.one_hot(ids, E).to(x)
        before, kept, places = torch.zeros_like(hot[:, :1, 0]), [], []
        for k in range(self.top_k):
            mask = hot[:, :, k]
            place = (mask.cumsum(-2) - mask + before) * mask
            mask = mask * (place < C)
            now = mask.sum(-2, keepdim=True)
            before = {"behind_the_last": now, "behind_the_first": before if k else now, "behind_twice": before + 2 * now}.get(
                m or "", before + now
            )
            kept.append(mask.sum(-1))
            places.append(place.sum(-1).long())
        kept, places = torch.stack(kept, -1), torch.stack(places, -1)
        if m == "dropped_as_next":
            kept = kept.roll(1, -1)
        comb = torch.einsum("bnk,bnke,bnkc->bnec", w * kept, hot, (places.unsqueeze(-1) == torch.arange(C)).to(x))
        rows = torch.einsum("bnd,bnec->ebcd", x, comb.bool().to(x))
        y = self.experts(rows).view(rows.shape)
        return torch.einsum("ebcd,bnec->bnd", y, comb)


CHOICES = ("behind_the_last", "behind_the_first", "behind_twice", "dropped_as_next")
