"""One MoE layer on one GPU with its routing given: ours beside every peer that can be imported, in one run.

    python benchmarks/moe_layer.py --forward [--shapes qwen3 mixtral] [--tokens 1 16 4096] [--routings uniform zipf] [--peers NAME ...]
                                   [--without NAME ...] [--repeats 20] [--out NAME]
    python benchmarks/moe_layer.py --train --tokens 16384 --routings uniform
    python benchmarks/moe_layer.py --cpu --shapes tiny --tokens 5        (only shows that it works)

Everything from ids to the combined output is timed. Forward: replays of a CUDA graph; training: eager calls of forward and backward (x,
both weights, routing weights). Before each sample the inputs of another set are copied in, so that the routing changes between replays, and
the L2 cache is overwritten. Peers take turns, so that a drift of the clocks meets all; medians. The floor is the larger of operations over
the rate of an 8192^3 product and bytes over the rate of a large copy, both measured before each shape.
Every peer is held against float32 for a random part of the tokens, for all input sets, in outputs that held NaN before. One that is off is
marked WRONG, and the exit code is 1. A peer that cannot be had stands in the table with its reason.
--out NAME writes benchmarks/results/NAME.csv, .md and .png after each shape; rows that are in the file already stay, so runs can be split.
--peers and --without take the beginnings of names (layer_peers.py has them all).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import logging
import os
import platform
import runpy
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layer_peers
import layer_plot
import ranks_timing as timing
import torch
from layer_case import ROUTINGS, SHAPES, Case, Inputs, Layer, Rates, Reference, Work, inputs_of
from layer_peers import Maker, Peer

RESULTS = Path(__file__).parent / "results"
SETS = 3  # of inputs that take turns
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative error of a row; of a gradient twice that


# ---------------------------------------------------------------- a peer, ready to be called
class Runner:
    """A peer on static inputs: `load` copies a set in, `run` computes the layer: a graph's replay in forward, eager in training."""

    def __init__(self, peer: Peer, sets: list[Inputs], train: bool, pool: Any) -> None:
        self.peer, self.sets, self.train = peer, sets, train
        self.extras = [peer.prepare(each.x, each.ids, each.weights) for each in sets]
        self.static = Inputs(*(None if each is None else each.clone() for each in sets[0]))
        self.static_extras = tuple(each.clone() for each in self.extras[0])
        self.graph: Any = None
        self.result: Any = None
        if train:
            self.static.x.requires_grad_()
            self.static.weights.requires_grad_()
        for _ in range(2):
            self.run()
        if not train and self.static.x.is_cuda:
            self._capture(pool)

    def _call(self) -> Any:
        return self.peer.call(self.static.x, self.static.ids, self.static.weights, *self.static_extras)

    def _eager(self) -> Any:
        """out; in training (out, gradients of x, w13, w2 and weights)."""
        if not self.train:
            with torch.no_grad():
                return self._call()
        out = self._call()
        wanted = [self.static.x, *self.peer.parameters, self.static.weights]
        return out.detach(), torch.autograd.grad(out, wanted, self.static.grad)

    def _capture(self, pool: Any) -> None:
        """Graphs share their memory: each one's result is read before another is replayed."""
        self.result = None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._eager()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.result = self._eager()
        self.graph = graph

    def load(self, at: int) -> None:
        with torch.no_grad():
            pairs = zip((*self.static, *self.static_extras), (*self.sets[at], *self.extras[at]))
            for target, source in pairs:
                if target is not None:
                    target.copy_(source)

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self.result = None  # its memory may be used again
        self.result = self._eager()

    def errors(self, at: int, right: Reference) -> list[float]:
        """After a run on set `at` whose output held NaN before. Gradients count half."""
        self.load(at)
        self._poison()
        self.run()
        if not self.train:
            return right.errors(self.result)
        out, (dx, dw13, dw2, dweights) = self.result
        first, *others = right.errors(out, [dx, self.peer.standard(dw13), dw2, dweights])
        return [first, *(each / 2 for each in others)]

    def _poison(self) -> None:
        if self.graph is not None:
            self.result.fill_(float("nan"))
        else:
            timing.poison(self.static.x.shape, self.static.x.dtype, self.static.x.device)

    def peak(self) -> float:
        """GiB that a run takes beside what is there before it."""
        if not self.static.x.is_cuda or not self.train:
            return 0.0
        self.result = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / (1 << 30)


# ---------------------------------------------------------------- timing
class Clock:
    """Samples of several runners in turn: copy inputs in, overwrite the cache, time one run."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.cuda, self.repeats = device.type == "cuda", repeats
        self.scratch = torch.empty(timing.FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def microseconds(self, runners: list[Runner]) -> list[float]:
        take = self._events if self.cuda else self._wall
        samples: list[list[Callable[[], float]]] = [[] for _ in runners]
        for at in range(self.repeats):
            for index in [(at + shift) % len(runners) for shift in range(len(runners))]:
                runners[index].load(at % SETS)
                samples[index].append(take(runners[index]))
        if self.cuda:
            torch.cuda.synchronize()
        return [statistics.median(read() for read in column) for column in samples]

    def _events(self, runner: Runner) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if runner.graph is None:
            runner.result = None
        else:
            torch.cuda._sleep(timing.HEAD_START)  # so that the host is ahead
        self.scratch.zero_()
        if runner.graph is None:
            torch.cuda.synchronize()
        begin.record()
        runner.run()
        end.record()
        if runner.graph is None:
            torch.cuda.synchronize()
            runner.result = None
        return lambda: begin.elapsed_time(end) * 1e3

    def _wall(self, runner: Runner) -> Callable[[], float]:
        begin = time.perf_counter()
        runner.run()
        spent = (time.perf_counter() - begin) * 1e6
        return lambda: spent


# ---------------------------------------------------------------- one case
class Found:
    """What came of one peer."""

    def __init__(self, name: str) -> None:
        self.name, self.note, self.error, self.us, self.peak = name, "", 0.0, 0.0, 0.0
        self.runner: Runner | None = None

    def drop(self, why: str) -> None:
        self.runner, self.note = None, why


def measure(case: Case, layer: Layer, makers: dict[str, Maker], clock: Clock) -> tuple[list[Found], Work]:
    sets = [inputs_of(case, layer.dtype, layer.device, seed) for seed in range(1, SETS + 1)]
    rights = [Reference(layer, each, seed) for seed, each in enumerate(sets)]
    pool = torch.cuda.graph_pool_handle() if clock.cuda and not case.train else None
    found = [attempt(name, make, case, layer, sets, rights, pool) for name, make in makers.items()]
    ready = [each for each in found if each.runner is not None]
    try:
        times = clock.microseconds([each.runner for each in ready if each.runner is not None])
    except Exception as error:  # noqa: BLE001  a peer may fail with anything
        times = []
        for each in ready:
            each.drop(f"while peers took turns: {reason(error)}")
    for each, us in zip(ready, times):
        each.us = us
    return found, Work.of(case, sets, layer.dtype.itemsize)


def attempt(name: str, make: Maker, case: Case, layer: Layer, sets: list[Inputs], rights: list[Reference], pool: Any) -> Found:
    """A peer that fails has its reason, and no runner."""
    found = Found(name)
    try:
        peer = make(layer, case)
        found.note = peer.note
        runner = Runner(peer, sets, case.train, pool)
        found.error = max(max(runner.errors(at, right)) for at, right in enumerate(rights))
        found.peak = runner.peak()
        runner.result = runner.result if runner.graph is not None else None
        found.runner = runner
    except Exception as error:  # noqa: BLE001
        found.drop(reason(error))
    gc.collect()
    if layer.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def reason(error: Exception) -> str:
    """In a line."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"not importable: {text}"[:300]
    return (text if isinstance(error, layer_peers.Unsupported) else f"{type(error).__name__}: {text}")[:300]


# ---------------------------------------------------------------- all cases
def cases(args: argparse.Namespace, name: str) -> Iterator[Case]:
    for tokens in args.tokens:
        for routing in args.routings:
            yield Case(name, SHAPES[name], tokens, routing, args.train)


def rows_of(
    case: Case, found: list[Found], work: Work, rates: Rates, args: argparse.Namespace, about: dict[str, Any]
) -> list[dict[str, Any]]:
    shape, floor, limit = case.shape, work.floor(rates), LIMIT[args.torch_dtype]
    common = {
        **about, "shape": case.name, "hidden": shape.hidden, "inter": shape.inter, "experts": shape.experts, "top_k": shape.top_k,
        "dtype": args.dtype, "mode": "train" if case.train else "forward", "tokens": case.tokens, "routing": case.routing,
        "floor_us": round(floor, 2), "flops": work.flops, "bytes": work.bytes, "flop_rate": rates.flops, "byte_rate": rates.bytes,
    }  # fmt: skip
    return [{**common, **columns_of(each, floor, limit)} for each in found]


def columns_of(found: Found, floor: float, limit: float) -> dict[str, Any]:
    """A peer's own columns; times and error are empty if there are none."""
    timed = found.us > 0
    return {
        "peer": found.name, "us": round(found.us, 2) if timed else "", "of_floor": round(floor / found.us, 3) if timed else "",
        "error": f"{found.error:.1e}" if timed else "", "ok": found.error <= limit, "peak_gib": round(found.peak, 2), "note": found.note,
    }  # fmt: skip


def measured_shape(
    name: str, args: argparse.Namespace, device: torch.device, makers: dict[str, Maker], about: dict[str, Any]
) -> list[dict[str, Any]]:
    rates = Rates.measured(args.torch_dtype, device)
    layer, clock = Layer(SHAPES[name], args.torch_dtype, device, args.train), Clock(device, args.repeats)
    print(f"{name}: {rates.flops / 1e12:.0f} TFLOP/s, {rates.bytes / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for case in cases(args, name):
        begin = time.perf_counter()
        found, work = measure(case, layer, makers, clock)
        rows += rows_of(case, found, work, rates, args, about)
        print(line_of(case, found, work.floor(rates), LIMIT[args.torch_dtype], time.perf_counter() - begin), flush=True)
        del found
        clean(device)
    torch._dynamo.reset()
    return rows


def line_of(case: Case, found: list[Found], floor: float, limit: float, seconds: float) -> str:
    times = ", ".join(f"{each.name} {each.us:.0f}{' WRONG' if each.error > limit else ''}" for each in found if each.us)
    return f"{case.name} {case.tokens} {case.routing}: floor {floor:.0f}; {times}  [{seconds:.0f} s]"


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def chosen(args: argparse.Namespace, device: torch.device) -> dict[str, Maker]:
    """Peers by the beginnings of their names; those that need long compilations only where they are named."""
    found = layer_peers.makers(device.type)
    if args.peers is None:
        found = {name: make for name, make in found.items() if name not in layer_peers.NOT_BY_DEFAULT}
    else:
        unknown = [each for each in args.peers if not any(name.startswith(each) for name in found)]
        if unknown:
            raise SystemExit(f"no peer's name begins with {', '.join(unknown)}; there are {', '.join(found)}")
        found = {name: make for name, make in found.items() if name.startswith(tuple(args.peers))}
    return {name: make for name, make in found.items() if not name.startswith(tuple(args.without))} if args.without else found


def about_run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPU cores"
    software = ", ".join(each for each in (timing.software(), layer_peers.versions()) if each)
    command = "python benchmarks/moe_layer.py " + shlex.join(map(timing._short, sys.argv[1:]))
    return {
        "session": timing.session(), "date": str(datetime.date.today()), "hardware": hardware, "software": software, "command": command,
        "repeats": args.repeats,
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--forward", action="store_true", help="the default")
    mode.add_argument("--train", action="store_true", help="forward and backward, eager")
    parser.add_argument("--shapes", nargs="+", default=["qwen3", "mixtral", "gptoss", "dsv3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only those whose names begin so")
    parser.add_argument("--without", nargs="+", metavar="NAME", default=[], help="not those whose names begin so")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", metavar="NAME", help="of the files in benchmarks/results, or a path; default: none are written")
    parser.add_argument("--plugin", nargs="*", default=[], help="Python files to run first, which may register providers")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, although there is a GPU; times say nothing")
    args = parser.parse_args()
    args.torch_dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args = parse_args()
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --cpu shows that the script works")
    warnings.filterwarnings("ignore")
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)
    torch._dynamo.config.recompile_limit = 1000  # one for each number of tokens
    for path in args.plugin:
        runpy.run_path(path)
    device = torch.device("cpu" if args.cpu else "cuda:0")
    makers, about = chosen(args, device), about_run(args, device)
    rows: list[dict[str, Any]] = []
    for name in args.shapes:
        rows += measured_shape(name, args, device, makers, about)
        clean(device)
        if args.out:
            layer_plot.write(results(args.out), rows)
    print(layer_plot.table([{key: str(value) for key, value in row.items()} for row in rows]))
    if not all(row["ok"] for row in rows):
        raise SystemExit("some results are WRONG")


def results(out: str) -> Path:
    """The CSV file's path."""
    path = Path(out)
    return path.with_suffix(".csv") if path.parent != Path(".") else RESULTS / f"{path.name}.csv"


if __name__ == "__main__":
    main()
