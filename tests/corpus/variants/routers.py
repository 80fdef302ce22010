"""One plain masked loop, many ways to route."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.variants.base import E, H, K, ListBlock, SwiGLU, variant


class _Loop(ListBlock):
    """The loop all routers here feed; subclasses override `route`."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, expert(x[tok]) * w[tok, slot, None])
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        return self.loop(x, w.to(x.dtype), ids).view_as(hidden)


@variant("route_sort_descending", "sort(descending=True), the first K columns")
class SortDescending(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p, ids = F.softmax(self.gate(x), dim=-1).sort(dim=-1, descending=True)
        return p[:, :K], ids[:, :K]


@variant("route_argsort_gather", "argsort(descending=True)[:, :K], weights by gather")
class ArgsortGather(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = F.softmax(self.gate(x), dim=-1)
        ids = torch.argsort(p, dim=-1, descending=True)[..., :K]
        return torch.gather(p, -1, ids), ids


@variant("route_topk_transposed", "logits [E, T], top-k over dim 0, transposed back")
class TopkTransposed(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate.weight @ x.t()
        w, ids = torch.topk(logits.softmax(0), K, dim=0)
        return w.t(), ids.t()


@variant("route_div_in_place", "weights.div_(weights.sum(...)) after a float32 softmax")
class DivInPlace(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.softmax(self.gate(x), dim=-1, dtype=torch.float32).topk(K, dim=-1)
        w.div_(w.sum(dim=-1, keepdim=True))
        return w, ids


@variant("route_softmax_over_selected", "top-k of logits, softmax over the K of them")
class SoftmaxSelected(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, ids = torch.topk(self.gate(x), K, dim=-1)
        return torch.softmax(v, dim=-1), ids


@variant("route_sigmoid_plain", "sigmoid scores, not renormalised")
class SigmoidPlain(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).sigmoid().topk(K, dim=-1)


@variant("route_sigmoid_bias_choice", "sigmoid + bias for the choice, unbiased weights, eps, scale")
class SigmoidBias(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.linspace(-0.3, 0.3, E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(self.gate(x))
        ids = torch.topk(scores + self.bias, K, dim=-1, sorted=False).indices
        w = scores.gather(1, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 1.5, ids


@variant("route_biased_weights", "the same, but the weights are taken from the biased scores")
class BiasedWeights(SigmoidBias):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(torch.sigmoid(self.gate(x)) + self.bias, K, dim=-1)
        return w / w.sum(-1, keepdim=True).clamp(min=1e-6), ids


@variant("route_raw_logits", "the logits themselves weigh")
class RawLogits(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.gate(x).topk(K)
        return w, ids


@variant("route_l1_of_relu", "relu scores normalised to sum 1 over all experts")
class ReluScores(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(F.relu(self.gate(x)) + 1e-3, p=1.0, dim=-1).topk(K, dim=-1)


@variant("route_two_argmax", "argmax, mask it, argmax again")
class TwoArgmax(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)
        first = p.argmax(-1, keepdim=True)
        second = p.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)
        ids = torch.cat([first, second], dim=-1)
        w = p.gather(-1, ids)
        return w / w.sum(-1, keepdim=True), ids


@variant("route_softcap", "tanh-softcapped logits, exp(log_softmax)")
class Softcap(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = 5.0 * torch.tanh(self.gate(x) / 5.0)
        return F.log_softmax(logits, dim=-1).exp().topk(K, dim=-1)


@variant("route_cosine", "cosine similarity with a learned temperature")
class Cosine(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.normalize(x, dim=-1) @ F.normalize(self.gate.weight, dim=-1).t() * self.temperature.exp()
        return logits.softmax(dim=-1).topk(K, dim=-1)


@variant("route_mlp", "a two-layer router with a bias")
class RouterMLP(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(H, 8), nn.Tanh(), nn.Linear(8, E))


@variant("route_scale_per_expert", "weights times a learned scale of the chosen expert")
class ScalePerExpert(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(x)
        return w * self.scale[ids], ids


@variant("route_groups_max", "device-limited routing: the best group by its maximum, the others zeroed")
class GroupsMax(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, 6, bias=False)
        self.experts.extend(SwiGLU() for _ in range(6 - E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)
        groups = p.view(-1, 3, 2).amax(-1)
        best = groups.topk(2, dim=-1, sorted=False)[1]
        keep = torch.zeros_like(groups).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 3, 2).reshape(-1, 6)
        return p.masked_fill(keep == 0, 0.0).topk(K, dim=-1, sorted=False)


@variant("route_all_experts", "K equals E")
class AllExperts(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).softmax(-1).topk(E, dim=-1)


@variant("route_top1_keepdim", "K = 1 through topk")
class Top1(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).softmax(-1).topk(1, dim=-1)


@variant("route_aux_loss", "returns (out, load-balancing loss); counts tokens in a buffer")
class AuxLoss(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(E))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = hidden.view(-1, H)
        logits = self.gate(x)
        w, ids = self.route(x)
        hot = F.one_hot(ids, E).float()
        with torch.no_grad():
            self.tokens_per_expert += hot.sum((0, 1))
        loss = E * (hot.mean((0, 1)) * logits.softmax(-1).mean(0)).sum() + 1e-3 * logits.logsumexp(-1).square().mean()
        return self.loop(x, w, ids).view_as(hidden), loss


@variant("route_jitter_in_training", "multiplicative noise on the input in training only")
class Jitter(_Loop):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            x = x * torch.empty_like(x).uniform_(0.99, 1.01)
        return super().route(x)
