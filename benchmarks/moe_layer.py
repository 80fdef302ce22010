"""One MoE layer on one GPU with its routing given: ours beside every peer that can be imported, in one run.

    python benchmarks/moe_layer.py --forward [--shapes qwen3 mixtral] [--tokens 1 16 4096] [--routings uniform zipf] [--peers NAME ...]
                                   [--without NAME ...] [--repeats 20] [--out NAME] [--verbose]
    python benchmarks/moe_layer.py --train [--ahead] --tokens 16384 --routings uniform
    python benchmarks/moe_layer.py --quant fp8 --shapes qwen3 mixtral dsv3
    python benchmarks/moe_layer.py --quant mxfp4 --shapes gptoss
    python benchmarks/moe_layer.py --cpu --shapes tiny --tokens 5        (only shows that it works)

Everything from ids to the combined output is timed. Forward: replays of a CUDA graph; training: eager calls of forward and backward (x,
both weights, routing weights), from an idle device, or with --ahead on one that is busy until the host has launched all, as it is where
other layers come before. Before each sample the inputs of another set are copied in, so that the routing changes between replays, and
the L2 cache is overwritten. Peers take turns, so that a drift of the clocks meets all; medians. The floor is the larger of operations over
the rate of an 8192^3 product and bytes over the rate of a large copy, both measured before each shape.
Every peer is held against float32 for a random part of the tokens, for all input sets, in outputs that held NaN before. One that is off is
marked WRONG, and the exit code is 1. A peer that cannot be had stands in the table with its reason.
A shape is measured in a process of its own. A peer that takes the device or the process with it (an illegal memory access, a crash, no word
for --patience seconds) is named in the table, and the point is measured again without it; after two such points of a shape it is left out.
--quant: e4m3 weights with a scale for each 128 x 128, multiplied with rows that are quantised within the time (a scale for each 128
columns); mxfp4, int8 or int4 weights with rows as they are. Errors are against float32 with the weights that the quantised ones stand for,
bytes are those of the quantised ones, and for fp8 the rate of operations is that of an e4m3 product.
--out NAME writes benchmarks/results/NAME.csv, after each shape also .md and .png; rows that are in the file already stay, so runs can be
split. --peers and --without take the beginnings of names (layer_peers.py and layer_quantized.py have them all).
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import layer_measure
import layer_plot
import ranks_timing as timing
import torch
from layer_case import KINDS, ROUTINGS, SHAPES

ENDS = 2  # of the process by one peer, after which it is left out of the shape
Point = tuple[int, str]  # tokens, routing


# ---------------------------------------------------------------- a process for points of a shape
class Ended(Exception):
    """The process ended, or was ended, before it was done."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(why)
        self.peer, self.why = peer, why


def messages(job: dict[str, Any], patience: float) -> Iterator[dict[str, Any]]:
    """What a process that measures the job tells, until it is done. Raises Ended, with the peer that ran then."""
    receive, send = os.pipe()
    command = [sys.executable, __file__, *sys.argv[1:], "--job", json.dumps({**job, "send": send})]
    process = subprocess.Popen(command, pass_fds=[send])
    os.close(send)
    doing = ""
    try:
        for line in lines(receive, process, patience):
            if line is None:
                raise Ended(doing, f"no word for {patience:.0f} s (--patience)")
            message = json.loads(line)
            if message.get("done"):
                return
            if "lost" in message:
                raise Ended(message["lost"], f"took the device with it: {message['why']}")
            doing = message.get("doing", doing)
            yield message
        raise Ended(doing, f"ended the process: {ending(process.wait())}")
    finally:
        process.kill()
        process.wait()
        os.close(receive)


def lines(source: int, process: subprocess.Popen[bytes], patience: float) -> Iterator[str | None]:
    """Lines of a pipe until the process ends; None if nothing came for that long."""
    rest, heard = b"", time.monotonic()
    while time.monotonic() - heard < patience:
        over = process.poll() is not None  # what it wrote before is read below
        if select.select([source], [], [], 0 if over else min(1, patience))[0]:
            new = os.read(source, 1 << 16)
            if not new:  # closed
                return
            *whole, rest = (rest + new).split(b"\n")
            yield from (line.decode() for line in whole)
            heard = time.monotonic()
        elif over:
            return
    yield None


def ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# ---------------------------------------------------------------- all shapes
class Shape:
    """The points of a shape: those still to do, and peers that ended the process, by point."""

    def __init__(self, name: str, args: argparse.Namespace, command: str) -> None:
        self.name, self.args, self.command = name, args, command
        self.todo: list[Point] = [(tokens, routing) for tokens in args.tokens for routing in args.routings]
        self.broken: dict[Point, dict[str, str]] = {}

    def job(self) -> dict[str, Any]:
        return {"shape": self.name, "command": self.command, "points": [(*point, self.without(point)) for point in self.todo]}

    def without(self, point: Point) -> dict[str, str]:
        """Peers that are left out of a point, and why."""
        ends = [peer for broken in self.broken.values() for peer in broken]
        often = {peer: f"left out: it ended the process at {ENDS} other points" for peer in ends if ends.count(peer) >= ENDS}
        return {**often, **self.broken.get(point, {})}

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """Of each point, as soon as it is measured."""
        while self.todo:
            try:
                yield from self._once()
            except Ended as ended:
                if not ended.peer:
                    raise SystemExit(f"{self.name}: the measuring process failed, and no peer ran: {ended.why}") from None
                print(f"{self.name} {self.todo[0][0]} {self.todo[0][1]}: {ended.peer} {ended.why}; again without it", flush=True)
                self.broken.setdefault(self.todo[0], {})[ended.peer] = ended.why

    def _once(self) -> Iterator[list[dict[str, Any]]]:
        begin = time.perf_counter()
        for message in messages(self.job(), self.args.patience):
            if "line" in message:
                print(message["line"], flush=True)
            if self.args.verbose and message.get("step") == "check":
                print(f"[{time.perf_counter() - begin:.1f} s] {message['case']}: {message['doing']}", file=sys.stderr, flush=True)
            if "rows" in message:
                self.todo.pop(0)
                yield message["rows"]


# ---------------------------------------------------------------- command line
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--forward", action="store_true", help="the default")
    mode.add_argument("--train", action="store_true", help="forward and backward, eager")
    parser.add_argument("--ahead", action="store_true", help="in training: the clock starts when the host has launched all")
    parser.add_argument("--shapes", nargs="+", default=["qwen3", "mixtral", "gptoss", "dsv3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only those whose names begin so")
    parser.add_argument("--without", nargs="+", metavar="NAME", default=[], help="not those whose names begin so")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--quant", choices=list(KINDS), default="", help="kind of the weights; default: not quantised")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", metavar="NAME", help="of the files in benchmarks/results, or a path; default: none are written")
    parser.add_argument("--plugin", nargs="*", default=[], help="Python files to run first, which may register providers")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, although there is a GPU; times say nothing")
    parser.add_argument("--patience", type=float, default=240, help="seconds without a word after which a peer is given up; default 240")
    parser.add_argument("--verbose", action="store_true", help="names each peer on stderr before it runs")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.torch_dtype = getattr(torch, args.dtype)
    if args.ahead and not args.train:
        parser.error("--ahead is for --train: the host has no part in replays of a graph; add --train")
    if args.quant and args.train:
        parser.error("--quant is for --forward: quantised weights have no gradients; leave --train out")
    return args


def main() -> None:
    args = parse_args()
    if args.job:
        with os.fdopen(args.job["send"], "w", buffering=1) as to:
            layer_measure.run(args, args.job, lambda message: print(json.dumps(message), file=to))
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --cpu shows that the script works")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the measuring process ends too
    for path in args.plugin:
        runpy.run_path(path)
    layer_measure.chosen(args)  # names are checked before anything is measured
    command = "python benchmarks/moe_layer.py " + shlex.join(map(timing._short, sys.argv[1:]))
    rows: list[dict[str, Any]] = []
    for name in args.shapes:
        for new in Shape(name, args, command).rows():
            rows += new
            if args.out:
                layer_plot.add(layer_plot.results(args.out), new)
        if args.out:
            layer_plot.render(layer_plot.results(args.out))
    print(layer_plot.table([{key: str(value) for key, value in row.items()} for row in rows]))
    if not all(row["ok"] for row in rows):
        raise SystemExit("some results are WRONG")


if __name__ == "__main__":
    main()
