"""Whole models on one GPU: moe_compile's backend beside transformers' own experts, both under torch.compile in the same mode.

    python benchmarks/whole_model.py [--models qwen3 mixtral gptoss] [--layers 4] [--decode 1 4 16 64] [--context 1024]
                                     [--prefill 1x4096 4x2048] [--modes default reduce-overhead] [--paths NAME ...] [--out NAME]
    python benchmarks/whole_model.py --cpu --models qwen3 --decode 2 --context 16 --prefill 2x8      (tiny; only shows that it works)

Layers have the sizes of Qwen3-30B-A3B, Mixtral-8x7B and GPT-OSS-120B, weights are random. decode: one token for each sequence behind a
context in transformers' static cache, whose contents are random and put back before each call. prefill: logits of the last token, no cache.
Paths, all on the same weights:
    ours            torch.compile(model, backend="moe_compile", mode=...)
    grouped_mm      transformers' default, compiled in that mode
    batched_mm      what transformers' `generate` takes for decode, compiled in that mode
    loop            its experts one after the other, eager; the baseline of rounding
    without         the model without its experts, compiled in that mode: what is left is attention, routers, norms and the head
Times are of whole calls, host included, from an idle device; paths take turns, with other tokens for each call; medians. The share of the
experts is 1 - without / path: where it is small, attention bounds the step, and no experts make it faster than grouped_mm / without.
Each path is held against the same weights in float32: the median over tokens of the error of a token's logits, and the share of tokens that
are off by more than 6e-2 (rounding leads a token near a tie to another expert). More than twice the loop's share, or a median over 3e-2 and
over 1.25 times the loop's, is WRONG, and the exit code is 1; so it is where not every MoE block was rewritten.
--out NAME writes benchmarks/results/NAME.csv and .md; rows that are in the file already stay. --table FILE.csv [MORE.csv ...] measures
nothing: it adds the rows of the others to the first file, and writes its table.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layer_plot
import ranks_timing as timing
import torch
from layer_plot import distinct
from whole_case import NAMES, Step, Work, build, experts_of, like, row_errors, slot_bytes, step_of, wanted, widened, without_experts

import moe_compile

PATHS = ("loop", "grouped_mm", "batched_mm", "ours", "without")
OFF, MEDIAN, SHARE = 6e-2, 3e-2, 0.25
BATCHED_BYTES = 16 << 30  # of weights that transformers' batched_mm may copy in a layer
KEY = ("session", "model", "layers", "work", "mode", "path")
Row = dict[str, str]


# ---------------------------------------------------------------- a path
class Way:
    """One way to run the model in one mode."""

    def __init__(self, name: str, mode: str, model: Any, inner: str) -> None:
        self.name, self.mode, self.note = name, mode, ""
        self.report: Any = None
        self.call = self._compiled(model, inner)
        self.us, self.median, self.share = 0.0, 0.0, 0.0
        self.result: Any = None

    def _compiled(self, model: Any, inner: str) -> Callable[..., Any]:
        if self.name == "loop":
            return step_of(like(model, "eager"))
        if self.name == "ours":
            self.report = moe_compile.RewriteReport()
            options = {"report": self.report, "mode": None if self.mode == "default" else self.mode, "inner": inner}
            return torch.compile(step_of(like(model)), backend="moe_compile", options=options, dynamic=False)
        other = without_experts(model) if self.name == "without" else like(model, self.name)
        mode = None if inner != "inductor" else self.mode
        return torch.compile(step_of(other), backend=inner, mode=mode, dynamic=False)

    def run(self, step: Step) -> None:
        self.result = None
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            self.result = self.call(step.ids, step.positions, step.cache)

    def warm(self, step: Step, right: list[Any]) -> None:
        """Compiles, and compares every set; a graph is captured by the third call at the latest."""
        skips = _skipped_graphs()
        for at in range(4):
            step.load(at)
            self.run(step)
        if _skipped_graphs() > skips:
            self.note = "CUDA graphs were skipped"
        if self.name != "without":
            errors = torch.cat([self._error(step, at, want) for at, want in enumerate(right)])
            self.median, self.share = float(errors.median()), float((errors > OFF).float().mean())

    def _error(self, step: Step, at: int, want: Any) -> Any:
        step.load(at)
        self.run(step)
        return row_errors(self.result[:, -1], want)

    def rewritten(self, blocks: int) -> str:
        """Which experts took over; raises RuntimeError if a block was left."""
        if len(self.report.rewritten) != blocks:
            raise RuntimeError(f"{len(self.report.rewritten)} of {blocks} MoE blocks were rewritten: {self.report}")
        return f"experts: {', '.join(distinct(region.providers['experts'] for region in self.report.rewritten))}"


def _skipped_graphs() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


# ---------------------------------------------------------------- timing
def take_turns(paths: list[Way], step: Step, repeats: int) -> None:
    """Sets each path's microseconds."""
    take = _events if step.ids.is_cuda else _wall
    samples: list[list[float]] = [[] for _ in paths]
    for at in range(repeats):
        for index in [(at + shift) % len(paths) for shift in range(len(paths))]:
            step.load(at)
            samples[index].append(take(paths[index], step))
    for path, own in zip(paths, samples):
        path.us = statistics.median(own)


def _events(path: Way, step: Step) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    path.run(step)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end) * 1e3)


def _wall(path: Way, step: Step) -> float:
    begin = time.perf_counter()
    path.run(step)
    return (time.perf_counter() - begin) * 1e6


# ---------------------------------------------------------------- one model
class Measured:
    """All works of one model. References are computed first, so that the model in float32 is gone when times are taken."""

    def __init__(self, name: str, args: argparse.Namespace, about: dict[str, Any]) -> None:
        self.name, self.args, self.about = name, args, about
        self.model = build(name, args.layers, args.cpu, args.torch_dtype, torch.device("cpu" if args.cpu else "cuda:0"))
        self.blocks = len(experts_of(self.model))
        self.works = works_of(args)
        wide = widened(self.model)
        self.right = [wanted(wide, Step.drawn(self.model, work)) for work in self.works]
        del wide
        tidy()
        self.loop = 0.0, 0.0  # error and share of rows that are off: what the model's dtype does to it as it is written

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for work, right in zip(self.works, self.right):
            for mode in self.args.modes:
                step = Step.drawn(self.model, work)
                found += self.measure(work, mode, step, right)
                torch._dynamo.reset()
                tidy()
        return found

    def measure(self, work: Work, mode: str, step: Step, right: list[Any]) -> list[dict[str, Any]]:
        ready, rows = [], []
        for name in self.args.paths:
            begin = time.perf_counter()
            path, why = self.attempt(name, work, mode, step, right)
            if path is None:
                rows.append(self.row(work, mode, name, why))
            else:
                ready.append(path)
            print(f"[{time.perf_counter() - begin:.0f} s] {self.name} {work.label}, {mode}: {name} {why}", file=sys.stderr, flush=True)
        if ready:
            take_turns(ready, step, self.args.repeats)
        rows += [self.row(work, mode, path.name, path.note, path) for path in ready]
        times = ", ".join(f"{p.name} {p.us:.0f}{'' if self.right_(p) else ' WRONG'}" for p in ready)
        print(f"{self.name} {work.label}, {mode}: {times}", flush=True)
        return rows

    def attempt(self, name: str, work: Work, mode: str, step: Step, right: list[Any]) -> tuple[Way | None, str]:
        """A path that is compiled and compared, or None and why."""
        top_k = self.model.config.num_experts_per_tok
        copied = work.batch * work.length * top_k * slot_bytes(self.model)
        if name == "batched_mm" and copied > BATCHED_BYTES:
            return None, f"copies the weights for each slot, {copied >> 30} GiB a layer, measured up to {BATCHED_BYTES >> 30} GiB"
        try:
            path = Way(name, mode, self.model, self.args.inner)
            path.warm(step, right)
            if name == "ours":
                path.note = ", ".join(each for each in (path.rewritten(self.blocks), path.note) if each)
        except Exception as error:  # noqa: BLE001  a peer may fail with anything
            return None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if name == "loop":
            self.loop = path.median, path.share
        return path, path.note

    def right_(self, path: Way) -> bool:
        median, share = self.loop
        return path.name == "without" or (path.median <= max(MEDIAN, 1.25 * median) and path.share <= max(SHARE, 2 * share))

    def row(self, work: Work, mode: str, name: str, note: str, path: Way | None = None) -> dict[str, Any]:
        us = path.us if path else 0.0
        ok = self.right_(path) if path else name != "ours"
        return {
            **self.about, "model": self.name, "layers": self.args.layers, "dtype": self.args.dtype, "work": work.label, "mode": mode,
            "path": name, "us": round(us, 1) if path else "", "tokens_s": round(work.batch * work.length / us * 1e6) if path else "",
            "error": f"{path.median:.1e}" if path else "", "off": round(path.share, 3) if path else "", "ok": ok, "note": note,
        }  # fmt: skip


def works_of(args: argparse.Namespace) -> list[Work]:
    found = [Work("decode", batch, 1, args.context) for batch in args.decode]
    for text in args.prefill:
        batch, _, length = text.partition("x")
        found.append(Work("prefill", int(batch), int(length), 0))
    return found


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- telling
def table(rows: list[Row]) -> str:
    lines = ["# Whole models on one device: moe_compile beside transformers' own experts", ""]
    for session in distinct(row["session"] for row in rows):
        own = [row for row in rows if row["session"] == session]
        lines += [
            f"Session {session}, {', '.join(distinct(row['date'] for row in own))}: {own[0]['hardware']}; {own[0]['software']}; medians of "
            f"{', '.join(distinct(row['repeats'] for row in own))} calls.", "",
            *(f"    {each}" for each in distinct(row["command"] for row in own)), "",
        ]  # fmt: skip
    lines += [
        "Milliseconds of a call, host included. Gains are the path's time by ours, in the same mode. Experts' share: of the time of "
        "transformers' default, 1 - without / grouped_mm; most: grouped_mm / without, what experts in no time at all would gain.", "",
    ]  # fmt: skip
    for group in dict.fromkeys((row["session"], row["model"], row["layers"], row["dtype"], row["mode"]) for row in rows):
        own = [row for row in rows if group == tuple(row[key] for key in ("session", "model", "layers", "dtype", "mode"))]
        lines += _group(group, own)
    return "\n".join([*lines, *_notes(rows)]) + "\n"


def _group(group: tuple[str, ...], rows: list[Row]) -> list[str]:
    session, model, layers, dtype, mode = group
    lines = [
        f"## {NAMES[model]}, mode {mode} (session {session})", "", f"{layers} layers, {dtype}.", "",
        "| | " + " | ".join((*PATHS, "grouped_mm by ours", "best other by ours", "experts' share", "most", "error", "off")) + " |",
        "|" + "---|" * (len(PATHS) + 7),
    ]  # fmt: skip
    for work in distinct(row["work"] for row in rows):
        own = {row["path"]: row for row in rows if row["work"] == work}
        lines.append("| " + " | ".join((work, *(_cell(own.get(path)) for path in PATHS), *_gains(own))) + " |")
    return [*lines, ""]


def _gains(own: dict[str, Row]) -> list[str]:
    """Six cells: gain against the default, gain against the best other, share of the experts, most, our error and share of tokens off."""
    us = {path: float(row["us"]) for path, row in own.items() if row["us"] and row["ok"] == "True"}
    others = [us[path] for path in ("loop", "grouped_mm", "batched_mm") if path in us]
    default, rest, ours = us.get("grouped_mm"), us.get("without"), us.get("ours")
    return [
        f"{default / ours:.2f}x" if default and ours else "-", f"{min(others) / ours:.2f}x" if others and ours else "-",
        f"{1 - rest / default:.0%}" if default and rest else "-", f"{default / rest:.2f}x" if default and rest else "-",
        *((own["ours"]["error"], own["ours"]["off"]) if ours else ("-", "-")),
    ]  # fmt: skip


def _cell(row: Row | None) -> str:
    if row is None or not row["us"]:
        return "-"
    return f"{float(row['us']) / 1e3:.3f}" if row["ok"] == "True" else f"WRONG ({row['error']}, {row['off']})"


def _notes(rows: list[Row]) -> list[str]:
    """Each note once, with where it holds."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["note"]:
            where.setdefault((row["path"], row["note"]), []).append(f"{row['model']} {row['work']}, {row['mode']}")
    return ["## Notes", "", *(f"- {path}: {note} ({'; '.join(at)})" for (path, note), at in where.items()), ""] if where else []


def write_table(path: Path) -> None:
    path.with_suffix(".md").write_text(table(layer_plot.read(path)))


# ---------------------------------------------------------------- command line
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 4, 16, 64], help="numbers of sequences")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache before a decode step")
    parser.add_argument("--prefill", nargs="*", default=["1x4096", "4x2048"], help="sequences x tokens")
    parser.add_argument("--modes", nargs="+", default=["default", "reduce-overhead"], help="of torch.compile")
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only the table of a CSV file, after adding others to it")
    parser.add_argument("--out", metavar="NAME", help="of the files in benchmarks/results, or a path; default: none are written")
    parser.add_argument("--plugin", nargs="*", default=[], help="Python files to run first, which may register providers")
    parser.add_argument("--inner", help="the compiler behind all paths; default: inductor, with --cpu eager")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU; times say nothing")
    args = parser.parse_args()
    args.torch_dtype, args.inner = getattr(torch, args.dtype), args.inner or ("eager" if args.cpu else "inductor")
    return args


def about_run(args: argparse.Namespace) -> dict[str, Any]:
    hardware = f"{platform.machine()}, {os.cpu_count()} CPU cores" if args.cpu else torch.cuda.get_device_name(0)
    return {
        "session": timing.session(), "date": str(datetime.date.today()), "hardware": hardware, "software": timing.software("transformers"),
        "command": "python benchmarks/whole_model.py " + shlex.join(map(timing._short, sys.argv[1:])), "repeats": args.repeats,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.table:
        write_table(layer_plot.gather(args.table, KEY))
        return
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --cpu shows that the script works")
    warnings.filterwarnings("ignore")
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)
    torch._dynamo.config.recompile_limit = 64
    for path in args.plugin:
        runpy.run_path(path)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows += Measured(name, args, about_run(args)).rows()
        tidy()
        if args.out:
            layer_plot.add(layer_plot.results(args.out), rows, KEY)
    if args.out:
        write_table(layer_plot.results(args.out))
    print(table([{key: str(value) for key, value in row.items()} for row in rows]))
    if not all(row["ok"] for row in rows):
        raise SystemExit("some results are WRONG, or blocks were not rewritten")


if __name__ == "__main__":
    main()
