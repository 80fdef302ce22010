"""What the first call of a shape costs: seconds of compilation in a fresh process, with empty caches and with those of the run before.

    python benchmarks/first_call.py [--what layer block] [--shapes qwen3 mixtral gptoss dsv3] [--tokens 1 16 256 4096] [--train 4096]
                                    [--provider triton] [--jobs 4] [--out NAME]
    python benchmarks/first_call.py --cpu --shapes tiny --tokens 4 --train 4        (only shows that it works)

layer: our op for the whole layer, routing given; in training our stages, forward and backward (by --provider, or the one with the least
estimate). block: transformers' Mixtral block with these sizes, torch.compile(block, backend="moe_compile"), with Dynamo and Inductor.
Each point has caches of its own, so what shapes share is compiled for each again: a new shape for someone who has called nothing before.
What is not of a shape comes before the clock: imports, the CUDA context, Triton's driver.
compile: seconds that Triton spent on kernels in this process, kernels and launchers (Inductor compiles its own beside, in processes that
only the wall clock sees); kernels: binaries that are new in the cache, of all processes. Wanted: at most --limit seconds with empty caches,
no kernel with filled ones; the exit code is 1 where that does not hold. --jobs points at a time, on one GPU: wall times grow with it.
--out NAME writes benchmarks/results/NAME.csv and .md; rows that are in the file already stay. --table FILE.csv [MORE.csv ...] measures
nothing: it adds the rows of the others to the first file, and writes its table.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import layer_peers
import layer_plot
import ranks_timing as timing
import torch
from layer_case import SHAPES, Case, Layer, inputs_of
from layer_plot import distinct

from moe_compile.ops import registry

KEY = ("session", "what", "shape", "tokens", "mode", "caches")
MEASURED = ("first_s", "second_ms", "compile_s", "compiled", "loaded", "kernels")
Row = dict[str, str]


class Point(NamedTuple):
    """What is called for the first time."""

    what: str
    shape: str
    tokens: int
    mode: str

    @property
    def label(self) -> str:
        return f"{self.what} {self.shape} {self.tokens} {self.mode}"


# ---------------------------------------------------------------- in a fresh process
class Compilations:
    """Counts what Triton compiles in this process: kernels, and the launchers that its C compiler builds."""

    def __init__(self) -> None:
        self.kernels, self.loaded, self.seconds = 0, 0, 0.0

    def __enter__(self) -> Compilations:
        from triton import knobs
        from triton.runtime import build

        self._listener, self._build = knobs.compilation.listener, build._build
        knobs.compilation.listener, build._build = self._heard, self._built
        return self

    def __exit__(self, *_: object) -> None:
        from triton import knobs
        from triton.runtime import build

        knobs.compilation.listener, build._build = self._listener, self._build

    def _heard(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.loaded += 1
            return
        self.kernels += 1
        self.seconds += times.total / 1e6

    def _built(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._build(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begin


def counted() -> Any:
    """Compilations, or an empty one where there is no Triton."""
    try:
        import triton.runtime.build  # noqa: F401
    except ImportError:
        return contextlib.nullcontext(Compilations())
    return Compilations()


def first_call(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Times the first two calls. Runs in a process that has done nothing yet."""
    device = torch.device("cpu" if args.cpu else "cuda:0")
    case = Case(point.shape, SHAPES[point.shape], point.tokens, "uniform", point.mode == "train")
    call, note = (layer_call if point.what == "layer" else block_call)(case, device, args)
    ready(device)
    with counted() as found:
        first, second = timed(call, device), timed(call, device)
    return {
        "first_s": round(first, 3), "second_ms": round(second * 1e3, 3), "compile_s": round(found.seconds, 3),
        "compiled": found.kernels, "loaded": found.loaded, "note": note() if callable(note) else note,
    }  # fmt: skip


def layer_call(case: Case, device: torch.device, args: argparse.Namespace) -> tuple[Callable[[], Any], Any]:
    layer = Layer(case.shape, torch.bfloat16, device, case.train)
    peer = peer_of(layer, case, args.provider)
    given = inputs_of(case, torch.bfloat16, device, 1)
    return step_of(lambda: peer.call(given.x, given.ids, given.weights), peer.parameters if case.train else [], given.grad), peer.note


def peer_of(layer: Layer, case: Case, provider: str | None) -> layer_peers.Peer:
    """The op for the whole layer where there is one, else stages; its note is the provider."""
    if not case.train:
        with contextlib.suppress(layer_peers.Unsupported):
            return layer_peers.in_one(layer, case)
    problem = layer_peers.problem_of(layer, case)
    fit = [each for each in registry.providers("experts") if each.supports(problem) is None]
    name = provider or min(fit, key=lambda each: each.cost(problem)).name
    return layer_peers.stages(name)(layer, case)._replace(note=name)


def block_call(case: Case, device: torch.device, args: argparse.Namespace) -> tuple[Callable[[], Any], Any]:
    import moe_compile

    report = moe_compile.RewriteReport()
    block = block_of(case, device)
    options = {"report": report, **({"inner": "eager"} if args.cpu else {})}
    compiled = torch.compile(block, backend="moe_compile", options=options, dynamic=False)
    given = inputs_of(case, torch.bfloat16, device, 1)
    parameters = list(block.parameters()) if case.train else []
    x = given.x.unsqueeze(0)

    def note() -> str:
        if not report.rewritten:
            raise RuntimeError(f"the block was not rewritten: {report}")
        return str(report.rewritten[0].providers["experts"])

    return step_of(lambda: compiled(x), parameters, None if given.grad is None else given.grad.unsqueeze(0)), note


def block_of(case: Case, device: torch.device) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = case.shape
    config = MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inter, num_local_experts=shape.experts, num_experts_per_tok=shape.top_k
    )
    config._experts_implementation = "grouped_mm"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            block = MixtralSparseMoeBlock(config)
    finally:
        torch.set_default_dtype(before)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return block.requires_grad_(case.train).train(case.train)


def step_of(forward: Callable[[], Any], parameters: list[Any], grad: Any) -> Callable[[], Any]:
    """A forward, or a forward and the gradients of the parameters."""

    def step() -> Any:
        if not parameters:
            with torch.no_grad():
                return forward()
        return torch.autograd.grad(forward(), parameters, grad)

    return step


def ready(device: torch.device) -> None:
    if device.type == "cuda":
        from triton.runtime import driver

        torch.zeros(1, device=device).item()
        driver.active.get_current_target()


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# ---------------------------------------------------------------- points, each with its own caches
def points(args: argparse.Namespace) -> Iterator[Point]:
    """Shapes in turn, so that points that run at a time are of several: the largest would not fit in memory twice."""
    sizes = [(tokens, "forward") for tokens in args.tokens] + [(tokens, "train") for tokens in args.train]
    for what in args.what:
        for tokens, mode in sizes:
            yield from (Point(what, shape, tokens, mode) for shape in args.shapes)


def both(point: Point, args: argparse.Namespace) -> list[dict[str, Any]]:
    """With empty caches, and in another process with what the first one left there."""
    with tempfile.TemporaryDirectory() as folder:
        found = [run(point, args, Path(folder), caches) for caches in ("empty", "filled")]
    for each in found:
        print(f"{point.label}, caches {each['caches']}: {each['first_s']} s, kernels {each['compile_s']} s; {each['note']}", flush=True)
    return found


def run(point: Point, args: argparse.Namespace, folder: Path, caches: str) -> dict[str, Any]:
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    before = binaries(folder)
    command = [sys.executable, __file__, *sys.argv[1:], "--point", json.dumps(point)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {**point._asdict(), "caches": caches, **dict.fromkeys(MEASURED, "")}
    if done.returncode:
        return {**row, "ok": False, "note": " ".join(done.stderr.split())[-300:]}
    row |= json.loads(done.stdout.splitlines()[-1]) | {"kernels": binaries(folder) - before}
    good = row["compile_s"] <= args.limit if caches == "empty" else row["kernels"] == row["compiled"] == 0
    return {**row, "ok": good}


def binaries(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.cubin"))


# ---------------------------------------------------------------- telling
def table(rows: list[Row]) -> str:
    lines = ["# The first call of a shape", ""]
    for session in distinct(row["session"] for row in rows):
        own = [row for row in rows if row["session"] == session]
        lines += [
            f"Session {session}, {', '.join(distinct(row['date'] for row in own))}: {own[0]['hardware']}; {own[0]['software']}.", "",
            *(f"    {each}" for each in distinct(row["command"] for row in own)), "", *_shapes(own),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _shapes(rows: list[Row]) -> list[str]:
    cells = ("first call s", "compile s", "new kernels")
    lines = [
        "Seconds. Filled caches: another process, with what the first one left.", "",
        "| | experts | " + " | ".join((*cells, *(f"{each}, filled caches" for each in cells), "second call ms", "")) + " |",
        "|" + "---|" * 10,
    ]  # fmt: skip
    for label in distinct(_label(row) for row in rows):
        found = {row["caches"]: row for row in rows if _label(row) == label}
        empty, filled = found.get("empty", {}), found.get("filled", {})
        numbers = [each.get(key) or "-" for each in (empty, filled) for key in ("first_s", "compile_s", "kernels")]
        bad = "" if all(row["ok"] == "True" for row in found.values()) else "over the limit, or failed"
        lines.append(f"| {label} | {empty.get('note', '')} | {' | '.join(numbers)} | {filled.get('second_ms', '-')} | {bad} |")
    return [*lines, ""]


def _label(row: Row) -> str:
    return Point(row["what"], row["shape"], int(row["tokens"]), row["mode"]).label


def write_table(path: Path) -> None:
    path.with_suffix(".md").write_text(table(layer_plot.read(path)))


# ---------------------------------------------------------------- command line
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["layer", "block"], choices=["layer", "block"])
    parser.add_argument("--shapes", nargs="+", default=["qwen3", "mixtral", "gptoss", "dsv3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 256, 4096], help="of a forward")
    parser.add_argument("--train", nargs="*", type=int, default=[4096], help="tokens of a forward with backward")
    parser.add_argument("--provider", help="of the layer's experts in training")
    parser.add_argument("--limit", type=float, default=15, help="seconds of compilation that are right; default 15")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only the table of a CSV file, after adding others to it")
    parser.add_argument("--out", metavar="NAME", help="of the files in benchmarks/results, or a path; default: none are written")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, without Inductor")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.point:
        print(json.dumps(first_call(Point(*args.point), args)))
        return
    if args.table:
        write_table(layer_plot.gather(args.table, KEY))
        return
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --cpu shows that the script works")
    with ThreadPoolExecutor(args.jobs) as pool:
        found = [row for pair in pool.map(lambda point: both(point, args), points(args)) for row in pair]
    about = {
        "session": timing.session(), "date": str(datetime.date.today()), "software": timing.software("transformers"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores" if args.cpu else torch.cuda.get_device_name(0),
        "command": "python benchmarks/first_call.py " + shlex.join(map(timing._short, sys.argv[1:])),
    }  # fmt: skip
    rows = [{**about, **row} for row in found]
    if args.out:
        layer_plot.add(layer_plot.results(args.out), rows, KEY)
        write_table(layer_plot.results(args.out))
    print(table([{key: str(value) for key, value in row.items()} for row in rows]))
    if not all(row["ok"] for row in rows):
        raise SystemExit("some first calls took too long or failed, or kernels were compiled twice")


if __name__ == "__main__":
    main()
