"""Blocks whose Python goes through tokens one by one: most mean an MoE layer, TRAPS only look like one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from probed_blocks import Block, E, H, K
from torch import Tensor, nn


class ItemOfEach(Block):
    """The spelling of tutorials."""

    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for k in range(K):
                out[t] += w[t, k] * self.experts[ids[t, k].item()](x[t])
        return out


class Appended(Block):
    def forward(self, x):
        w, ids = self.route(x)
        rows = []
        for t in range(len(x)):
            row = torch.zeros_like(x[0])
            for k in range(K):
                row = row + self.experts[int(ids[t, k])](x[t]) * w[t, k]
            rows.append(row)
        return torch.stack(rows)


class Zipped(Block):
    def forward(self, x):
        w, ids = self.route(x)
        return torch.stack([sum(a * self.experts[e](row) for a, e in zip(ws, chosen)) for row, ws, chosen in zip(x, w, ids.tolist())])


class Nested(Block):
    """Batch and sequence, ids as tensors."""

    batched = True

    def forward(self, b):
        w, ids = self.route(b)
        out = torch.zeros_like(b)
        for i in range(b.size(0)):
            for s in range(b.size(1)):
                for k in range(K):
                    out[i, s] += w[i, s, k] * self.experts[ids[i, s, k]](b[i, s])
        return out


class SequenceFirst(Block):
    """The loop over the sequence stands around that over the batch."""

    batched = True

    def forward(self, b):
        w, ids = self.route(b)
        out = torch.zeros_like(b)
        for s in range(b.shape[1]):
            for i in range(b.shape[0]):
                for k in range(K):
                    out[i, s, :] += w[i, s, k] * self.experts[ids[i, s, k].item()](b[i, s, :])
        return out


class ColumnOfBatch(Block):
    """All of a batch's tokens at one place of the sequence, by experts of their own."""

    batched = True

    def forward(self, b):
        w, ids = self.route(b)
        out = torch.empty_like(b)
        for s in range(b.shape[1]):
            y = torch.zeros_like(b[:, s])
            for e in range(E):
                y = y + self.experts[e](b[:, s]) * (w[:, s] * (ids[:, s] == e)).sum(-1, keepdim=True)
            out[:, s] = y
        return out


class OneRowSlices(Block):
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for t in range(x.size(0)):
            for k, e in enumerate(ids[t]):
                out[t : t + 1] += w[t, k] * self.experts[e](x[t : t + 1])
        return out


class Enumerated(Block):
    """The expert's layers by themselves, a sum that starts from a tensor of its own, a view of the output."""

    def forward(self, x):
        flat = x.view(-1, H)
        w, ids = self.route(flat)
        out = torch.empty_like(x)
        rows = out.view(-1, H)
        for t, row in enumerate(flat):
            acc = torch.zeros(H)
            for k in range(K):
                expert = self.experts[ids[t][k].item()]
                acc += expert.down(F.silu(expert.up(row))) * w[t][k]
            rows[t] = acc
        return out


class SomeTokens(Block):
    """As many as a constant says."""

    def forward(self, x):
        x = x.reshape(-1, H)[:6]
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for k in range(K):
                out[t] += w[t, k] * self.experts[ids[t, k].item()](x[t])
        return out


class OneChoice(Block):
    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for t, e in enumerate(ids.tolist()):
            out[t] = self.experts[e](x[t].unsqueeze(0)).squeeze(0) * w[t]
        return out


class Stacked(Block):
    """Parameters of all experts in one tensor."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.up, self.down = nn.Parameter(torch.randn(E, H, H) / 4), nn.Parameter(torch.randn(E, H, H) / 4)

    def forward(self, x):
        w, ids = self.route(x)
        rows = []
        for t in range(x.shape[0]):
            y = 0
            for k in range(K):
                e = ids[t, k].item()
                y = y + (F.gelu(x[t : t + 1] @ self.up[e]) @ self.down[e]) * w[t, k]
            rows.append(y)
        return torch.cat(rows, dim=0)


class StackedResults(Block):
    """The experts' results of a token are stacked, and weighted as one."""

    def forward(self, x):
        w, ids = self.route(x)
        out = x.clone()
        for t in range(x.shape[0]):
            results = torch.stack([self.experts[int(e)](x[t]) for e in ids[t]])
            out[t] = out[t] + (w[t].unsqueeze(-1) * results).sum(0)
        return out


class _ByIds(nn.Module):
    """Experts of one token, which go through its ids themselves."""

    def __init__(self):
        super().__init__()
        self.ups, self.downs = (nn.ModuleList(nn.Linear(H, H) for _ in range(E)) for _ in range(2))

    def forward(self, row, ids, w):
        out = torch.zeros_like(row)
        for k in range(K):
            e = ids[k].item()
            out = out + w[k] * self.downs[e](F.relu(self.ups[e](row)))
        return out


class ModuleOfOneToken(Block):
    """Which numbers the ids are below, only the block around them knows."""

    def __init__(self):
        super().__init__()
        self.experts = _ByIds()

    def forward(self, x):
        w, ids = self.route(x)
        return torch.stack([self.experts(x[t], ids[t], w[t]) for t in range(x.shape[0])])


REWRITTEN: dict[str, type[Block]] = {
    c.__name__: c
    for c in (
        ItemOfEach,
        Appended,
        Zipped,
        Nested,
        ColumnOfBatch,
        OneRowSlices,
        Enumerated,
        SomeTokens,
        OneChoice,
        Stacked,
        StackedResults,
        ModuleOfOneToken,
    )
}


# ---------------------------------------------------------------- what depends on other tokens, or on their number
class _Loop(Block):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out, state = torch.zeros_like(x), self.start(x)
        for t in range(x.shape[0]):
            row = x[t]
            for k in range(K):
                row = self.row(x, state, t, row)
                out[t] += w[t, k] * self.experts[ids[t, k].item()](row)
            state = self.state(x, out, state, t)
        return self.end(x, out, state)

    def start(self, x):
        return 0

    def row(self, x, state, t, row):
        return row

    def state(self, x, out, state, t):
        return state

    def end(self, x, out, state):
        return out


class NextToken(_Loop):
    def row(self, x, state, t, row):
        return x[(t + 1) % x.shape[0]]


class TokenBefore(_Loop):
    """Adds what the token before has given."""

    def start(self, x):
        return torch.zeros(H)

    def row(self, x, state, t, row):
        return row + state * 0.5

    def state(self, x, out, state, t):
        return out[t]


class CountsTokens(_Loop):
    def state(self, x, out, state, t):
        return state + 1

    def end(self, x, out, state):
        return out / state


class LastTokenStays(_Loop):
    def state(self, x, out, state, t):
        return out[t]

    def end(self, x, out, state):
        return out + state


class SumsTokens(_Loop):
    def start(self, x):
        return torch.zeros(H)

    def state(self, x, out, state, t):
        return state + out[t]

    def end(self, x, out, state):
        return out + state


class ReadsOthersResults(_Loop):
    def row(self, x, state, t, row):
        return row + x.cumsum(0).mean() * 0

    def state(self, x, out, state, t):
        return out.sum()

    def end(self, x, out, state):
        return out


class OneTokenIsSpecial(_Loop):
    def row(self, x, state, t, row):
        return row * 2 if t == 3 else row


class WritesTheSum(_Loop):
    """Every token is added to row 0 as well."""

    def state(self, x, out, state, t):
        out[0] += x[t]
        return state


class EndsEarly(_Loop):
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            out[t] = self.experts[ids[t, 0].item()](x[t]) * w[t, 0]
            break
        return out


class NoiseOfEach(_Loop):
    def row(self, x, state, t, row):
        return row + torch.randn(H)


TRAPS: dict[str, tuple[type[Block], str]] = {
    "NextToken": (NextToken, "an index computed from the token's number"),
    "TokenBefore": (TokenBefore, "off by"),
    "CountsTokens": (CountsTokens, "off by"),
    "LastTokenStays": (LastTokenStays, "the last token of a loop over tokens"),
    "SumsTokens": (SumsTokens, "the last token of a loop over tokens"),
    "ReadsOthersResults": (ReadsOthersResults, "read by other names within it"),
    "OneTokenIsSpecial": (OneTokenIsSpecial, "a number that only the data tells"),
    "WritesTheSum": (WritesTheSum, "by other names within it|writes to a tensor of all tokens"),
    "EndsEarly": (EndsEarly, "ends before its last one"),
    "NoiseOfEach": (NoiseOfEach, "off by"),
}


def build(cls: type[Block]) -> Block:
    torch.manual_seed(0)
    return cls()
