"""`moe-compile tune`: measures tiles for a layer on this machine's GPU, and keeps what is faster than the rules' in the user's file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from moe_compile.ops.kernels import tuned, tuned_file
from moe_compile.ops.kernels.tuned import Machine
from moe_compile.ops.quantized import KINDS
from moe_compile.tuning import GAIN, Bench, Outcome, Progress, Search, TuneError
from moe_compile.tuning_journal import Journal
from moe_compile.tuning_layer import (
    DTYPES,
    LAYOUTS,
    Choice,
    Point,
    Work,
    entries,
    gated,
    layers,
    neighbours,
    questions,
    rules,
    starts,
    untunable,
)

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
GATES = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "mish")
SIZES = ("hidden", "intermediate", "experts", "top_k")
GPU_ERROR = "tiles are measured on a CUDA GPU, and there is none here; --dry-run shows what would be tried"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    layer = parser.add_argument_group("the layer")
    layer.add_argument("--model", metavar="NAME_OR_PATH", help="take sizes from a transformers configuration that is on this machine")
    layer.add_argument("--hidden", type=int, help="width of a token")
    layer.add_argument("--intermediate", type=int, help="width inside of an expert")
    layer.add_argument("--experts", type=int, help="of this GPU: with expert parallelism, its share")
    layer.add_argument("--top-k", type=int, help="experts of a token")
    layer.add_argument("--dtype", choices=DTYPES, help="default: the model's, else bfloat16")
    layer.add_argument("--layout", choices=LAYOUTS, default="eoi", help="axes of the weights; * for one tensor an expert (default: eoi)")
    layer.add_argument("--quant", choices=KINDS, default="", help="weights are numbers of this kind with scales")
    kind = layer.add_mutually_exclusive_group()
    kind.add_argument("--gate", choices=GATES, help="an expert is down(gate(first half of up(x)) * second half) (default: silu)")
    kind.add_argument("--program", metavar="TEXT", help="what an expert computes, as in ops/program.py")
    layer.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help=f"of a call (default: {' '.join(map(str, TOKENS))})")
    what = parser.add_argument_group("what is done")
    what.add_argument("--limit-minutes", type=float, help="stop then, and keep the best so far; the same command goes on from there")
    what.add_argument("--again", action="store_true", help="measure also what is in the file already")
    what.add_argument("--workers", type=int, help="processes that compile (default: one a CPU core, 16 at most)")
    what.add_argument("--dry-run", action="store_true", help="show what would be tried; needs no GPU")
    what.add_argument("--show", action="store_true", help="print what the file has for this device")
    what.add_argument("--forget", action="store_true", help="delete what the file has for this device")


def run(args: argparse.Namespace, machine: Machine | None = None, bench: Bench | None = None) -> int:
    """The exit status. machine, bench: in the place of this machine's GPU."""
    try:
        machine = machine or tuned.machine_of()
        if args.show or args.forget:
            return (_show if args.show else _forget)(_wanted(machine))
        points = points_of(args)
        if not points:
            return 0
        if args.dry_run:
            return _dry_run(points)
        return _tune(points, args, _wanted(machine), bench)
    except (ValueError, TuneError) as error:
        print(f"moe-compile tune: {error}", file=sys.stderr)
        return 1


def _wanted(machine: Machine | None) -> Machine:
    if machine is None:
        raise TuneError(GPU_ERROR)
    return machine


# ---------------------------------------------------------------- the layer
def points_of(args: argparse.Namespace) -> list[Point]:
    """What the arguments ask for. Raises ValueError naming what lacks."""
    known = _of_model(args.model) if args.model else {}
    sizes: dict[str, Any] = {name: known.get(name) if getattr(args, name) is None else getattr(args, name) for name in SIZES}
    lacking = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is None]
    if lacking:
        where = f"the configuration of {args.model} does not tell" if args.model else "the layer needs"
        raise ValueError(f"{where} {', '.join(lacking)}: give {'it' if len(lacking) == 1 else 'them'} too")
    if not args.tokens or min(args.tokens) < 1:
        raise ValueError(f"--tokens {' '.join(map(str, args.tokens))}: give numbers from 1 on")
    gate = args.gate or known.get("gate") or "silu"
    program = args.program or gated(gate, sizes["intermediate"])
    dtype = args.dtype or known.get("dtype") or "bfloat16"
    work = Work(**sizes, dtype=dtype, layout=args.layout, program=program, quant=args.quant)
    layers(work)
    points = [Point(work, tokens) for tokens in sorted(set(args.tokens))]
    for reason in filter(None, map(untunable, points)):
        print(reason)
    return [point for point in points if untunable(point) is None]


NAMES = {  # in transformers' configurations, the first that is there
    "hidden": ("hidden_size", "d_model"),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_dim"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"),
    "gate": ("hidden_act", "hidden_activation"),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}


def _of_model(name: str) -> dict[str, Any]:
    """Sizes, gate and dtype as far as the configuration tells them; nothing is downloaded."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError("--model needs transformers (pip install transformers); or give the layer's sizes") from None
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {name}: no configuration of it on this machine ({error}); give the layer's sizes") from None
    config = getattr(config, "text_config", None) or config
    found: dict[str, Any] = {
        what: next((getattr(config, each) for each in names if getattr(config, each, None) is not None), None)
        for what, names in NAMES.items()
    }
    found = {what: value for what, value in found.items() if isinstance(value, str if what == "gate" else int)}
    found["gate"] = ACTIVATIONS.get(found.get("gate", ""), "silu")
    dtype = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch.")
    return {**found, "dtype": dtype if dtype in DTYPES else None}


# ---------------------------------------------------------------- tuning
def _tune(points: Sequence[Point], args: argparse.Namespace, machine: Machine, bench: Bench | None) -> int:
    kept = {point.tokens: point for point in tuned_file.points_for(machine) if point.layer == asdict(points[0].work) and point.finished}
    left = [point for point in points if args.again or point.tokens not in kept]
    for point in (each for each in points if each not in left):
        print(f"{point}: in the file since {kept[point.tokens].date}; --again measures it anew")
    if not left:
        return 0
    journal, outcomes, stopped = Journal(machine), list[Outcome](), None
    deadline = None if args.limit_minutes is None else time.monotonic() + 60 * args.limit_minutes
    with _measuring(bench, left[0], args.workers) as measures, _progress(len(left)) as progress:
        for number, point in enumerate(left, 1):
            progress.point(f"{point} ({number} of {len(left)})")
            search = Search(point, measures, journal, progress, deadline)
            outcomes.append(search.run())
            keep(machine, journal, outcomes[-1])
            stopped = search.stopped
            if stopped is not None:
                break
    _report(outcomes, left[len(outcomes) :], stopped)
    return 130 if isinstance(stopped, KeyboardInterrupt) else 0


def keep(machine: Machine, journal: Journal, outcome: Outcome) -> None:
    """Into the file, if anything was measured; what was tried on the way is forgotten once the search came to its end."""
    if not outcome.microseconds:
        return
    point, day = outcome.point, datetime.date.today().isoformat()
    answers = entries(point, outcome.choice)
    times = round(outcome.microseconds, 2), round(outcome.rules, 2)
    tuned_file.keep(machine, tuned_file.Point(asdict(point.work), point.tokens, answers, *times, day, outcome.finished))
    if outcome.finished:
        journal.finish(point)


@contextlib.contextmanager
def _measuring(bench: Bench | None, point: Point, workers: int | None) -> Iterator[Bench]:
    """The bench, or one of the GPU. Raises ValueError where the kernels do not run there."""
    if bench is not None:
        yield bench
        return
    from moe_compile.ops import experts_triton, registry
    from moe_compile.tuning_gpu import GpuBench

    work = point.work
    problem = registry.Problem(
        "experts", "cuda", work.torch_dtype, work.hidden, work.intermediate, work.experts, work.top_k, program=work.program,
        weight_layout=work.layouts,
    )  # fmt: skip
    reason = experts_triton.supports(problem)
    if reason is not None:
        raise ValueError(reason)
    own = GpuBench(workers)
    try:
        yield own
    finally:
        own.close()


# ---------------------------------------------------------------- what is told
class _Told(Progress):
    """Progress as lines, where rich is not installed."""

    def point(self, text: str) -> None:
        print(text, file=sys.stderr)

    def stage(self, text: str, total: int) -> None:
        if total:
            print(f"  {text}", file=sys.stderr)

    def advance(self) -> None:
        pass


class _Bars(_Told):
    """Two bars: points, and what is compiled and measured of the current one."""

    def __init__(self, bars: Any, points: int) -> None:
        self.bars, self.started = bars, False
        self.points, self.steps = bars.add_task("", total=points), bars.add_task("", total=None)

    def point(self, text: str) -> None:
        self.bars.update(self.points, description=text, advance=1 if self.started else 0)
        self.started = True

    def stage(self, text: str, total: int) -> None:
        if total:
            self.bars.reset(self.steps, total=total, description=text)

    def advance(self) -> None:
        self.bars.advance(self.steps)


@contextlib.contextmanager
def _progress(points: int) -> Iterator[_Told]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        yield _Told()
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars, points)


def _report(outcomes: Sequence[Outcome], not_reached: Sequence[Point], stopped: BaseException | None) -> None:
    rows: list[tuple[str, ...]] = [("tokens", "rules us", "tuned us", "gain", "tried", "did not run", "wrong", "choice")]
    for each in outcomes:
        times = (
            (f"{each.rules:.1f}", f"{each.microseconds:.1f}", f"{each.rules / each.microseconds:.2f}x") if each.microseconds else ("-",) * 3
        )
        text = "as the rules" if each.choice == rules(each.point) else str(each.choice)
        counts = str(each.tried), str(each.failed), str(len(each.wrong))
        rows.append((str(each.point.tokens), *times, *counts, text + ("" if each.finished else " (not finished)")))
    _table(rows)
    for each in outcomes:
        for choice, reason in each.wrong.items():
            print(f"WRONG, not kept: {each.point}, {choice}: {reason}")
    faster = sum(each.microseconds < GAIN * each.rules for each in outcomes if each.microseconds)
    print(f"{faster} of {len(outcomes)} faster than by the rules; kept in {tuned_file.path()}")
    if stopped is not None:
        rest = f"; not reached: {', '.join(map(str, not_reached))}" if not_reached else ""
        print(f"stopped {'by the user' if isinstance(stopped, KeyboardInterrupt) else 'at the limit'}{rest}. The same command goes on.")


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def _dry_run(points: Sequence[Point]) -> int:
    for point in points:
        own = rules(point)
        print(f"{point}, {point.slots / point.work.experts:.1f} rows an expert; the rules choose {_blocks(own)}: {own}")
        for other in starts(point)[1:]:
            print(f"  also from {_blocks(other)}: {other}")
        near = neighbours(point, own)
        for number, (role, shape) in enumerate(questions(point)):
            values = [each.layers[number] for each in near if each.layers[number] != own.layers[number]]
            fields = sorted({name for value in values for name, old in asdict(own.layers[number]).items() if asdict(value)[name] != old})
            wide = f"{shape.inner} -> {shape.width}" + (" twice" if shape.products == 2 else "")
            print(f"  layer {number} ({wide}, {role!r}): {len(values)} neighbours in the first step, in {', '.join(fields)}")
    print(f"nothing was measured; results would go to {tuned_file.path()}")
    return 0


def _blocks(choice: Choice) -> str:
    return f"blocks of {choice.rows} rows" if choice.rows else "single slots"


def _show(machine: Machine) -> int:
    tuned_file.entries_for(machine)  # says what is wrong with the file
    found = tuned_file.points_for(machine)
    print(f"{len(found)} measured for {machine.device} with Triton {machine.triton} in {tuned_file.path()}")
    rows: list[tuple[str, ...]] = [
        ("hidden", "inside", "experts", "top-k", "dtype", "layout", "tokens", "rules us", "tuned us", "date", "choice")
    ]
    for each in sorted(found, key=lambda point: (str(point.layer), point.tokens)):
        kept = {**each.layer, "layout": ":".join(filter(None, (each.layer.get("layout", "?"), each.layer.get("quant", ""))))}
        sizes = tuple(str(kept.get(name, "?")) for name in (*SIZES, "dtype", "layout"))
        choice = " | ".join(_answer(entry.value) for entry in each.entries if not isinstance(entry.value, int))
        times = f"{each.rules:.1f}", f"{each.microseconds:.1f}"
        rows.append((*sizes, str(each.tokens), *times, each.date, choice + ("" if each.finished else " (not finished)")))
    if found:
        _table(rows)
    return 0


def _answer(value: Any) -> str:
    return str(Choice(0, (value,)))


def _forget(machine: Machine) -> int:
    number = tuned_file.remove(machine.device)
    Journal(machine).forget()
    print(f"deleted {number} of {machine.device} from {tuned_file.path()}")
    return 0
