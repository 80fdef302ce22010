"""Styles that loop over experts in Python."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutations.base import ODD, E, Family, H, I, K

LOOP = ("missing_expert", "expert_twice", "reversed_order", "x_mutated_between", "accumulator_decays")
SUM = ("accumulator_ones", "accumulator_input", "accumulator_bf16", "row_zeroed_between")


class Loop(Family):
    """What the loops share: who is visited, where the sum starts."""

    own = (*LOOP, *SUM)

    def visited(self) -> list[int]:
        order = list(range(E))
        if self.mutation == "missing_expert":
            order.remove(ODD)
        if self.mutation == "expert_twice":
            order.insert(ODD, ODD)
        return order[::-1] if self.mutation == "reversed_order" else order

    def start(self, x: Tensor) -> Tensor:
        if self.mutation == "accumulator_ones":
            return torch.ones_like(x)
        if self.mutation == "accumulator_input":
            return x.clone()
        return torch.zeros_like(x, dtype=torch.bfloat16 if self.mutation == "accumulator_bf16" else x.dtype)

    def between(self, out: Tensor, x: Tensor, e: int) -> Tensor:
        """What happens after expert e; returns the accumulator to go on with."""
        m = self.mutation
        if m == "x_mutated_between" and e == ODD:
            x.mul_(1.5)
        if m == "row_zeroed_between" and e == ODD:
            out[3].zero_()
        return out * 0.9 if m == "accumulator_decays" else out

    def table(self, x: Tensor) -> Tensor:
        """The rows that experts read, writable where the mutation writes."""
        x = self.read(x)
        return x.clone() if self.mutation == "x_mutated_between" else x


class Identities(Loop):
    """The last id has no expert: who chooses it keeps its row, or gets nothing."""

    own = (
        *SUM, "reversed_order", "gives_nothing", "first_too", "scaled_last", "next_row_last", "unweighted_last", "squared_last",
        "two_last", "two_last_differ", "two_give_nothing",
    )  # fmt: skip
    without = frozenset({"experts_share"})  # the last two would, of which one has no expert

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out, table = self.start(x), self.table(x)
        for e in self.visited():
            tok, slot = torch.where(ids == e)
            weight = torch.ones_like(w) if self.mutation == "unweighted_last" and e == E - 1 else w
            if (y := self.of(table, tok, e)) is not None:
                out.index_add_(0, tok, (y * weight[tok, slot, None]).to(out.dtype))
            out = self.between(out, x, e)
        return out.to(x.dtype).view_as(hidden)

    def of(self, x: Tensor, tok: Tensor, e: int) -> Tensor | None:
        """What expert e gives, None for nothing."""
        m = self.mutation
        last = E - 2 if m in ("two_last", "two_last_differ", "two_give_nothing") else E - 1
        if e < last and (e or m != "first_too"):
            return self.expert(x[tok], e)
        if m in ("gives_nothing", "two_give_nothing"):
            return None
        row = x.roll(1, 0)[tok] if m == "next_row_last" else x[tok]
        if m == "squared_last":
            return row * row
        return row * 1.5 if m == "scaled_last" or (m == "two_last_differ" and e == E - 1) else row


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 2 * I), nn.Linear(I, H)


class MaskedList(Loop):
    """one_hot(ids).permute, torch.where(mask[e]), a ModuleList of Linears, index_add_."""

    own = (*Loop.own, "lands_next_token", "first_row_skipped", "alpha", "slot_of_neighbour")

    def make_experts(self) -> None:
        self.experts = nn.ModuleList(One() for _ in range(E))

    def weight(self, j: int, e: int) -> Tensor:
        m = self.experts[self.index(j, False)[e]]
        return self.of_one((m.up, m.down)[j].weight, e, j)

    def bias(self, j: int, e: int) -> Tensor | None:
        if j == 1 and (self.mutation == "bias_dropped_all" or (self.mutation == "bias_dropped_one" and e == ODD)):
            return None
        m = self.experts[self.index(j, True)[e]]
        return (m.up, m.down)[j].bias

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        rows, out = self.table(x), self.start(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in self.visited():
            slot, tok = torch.where(mask[e])
            if self.mutation == "first_row_skipped":
                slot, tok = slot[1:], tok[1:]
            share = w[tok, (slot + 1) % K if self.mutation == "slot_of_neighbour" else slot, None]
            y = self.expert(rows[tok], e) * share
            to = (tok + 1) % x.shape[0] if self.mutation == "lands_next_token" else tok
            out.index_add_(0, to, y.to(out.dtype), alpha=2 if self.mutation == "alpha" else 1)
            out = self.between(out, rows, e)
        return out.view_as(hidden)


class MaskedStack(Loop):
    """torch.where(ids == e), stacked parameters indexed by e, out[tok] += ..."""

    own = (*Loop.own, "overwrites", "transposed_where")

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        rows, out = self.table(x), self.start(x)
        for e in self.visited():
            tok, slot = torch.where(ids == e)
            share = w.roll(1, 0)[tok, slot, None] if self.mutation == "transposed_where" else w[tok, slot, None]
            y = (share * self.expert(rows[tok], e)).to(out.dtype)
            if self.mutation == "overwrites":
                out[tok] = y
            else:
                out[tok] += y
            out = self.between(out, rows, e)
        return out.view_as(hidden)


class SlotPreserving(Loop):
    """x.repeat_interleave(K); y[flat == e] = expert(x[flat == e]); view(T, K, H) * w, sum(1)."""

    own = (
        *LOOP,
        "mean_over_slots",
        "max_over_slots",
        "repeat_not_interleave",
        "summed_as_k_major",
        "buffer_ones",
    )

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        flat = ids.reshape(-1)
        table = self.table(x)
        rows = table.repeat(K, 1) if self.mutation == "repeat_not_interleave" else table.repeat_interleave(K, 0)
        y = torch.ones_like(rows) if self.mutation == "buffer_ones" else torch.zeros_like(rows)
        for e in self.visited():
            y[flat == e] = self.expert(rows[flat == e], e)
            y = self.between(y, rows, e)
        return self.combine(y, w).view_as(hidden)

    def combine(self, y: Tensor, w: Tensor) -> Tensor:
        n = w.shape[0]
        if self.mutation == "summed_as_k_major":
            return (y.view(K, n, H) * w.t().unsqueeze(-1)).sum(0)
        y = y.view(n, K, H) * w.unsqueeze(-1)
        if self.mutation == "max_over_slots":
            return y.amax(1)
        return y.mean(1) if self.mutation == "mean_over_slots" else y.sum(1)


class SlotScatter(SlotPreserving):
    """The same, written by masked_scatter, which takes its source's elements one after the other."""

    own = (*SlotPreserving.own, "rows_flipped", "rows_shifted", "half_rows", "rows_repeated", "source_of_all")

    def forward(self, hidden: Tensor) -> Tensor:
        x, m = hidden.view(-1, H), self.mutation
        w, ids = self.route(x)
        flat = ids.reshape(-1)
        table = self.table(x)
        rows = table.repeat(K, 1) if m == "repeat_not_interleave" else table.repeat_interleave(K, 0)
        y = torch.ones_like(rows) if m == "buffer_ones" else torch.zeros_like(rows)
        for e in self.visited():
            here = (flat == e).unsqueeze(-1).expand_as(y)
            here = here & (torch.arange(H) < H // 2) if m == "half_rows" else here
            y = self.between(y.masked_scatter(here, self.source(rows, flat == e, e)), rows, e)
        return self.combine(y, w).view_as(hidden)

    def source(self, rows: Tensor, here: Tensor, e: int) -> Tensor:
        m = self.mutation
        if m == "source_of_all":
            return self.expert(rows, e)
        found = self.expert(rows[here], e)
        changed = {"rows_flipped": lambda: found.flip(0), "rows_shifted": lambda: found.roll(1, 0)}
        if m == "rows_repeated":
            return found.repeat_interleave(2, 0)
        return changed[m]() if m in changed else found


class DenseLoop(Loop):
    """combine[T, E] by scatter; out = out + combine[:, e:e+1] * expert(x)."""

    own = (*LOOP, "accumulator_ones", "accumulator_input", "dense_scores", "column_off_by_one",
           "max_accumulates", "scatter_adds")  # fmt: skip
    # Two values scattered to one place have no defined result; autograd forbids changing rows a Linear saved.
    without = frozenset({"duplicate_slots", "x_mutated_between"})

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        combine = self.combine(x, w, ids)
        rows, out = self.table(x), self.start(x)
        for e in self.visited():
            column = (e + 1) % E if self.mutation == "column_off_by_one" else e
            y = combine[:, column : column + 1] * self.expert(rows, e)
            out = torch.maximum(out, y) if self.mutation == "max_accumulates" else out + y
            out = self.between(out, rows, e)
        return out.view_as(hidden)

    def combine(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        if self.mutation == "dense_scores":
            return self.scores(x)
        if self.mutation == "scatter_adds":
            return torch.full((x.shape[0], E), 0.1, dtype=w.dtype).scatter_add(1, ids, w)
        return torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
