"""What one expert may be, and how its parameters may lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.variants.base import MLP, Block, E, H, I, ListBlock, SwiGLU, variant
from corpus.variants.routers import _Loop


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class _Of(_Loop):
    """The loop with experts made by `make`."""

    def __init__(self, make: type[nn.Module], **kwargs: object) -> None:
        ListBlock.__init__(self, lambda: make(**kwargs))


variant("expert_relu_squared", "relu(x) ** 2, no gate", make=MLP, act=relu2)(_Of)
variant("expert_geglu_tanh", "GeGLU with the tanh approximation", make=SwiGLU, act=gelu_tanh)(_Of)
variant("expert_glu_biases", "SwiGLU with three biases", make=SwiGLU, bias=True)(_Of)
variant("expert_quick_gelu", "x * sigmoid(1.702 x)", make=MLP, act=quick_gelu)(_Of)
variant("expert_leaky_relu", "leaky ReLU", make=MLP, act=F.leaky_relu)(_Of)
variant("expert_softplus", "softplus", make=MLP, act=F.softplus)(_Of)
variant("expert_elu", "ELU", make=MLP, act=F.elu)(_Of)
variant("expert_mish", "Mish", make=MLP, act=F.mish)(_Of)
variant("expert_hardswish", "hardswish", make=MLP, act=F.hardswish)(_Of)
variant("expert_identity", "two matrices and no activation", make=MLP, act=nn.Identity())(_Of)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(H, I), nn.Linear(I, I), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class OneLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(H, H)


class Sequential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(H, I), nn.SiLU(), nn.Dropout(0.0), nn.Linear(I, H))


class Bottleneck(nn.Module):
    """A residual inside the expert."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Normed(nn.Module):
    """An RMS norm inside the expert: not a function of single features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(H, eps=1e-6), SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class ClampedInterleaved(nn.Module):
    """gate and up interleaved, clamped, (up + 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(H, 2 * I), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate_up(x)
        gate, up = h[..., ::2].clamp(max=1.0), h[..., 1::2].clamp(-1.0, 1.0)
        return self.down((up + 1) * gate * torch.sigmoid(1.702 * gate))


variant("expert_three_layers", "a 3-layer MLP", make=Three)(_Of)
variant("expert_one_linear", "a single Linear", make=OneLinear)(_Of)
variant("expert_sequential", "nn.Sequential with SiLU and Dropout(0)", make=Sequential)(_Of)
variant("expert_residual_inside", "x + mlp(x) inside the expert", make=Bottleneck)(_Of)
variant("expert_norm_inside", "RMSNorm inside the expert", make=Normed)(_Of)
variant("expert_interleaved_clamped", "interleaved clamped gate, (up + 1)", make=ClampedInterleaved)(_Of)


@variant("expert_other_width", "the output is wider than the input")
class OtherWidth(ListBlock):
    def __init__(self) -> None:
        super().__init__(lambda: MLP(F.silu, o=H + 4))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = x.new_zeros(x.shape[0], H + 4)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, expert(x[tok]) * w[tok, slot, None])
        return out.view(*hidden.shape[:-1], H + 4)


@variant("expert_tied", "experts 0 and 3 are one module")
class Tied(_Loop):
    def __init__(self) -> None:
        super().__init__()
        self.experts[3] = self.experts[0]


@variant("expert_lora", "a shared base and a low-rank update a expert: mixture of LoRAs")
class Lora(Block):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(H, H)
        self.a, self.b = nn.Parameter(torch.empty(E, 4, H)), nn.Parameter(torch.empty(E, H, 4))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a[e]), self.b[e]) * 0.5

    def around(self, hidden: Tensor, out: Tensor) -> Tensor:
        return self.base(hidden) + out

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = self.base(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out = out.index_add(0, tok, self.expert(e, x[tok]) * w[tok, slot, None])
        return out.view_as(hidden)


@variant("expert_on_shared_hidden", "one shared up projection, an expert is a down projection of it")
class SharedUp(ListBlock):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(I, H))
        self.up = nn.Linear(H, I)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](F.silu(self.up(x)))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        h = F.silu(self.up(x))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, expert(h[tok]) * w[tok, slot, None])
        return out.view_as(hidden)


@variant("expert_int8_weights", "int8 weights, dequantised by a scale a row inside the loop")
class Int8(Block):
    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(3)
        quantised = lambda *shape: torch.randint(-127, 128, shape, generator=gen, dtype=torch.int8)  # noqa: E731
        self.register_buffer("up", quantised(E, I, H))
        self.register_buffer("down", quantised(E, H, I))
        self.up_scale, self.down_scale = (
            nn.Parameter(torch.empty(E, I, 1)),
            nn.Parameter(torch.empty(E, H, 1)),
        )

    def expert(self, e: int, x: Tensor) -> Tensor:
        up = self.up[e].to(x.dtype) * (self.up_scale[e] / 127)
        down = self.down[e].to(x.dtype) * (self.down_scale[e] / 127)
        return F.linear(F.relu(F.linear(x, up)), down)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, H)
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(e, x[tok]) * w[tok, slot, None])
        return out.view_as(hidden)


@variant("expert_input_weighted", "the routing weight multiplies the expert's input")
class InputWeighted(_Loop):
    def reference(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.route(x)
        rows = [sum(self.experts[e](x[t] * w[t, k]) for k, e in enumerate(row)) for t, row in enumerate(ids.tolist())]
        return torch.stack(rows).view_as(hidden)

    def loop(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, expert(x[tok] * w[tok, slot, None]))
        return out


@variant("expert_hidden_weighted", "the routing weight multiplies before the down projection")
class HiddenWeighted(_Loop):
    def loop(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, m in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            h = F.silu(m.gate_proj(x[tok])) * m.up_proj(x[tok])
            out.index_add_(0, tok, m.down_proj(h * w[tok, slot, None]))
        return out
