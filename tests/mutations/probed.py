"""Styles that Dynamo cannot capture: they are recorded, so their mistakes are those of Python code that looks at data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mutations.base import ODD, E, H, K, T
from mutations.loops import MaskedList, MaskedStack

FEW = T * K // E + 1  # more than an expert has on average, so that some are skipped
SKIP = ("skips_small", "skips_last_hit", "stops_at_gap", "position_for_expert", "gap_adds", "hits_of_other_gate")


class HitList(MaskedList):
    """for e in the list of experts that are hit: torch.where(mask[e]), index_add_."""

    own = (*MaskedList.own, *SKIP, "divided_by_hits")

    def hits(self, mask_EKT: Tensor, x: Tensor) -> list[int]:
        m = self.mutation
        if m == "hits_of_other_gate":
            mask_EKT = F.one_hot(self.other_gate(x[:1]).topk(1, dim=-1)[1], E).permute(2, 1, 0)
        counts = mask_EKT.sum(dim=(-1, -2))
        hit: list[int] = torch.greater(counts, FEW if m == "skips_small" else 0).nonzero().flatten().tolist()
        if m == "missing_expert":
            hit = [e for e in hit if e != ODD]
        if m == "expert_twice":
            hit = [e for e in hit for _ in range(1 + (e == ODD))]
        if m == "stops_at_gap":
            hit = [e for n, e in enumerate(hit) if n == e]
        return hit[::-1] if m == "reversed_order" else hit[:-1] if m == "skips_last_hit" else hit

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        rows, out, m = self.table(x), self.start(x), self.mutation
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        hit = self.hits(mask, x)
        for n, e in enumerate(hit):
            slot, tok = torch.where(mask[e])
            if m == "first_row_skipped":
                slot, tok = slot[1:], tok[1:]
            share = w[tok, (slot + 1) % K if m == "slot_of_neighbour" else slot, None]
            y = self.expert(rows[tok], n if m == "position_for_expert" else e) * share
            to = (tok + 1) % x.shape[0] if m == "lands_next_token" else tok
            out.index_add_(0, to, y.to(out.dtype), alpha=2 if m == "alpha" else 1)
            out = self.between(out, rows, e)
        if m == "gap_adds":
            out = out + (0 if len(hit) == E else 1)
        return (out / len(hit) if m == "divided_by_hits" else out).view_as(hidden)


class SkippedRows(MaskedStack):
    """if nobody chose expert e: continue; out[tok] += ..."""

    own = (*MaskedStack.own, "skips_small", "stops_at_gap", "position_for_expert", "gap_adds", "limited", "limit_counts_slots")

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        rows, out, m, n = self.table(x), self.start(x), self.mutation, 0
        for e in self.visited():
            tok, slot = torch.where(ids == e)
            if tok.numel() < (FEW if m == "skips_small" else 1):
                if m == "stops_at_gap":
                    break
                if m == "gap_adds":
                    out = out + 1
                continue
            if m in ("limited", "limit_counts_slots") and tok.numel() > 3:
                tok, slot = tok[:3], slot[: (3 if m == "limited" else 2)]
                tok = tok[: slot.shape[0]]
            share = w.roll(1, 0)[tok, slot, None] if m == "transposed_where" else w[tok, slot, None]
            y = (share * self.expert(rows[tok], n if m == "position_for_expert" else e)).to(out.dtype)
            n += 1
            if m == "overwrites":
                out[tok] = y
            else:
                out[tok] += y
            out = self.between(out, rows, e)
        return out.view_as(hidden)


class CountedRows(MaskedStack):
    """Rows sorted by expert, running counts through numpy, slices between them, `if start == end: continue`."""

    own = ("skips_small", "position_for_expert", "bounds_shifted", "counts_of_other_gate", "unsorted_weights", "wrong_tokens", "descending")
    without = MaskedStack.without | {"ids_next_token"}

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        m, out, rows = self.mutation, torch.zeros_like(x), self.read(x)
        flat = ids.reshape(-1)
        order = flat.argsort(descending=m == "descending")
        counted = self.other_gate(x).topk(K, dim=-1)[1].reshape(-1) if m == "counts_of_other_gate" else flat
        ends = counted.bincount(minlength=E).cpu().numpy().cumsum(0)
        tok = order % x.shape[0] if m == "wrong_tokens" else order // K
        share = w.reshape(-1) if m == "unsorted_weights" else w.reshape(-1)[order]
        n = 0
        for e in range(E):
            start, end = (0 if e == 0 else ends[e - 1]), ends[e]
            if end - start < (FEW if m == "skips_small" else 1):
                continue
            if m == "bounds_shifted":
                start, end = start + 1, end + 1
            at = tok[start:end]
            y = self.expert(rows[at], n if m == "position_for_expert" else e) * share[start:end, None]
            out.index_add_(0, at, y.to(out.dtype))
            n += 1
        return out.view_as(hidden)


__all__ = ["CountedRows", "HitList", "SkippedRows"]
