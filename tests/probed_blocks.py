"""Blocks that Dynamo cannot capture: some mean an MoE layer, some only look like one."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, E, K = 16, 4, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Block(nn.Module):
    """A router and experts; `forward` is what the subclasses differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.other_gate = nn.Linear(H, E), nn.Linear(H, E)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.register_buffer("seen", torch.zeros(E, dtype=torch.long))
        self.scale, self.calls = 1.0, 0

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(self.gate(x_TH).softmax(-1), K, dim=-1)
        return w * self.scale, ids

    def add(self, out_TH: Tensor, x_TH: Tensor, w_TK: Tensor, ids_TK: Tensor, e: int, expert: int | None = None) -> None:
        t, k = torch.where(ids_TK == e)
        out_TH.index_add_(0, t, (self.experts[e if expert is None else expert](x_TH[t]) * w_TK[t, k, None]).to(out_TH.dtype))


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def hits(ids: Tensor) -> Tensor:
    return (F.one_hot(ids, E).sum((0, 1)) > 0).nonzero().flatten()


class HitLoop(Block):
    """A loop over the experts that are hit; `visited` says how it finds them."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in self.visited(ids):
            self.add(out, x, w, ids, int(e))
        return out

    def visited(self, ids: Tensor) -> Any:
        return hits(ids)


class WithoutGradients(Block):
    """The router and the input of the experts are kept out of the gradient, one expert's part is in again."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            w, ids = self.route(x)
            rows = x * 2
            with torch.enable_grad():
                again = x.tanh()
        out = again * 0.5
        for e in hits(ids):
            self.add(out, rows, w, ids, int(e))
        return out


class UniqueLoop(HitLoop):
    def visited(self, ids: Tensor) -> Any:
        return torch.unique(ids).tolist()


class SetLoop(HitLoop):
    def visited(self, ids: Tensor) -> Any:
        return sorted(set(ids.flatten().tolist()))


class BusiestFirst(Block):
    """Experts in the order of their tokens' numbers."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in counted(ids).argsort(descending=True).tolist():
            self.add(out, x, w, ids, e)
        for e in counted(ids).sort(descending=True)[1]:
            self.add(out, x, w, ids, int(e))
        return out * 0.5


class RunningEnds(Block):
    """Sorted rows between running counts, `start == end` where there are none, an index made by repeat."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        flat, share = ids.view(-1), w.view(-1, 1)
        order = flat.argsort()
        ends, tokens, out = self.ends(flat), order // K, torch.zeros_like(x)
        for e in range(E):
            start, end = 0 if e == 0 else ends[e - 1], ends[e]
            if start == end:
                continue
            t = tokens[start:end]
            y = self.experts[e](x[t])
            y.mul_(share[order[start:end]])
            out.scatter_add_(0, t.view(-1, 1).repeat(1, H), y)
        return out

    def ends(self, flat: Tensor) -> Any:
        return flat.bincount(minlength=E).cpu().numpy().cumsum(0)


class RunningTensors(RunningEnds):
    def ends(self, flat: Tensor) -> Any:
        return flat.bincount(minlength=E).cumsum(0)


class CastsItsRouter(HitLoop):
    """To the dtype that it has."""

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        self.gate = self.gate.to(torch.float32)
        return super().route(x_TH)


class CastsToAnother(CastsItsRouter):
    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        self.gate = self.gate.to(torch.float64 if self.gate.weight.dtype is torch.float32 else torch.float32)
        w, ids = torch.topk(self.gate(x_TH.to(self.gate.weight.dtype)).softmax(-1), K, dim=-1)
        return w.to(x_TH.dtype), ids


class AnyMask(Block):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            if (ids == e).any():
                self.add(out, x, w, ids, e)
        return out


class Counter(Block):
    """Counts tokens in a buffer, under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        with torch.no_grad():
            self.seen.add_(F.one_hot(ids, E).sum((0, 1)))
        out = torch.zeros_like(x)
        for e in range(E):
            t, _ = torch.where(ids == e)
            if len(t.shape) == 1 and t.numel() == 0:
                continue
            self.add(out, x, w, ids, e)
        return out


class SkipSmall(Block):
    """Experts with fewer than 3 tokens are skipped."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            t, _ = torch.where(ids == e)
            if t.numel() < 3:
                continue
            self.add(out, x, w, ids, e)
        return out


class SkipSmallHits(Block):
    """The same, by a list of the experts with more tokens."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in (F.one_hot(ids, E).sum((0, 1)) > 2).nonzero().flatten():
            self.add(out, x, w, ids, int(e))
        return out


class SkipSmallTensor(Block):
    """The same, by the truth of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            if ((ids == e).sum() - 2).clamp(min=0) == 0:
                continue
            self.add(out, x, w, ids, e)
        return out


class PythonCapacity(Block):
    """Experts with more than 30 tokens drop the rest."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            if t.numel() > 30:
                t, k = t[:30], k[:30]
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, k, None])
        return out


class PositionAmongHits(Block):
    """The position in the list of the experts that are hit is taken for the expert."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for n, e in enumerate(torch.unique(ids).tolist()):
            self.add(out, x, w, ids, e, expert=n)
        return out


class RunningPosition(Block):
    """The same, counted by hand."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out, n = torch.zeros_like(x), 0
        for e in range(E):
            if not (ids == e).any():
                continue
            self.add(out, x, w, ids, e, expert=n)
            n += 1
        return out


class EmptyAdds(Block):
    """An expert without tokens adds one to everything."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            if (ids == e).any():
                self.add(out, x, w, ids, e)
            else:
                out += 1
        return out


class HitElsewhere(Block):
    """The list of hit experts is that of another routing."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        others = self.other_gate(x).topk(1, dim=-1)[1]
        out = torch.zeros_like(x)
        for e in hits(others):
            self.add(out, x, w, ids, int(e))
        return out


class AllButLastHit(Block):
    """The last expert that is hit is left out."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in hits(ids)[:-1]:
            self.add(out, x, w, ids, int(e))
        return out


class StopsAtGap(Block):
    """The first expert without tokens ends the loop."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            if not (ids == e).any():
                break
            self.add(out, x, w, ids, e)
        return out


class ByValue(Block):
    """A number of the activations decides."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in hits(ids):
            if w.sum() > 0:
                self.add(out, x, w, ids, int(e))
        return out


class Remembers(Block):
    """Leaves a Python number behind in the module."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        self.calls += 1
        out = torch.zeros_like(x)
        for e in hits(ids):
            self.add(out, x, w, ids, int(e))
        return out


class ByLength(Block):
    """Long inputs are computed otherwise: a recording is for one of the two."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in hits(ids):
            self.add(out, x, w, ids, int(e))
        return out * 2 if x.shape[0] > 20 else out


def counted(ids: Tensor) -> Tensor:
    return F.one_hot(ids, E).sum((0, 1))


class Asks(Block):
    """A plain loop over the experts that are hit, and after it one question; `changed` is what the answer is for."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in hits(ids):
            self.add(out, x, w, ids, int(e))
        return self.changed(out, x, w, ids)

    def changed(self, out: Tensor, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


class SomeEmpty(Asks):
    """Is any expert without tokens?  Zero and not zero stand the other way round."""

    def changed(self, out, x, w, ids):
        return out + 1 if (counted(ids) == 0).any() else out


class AllHit(Asks):
    def changed(self, out, x, w, ids):
        return out * 2 if (counted(ids) > 0).all() else out


class OneCount(Asks):
    """Has some expert exactly three tokens?"""

    def changed(self, out, x, w, ids):
        return out * 2 if (counted(ids) == 3).any() else out


class LargestCount(Asks):
    def changed(self, out, x, w, ids):
        return out * 2 if counted(ids).numpy().max() > 4 else out


class HitsCounted(Asks):
    def changed(self, out, x, w, ids):
        return out / hits(ids).shape[0]


class SetCounted(Asks):
    def changed(self, out, x, w, ids):
        return out / len(set(ids.flatten().tolist()))


class RankOfBusiest(Asks):
    """The busiest expert's number is added."""

    def changed(self, out, x, w, ids):
        return out + counted(ids).argsort(descending=True).tolist()[0]


class HitsListed(Asks):
    def changed(self, out, x, w, ids):
        return out / len(torch.unique(ids).tolist())


class LastAlwaysHit(Asks):
    """The router prefers the last expert so much that only another router would leave it without tokens."""

    def route(self, x_TH):
        scores = self.gate(x_TH) + 50.0 * (torch.arange(E) == E - 1)
        w, ids = torch.topk(scores.softmax(-1), K, dim=-1)
        return w, ids

    def changed(self, out, x, w, ids):
        return out if (ids == E - 1).any() else out + 1


class BetweenLimits(Asks):
    """Another rule for numbers of tokens between two limits."""

    def changed(self, out, x, w, ids):
        t, _ = torch.where(ids == 0)
        return out * 2 if t.numel() > 3 and not t.numel() > 8 else out


class LargeLimit(Asks):
    """A limit that no check reaches."""

    def changed(self, out, x, w, ids):
        t, _ = torch.where(ids == 0)
        return out * 2 if t.numel() > 1000 else out


class Dice(Asks):
    def changed(self, out, x, w, ids):
        return out * 2 if random.random() < 0.5 else out


class DiceOfTorch(Asks):
    def changed(self, out, x, w, ids):
        return out * 2 if torch.rand(1).item() < 0.5 else out


class AsksForGradients(Asks):
    def changed(self, out, x, w, ids):
        return out * 2 if x.requires_grad else out


class KeepsAList(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.seen_shapes: list[int] = []

    def changed(self, out, x, w, ids):
        self.seen_shapes.append(1)
        return out


class WritesParameters(Asks):
    def changed(self, out, x, w, ids):
        with torch.no_grad():
            self.gate.bias.mul_(0.5)
        return out


class CountsInABuffer(Asks):
    """What a buffer counted before decides."""

    def changed(self, out, x, w, ids):
        return out * 2 if self.seen.sum() > 10 else out


class Configured(Asks):
    """What it does is written in an object that it holds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(inner={"how": how})

    def changed(self, out, x, w, ids):
        return out * 2 if self.config.inner["how"] == "odd" and w.sum() > 0 else out


class AsksForGradMode(Asks):
    def changed(self, out, x, w, ids):
        return out if torch.is_grad_enabled() else out * 2


class AsksForTraining(Asks):
    def changed(self, out, x, w, ids):
        return out * 2 if self.training else out


class CallsAFunction(Asks):
    """A function and a constant of the file, both to be replaced later."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.tanh

    def changed(self, out, x, w, ids):
        return self.last(out) * FACTOR


class Jitter(Asks):
    """Random numbers in training mode, of torch's own generator."""

    def route(self, x_TH):
        if self.training:
            x_TH = x_TH * torch.empty_like(x_TH).uniform_(0.9, 1.1)
        return super().route(x_TH)

    def changed(self, out, x, w, ids):
        return F.dropout(out, 0.3, self.training)


class Tuple(Asks):
    """Takes more than the tokens, and returns more than the sum."""

    def forward(self, x, scale: float = 1.0, *, residual=None):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in hits(ids):
            self.add(out, x, w, ids, int(e))
        out = out * scale if residual is None else out * scale + residual
        return out, {"ids": ids, "weights": w}


class DropoutInside(HitLoop):
    """As experts have it in training: which number is drawn for which row depends on the order of rows."""

    def add(self, out_TH, x_TH, w_TK, ids_TK, e, expert=None):
        t, k = torch.where(ids_TK == e)
        out_TH.index_add_(0, t, F.dropout(self.experts[e](x_TH[t]), 0.3) * w_TK[t, k, None])


FACTOR = 1.0

REWRITTEN = {
    "without_gradients": WithoutGradients, "hit_loop": HitLoop, "unique_loop": UniqueLoop, "any_mask": AnyMask, "counter": Counter,
    "casts_its_router": CastsItsRouter, "set_loop": SetLoop, "busiest_first": BusiestFirst, "running_ends": RunningEnds,
    "running_tensors": RunningTensors,
}  # fmt: skip
OTHERS = {
    "by_length": ByLength,
    "python_capacity": PythonCapacity,
    "grad_mode": AsksForGradMode,
    "training": AsksForTraining,
    "function": CallsAFunction,
    "jitter": Jitter,
    "hits_counted": HitsCounted,
    "set_counted": SetCounted,
    "rank_of_busiest": RankOfBusiest,
    "tuple": Tuple,
}

# name -> a part of the reason why it is left as it is
_BLOCKS = {
    "skip_small": (SkipSmall, "for some routing"),
    "skip_small_hits": (SkipSmallHits, "a loop over rows whose number only the data tells"),
    "skip_small_tensor": (SkipSmallTensor, "Python decides by a tensor's contents"),
    "position_among_hits": (PositionAmongHits, "for some routing"),
    "running_position": (RunningPosition, "for some routing"),
    "empty_adds": (EmptyAdds, "for some routing"),
    "hit_elsewhere": (HitElsewhere, "for some routing"),
    "all_but_last_hit": (AllButLastHit, "for some routing"),
    "stops_at_gap": (StopsAtGap, "for some routing"),
    "by_value": (ByValue, "Python decides by a tensor's contents"),
    "casts_to_another": (CastsToAnother, "the forward casts a module"),
    "remembers": (Remembers, "leaves something behind in calls"),
    "some_empty": (SomeEmpty, "Python decides by a tensor's contents"),
    "all_hit": (AllHit, "Python decides by a tensor's contents"),
    "one_count": (OneCount, "Python decides by a tensor's contents"),
    "largest_count": (LargestCount, "Python decides by a number that only the data tells"),
    "hits_listed": (HitsListed, "for some routing"),
    "last_always_hit": (LastAlwaysHit, "for some routing"),
    "between_limits": (BetweenLimits, "for some routing"),
    "large_limit": (LargeLimit, "Python decides by a number that only the data tells"),
    "dropout_inside": (DropoutInside, "dropout within the experts, in training"),
    "dice": (Dice, "leaves something behind in Python's random numbers"),
    "dice_of_torch": (DiceOfTorch, "Python decides by a number that only the data tells"),
    "asks_for_gradients": (AsksForGradients, "Python asks for requires_grad"),
    "keeps_a_list": (KeepsAList, "leaves something behind in seen_shapes"),
    "writes_parameters": (WritesParameters, "writes to its parameter gate.bias"),
    "counts_in_a_buffer": (CountsInABuffer, "Python decides by a tensor's contents"),
}
TRAPS = {name: reason for name, (_, reason) in _BLOCKS.items()}


def build(name: str, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    blocks = {**REWRITTEN, **OTHERS, **{n: cls for n, (cls, _) in _BLOCKS.items()}}
    module: Block = blocks[name]()
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module.eval()
