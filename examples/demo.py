"""Compile five real MoE models with backend="moe_compile" and show what it did to them.

    python examples/demo.py [--models Mixtral,OLMoE] [--device cpu|cuda] [--inner inductor]

For each model: MoE blocks found and rewritten, the recovered formula, providers and why, nodes before and after,
largest error against eager, time per forward against eager and plain torch.compile, and 20 greedy tokens against
eager's. Then the graph of one block before and after. Exits with 1 if a block was not rewritten, an error is above 1e-5,
or a token differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from demo_models import CONFIGS, LAYERS, VOCABULARY, build
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe_compile import RewriteReport
from moe_compile.passes.diff import coloured

LIMIT, TOKENS, ROUNDS = 1e-5, 20, 7
STEPS = 5  # of the progress bar, for one model


@dataclasses.dataclass
class Result:
    """What came out for one model. seconds: what -> seconds of one forward. compile_seconds: likewise of the first."""

    report: RewriteReport
    error: float
    same_tokens: bool
    seconds: dict[str, float]
    compile_seconds: dict[str, float]

    @property
    def good(self) -> bool:
        regions = self.report.graphs[0].regions if self.report.graphs else []
        all_rewritten = len(regions) == LAYERS and not self.report.refused
        return all_rewritten and self.error <= LIMIT and self.same_tokens


def measure(name: str, device: str, inner: str, step: Callable[[str], None]) -> Result:
    """Build, compile and compare one model; `step` hears what is being done."""
    step(f"{name}: building")
    torch._dynamo.reset()
    model, plain, ours = (build(name, device) for _ in range(3))
    report = RewriteReport()
    plain.compile(backend=inner, dynamic=True)
    ours.compile(backend="moe_compile", dynamic=True, options={"inner": inner, "report": report})
    ids = torch.randint(3, VOCABULARY, (4, 64), device=device)
    models = {"eager": model, "torch.compile": plain, "moe_compile": ours}
    first, logits = {}, {}
    for what, each in models.items():
        step(f"{name}: {'running' if each is model else 'compiling'} ({what})")
        started = time.perf_counter()
        logits[what] = each(ids).logits
        first[what] = time.perf_counter() - started
    error = (logits["moe_compile"] - logits["eager"]).abs().max().item()
    seconds = interleaved(models, ids)
    step(f"{name}: generating {TOKENS} tokens")
    prompt = ids[:2, :8]
    same = torch.equal(generate(ours, prompt), generate(model, prompt))
    return Result(report, error, same, seconds, first)


def generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """The prompt and TOKENS greedy tokens."""
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False)


def interleaved(models: dict[str, Any], ids: torch.Tensor) -> dict[str, float]:
    """Median seconds of a forward, the models taking turns so that the machine's moods hit all of them."""
    times: dict[str, list[float]] = {what: [] for what in models}
    for _ in range(ROUNDS):
        for what, model in models.items():
            started = time.perf_counter()
            model(ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            times[what].append(time.perf_counter() - started)
    return {what: statistics.median(each) for what, each in times.items()}


def show(console: Console, name: str, result: Result) -> None:
    """Print one model's result."""
    graph, regions = result.report.graphs[0], result.report.graphs[0].regions
    verdict = "[bold green]ok[/]" if result.good else "[bold red]NOT AS IT SHOULD BE[/]"
    done = sum(region.rewritten for region in regions)
    console.print(f"\n[bold]{name}[/]  {verdict}")
    rows = {
        "MoE blocks": f"{len(regions)} found, {done} rewritten, in {len(result.report.graphs)} graph(s)",
        "nodes": f"{graph.nodes_before} -> {graph.nodes_after}",
        "error": f"{result.error:.1e} against eager (limit {LIMIT:.0e})",
        "forward": ", ".join(f"{what} {seconds * 1e3:.1f} ms" for what, seconds in result.seconds.items()),
        "first call": ", ".join(f"{what} {seconds:.1f} s" for what, seconds in result.compile_seconds.items()),
        "generate": f"{TOKENS} greedy tokens {'equal eager' if result.same_tokens else 'DIFFER from eager'}",
    }
    for what, text in rows.items():
        console.print(f"  [cyan]{what:11s}[/]{escape(text)}")
    for region in [region for region in regions if not region.rewritten] or regions[:1]:
        console.print(escape("  " + str(region).replace("\n", "\n  ")), highlight=False)


def show_diff(console: Console, report: RewriteReport) -> None:
    """Print the first block's part of the graph's difference."""
    hunks = report.graphs[0].diff().split("\n@@")
    console.print("\n[bold]The graph around the first rewritten block[/]")
    console.print(coloured("\n@@".join(hunks[:2])), highlight=False)


def compilers(inner: str | None) -> str:
    """The inner compiler to use: Inductor needs a C++ compiler on CPU."""
    found = any(shutil.which(each) for each in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return inner or ("inductor" if found else "aot_eager")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CONFIGS), help="comma-separated, from: " + ", ".join(CONFIGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", help='inner compiler (default: "inductor", without a C++ compiler "aot_eager")')
    arguments = parser.parse_args()
    names, inner = arguments.models.split(","), compilers(arguments.inner)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"torch {torch.__version__} on {arguments.device}, {torch.get_num_threads()} threads, inner {inner}")
    # Inductor's first compilation in a machine builds a header that later ones share: not to any model's account.
    torch.compile(lambda x: x.relu() * 2, backend=inner)(torch.ones(8, device=arguments.device))
    results = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=STEPS * len(names))

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)
            if not console.is_terminal:
                console.print(f"... {text}", style="dim")

        for name in names:
            results[name] = measure(name, arguments.device, inner, step)
            show(console, name, results[name])
    show_diff(console, results[names[0]].report)
    good = all(result.good for result in results.values())
    console.print("[bold green]all blocks rewritten, all results equal[/]" if good else "[bold red]see above[/]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
