"""Measures tiles on a GPU: kernels compiled by processes beside, then CUDA graphs replayed in turns, each with a cold cache."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from moe_compile import tuning_scaled
from moe_compile.ops import local_experts
from moe_compile.ops.kernels import tuned
from moe_compile.ops.program import parse
from moe_compile.tuning import DeviceLost, Sample
from moe_compile.tuning_layer import Choice, Point, Work, bias_widths, entries, fans

SETS = 4  # of inputs, which turn: small numbers of tokens hit other experts each time
FEW_TOKENS = 1024  # up to which they do
COMPILE_SECONDS = 300  # of a batch
MOST_WORKERS = 16
DRAWN = 1 << 26  # elements at once


class GpuBench:
    """tuning.Bench on the current CUDA device."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 1))
        self.pool: ProcessPoolExecutor | None = None
        self.runs: Runs | None = None
        size = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
        self.flushed = torch.empty(max(4 * size, 64 << 20), dtype=torch.uint8, device="cuda")

    def compile(self, point: Point, choices: Sequence[Choice], done: Callable[[], None]) -> dict[Choice, str]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_quiet)
        device = torch.cuda.current_device()
        jobs = {self.pool.submit(compile_one, point, choice, device): choice for choice in choices}
        found: dict[Choice, str] = {}
        try:
            for job in as_completed(jobs, timeout=COMPILE_SECONDS):
                reason = job.result()
                if reason:
                    found[jobs[job]] = reason
                done()
        except (TimeoutError, BrokenProcessPool) as error:
            found, left = _ended(jobs)
            self._end_pool()
            if isinstance(error, BrokenProcessPool) and len(left) > 1:
                for choice in left:  # one of them ends its process: each by itself
                    found.update(self.compile(point, [choice], done))
            else:
                what = f"not compiled in {COMPILE_SECONDS} s" if isinstance(error, TimeoutError) else "the process that compiled it died"
                found.update(dict.fromkeys(left, what))
        return found

    def measure(self, point: Point, choices: Sequence[Choice], repeats: int) -> list[Sample]:
        if self.runs is None or self.runs.point != point:
            weights = self.runs.weights if self.runs is not None and self.runs.point.work == point.work else None
            self.runs = None  # its memory first
            self.runs = Runs(point, self.flushed, weights)
        return self.runs.measure(choices, repeats)

    def close(self) -> None:
        self.runs = None
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None

    def _end_pool(self) -> None:
        assert self.pool is not None
        for process in list((self.pool._processes or {}).values()):
            process.kill()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = None


def _ended(jobs: dict[Future[str], Choice]) -> tuple[dict[Choice, str], list[Choice]]:
    """(why some do not compile, those that did not come to an end)."""
    good = {choice: job.result() for job, choice in jobs.items() if job.done() and not job.cancelled() and job.exception() is None}
    return {choice: reason for choice, reason in good.items() if reason}, [choice for choice in jobs.values() if choice not in good]


class Runs:
    """One point's inputs, and the CUDA graphs of the choices that were asked for. The graphs share their memory."""

    def __init__(self, point: Point, flushed: Any, weights: Any = None) -> None:
        self.point, self.flushed = point, flushed
        self.weights = parameters(point.work) if weights is None else weights
        self.sets = [inputs(point, seed) for seed in range(SETS if point.tokens <= FEW_TOKENS else 1)]
        self.given = tuple(each.clone() for each in self.sets[0])
        self.graphs: dict[Choice, Any] = {}
        self.offs: dict[Choice, Sample] = {}
        self.memory = torch.cuda.graph_pool_handle()
        self.right: Any = None

    def measure(self, choices: Sequence[Choice], repeats: int) -> list[Sample]:
        for choice in choices:
            if choice not in self.offs:
                self.offs[choice] = self._captured(choice)
        ready = [each for each in dict.fromkeys(choices) if not self.offs[each].reason]
        times: dict[Choice, list[float]] = {each: [] for each in ready}
        for turn in range(repeats + 1):  # the first is not counted
            for choice, took in zip(ready, self._turn(ready, turn), strict=True):
                times[choice].extend([took] if turn else [])
        return [self.offs[c] if c not in times else self.offs[c]._replace(microseconds=statistics.median(times[c])) for c in choices]

    def _turn(self, choices: Sequence[Choice], turn: int) -> list[float]:
        """Microseconds of each, on the same inputs."""
        for into, each in zip(self.given, self.sets[turn % len(self.sets)]):
            into.copy_(each)
        events = []
        for choice in choices:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.fill_(turn & 255)
            begin.record()
            self.graphs[choice].replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]

    def _captured(self, choice: Choice) -> Sample:
        """The choice's graph and its error, or why there is none."""
        for into, each in zip(self.given, self.sets[0]):
            into.copy_(each)
        wanted = set(entries(self.point, choice))
        try:
            with tuned.only(wanted) as used, torch.no_grad():
                with poisoned():
                    out = run(self.point.work, self.given, self.weights)
                if used != wanted:
                    return Sample(0.0, reason="the kernels did not ask for it: they take other tiles for this layer")
                off = self._off(out)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.memory):
                    out = run(self.point.work, self.given, self.weights)
            out.fill_(float("nan"))
            graph.replay()
            off = max(off, self._off(out))
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  of a candidate; what it is becomes its reason
            return Sample(0.0, reason=self._told(choice, error))
        self.graphs[choice] = graph
        return Sample(0.0, off)

    def _told(self, choice: Choice, error: Exception) -> str:
        reason = _text(error)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise DeviceLost(choice, reason) from error
        return reason

    def _off(self, out: Any) -> float:
        """The worst row's relative error against the first choice's result; infinity where it is not a number."""
        if self.right is None:
            self.right = out.clone()
        worst = 0.0
        for first in range(0, out.shape[0], 1024):
            right = self.right[first : first + 1024].float()
            off = (out[first : first + 1024].float() - right).norm(dim=1) / right.norm(dim=1).clamp(min=1e-6)
            worst = max(worst, float(torch.nan_to_num(off, nan=float("inf")).max()))
        return worst


def run(work: Work, given: tuple[Any, ...], weights: tuple[list[Any], list[Any]]) -> Any:
    """One call of the layer, from ids to sums."""
    x, ids, route = given
    own = parse(work.program)
    inner, outer = (route, None) if own.uses_w else (None, route)
    biases = ",".join(["eo"] * len(weights[1]))
    arguments = (x, ids, work.experts, inner, *weights, work.program, work.layouts, biases, outer, work.torch_dtype, "triton")
    return local_experts.OP.overload(*arguments)


def inputs(point: Point, seed: int, device: str = "cuda") -> tuple[Any, Any, Any]:
    """x [T, H], ids [T, K], weights [T, K]; each token's experts are drawn alike, without putting back."""
    work, g = point.work, torch.Generator(device).manual_seed(seed + 1)
    x = torch.randn((point.tokens, work.hidden), device=device, generator=g).to(work.torch_dtype)
    ids = torch.rand((point.tokens, work.experts), device=device, generator=g).topk(work.top_k, 1).indices
    return x, ids, torch.rand((point.tokens, work.top_k), device=device, generator=g) + 0.1


def parameters(work: Work, device: str = "cuda") -> tuple[list[Any], list[Any]]:
    """Weights and biases in the work's layout."""
    g = torch.Generator(device).manual_seed(0)

    def drawn(*sizes: int, scale: float) -> Any:
        out = torch.empty(sizes, dtype=work.torch_dtype, device=device)
        for part in out.view(-1).split(DRAWN):
            part.copy_(torch.randn(part.shape, device=device, generator=g) * scale)
        return out

    weights: list[Any] = []
    for fan_in, fan_out in fans(work):
        sizes = (fan_in, fan_out) if "io" in work.layout else (fan_out, fan_in)
        if "*" in work.layout:
            weights += [drawn(*sizes, scale=fan_in**-0.5) for _ in range(work.experts)]
        else:
            weights.append(drawn(work.experts, *sizes, scale=fan_in**-0.5))
    if work.quant:
        weights = tuning_scaled.quantised(work.quant, work.layout, weights)
    return weights, [drawn(work.experts, width, scale=0.1) for width in bias_widths(work)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory holds NaN: what a kernel does not write shows."""
    import torch.utils.deterministic as settings

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


# ---------------------------------------------------------------- in processes beside
_small: dict[Work, Any] = {}


def compile_one(point: Point, choice: Choice, device: int) -> str:
    """Runs a choice on few experts and tokens, which compiles the same kernels into Triton's cache. "" or why it cannot."""
    try:
        torch.cuda.set_device(device)
        work = replace(point.work, experts=min(point.work.experts, max(2, point.work.top_k)))
        few = Point(work, min(point.tokens, 64))
        if work not in _small:
            _small.clear()
            _small[work] = parameters(work)
        with tuned.only(entries(few, choice)), torch.no_grad():
            run(work, inputs(few, 0), _small[work])
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  the reason is the result
        if isinstance(error, RuntimeError) and "CUDA error" in str(error):
            os._exit(1)  # this process can do nothing more; another takes its place
        return _text(error)
    return ""


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def _quiet() -> None:
    """Ctrl-C ends the search, which ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
