"""The part of benchmarks/moe_layer.py that uses the device: every peer at one point of a shape after the other, in a process of its own.

A fault of the device (an illegal memory access) ends all that a process can do there. So the device is waited for after every step of every
peer; a fault is told with the peer's name, this process ends, and moe_layer.py starts another one for what is left.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import logging
import os
import platform
import runpy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import layer_peers
import ranks_timing as timing
import torch
from layer_case import KINDS, SHAPES, Case, Inputs, Layer, Rates, Reference, Work, inputs_of
from layer_peers import Maker, Peer

SETS = 3  # of inputs that take turns
AHEAD = 60_000_000  # cycles that the device is busy while the host launches a sample of training
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative error of a row; of a gradient twice that
E4M3_LIMIT = 1e-1  # where rows are quantised: 3 bits behind the point in both products, 4e-2 to 6e-2 in large layers, 8e-2 in tiny ones
Tell = Callable[[dict[str, Any]], None]  # sends a message to moe_layer.py


class Lost(Exception):
    """The device does nothing any more in this process, since this peer ran."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"{peer}: {why}")
        self.peer, self.why = peer, why


def works(device: torch.device) -> bool:
    """Whether the device still does what this process asks for."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
    except Exception:  # noqa: BLE001  torch has its own type for this in some versions
        return False
    return True


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
            self.load(0)  # each time: a peer may use what it was given up (triton_kernels adds to its sums)
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
        self.load(0)
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
        self.load(0)
        self.run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / (1 << 30)


# ---------------------------------------------------------------- what is found, and timing
class Found:
    """What came of one peer."""

    def __init__(self, name: str) -> None:
        self.name, self.note, self.error, self.us, self.peak = name, "", 0.0, 0.0, 0.0
        self.runner: Runner | None = None

    def drop(self, why: str) -> None:
        self.runner, self.note = None, why


class Stumbled(Exception):
    """This one failed while peers took turns."""

    def __init__(self, found: Found) -> None:
        super().__init__(found.name)
        self.found = found


class Clock:
    """Samples of several runners in turn: copy inputs in, overwrite the cache, time one run.

    ahead: what is no graph waits on the device until the host has launched all of it.
    """

    def __init__(self, device: torch.device, repeats: int, ahead: bool = False) -> None:
        self.cuda, self.repeats, self.ahead = device.type == "cuda", repeats, ahead
        self.scratch = torch.empty(timing.FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def microseconds(self, ready: list[Found], before: Callable[[Found], None]) -> list[float]:
        """Of each that has a runner. `before` is called ahead of each sample; Stumbled says which one failed."""
        samples: list[list[float]] = [[] for _ in ready]
        for at in range(self.repeats):
            for index in [(at + shift) % len(ready) for shift in range(len(ready))]:
                before(ready[index])
                samples[index].append(self._sample(ready[index], at))
        return [statistics.median(column) for column in samples]

    def _sample(self, found: Found, at: int) -> float:
        runner: Any = found.runner
        try:
            runner.load(at % SETS)
            return self._events(runner) if self.cuda else self._wall(runner)
        except Exception as error:
            raise Stumbled(found) from error

    def _events(self, runner: Runner) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if runner.graph is None:
            runner.result = None
        if runner.graph is not None or self.ahead:
            torch.cuda._sleep(timing.HEAD_START if runner.graph is not None else AHEAD)  # so that the host is ahead
        self.scratch.zero_()
        if runner.graph is None and not self.ahead:
            torch.cuda.synchronize()
        begin.record()
        runner.run()
        end.record()
        torch.cuda.synchronize()  # a fault is this runner's
        if runner.graph is None:
            runner.result = None
        return float(begin.elapsed_time(end) * 1e3)

    def _wall(self, runner: Runner) -> float:
        begin = time.perf_counter()
        runner.run()
        return (time.perf_counter() - begin) * 1e6


# ---------------------------------------------------------------- one case
def measure(
    case: Case, layer: Layer, makers: dict[str, Maker], clock: Clock, broken: dict[str, str], tell: Tell
) -> tuple[list[Found], Work]:
    """broken: peers that are not tried here again, and why."""
    sets = [inputs_of(case, layer.dtype, layer.device, seed) for seed in range(1, SETS + 1)]
    rights = [Reference(layer, each, seed) for seed, each in enumerate(sets)]
    pool = torch.cuda.graph_pool_handle() if clock.cuda and not case.train else None
    found = []
    for name, make in makers.items():
        each = Found(name)
        found.append(each)
        if name in broken:
            each.drop(broken[name])
            continue
        tell({"doing": name, "step": "check", "case": label(case)})
        attempt(each, make, case, layer, sets, rights, pool)
    take_turns([each for each in found if each.runner is not None], clock, layer.device, tell)
    tell({"doing": ""})
    return found, Work.of(case, sets, layer)


def attempt(found: Found, make: Maker, case: Case, layer: Layer, sets: list[Inputs], rights: list[Reference], pool: Any) -> None:
    """A peer that fails has its reason, and no runner. Raises Lost if the device is lost with it."""
    try:
        peer = make(layer, case)
        found.note = peer.note
        runner = Runner(peer, sets, case.train, pool)
        found.error = max(max(runner.errors(at, right)) for at, right in enumerate(rights))
        found.peak = runner.peak()
        runner.result = runner.result if runner.graph is not None else None
        if layer.device.type == "cuda":
            torch.cuda.synchronize()
        found.runner = runner
    except Exception as error:  # noqa: BLE001  a peer may fail with anything
        failed(found, "", error, layer.device)
    clean(layer.device)


def take_turns(ready: list[Found], clock: Clock, device: torch.device, tell: Tell) -> None:
    """Times of all that are ready; whoever fails is dropped, and the others begin again."""
    while ready:
        try:
            times = clock.microseconds(ready, lambda each: tell({"doing": each.name, "step": "time"}))
        except Stumbled as error:
            ready.remove(error.found)
            failed(error.found, "while peers took turns: ", error.__cause__, device)
            continue
        for each, us in zip(ready, times):
            each.us = us
        return


def failed(found: Found, when: str, error: BaseException | None, device: torch.device) -> None:
    why = when + reason(error)
    if not works(device):
        raise Lost(found.name, why) from error
    found.drop(why)


def reason(error: BaseException | None) -> str:
    """In a line."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"not importable: {text}"[:300]
    return (text if isinstance(error, layer_peers.Unsupported) else f"{type(error).__name__}: {text}")[:300]


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda" and works(device):
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- rows of the table
def rows_of(
    case: Case, found: list[Found], work: Work, rates: Rates, limit: float, args: argparse.Namespace, about: dict[str, Any]
) -> list[dict[str, Any]]:
    shape, floor = case.shape, work.floor(rates)
    common = {
        **about, "shape": case.name, "hidden": shape.hidden, "inter": shape.inter, "experts": shape.experts, "top_k": shape.top_k,
        "dtype": dtype_name(args), "mode": mode_of(case, args.ahead), "tokens": case.tokens, "routing": case.routing,
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


def mode_of(case: Case, ahead: bool) -> str:
    """One of layer_plot.WAYS."""
    return ("train ahead" if ahead else "train") if case.train else "forward"


def dtype_name(args: argparse.Namespace) -> str:
    """Of the rows, and of the weights where they are quantised."""
    return f"{args.dtype} x {args.quant}" if args.quant else str(args.dtype)


def limit_of(layer: Layer) -> float:
    return E4M3_LIMIT if layer.quantises_rows else LIMIT[layer.dtype]


def label(case: Case) -> str:
    return f"{case.name} {case.tokens} {case.routing}"


def line_of(case: Case, found: list[Found], floor: float, limit: float, seconds: float) -> str:
    times = ", ".join(f"{each.name} {each.us:.0f}{' WRONG' if each.error > limit else ''}" for each in found if each.us)
    return f"{label(case)}: floor {floor:.0f}; {times}  [{seconds:.0f} s]"


def about_run(args: argparse.Namespace, device: torch.device, command: str) -> dict[str, Any]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPU cores"
    software = ", ".join(each for each in (timing.software(), layer_peers.versions()) if each)
    return {
        "session": timing.session(), "date": str(datetime.date.today()), "hardware": hardware, "software": software, "command": command,
        "repeats": args.repeats,
    }  # fmt: skip


# ---------------------------------------------------------------- peers
def chosen(args: argparse.Namespace) -> dict[str, Maker]:
    """Peers by the beginnings of their names; those that need long compilations only where they are named."""
    found = layer_peers.makers(args.quant)
    if args.peers is None:
        found = {name: make for name, make in found.items() if name not in layer_peers.NOT_BY_DEFAULT}
    else:
        unknown = [each for each in args.peers if not any(name.startswith(each) for name in found)]
        if unknown:
            raise SystemExit(f"no peer's name begins with {', '.join(unknown)}; there are {', '.join(found)}")
        found = {name: make for name, make in found.items() if name.startswith(tuple(args.peers))}
    return {name: make for name, make in found.items() if not name.startswith(tuple(args.without))} if args.without else found


# ---------------------------------------------------------------- this process
def points(args: argparse.Namespace, job: dict[str, Any], tell: Tell) -> None:
    """Measures the job's points of one shape, and tells of each."""
    device = torch.device("cpu" if args.cpu else "cuda:0")
    layer = Layer(SHAPES[job["shape"]], args.torch_dtype, device, args.train, KINDS.get(args.quant, ""))
    rates = Rates.measured(args.torch_dtype, device, layer.quantises_rows)
    tell({"line": f"{job['shape']}: {rates.flops / 1e12:.0f} TFLOP/s, {rates.bytes / 1e12:.2f} TB/s"})
    about, makers = about_run(args, device, job["command"]), chosen(args)
    clock, limit = Clock(device, args.repeats, args.ahead), limit_of(layer)
    for tokens, routing, broken in job["points"]:
        case, begin = Case(job["shape"], SHAPES[job["shape"]], tokens, routing, args.train), time.perf_counter()
        found, work = measure(case, layer, makers, clock, broken, tell)
        tell({"line": line_of(case, found, work.floor(rates), limit, time.perf_counter() - begin)})
        tell({"rows": rows_of(case, found, work, rates, limit, args, about)})
        del found
        clean(device)


def run(args: argparse.Namespace, job: dict[str, Any], tell: Tell) -> None:
    """The whole of a process that moe_layer.py started; never returns."""
    warnings.filterwarnings("ignore")
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)
    torch._dynamo.config.recompile_limit = 1000  # one for each number of tokens
    for path in args.plugin:
        runpy.run_path(path)
    code = 0
    try:
        points(args, job, tell)
        tell({"done": True})
    except Lost as lost:
        tell({"lost": lost.peer, "why": lost.why})
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of a lost device is taken down
