"""Styles that sort the (token, slot) pairs by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import moe as _registers_the_op  # noqa: F401

from mutations.base import ODD, E, Family, H, K

ORDER = ("unstable_sort", "descending_sort", "sort_other_key", "token_by_modulo", "weights_unsorted")
BACK = ("not_unsorted", "unsorted_by_order")
COUNTS = ("counts_rolled", "counts_of_other_gate")
SEGMENTS = ("segments_reversed", "missing_expert", "expert_twice")


class Sorted(Family):
    """What the sorting styles share."""

    def order_of(self, x: Tensor, ids: Tensor) -> Tensor:
        m = self.mutation
        key = self.other_gate(x).topk(K, dim=-1)[1] if m == "sort_other_key" else ids
        return torch.argsort(key.reshape(-1), stable=m != "unstable_sort", descending=m == "descending_sort")

    def tokens(self, order: Tensor, count: int) -> Tensor:
        return order % count if self.mutation == "token_by_modulo" else order // K

    def counts(self, x: Tensor, ids: Tensor) -> Tensor:
        m = self.mutation
        if m == "counts_of_other_gate":
            ids = self.other_gate(x).topk(K, dim=-1)[1]
        n = torch.histc(ids.float(), bins=E, min=0, max=E - 1).long()
        return n.roll(1, 0) if m == "counts_rolled" else n

    def share(self, w: Tensor, order: Tensor) -> Tensor:
        flat = w.reshape(-1)
        return (flat if self.mutation == "weights_unsorted" else flat[order]).unsqueeze(-1)

    def back(self, y: Tensor, order: Tensor) -> Tensor:
        """Rows from expert order to slot order."""
        m = self.mutation
        if m == "not_unsorted":
            return y
        if m == "unsorted_by_order":
            return y[order]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return y[inverse]

    def segments(self, parts: list[Tensor]) -> list[Tensor]:
        """Each expert's rows through it, with what may go wrong between split and cat."""
        m = self.mutation
        twice = lambda e: m == "expert_twice" and e == ODD  # noqa: E731
        out = []
        for e, p in enumerate(parts):
            y = p * 0 if m == "missing_expert" and e == ODD else self.expert(p, e)
            out.append(self.expert(y, e) if twice(e) else y)
        return out[::-1] if m == "segments_reversed" else out


class SortSplit(Sorted):
    """argsort, counts.tolist(), split, experts, cat, unsort, weight and sum over slots."""

    own = (*ORDER[:4], *BACK, *COUNTS, *SEGMENTS, "mean_over_slots")

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        order = self.order_of(x, ids)
        rows = self.read(x)[self.tokens(order, x.shape[0])]
        y = torch.cat(self.segments(list(rows.split(self.counts(x, ids).tolist()))))
        y = self.back(y, order).view(*ids.shape, H) * w.unsqueeze(-1)
        return (y.mean(1) if self.mutation == "mean_over_slots" else y.sum(1)).view_as(hidden)


class SlicedGroups(Sorted):
    """Slices tokens[cum[e]:cum[e + 1]] between offsets, one expert each, cat, scatter_add."""

    own = (*ORDER, *COUNTS, *SEGMENTS, "slice_starts_late", "lands_next_token")

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        order = self.order_of(x, ids)
        tok = self.tokens(order, x.shape[0])
        cum = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts(x, ids).cumsum(0)])
        late = 1 if self.mutation == "slice_starts_late" else 0
        table = self.read(x)
        groups = [table[tok[cum[e] : cum[e + 1]]] for e in range(E)]
        if late:
            groups[ODD] = table[tok[cum[ODD] - late : cum[ODD + 1] - late]]
        y = torch.cat(self.segments(groups)) * self.share(w, order)
        to = (tok + 1) % x.shape[0] if self.mutation == "lands_next_token" else tok
        return torch.zeros_like(x).scatter_add(0, to.unsqueeze(-1).expand(-1, H), y).view_as(hidden)


class TitanLike(Sorted):
    """Scores multiply the sorted rows BEFORE the experts; scatter_add onto a shared expert's output."""

    own = (*ORDER, *COUNTS, *SEGMENTS, "weighted_after", "weighted_twice", "onto_zeros")

    def make_experts(self) -> None:
        super().make_experts()
        self.shared = nn.Linear(H, H)

    def forward(self, hidden: Tensor) -> Tensor:
        m, x = self.mutation, hidden.view(-1, H)
        w, ids = self.route(x)
        order = self.order_of(x, ids)
        tok = self.tokens(order, x.shape[0]).reshape(-1, 1).expand(-1, H)
        rows, share = torch.gather(self.read(x), 0, tok), self.share(w, order)
        rows = rows if m == "weighted_after" else rows * share
        y = torch.cat(self.segments(list(rows.split(self.counts(x, ids).tolist()))))
        y = y * share if m in ("weighted_after", "weighted_twice") else y
        out = torch.zeros_like(x) if m == "onto_zeros" else self.shared(x)
        return out.scatter_add(0, tok, y).view_as(hidden)


class Grouped(Sorted):
    """transformers' grouped path in float32: sort, histc, cumsum, `grouped_mm_fallback`, sorted biases."""

    own = (*ORDER, *BACK, *COUNTS, "offsets_exclusive", "offsets_short", "bias_by_unsorted_ids")
    without = frozenset({"descending_sort"})

    def grouped(self, x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, w.transpose(1, 2), offs)

    def offsets(self, counts: Tensor) -> Tensor:
        m, ends = self.mutation, counts.cumsum(0, dtype=torch.int32)
        if m == "offsets_exclusive":
            return ends - counts.int()
        return (ends - (torch.arange(E) == ODD).int()).int() if m == "offsets_short" else ends

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        order = self.order_of(x, ids)
        flat = ids.reshape(-1)
        key = flat if self.mutation == "bias_by_unsorted_ids" else flat[order]
        offs = self.offsets(self.counts(x, ids))

        def linear(a: Tensor, j: int) -> Tensor:
            y, table = self.grouped(a, self.weights(j), offs), self.bias_table(j)
            return y if table is None else y + table[key].to(y.dtype)

        y = self.vector(self.read(x)[self.tokens(order, x.shape[0])], key, linear)
        y = self.back(y * self.share(w, order), order)
        return y.view(*ids.shape, H).sum(1).view_as(hidden)


class GroupedBf16(Grouped):
    """The same through torch.nn.functional.grouped_mm, in bfloat16 (all that torch's fake kernel takes)."""

    dtype = torch.bfloat16
    # Rounding is everywhere already; rows after the last offset are uninitialised memory.
    without = Grouped.without | {"weights_bf16", "bf16_inside", "bf16_inside_one", "offsets_exclusive"}

    def grouped(self, x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, w.transpose(1, 2), offs=offs)
