"""Blocks that sort rows of gates by expert, one thing changed in each: none may be rewritten to what it does not say."""

from __future__ import annotations

import torch
from corpus.variants.dispatched import ByExpert, SparseDispatcher
from probed_blocks import Block, E, K
from torch import Tensor


class Dispatched(SparseDispatcher):
    """As people have it, in training, too."""


class Multiplied(ByExpert):
    """Each expert once a token, whatever its gate."""

    def together(self, parts):
        self.shares = torch.ones_like(self.shares)
        return super().together(parts)


class SizesOfOthers(ByExpert):
    """As many rows in all, those of the gates of other tokens."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__(gates)
        self.sizes = (gates > 0).flip(1).sum(0).tolist()


class SharesUnsorted(ByExpert):
    """Weights in the order before the sort."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__(gates)
        table = torch.nonzero(gates)
        self.shares = gates[table[:, 0], table[:, 1]].unsqueeze(1)


class FromTheLast(ByExpert):
    """Sorted from the last expert to the first: the first expert has the last one's rows."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__(gates)
        _, order = torch.nonzero(gates).sort(0, descending=True)
        self.tokens, self.sizes = torch.nonzero(gates)[order[:, 1], 0], self.sizes[::-1]


class LastPartFirst(ByExpert):
    def together(self, parts):
        return super().together(parts[::-1])


class RowsOfNeighbours(ByExpert):
    """The order of another table's rows, of which there are as many."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__(gates)
        self.tokens = torch.nonzero(gates)[torch.nonzero(gates.roll(1, 0)).sort(0).indices[:, 1], 0]


# ---------------------------------------------------------------- experts that are hit, with their counts
class Counted(Block):
    """unique with counts; what is done with it differs."""

    def forward(self, x):
        w, ids = self.route(x)
        flat = ids.flatten()
        order = flat.argsort()
        out = torch.zeros_like(x)
        for e, rows in self.parts(order, *self.counted(flat)):
            out.index_add_(0, rows // K, self.experts[e](x[rows // K]) * w.flatten()[rows, None])
        return out / self.divisor(flat)

    def counted(self, flat):
        return torch.unique(flat, return_counts=True)

    def parts(self, order, hit, counts):
        return zip(hit.tolist(), torch.split(order, counts.tolist()))

    def divisor(self, flat):
        return 1.0


class RunsOfUnsorted(Counted):
    def counted(self, flat):
        return torch.unique_consecutive(flat, return_counts=True)


class NumbersOfParts(Counted):
    """The i-th expert that is hit is taken for expert i."""

    def parts(self, order, hit, counts):
        return enumerate(torch.split(order, counts.tolist()))


class DividedByHits(Counted):
    def divisor(self, flat):
        return len(torch.unique(flat, return_counts=True)[0])


class SkipsTheFirst(Counted):
    """The first expert that is hit gets nothing."""

    def parts(self, order, hit, counts):
        return list(super().parts(order, hit, counts))[1:]


# ---------------------------------------------------------------- sizes of what was computed of chosen rows
class MoreForMany(Block):
    """Experts with more than three tokens count twice."""

    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = self.experts[e](x[t])
            if y.shape[0] > 3:
                y = y * 2
            out.index_add_(0, t, y * w[t, k, None])
        return out


class OtherSequences(Block):
    """Rows of one mask of sequences go into those of another."""

    batched = True

    def forward(self, b):
        w, ids = self.route(b.mean(1))
        out = torch.zeros_like(b)
        for e in range(E):
            for k in range(K):
                mask = ids[:, k] == e
                if mask.any():
                    out[mask.flip(0)] += w[mask, k].view(-1, 1, 1) * self.experts[e](b[mask])
        return out


class SequenceBySequence(Block):
    """A batch of three sequences, one by one; which choices and rows go into which differs."""

    batched = True
    sequences = 3

    def forward(self, b):
        w, ids = self.route(b)
        out = torch.zeros_like(b)
        for i in range(self.sequences):
            for e in range(E):
                t, k = torch.where(ids[self.chosen(i)] == e)
                out[i].index_add_(0, t, self.experts[e](b[i][t]) * w[i][t, k, None])
        return out

    def chosen(self, i):
        return i


class ChoicesOfTheLast(SequenceBySequence):
    def chosen(self, i):
        return 2 - i


class ChoicesOfOne(SequenceBySequence):
    def chosen(self, i):
        return min(i, 1)


class LastSequenceLeftOut(SequenceBySequence):
    sequences = 2


def _dispatching(how: type[ByExpert]) -> type[SparseDispatcher]:
    return type(how.__name__, (SparseDispatcher,), {"dispatcher": how})


RIGHT: dict[str, type] = {"Dispatched": Dispatched, "Multiplied": _dispatching(Multiplied), "Counted": Counted}
RIGHT["SequenceBySequence"] = SequenceBySequence

# Recorded, as they run for any number of tokens; then left as they are, or rewritten to what they say.
OTHERWISE: dict[str, type] = {
    how.__name__: _dispatching(how) for how in (SizesOfOthers, SharesUnsorted, FromTheLast, LastPartFirst, RowsOfNeighbours)
}
OTHERWISE |= {c.__name__: c for c in (OtherSequences, ChoicesOfTheLast, ChoicesOfOne, LastSequenceLeftOut)}

NOT_RECORDED: dict[str, tuple[type, str]] = {
    "RunsOfUnsorted": (RunsOfUnsorted, "Split sizes add up"),
    "NumbersOfParts": (NumbersOfParts, "off by"),
    "DividedByHits": (DividedByHits, "off by"),
    "SkipsTheFirst": (SkipsTheFirst, "off by"),
    "MoreForMany": (MoreForMany, "off by"),
}
