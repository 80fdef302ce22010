"""What one MoE block costs the host where no CUDA graph holds it: moe_compile beside transformers' grouped_mm, both under torch.compile.

    python benchmarks/block_host.py [--models qwen3 gptoss mixtral] [--tokens 1 16 64 256] [--samples 7] [--calls 28] [--out NAME]
    python benchmarks/block_host.py --cpu --models qwen3 --tokens 4        (tiny; only shows that it works)

A block of a transformers model with real sizes: router, experts and their sum, in bfloat16 and default mode, without gradients. Paths, on
the same weights:
    ours          torch.compile(block, backend="moe_compile")
    decided anew  the same while calls are not replayed (ops/replay.py)
    grouped_mm    transformers' default under torch.compile
Microseconds of a call, medians of --samples times --calls calls: until the host has launched all, and until the device is done. Hosts
differ by a factor of two from machine to machine, so only columns of one row compare. The error is that of the rows against the block in
float32, the largest of all rows; more than LIMIT is WRONG and the exit code 1, as where the block was not rewritten. --out NAME writes
benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any, NamedTuple

import ranks_timing as timing
import torch
from whole_case import NAMES, build, experts_of, like, widened

import moe_compile
from moe_compile.ops import replay

WARM = 10  # calls before the clock: compilation, and what is recorded
LIMIT = 2e-2  # relative error of a row
PATHS = ("ours", "decided anew", "grouped_mm")


class Cost(NamedTuple):
    """Microseconds of a call, and the largest error of a row."""

    launched: float
    done: float
    error: float

    @property
    def cell(self) -> str:
        return f"{self.launched:.0f} / {self.done:.0f}" if self.error <= LIMIT else f"WRONG ({self.error:.1e})"


def block_of(model: Any) -> Any:
    """The module around the experts of the first layer."""
    return experts_of(model)[0][0]


def rows(result: Any) -> Any:
    """A block's output [T, H]; some give router logits too."""
    out = result[0] if isinstance(result, tuple) else result
    return out.reshape(-1, out.shape[-1])


def measured(call: Callable[[Any], Any], x: Any, wanted: Any, args: argparse.Namespace) -> Cost:
    wait = (lambda: None) if args.cpu else torch.cuda.synchronize
    got = rows([call(x) for _ in range(WARM)][-1]).float()
    error = float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
    samples = []
    for _ in range(args.samples):
        wait()
        begin = time.perf_counter()
        for _ in range(args.calls):
            call(x)
        launched = time.perf_counter()
        wait()
        samples.append((launched - begin, time.perf_counter() - begin))
    launched_us, done_us = (statistics.median(each) / args.calls * 1e6 for each in zip(*samples))
    return Cost(launched_us, done_us, error)


def costs_of(model: Any, wide: Any, tokens: int, args: argparse.Namespace) -> dict[str, Cost]:
    """Every path at one number of tokens."""
    torch._dynamo.reset()
    inner = "eager" if args.cpu else "inductor"
    report = moe_compile.RewriteReport()
    ours = torch.compile(block_of(model), backend="moe_compile", dynamic=False, options={"inner": inner, "report": report})
    theirs = torch.compile(block_of(like(model, "grouped_mm")), backend=inner, dynamic=False)
    x = torch.randn((1, tokens, model.config.hidden_size), device=model.device, dtype=model.dtype)
    wanted = rows(block_of(wide)(x.float()))
    found = {}
    for name in args.paths:
        with replay.paused() if name == "decided anew" else contextlib.nullcontext():
            found[name] = measured(theirs if name == "grouped_mm" else ours, x, wanted, args)
    if not report.rewritten and set(args.paths) - {"grouped_mm"}:
        raise SystemExit(f"the block was not rewritten: {report}")
    return found


def table_of(found: dict[str, dict[str, Cost]], args: argparse.Namespace) -> str:
    hardware = f"{platform.machine()}, {os.cpu_count()} CPU cores" if args.cpu else torch.cuda.get_device_name(0)
    lines = [
        "# What one MoE block costs the host, without CUDA graphs", "", f"{hardware}; {timing.software('transformers')}", "",
        "    python benchmarks/block_host.py " + shlex.join(map(timing._short, sys.argv[1:])), "",
        "Microseconds of a call, launched / done; medians.", "",
        "| | " + " | ".join(args.paths) + " |", "|" + "---|" * (len(args.paths) + 1),
    ]  # fmt: skip
    lines += [f"| {point} | " + " | ".join(own[name].cell for name in args.paths) + " |" for point, own in found.items()]
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--calls", type=int, default=28, help="in each sample")
    parser.add_argument("--out", metavar="NAME", help="of the file in benchmarks/results, or a path; default: none is written")
    parser.add_argument("--plugin", nargs="*", default=[], help="Python files to run first, which may register providers")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU; times say nothing")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --cpu shows that the script works")
    warnings.filterwarnings("ignore")
    for path in args.plugin:
        runpy.run_path(path)
    device, dtype = (torch.device("cpu"), torch.float32) if args.cpu else (torch.device("cuda"), torch.bfloat16)
    found: dict[str, dict[str, Cost]] = {}
    for name in args.models:
        model = build(name, 1, args.cpu, dtype, device)
        wide = widened(model)
        with torch.no_grad():
            for tokens in args.tokens:
                found[f"{name} {tokens}"] = costs_of(model, wide, tokens, args)
                print(f"{name} {tokens}: " + ", ".join(f"{path} {own.cell}" for path, own in found[f"{name} {tokens}"].items()), flush=True)
    text = table_of(found, args)
    print(text)
    if args.out:
        out = Path(args.out)
        (out if out.suffix else Path(__file__).parent / "results" / f"{out}.md").write_text(text)
    if not all(cost.error <= LIMIT for own in found.values() for cost in own.values()):
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()
