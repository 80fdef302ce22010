"""What the Triton experts are tested on, in the interpreter and on GPUs: layouts, forms of products, routings, sizes."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch

from moe_compile.ops import experts, experts_combine, local_experts
from moe_compile.ops.functions import FUNCTIONS
from moe_compile.ops.kernels import configs
from moe_compile.ops.quantize_dispatch import counting_sort

HALVES = "mm(1, silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {j}, 1))"
SWAPPED_HALVES = "mm(1, silu(cols(mm(0, x), {i}, {j}, 1)) * cols(mm(0, x), 0, {i}, 1))"
PAIRS = "mm(1, clamp(cols(mm(0, x), 0, {j}, 2), None, 7.0) * sigmoid(cols(mm(0, x), 1, {j}, 2)))"
BIASED = "(mm(1, gelu(cols(mm(0, x) + b(0), 0, {j}, 2)) * (cols(mm(0, x) + b(0), 1, {j}, 2) + 1.0)) + b(1)) * w"
APART = "mm(2, silu(mm(0, x)) * mm(1, x))"
ONE = "mm(1, square(relu(mm(0, x))))"
DEEP = "mm(2, tanh(mm(1, relu(mm(0, x)))))"
SINGLE = "mm(0, x) + b(0)"
POSITIVE = "abs(mm(0, x)) + 0.5"
FUNCTION_PROGRAMS = {
    **{name: f"mm(1, {name}(mm(0, x)))" for name in FUNCTIONS},
    **{name: f"mm(1, {name}({POSITIVE}))" for name in ("sqrt", "rsqrt", "log")},
    **{op: f"mm(1, {op}(mm(0, x), tanh(mm(0, x))))" for op in ("add", "sub", "mul", "maximum", "minimum")},
    **{op: f"mm(1, where({op}(mm(0, x), 0.25), mm(0, x), 2.0) + {op}(mm(0, x), 0.0))" for op in ("lt", "le", "gt", "ge", "eq", "ne")},
    "div": f"mm(1, mm(0, x) / ({POSITIVE}))",
    "where": "mm(1, where(gt(mm(0, x), 0.0), exp(mm(0, x)), 0.5))",
    "pow": f"mm(1, pow(mm(0, x), 3) + pow(mm(0, x), 0) + pow({POSITIVE}, -2) + pow({POSITIVE}, 1.5))",
    "clamp": "mm(1, clamp(mm(0, x), -0.5, None) + clamp(mm(0, x), -1.0, 0.25))",
    "leaky_relu": "mm(1, leaky_relu(mm(0, x), 0.2))",
    "elu": "mm(1, elu(mm(0, x), 0.7))",
    "softplus": "mm(1, softplus(mm(0, x), 2.0, 1.0))",
}
WEIGHTED_ROWS = "mm(1, relu(mm(0, x * w)))"


class Sizes(NamedTuple):
    tokens: int
    top_k: int
    experts: int
    hidden: int
    inter: int


def routed(s: Sizes, routing: str, g: torch.Generator) -> torch.Tensor:
    """ids [T, K]: random, one expert for all, or random with holes and ids beyond the experts."""
    if routing == "one":
        return torch.full((s.tokens, s.top_k), s.experts // 2)
    ids = torch.stack([torch.randperm(s.experts, generator=g)[: s.top_k] for _ in range(s.tokens)]) if s.tokens else torch.empty(0, s.top_k)
    ids = ids.long()
    if routing == "holes":
        ids[torch.rand(ids.shape, generator=g) < 0.3] = -1
        ids[torch.rand(ids.shape, generator=g) < 0.1] = s.experts + 2
    return ids


def parameters(program: str, layout: str, s: Sizes, g: torch.Generator) -> tuple[list[torch.Tensor], list[torch.Tensor], str]:
    """Weights and biases that the program asks for, in the layout ("eoi", "eio", "oi*", "io*"); the whole weight layout."""
    wide = 2 * s.inter if "cols(mm(0" in program else s.inter
    up, down = (s.hidden, wide), (s.inter, s.hidden)
    fans = {SINGLE: [up], APART: [up, up, down], DEEP: [up, (s.inter, s.inter), down]}.get(program, [up, down])
    weights: list[torch.Tensor] = []
    for fan_in, fan_out in fans:
        w = torch.randn((s.experts, fan_in, fan_out), generator=g) / fan_in**0.5
        w = w if "io" in layout else w.transpose(1, 2).contiguous()
        weights.extend(w.unbind(0) if "*" in layout else [w])
    entry = layout.replace("*", f"*{s.experts}")
    biases = [s.inter] if program == SINGLE else [each for at, each in enumerate((wide, s.hidden)) if f"b({at})" in program]
    return (
        weights,
        [torch.randn((s.experts, width), generator=g) for width in biases],
        ",".join([entry] * len(fans)),
    )


def run(
    program: str, layout: str, s: Sizes, *, routing: str = "random", block: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0,
    weights_dtype: Any = None, **changes: Any,
) -> None:  # fmt: skip
    """All three ops of the provider against the loop over experts, in float64. changes: of the tiles that would be chosen."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(seed)
    weights, biases, layouts = parameters(program, layout, s, g)
    text = program.format(i=s.inter, j=2 * s.inter)
    x, w = torch.randn((s.tokens, s.hidden), generator=g).to(dtype), torch.rand((s.tokens, s.top_k), generator=g)
    weights = [each.to(weights_dtype or dtype) for each in weights]
    biases = [each.to(dtype) for each in biases]
    ids = routed(s, routing, g)
    order, offsets = counting_sort(ids, s.experts)

    def call(where: str, provider: str, wide: bool) -> tuple[Any, ...]:
        def to(t: torch.Tensor) -> torch.Tensor:
            return t.to(where, torch.float64) if wide else t.to(where)

        inner = to(w) if "w" in text.replace("where", "") else None
        args = (to(x), order.to(where), offsets.to(where), inner, [to(t) for t in weights], [to(t) for t in biases])
        texts = (text, layouts, ",".join("eo" for _ in biases), s.top_k)
        y = experts.OP.overload(*args, *texts, provider)
        out = experts_combine.OP.overload(*args, *texts, to(w), torch.float64 if wide else dtype, provider)
        if provider != "triton":
            return y.cpu().double(), out.cpu().double(), out.cpu().double()
        whole = local_experts.OP.overload(args[0], ids.to(where), s.experts, *args[3:], *texts[:3], to(w), dtype, provider)
        return y.cpu().double(), out.cpu().double(), whole.cpu().double()

    rows, tiles = configs.block_rows, configs.tiles
    with (
        mock.patch.object(configs, "block_rows", lambda shape: block or rows(shape)),
        mock.patch.object(configs, "tiles", lambda *args: configs.changed(tiles(*args), args[0], **changes)),
    ):
        got = call(device, "triton", False)
    wanted = call("cpu", "reference", True)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, a, b in zip(("experts", "sum", "all in one"), got, wanted, strict=True):
        assert a.shape == b.shape, (name, a.shape, b.shape)
        if b.numel():
            off = float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
            assert off < limit, f"{name}: {off:.1e} of {text} {layouts} {s} {routing}"


def run_backward(
    program: str, layout: str, s: Sizes, *, routing: str = "random", dtype: torch.dtype = torch.float32, seed: int = 0,
    weights_dtype: Any = None,
) -> None:  # fmt: skip
    """All gradients of the slots' rows and of their weighed sum, against the loop over experts in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(seed)
    weights, biases, layouts = parameters(program, layout, s, g)
    text = program.format(i=s.inter, j=2 * s.inter)
    reads_w = "w" in text.replace("where", "")
    given = [torch.randn((s.tokens, s.hidden), generator=g).to(dtype), torch.rand((s.tokens, s.top_k), generator=g)]
    given += [each.to(weights_dtype or dtype) for each in weights] + [each.to(dtype) for each in biases]
    ids = routed(s, routing, g)
    order, offsets = counting_sort(ids, s.experts)
    order = order[: int(offsets[-1])] if routing == "holes" else order
    width = s.hidden
    upstream = [torch.randn((s.tokens, s.top_k, width), generator=g).to(dtype), torch.randn((s.tokens, width), generator=g).to(dtype)]

    def gradients(where: str, provider: str, wide: bool, combined: bool) -> list[Any]:
        own = [each.to(where, torch.float64 if wide else each.dtype).clone().requires_grad_() for each in given]
        x, w, params = own[0], own[1], own[2:]
        inner, summed = (w, None) if reads_w else (None, w)
        args = (x, order.to(where), offsets.to(where), inner, params[: len(weights)], params[len(weights) :])
        texts = (text, layouts, ",".join("eo" for _ in biases), s.top_k)
        if combined:
            out = experts_combine.OP.overload(*args, *texts, summed, x.dtype, provider)
        else:
            out = experts.OP.overload(*args, *texts, provider)
        out.backward(upstream[combined].to(where, out.dtype))
        return [None if each.grad is None else each.grad.cpu().double() for each in own]

    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for combined in (False, True):
        got, wanted = gradients(device, "triton", False, combined), gradients("cpu", "reference", True, combined)
        for at, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert (a is None) == (b is None), at
            if b is not None and b.numel():
                off = float((a - b).norm() / b.norm().clamp(min=1e-3))
                assert off < limit, f"gradient {at}, combined {combined}: {off:.1e} of {text} {layouts} {s} {routing}"
