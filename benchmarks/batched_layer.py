"""Experts of rows in the batched format, [E, capacity, H] with counts on the device, as a low-latency exchange brings them to one GPU.

    python benchmarks/batched_layer.py --out batched.csv
    python benchmarks/batched_layer.py --shapes dsv3 --quant fp8 --capacities 512 --rows 1 8
    python benchmarks/batched_layer.py --cpu --shapes tiny --experts 4 --capacities 16 --rows 2

Peers: ours in place; ours and torch's grouped_mm by an order, as other formats have it (sort, gather, scatter); torch.bmm over all of the
capacity; vLLM's batched Triton kernel where that is importable. A time is the median of replays of a CUDA graph on a cold cache, with three
draws of the counts in turn; peers take turns too. Rows beyond the counts are NaN, and so is what is there before a checked call. The floor:
weights of the experts hit and rows within the counts, each once, at the speed of a large copy, or their products at that of a large matmul.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ranks_timing as timing
import torch
import torch.nn.functional as F
from layer_case import SHAPES, Layer, Rates, Shape, row_error

from moe_compile.ops import experts, experts_batched, quantized, registry
from moe_compile.ops.comm import exchange, payload
from moe_compile.ops.quantize_dispatch import sorted_slots

SETS = 3
LIMIT = {"none": 2e-2, "fp8": 5e-2}  # relative error of a row
CHECKED_EXPERTS = 6
OURS = "ours"


class Unsupported(Exception):
    """A peer cannot take this; says why."""


class Case(NamedTuple):
    """rows: of an expert on average. quant: of rows and weights."""

    name: str
    shape: Shape
    capacity: int
    rows: int
    quant: str

    @property
    def program(self) -> str:
        i = self.shape.inter
        return f"mm(1, silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {2 * i}, 1))"


class Inputs(NamedTuple):
    """rows [E * C, H], scales float32 [E * C, H / 128] of e4m3 rows or [0], counts int32 [E]."""

    rows: Any
    scales: Any
    counts: Any


Call = Callable[[Inputs], Any]
Maker = Callable[[Layer, Case], Call]


def inputs_of(case: Case, layer: Layer, seed: int) -> Inputs:
    """Slots that each choose an expert with equal odds."""
    generator, num = torch.Generator(layer.device).manual_seed(seed), case.shape.experts
    chosen = torch.randint(num, (num * case.rows,), device=layer.device, generator=generator)
    counts = torch.bincount(chosen, minlength=num).clamp(max=case.capacity).int()
    rows = torch.randn((num * case.capacity, case.shape.hidden), device=layer.device, generator=generator).to(layer.dtype)
    rows[~used(case, counts)] = float("nan")
    scales = torch.empty(0, device=layer.device)
    if case.quant == "fp8":
        rows, scales = payload.quantize_rows(rows, "fp8")
    return Inputs(rows, scales, counts)


def used(case: Case, counts: Any) -> Any:
    """bool [E * C]"""
    return (torch.arange(case.capacity, device=counts.device) < counts.unsqueeze(1)).flatten()


# ---------------------------------------------------------------- peers
def weights_of(layer: Layer, case: Case) -> tuple[list[Any], str]:
    if case.quant == "none":
        return [layer.w13, layer.w2], "eoi,eoi"
    return [each for q in quantised(layer) for each in (q.values, q.scales)], "eoi:fp8_block,eoi:fp8_block"


def weights_in_float32(layer: Layer, case: Case, e: int) -> list[Any]:
    """Those of an expert, quantised ones as the numbers that they stand for."""
    if case.quant == "none":
        return [layer.w13[e].float(), layer.w2[e].float()]
    return [quantized.dequantize_expert(q, e) for q in quantised(layer)]


def quantised(layer: Layer) -> list[Any]:
    kept: list[Any] = layer.once("fp8", lambda: [quantized.quantize_weights(w, "fp8_block") for w in (layer.w13, layer.w2)])
    return kept


def problem_of(layer: Layer, case: Case, layout: str) -> registry.Problem:
    shape = case.shape
    return registry.Problem(
        "experts", layer.device.type, layer.dtype, shape.hidden, shape.inter, shape.experts, program=case.program, weight_layout=layout
    )  # fmt: skip


def in_place(layer: Layer, case: Case) -> Call:
    """The kernel that exchange_experts calls for these rows."""
    provider = registry.get("experts", "triton")
    weights, layout = weights_of(layer, case)
    why = provider.supports(problem_of(layer, case, layout))
    if why is not None:
        raise Unsupported(why)
    expected, num = case.rows * case.shape.experts, case.shape.experts
    most = case.capacity * min(num, case.shape.top_k)  # the capacity is that of all ranks' tokens, which have so many slots each

    def call(given: Inputs) -> Any:
        rows = given.rows if case.quant == "none" else experts.stand_in(given.rows, layer.dtype)
        own = experts.prepare_unsorted(rows, num, None, weights, [], case.program, layout, "", 1)
        own = own if case.quant == "none" else experts.with_e4m3(own, given.rows, given.scales)
        return provider.kernels[experts_batched.NAME](own, experts_batched.Batch(given.counts, case.capacity, expected, most))

    return call


def by_order(provider: str) -> Maker:
    """As slots like any others."""

    def make(layer: Layer, case: Case) -> Call:
        num = case.shape.experts
        weights, layout = weights_of(layer, case)
        why = registry.get("experts", provider).supports(problem_of(layer, case, layout))
        if why is not None or case.quant != "none":
            raise Unsupported(why or "rows in e4m3 are measured in place only")
        if provider == "reference" and layer.device.type == "cuda":
            raise Unsupported("it reads counts on the host")

        def call(given: Inputs) -> Any:
            order, offsets = sorted_slots(exchange.place_ids(given.counts, case.capacity), num)
            return torch.ops.moe_compile.permute_experts_combine(
                given.rows, order, offsets, None, weights, [], case.program, layout, "", 1, None, layer.dtype, provider
            )

        return call

    return make


def bmm(layer: Layer, case: Case) -> Call:
    """All of the capacity, whatever the counts are."""
    if case.quant != "none":
        raise Unsupported("torch.bmm multiplies no e4m3")
    w13, w2 = layer.w13.transpose(1, 2), layer.w2.transpose(1, 2)

    def call(given: Inputs) -> Any:
        gate, up = torch.bmm(given.rows.view(case.shape.experts, case.capacity, -1), w13).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, w2).flatten(0, 1)

    return call


def vllm(layer: Layer, case: Case) -> Call:
    """vLLM's kernel for the batched format, twice, with the tiles that it chooses by the capacity, and its activation between."""
    if case.quant != "none" or layer.device.type != "cuda":
        raise Unsupported("measured in bfloat16, on a GPU")
    import triton.language as tl
    from vllm import _custom_ops  # type: ignore[import-not-found]  # noqa: F401  registers the activation
    from vllm.model_executor.layers.fused_moe import fused_batched_moe as kernels  # type: ignore[import-not-found]

    num, capacity, inter = case.shape.experts, case.capacity, case.shape.inter
    config = kernels.try_get_optimal_moe_config(layer.w13.size(), layer.w2.size(), 1, None, capacity)
    no_quant = (None, None, None, False, False, False, config, False)

    def call(given: Inputs) -> Any:
        both = given.rows.new_empty((num, capacity, 2 * inter))
        h, out = given.rows.new_empty((num, capacity, inter)), given.rows.new_empty((num, capacity, case.shape.hidden))
        rows = given.rows.view(num, capacity, -1)
        kernels.invoke_moe_batched_triton_kernel(rows, layer.w13, both, given.counts, tl.bfloat16, *no_quant)
        torch.ops._C.silu_and_mul(h.view(-1, inter), both.view(-1, 2 * inter))
        kernels.invoke_moe_batched_triton_kernel(h, layer.w2, out, given.counts, tl.bfloat16, *no_quant)
        return out.flatten(0, 1)

    return call


PEERS: dict[str, Maker] = {
    OURS: in_place, "ours by order": by_order("triton"), "grouped_mm by order": by_order("cuda_grouped_mm"),
    "loop by order": by_order("reference"), "torch.bmm": bmm, "vLLM batched": vllm,
}  # fmt: skip


# ---------------------------------------------------------------- one case
class Runner:
    """A peer on static inputs, on a GPU as a graph."""

    def __init__(self, call: Call, sets: list[Inputs]) -> None:
        self.sets, self.static, self.call = sets, Inputs(*(each.clone() for each in sets[0])), call
        self.graph: Any = None
        for _ in range(2):
            self.result = call(self.static)
        if self.static.rows.is_cuda:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = call(self.static)

    def load(self, at: int) -> None:
        for target, source in zip(self.static, self.sets[at]):
            target.copy_(source)

    def run(self) -> None:
        if self.graph is None:
            self.result = self.call(self.static)
        else:
            self.graph.replay()

    def error(self, at: int, case: Case, layer: Layer) -> float:
        """Of the worst row of some experts, those with the most rows and the fewest among them."""
        self.load(at)
        self.result.fill_(float("nan"))
        self.run()
        order = self.static.counts.argsort().tolist()
        half = CHECKED_EXPERTS // 2
        return max(self._row_error(e, case, layer) for e in {*order[:half], *order[-half:]})

    def _row_error(self, e: int, case: Case, layer: Layer) -> float:
        at = slice(e * case.capacity, e * case.capacity + int(self.static.counts[e]))
        rows = self.static.rows[at].float()
        if case.quant == "fp8":
            rows = payload.dequantize(self.static.rows[at], self.static.scales[at], torch.float32)
        if not len(rows):
            return 0.0
        w13, w2 = weights_in_float32(layer, case, e)
        gate, up = F.linear(rows, w13).chunk(2, dim=-1)
        return row_error(self.result[at], F.linear(F.silu(gate) * up, w2))


def measure(case: Case, layer: Layer, repeats: int) -> Iterator[tuple[str, float, float, str]]:
    """(peer, microseconds, error, why it was not measured)."""
    sets = [inputs_of(case, layer, seed) for seed in range(SETS)]
    runners, told = {}, {}
    for name, make in PEERS.items():
        try:
            runner = Runner(make(layer, case), sets)
            told[name] = max(runner.error(at, case, layer) for at in range(SETS)), ""
            runners[name] = runner
        except (Unsupported, ImportError) as error:
            told[name] = 0.0, str(error)
    times = in_turn(runners, repeats)
    for name, (error, why) in told.items():
        yield name, times.get(name, 0.0), error, why


def in_turn(runners: dict[str, Runner], repeats: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for at in range(repeats):
        for name, runner in runners.items():
            runner.load(at % SETS)
            samples[name].append(on_device(runner) if runner.graph is not None else on_host(runner))
    return {name: statistics.median(found) for name, found in samples.items()}


def on_device(runner: Runner) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(timing.HEAD_START)  # so that the host is ahead
    torch.empty(timing.FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    begin.record()
    runner.run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end) * 1e3)


def on_host(runner: Runner) -> float:
    begin = time.perf_counter()
    runner.run()
    return (time.perf_counter() - begin) * 1e6


def floor(case: Case, sets: list[Inputs], rates: Rates, itemsize: int) -> float:
    """Microseconds. e4m3 products are taken at twice the rate."""
    shape, fp8 = case.shape, case.quant == "fp8"
    hit = sum(int((each.counts > 0).sum()) for each in sets) / len(sets)
    rows = sum(int(each.counts.sum()) for each in sets) / len(sets)
    expert = 3 * shape.hidden * shape.inter
    size = hit * expert * (1 if fp8 else itemsize) + rows * shape.hidden * (itemsize + (1 if fp8 else itemsize))
    return max(2 * expert * rows / rates.flops / (2 if fp8 else 1), size / rates.bytes) * 1e6


# ---------------------------------------------------------------- all cases
def main() -> None:
    args = arguments()
    device = torch.device("cpu" if args.cpu else "cuda")
    dtype = torch.float32 if args.cpu else torch.bfloat16
    rates, lines, wrong = Rates.measured(torch.bfloat16, device), [], False
    for name in args.shapes:
        shape = SHAPES[name]._replace(experts=args.experts)
        layer = Layer(shape, dtype, device, train=False)
        for capacity, rows in ((c, r) for c in args.capacities for r in args.rows if r <= c):
            case = Case(name, shape, capacity, rows, args.quant)
            least = floor(case, [inputs_of(case, layer, seed) for seed in range(SETS)], rates, dtype.itemsize)
            found = list(measure(case, layer, args.repeats))
            wrong |= any(error > LIMIT[args.quant] for _, _, error, _ in found)
            lines += [[name, args.quant, shape.experts, capacity, rows, *each, round(least, 1)] for each in found]
            print(line(case, least, found), flush=True)
    if args.out is not None:
        write(args.out, lines)
    if wrong:
        raise SystemExit("a result is wrong")


def line(case: Case, least: float, found: list[tuple[str, float, float, str]]) -> str:
    """Times, and the part of each that the floor is; what is wrong is said instead."""
    cells = [
        f"{peer} {f'WRONG ({error:.0e})' if error > LIMIT[case.quant] else f'{us:.1f} ({least / us:.2f})'}"
        for peer, us, error, why in found
        if not why
    ]
    missing = [f"{peer}: {why}" for peer, _, _, why in found if why]
    return f"{case.name} {case.quant} C={case.capacity} rows={case.rows} floor {least:.1f}: {', '.join(cells)} | not: {'; '.join(missing)}"


def write(path: Path, lines: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        head = ["shape", "quant", "experts", "capacity", "rows", "peer", "us", "error", "why_not", "floor_us"]
        csv.writer(file).writerows([head, *lines])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3", "dsv3"], choices=list(SHAPES))
    parser.add_argument("--experts", type=int, default=32, help="experts of this rank")
    parser.add_argument("--capacities", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64], help="of an expert on average")
    parser.add_argument("--quant", choices=list(LIMIT), default="none")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cpu", action="store_true", help="only to see that it runs")
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    if min(args.experts, *args.capacities, *args.rows, args.repeats) < 1:
        parser.error("--experts, --capacities, --rows and --repeats must be at least 1")
    return args


if __name__ == "__main__":
    main()
