"""What stands around the sum over experts and must stay there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.variants.base import H, SwiGLU, variant
from corpus.variants.routers import _Loop


class _Shared(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.shared = SwiGLU(i=28)

    def around(self, hidden: Tensor, out: Tensor) -> Tensor:
        return out + self.shared(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.around(hidden, super().forward(hidden))


variant("outside_shared_expert", "routed + shared(x)")(_Shared)


@variant("outside_shared_gated", "routed + sigmoid(gate(x)) * shared(x)")
class SharedGated(_Shared):
    def __init__(self) -> None:
        super().__init__()
        self.shared_gate = nn.Linear(H, 1)

    def around(self, hidden: Tensor, out: Tensor) -> Tensor:
        return out + torch.sigmoid(self.shared_gate(hidden)) * self.shared(hidden)


@variant("outside_accumulates_on_shared", "index_add_ straight onto the shared expert's output")
class OnShared(_Shared):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = self.shared(x)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, expert(x[tok]) * w[tok, slot, None])
        return out.view_as(hidden)


@variant("outside_accumulates_on_input", "out = x.clone(): the residual is the accumulator")
class OnInput(_Loop):
    def around(self, hidden: Tensor, out: Tensor) -> Tensor:
        return hidden + out

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            out[tok] += w[tok, slot, None] * expert(x[tok])
        return out.view_as(hidden)


@variant("outside_norm_residual_scale", "pre-norm, residual, layer scale")
class NormResidual(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(H), nn.Parameter(torch.empty(H))

    def reference(self, hidden: Tensor) -> Tensor:
        return hidden + self.scale * super().reference(self.norm(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.scale * super().forward(self.norm(hidden))


@variant("outside_two_layers", "two MoE layers in a row, the second reads the first's output")
class TwoLayers(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.second = _Loop()

    def around(self, hidden: Tensor, out: Tensor) -> Tensor:
        y = hidden + out
        return y + self.second.reference(y)

    def forward(self, hidden: Tensor) -> Tensor:
        y = hidden + super().forward(hidden)
        return y + self.second(y)


@variant("outside_two_routers_one_pool", "two routings over the same experts, summed")
class TwoRouters(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(H, self.gate.out_features)

    def reference(self, hidden: Tensor) -> Tensor:
        first = super().reference(hidden)
        gate, self.gate = self.gate, self.other
        second = super().reference(hidden)
        self.gate = gate
        return first + second

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        p = F.softmax(self.other(x), dim=-1).topk(w.shape[1], dim=-1)
        v = p.values / p.values.sum(-1, keepdim=True)
        return (self.loop(x, w, ids) + self.loop(x, v, p.indices)).view_as(hidden)


@variant("outside_weights_returned", "returns (out, weights, ids): the routing has other users")
class Returned(_Loop):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        return self.loop(x, w, ids).view_as(hidden), w, ids


@variant("outside_out_dropout", "dropout on the combined output (p = 0)")
class OutDropout(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(super().forward(hidden))


@variant("outside_sequence_first", "hidden states transposed to [S, B, H] before, back after")
class SequenceFirst(_Loop):
    def forward(self, hidden: Tensor) -> Tensor:
        y = hidden.transpose(0, 1)
        x = y.reshape(-1, H)
        w, ids = self.route(x)
        return self.loop(x, w, ids).view_as(y).transpose(0, 1)


@variant("outside_checkpointed", "the block under torch.utils.checkpoint")
class Checkpointed(_Loop):
    def forward(self, hidden: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(super().forward, hidden, use_reentrant=False)
