"""MoE blocks whose experts are quantised by hand, in the spellings that people write, and variants that are something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, K, H, I, T = 2, 1, 256, 128, 9  # noqa: E741
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def off(got: Tensor, want: Tensor) -> float:
    """The largest difference, in the largest number that is wanted."""
    assert got.shape == want.shape
    return float((got.detach().cpu().double() - want.detach().double()).abs().max() / want.detach().double().abs().max())


class Quantised(nn.Module):
    """out[t] = sum_k w[t, k] * down(silu(up(x))): `weight(name, e)` gives an expert's float weight [out, in]; tests override it."""

    shapes = {"up": (I, H), "down": (H, I)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gate = nn.Parameter(torch.randn(E, H, generator=g) * H**-0.5)
        for name, (out, inner) in self.shapes.items():
            self.make(name, out, inner, g)

    def make(self, name: str, out: int, inner: int, g: torch.Generator) -> None:
        raise NotImplementedError

    def weight(self, name: str, e: int) -> Tensor:
        raise NotImplementedError

    def keep(self, name: str, numbers: Tensor, scales: Tensor) -> None:
        self.register_buffer(name, numbers)
        self.register_buffer(f"{name}_scale", scales)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.gate).softmax(-1).topk(K, dim=-1)

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.weight("up", e))), self.weight("down", e))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out


def int8(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)


def e4m3(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g).to(torch.float8_e4m3fn)


def packed(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def scales(g: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    return (torch.rand(shape, generator=g) + 0.5) * size


# ---------------------------------------------------------------- int8
class Int8Outputs(Quantised):
    """A scale an output."""

    def make(self, name, out, inner, g):
        self.keep(name, int8(g, E, out, inner), scales(g, E, out, size=1e-3))

    def weight(self, name, e):
        return getattr(self, name)[e].float() * getattr(self, f"{name}_scale")[e][:, None]


class Int8Behind(Int8Outputs):
    """The scale behind the product."""

    def expert(self, x, e):
        h = F.silu(F.linear(x, self.up[e].to(x.dtype)) * self.up_scale[e])
        return F.linear(h, self.down[e].to(x.dtype)) * self.down_scale[e]


class Int8Expert(Int8Outputs):
    """A scale an expert."""

    def make(self, name, out, inner, g):
        self.keep(name, int8(g, E, out, inner), scales(g, E, size=1e-3))

    def weight(self, name, e):
        return getattr(self, name)[e].to(torch.float32) * getattr(self, f"{name}_scale")[e]


class Int8ExpertBehind(Int8Expert):
    """A scale an expert, behind the product."""

    expert = Int8Behind.expert


class Int8Groups(Int8Outputs):
    """A scale for 128 inputs, repeated."""

    group = 128

    def make(self, name, out, inner, g):
        self.keep(name, int8(g, E, out, inner), scales(g, E, out, inner // self.group, size=1e-3))

    def weight(self, name, e):
        return getattr(self, name)[e].float() * getattr(self, f"{name}_scale")[e].repeat_interleave(self.group, dim=-1)


class Int8Divided(Int8Groups):
    """Numbers divided by inverse scales, in groups as a dimension of their own."""

    def weight(self, name, e):
        q, s = getattr(self, name)[e], getattr(self, f"{name}_scale")[e]
        return (q.float().unflatten(-1, (-1, self.group)) / (1e6 * s.unsqueeze(-1))).flatten(-2)


class Int8Guarded(Int8Groups):
    """Scales that are zero count as one."""

    def weight(self, name, e):
        s = getattr(self, f"{name}_scale")[e]
        s = torch.where(s > 0, s, torch.ones_like(s)).repeat_interleave(self.group, dim=-1)
        return getattr(self, name)[e].float() * s


class Int8Transposed(Int8Groups):
    """Weights as [in, out]; scales [in / 128, out]."""

    def make(self, name, out, inner, g):
        self.keep(name, int8(g, E, inner, out), scales(g, E, inner // self.group, out, size=1e-3))

    def expert(self, x, e):
        return F.silu(x @ self.weight("up", e)) @ self.weight("down", e)

    def weight(self, name, e):
        return getattr(self, name)[e].float() * getattr(self, f"{name}_scale")[e].repeat_interleave(self.group, dim=0)


class Int8Whole(Int8Groups):
    """All experts dequantised before the loop."""

    def forward(self, x):
        self_up, self_down = (getattr(self, n).float() * getattr(self, f"{n}_scale").repeat_interleave(self.group, 2) for n in self.shapes)
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, F.linear(F.silu(F.linear(x[tok], self_up[e])), self_down[e]) * w[tok, slot, None])
        return out


class Int8Late(Int8Groups):
    """All experts dequantised behind the router; gathered a slot."""

    def forward(self, x):
        w, ids = self.route(x)
        up, down = (getattr(self, n).float() * getattr(self, f"{n}_scale").repeat_interleave(self.group, 2) for n in self.shapes)
        h = F.silu(torch.einsum("th,tkih->tki", x, up[ids]))
        return torch.einsum("tki,tkhi,tk->th", h, down[ids], w)


class Int8List(Quantised):
    """Experts as modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.experts = nn.ModuleList(_Int8Expert(g) for _ in range(E))

    def make(self, name, out, inner, g):
        pass

    def expert(self, x, e):
        return self.experts[e](x)


class _Int8Expert(nn.Module):
    def __init__(self, g: torch.Generator) -> None:
        super().__init__()
        self.up, self.down = _Int8Linear(H, I, g), _Int8Linear(I, H, g)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class _Int8Linear(nn.Module):
    def __init__(self, inner: int, out: int, g: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("weight", int8(g, out, inner))
        self.register_buffer("scale", scales(g, out, 1, size=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class Int8Gated(Quantised):
    """Gate and up in one tensor, a scale for 128 inputs of an output."""

    shapes = {"up": (2 * I, H), "down": (H, I)}  # noqa: RUF012
    make, weight, group = Int8Groups.make, Int8Groups.weight, 128

    def expert(self, x, e):
        gate, up = F.linear(x, self.weight("up", e)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.weight("down", e))


# ---------------------------------------------------------------- e4m3
class Fp8Outputs(Quantised):
    """e4m3, a scale an output."""

    def make(self, name, out, inner, g):
        self.keep(name, e4m3(g, E, out, inner), scales(g, E, out, 1, size=0.05))

    def weight(self, name, e):
        return getattr(self, name)[e].to(torch.float32) * getattr(self, f"{name}_scale")[e]


class Fp8Bytes(Fp8Outputs):
    """e4m3 kept as bytes."""

    def make(self, name, out, inner, g):
        self.keep(name, e4m3(g, E, out, inner).view(torch.uint8), scales(g, E, out, 1, size=0.05))

    def weight(self, name, e):
        return getattr(self, name)[e].view(torch.float8_e4m3fn).float() * getattr(self, f"{name}_scale")[e]


class Fp8Blocks(Quantised):
    """e4m3, a scale for 128 x 128, repeated twice."""

    def make(self, name, out, inner, g):
        self.keep(name, e4m3(g, E, out, inner), scales(g, E, -(-out // 128), -(-inner // 128), size=0.05))

    def weight(self, name, e):
        s = getattr(self, f"{name}_scale")[e].repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
        return getattr(self, name)[e].to(torch.float32) * s


class Fp8Viewed(Fp8Blocks):
    """Blocks as dimensions."""

    def weight(self, name, e):
        q, s = getattr(self, name)[e], getattr(self, f"{name}_scale")[e]
        out, inner = q.shape
        return (q.float().view(out // 128, 128, inner // 128, 128) * s[:, None, :, None]).view(out, inner)


class Fp8Expanded(Fp8Blocks):
    """Scales by expand and reshape."""

    def weight(self, name, e):
        q, s = getattr(self, name)[e], getattr(self, f"{name}_scale")[e]
        (out, inner), (a, b) = q.shape, s.shape
        return q.float() * s[:, None, :, None].expand(a, 128, b, 128).reshape(out, inner)


class Fp8Kron(Fp8Blocks):
    """Scales by a Kronecker product."""

    def weight(self, name, e):
        return getattr(self, name)[e].float() * torch.kron(getattr(self, f"{name}_scale")[e], torch.ones(128, 128))


class Fp8Indexed(Fp8Blocks):
    """Scales by indices."""

    def weight(self, name, e):
        q, s = getattr(self, name)[e], getattr(self, f"{name}_scale")[e]
        rows, cols = torch.arange(q.shape[0]) // 128, torch.arange(q.shape[1]) // 128
        return q.float() * s[rows][:, cols]


class Fp8Gated(Fp8Blocks):
    """Gate and up in one tensor."""

    shapes = {"up": (2 * I, H), "down": (H, I)}  # noqa: RUF012
    expert = Int8Gated.expert


class Fp8GatedSlices(Fp8Gated):
    """Gate and up in one tensor, dequantised in two parts."""

    def expert(self, x, e):
        whole = self.weight("up", e)
        return F.linear(F.silu(F.linear(x, whole[:I])) * F.linear(x, whole[I:]), self.weight("down", e))


class Fp8Ue8m0(Fp8Blocks):
    """Scales as powers of two."""

    def make(self, name, out, inner, g):
        s = torch.randint(118, 125, (E, -(-out // 128), -(-inner // 128)), generator=g, dtype=torch.uint8)
        self.keep(name, e4m3(g, E, out, inner), s.view(torch.float8_e8m0fnu))

    def weight(self, name, e):
        s = getattr(self, f"{name}_scale")[e].to(torch.float32).repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
        return getattr(self, name)[e].float() * s


# ---------------------------------------------------------------- int4
class Int4Groups(Quantised):
    """Two numbers a byte, low first; a scale for 128 inputs."""

    def make(self, name, out, inner, g):
        self.keep(name, packed(g, E, out, inner // 2), scales(g, E, out, inner // 128, size=0.02))

    def weight(self, name, e):
        s = getattr(self, f"{name}_scale")[e].repeat_interleave(128, dim=-1)
        return self.numbers(getattr(self, name)[e]) * s

    def numbers(self, q):
        return torch.stack([q & 0x0F, q >> 4], dim=-1).flatten(-2).float() - 8


class Int4Signed(Int4Groups):
    """Numbers made signed before they are put together."""

    def numbers(self, q):
        low, high = (q & 15).to(torch.int8) - 8, (q >> 4).to(torch.int8) - 8
        return torch.cat([low.unsqueeze(-1), high.unsqueeze(-1)], -1).reshape(q.shape[0], -1).to(torch.float32)


class Int4Written(Int4Groups):
    """Written into every second column."""

    def numbers(self, q):
        out = torch.empty(q.shape[0], q.shape[1] * 2)
        out[:, 0::2] = (q % 16).float() - 8.0
        out[:, 1::2] = (q // 16).float() - 8.0
        return out


# ---------------------------------------------------------------- mxfp4
class Mxfp4(Quantised):
    """As transformers' convert_moe_packed_tensors has it."""

    def make(self, name, out, inner, g):
        s = torch.randint(118, 124, (E, out, inner // 32), generator=g, dtype=torch.uint8)
        self.keep(name, packed(g, E, out, inner // 32, 16), s)

    def weight(self, name, e):
        return self.one(getattr(self, name)[e], getattr(self, f"{name}_scale")[e])

    def one(self, blocks, s):
        lut = torch.tensor(FP4, dtype=torch.float32)
        exponents = s.to(torch.int32) - 127
        rows, b = blocks.shape[0] * blocks.shape[1], blocks.shape[2]
        flat, exponents = blocks.reshape(rows, b), exponents.reshape(rows, 1)
        out = torch.empty(rows, b * 2)
        out[:, 0::2] = lut[(flat & 0x0F).to(torch.int)]
        out[:, 1::2] = lut[(flat >> 4).to(torch.int)]
        torch.ldexp(out, exponents, out=out)
        return out.reshape(blocks.shape[0], -1)


class Mxfp4Short(Mxfp4):
    """In three lines."""

    def one(self, blocks, s):
        lut = torch.tensor(FP4)
        numbers = lut[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
        return (numbers * torch.exp2(s.float() - 127)[..., None]).flatten(-2)


class Mxfp4E8m0(Mxfp4):
    """Scales read as e8m0; the sign by itself."""

    def one(self, blocks, s):
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        magnitude = torch.tensor(FP4[:8])[(codes & 7).long()]
        numbers = torch.where(codes >= 8, -magnitude, magnitude)
        return (numbers * s.view(torch.float8_e8m0fnu).float().unsqueeze(-1)).flatten(-2)


class Mxfp4Whole(Mxfp4):
    """All experts at once behind the router, transposed."""

    def forward(self, x):
        w, ids = self.route(x)
        lut = torch.tensor(FP4)
        up, down = (self.all(getattr(self, n), getattr(self, f"{n}_scale"), lut) for n in self.shapes)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, F.silu(x[tok] @ up[e]) @ down[e] * w[tok, slot, None])
        return out

    def all(self, blocks, s, lut):
        numbers = lut[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
        return (numbers * torch.exp2(s.float() - 127)[..., None]).flatten(-2).transpose(1, 2)


KINDS: dict[type[Quantised], str] = {
    Int8Outputs: "int8", Int8Behind: "int8", Int8Expert: "int8", Int8ExpertBehind: "int8", Int8Groups: "int8", Int8Divided: "int8",
    Int8Guarded: "int8",
    Int8Transposed: "int8", Int8Whole: "int8", Int8Late: "int8", Int8List: "int8", Int8Gated: "int8",
    Fp8Outputs: "fp8_channel_w", Fp8Bytes: "fp8_channel_w", Fp8Blocks: "fp8_block_w", Fp8Viewed: "fp8_block_w",
    Fp8Expanded: "fp8_block_w", Fp8Kron: "fp8_block_w", Fp8Indexed: "fp8_block_w", Fp8Gated: "fp8_block_w",
    Fp8GatedSlices: "fp8_block_w", Fp8Ue8m0: "fp8_block_w",
    Int4Groups: "int4", Int4Signed: "int4", Int4Written: "int4",
    Mxfp4: "mxfp4", Mxfp4Short: "mxfp4", Mxfp4E8m0: "mxfp4", Mxfp4Whole: "mxfp4",
}  # fmt: skip
Make = Callable[[], Quantised]
