"""Quantised experts: formats there and back, and their kernels in Triton's interpreter against float64 of the dequantised weights."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases
from triton_cases import Sizes, routed

from moe_compile.ops import experts
from moe_compile.ops.comm.payload import dequantize as dequantize_rows
from moe_compile.ops.comm.payload import quantize_rows
from moe_compile.ops.kernels import configs_scaled, launch, launch_hopper, launch_scaled, launch_scaled_few
from moe_compile.ops.kernels.layers import layers_of
from moe_compile.ops.kernels.plan import plan_of_ids
from moe_compile.ops.layout import Params
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.quantized import KINDS, ROWS_TOO, Quantized, check, dequantize, quantize_weights, stored

CASES = Cases(__file__)
FIRST = {
    "halves": "silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {j}, 1)",
    "pairs": "clamp(cols(mm(0, x), 0, {j}, 2), None, 7.0) * sigmoid(cols(mm(0, x), 1, {j}, 2))",
    "biased": "gelu(cols(mm(0, x) + b(0), 0, {j}, 2)) * (cols(mm(0, x) + b(0), 1, {j}, 2) + 1.0)",
    "apart": "silu(mm(0, x)) * mm(1, x)",
    "one": "square(relu(mm(0, x)))",
}
SMALL = Sizes(7, 2, 4, 256, 128)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROUNDED = {torch.float32: 5e-3, torch.bfloat16: 5e-2}  # e4m3 between layers: a value between two numbers may become either, 6 to 12 % apart


def down(name: str, h: str, weight: int, bias: int) -> str:
    return f"(mm({weight}, {h}) + b({bias})) * w" if name == "biased" else f"mm({weight}, {h})"


def reference(text: str, x: Any, ids: Any, route_w: Any, weights: list[Any], biases: list[Any], top_k: int) -> Any:
    """[T, K, O] in float64. weights [E, O, I]."""
    order, offsets = counting_sort(ids, weights[0].shape[0])
    wide = [[each.double() for each in own] for own in (weights, biases)]
    layouts = ",".join("eoi" for _ in weights), ",".join("eo" for _ in biases)
    w = route_w.double() if "* w" in text else None
    found: Any = experts.OP.overload(x.double(), order, offsets, w, *wide, text, *layouts, top_k, "reference")
    return found


def wanted(name: str, s: Sizes, x: Any, ids: Any, route_w: Any, weights: list[Any], biases: list[Any], quantised: bool) -> Any:
    """The two layers one by one, with quantised rows between them if they are."""
    first = FIRST[name].format(i=s.inter, j=2 * s.inter)
    h = reference(first, x, ids, route_w, weights[:-1], biases[:1], s.top_k).flatten(0, 1)
    if quantised:
        h = dequantize_rows(*quantize_rows(h.float(), "fp8"), torch.float32)
    each = ids.reshape(-1, 1), route_w.reshape(-1, 1)
    return reference(down(name, "x", 0, 0), h, *each, weights[-1:], biases[1:], 1).view(s.tokens, s.top_k, s.hidden)


def parameters(
    name: str, kind: str, axes: str, group: int, s: Sizes, g: torch.Generator, by: float = 1.0
) -> tuple[list[Quantized], list[torch.Tensor]]:
    """by: times the first weights, and the last ones are divided by it."""
    wide = s.inter if name in ("apart", "one") else 2 * s.inter
    shapes = [(wide, s.hidden)] * (2 if name == "apart" else 1) + [(s.hidden, s.inter)]
    weights = [torch.randn((s.experts, *shape), generator=g) / shape[1] ** 0.5 for shape in shapes]
    weights[0], weights[-1] = weights[0] * by, weights[-1] / by
    weights = [w.transpose(1, 2) if axes == "io" else w for w in weights]
    biases = [torch.randn((s.experts, width), generator=g) for width in (wide, s.hidden)] if name == "biased" else []
    return [quantize_weights(w, kind, axes=axes, group=group) for w in weights], biases


def program_layers(name: str, s: Sizes, x: Any, weights: list[Any], biases: list[Any], dtype: torch.dtype) -> Any:
    text = down(name, FIRST[name].format(i=s.inter, j=2 * s.inter), len(weights) - 1, 1)
    stand_ins = [torch.empty(w.shape, dtype=dtype, device="meta") for w in weights]
    layouts = ",".join("eoi" for _ in weights), ",".join("eo" for _ in biases)
    w = torch.empty((s.tokens, s.top_k)) if name == "biased" else None
    call = experts.prepare_unsorted(x.to(dtype), s.experts, w, stand_ins, biases, text, *layouts, s.top_k)
    return layers_of(call.program, call.values)


def run(
    name: str, kind: str, s: Sizes = SMALL, *, axes: str = "oi", group: int = 128, block: int = 16, dtype: torch.dtype = torch.float32,
    routing: str = "holes", sent: str = "", by: float = 1.0,
) -> None:  # fmt: skip
    """sent: rows come e4m3, with scales of 128 columns ("groups") or of a row ("rows")."""
    device, dtype = where(dtype)
    g = torch.Generator().manual_seed(0)
    weights, biases = parameters(name, kind, axes, group, s, g, by)
    x, w = torch.randn((s.tokens, s.hidden), generator=g).to(dtype), torch.rand((s.tokens, s.top_k), generator=g)
    ids = routed(s, routing, g)
    dense = [dequantize(q).transpose(1, 2) if axes == "io" else dequantize(q) for q in weights]
    layers = program_layers(name, s, x, dense, biases, dtype)
    fp8 = kind in ROWS_TOO
    seen, scales = rows_seen(x, kind, sent) if fp8 else (x, None)
    want = wanted(name, s, dequantize_rows(*seen, torch.float32) if fp8 else x, ids, w, dense, biases, fp8)
    on = [q._replace(values=q.values.to(device), scales=q.scales.to(device)) for q in weights]
    plan = plan_of_ids(ids.to(device), s.experts, block or launch_scaled.block_rows(layers, on, ids.numel(), s.experts))
    params = Params([b.to(device) for b in biases], ",".join("eo" for _ in biases), s.experts, "biases")
    given = (seen[0].to(device), scales.to(device)) if sent else (x.to(device), None)
    y = launch_scaled.run(layers, given[0], w.to(device), on, params, s.top_k, plan, given[1])
    got = launch.to_slots(y, plan, ids.numel()).view(want.shape).cpu().double()
    limit = LIMITS[dtype] if not fp8 else ROUNDED[dtype]
    off = float((got - want).abs().max() / want.abs().max().clamp(min=1e-3)) if want.numel() else 0.0
    assert off < limit, f"{off:.1e}: {name} {kind} {s}"


def where(dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """(device, the rows' type): a GPU's tensor cores multiply no float32."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", dtype)


def rows_seen(x: Any, kind: str, sent: str) -> tuple[tuple[Any, Any], Any]:
    """((e4m3 rows, a scale for each 128 columns), the scales as they are sent)."""
    if sent == "groups" or (not sent and kind == "fp8_block"):
        rows, scales = quantize_rows(x, "fp8")
        return (rows, scales), scales
    scale = x.float().abs().amax(1, keepdim=True) / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn), scale.expand(-1, -(-x.shape[1] // 128))), scale


@CASES.add(*((name, kind) for name in FIRST for kind in KINDS))
def programs(name: str, kind: str) -> None:
    run(name, kind)


@CASES.add(*((name, kind) for name in ("halves", "pairs") for kind in KINDS if kind != "mxfp4"))
def input_times_output(name: str, kind: str) -> None:
    run(name, kind, axes="io")


@CASES.add(*((kind, axes) for kind in ("int8", "int4") for axes in ("oi", "io")))
def one_scale_an_output(kind: str, axes: str) -> None:
    run("halves", kind, axes=axes, group=0)


@CASES.add(*((kind,) for kind in KINDS))
def odd_sizes(kind: str) -> None:
    """Sizes that are no multiple of 128, one token, none, and more experts than tokens."""
    run("halves", kind, Sizes(5, 3, 8, 160 if kind == "mxfp4" else 150, 96))
    run("pairs", kind, Sizes(1, 1, 1, 96, 160), routing="random")
    run("one", kind, Sizes(0, 2, 4, 128, 128))


@CASES.add(*((kind,) for kind in KINDS))
def blocks(kind: str) -> None:
    """All block sizes with their tiles, several blocks of an expert, and the one that is chosen."""
    run("halves", kind, Sizes(70, 2, 3, 128, 128), block=32, routing="random")
    run("halves", kind, Sizes(70, 2, 3, 128, 128), block=64, routing="one")
    run("halves", kind, Sizes(70, 2, 2, 384, 128), block=128)
    run("one", kind, Sizes(70, 2, 2, 128, 384), block=128)
    run("pairs", kind, Sizes(70, 2, 3, 128, 128), block=0)


@CASES.add(*((kind,) for kind in KINDS))
def half_precision(kind: str) -> None:
    run("biased", kind, dtype=torch.bfloat16)


@CASES.add(*((kind, sent) for kind in ("fp8_block", "fp8_channel") for sent in ("groups", "rows")))
def rows_that_were_sent(kind: str, sent: str) -> None:
    run("halves", kind, sent=sent)


@CASES.add(
    *((kind, "oi", 128) for kind in KINDS), *((kind, "io", 128) for kind in KINDS if kind != "mxfp4"), ("int4", "oi", 0), ("int8", "io", 0)
)
def one_token(kind: str, axes: str, group: int) -> None:
    """Slots by themselves, from rows that are not quantised."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = configs_scaled.strip
    wider = (lambda *args: (32, *chosen(*args)[1:])) if device == "cpu" else chosen  # in few programs, which the interpreter runs in turn
    for name, s in (("biased", Sizes(1, 3, 4, 160, 96 if kind == "mxfp4" else 100)), ("apart", Sizes(2, 2, 3, 256, 128))):
        g = torch.Generator().manual_seed(1)
        weights, biases = parameters(name, kind, axes, group, s, g)
        x, w, sums = torch.randn((s.tokens, s.hidden), generator=g), torch.rand((s.tokens, s.top_k), generator=g), torch.rand(2, 3)
        ids, sums = routed(s, "holes", g), sums[: s.tokens, : s.top_k]
        dense = [dequantize(q).transpose(1, 2) if axes == "io" else dequantize(q) for q in weights]
        layers = program_layers(name, s, x, dense, biases, torch.float32)
        want = (wanted(name, s, x, ids, w, dense, biases, False) * sums[:, :, None]).sum(1)
        on = [q._replace(values=q.values.to(device), scales=q.scales.to(device)) for q in weights]
        params = Params([b.to(device) for b in biases], ",".join("eo" for _ in biases), s.experts, "biases")
        args = [t.to(device) for t in (x, ids, w, sums)]
        with mock.patch.object(configs_scaled, "strip", wider):
            got = launch_scaled_few.run(layers, args[0], args[1], s.experts, on, params, args[2], args[3], torch.float32).cpu()
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5, (name, s)


@CASES.add(("fp8_block",), ("int8",), ("mxfp4",))
def weighted_rows(kind: str) -> None:
    """Rows that are changed before their product."""
    device, dtype = where(torch.float32)
    s, g = SMALL, torch.Generator().manual_seed(0)
    (q, *_), _ = parameters("one", kind, "oi", 128, s, g)
    x, w = torch.randn((s.tokens, s.hidden), generator=g).to(dtype), torch.rand((s.tokens, s.top_k), generator=g).to(dtype)
    ids = routed(s, "holes", g)
    text = "relu(mm(0, x * w))"
    call = experts.prepare_unsorted(x, s.experts, w, [dequantize(q).to(dtype)], [], text, "eoi", "", s.top_k)
    layers, plan = layers_of(call.program, call.values), plan_of_ids(ids.to(device), s.experts, 16)
    on = q._replace(values=q.values.to(device), scales=q.scales.to(device))
    y = launch_scaled.run(layers, x.to(device), w.to(device), [on], Params([], "", s.experts, "biases"), s.top_k, plan)
    each = (x[:, None] * w[:, :, None]).flatten(0, 1)
    if kind == "fp8_block":
        each = dequantize_rows(*quantize_rows(each, "fp8"), torch.float32)
    want = reference("relu(mm(0, x))", each, ids.reshape(-1, 1), w.reshape(-1, 1), [dequantize(q)], [], 1)[:, 0]
    got = launch.to_slots(y, plan, ids.numel()).cpu()
    assert float((got - want).abs().max() / want.abs().max()) < max(LIMITS[dtype], 5e-3)


@CASES.add(*((kind, block, power) for kind in ("mxfp4", "int4") for block in (16, 128) for power in (60, -60)))
def scales_far_from_one(kind: str, block: int, power: int) -> None:
    run("one", kind, block=block, by=2.0**power)


@CASES.add(("fp8_block", 16), ("fp8_channel", 16), ("fp8_block", 128))
def tokens_that_are_not_numbers(kind: str, block: int) -> None:
    """A NaN stays in its token's rows, and is seen there."""
    device, dtype = where(torch.float32)
    s, g = SMALL, torch.Generator().manual_seed(0)
    weights, _ = parameters("halves", kind, "oi", 128, s, g)
    x, ids = torch.randn((s.tokens, s.hidden), generator=g).to(dtype), routed(s, "random", g)
    x[3, 17] = float("nan")
    layers = program_layers("halves", s, x, [dequantize(q) for q in weights], [], dtype)
    on = [q._replace(values=q.values.to(device), scales=q.scales.to(device)) for q in weights]
    plan, none = plan_of_ids(ids.to(device), s.experts, block), Params([], "", s.experts, "biases")
    y = launch_scaled.run(layers, x.to(device), None, on, none, s.top_k, plan)
    bad = launch.to_slots(y, plan, ids.numel()).view(s.tokens, s.top_k, -1).isnan()
    assert bad[3].all()
    assert not bad[[0, 1, 2, 4, 5, 6]].any()


test_in_interpreter = CASES.test()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES.functions)
def test_on_a_gpu(name: str) -> None:
    CASES.functions[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["random", "holes", "one"])
@pytest.mark.parametrize("sent", ["", "rows", "groups"])
@pytest.mark.parametrize("kind", ["fp8_block", "fp8_channel"])
def test_roles_for_warps(kind: str, sent: str, routing: str) -> None:
    """The kernel for many rows on Hopper: tails of inputs and of columns, more tiles than programs, experts without tokens."""
    if not launch_hopper.on_hopper(torch.device("cuda", 0)):
        pytest.skip("for Hopper alone")
    sizes = {
        "halves": (Sizes(70, 2, 2, 384, 128), Sizes(700, 4, 9, 272, 256), Sizes(3000, 4, 40, 2048, 640)),
        "apart": (Sizes(300, 2, 3, 400, 144), Sizes(129, 1, 2, 128, 48)),
        "one": (Sizes(1, 1, 1, 256, 128), Sizes(513, 3, 5, 1040, 336)),
    }
    for name, all_of in sizes.items():
        for s in all_of:
            with mock.patch.object(launch_hopper, "run", wraps=launch_hopper.run) as ran:
                run(name, kind, s, sent=sent, block=128, routing=routing)
            assert ran.call_count == 2


# ---------------------------------------------------------------- formats
@pytest.mark.parametrize("axes", ["oi", "io"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, axes: str) -> None:
    if (kind, axes) == ("mxfp4", "io"):
        return
    off = {"fp8_block": 0.03, "fp8_channel": 0.03, "mxfp4": 0.13, "int8": 0.008, "int4": 0.14}[stored(kind)]
    w = torch.randn((3, 200, 352), generator=torch.Generator().manual_seed(0))
    w = w.transpose(1, 2) if axes == "io" else w
    for group in (0, 128):
        q = quantize_weights(w, kind, axes=axes, group=group)
        check(q)
        assert q.fan == (352, 200)
        back = dequantize(q)
        assert back.shape == w.shape
        assert float((back - w).norm() / w.norm()) < off
        assert torch.equal(dequantize(quantize_weights(back, kind, axes=axes, group=group)), back)


def test_microscaling_numbers() -> None:
    """Every code, in GPT-OSS's layout: the low half of a byte first."""
    values = torch.arange(16, dtype=torch.uint8) | (torch.arange(15, -1, -1, dtype=torch.uint8) << 4)
    q = Quantized(values.view(1, 1, 1, 16), torch.tensor([[[128]]], dtype=torch.uint8), "mxfp4")
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    assert torch.equal(dequantize(q).view(16, 2), 2 * torch.stack([numbers, numbers.flip(0)], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros(kind: str) -> None:
    assert torch.equal(dequantize(quantize_weights(torch.zeros(1, 128, 128), kind)), torch.zeros(1, 128, 128))


def test_bad_formats() -> None:
    w = torch.randn(2, 64, 96)
    q = quantize_weights(w, "int8")
    for made, words in (
        (lambda: quantize_weights(w, "fp6"), "must be one of fp8_block, .* got 'fp6'"),
        (lambda: quantize_weights(w, "mxfp4", axes="io"), "axes must be 'oi'"),
        (lambda: quantize_weights(w, "int8", axes="oo"), "'oi' or 'io', got 'oo'"),
        (lambda: quantize_weights(w[:, :, :80], "mxfp4"), "multiple of 32, got 80"),
        (lambda: quantize_weights(w[0], "int8"), "floating-point"),
        (lambda: quantize_weights(w, "int8", group=64), "128 inputs or 0"),
        (lambda: quantize_weights(w[:0], "int8"), "no experts"),
        (lambda: check(q._replace(scales=q.scales[:, :, :0])), "scales of kind 'int8'"),
        (lambda: check(q._replace(values=q.values.float())), "values of kind 'int8' must be torch.int8"),
        (lambda: check(q._replace(scales=q.scales.to("meta"))), "one device"),
    ):
        with pytest.raises(ValueError, match=words):
            made()


def test_bad_rows() -> None:
    s = SMALL
    weights, _ = parameters("halves", "fp8_block", "oi", 128, s, torch.Generator())
    x = torch.randn(s.tokens, s.hidden)
    layers = program_layers("halves", s, x, [dequantize(q) for q in weights], [], torch.float32)
    rows, scales = quantize_rows(x, "fp8")
    none = Params([], "", s.experts, "biases")

    def call(x: Any, x_scales: Any = None, own: Any = weights) -> None:
        launch_scaled.run(layers, x, None, own, none, s.top_k, None, x_scales)  # type: ignore[arg-type]

    int8 = [quantize_weights(dequantize(q), "int8") for q in weights]
    for args, words in (
        ((rows,), "e4m3 without scales"),
        ((rows, scales[:, :0]), r"x_scales must be float32 \[7, 2\] or \[7, 1\], got torch.float32 \[7, 0\]"),
        ((x, scales), "rows with scales must be e4m3"),
        ((rows, scales, int8), "fp8_block or fp8_channel, got rows of torch.float8_e4m3fn for int8"),
        ((x[:, :128],), "x has 128 columns, the first layer's weights have 256 inputs"),
    ):
        with pytest.raises(ValueError, match=words):
            call(*args)
    two = program_layers("apart", s, x, [torch.empty(4, 128, 256), torch.empty(4, 128, 256), torch.empty(4, 256, 128)], [], torch.float32)
    mixed = [weights[0]._replace(values=weights[0].values[:, :128], scales=weights[0].scales[:, :1]), int8[0], weights[1]]
    with pytest.raises(ValueError, match="quantised alike, got fp8_block oi with 256 inputs in groups and int8 oi"):
        launch_scaled.run(two, x, None, mixed, none, s.top_k, None)  # type: ignore[arg-type]


if __name__ == "__main__":
    CASES.main()
