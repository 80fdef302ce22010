"""Quantised weights in the stage ops: providers against the formula, and layouts."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases
from quantized_blocks import off
from torch import Tensor, nn
from triton_cases import APART, BIASED, HALVES, PAIRS, WEIGHTED_ROWS, Sizes, parameters, routed

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


if __name__ == "__main__":
    CASES.main()
