"""Experts of the batched format, [E, capacity, H] with counts: against the loop over experts, in the interpreter and on a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from interpreted import Cases
from triton_cases import APART, DEEP, HALVES, ONE, PAIRS, SINGLE, Sizes, parameters

from moe_compile.ops import exchange_experts, experts, experts_batched, experts_triton, registry
from moe_compile.ops.comm import exchange, payload
from moe_compile.ops.kernels import configs, launch_batched, launch_scaled
from moe_compile.ops.kernels.layers import layers_of
from moe_compile.ops.kernels.plan import plan_of_counts
from moe_compile.ops.layout import Params
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.quantized import dequantize, quantize_weights

CASES = Cases(__file__)
BOTH_BIASES = "mm(1, gelu(cols(mm(0, x) + b(0), 0, {j}, 2)) * (cols(mm(0, x) + b(0), 1, {j}, 2) + 1.0)) + b(1)"
CHANGED = "mm(1, relu(mm(0, x * 0.5)))"
PROGRAMS = {
    "halves": HALVES, "pairs": PAIRS, "apart": APART, "one": ONE, "deep": DEEP, "single": SINGLE, "biased": BOTH_BIASES, "changed": CHANGED,
}  # fmt: skip
LAYOUTS = ("eoi", "eio", "oi*", "io*")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
COUNTS = (3, 0, 20, 16)


def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def rows_of(counts: tuple[int, ...], capacity: int, hidden: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [E * capacity, hidden], NaN beyond the counts; which rows are within them)."""
    used = (torch.arange(capacity) < torch.tensor(counts).unsqueeze(1)).flatten()
    rows = torch.randn((len(counts) * capacity, hidden), generator=g)
    rows[~used] = float("nan")
    return rows, used


class Layer(NamedTuple):
    """One layer's arguments, beside the rows."""

    weights: list[Any]
    biases: list[Any]
    text: str
    layouts: tuple[str, str]

    def wanted(self, rows: Any, used: Any, counts: tuple[int, ...], to: Any = torch.float64) -> Any:
        """The used rows' results by the loop over experts."""
        ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
        order, offsets = counting_sort(ids, len(counts))
        wide = [[each.to(to) for each in own] for own in (self.weights, self.biases)]
        return experts.OP.overload(rows[used].to(to), order, offsets, None, *wide, self.text, *self.layouts, 1, "reference").flatten(0, 1)

    def call(self, rows: Any, num_experts: int) -> experts.Call:
        own = [[each.to(rows.device) for each in params] for params in (self.weights, self.biases)]
        return experts.prepare_unsorted(rows, num_experts, None, *own, self.text, *self.layouts, 1)


def layer_of(program: str, layout: str, s: Sizes, g: torch.Generator, dtype: torch.dtype) -> Layer:
    weights, biases, layouts = parameters(program, layout, s, g)
    if program == BOTH_BIASES:
        biases = [torch.randn((s.experts, width), generator=g) for width in (2 * s.inter, s.hidden)]
    own = [[each.to(dtype) for each in params] for params in (weights, biases)]
    return Layer(*own, program.format(i=s.inter, j=2 * s.inter), (layouts, ",".join("eo" for _ in biases)))


def limit_of(dtype: torch.dtype, kind: str) -> float:
    """With e4m3 between layers a value between two numbers may become either, 6 to 12 % apart: more often where it was rounded before."""
    return LIMITS[dtype] if not kind.startswith("fp8") else 5e-3 if dtype == torch.float32 else 5e-2


def close(got: Any, wanted: Any, limit: float, what: str) -> None:
    assert got.shape == wanted.shape, what
    if wanted.numel():
        off = float((got.cpu().double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-3))
        assert off < limit, f"{off:.1e}: {what}"


def run(
    program: str, layout: str, counts: tuple[int, ...] = COUNTS, capacity: int = 20, *, hidden: int = 24, inter: int = 16, block: int = 0,
    dtype: torch.dtype = torch.float32, most: int | None = None, narrow: bool = False, **changes: Any,
) -> None:  # fmt: skip
    """The provider's kernel on NaN-padded rows. most: that is told, by default as many as there are places. changes: of the tiles."""
    g = torch.Generator().manual_seed(0)
    s = Sizes(0, 1, len(counts), hidden, inter)
    layer = layer_of(program, layout, s, g, dtype)
    rows, used = rows_of(counts, capacity, hidden, g)
    rows = rows.to(dtype)
    given = torch.cat([rows, torch.full_like(rows, float("nan"))], 1)[:, :hidden] if narrow else rows
    places = len(counts) * capacity
    batch = experts_batched.Batch(
        torch.tensor(counts, dtype=torch.int32, device=device()), capacity, max(1, sum(counts)), places if most is None else most
    )
    rules, tiles = configs.block_rows, configs.tiles
    with (
        mock.patch.object(configs, "block_rows", lambda shape: block or rules(shape)),
        mock.patch.object(configs, "tiles", lambda *args: configs.changed(tiles(*args), args[0], **changes)),
    ):
        call = layer.call(given.to(device()), len(counts))
        experts_batched.check(call, batch)
        got = experts_triton.KERNELS[experts_batched.NAME](call, batch)
    assert got.shape == (places, call.values[-1].width)
    close(got[used.to(got.device)], layer.wanted(rows, used, counts), LIMITS[dtype], f"{program} {layout} {counts} of {capacity}")


@CASES.add(*((name, layout) for name in PROGRAMS for layout in LAYOUTS))
def programs(name: str, layout: str) -> None:
    run(PROGRAMS[name], layout)


@CASES.add(
    *((counts, capacity) for counts, capacity in (
        ((0, 0, 0), 16), ((16, 16), 16), ((17, 1, 0, 33), 33), ((33,), 33), ((1,), 16), ((0,), 40), ((3, 5, 0), 5), ((1, 0), 1), ((5,), 7),
        ((0, 0), 0),
    ))
)  # fmt: skip
def counts_and_capacities(counts: tuple[int, ...], capacity: int) -> None:
    """None, all, one expert, capacities that no block fits into, or not evenly; and the fewest blocks that there can be."""
    run(HALVES, "eoi", counts, capacity, most=sum(counts))
    run(ONE, "io*", counts, capacity, narrow=True)


@CASES.add(*((rows, name) for rows in (16, 32, 64, 128) for name in ("halves", "one")))
def blocks(rows: int, name: str) -> None:
    """Several blocks of an expert, the last one shifted, and the tiles that are chosen for them."""
    run(PROGRAMS[name], "eoi", (130, 7, 150), 150, block=rows, hidden=32)


@CASES.add((torch.bfloat16,), (torch.float16,))
def half_precision(dtype: torch.dtype) -> None:
    run(HALVES, "eoi", dtype=dtype)


@CASES.add()
def persistent_tiles() -> None:
    run(HALVES, "eoi", (40, 33), 41, hidden=40, inter=40, block=32, persistent=True, half=True, cols=32, group=2)


@CASES.add()
def rows_beyond_the_counts_are_not_written_by_others() -> None:
    """A block beyond an expert's rows ends before the next expert's: results are the same bits wherever the others' rows end."""
    g = torch.Generator().manual_seed(0)
    layer = layer_of(HALVES, "eoi", Sizes(0, 1, 3, 24, 16), g, torch.float32)
    rows, _ = rows_of((19, 19, 19), 19, 24, g)
    found = []
    for first in (19, 17, 1):
        batch = experts_batched.Batch(torch.tensor([first, 19, 3], dtype=torch.int32, device=device()), 19, 40, 57)
        found.append(experts_triton.KERNELS[experts_batched.NAME](layer.call(rows.to(device()), 3), batch)[19:41])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ---------------------------------------------------------------- quantised
@CASES.add((130, (2, 0, 20)), (1100, (9, 17)), (96, (0, 0)))
def rows_that_came_in_e4m3(hidden: int, counts: tuple[int, ...]) -> None:
    rows, used = rows_of(counts, 20, hidden, torch.Generator().manual_seed(1))
    values, scales = payload.quantize_rows(rows, "fp8")
    scales[~used] = float("nan")
    given = values.to(device()), scales.to(device()), torch.tensor(counts, dtype=torch.int32, device=device())
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32  # the interpreter cuts bits off for bfloat16
    got = launch_batched.dequantize(*given, max(1, sum(counts)), dtype)
    assert torch.equal(got.cpu()[used], payload.dequantize(values, scales, dtype)[used])


@CASES.add(
    *((kind, sent, capacity) for kind in ("fp8_block", "fp8_channel") for sent in ("", "groups", "rows") for capacity in (20, 32)),
    ("int8", "", 20), ("int4", "", 20), ("fp8_block", "groups", 9),
)  # fmt: skip
def quantised_weights(kind: str, sent: str, capacity: int) -> None:
    """sent: rows come in e4m3, with scales of 128 columns ("groups") or of a row ("rows"), else in float32."""
    g, counts, s = torch.Generator().manual_seed(0), (3, 0, min(20, capacity)), Sizes(0, 1, 3, 256, 128)
    weights, _, layouts = parameters(HALVES, "eoi", s, g)
    own = [quantize_weights(w, kind, axes="oi", group=128) for w in weights]
    plain = Layer([dequantize(q) for q in own], [], HALVES.format(i=s.inter, j=2 * s.inter), (layouts, ""))
    rows, used = rows_of(counts, capacity, s.hidden, g)
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32  # a GPU's tensor cores multiply no float32
    rows = rows.to(dtype)
    values, scales = rounded(rows, sent or kind)
    given = (values, scales) if sent else (rows, None)
    layers = layers_of(*(getattr(plain.call(rows, len(counts)), name) for name in ("program", "values")))
    on = [q._replace(values=q.values.to(device()), scales=q.scales.to(device())) for q in own]
    plan = plan_of_counts(torch.tensor(counts, dtype=torch.int32, device=device()), capacity, 16, expected=sum(counts))
    x, x_scales = (None if each is None else each.to(device()) for each in given)
    got = launch_scaled.run(layers, x, None, on, Params([], "", len(counts), "biases"), 1, plan, x_scales)
    seen = payload.dequantize(values, scales.expand(-1, 2), torch.float32) if kind.startswith("fp8") else rows
    if plan.in_place:
        close(got[used.to(got.device)], wanted_of(plain, seen, used, counts, kind, s), limit_of(dtype, kind), kind)
    assert plan.in_place == (capacity >= 16)


def rounded(rows: Any, how: str) -> tuple[Any, Any]:
    if how in ("groups", "fp8_block"):
        return payload.quantize_rows(rows, "fp8")
    scale = rows.float().abs().amax(1, keepdim=True) / 448
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def wanted_of(plain: Layer, rows: Any, used: Any, counts: tuple[int, ...], kind: str, s: Sizes) -> Any:
    """The two layers one by one, rows quantised between them where e4m3 weights multiply them."""
    first = Layer(plain.weights[:1], [], plain.text.removeprefix("mm(1, ").removesuffix(")"), ("eoi", ""))
    h = first.wanted(rows, used, counts)
    if kind.startswith("fp8"):
        h = payload.dequantize(*payload.quantize_rows(h.float(), "fp8"), torch.float32)
    return Layer(plain.weights[1:], [], "mm(0, x)", ("eoi", "")).wanted(h, torch.ones(len(h), dtype=torch.bool), counts)


# ---------------------------------------------------------------- with an exchange
class OneRank(exchange.Exchange):
    """A batched exchange of a rank with itself: each expert's rows in its places, NaN in the others."""

    name, format = "one_rank", "batched"

    def __init__(self, setup: Any, capacity: int) -> None:
        self.setup, self.capacity, self.world, self.rank = setup, capacity, 1, 0

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Any:
        experts, top_k = self.setup.num_experts, ids_TK.shape[1]
        order, offsets = counting_sort(ids_TK, experts)
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        order = order[: int(offsets[-1])]
        expert = torch.arange(experts, device=order.device).repeat_interleave(counts)
        places = expert * self.capacity + torch.arange(len(order), device=order.device) - (offsets - counts).long()[expert]
        rows = torch.full((experts * self.capacity, x_TH.shape[1]), float("nan"), dtype=x_TH.dtype, device=x_TH.device)
        rows[places] = x_TH[order // top_k]
        scales = rows.new_empty(0).float()
        if self.setup.quant == "fp8":
            rows, scales = payload.quantize_rows(rows, "fp8")
        self.slots = torch.full((ids_TK.numel(),), -1, device=order.device)
        self.slots[order] = places
        ids = torch.full((len(rows), 1), -1, dtype=torch.int32, device=order.device)
        ids[places, 0] = expert.int()
        return exchange.Received(rows, scales, ids, [], [], exchange.ExpertTokensMetadata(counts))

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        found = rows_RX[self.slots.clamp(min=0)].float() * weights_TK.reshape(-1, 1)
        found = torch.where((self.slots >= 0).unsqueeze(1), found, 0.0)
        return found.unflatten(0, weights_TK.shape).sum(1).to(out_dtype)

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        raise NotImplementedError


class OneRankSetup(NamedTuple):
    num_experts: int
    top_k: int
    max_tokens: int
    quant: str = "none"
    cuda_graphs: bool = True


@CASES.add(
    *((quant, kind, *sizes) for quant in ("none", "fp8") for kind in ("", "fp8_block") for sizes in ((11, 20), (1, 32), (0, 16))),
    ("fp8", "", 6, 6), ("none", "fp8_channel", 11, 20), ("none", "int8", 11, 20), ("fp8", "int8", 11, 20),
)  # fmt: skip
def through_the_op(quant: str, kind: str, tokens: int, capacity: int) -> None:
    """exchange_experts by this provider, which must not sort, against the provider that knows only standard rows."""
    g = torch.Generator().manual_seed(2)
    s = Sizes(tokens, 2, 4, 256, 128)
    layer = layer_of(HALVES, "eoi", s, g, torch.float32)
    if kind:
        pairs = [quantize_weights(w, kind, axes="oi", group=128) for w in layer.weights]
        weights = [each for q in pairs for each in (q.values, q.scales)]
        layer = layer._replace(weights=weights, layouts=(f"eoi:{kind},eoi:{kind}", ""))
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    x, w = torch.randn((tokens, s.hidden), generator=g).to(dtype), torch.rand((tokens, 2), generator=g)
    ids = torch.randint(-1, 5, (tokens, 2), generator=g)
    own = OneRank(OneRankSetup(s.experts, 2, max(tokens, 1), quant), capacity)

    def layer_by(provider: str, where: str, wide: torch.dtype) -> Any:
        params = [each.to(where, wide if each.dtype == torch.float32 and not kind else None) for each in layer.weights]
        texts = (layer.text, *layer.layouts, 1, wide, "one_rank", provider, "")
        return exchange_experts.run(x.to(where, wide), ids.to(where), [], -1, -1, w.to(where), params, [], *texts)

    with mock.patch.object(exchange, "exchange_of", return_value=own):
        with mock.patch.object(exchange_experts, "received_slots", side_effect=AssertionError("rows were sorted")):
            got = layer_by("triton", device(), dtype)
        with mock.patch.object(exchange_experts, "received_slots", by_ids):
            wanted = layer_by("reference", "cpu", torch.float32)
    assert experts_batched.NAME not in registry.get("experts", "reference").kernels
    close(got, wanted, limit_of(dtype, kind), f"{quant} {kind} {tokens} {capacity}")


def by_ids(got: Any, own: Any, may_read: bool = True) -> Any:
    return counting_sort(got.ids, own.setup.num_experts)


@CASES.add()
def refusals() -> None:
    counts = torch.tensor([1, 2], dtype=torch.int32, device=device())
    for words, make in (
        ("counts must be int32", lambda: plan_of_counts(counts.long(), 16, 16)),
        ("capacity must be at least 0, got -1", lambda: plan_of_counts(counts, -1, 16)),
        ("block_rows must be 1 to 1024, got 0", lambda: plan_of_counts(counts, 16, 0)),
        ("give them less capacity", lambda: plan_of_counts(counts, 1 << 30, 16)),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    layer = layer_of(ONE, "eio", Sizes(0, 1, 2, 16, 16), torch.Generator(), torch.float32)
    call = layer.call(torch.zeros((32, 16)), 2)
    with pytest.raises(ValueError, match="must be 34, got 32"):
        experts_batched.check(call, experts_batched.Batch(counts, 17, 1, 32))
    weighted = experts.prepare_unsorted(call.x, 2, torch.ones((32, 1)), layer.weights, [], "mm(1, relu(mm(0, x))) * w", "eio,eio", "", 1)
    with pytest.raises(ValueError, match="come without routing weights"):
        experts_batched.check(weighted, experts_batched.Batch(counts, 16, 1, 32))


test_in_interpreter = CASES.test()


def test_the_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    script, path = Path(__file__).parent.parent / "benchmarks" / "batched_layer.py", tmp_path / "found.csv"
    sizes = ["--shapes", "tiny", "--experts", "4", "--capacities", "16", "--rows", "2", "--repeats", "2"]
    command = [sys.executable, str(script), "--cpu", *sizes, "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    with path.open(newline="") as file:
        rows = {row["peer"]: row for row in csv.DictReader(file)}
    for peer in ("torch.bmm", "loop by order"):
        assert float(rows[peer]["us"]) > 0
        assert float(rows[peer]["error"]) < 1e-5
    assert "device is cpu" in rows["ours"]["why_not"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES.functions)
def test_on_a_gpu(name: str) -> None:
    CASES.functions[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [128, 200, 512])
@pytest.mark.parametrize("rows", [1, 6, 40, 128])
def test_many_rows_on_a_gpu(rows: int, capacity: int) -> None:
    g = torch.Generator().manual_seed(rows)
    counts = tuple(torch.randint(0, 2 * rows + 1, (32,), generator=g).clamp(max=capacity).tolist())
    for name, layout in (("halves", "eoi"), ("apart", "oi*"), ("biased", "eio")):
        run(PROGRAMS[name], layout, counts, capacity, hidden=256, inter=192, dtype=torch.bfloat16)


@pytest.mark.gpu
def test_a_graph_is_replayed_with_other_counts() -> None:
    g = torch.Generator().manual_seed(0)
    layer = layer_of(HALVES, "eoi", Sizes(0, 1, 4, 64, 48), g, torch.bfloat16)
    counts = torch.zeros(4, dtype=torch.int32, device="cuda")
    rows = torch.zeros((4 * 40, 64), dtype=torch.bfloat16, device="cuda")
    call, kernel = layer.call(rows, 4), experts_triton.KERNELS[experts_batched.NAME]
    for _ in range(2):
        kernel(call, experts_batched.Batch(counts, 40, 16, 160))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernel(call, experts_batched.Batch(counts, 40, 16, 160))
    for now in ((40, 40, 40, 40), (0, 0, 0, 0), (1, 0, 33, 17)):
        other, used = rows_of(now, 40, 64, g)
        rows.copy_(other)
        counts.copy_(torch.tensor(now))
        got.fill_(float("nan"))
        graph.replay()
        close(got[used.cuda()], layer.wanted(other.to(torch.bfloat16), used, now), 2e-2, str(now))


if __name__ == "__main__":
    CASES.main()
