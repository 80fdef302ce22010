"""Mixtures of precisions: what is rounded where is part of the meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.variants.base import H, K, StackedBlock, variant
from corpus.variants.routers import _Loop


class _Float32Router(_Loop):
    """Router in float32, experts in the model's dtype."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), self.gate.weight.float())
        w, ids = logits.softmax(-1).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), ids


variant("bf16_float32_router", "bf16 experts, router in float32", dtype=torch.bfloat16)(_Float32Router)
variant("fp16_float32_router", "fp16 experts, router in float32", dtype=torch.float16)(_Float32Router)
variant("bf16_throughout", "everything in bf16", dtype=torch.bfloat16)(_Loop)
variant("fp64_throughout", "everything in float64", dtype=torch.float64)(_Loop)


@variant(
    "bf16_float32_accumulator",
    "bf16 experts, sum over slots in float32, cast at the end",
    dtype=torch.bfloat16,
)
class Float32Accumulator(_Float32Router):
    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = torch.zeros_like(x, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, expert(x[tok]) * w[tok, slot, None])
        return out.to(x.dtype).view_as(hidden)


@variant("bf16_experts_in_float32_model", "float32 parameters cast to bf16 at each use")
class CastAtUse(StackedBlock):
    def expert(self, e: int, x: Tensor) -> Tensor:
        x, w1, w3, w2 = (t.bfloat16() for t in (x, self.w1[e], self.w3[e], self.w2[e]))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2).float()

    def oracle(self, hidden: Tensor) -> Tensor:
        return self.reference(hidden).double()

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.w1.shape[0]):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(e, x[tok]) * w[tok, slot, None])
        return out.view_as(hidden)


@variant("bf16_float32_activation", "bf16 matmuls, the activation in float32", dtype=torch.bfloat16)
class Float32Activation(_Float32Router):
    def loop(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, m in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            gate, up = m.gate_proj(x[tok]).float(), m.up_proj(x[tok]).float()
            y = m.down_proj((F.silu(gate) * up).to(x.dtype))
            out.index_add_(0, tok, y * w[tok, slot, None])
        return out


@variant("autocast_inside", "the experts under torch.autocast(bfloat16), the router outside")
class AutocastInside(_Loop):
    def oracle(self, hidden: Tensor) -> Tensor:
        return self.reference(hidden).double()

    def reference(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        rows = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for t, row in enumerate(ids.tolist()):
                rows.append(sum(w[t, k] * self.experts[e](x[t]) for k, e in enumerate(row)))
        return torch.stack(rows).view_as(hidden)

    def loop(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                tok, slot = torch.where(ids == e)
                out.index_add_(0, tok, (expert(x[tok]) * w[tok, slot, None]).to(out.dtype))
            return out
