"""How long does compiling take, with us and without, and how much of it are our passes?

    python benchmarks/compile_time.py --style qwen3
    python benchmarks/compile_time.py --style dense loop hit --inner inductor aot_eager --limit 900 --out NAME

Models of 48 layers and 128 experts unless told otherwise, all dimensions small:

    dense   a loop over a ModuleList, each expert on all tokens: Dynamo captures it
    loop    the same on the rows that `torch.where(ids == e)` gives, added up by index_add_: Dynamo captures it with its capture flags
    hit     `for e in hit.nonzero()`: Dynamo breaks the graph there
    qwen3   transformers' Qwen3-MoE, experts as transformers runs them by default

`plain` is torch.compile(fullgraph=True) with the capture flags on, `ours` moe_compile.compile with the same compiler behind it. Each
measurement is a process of its own with an empty Inductor cache; it ends after --limit seconds. `cpu` is the processor time of that
process and of those that it starts, imports and building the model included: what to compare by on a machine that others use as well.
Prints a Markdown table; --out NAME appends the rows to NAME.csv, and to NAME.md the table of all rows there of such a model, whichever
run they come from.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("plain", "ours")
STYLES = ("dense", "loop", "hit", "qwen3")
FIELDS = ("style", "layers", "experts", "inner", "variant", "seconds", "cpu", "passes", "rewritten", "lifted", "error", "why")


def build(style: str, layers: int, experts: int):
    """(model, kwargs of one forward), seeded."""
    import torch

    torch.manual_seed(0)
    if style != "qwen3":
        return _loops(style, layers, experts).eval(), {"x": torch.randn(64, 32)}
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=8, decoder_sparse_step=1, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 256, (1, 64))
    return Qwen3MoeForCausalLM(config).eval(), {"input_ids": ids, "use_cache": False}


def _loops(style: str, layers: int, experts: int):
    import torch
    from torch import nn

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    class MoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(32, experts, bias=False), nn.ModuleList(Expert() for _ in range(experts))

        def route(self, x):
            return torch.topk(self.router(x).softmax(-1), 8, dim=-1)

    class Dense(MoE):
        def forward(self, x):
            w, ids = self.route(x)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                out = out + expert(x) * ((ids == e) * w).sum(-1, keepdim=True)
            return x + out

    class Loop(MoE):
        def forward(self, x):
            w, ids = self.route(x)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                rows, slot = torch.where(ids == e)
                out.index_add_(0, rows, expert(x[rows]) * w[rows, slot, None])
            return x + out

    class Hit(MoE):
        def forward(self, x):
            w, ids = self.route(x)
            out = torch.zeros_like(x)
            mask = nn.functional.one_hot(ids, experts).permute(2, 1, 0)
            for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
                slot, rows = torch.where(mask[e].squeeze(0))
                out.index_add_(0, rows, self.experts[e](x[rows]) * w[rows, slot, None])
            return x + out

    return nn.Sequential(*[{"dense": Dense, "loop": Loop, "hit": Hit}[style]() for _ in range(layers)])


# ---------------------------------------------------------------- one measurement
def measure(variant: str, style: str, inner: str, layers: int, experts: int) -> dict[str, float]:
    """Seconds of the first call, and of our passes in it."""
    import torch

    model, kwargs = build(style, layers, experts)
    args = () if style == "qwen3" else (kwargs.pop("x"),)
    with torch.no_grad():
        want = _tensor(model(*args, **kwargs))
        start = time.perf_counter()
        call, told = _plain(model, inner) if variant == "plain" else _ours(model, inner)
        got = _tensor(call(*args, **kwargs))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "error": float((got - want).abs().max() / want.abs().max()), **told}


def _plain(model: Any, inner: str) -> tuple[Any, dict[str, float]]:
    import torch

    flags = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}  # what fullgraph sets by itself later on
    torch._dynamo.config.patch(flags).__enter__()
    return torch.compile(model, backend=inner, fullgraph=True), {}


def _ours(model: Any, inner: str) -> tuple[Any, dict[str, float]]:
    import moe_compile
    from moe_compile import passes

    told: dict[str, float] = {"passes": 0.0, "rewritten": 0, "lifted": 0}
    run = passes.run

    def timed(*args: Any) -> Any:
        report = run(*args)
        told["passes"] += sum(report.seconds.values())
        told["rewritten"] += sum(r.rewritten for r in report.regions)
        told["lifted"] += sum(r.rewritten and not (r.validation or "").startswith("the same code") for r in report.regions)
        return report

    passes.run = timed
    return moe_compile.compile(model, inner=inner), told


def _tensor(out):
    return getattr(out, "logits", out)


def run_variant(variant: str, style: str, inner: str, options: argparse.Namespace) -> dict[str, Any]:
    row = {"style": style, "layers": options.layers, "experts": options.experts, "inner": inner, "variant": variant}
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--child", variant, "--style", style, "--inner", inner]
        command += ["--layers", str(options.layers), "--experts", str(options.experts)]
        before = _cpu()
        p = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, err = p.communicate(timeout=options.limit)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.communicate()
            return {**row, "cpu": _cpu() - before, "why": f"> {options.limit:.0f} s"}
    row["cpu"] = _cpu() - before
    if p.returncode:
        return {**row, "why": f"fails: {_reason(err)}"}
    return {**row, **json.loads(out.splitlines()[-1])}


def _cpu() -> float:
    """Processor seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reason(stderr: str) -> str:
    """The line that names the exception."""
    lines = [line for line in stderr.splitlines() if ": " in line and not line.startswith(" ") and line.split(": ")[0].isidentifier()]
    dotted = [line for line in stderr.splitlines() if line.startswith("torch.") and ": " in line]
    return ([*dotted, *lines, *stderr.splitlines()[-1:], "it says nothing"])[0][:160].replace("|", "/")


# ---------------------------------------------------------------- what is told
def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    import torch

    title = f"{options.layers} layers, {options.experts} experts; torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores; "
    lines = [title + f"`python benchmarks/compile_time.py {' '.join(sys.argv[1:])}`", ""]
    lines += [
        "| style | inner | variant | first call s | cpu s | our passes s | rewritten | lifted | max relative error | plain / ours, by cpu |"
    ]
    lines += ["|" + "-|" * 10]
    for row in rows:
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else row["why"]
        told = [f"{row['passes']:.2f}", str(int(row["rewritten"])), str(int(row["lifted"]))] if "passes" in row else ["", "", ""]
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append(
            "| "
            + " | ".join([row["style"], row["inner"], row["variant"], seconds, f"{row['cpu']:.0f}", *told, error, _ratio(row, rows)])
            + " |"
        )
    return "\n".join(lines)


def _ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The best of plain by the best of ours, on the rows of ours; more than that where plain was ended."""
    if row["variant"] == "plain" or "seconds" not in row:
        return ""
    of = [r for r in rows if (r["style"], r["inner"]) == (row["style"], row["inner"])]
    ours = min(r["cpu"] for r in of if r["variant"] == "ours" and "seconds" in r)
    plain = [r for r in of if r["variant"] == "plain"]
    if found := [r["cpu"] for r in plain if "seconds" in r]:
        return f"{min(found) / ours:.1f}"
    ended = [r["cpu"] for r in plain if r["why"].startswith(">")]
    return f"> {max(ended) / ours:.1f}" if ended else ""


def append(row: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def rows_of(file: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of models of this size."""
    with file.open(newline="") as f:
        found = [{k: v for k, v in row.items() if v} for row in csv.DictReader(f)]
    mine = [r for r in found if (r["layers"], r["experts"]) == (str(options.layers), str(options.experts))]
    return [{k: float(v) if k in ("seconds", "cpu", "passes", "rewritten", "lifted", "error") else v for k, v in r.items()} for r in mine]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--style", choices=STYLES, nargs="+", default=["dense"])
    p.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), nargs="+", default=["inductor"])
    p.add_argument("--variant", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    p.add_argument("--layers", type=int, default=48)
    p.add_argument("--experts", type=int, default=128)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--limit", type=float, default=900, help="seconds for one measurement")
    p.add_argument("--out", type=Path, help="appends to OUT.md and OUT.csv")
    p.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.style[0], options.inner[0], options.layers, options.experts)))
        return
    rows = []
    for _ in range(options.repeats):
        for style in options.style:
            for inner in options.inner:
                for variant in options.variant:
                    rows.append(run_variant(variant, style, inner, options))
                    print(rows[-1], file=sys.stderr, flush=True)
                    if options.out:
                        append(rows[-1], options.out.with_suffix(".csv"))
    text = table(rows_of(options.out.with_suffix(".csv"), options) if options.out else rows, options)
    print(text)
    if options.out:
        with options.out.with_suffix(".md").open("a") as f:
            f.write(text + "\n\n")


if __name__ == "__main__":
    main()
