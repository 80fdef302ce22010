"""Blocks whose Python puts tokens into lists, one an expert: most mean an MoE layer, TRAPS only look like one."""

from __future__ import annotations

from collections import defaultdict

import torch
from probed_blocks import Block, E, K
from torch import Tensor

LIMIT = 100


class Pairs(Block):
    def forward(self, x):
        w, ids = self.route(x)
        lists = [[] for _ in range(E)]
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                lists[e].append((t, k))
        out = torch.zeros_like(x)
        for e, pairs in enumerate(lists):
            if pairs:
                t, k = (torch.tensor(p) for p in zip(*pairs))
                out.index_add_(0, t, self.experts[e](x[t]) * w[t, k, None])
        return out


class TokensAndShares(Block):
    """Two dicts of lists, numbers asked for one by one, lists as indices."""

    def forward(self, x):
        w, ids = self.route(x)
        groups, shares = defaultdict(list), defaultdict(list)
        for t in range(x.shape[0]):
            for k in range(K):
                groups[ids[t, k].item()].append(t)
                shares[ids[t, k].item()].append(w[t, k])
        out = torch.zeros_like(x)
        for e, rows in groups.items():
            out[rows] += self.experts[e](x[rows]) * torch.stack(shares[e]).unsqueeze(-1)
        return out


class FlatNumbers(Block):
    """Token and slot as one number."""

    def forward(self, x):
        w, ids = self.route(x)
        groups = {e: [] for e in range(E)}
        for i, e in enumerate(ids.flatten().tolist()):
            groups[e].append(i)
        out = torch.zeros_like(x)
        for e in range(E):
            if len(groups[e]) == 0:
                continue
            at = torch.tensor(groups[e], device=x.device)
            out.index_add_(0, at // K, self.experts[e](x[at // K]) * w.flatten()[at].unsqueeze(-1))
        return out


class DividedInPython(Block):
    def forward(self, x):
        w, ids = self.route(x)
        rows, slots = [[] for _ in range(E)], [[] for _ in range(E)]
        for i, e in enumerate(ids.flatten().tolist()):
            rows[e].append(i // K)
            slots[e].append(i % K)
        out = torch.zeros_like(x)
        for e in range(E):
            out.index_add_(0, torch.tensor(rows[e]).long(), self.experts[e](x[rows[e]]) * w[rows[e], slots[e], None])
        return out


class Comprehended(Block):
    """A list of an expert's tokens at a time, gone through again for what stands in them."""

    def forward(self, x):
        w, ids = self.route(x)
        out, chosen = torch.zeros_like(x), ids.tolist()
        for e in range(E):
            members = [(t, k) for t in range(len(x)) for k in range(K) if chosen[t][k] == e]
            if not members:
                continue
            rows = torch.tensor([t for t, _ in members])
            share = torch.stack([w[t, k] for t, k in members])
            out.index_add_(0, rows, self.experts[e](torch.stack([x[t] for t, _ in members])) * share[:, None])
        return out


class ComparedTensors(Block):
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            rows, slots = [], []
            for t in range(len(x)):
                for k in range(K):
                    if ids[t, k] == e:
                        rows.append(t)
                        slots.append(k)
            if len(rows) > 0:
                out[rows] = out[rows] + self.experts[e](x[rows]) * w[rows, slots].unsqueeze(1)
        return out


class PairsAsTable(Block):
    """A tensor of pairs, and an expert that only gets a list when a token comes to it."""

    def forward(self, x):
        w, ids = self.route(x)
        lists = {}
        for t in range(x.size(0)):
            for k, e in enumerate(ids[t]):
                lists.setdefault(int(e), []).append((t, k))
        out = torch.zeros_like(x)
        for e, pairs in sorted(lists.items()):
            at = torch.tensor(pairs)
            y = self.experts[e](x[at[:, 0]]) * w[at[:, 0], at[:, 1]].unsqueeze(-1)
            out.index_add_(0, at[:, 0], y)
        return out


class OneChoice(Block):
    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).max(-1)
        lists = [[] for _ in range(E)]
        for t, e in enumerate(ids.tolist()):
            lists[e].append(t)
        out = torch.zeros_like(x)
        for e, rows in enumerate(lists):
            if rows:
                out[rows] = self.experts[e](x[rows]) * w[rows].unsqueeze(-1)
        return out


class Batched(Block):
    """Batch and sequence as two loops."""

    batched = True

    def forward(self, b):
        w, ids = self.route(b)
        lists = [[] for _ in range(E)]
        for i in range(b.shape[0]):
            for s in range(b.shape[1]):
                for k in range(K):
                    lists[ids[i, s, k].item()].append((i, s, k))
        out = torch.zeros_like(b)
        for e, each in enumerate(lists):
            if not each:
                continue
            i, s, k = torch.tensor(each).unbind(1)
            out.index_put_((i, s), self.experts[e](b[i, s]) * w[i, s, k, None], accumulate=True)
        return out


REWRITTEN: dict[str, type[Block]] = {
    c.__name__: c
    for c in (Pairs, TokensAndShares, FlatNumbers, DividedInPython, Comprehended, ComparedTensors, PairsAsTable, OneChoice, Batched)
}


# ---------------------------------------------------------------- what is not the list of an expert's tokens
class _Lists(Block):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        lists = [[] for _ in range(E)]
        self.fill(x, ids, lists)
        out = torch.zeros_like(x)
        for e in range(E):
            pairs = self.pairs(lists, e)
            if pairs:
                t, k = (torch.tensor(p) for p in zip(*pairs))
                out.index_add_(0, t, self.experts[e](x[t]) * w[t, k, None])
        return out

    def fill(self, x, ids, lists):
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                lists[e].append((t, k))

    def pairs(self, lists, e):
        return lists[e]


class Cut(_Lists):
    """Beyond what any number of tokens in the check would show, if it had not looked at the code."""

    def pairs(self, lists, e):
        return lists[e][:LIMIT]


class CutShort(_Lists):
    def pairs(self, lists, e):
        return lists[e][:3]


class First(_Lists):
    def pairs(self, lists, e):
        return lists[e] and [lists[e][0]]


class LimitedByLength(_Lists):
    def fill(self, x, ids, lists):
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                if len(lists[e]) < LIMIT:
                    lists[e].append((t, k))


class LimitedByCount(_Lists):
    def fill(self, x, ids, lists):
        used = [0] * E
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                if used[e] >= LIMIT:
                    continue
                used[e] += 1
                lists[e].append((t, k))


class LimitedInAFunction(_Lists):
    def fill(self, x, ids, lists):
        used = [0] * E
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                self.put(lists, used, e, (t, k))

    def put(self, lists, used, e, pair):
        used[e] += 1
        if used[e] <= LIMIT:
            lists[e].append(pair)


class LimitedInALocalFunction(_Lists):
    def fill(self, x, ids, lists):
        used = [0] * E

        def put(e, pair):
            used[e] += 1
            if used[e] <= LIMIT:
                lists[e].append(pair)

        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                put(e, (t, k))


class _Buckets:
    def __init__(self, lists):
        self.lists = lists

    def put(self, e, pair):
        if self.lists[e].__len__() < LIMIT:
            self.lists[e].append(pair)


class LimitedInAnObject(_Lists):
    def fill(self, x, ids, lists):
        buckets = _Buckets(lists)
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                buckets.put(e, (t, k))


class _Store:
    def __init__(self, lists, most):
        self.lists, self.most = lists, most

    def first(self, e):
        return self.lists[e][: self.most]


class CutByAnObject(_Lists):
    def pairs(self, lists, e):
        return _Store(lists, LIMIT * 2).first(e)


class LimitedBehindAGenerator(_Lists):
    def each(self, ids):
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                yield t, k, e

    def fill(self, x, ids, lists):
        used = [0] * E
        for t, k, e in self.each(ids):
            used[e] += 1
            if used[e] <= LIMIT:
                lists[e].append((t, k))


class CountedDown(_Lists):
    def fill(self, x, ids, lists):
        left = [LIMIT] * E
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                if left[e]:
                    left[e] -= 1
                    lists[e].append((t, k))


class StopsAtOne(_Lists):
    """By equality, which the check has to see."""

    def fill(self, x, ids, lists):
        used = [0] * E
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                used[e] += 1
                lists[E - 1 if used[e] == LIMIT else e].append((t, k))


class OtherSlot(_Lists):
    def fill(self, x, ids, lists):
        for t, chosen in enumerate(ids.tolist()):
            for k in range(K):
                lists[chosen[0]].append((t, k))


class LastSlotOnly(_Lists):
    """Only the last slot's expert is asked for the token."""

    def fill(self, x, ids, lists):
        for t in range(x.shape[0]):
            for k in range(K):
                e = ids[t, k].item()
            lists[e].append((t, k))


class SlotsFromTheEnd(_Lists):
    def pairs(self, lists, e):
        rows, slots = [t for t, _ in lists[e]], [k for _, k in lists[e]]
        slots.reverse()
        return list(zip(rows, slots))


class NextToken(_Lists):
    def fill(self, x, ids, lists):
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                lists[e].append(((t + 1) % x.shape[0], k))


class AddsMeanwhile(_Lists):
    def fill(self, x, ids, lists):
        for t, chosen in enumerate(ids.tolist()):
            x[t] += 1
            for k, e in enumerate(chosen):
                lists[e].append((t, k))


class GoneThrough(_Lists):
    """The tokens in a list, one by one."""

    def forward(self, x):
        w, ids = self.route(x)
        lists = [[] for _ in range(E)]
        self.fill(x, ids, lists)
        out = torch.zeros_like(x)
        for e in range(E):
            for t, k in lists[e]:
                out[t] += self.experts[e](x[t]) * w[t, k]
        return out


class WrittenBetween(_Lists):
    def forward(self, x):
        w, ids = self.route(x)
        lists = [[] for _ in range(E)]
        self.fill(x, ids, lists)
        ids[:, 0] = 0
        out = torch.zeros_like(x)
        for e, pairs in enumerate(lists):
            t, k = torch.tensor(pairs).reshape(-1, 2).long().unbind(1)
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, k, None])
        return out


TRAPS: dict[str, tuple[type[Block], str]] = {
    "Cut": (Cut, "off by"),
    "CutShort": (CutShort, "off by"),
    "First": (First, "off by"),
    "LimitedByLength": (LimitedByLength, "compares numbers by <"),
    "LimitedByCount": (LimitedByCount, "compares numbers by >="),
    "LimitedInAFunction": (LimitedInAFunction, "compares numbers by <="),
    "LimitedInALocalFunction": (LimitedInALocalFunction, "compares numbers by <="),
    "LimitedInAnObject": (LimitedInAnObject, "compares numbers by <"),
    "CutByAnObject": (CutByAnObject, "a method of an object cuts"),
    "LimitedBehindAGenerator": (LimitedBehindAGenerator, "not in a plain `for` loop"),
    "CountedDown": (CountedDown, "decides by a truth value"),
    "StopsAtOne": (StopsAtOne, "off by"),
    "OtherSlot": (OtherSlot, "in which nothing was asked of the data"),
    "LastSlotOnly": (LastSlotOnly, "off by"),
    "SlotsFromTheEnd": (SlotsFromTheEnd, "off by"),
    "NextToken": (NextToken, "computed from sizes|cannot be written down"),
    "AddsMeanwhile": (AddsMeanwhile, "does more than that"),
    "GoneThrough": (GoneThrough, "the last token of a loop over tokens"),
    "WrittenBetween": (WrittenBetween, "was written to behind it"),
}


def build(cls: type[Block]) -> Block:
    torch.manual_seed(0)
    return cls()
