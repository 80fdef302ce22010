"""How long does compiling take, with us and without, and how much of it are our passes?

    python benchmarks/compile_time.py --layers 48 --experts 128 --style qwen3
    python benchmarks/compile_time.py --layers 2 --experts 128 --style loop

Each variant compiles the same model in a process of its own with an empty Inductor cache; the variants take turns.  `qwen3`: a transformers
Qwen3-MoE model of small dimensions (experts as transformers runs them by default); `loop`: a stack of naive masked loops over a ModuleList.
Prints a Markdown table, and writes it with the settings to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = ("plain", "ours")


def build(style: str, layers: int, experts: int):
    """(model, kwargs of one forward), seeded."""
    import torch

    torch.manual_seed(0)
    if style == "loop":
        return _loops(layers, experts).eval(), {"x": torch.randn(64, 32)}
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=8, decoder_sparse_step=1, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 256, (1, 64))
    return Qwen3MoeForCausalLM(config).eval(), {"input_ids": ids, "use_cache": False}


def _loops(layers: int, experts: int):
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

        def forward(self, x):
            w, ids = torch.topk(self.router(x).softmax(-1), 8, dim=-1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                rows, slot = torch.where(ids == e)
                out.index_add_(0, rows, expert(x[rows]) * w[rows, slot, None])
            return x + out

    return nn.Sequential(*[MoE() for _ in range(layers)])


def measure(variant: str, style: str, layers: int, experts: int) -> dict[str, float]:
    """Seconds of the first call, and of our passes in it."""
    import torch

    model, kwargs = build(style, layers, experts)
    args = () if style == "qwen3" else (kwargs.pop("x"),)
    passes: dict[str, float] = {}
    with torch.no_grad():
        want = _tensor(model(*args, **kwargs))
        start = time.perf_counter()
        if variant == "plain":
            flags = style == "loop"  # what our front door sets for its own compilation
            with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=flags, capture_scalar_outputs=flags):
                got = _tensor(torch.compile(model)(*args, **kwargs))
        else:
            from moe_compile import passes as ours

            run = ours.run

            def timed(gm, options):
                report = run(gm, options)
                for name, seconds in report.seconds.items():
                    passes[name] = passes.get(name, 0.0) + seconds
                passes["rewritten"] = passes.get("rewritten", 0) + sum(r.rewritten for r in report.regions)
                return report

            ours.run = timed
            import moe_compile

            got = _tensor(moe_compile.compile(model)(*args, **kwargs))
        total = time.perf_counter() - start
    error = float((got - want).abs().max() / want.abs().max())
    return {"total": total, "error": error, **passes}


def _tensor(out):
    return getattr(out, "logits", out)


def run_variant(variant: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--child", variant, "--style", options.style]
        command += ["--layers", str(options.layers), "--experts", str(options.experts)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[tuple[str, dict[str, float]]], options: argparse.Namespace) -> str:
    import torch

    title = f"{options.style}, {options.layers} layers, {options.experts} experts; torch {torch.__version__}, {platform.machine()}, "
    lines = [title + f"{os.cpu_count()} cores; `python benchmarks/compile_time.py {' '.join(sys.argv[1:])}`", ""]
    lines += ["| variant | first call s | our passes s | share | blocks rewritten | max relative error |", "|-|-|-|-|-|-|"]
    for name, r in rows:
        mine = sum(v for k, v in r.items() if k not in ("total", "error", "rewritten"))
        lines.append(
            f"| {name} | {r['total']:.1f} | {mine:.2f} | {mine / r['total']:.1%} | {int(r.get('rewritten', 0))} | {r['error']:.1e} |"
        )
    best = {v: min(r["total"] for n, r in rows if n == v) for v in VARIANTS if any(n == v for n, _ in rows)}
    if len(best) == 2:
        lines += ["", f"plain / ours: {best['plain'] / best['ours']:.2f}x"]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--style", choices=("qwen3", "loop"), default="qwen3")
    p.add_argument("--layers", type=int, default=48)
    p.add_argument("--experts", type=int, default=128)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--out", type=Path, help="Markdown file to append to")
    p.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.style, options.layers, options.experts)))
        return
    rows = [(v, run_variant(v, options)) for _ in range(options.repeats) for v in VARIANTS]
    text = table(rows, options)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as f:
            f.write(text + "\n\n")


if __name__ == "__main__":
    main()
