"""One MoE layer (softmax router, top-k, SwiGLU experts) on a CPU: what moe_compile makes of the naive loop, against
the loop itself and against transformers.

    python benchmarks/cpu_layer.py [--threads 2] [--shapes large small] [--dtypes float32 bfloat16] [--modes forward train]
                                   [--tokens 1 16 ...] [--seconds 3] [--clock wall] [--name cpu_layer] [--compile-naive]

Paths, all on the same parameters, measured in turn in one process:
    ours          the stage ops with provider cpu_grouped, called eagerly
    ours+c        moe_compile.compile of the naive loop (Inductor)
    naive, +c     a masked loop over the experts, eager and compiled (compiled only with --compile-naive: minutes)
    hf, +c        transformers' MixtralExperts with experts_implementation="grouped_mm", eager and compiled
Compiled paths compile for each number of tokens. Every path is held against a float64 loop in the same run; a path that
is off by more than its dtype allows is reported as wrong and gets no ratio. Medians; CSV and Markdown go to benchmarks/results/.
--clock cpu takes the process's CPU time, for a machine that is shared (only with --threads 1).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import os
import pathlib
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import moe_compile
import moe_compile.ops  # registers torch.ops.moe_compile

RESULTS = pathlib.Path(__file__).parent / "results"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest value


class Shape(NamedTuple):
    """Sizes of a layer: hidden, intermediate, experts, top-k."""

    hidden: int
    inter: int
    experts: int
    top_k: int


SHAPES = {"large": Shape(512, 256, 32, 4), "small": Shape(256, 512, 8, 2)}


class Layer(torch.nn.Module):
    """The parameters, in transformers' layout: router [E, H], gate_up [E, 2I, H], down [E, H, I]."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        e, h, i = shape.experts, shape.hidden, shape.inter
        self.router = torch.nn.Parameter((torch.randn(e, h, generator=generator) * h**-0.5).to(dtype))
        self.gate_up_proj = torch.nn.Parameter((torch.randn(e, 2 * i, h, generator=generator) * h**-0.5).to(dtype))
        self.down_proj = torch.nn.Parameter((torch.randn(e, h, i, generator=generator) * i**-0.5).to(dtype))


def routing(layer: Layer, x: Any) -> tuple[Any, Any]:
    """ids and renormalised weights [T, K], from float32 logits as the exact path must choose alike; every path starts with it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = F.linear(x.to(wide), layer.router.to(wide)).softmax(-1)
    weights, ids = scores.topk(layer.shape.top_k)
    return ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


def ours(layer: Layer, x: Any) -> Any:
    i, e, k = layer.shape.inter, layer.shape.experts, layer.shape.top_k
    ids, weights = routing(layer, x)
    program = f"mm(1, silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {2 * i}, 1))"
    ops = torch.ops.moe_compile
    _, _, order, offsets, _, _ = ops.quantize_dispatch(x, ids, e, "none", "local")
    params = [layer.gate_up_proj, layer.down_proj]
    return ops.permute_experts_combine(x, order, offsets, None, params, [], program, "eoi,eoi", "", k, weights, x.dtype, "cpu_grouped")


def naive(layer: Layer, x: Any) -> Any:
    ids, weights = routing(layer, x)
    out = torch.zeros_like(x)
    for e in range(layer.shape.experts):
        token, slot = torch.where(ids == e)
        gate, up = F.linear(x[token], layer.gate_up_proj[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, layer.down_proj[e]) * weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def transformers_path(layer: Layer) -> Callable[..., Any]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    shape = layer.shape
    config = MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inter, num_local_experts=shape.experts, num_experts_per_tok=shape.top_k
    )
    config._experts_implementation = "grouped_mm"
    experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = layer.gate_up_proj, layer.down_proj
    return lambda layer, x: experts(x, *routing(layer, x))


class Naive(torch.nn.Module):
    """The naive loop as a model, for moe_compile.compile."""

    def forward(self, layer: Layer, x: Any) -> Any:
        return naive(layer, x)


def compiled_by_us() -> Callable[..., Any]:
    """moe_compile.compile of the loop."""
    return moe_compile.compile(Naive(), dynamic=False, fullgraph=True)


def paths_of(layer: Layer, compile_naive: bool) -> dict[str, Callable[..., Any]]:
    torch._dynamo.reset()
    hf = transformers_path(layer)
    paths = {"ours": ours, "naive": naive, "hf": hf}
    paths["ours+c"] = compiled_by_us()
    paths["hf+c"] = torch.compile(hf, dynamic=False)
    if compile_naive:
        paths["naive+c"] = torch.compile(naive, dynamic=False)
    return paths


class Batch(NamedTuple):
    """x [T, H], and the output's gradient [T, H]."""

    x: Any
    grad: Any


def batch_of(shape: Shape, tokens: int, dtype: torch.dtype, train: bool) -> Batch:
    generator = torch.Generator().manual_seed(tokens)
    x, grad = (torch.randn(tokens, shape.hidden, generator=generator).to(dtype) for _ in range(2))
    return Batch(x.requires_grad_(train), grad)


def step_of(path: Callable[..., Any], layer: Layer, batch: Batch, train: bool) -> Callable[[], list[Any]]:
    """A call that returns the output, and in training the gradients of x and parameters too."""
    wanted = [batch.x, *layer.parameters()]

    def forward() -> list[Any]:
        with torch.no_grad():
            return [path(layer, batch.x)]

    def forward_backward() -> list[Any]:
        out = path(layer, batch.x)
        return [out.detach(), *torch.autograd.grad(out, wanted, batch.grad)]

    return forward_backward if train else forward


def exact(layer: Layer, batch: Batch, train: bool) -> list[Any]:
    """The naive loop in float64."""
    twin = Layer(layer.shape, torch.float64)
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), layer.parameters(), strict=True):
            mine.copy_(theirs)
    x = batch.x.detach().double().requires_grad_(train)
    return step_of(naive, twin, Batch(x, batch.grad.double()), train)()


def error(actual: list[Any], expected: list[Any]) -> float:
    """Largest difference, as a share of the tensor's largest value."""
    return max(((a.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for a, e in zip(actual, expected, strict=True))


def measure(steps: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Times of each step, taken in turn for about `seconds` (5 rounds at least).

    Each is called once untimed before it is timed: else it pays for the memory that the one before it gave back to the
    system (up to 30 % of ours+c after transformers' eager path).
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, end, rounds = list(steps), time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            steps[name]()
            begin = clock()
            steps[name]()
            times[name].append(clock() - begin)
        rounds += 1
    return times


def row_of(layer: Layer, paths: dict[str, Any], tokens: int, dtype: torch.dtype, train: bool, args: Any) -> dict[str, Any]:
    batch = batch_of(layer.shape, tokens, dtype, train)
    expected = exact(layer, batch, train)
    steps = {name: step_of(path, layer, batch, train) for name, path in paths.items()}
    errors = {name: error(step(), expected) for name, step in steps.items()}
    times = measure(steps, args.seconds, time.process_time if args.clock == "cpu" else time.perf_counter)
    row: dict[str, Any] = {"tokens": tokens, "rounds": len(times["ours"])}
    for name, own in times.items():
        row[f"{name}_us"] = round(statistics.median(own) * 1e6, 1)
        row[f"{name}_best_us"] = round(min(own) * 1e6, 1)
        row[f"{name}_error"] = f"{errors[name]:.1e}"
        row[f"{name}_ok"] = errors[name] <= TOLERANCE[dtype]
    return row


def markdown(rows: list[dict[str, Any]], names: list[str], header: list[str]) -> str:
    """The medians, and how many times slower than ours+c each path is."""
    lines = [
        *header, "",
        "Median microseconds; in brackets how many times ours+c's time that is (above 1: ours+c is faster).", "",
        "| shape | dtype | mode | tokens | " + " | ".join(names) + " |", "|" + "---|" * (4 + len(names)),
    ]  # fmt: skip
    for row in rows:
        cells = []
        for name in names:
            if f"{name}_us" not in row:
                cells.append("-")
            elif not row[f"{name}_ok"]:
                cells.append(f"wrong ({row[f'{name}_error']})")
            else:
                cells.append(f"{row[f'{name}_us']:.0f} ({row[f'{name}_us'] / row['ours+c_us']:.2f})")
        lines.append(f"| {row['shape']} | {row['dtype']} | {row['mode']} | {row['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def header_of(args: Any) -> list[str]:
    import transformers

    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    shapes = "; ".join(f"{name}: H={s.hidden} I={s.inter} E={s.experts} K={s.top_k}" for name, s in SHAPES.items() if name in args.shapes)
    return [
        "# One MoE layer on a CPU", "",
        f"`python benchmarks/cpu_layer.py {' '.join(sys.argv[1:])}` on {datetime.date.today()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}, {cpu}, {args.threads} threads, {args.clock} clock, load average "
        f"{os.getloadavg()[0]:.1f} at the end.", "", shapes,
    ]  # fmt: skip


def _cpuinfo() -> list[str]:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def parse_args() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--name", default="cpu_layer")
    parser.add_argument("--compile-naive", action="store_true")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error(f"--clock cpu counts the time of all threads; it needs --threads 1, not {args.threads}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.capture_dynamic_output_shape_ops = True  # naive+c: the loop's where() stays in one graph
    # hf+c in training: the backward of transformers' fallback op cannot be traced, and Dynamo tells at length
    torch._logging.set_logs(dynamo=logging.ERROR)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            layer = Layer(SHAPES[shape], dtype)
            for mode in args.modes:
                paths = paths_of(layer, args.compile_naive)
                for tokens in args.tokens:
                    row = row_of(layer, paths, tokens, dtype, mode == "train", args)
                    rows.append({"shape": shape, "dtype": dtype_name, "mode": mode, **row})
                    shown = {n: (row[f"{n}_us"], round(row[f"{n}_us"] / row["ours+c_us"], 2)) for n in paths}
                    print(shape, dtype_name, mode, tokens, shown, flush=True)
    write(rows, list(paths), args)


def write(rows: list[dict[str, Any]], names: list[str], args: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{args.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / f"{args.name}.md").write_text(markdown(rows, names, header_of(args)))
    print(f"wrote {RESULTS / args.name}.csv and .md")


if __name__ == "__main__":
    main()
