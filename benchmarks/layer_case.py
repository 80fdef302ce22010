"""One MoE layer to measure: its weights (quantised ones too), inputs with routing, what is right for them in float32, and the floor of its
time."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ep_layer import Shape, swiglu

from moe_compile.ops.quantized import ROWS_TOO, Quantized, dequantize, dequantize_expert, odd_inputs, quantize_weights

SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
    "gptoss": Shape(2880, 2880, 128, 4),  # with a plain SwiGLU
    "dsv3": Shape(7168, 2048, 256, 8),
    "tiny": Shape(64, 32, 8, 2),
    "small": Shape(256, 128, 8, 2),  # whole groups of 128 columns
}
ROUTINGS = ("uniform", "zipf")
KINDS = {"fp8": "fp8_block", "mxfp4": "mxfp4", "int8": "int8", "int4": "int4"}  # --quant: a kind of moe_compile's ops/quantized.py
CHECKED_TOKENS = 64  # held against float32, where there are more
CHECKED_EXPERTS = 2  # whose weights' gradients are
CHUNK = 1 << 26  # elements that are drawn in float32 at once


class Case(NamedTuple):
    """What is measured: a layer's shape, a number of tokens, a routing, forward alone or with backward."""

    name: str
    shape: Shape
    tokens: int
    routing: str
    train: bool


class Layer:
    """Weights as transformers stacks them: w13 [E, 2I, H] with gate rows before up rows, w2 [E, H, I]; or both quantised to a kind.

    `once` keeps what peers make of them.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, train: bool, kind: str = "") -> None:
        self.shape, self.dtype, self.device, self.train, self.kind = shape, dtype, device, train, kind
        self._kept: dict[str, Any] = {}
        generator = torch.Generator(device).manual_seed(0)
        sizes = ((shape.experts, 2 * shape.inter, shape.hidden), (shape.experts, shape.hidden, shape.inter))
        if kind:
            self.quantized = [self._quantized(generator, *each) for each in sizes]
        else:
            self.w13, self.w2 = (self._normal(generator, *each).requires_grad_(train) for each in sizes)

    def _normal(self, generator: torch.Generator, *sizes: int) -> Any:
        """Drawn in the device's dtype piece by piece, so that float32 is never there as a whole."""
        weight = torch.empty(sizes, dtype=self.dtype, device=self.device)
        flat = weight.view(-1)
        for first in range(0, flat.numel(), CHUNK):
            part = flat[first : first + CHUNK]
            part.copy_(torch.randn(part.numel(), device=self.device, generator=generator) * sizes[-1] ** -0.5)
        return weight

    def _quantized(self, generator: torch.Generator, *sizes: int) -> Quantized:
        odd = odd_inputs(self.kind, sizes[-1])
        if odd is not None:
            raise SystemExit(f"{odd}; take another --quant or other --shapes")
        return quantize_weights(self._normal(generator, *sizes), self.kind)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @property
    def params(self) -> list[Any]:
        """As the ops take them: w13, w2, or values and scales of each."""
        return [tensor for each in self.quantized for tensor in each[:2]] if self.kind else [self.w13, self.w2]

    @property
    def layout(self) -> str:
        return f"eoi:{self.kind},eoi:{self.kind}" if self.kind else "eoi,eoi"

    @property
    def quantises_rows(self) -> bool:
        return self.kind in ROWS_TOO

    @property
    def expert_bytes(self) -> float:
        """Of one expert's weights, scales included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.params) / self.shape.experts

    def expert(self, e: int) -> list[Any]:
        """w13 and w2 of an expert in float32, without gradient."""
        if self.kind:
            return [dequantize_expert(each, e) for each in self.quantized]
        return [self.w13[e].detach().float(), self.w2[e].detach().float()]

    def dense(self) -> list[Any]:
        """w13 and w2; of quantised ones a copy in the rows' dtype."""
        if self.kind:
            return list(self.once("dense", lambda: [dequantize(each, self.dtype) for each in self.quantized]))
        return [self.w13, self.w2]

    def interleaved(self) -> Any:
        """A copy of w13 whose rows are gate 0, up 0, gate 1, up 1, ..., for peers that want it so."""
        return self.once("interleaved", lambda: interleave(self.w13.detach()).requires_grad_(self.train))


def interleave(w13: Any) -> Any:
    """[E, 2I, ...]"""
    gate, up = w13.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).view(w13.shape)


def uninterleave(w13: Any) -> Any:
    return torch.cat((w13[:, ::2], w13[:, 1::2]), dim=1)


# ---------------------------------------------------------------- inputs
class Inputs(NamedTuple):
    """x [T, H], ids int64 [T, K], weights float32 [T, K], the output's gradient [T, H] in training."""

    x: Any
    ids: Any
    weights: Any
    grad: Any = None


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (case.tokens, case.shape.hidden)
    x = torch.randn(sizes, device=device, generator=generator).to(dtype)
    ids = routing(case, device, generator)
    weights = torch.rand(ids.shape, device=device, generator=generator) + 0.1
    weights /= weights.sum(-1, keepdim=True)
    grad = torch.randn(sizes, device=device, generator=generator).to(dtype) if case.train else None
    return Inputs(x, ids, weights, grad)


def routing(case: Case, device: torch.device, generator: torch.Generator) -> Any:
    """ids: top-k draws without putting back; expert e with equal odds, or with odds 1/rank in an order drawn before (zipf)."""
    experts = case.shape.experts
    noise = torch.rand((case.tokens, experts), device=device, generator=generator).clamp_(1e-12, 1 - 1e-7)
    scores = -torch.log(-torch.log(noise))
    if case.routing == "zipf":
        rank = torch.randperm(experts, device=device, generator=generator) + 1
        scores -= torch.log(rank.to(scores.dtype))
    return scores.topk(case.shape.top_k, dim=-1).indices


# ---------------------------------------------------------------- what is right
class Reference:
    """The layer in float32 for some tokens; in training also the gradients of x and weights there, and of some experts' weights."""

    def __init__(self, layer: Layer, inputs: Inputs, seed: int) -> None:
        tokens, train = inputs.x.shape[0], inputs.grad is not None
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randperm(tokens, generator=generator)[:CHECKED_TOKENS].sort().values.to(inputs.x.device)
        x = inputs.x[self.rows].float().requires_grad_(train)
        weights = inputs.weights[self.rows].requires_grad_(train)
        with torch.set_grad_enabled(train):
            out = self._forward(layer, x, inputs.ids[self.rows], weights)
        self.out = out.detach()
        if train:
            self.dx, self.dweights = torch.autograd.grad(out, [x, weights], inputs.grad[self.rows].float())
            self.experts = _some_experts(inputs.ids)
            self.dw = [self._weight_gradients(layer, inputs, e) for e in self.experts]

    def _forward(self, layer: Layer, x: Any, ids: Any, weights: Any) -> Any:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            w13, w2 = layer.expert(e)
            out = out.index_add(0, token, F.linear(swiglu(F.linear(x[token], w13)), w2) * weights[token, slot, None])
        return out

    def _weight_gradients(self, layer: Layer, inputs: Inputs, e: int) -> tuple[Any, Any]:
        token, slot = torch.where(inputs.ids == e)
        w13, w2 = (w.requires_grad_() for w in layer.expert(e))
        with torch.enable_grad():
            y = F.linear(swiglu(F.linear(inputs.x[token].float(), w13)), w2) * inputs.weights[token, slot, None]
        found: tuple[Any, Any] = torch.autograd.grad(y, [w13, w2], inputs.grad[token].float())
        return found

    def errors(self, out: Any, gradients: list[Any] | None = None) -> list[float]:
        """Relative errors: of the worst row of out, and of each gradient (x, w13, w2, weights) as a whole; infinity where not finite."""
        found = [row_error(out[self.rows], self.out)] if bool(torch.isfinite(out).all()) else [float("inf")]
        if gradients is None:
            return found
        dx, dw13, dw2, dweights = gradients
        found += [relative(dx[self.rows], self.dx), relative(dweights[self.rows], self.dweights)]
        for e, (right13, right2) in zip(self.experts, self.dw):
            found += [relative(dw13[e], right13), relative(dw2[e], right2)]
        return found


def _some_experts(ids: Any) -> list[int]:
    """Those with the most and the fewest rows, of those hit."""
    hit, counts = ids.unique(return_counts=True)
    order = hit[counts.argsort(descending=True)].tolist()
    return order[:1] + order[-1:] if CHECKED_EXPERTS > 1 and len(order) > 1 else order[:1]


def row_error(got: Any, want: Any) -> float:
    """The largest relative error of a row (2-norm); infinity for NaN."""
    off = (got.float() - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-6)
    return float(torch.nan_to_num(off, nan=float("inf")).max())


def relative(got: Any, want: Any) -> float:
    off = (got.detach().float() - want).norm() / want.norm().clamp(min=1e-9)
    return float(torch.nan_to_num(off, nan=float("inf")))


# ---------------------------------------------------------------- the floor
@dataclasses.dataclass(frozen=True)
class Rates:
    """What this device reaches: of a large matrix product, of a large copy (bytes read and written)."""

    flops: float
    bytes: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device, e4m3: bool = False) -> Rates:
        """e4m3: the product is one of e4m3 with a scale a tensor."""
        if device.type != "cuda":
            return cls(1e11, 1e10)  # no claim: a CPU's run only shows that the script works
        a, b = (torch.randn((8192, 8192), device=device).to(dtype) for _ in range(2))
        source = torch.empty(1 << 31, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        product, copy = _times([_scaled_product(a, b) if e4m3 else lambda: a @ b, lambda: target.copy_(source)])
        return cls(2 * 8192**3 / product, 2 * source.numel() / copy)


def _scaled_product(a: Any, b: Any) -> Callable[[], Any]:
    a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _times(calls: list[Callable[[], Any]], repeats: int = 10) -> list[float]:
    """Seconds of each call on a CUDA device, medians."""
    samples: list[list[float]] = []
    for at in range(repeats + 3):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        for call, (begin, end) in zip(calls, events):
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        if at >= 3:
            samples.append([begin.elapsed_time(end) * 1e-3 for begin, end in events])
    return [statistics.median(column) for column in zip(*samples)]


@dataclasses.dataclass(frozen=True)
class Work:
    """The operations and the fewest bytes of a case: weights of the experts hit, and activations in and out, each once."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, case: Case, sets: list[Inputs], layer: Layer) -> Work:
        shape, itemsize = case.shape, layer.dtype.itemsize
        expert = 3 * shape.hidden * shape.inter
        hit = sum(len(each.ids.unique()) for each in sets) / len(sets)
        rows = case.tokens * shape.hidden * itemsize
        flops, weights, activations = 2.0 * expert * case.tokens * shape.top_k, hit * layer.expert_bytes, 2.0 * rows
        if case.train:  # weights are read twice, and every expert's gradient is written
            return cls(3 * flops, 2 * weights + shape.experts * expert * itemsize + 2 * activations)
        return cls(flops, weights + activations)

    def floor(self, rates: Rates) -> float:
        """Microseconds."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes) * 1e6
