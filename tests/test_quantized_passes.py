"""Quantised weights in compiled models: the pass that sinks dequantize_experts, and quant="fp8"."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Dense, E, Recorder, block, calls, graph_of, node, rewrite, tokens
from quantized_blocks import off
from torch import Tensor, nn

import moe_compile
from moe_compile import logs, quantising
from moe_compile.ops.quantized import dequantize, quantize_weights, rounded_rows

OPS = torch.ops.moe_compile


class Wide(nn.Module):
    """A layer of usable sizes: gate and up in one weight."""

    def __init__(self, hidden: int = 512, inter: int = 256, experts: int = 8) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gate = nn.Parameter(torch.randn(experts, hidden, generator=g) * 0.1)
        self.up = nn.Parameter(torch.randn(experts, 2 * inter, hidden, generator=g) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inter, generator=g) * inter**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(len(self.gate)):
            gate, up = F.linear(x, self.up[e]).chunk(2, -1)
            out = out + F.linear(F.silu(gate) * up, self.down[e]) * (w * (ids == e)).sum(-1, keepdim=True).to(x.dtype)
        return out


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_e4m3_on_a_gpu(mode: str | None) -> None:
    """In CUDA graphs too, weights that were written are quantised again, into the memory that the graph reads."""
    torch._dynamo.reset()
    model, report = Wide().to("cuda", torch.bfloat16), moe_compile.RewriteReport()
    made = moe_compile.compile(model, mode=mode, report=report, dynamic=False, options={"quant": "fp8"})
    for tokens_ in (1, 300):
        x = torch.randn(tokens_, 512, device="cuda", dtype=torch.bfloat16)
        for factor in (1.0, -2.0, 0.5):
            model.up[:, :256].mul_(factor)
            model.down.mul_(factor)
            for _ in range(3):
                got = made(x).clone()
            want = model(x)
            assert 1e-3 < float((got - want).float().norm() / want.float().norm()) < 0.1, str(report)
    assert all(region.providers["experts"] == "triton" for region in report.rewritten), str(report)


# ---------------------------------------------------------------- sinking
def written(kind: str, made: Any, turned: bool = False) -> Dense:
    """A block that dequantises its weights as a whole by made(values, scales). turned: they lie as if outputs were inputs."""

    def forward(self: Any, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        up, down = made(self.up_values, self.up_scales), made(self.down_values, self.down_scales)
        gates = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
        parts = [gates[:, e, None] * linear(F.silu(linear(x, up[e])), down[e]) for e in range(E)]
        return sum(parts[1:], parts[0])

    linear = torch.matmul if turned else F.linear
    plain = {name: getattr(Dense(), name).detach() for name in ("up", "down")}
    quantized = {name: quantize_weights(w.transpose(1, 2) if turned else w, kind) for name, w in plain.items()}
    members = {f"{name}_{part}": t for name, q in quantized.items() for part, t in (("values", q.values), ("scales", q.scales))}
    found: Dense = block(forward, Dense, **members)
    del found._parameters["up"], found._parameters["down"]
    return found


def compiled(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Any, Recorder, moe_compile.RewriteReport]:
    torch._dynamo.reset()
    seen, report = Recorder(), moe_compile.RewriteReport()
    made = moe_compile.compile(model, inner=seen, report=report, options=options)
    made(*inputs)
    return made, seen, report


SPELLINGS = {
    "plain": lambda v, s, kind: OPS.dequantize_experts(v, s, kind, "oi", torch.float32),
    "casts": lambda v, s, kind: OPS.dequantize_experts(v, s, kind, "oi", torch.bfloat16).to(torch.float32).detach(),
    "turns": lambda v, s, kind: OPS.dequantize_experts.default(v, s, kind, "oi", torch.float32).transpose(-1, 1).permute(0, 2, 1),
}


@torch.no_grad()
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["int8", "fp8_block", "fp8_block_w"])
def test_dequantised_weights_are_read_where_they_lie(kind: str, spelling: str) -> None:
    model = written(kind, lambda v, s: SPELLINGS[spelling](v, s, kind))
    want = model(tokens())
    made, seen, report = compiled(model, tokens())
    (gm,) = seen.graphs
    stage = node(gm, "permute_experts_unpermute")
    assert stage.args[7] == f"eoi:{kind},eoi:{kind}", report
    assert "dequantize_experts" not in calls(gm)
    assert off(made(tokens()), want) < {"fp8_block": 0.1, "int8": 1e-2, "fp8_block_w": 1e-2}[kind]


@torch.no_grad()
def test_outputs_that_stand_for_inputs() -> None:
    """Scales of blocks are alike both ways; those of a direction are not, and the weight stays dequantised."""

    for kind, layout in (("fp8_block", "eio:fp8_block,eio:fp8_block"), ("int8", "eio,eio")):
        model = written(kind, lambda v, s, kind=kind: SPELLINGS["plain"](v, s, kind), turned=True)
        want = model(tokens())
        made, seen, _ = compiled(model, tokens())
        assert node(seen.graphs[0], "permute_experts_unpermute").args[7] == layout
        assert off(made(tokens()), want) < 0.1


@torch.no_grad()
def test_numbers_that_are_written_in_between_stay_dequantised() -> None:
    def made(values: Tensor, scales: Tensor) -> Tensor:
        w: Tensor = OPS.dequantize_experts(values, scales, "int8", "oi", torch.float32)
        values.zero_()
        return w

    model = written("int8", made)
    want = copy.deepcopy(model)(tokens())
    _, seen, _ = compiled(copy.deepcopy(model), tokens())
    assert node(seen.graphs[0], "permute_experts_unpermute").args[7] == "eoi,eoi"
    assert want.any()
    assert off(moe_compile.compile(copy.deepcopy(model), inner="eager")(tokens()), want) < 1e-5


def test_training_goes_around_quantised_weights() -> None:
    """Gradients of what stands before the experts are those of the dequantised weights."""
    model = written("int8", lambda v, s: SPELLINGS["plain"](v, s, "int8"))
    x = tokens().requires_grad_()
    (want,) = torch.autograd.grad(model(x).square().sum(), [x])
    made, seen, report = compiled(model, x)
    assert node(seen.graphs[0], "permute_experts_unpermute").args[7] == "eoi,eoi"
    (got,) = torch.autograd.grad(made(x).square().sum(), [x])
    assert off(got, want) < 1e-4
    assert "dequantised in each call, as gradients are wanted" in str(report.graphs[0])


# ---------------------------------------------------------------- quant="fp8"
class Lists(Dense):
    """An nn.Linear an expert."""

    def __init__(self) -> None:
        super().__init__()
        up, down = self.up.detach(), self.down.detach()
        del self.up, self.down
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*w.shape[:0:-1], bias=False) for _ in w) for w in (up, down))
        for modules, w in ((self.ups, up), (self.downs, down)):
            for module, own in zip(modules, w, strict=True):
                module.weight.data.copy_(own)

    def expert(self, x: Tensor, e: int) -> Tensor:
        y: Tensor = self.downs[e](F.silu(self.ups[e](x)))
        return y


class InputsByOutputs(Dense):
    """Weights that lie [E, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (self.up, self.down))

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.silu(x @ self.up[e]) @ self.down[e]


def in_e4m3(model: nn.Module, x: Tensor) -> Tensor:
    """What the block gives with quantised weights and rows."""
    own: Any = copy.deepcopy(model)

    def seen(rows: Tensor) -> Tensor:
        return rounded_rows(rows, True)

    def back(weights: Tensor) -> Tensor:
        return dequantize(quantize_weights(weights, "fp8_block"))

    if isinstance(own, Lists):
        up, down = (back(torch.stack([m.weight for m in modules])) for modules in (own.ups, own.downs))
    elif isinstance(own, InputsByOutputs):
        up, down = (back(w.transpose(1, 2)) for w in (own.up, own.down))
    else:
        up, down = back(own.up), back(own.down)
    own.expert = lambda rows, e: F.linear(seen(F.silu(F.linear(seen(rows), up[e]))), down[e])
    y: Tensor = own(x)
    return y


@torch.no_grad()
@pytest.mark.parametrize("kind", [Dense, Lists, InputsByOutputs])
def test_float_weights_become_e4m3(kind: type[Block]) -> None:
    model = kind()
    made, seen, report = compiled(model, tokens(), quant="fp8")
    assert node(seen.graphs[0], "permute_experts_unpermute").args[7] == "eoi:fp8_block,eoi:fp8_block", report
    assert off(made(tokens()), in_e4m3(model, tokens())) < 1e-5
    assert 1e-3 < off(made(tokens()), model(tokens())) < 0.2
    (region,) = report.regions
    assert region.quant is not None
    assert region.quant in str(report)
    assert list(region.quant_errors) == ["weight 0", "weight 1", "output"]
    assert all(0.01 < error < 0.1 for error in region.quant_errors.values())
    assert moe_compile.RewriteReport.from_json(report.to_json()).regions[0].quant_errors == region.quant_errors


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_weights_that_change_are_quantised_again(inner: str) -> None:
    torch._dynamo.reset()
    model, report = Dense(), moe_compile.RewriteReport()
    made = moe_compile.compile(model, inner=inner, report=report, options={"quant": "fp8"})

    def check() -> None:
        assert off(made(tokens()), in_e4m3(model, tokens())) < 1e-5

    check()
    model.up.mul_(-3)
    check()
    model.down[1].fill_(0.5)
    check()
    model.down = nn.Parameter(model.down.detach() + 1)
    check()
    model.load_state_dict({name: -t for name, t in model.state_dict().items()})
    check()
    assert len(report.graphs) == 1


@torch.no_grad()
def test_graphs_share_quantised_weights_which_go_with_them() -> None:
    torch._dynamo.reset()
    gc.collect()
    before = len(quantising._held)
    model, report = Dense(), moe_compile.RewriteReport()
    made = moe_compile.compile(model, inner="eager", report=report, dynamic=False, options={"quant": "fp8"})
    for count in (3, 5):
        assert off(made(tokens(count=count)), in_e4m3(model, tokens(count=count))) < 1e-5
    assert len(report.graphs) == 2
    assert len(quantising._held) == before + 2
    del made, report
    torch._dynamo.reset()
    gc.collect()
    assert len(quantising._held) == before


def test_in_training_weights_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    logs.forget()
    model = Dense()
    made, seen, report = compiled(model, tokens(), quant="fp8")
    assert node(seen.graphs[0], "permute_experts_unpermute").args[7] == "eoi,eoi"
    assert "gradients are wanted" in (report.regions[0].quant or "")
    assert sum("gradients are wanted" in r.getMessage() for r in caplog.records) == 1
    assert off(made(tokens()), model(tokens())) < 1e-5


@torch.no_grad()
def test_weights_that_are_no_parameters_say_so() -> None:
    class Scaled(Dense):
        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            self.more = more
            out: Tensor = self.loop(x, *self.route(x))
            return out

        def expert(self, x: Tensor, e: int) -> Tensor:
            return F.linear(F.silu(F.linear(x, self.more[e])), self.down[e])

    model = Scaled()
    made, _, report = compiled(model, tokens(), model.up.detach() * 2, quant="fp8")
    assert "is no parameter or buffer of a module" in (report.regions[0].quant or ""), report
    assert off(made(tokens(), model.up.detach()), model(tokens(), model.up.detach())) < 1e-5
    gm = graph_of(Dense(), tokens())
    assert "compiled without tensors" in (rewrite(gm, quant="fp8").regions[0].quant or "")


@torch.no_grad()
def test_weights_that_are_quantised_already_stay() -> None:
    model = written("int8", lambda v, s: SPELLINGS["plain"](v, s, "int8"))
    _, seen, report = compiled(model, tokens(), quant="fp8")
    assert node(seen.graphs[0], "permute_experts_unpermute").args[7] == "eoi:int8,eoi:int8"
    assert "the model's own weights are quantised" in (report.regions[0].quant or "")


@torch.no_grad()
def test_the_graph_as_it_was_reads_no_quantised_weights() -> None:
    """An inner compiler that fails on the rewrite gets the user's graph, without buffers to look after."""

    def fails(gm: Any, inputs: Any) -> Any:
        if "permute_experts_unpermute" in calls(gm):
            raise RuntimeError("no such op")
        return gm.forward

    torch._dynamo.reset()
    model = Dense()
    made = moe_compile.compile(model, inner=fails, options={"quant": "fp8"})
    assert off(made(tokens()), model(tokens())) < 1e-6
