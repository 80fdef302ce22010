"""Layers of real sizes on a GPU, again and again: the same bits each time, and those of plain weights but for rounding. What is read from a
place that is just being written anew shows here, not in small layers. Memory holds other things each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import HALVES

import moe_compile.ops  # noqa: F401  registers torch.ops.moe_compile
from moe_compile.ops.quantized import KINDS, ROWS_TOO, Quantized, dequantize, quantize_weights

pytestmark = [pytest.mark.gpu, pytest.mark.replays]
EXPERTS, TOP_K, REPEATS = 32, 8, 12
SIZES = {"small": (2048, 768), "large": (4096, 3584)}
TOKENS = {"small": (1, 96, 1024, 8192), "large": (700, 4096)}


def weights_of(kind: str, hidden: int, inter: int) -> tuple[list[Any], str, list[Any]]:
    """The op's weights, their layout, what they stand for in bfloat16; kind "": bfloat16."""
    g = torch.Generator(device="cuda").manual_seed(0)
    flat: list[Any] = []
    plain: list[Any] = []
    for shape in ((EXPERTS, 2 * inter, hidden), (EXPERTS, hidden, inter)):
        weight = (torch.randn(shape, generator=g, device="cuda") * shape[-1] ** -0.5).bfloat16()
        found = list(quantize_weights(weight, kind)[:2]) if kind else [weight]
        flat += found
        plain.append(dequantize(Quantized(*found, kind), torch.bfloat16) if kind else weight)
    return flat, f"eoi:{kind},eoi:{kind}" if kind else "eoi,eoi", plain


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["", *KINDS])
def test_the_same_bits_each_time(kind: str, size: str) -> None:
    hidden, inter = SIZES[size]
    weights, layout, plain = weights_of(kind, hidden, inter)
    limit = 0.08 if kind in ROWS_TOO else 0.01  # of rows in e4m3; of weights rounded to bfloat16
    text = HALVES.format(i=inter, j=2 * inter)
    odds = 1.0 / torch.arange(1, EXPERTS + 1, device="cuda")  # some experts have many times as many rows as others
    for tokens in TOKENS[size]:
        g = torch.Generator(device="cuda").manual_seed(tokens)
        x = torch.randn((tokens, hidden), generator=g, device="cuda").bfloat16()
        ids = torch.multinomial(odds.expand(tokens, -1), TOP_K, generator=g)
        by = torch.rand((tokens, TOP_K), generator=g, device="cuda")
        args = (x, ids, EXPERTS, None, weights, [], text, layout, "", by, x.dtype, "triton")
        first = torch.ops.moe_compile.local_experts.default(*args)
        assert bool(first.isfinite().all()), tokens
        wanted = torch.ops.moe_compile.local_experts.default(*args[:4], plain, [], text, "eoi,eoi", *args[8:]).float()
        worst = float(((first.float() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
        assert worst < limit, (tokens, worst)
        for filled in range(REPEATS):
            torch.full((1 << 28,), float("nan") if filled % 2 else 1e3, device="cuda")  # memory that the next call gets
            again = torch.ops.moe_compile.local_experts.default(*args)
            differ = (again != first).any(1)
            assert not bool(differ.any()), (tokens, filled, int(differ.sum()))
