"""Experts that the model dequantises by itself: recognised in every spelling, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import quantized_blocks as q
import torch
import torch.nn.functional as F
from blocks import Compared, calls, graph_of, rewrite
from quantized_blocks import FP4, Fp8Blocks, Int4Groups, Int8Groups, Int8Outputs, Mxfp4Short, Quantised
from torch import nn

import moe_compile
from moe_compile.report import RewriteReport


def tokens(seed: int = 0, count: int = q.T) -> torch.Tensor:
    return torch.randn(count, q.H, generator=torch.Generator().manual_seed(seed))


def layouts(gm) -> list[str]:
    """Of the weights of each rewritten block."""
    return [n.args[7] for n in gm.graph.nodes if "permute_experts_unpermute" in str(n.target)]


def kinds(layout: str) -> set[str]:
    """Of a block's weights, "" for one that is not quantised."""
    return {entry.partition(":")[2] for entry in layout.split(",")}


class Each(nn.Module):
    """Blocks one beside the other in one graph, which takes less time than a graph for each."""

    def __init__(self, blocks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for block in blocks)

    def forward(self, x):
        return [block(x) for block in self.blocks]


def named(regions, blocks) -> list[str]:
    return [f"{block.__name__}: {region.reason}" for region, block in zip(regions, blocks)]


@pytest.mark.parametrize("code", ["int8", "fp8", "int4", "mxfp4"])
def test_dequantisation_in_any_spelling_is_recognised(code):
    blocks = [block for block, kind in q.KINDS.items() if kind.startswith(code)]
    c = Compared(Each(blocks), tokens())
    assert c.rewritten == len(blocks), named(c.report.regions, blocks)
    (gm,) = c.inner.graphs
    assert [b.__name__ for b, text in zip(blocks, layouts(gm)) if q.KINDS[b] not in kinds(text) or "" in kinds(text)] == []
    assert not calls(gm, "dequantize_experts", "silu", "index_add_")
    c(tokens(1))


# ---------------------------------------------------------------- what is something else
class WrongAxis(Int8Groups):
    """A scale an input."""

    def make(self, name, out, inner, g):
        self.keep(name, q.int8(g, q.E, out, inner), q.scales(g, q.E, inner, size=1e-3))

    def weight(self, name, e):
        return getattr(self, name)[e].float() * getattr(self, f"{name}_scale")[e][None, :]


class GroupOf64(Int8Groups):
    group = 64


class Interleaved(Int8Groups):
    """Every second input has the same scale."""

    def weight(self, name, e):
        s = getattr(self, f"{name}_scale")[e]
        numbers = getattr(self, name)[e]
        return numbers.float() * s.repeat(1, numbers.shape[-1] // s.shape[-1])


class GroupsOfInputsAlone(Fp8Blocks):
    """e4m3 with a scale for 1 x 128."""

    def make(self, name, out, inner, g):
        self.keep(name, q.e4m3(g, q.E, out, inner), q.scales(g, q.E, out, inner // 128, size=0.05))

    def weight(self, name, e):
        return getattr(self, name)[e].float() * getattr(self, f"{name}_scale")[e].repeat_interleave(128, dim=1)


class OtherExperts(Int8Outputs):
    """The scales of the next expert."""

    def weight(self, name, e):
        return getattr(self, name)[e].float() * getattr(self, f"{name}_scale")[(e + 1) % q.E][:, None]


class ZeroPoints(Int8Outputs):
    def make(self, name, out, inner, g):
        super().make(name, out, inner, g)
        self.register_buffer(f"{name}_zero", q.int8(g, q.E, out) // 16)

    def weight(self, name, e):
        numbers = getattr(self, name)[e].float() - getattr(self, f"{name}_zero")[e].float()[:, None]
        return numbers * getattr(self, f"{name}_scale")[e][:, None]


class Unsigned(Int8Outputs):
    """uint8 around 128."""

    def make(self, name, out, inner, g):
        self.keep(name, q.packed(g, q.E, out, inner), q.scales(g, q.E, out, size=1e-3))

    def weight(self, name, e):
        return (getattr(self, name)[e].float() - 128) * getattr(self, f"{name}_scale")[e][:, None]


class Truncated(Int8Outputs):
    """Weights rounded to whole numbers."""

    def weight(self, name, e):
        return super().weight(name, e).mul(100).to(torch.int32).float()


class SwappedHalves(Int4Groups):
    def numbers(self, p):
        return torch.stack([p >> 4, p & 0x0F], dim=-1).flatten(-2).float() - 8


class SideBySide(Int4Groups):
    """Low halves first, then the high ones."""

    def numbers(self, p):
        return torch.cat([p & 0x0F, p >> 4], dim=-1).float() - 8


class OtherZero(Int4Groups):
    def numbers(self, p):
        return torch.stack([p & 0x0F, p >> 4], dim=-1).flatten(-2).float() - 7


class TwosComplement(Int4Groups):
    def numbers(self, p):
        n = torch.stack([p & 0x0F, p >> 4], dim=-1).flatten(-2).to(torch.int8)
        return torch.where(n > 7, n - 16, n).float()


class Wrapped(Int4Groups):
    """8 subtracted from bytes: 248 instead of -8."""

    def numbers(self, p):
        return (torch.stack([p & 0x0F, p >> 4], dim=-1).flatten(-2) - 8).float() / 100


class OtherTable(Mxfp4Short):
    """One number of the table is another."""

    def one(self, blocks, s):
        numbers = torch.tensor([*FP4[:6], 5.0, *FP4[7:]])[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
        return (numbers * torch.exp2(s.float() - 127)[..., None]).flatten(-2)


class OtherBias(Mxfp4Short):
    def one(self, blocks, s):
        numbers = torch.tensor(FP4)[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
        return (numbers * torch.exp2(s.float() - 126)[..., None]).flatten(-2)


class OfSixteen(Mxfp4Short):
    """An exponent for 16 inputs."""

    def make(self, name, out, inner, g):
        s = torch.randint(118, 124, (q.E, out, inner // 16), generator=g, dtype=torch.uint8)
        self.keep(name, q.packed(g, q.E, out, inner // 16, 8), s)


class UnknownTable(Mxfp4Short):
    """A table that is a buffer may hold anything."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.tensor(FP4))

    def one(self, blocks, s):
        numbers = self.table[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
        return (numbers * torch.exp2(s.float() - 127)[..., None]).flatten(-2)


OTHERS = [
    WrongAxis, GroupOf64, Interleaved, GroupsOfInputsAlone, OtherExperts, ZeroPoints, Unsigned, Truncated, SwappedHalves, SideBySide,
    OtherZero, TwosComplement, Wrapped, OtherTable, OtherBias, OfSixteen, UnknownTable,
]  # fmt: skip


REASONS = {
    GroupOf64: "an output or 128 inputs", ZeroPoints: "zero points", SwappedHalves: "in a code that no kernel has",
    GroupsOfInputsAlone: "an output or 128 x 128", OtherBias: "powers of two", TwosComplement: "in a code that no kernel has",
}  # fmt: skip


def test_what_is_in_no_known_form_is_not_taken_for_one():
    gm = graph_of(Each(OTHERS), tokens())
    regions = rewrite(gm, validate="off").regions  # the calculus must see it, not the comparison behind it
    assert [r.rewritten for r in regions] == [False] * len(OTHERS)
    told = dict(zip(OTHERS, named(regions, OTHERS)))
    assert [told[block] for block, reason in REASONS.items() if reason not in told[block]] == []


class TransposedScales(Fp8Blocks):
    """Scales kept [inputs / 128, outputs / 128]: another order, which views can mend."""

    def make(self, name, out, inner, g):
        self.keep(name, q.e4m3(g, q.E, out, inner), q.scales(g, q.E, inner // 128, out // 128, size=0.05))

    def weight(self, name, e):
        s = getattr(self, f"{name}_scale")[e].t().repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
        return getattr(self, name)[e].float() * s


class GroupOf256(Int8Groups):
    """A scale for 256 inputs is one for twice 128."""

    shapes = {"up": (2 * q.H, q.H), "down": (q.H, 2 * q.H)}  # noqa: RUF012
    group = 256


class Merged(Int8Groups):
    """Experts and outputs in one dimension, for numbers and scales."""

    def make(self, name, out, inner, g):
        self.keep(name, q.int8(g, q.E * out, inner), q.scales(g, q.E * out, inner // 128, size=1e-3))

    def weight(self, name, e):
        numbers, s = (getattr(self, n).view(q.E, -1, getattr(self, n).shape[-1])[e] for n in (name, f"{name}_scale"))
        return numbers.float() * s.repeat_interleave(128, dim=-1)


def test_other_orders_of_the_same_numbers():
    blocks = [TransposedScales, GroupOf256, Merged]
    c = Compared(Each(blocks), tokens())
    assert c.rewritten == len(blocks), named(c.report.regions, blocks)
    assert not calls(c.inner.graphs[0], "dequantize_experts")


# ---------------------------------------------------------------- as a whole, in no known form
class Whole(Int8Groups):
    """All experts at once, groups of 64."""

    group = 64

    def forward(self, x):
        up, down = (getattr(self, n).float() * getattr(self, f"{n}_scale").repeat_interleave(self.group, 2) for n in self.shapes)
        w, ids = self.route(x)
        return self.loop(x, up, down, w, ids)

    def loop(self, x, up, down, w, ids):
        out = torch.zeros_like(x)
        for e in range(q.E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, F.linear(F.silu(F.linear(x[tok], up[e])), down[e]) * w[tok, slot, None])
        return out


class WholeBehind(Whole):
    def forward(self, x):
        w, ids = self.route(x)
        up, down = (getattr(self, n).float() * getattr(self, f"{n}_scale").repeat_interleave(self.group, 2) for n in self.shapes)
        return self.loop(x, up, down, w, ids)


def test_weights_dequantised_as_a_whole_are_a_tensor_like_others():
    c = Compared(Each([Whole, WholeBehind]), tokens())
    assert c.rewritten == 2, c.reasons
    assert [kinds(text) for text in layouts(c.inner.graphs[0])] == [{""}, {""}]


# ---------------------------------------------------------------- around it
class TwoLayers(nn.Module):
    def __init__(self, layer: type[Quantised]) -> None:
        super().__init__()
        self.first, self.second = layer(), layer()

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


@pytest.mark.parametrize("layer", [Int8Groups, q.Int8Whole, Mxfp4Short, q.Fp8Bytes], ids=lambda b: b.__name__)
def test_the_second_layer_is_known_from_the_first(layer):
    c = Compared(TwoLayers(layer), tokens())
    assert c.rewritten == 2, c.reasons
    assert "the same code" in str(c.report.regions[1].validation)
    assert len(layouts(c.inner.graphs[0])) == 2
    assert layouts(c.inner.graphs[0])[0] == layouts(c.inner.graphs[0])[1]


class Halved(Int8Outputs):
    """As people run it: bfloat16 rows, weights rounded to bfloat16."""

    def weight(self, name, e):
        return getattr(self, name)[e].to(torch.bfloat16) * getattr(self, f"{name}_scale")[e].to(torch.bfloat16)[:, None]


def test_bfloat16_rows():
    block = Halved()
    block.gate.data = block.gate.data.bfloat16()
    x = tokens().bfloat16()
    report = RewriteReport()
    with torch.no_grad():
        got = moe_compile.compile(block, inner="eager", report=report)(x).float()
        want = block(x).float()
    assert len(report.rewritten) == 1, str(report)
    assert float((got - want).norm() / want.norm()) < 1e-2


def test_a_change_of_the_numbers_between_router_and_experts_is_seen():
    class Changed(Int8Groups):
        def route(self, x):
            found = super().route(x)
            self.up.mul_(-1)
            return found

    c = Compared(Changed(), tokens())
    c(tokens(1))


def test_numbers_changed_before_the_router_are_read_as_they_were():
    """The weights are made first, then the numbers change, then the router runs."""

    class Early(q.Int8Whole):
        def forward(self, x):
            up, down = (getattr(self, n).float() * getattr(self, f"{n}_scale").repeat_interleave(self.group, 2) for n in self.shapes)
            self.up.mul_(-1)
            w, ids = self.route(x)
            return Whole.loop(self, x, up, down, w, ids)

    c = Compared(Early(), tokens())
    c(tokens(1))


def test_scales_that_are_trained_keep_their_gradients():
    class Trained(Int8Groups):
        def __init__(self):
            super().__init__()
            for name in self.shapes:
                scale = getattr(self, f"{name}_scale")
                delattr(self, f"{name}_scale")
                setattr(self, f"{name}_scale", nn.Parameter(scale))

    c = Compared(Trained(), tokens(), grad=True)
    assert c.rewritten == 0
    assert any("would be trained" in str(reason) for reason in c.reasons)


def test_rows_are_trained_through_quantised_experts():
    c = Compared(Int8Groups(), tokens(), grad=True)
    assert c.rewritten == 1, c.reasons
