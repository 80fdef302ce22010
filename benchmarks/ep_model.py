"""A Qwen3-MoE model over ranks (real layer sizes, random weights): moe_compile against one GPU and transformers' expert-parallel plan.

    torchrun --nproc-per-node 4 benchmarks/ep_model.py [--layers 4] [--vocab 151936] [--prefill 4x2048] [--decode 128x1]
             [--providers nvlink] [--graphs] [--rivals eager compiled graphs] [--name h200_ep_model]
    torchrun --nproc-per-node 2 benchmarks/ep_model.py --tiny          (CPU)

Same output: logits of each rank's own tokens, from the sharded and compiled model, against the whole model on that rank's device alone, in
the model's dtype (beside what the whole model differs by when its experts run one after the other: rounding) and in float32.

tokens/s: ours is expert parallel and data parallel, so each rank has its own sequences, BATCHxLENGTH as given. transformers' plan (what
`from_pretrained(..., distributed_config=DistributedConfig(tp_size=N, tp_plan="auto", enable_expert_parallel=True))` applies) replicates
tokens on all ranks, runs attention on all of them everywhere, and sums the experts' outputs by all-reduce: it gets the sequences of all
ranks, the same global batch. "one GPU": the whole model on one device, eager, with the global batch too.
prefill: the logits of the last token only, as `generate` asks for. decode: sequences of LENGTH tokens without a cache, which is what MoE
layers see of it. graphs: mode="reduce-overhead", CUDA graphs, for decode only.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ranks_timing as timing
import torch
import torch.distributed as dist
from ranks_timing import Clock, Here

import moe_compile
from moe_compile.ops.comm import exchange
from moe_compile.sharding import shard_experts

RESULTS = Path(__file__).parent / "results"
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 6e-2}  # of the relative error of all logits


class Work(NamedTuple):
    """name, sequences of each rank, tokens of a sequence, logits wanted of how many last tokens (0: all)."""

    name: str
    batch: int
    length: int
    keep: int


# ---------------------------------------------------------------- the model
def build(here: Here, args: argparse.Namespace) -> Any:
    """The same random model on every rank."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144)
    heads = dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    if args.tiny:
        sizes = dict(hidden_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = Qwen3MoeConfig(
        vocab_size=args.vocab, num_hidden_layers=args.layers, norm_topk_prob=True, decoder_sparse_step=1, use_cache=False, **sizes, **heads
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(args.torch_dtype)
    with here.device:
        model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(before)
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    return model


def tokens_of(here: Here, model: Any, work: Work, seed: int) -> tuple[Any, Any]:
    """(ids of this rank, ids of all ranks)."""
    g = torch.Generator().manual_seed(seed)
    every = torch.randint(0, model.config.vocab_size, (here.world * work.batch, work.length), generator=g).to(here.device)
    return every[here.rank * work.batch :][: work.batch].clone(), every


def logits(model: Any, ids: Any, keep: int) -> Any:
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits


_base: list[Any] = []


def ours(here: Here, model: Any, comm: str, most: int, **options: Any) -> tuple[Any, Any]:
    """(the compiled model, its report); the model given is sharded in place. options: moe_compile.compile's."""
    if not _base:
        _base.append(moe_compile.ParallelConfig.from_torchrun(ep=here.world))
    parallel = dataclasses.replace(_base[0], comm=comm, max_tokens_per_rank=most, equal_tokens=True)
    report = moe_compile.RewriteReport()
    return moe_compile.compile(shard_experts(model, parallel), parallel=parallel, report=report, dynamic=False, **options), report


def check_rewritten(report: Any, layers: int) -> None:
    if len(report.rewritten) < layers:
        raise RuntimeError(f"{len(report.rewritten)} of {layers} MoE blocks were rewritten: {report}")


def theirs(here: Here, model: Any) -> Any:
    """The model under transformers' expert-parallel plan, in place, as from_pretrained applies it."""
    from transformers.distributed import DistributedConfig

    mesh = dist.init_device_mesh(here.device.type, (here.world,))
    plan = DistributedConfig(tp_size=here.world, tp_plan="auto", enable_expert_parallel=True)
    return type(model).maybe_distribute_model(model, plan, mesh)


# ---------------------------------------------------------------- the same output
class Agreement(NamedTuple):
    """Of logits, over all ranks: largest difference, relative error as a whole, and share of tokens with the same first choice."""

    largest: float
    relative: float
    argmax: float

    def __str__(self) -> str:
        return f"{self.largest:.1e} | {self.relative:.1e} | {self.argmax:.2%}"


def agreement(got: Any, want: Any) -> Agreement:
    off = got.float() - want.float()
    own = float(off.abs().max()), float(off.norm() / want.float().norm()), float((got.argmax(-1) == want.argmax(-1)).float().mean())
    every = timing.told(own)
    return Agreement(max(e[0] for e in every), max(e[1] for e in every), sum(e[2] for e in every) / len(every))


def one_by_one(model: Any, ids: Any) -> Any:
    """The whole model's logits with each expert on its own: the same function in another order of rounding."""
    model.set_experts_implementation("eager")
    found = logits(model, ids, 0)
    model.set_experts_implementation("grouped_mm")
    return found


def same_output(here: Here, model: Any, args: argparse.Namespace, work: Work) -> list[tuple[str, Agreement, bool]]:
    """In the model's dtype and in float32; compiled without Inductor, whose result is compared where it is timed."""
    rows = []
    for dtype in dict.fromkeys((args.torch_dtype, torch.float32)):
        whole = model if dtype == args.torch_dtype else copy.deepcopy(model).to(dtype)
        ids, _ = tokens_of(here, model, work, 7)
        want = logits(whole, ids, 0)
        name = str(dtype).removeprefix("torch.")
        rows.append((f"one GPU, {name}: experts one by one", agreement(one_by_one(whole, ids), want), True))
        for comm in args.providers:
            torch._dynamo.reset()
            compiled, report = ours(here, copy.deepcopy(whole), comm, work.batch * work.length, inner="eager")
            found = agreement(logits(compiled, ids, 0), want)
            check_rewritten(report, args.layers)
            rows.append((f"ours {comm}, {name}", found, found.relative <= LIMITS[dtype]))
            del compiled
            tidy(here)
    return rows


# ---------------------------------------------------------------- speed
class Row(NamedTuple):
    """tokens: a second, of all ranks; error: relative, of the logits; right: is it within the limit. note: why it was not measured."""

    path: str
    work: str
    tokens: float = 0.0
    error: float = 0.0
    right: bool = False
    note: str = ""


class Speeds:
    """Tokens a second of each path for each work. `model` is the whole model; transformers' plan, measured last, changes it in place."""

    def __init__(self, here: Here, model: Any, works: list[Work], args: argparse.Namespace) -> None:
        self.here, self.model, self.works, self.args = here, model, works, args
        self.clock = Clock(here, args.repeats, flush=False)
        self.ids = {work: tokens_of(here, model, work, 3) for work in works}
        self.wanted = {work: [logits(model, ids, work.keep) for ids in both] for work, both in self.ids.items()}
        self.rows: list[Row] = []
        self.spread: Any = None

    def run(self) -> list[Row]:
        for work in self.works:
            self.add("one GPU", work, partial(self.measure, self.model, whose=1))
        for comm in self.args.providers:
            for work in self.works:
                self.add(f"ours {comm}", work, partial(self.ours, comm, {}))
                tidy(self.here)
                if self.args.graphs and work.name == "decode":
                    self.add(f"ours {comm}, graphs", work, partial(self.ours, comm, {"mode": "reduce-overhead"}))
                    tidy(self.here)
        for rival in self.args.rivals:
            for work in self.works[1:] if rival == "graphs" else self.works:
                self.add(f"transformers, expert parallel, {rival}", work, partial(self.theirs, rival))
        return self.rows

    def add(self, path: str, work: Work, make: Callable[[Work], tuple[float, float]]) -> None:
        """Measures on all ranks; what cannot be had on any of them has its reason as note."""
        row, why = Row(path, work.name), ""
        try:
            tokens, error = make(work)
            row = Row(path, work.name, tokens, error, error <= LIMITS[self.args.torch_dtype])
        except Exception as error_:  # noqa: BLE001  a rival that cannot be had must not end the table
            why = f"{type(error_).__name__}: {' '.join(str(error_).split())}"[:300]
        whys = timing.told(why)
        if any(whys) and not all(whys):
            raise SystemExit(f"{path}: only some ranks failed: {whys}")
        self.rows.append(row._replace(note=why))
        self.here.say(self.rows[-1])

    def measure(self, model: Any, work: Work, whose: int) -> tuple[float, float]:
        """(tokens/s, relative error) with this rank's tokens (0) or those of all ranks (1)."""
        ids = self.ids[work][whose]
        error = agreement(logits(model, ids, work.keep), self.wanted[work][whose]).relative
        (us,) = self.clock.times([lambda: logits(model, ids, work.keep)])
        return self.here.world * work.batch * work.length / us * 1e6, error

    def ours(self, comm: str, options: dict[str, Any], work: Work) -> tuple[float, float]:
        torch._dynamo.reset()
        compiled, report = ours(self.here, copy.deepcopy(self.model), comm, work.batch * work.length, inner=self.args.inner, **options)
        found = self.measure(compiled, work, 0)
        check_rewritten(report, self.args.layers)
        return found

    def theirs(self, rival: str, work: Work) -> tuple[float, float]:
        torch._dynamo.reset()
        self.spread = theirs(self.here, self.model) if self.spread is None else self.spread
        mode = "reduce-overhead" if rival == "graphs" else None
        return self.measure(self.spread if rival == "eager" else torch.compile(self.spread, dynamic=False, mode=mode), work, 1)


def tidy(here: Here) -> None:
    gc.collect()
    exchange.destroy_all()
    if here.cuda:
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- telling
def markdown(here: Here, args: argparse.Namespace, same: list[Any], rows: list[Row], works: list[Work]) -> str:
    sizes = "tiny" if args.tiny else "hidden 2048, 128 experts, top-8, moe_intermediate 768, 32/4 heads of 128"
    shared = "; ".join(f"{work.name}: {here.world} x {work.batch} sequences of {work.length}" for work in works)
    columns = " | ".join(f"{work.name}: tokens/s | ours is faster by | relative error" for work in works)
    lines = [
        "# A Qwen3-MoE model over ranks", "",
        f"`{timing.command()}` on {datetime.date.today()}: {timing.hardware(here)}, {timing.software('transformers')}. "
        f"{args.layers} layers, {sizes}, vocabulary {args.vocab}, {args.dtype}, random weights, eval. Session {timing.session()}.", "",
        "## The same output as on one GPU", "",
        "Logits of each rank's own tokens against the whole model on one device in the same dtype.", "",
        "| | largest difference | relative error | same first choice | |", "|" + "---|" * 5,
        *(f"| {name} | {found} | {'' if right else 'WRONG'} |" for name, found, right in same), "",
        "## Tokens a second", "",
        f"All ranks together, the same global batch for all ({shared}). Ours: each rank its own sequences; transformers: every rank all "
        f"sequences. Medians of {args.repeats}, maximum over ranks.", "",
        f"| path | {columns} |", "|" + "---|" * (1 + 3 * len(works)),
    ]  # fmt: skip
    best = {
        work.name: max([r.tokens for r in rows if r.work == work.name and r.path.startswith("ours") and r.right], default=0.0)
        for work in works
    }
    for path in dict.fromkeys(row.path for row in rows):
        own = {row.work: row for row in rows if row.path == path}
        cells = [_cells(own[work.name], best[work.name]) if work.name in own else "- | - | -" for work in works]
        lines.append(f"| {path} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: Row, best: float) -> str:
    if row.note:
        return f"- | - | {row.note}"
    return f"{row.tokens:.0f} | {f'{best / row.tokens:.2f}x' if row.right else 'WRONG'} | {row.error:.1e}"


def work_of(name: str, text: str, keep: int) -> Work:
    batch, _, length = text.partition("x")
    return Work(name, int(batch), int(length), keep)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prefill", default="4x2048", help="sequences a rank x tokens")
    parser.add_argument("--decode", default="128x1", help="sequences a rank x tokens")
    parser.add_argument("--check", default="2x128", help="sequences a rank x tokens whose logits are compared")
    parser.add_argument("--providers", nargs="+", default=["auto"], help="comm providers")
    parser.add_argument(
        "--rivals", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled", "graphs"], help="of transformers' plan"
    )
    parser.add_argument("--graphs", action="store_true", help="ours with CUDA graphs too, for decode")
    parser.add_argument("--inner", default="inductor", help="the compiler behind moe_compile")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--name", help="of the file in benchmarks/results; default: none is written")
    parser.add_argument("--cpu", action="store_true", help="gloo processes, although there are GPUs")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.vocab, args.prefill, args.decode, args.check = 2, 128, "2x16", "8x1", "2x8"
    args.torch_dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args = parse_args()
    here = timing.join(args.cpu)
    works = [work_of("prefill", args.prefill, 1), work_of("decode", args.decode, 0)]
    model = build(here, args)
    same = same_output(here, model, args, work_of("check", args.check, 0))
    rows = Speeds(here, model, works, args).run()
    text = markdown(here, args, same, rows, works)
    here.say(text)
    if here.rank == 0 and args.name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.name}.md").write_text(text)
    wrong = [name for name, _, right in same if not right] + [row.path for row in rows if row.path.startswith("ours") and not row.right]
    timing.leave(bool(wrong))


if __name__ == "__main__":
    main()
