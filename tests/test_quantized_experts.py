"""Quantised weights in the stage ops: providers against the formula, layouts, the pass that sinks dequantize_experts, and quant="fp8"."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Dense, E, Recorder, block, calls, graph_of, node, rewrite, tokens
from interpreted import Cases
from torch import Tensor, nn
from triton_cases import APART, BIASED, HALVES, PAIRS, WEIGHTED_ROWS, Sizes, parameters, routed

import moe_compile
from moe_compile import logs, quantising
from moe_compile.ops import exchange_experts, experts, experts_combine, experts_triton, local_experts, quantize_experts, registry
from moe_compile.ops.comm.payload import dequantize as dequantize_rows
from moe_compile.ops.comm.payload import quantize_rows
from moe_compile.ops.kernels import configs_scaled
from moe_compile.ops.layout import Params, parse_layout
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.quantized import KINDS, ROWS_TOO, WEIGHTS_ONLY, dequantize, quantize_weights, rounded_rows

CASES = Cases(__file__)
SMALL = Sizes(6, 2, 3, 160, 64)
PROGRAMS = {"halves": HALVES, "pairs": PAIRS, "biased": BIASED, "apart": APART, "weighted rows": WEIGHTED_ROWS}
OPS, STRIP = torch.ops.moe_compile, configs_scaled.strip


class Layer:
    """A program with quantised weights on random rows, and its calls by any provider."""

    def __init__(self, program: str, kind: str, axes: str = "oi", s: Sizes = SMALL, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(0)
        weights, biases, _ = parameters(PROGRAMS[program], "e" + axes, s, g)
        self.s, self.text, self.kind = s, PROGRAMS[program].format(i=s.inter, j=2 * s.inter), kind
        self.quantized = [quantize_weights(w, kind, axes=axes) for w in weights]
        self.flat = [t for q in self.quantized for t in (q.values, q.scales)]
        self.biases = [b.to(dtype) for b in biases]
        self.layout = ",".join(f"e{axes}:{kind}" for _ in weights)
        self.x, self.w = torch.randn((s.tokens, s.hidden), generator=g).to(dtype), torch.rand((s.tokens, s.top_k), generator=g)
        self.ids = routed(s, "holes", g)
        self.order, self.offsets = counting_sort(self.ids, s.experts)
        self.inner = self.w if "w" in self.text.replace("where", "") else None

    @property
    def texts(self) -> tuple[str, str, str, int]:
        return self.text, self.layout, ",".join("eo" for _ in self.biases), self.s.top_k

    def rows(self, provider: str, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        y: Tensor = experts.OP.overload(x, self.order, self.offsets, self.inner, self.flat, self.biases, *self.texts, provider)
        return y

    def on(self, device: str) -> Layer:
        """The same on a device."""
        moved = copy.copy(self)
        for name in ("x", "w", "ids", "order", "offsets", "inner"):
            setattr(moved, name, None if getattr(self, name) is None else getattr(self, name).to(device))
        moved.flat, moved.biases = [t.to(device) for t in self.flat], [b.to(device) for b in self.biases]
        return moved

    def wanted(self) -> Tensor:
        """The reference in float64."""
        wide = copy.copy(self)
        wide.biases, wide.inner = [b.double() for b in self.biases], None if self.inner is None else self.inner.double()
        return wide.rows("reference", self.x.double())

    def dense(self) -> Tensor:
        """With the weights that the quantised ones stand for."""
        weights = [dequantize(q).double() for q in self.quantized]
        layout = ",".join("e" + q.axes for q in self.quantized)
        inner = None if self.inner is None else self.inner.double()
        args = (self.x.double(), self.order, self.offsets, inner, weights, [b.double() for b in self.biases])
        y: Tensor = experts.OP.overload(*args, self.text, layout, *self.texts[2:], "reference")
        return y


def off(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.detach().cpu().double() - want.detach().double()).abs().max() / want.detach().double().abs().max())


LIMIT = {kind: 5e-3 if kind in ROWS_TOO else 1e-5 for kind in KINDS}  # between two e4m3 numbers a value may become either
ROUNDED = {kind: 6e-2 if kind in ROWS_TOO else 2e-2 for kind in KINDS}  # with rows of bfloat16


def here() -> tuple[str, torch.dtype, dict[str, float]]:
    """(device, the rows' dtype, limits): a GPU's tensor cores multiply no float32."""
    return ("cuda", torch.bfloat16, ROUNDED) if torch.cuda.is_available() else ("cpu", torch.float32, LIMIT)


@CASES.add(
    *(("halves", kind, "oi") for kind in KINDS),
    *((name, kind, "oi") for name in ("pairs", "weighted rows") for kind in ("fp8_block", "fp8_block_w")),
    *(("biased", kind, "io") for kind in ("fp8_block", "int4")),
    ("apart", "fp8_channel", "io"),
    ("apart", "mxfp4", "oi"),
    ("weighted rows", "int8", "oi"),
)
def all_ops(name: str, kind: str, axes: str) -> None:
    """By the Triton kernels: the slots' rows, their sum, the sum from the ids, and for one token."""
    device, dtype, limit = here()
    layer = Layer(name, kind, axes, dtype=dtype)
    want, dense, s, w = layer.wanted(), layer.dense(), layer.s, layer.w
    layer = layer.on(device)
    assert off(layer.rows("triton"), want) < limit[kind]
    total = (want * w[:, :, None]).sum(1)
    args = (layer.inner, layer.flat, layer.biases, *layer.texts)
    out = experts_combine.OP.overload(layer.x, layer.order, layer.offsets, *args, layer.w, None, "triton")
    assert off(out, total) < limit[kind]
    whole = local_experts.OP.overload(layer.x, layer.ids, s.experts, *args[:-1], layer.w, None, "triton")
    assert off(whole, total) < limit[kind]
    if name != "weighted rows":  # one token's rows are not quantised
        inner = None if layer.inner is None else layer.inner[:1]
        wide = (lambda *args: (32, *STRIP(*args)[1:])) if device == "cpu" else STRIP  # in few programs, which run in turn
        with mock.patch.object(configs_scaled, "strip", wide):
            few = local_experts.OP.overload(layer.x[:1], layer.ids[:1], s.experts, inner, *args[1:-1], layer.w[:1], None, "triton")
        assert off(few, (dense * w[:, :, None]).sum(1)[:1]) < limit["int8"]


@CASES.add(("halves",), ("weighted rows",))
def rows_that_an_exchange_brought(name: str) -> None:
    """e4m3 rows with scales go into the kernels as they are."""
    device, dtype, limit = here()
    layer = Layer(name, "fp8_block", dtype=dtype).on(device)
    rows, scales = quantize_rows(layer.x, "fp8")
    inputs = (layer.order, layer.offsets, layer.inner, layer.flat, layer.biases, *layer.texts)
    call = experts.with_e4m3(experts.prepare(experts.stand_in(rows, dtype), *inputs), rows, scales)
    y, places = experts_triton.KERNELS[experts.SORTED_E4M3](call)
    plain = layer.rows("triton", dequantize_rows(rows, scales, dtype)).flatten(0, 1).cpu()
    for slot, place in enumerate(places.tolist()):
        assert place < 0 or off(y[place], plain[slot]) < limit["fp8_block"]


test_in_interpreter = CASES.test()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES.functions)
def test_on_a_gpu(name: str) -> None:
    CASES.functions[name]()


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


# ---------------------------------------------------------------- providers on a CPU
@pytest.mark.parametrize("axes", ["oi", "io"])
@pytest.mark.parametrize("kind", WEIGHTS_ONLY)
def test_weights_alone_are_what_they_stand_for(kind: str, axes: str) -> None:
    if (kind, axes) != ("mxfp4", "io"):
        layer = Layer("biased", kind, axes)
        assert off(layer.wanted(), layer.dense()) < 1e-12


@pytest.mark.parametrize("kind", ROWS_TOO)
def test_rows_are_quantised_in_front_of_each_product(kind: str) -> None:
    layer = Layer("apart", kind)
    gate, up, down = (dequantize(q).double() for q in layer.quantized)
    y = layer.wanted()
    for (t, k), e in ((at, int(e)) for at, e in zip(torch.cartesian_prod(torch.arange(6), torch.arange(2)), layer.ids.flatten())):
        if 0 <= e < layer.s.experts:
            scale = layer.x[t].abs().max() / 448
            own = (layer.x[t] / scale).to(torch.float8_e4m3fn).float() * scale
            x = dequantize_rows(*quantize_rows(layer.x[t : t + 1], "fp8"), torch.float32)[0] if kind == "fp8_block" else own
            h = nn.functional.silu(gate[e] @ x.double()) * (up[e] @ x.double())
            h = dequantize_rows(*quantize_rows(h[None], "fp8"), torch.float64)[0]
            assert off(y[t, k], down[e] @ h) < 1e-6
        else:
            assert not y[t, k].any()


@pytest.mark.parametrize("program", ["halves", "biased", "weighted rows"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", ["cpu_grouped", "cuda_grouped_mm"])
def test_other_providers_are_the_reference(provider: str, kind: str, program: str) -> None:
    """cuda_grouped_mm too: torch's grouped_mm runs bfloat16 on a CPU."""
    dtype = torch.float32 if provider == "cpu_grouped" else torch.bfloat16
    layer = Layer(program, kind, dtype=dtype)
    want = layer.wanted()
    assert off(layer.rows(provider), want) < (LIMIT[kind] if dtype == torch.float32 else 5e-2)
    args = (layer.x, layer.order, layer.offsets, layer.inner, layer.flat, layer.biases, *layer.texts, layer.w, torch.float32, provider)
    total = (want * layer.w[:, :, None]).sum(1)
    assert off(experts_combine.OP.overload(*args), total) < (LIMIT[kind] if dtype == torch.float32 else 5e-2)


def test_rounded_rows_are_e4m3_and_keep_their_type() -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    assert torch.equal(rounded_rows(x, True), dequantize_rows(*quantize_rows(x, "fp8"), torch.float32))
    once = rounded_rows(x.double(), False)
    assert once.dtype == torch.float64
    assert torch.equal(rounded_rows(once, False), once)
    assert 0 < off(once, x.double()) < 0.07
    assert rounded_rows(x[:, :0], False).shape == (3, 0)


# ---------------------------------------------------------------- ops and layouts
def test_ops_and_their_fakes() -> None:
    tests = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")  # test_schema compares no e4m3
    for w, kind, axes in quantize_experts.sample_inputs():
        values, scales = OPS.quantize_experts(w, kind, axes)
        q = quantize_weights(w, kind, axes=axes)
        assert torch.equal(values.view(torch.uint8), q.values.view(torch.uint8))
        assert torch.equal(scales, q.scales)
        back = OPS.dequantize_experts(values, scales, kind, axes, torch.bfloat16)
        assert torch.equal(back, dequantize(q).bfloat16())
        torch.library.opcheck(OPS.quantize_experts.default, (w, kind, axes), test_utils=tests[:2])
        torch.library.opcheck(OPS.dequantize_experts.default, (values, scales, kind, axes, torch.float32), test_utils=tests[:2])


def test_scales_of_any_float_type() -> None:
    q = quantize_weights(torch.randn(2, 256, 128), "int8")
    wide = q._replace(scales=q.scales.float())
    assert torch.equal(dequantize(wide), dequantize(q))


def test_layout_entries() -> None:
    first, second, third = parse_layout("eoi:fp8_block_w, eio,eio:int4")
    assert (first.kind, first.axes, first.first, first.num, first.stacked) == ("fp8_block_w", "oi", 0, 2, True)
    assert (second.kind, second.first, second.num) == ("", 2, 1)
    assert (third.kind, third.axes, third.first, third.num) == ("int4", "io", 3, 2)
    q = quantize_weights(torch.randn(3, 64, 40), "int4", axes="io")
    params = Params([q.values, q.scales], "eio:int4", 3, "weight")
    assert params.fan(0) == (64, 40)
    assert torch.equal(params.of(0, 1), dequantize(q)[1])
    assert torch.equal(torch.stack(params.all(0, transposed=True)), dequantize(q).transpose(1, 2))


def test_what_does_not_fit_is_named() -> None:
    layer = Layer("halves", "int8")
    for layout, words in (
        ("eoi:int7,eoi:int8", "'eoi:int7' is none of .*int8"),
        ("oi*4:int8,eoi:int8", "is none of"),
        ("eoi:int8", "describes 2 tensors, got 4"),
        ("eoi:fp8_block,eoi:int8", "weight 0: values of kind 'fp8_block' must be torch.float8_e4m3fn"),
        ("eio:int8,eoi:int8", "weight 0: scales of kind 'int8'"),
    ):
        layer.layout = layout
        with pytest.raises(ValueError, match=words):
            layer.rows("reference")


def test_gradients_are_refused() -> None:
    layer = Layer("halves", "int8")
    layer.x.requires_grad_()
    args = (layer.flat, layer.biases, *layer.texts)
    for run in (
        lambda: layer.rows("cpu_grouped"),
        lambda: experts_combine.OP.overload(layer.x, layer.order, layer.offsets, None, *args, None, None, "cpu_grouped"),
        lambda: local_experts.OP.overload(layer.x, layer.ids, 3, None, *args[:-1], None, None, "cpu_grouped"),
    ):
        with pytest.raises(ValueError, match=r"'eoi:int8,eoi:int8'\) have no gradients; call them under torch.no_grad"):
            run()
        with torch.no_grad():
            run()


@pytest.mark.parametrize(
    ("provider", "change", "words"),
    [
        ("inline", {"device": "cpu", "compiler": "inductor"}, "inline multiplies weights of a float type"),
        ("reference", {"training": True}, "have no gradients"),
        ("cpu_grouped", {"training": True, "device": "cpu"}, "have no gradients"),
        ("triton", {"training": True}, "have no gradients"),
        ("triton", {"weight_layout": "eoi:int8,eoi"}, "all weights of a program are quantised, or none"),
        ("triton", {"weight_layout": "eoi:int8,eoi:int4,eoi:int8", "program": APART}, "weights of one kind at a time"),
        ("triton", {"dtype": torch.float32}, "bfloat16 or float16, they are float32"),
        ("triton", {"weight_layout": "eoi:fp8_block,eoi:fp8_block"}, "from compute capability 9.0 on, cuda has 8.0"),
        ("triton", {"weight_layout": "eoi:fp8_block_w,eoi:fp8_block_w"}, "from compute capability 9.0 on, cuda has 8.0"),
        ("triton", {}, None),
        ("cuda_grouped_mm", {}, None),
        ("cpu_grouped", {"device": "cpu"}, None),
    ],
)
def test_providers_say_why_they_cannot(provider: str, change: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    text = HALVES.format(i=128, j=256)
    fields = {"device": "cuda", "dtype": torch.bfloat16, "hidden": 256, "intermediate": 128, "num_experts": 4, "top_k": 2, "tokens": 64}
    fields |= {"program": text, "weight_layout": "eoi:int8,eoi:int8", **change}
    reason = registry.get("experts", provider).supports(registry.Problem("experts", **fields))  # type: ignore[arg-type]
    assert reason is None if words is None else words in (reason or "")


def test_mixed_weights_are_an_error_in_the_kernels() -> None:
    layer = Layer("halves", "int8")
    layer.flat, layer.layout = [*layer.flat[:2], dequantize(layer.quantized[1])], "eoi:int8,eoi"
    with pytest.raises(ValueError, match="all weights of a program are quantised, or none"):
        layer.rows("triton")
    assert off(layer.rows("cpu_grouped"), layer.dense()) < 1e-5


def test_rows_of_an_exchange_reach_a_provider_that_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were sent, where all weights ask for e4m3; else in the model's dtype."""
    seen: list[torch.dtype] = []

    def rows_of(call: experts.Call) -> Any:
        seen.append(call.x.dtype)
        x = call.x if call.x_scales is None else dequantize_rows(call.x, call.x_scales, torch.float32)
        plain = experts.prepare(x, call.order, call.offsets, None, *call_params)
        y = registry.kernel("experts", "reference", experts.NAME)(plain).flatten(0, 1)
        return y, torch.arange(len(y), dtype=torch.int32)

    kernels = {experts.SORTED: rows_of, experts.SORTED_E4M3: rows_of}
    monkeypatch.setitem(registry._providers, ("experts", "takes"), registry.Provider("takes", "experts", kernels, lambda problem: 0.0))
    for kind in ("fp8_block", "fp8_block_w"):
        layer = Layer("halves", kind)
        call_params = (layer.flat, [], *layer.texts)
        rows, scales = quantize_rows(layer.x, "fp8")
        got = SimpleNamespace(rows=rows, scales=scales, ids=layer.ids, weights=[], handle=[])
        own = SimpleNamespace(setup=SimpleNamespace(quant="fp8"), format="standard", dispatch_views=lambda *args, got=got: got)
        own.collect_slots = lambda y, places, w, handle, dtype: y[places.long().flatten()]
        monkeypatch.setattr(exchange_experts.exchange, "exchange_of", lambda *args, own=own: own)
        monkeypatch.setattr(exchange_experts, "received_slots", lambda *args, layer=layer, **fields: (layer.order, layer.offsets))
        args = (layer.x, layer.ids, [], -1, -1, None, *call_params, None, "none", "takes", "")
        want = layer.rows("reference", dequantize_rows(rows, scales, torch.float32)).flatten(0, 1)
        assert off(exchange_experts.run(*args), want) < 1e-5
    assert seen == [torch.float8_e4m3fn, torch.float32]


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


if __name__ == "__main__":
    CASES.main()
