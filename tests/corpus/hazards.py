"""MoE blocks with something around or inside that a rewrite could lose: side effects, aliases, random numbers, autograd.

HAZARDS: name -> Hazard.  Each block is a plain masked loop but for the one thing its docstring names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, I, E, K, T = 12, 12, 4, 2, 12  # noqa: E741  (equal sizes on purpose)


class Block(nn.Module):
    """Masked loop over stacked parameters w1 [E, I, H], w2 [E, H, I]; subclasses change one thing."""

    differentiable = True  # whether eager's backward works

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.w1, self.w2 = nn.Parameter(torch.empty(E, I, H)), nn.Parameter(torch.empty(E, H, I))
        self.b1 = nn.Parameter(torch.empty(E, I))
        self.register_buffer("memory", torch.zeros(T, H))
        self.register_buffer("load", torch.zeros(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).softmax(-1).topk(K, dim=-1)

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1[e], self.b1[e])), self.w2[e])

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x) if out is None else out
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, (self.expert(x[tok], e) * w[tok, slot, None]).to(out.dtype))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(x, *self.route(x))


@dataclass(frozen=True)
class Hazard:
    cls: type[Block]

    @property
    def note(self) -> str:
        return str(self.cls.__doc__)

    def build(self) -> Block:
        torch.manual_seed(0)
        module = self.cls()
        for p in module.parameters():
            nn.init.normal_(p, std=0.4 if p.dim() > 1 else 0.2)
        return module.train()

    def inputs(self, seed: int) -> Tensor:
        return torch.randn(T, H, generator=torch.Generator().manual_seed(seed))


HAZARDS: dict[str, Hazard] = {}


def hazard(cls: type[Block]) -> type[Block]:
    name = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")
    HAZARDS[name] = Hazard(cls)
    return cls


# ---- in-place changes near the block


@hazard
class RowsChangedAfterTheLoop(Block):
    """The rows that the experts read are overwritten before the output's last use."""

    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.clone()
        w, ids = self.route(rows)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out = out.index_add(0, tok, self.expert(rows[tok], e) * w[tok, slot, None])
        rows.zero_()
        return out + rows


@hazard
class WeightsChangedAfterTheLoop(Block):
    """The routing weights are changed in place after the loop, and returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        w = w.detach().clone()
        out = self.loop(x, w, ids)
        w.mul_(3)
        return out, w


@hazard
class WeightsChangedInTheMiddle(Block):
    """The routing weights are doubled in place after expert 1."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        w, out = w.detach().clone(), torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
            if e == 1:
                w.mul_(2)
        return out


@hazard
class IdsChangedAfterTheLoop(Block):
    """The ids are overwritten after the loop, and returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        ids = ids.clone()
        out = self.loop(x, w, ids)
        ids.fill_(1)
        return out, out * ids.float().mean()


@hazard
class IdsChangedInTheMiddle(Block):
    """After expert 1 the ids move on by one."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        ids, out = ids.clone(), torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
            if e == 1:
                ids.add_(1).remainder_(E)
        return out


@hazard
class OutputChangedThroughView(Block):
    """A view of the accumulator, taken before the loop, is doubled after it."""

    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        half = out[: T // 2]
        self.loop(x, w, ids, out)
        half.mul_(2)
        return out


@hazard
class PartialSumsKept(Block):
    """The accumulator after expert 1 is returned as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        out, kept = torch.zeros_like(x), x
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out = out.index_add(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
            kept = out if e == 1 else kept
        return out, kept


@hazard
class ExpertOutputKept(Block):
    """What expert 2 gave is returned as well: a result of data-dependent shape."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        out, kept = torch.zeros_like(x), x
        for e in range(E):
            tok, slot = torch.where(ids == e)
            y = self.expert(x[tok], e)
            out.index_add_(0, tok, y * w[tok, slot, None])
            kept = y if e == 2 else kept
        return out, kept.sum(0)


@hazard
class InPlaceResidual(Block):
    """x is added to the output in place, then the output is scaled in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).add_(x).mul_(0.5)


class _OnTheFirst(Block):
    """Every expert is computed for every token; the first one's product is what the others are added to."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        w, ids = self.route(x)
        out = kept = x
        for e in range(E):
            y = self.expert(x, e).mul_((w * (ids == e)).sum(-1, keepdim=True))
            if e == 0:
                out, kept = y, self.kept(y)
            else:
                out.add_(y)
        return out * 1.0, kept * 2

    def kept(self, y: Tensor) -> Tensor:
        return y.new_zeros(3)


@hazard
class AddedToTheFirst(_OnTheFirst):
    """The accumulator is what the first expert gave."""


@hazard
class FirstIsKept(_OnTheFirst):
    """That is kept before the others are added."""

    def kept(self, y: Tensor) -> Tensor:
        return y.clone()


@hazard
class FirstHasAView(_OnTheFirst):
    """A view of it is returned: it shows the sum."""

    def kept(self, y: Tensor) -> Tensor:
        return y[:3]


# ---- side effects


@hazard
class AccumulatesInBuffer(Block):
    """The sum is accumulated in a buffer, which keeps it from call to call."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        with torch.no_grad():
            self.loop(x, w, ids, self.memory)
        return self.memory * x


@hazard
class CountsTokensInTheLoop(Block):
    """The loop counts each expert's rows in a buffer."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            with torch.no_grad():
                self.load[e] += tok.numel()
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out


@hazard
class RemembersOutput(Block):
    """The block's output is copied into a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        with torch.no_grad():
            self.memory.copy_(out)
        return out


@hazard
class ChangesItsInput(Block):
    """The caller's tensor is changed after the routing, before the experts read it."""

    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        with torch.no_grad():
            x.mul_(1.5)
        return self.loop(x, w, ids)


# ---- random numbers


@hazard
class DropoutInExpert(Block):
    """Dropout inside the experts, in training."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.dropout(F.silu(F.linear(x, self.w1[e], self.b1[e])), 0.5, self.training), self.w2[e])


@hazard
class DropoutOnWeights(Block):
    """Dropout on the routing weights, in training."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return F.dropout(w, 0.3, self.training), ids


@hazard
class NoiseOnLogits(Block):
    """Gaussian noise on the logits, in training."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        return (logits + torch.randn_like(logits)).softmax(-1).topk(K, dim=-1)


# ---- parameters


@hazard
class TiedMatrices(Block):
    """The down projection is the transposed up projection: one parameter, two gradients."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1[e], self.b1[e])), self.w1[e].t())


@hazard
class ComputedWeights(Block):
    """The matrices are computed from the parameters (weight norm, by hand)."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        v = self.w1[e] / self.w1[e].norm(dim=-1, keepdim=True)
        return F.linear(F.silu(F.linear(x, v, self.b1[e])), self.w2[e])


@hazard
class SharedScale(Block):
    """Every matrix is scaled by one learned number."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1[e] * self.b1[0, 0], self.b1[e])), self.w2[e])


@hazard
class GatherAndLoopMixed(Block):
    """Two routings over one pool of parameters, one as a loop, one by gathered weights."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        p, i = self.gate(-x).softmax(-1).max(-1)
        h = F.silu(torch.einsum("th,tih->ti", x, self.w1[i]) + self.b1[i])
        return out + torch.einsum("ti,thi->th", h, self.w2[i]) * p[:, None]


@hazard
class FrozenExperts(Block):
    """The parameters of the experts need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w1.requires_grad_(False)
        self.w2.requires_grad_(False)


@hazard
class FrozenRouter(Block):
    """The router needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate.requires_grad_(False)


# ---- autograd


@hazard
class NoGradRouter(Block):
    """The router under no_grad."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return super().route(x)


@hazard
class NoGradBlock(Block):
    """The whole block under no_grad, a trainable residual around it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = super().forward(x)
        return out + self.gate(x).sum() * x


@hazard
class StraightThrough(Block):
    """The output's value with the gradient of something else."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return x * 2 + (out - x * 2).detach()


@hazard
class GradientScaledInside(Block):
    """Half of each expert's output is detached."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        y = super().expert(x, e)
        return 0.5 * y + (0.5 * y).detach()


@hazard
class RouterSeesDetachedInput(Block):
    """The router reads x.detach(), the experts x."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().route(x.detach())


# ---- shapes and kinds


@hazard
class OneExpert(Block):
    """E = K = 1: every dimension of size one may be mistaken for another."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)[:, :1]
        return p.topk(1, dim=-1)


@hazard
class Int32Ids(Block):
    """The ids pass through int32 and back."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return w, ids.to(torch.int32)


@hazard
class FloatIds(Block):
    """The ids pass through float32 and are compared as floats."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return w, ids.float()


@hazard
class IdsClamped(Block):
    """The ids are clamped below E - 1: the last expert's tokens go to the one before."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return w, ids.clamp(max=E - 2)


@hazard
class IdsLookedUp(Block):
    """A table maps the routed ids to experts, two of them to the same one."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return w, torch.tensor([2, 0, 0, 3])[ids]


@hazard
class GreaterEqualMask(Block):
    """Expert e takes the tokens whose id is at least e."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids >= e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out


@hazard
class NotEqualMask(Block):
    """Expert e takes the tokens whose id is not e."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids != e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out


@hazard
class SlotAndTokenSwapped(Block):
    """ids.t() is searched, and its coordinates are used as (token, slot) modulo the sizes."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            slot, tok = torch.where(ids.t() == e)
            out.index_add_(0, slot, self.expert(x[tok], e) * w[tok, slot, None])
        return out


@hazard
class WeightOfOtherExpert(Block):
    """The weight of a row is the dense score of the next expert."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        ids = p.topk(K, dim=-1)[1]
        out = torch.zeros_like(x)
        for e in range(E):
            tok, _ = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * p[tok, (e + 1) % E, None])
        return out


@hazard
class ExpertSeesOtherTokens(Block):
    """Each row gets the mean of all rows of its expert: not a function of one token."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x - x.mean(0, keepdim=True), e)


@hazard
class ExpertSeesRowNumber(Block):
    """Each row is scaled by its position among the expert's rows."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x, e) * torch.arange(x.shape[0])[:, None]


@hazard
class ExpertSeesCount(Block):
    """Each expert divides by the number of its rows."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x, e) / (x.shape[0] + 1)


@hazard
class ExpertSortsFeatures(Block):
    """A sort over the features inside the expert."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x.sort(-1)[0], e)


@hazard
class ExpertFlipsFeatures(Block):
    """The features are reversed inside the expert."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x.flip(-1), e)


@hazard
class ExpertSoftmax(Block):
    """A softmax over the features as activation."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.linear(x, self.w1[e], self.b1[e]).softmax(-1), self.w2[e])


@hazard
class ExpertOuterActivation(Block):
    """tanh of weight times output: the weight goes through the non-linearity."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, torch.tanh(self.expert(x[tok], e) * w[tok, slot, None]))
        return out


@hazard
class BothSlotsInOneRow(Block):
    """An expert reads the sum of a token's row and its weight: mixed inside."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok] + w[tok, slot, None], e))
        return out


@hazard
class ConstantsDifferByExpert(Block):
    """Every expert has its own constant in the activation."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        h = F.linear(x, self.w1[e], self.b1[e])
        return F.linear(h * torch.sigmoid(h * (1.0 + 0.1 * e)), self.w2[e])


@hazard
class TensorConstant(Block):
    """A constant of the activation is a 0-d buffer that may change between calls."""

    differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("limit", torch.tensor(0.3))

    def expert(self, x: Tensor, e: int) -> Tensor:
        h = F.linear(x, self.w1[e], self.b1[e])
        return F.linear(torch.minimum(h, self.limit), self.w2[e])

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        with torch.no_grad():
            self.limit.add_(0.2)
        return out


@hazard
class BranchOnValue(Block):
    """torch.where on the row's own value inside the expert."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        y = super().expert(x, e)
        return torch.where(x > 0, y, -y)
