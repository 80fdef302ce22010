"""One MoE layer over ranks: the plainly written layer, compiled with each comm provider, beside what people use or write today.

    torchrun --nproc-per-node 4 benchmarks/ep_layer.py [--shape qwen3] [--tokens 16 128 4096] [--providers nvlink alltoall ...] [--train]
             [--shared] [--style grouped] [--graphs] [--rivals by-hand transformers] [--name h200_ep_layer]

Router (float32, softmax, top-k, renormalised), SwiGLU experts, with --shared a shared expert. Every rank has --tokens tokens of its own.
Paths:
    ours NAME      moe_compile.compile of the layer, sharded by shard_experts, with comm=NAME; "+graphs": mode="reduce-overhead"
    by hand        sort by expert, NCCL all_to_all_single of a row for each slot, grouped_mm, all the way back; eager
    transformers   its expert-parallel plan for a Qwen3-MoE block, eager and compiled. It replicates tokens, so every rank is given the
                   tokens of all ranks: the same work as all ranks' own tokens, and a result that is everywhere
Every path is held against the layer on one device in float32 (transformers' against its own block, whose router rounds to bfloat16); one
that is off is marked WRONG, and the exit code is 1. --train times forward and backward; the reduction of replicated parameters' gradients
is not part of it. Times as ranks_timing.py says, eager (the host's part counts). Tables go to benchmarks/results/NAME.csv and .md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import datetime
import gc
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ranks_timing as timing
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks_timing import Clock, Here
from torch import nn

import moe_compile
from moe_compile.ops import registry
from moe_compile.ops.comm import exchange
from moe_compile.ops.comm.exchange import EXCHANGE
from moe_compile.sharding import expert_range, shard_experts

RESULTS = Path(__file__).parent / "results"
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative error of a row; of a gradient twice that
STYLES = ("grouped", "loop")


class Shape(NamedTuple):
    """Sizes of a layer: hidden, intermediate, experts, top-k."""

    hidden: int
    inter: int
    experts: int
    top_k: int


SHAPES = {"qwen3": Shape(2048, 768, 128, 8), "dsv3": Shape(7168, 2048, 256, 8), "tiny": Shape(64, 32, 8, 2)}


# ---------------------------------------------------------------- the layer as people write it
class Layer(nn.Module):
    """Stacked parameters as transformers keeps them: gate_up [E, 2I, H], down [E, H, I]."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, style: str, shared: bool) -> None:
        super().__init__()
        self.shape, self.style = shape, style
        g = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(sizes, device=device, generator=g) * sizes[-1] ** -0.5).to(dtype))

        self.router = normal(shape.experts, shape.hidden)
        self.gate_up_proj, self.down_proj = (
            normal(shape.experts, 2 * shape.inter, shape.hidden),
            normal(shape.experts, shape.hidden, shape.inter),
        )
        self.shared_up: Any
        self.shared_down: Any
        self.shared_up, self.shared_down = (
            (normal(2 * shape.inter, shape.hidden), normal(shape.hidden, shape.inter)) if shared else (None, None)
        )

    def route(self, x: Any) -> tuple[Any, Any]:
        """ids [T, K] and weights [T, K]."""
        scores = F.linear(x.float(), self.router.float()).softmax(-1)
        weights, ids = scores.topk(self.shape.top_k, dim=-1)
        return ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype)

    def forward(self, x: Any) -> Any:
        ids, weights = self.route(x)
        out = self.loop(x, ids, weights) if self.style == "loop" else self.grouped(x, ids, weights)
        return out if self.shared_up is None else out + F.linear(swiglu(F.linear(x, self.shared_up)), self.shared_down)

    def loop(self, x: Any, ids: Any, weights: Any) -> Any:
        out = torch.zeros_like(x)
        for e in range(self.shape.experts):
            token, slot = torch.where(ids == e)
            y = F.linear(swiglu(F.linear(x[token], self.gate_up_proj[e])), self.down_proj[e])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out

    def grouped(self, x: Any, ids: Any, weights: Any) -> Any:
        top_k = self.shape.top_k
        order = ids.flatten().argsort()
        offsets = torch.bincount(ids.flatten(), minlength=self.shape.experts).cumsum(0).to(torch.int32)
        y = grouped_experts(x[order // top_k], self.gate_up_proj, self.down_proj, offsets)
        return (y[order.argsort()].view(-1, top_k, x.shape[1]) * weights.unsqueeze(-1)).sum(1)


def swiglu(gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_experts(rows: Any, gate_up: Any, down: Any, offsets: Any) -> Any:
    """Each run of rows through its expert; offsets: where runs end."""
    h = swiglu(F.grouped_mm(rows, gate_up.transpose(-2, -1), offs=offsets))
    return F.grouped_mm(h, down.transpose(-2, -1), offs=offsets)


def exact(layer: Layer, x: Any, grad: Any, train: bool) -> list[Any]:
    """[out] in float32 on one device, and in training the gradients of x, gate_up, down and router."""
    twin = copy.deepcopy(layer).float()
    twin.style = "loop"
    x = x.float().requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = twin(x)
    if not train:
        return [out]
    wanted = [x, twin.gate_up_proj, twin.down_proj, twin.router]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.float())]


# ---------------------------------------------------------------- paths
class Way(NamedTuple):
    """A way to compute the layer: call(x [T, H]); all_tokens: x is what all ranks have. parameters: those whose gradients are looked at."""

    call: Callable[[Any], Any]
    parameters: list[Any]
    all_tokens: bool = False
    note: str = ""
    wanted: Any = None  # its own reference, if it computes another function than the layer


def ours(here: Here, layer: Layer, comm: str, tokens: int, args: argparse.Namespace, graphs: bool) -> Way:
    refuse(here, layer.shape, comm, tokens, args, graphs)
    parallel = dataclasses.replace(base_config(here), comm=comm, max_tokens_per_rank=tokens, equal_tokens=True)
    torch._dynamo.reset()
    local = shard_experts(copy.deepcopy(layer), parallel, gradients="sum")
    options: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {}
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(local, parallel=parallel, report=report, dynamic=False, inner=args.inner, **options)

    def call(x: Any) -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    with torch.set_grad_enabled(args.train):
        call(torch.randn(tokens, layer.shape.hidden, device=here.device).to(args.torch_dtype).requires_grad_(args.train))
    if not report.rewritten:
        raise RuntimeError(f"the layer was not rewritten: {report}")
    held: Any = local  # properties stand for the parameters of a sharded module
    parameters = [held._parameters[name] for name in ("gate_up_proj", "down_proj", "router")]
    return Way(call, parameters, note=", ".join(f"{stage} {name}" for stage, name in report.rewritten[0].providers.items()))


def refuse(here: Here, shape: Shape, comm: str, tokens: int, args: argparse.Namespace, graphs: bool) -> None:
    """Raises LookupError with the provider's reason if it cannot take the layer; compiling would raise it too, at length."""
    why = registry.get("comm", comm).supports(
        registry.Problem(
            stage="comm", device=here.device.type, dtype=args.torch_dtype, hidden=shape.hidden, num_experts=shape.experts,
            top_k=shape.top_k, tokens=tokens, world=here.world, training=args.train, max_tokens=tokens, cuda_graphs=graphs, ids_valid=True,
        )
    )  # fmt: skip
    if why is not None:
        raise LookupError(why)


_base: list[Any] = []


def base_config(here: Here) -> Any:
    """One configuration for all, so that there is one process group."""
    if not _base:
        _base.append(moe_compile.ParallelConfig.from_torchrun(ep=here.world))
    return _base[0]


class AllToAll(torch.autograd.Function):
    """all_to_all_single of rows; the backward sends them back."""

    @staticmethod
    def forward(ctx: Any, rows: Any, into: list[int], out: list[int]) -> Any:
        ctx.splits = out, into
        got = rows.new_empty((sum(into), *rows.shape[1:]))
        dist.all_to_all_single(got, rows.contiguous(), into, out)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return AllToAll.apply(grad, *ctx.splits), None, None


class ByHand(nn.Module):
    """Expert parallelism as it is written by hand, without de-duplication."""

    def __init__(self, here: Here, layer: Layer) -> None:
        super().__init__()
        self.here, self.layer = here, layer
        self.local = layer.shape.experts // here.world
        first, end = expert_range(layer.shape.experts, here.world, here.rank)
        self.gate_up_proj, self.down_proj = (nn.Parameter(p.detach()[first:end].clone()) for p in (layer.gate_up_proj, layer.down_proj))

    def forward(self, x: Any) -> Any:
        layer, world = self.layer, self.here.world
        ids, weights = layer.route(x)
        order = ids.flatten().argsort(stable=True)
        sent_WE = torch.bincount(ids.flatten(), minlength=layer.shape.experts).view(world, self.local)
        got_WE = torch.empty_like(sent_WE)
        dist.all_to_all_single(got_WE, sent_WE)
        out, into = torch.stack([sent_WE.sum(1), got_WE.sum(1)]).tolist()
        rows = AllToAll.apply(x[order // layer.shape.top_k], into, out)
        experts = torch.arange(self.local, device=x.device).repeat(world)
        by_expert = torch.repeat_interleave(experts, got_WE.flatten(), output_size=rows.shape[0]).argsort(stable=True)
        offsets = got_WE.sum(0).cumsum(0).to(torch.int32)
        y = self.experts(rows[by_expert], offsets)
        back = AllToAll.apply(y[by_expert.argsort()], out, into)
        result = (back[order.argsort()].view(-1, layer.shape.top_k, x.shape[1]) * weights.unsqueeze(-1)).sum(1)
        return result if layer.shared_up is None else result + F.linear(swiglu(F.linear(x, layer.shared_up)), layer.shared_down)

    def experts(self, rows: Any, offsets: Any) -> Any:
        if self.layer.style == "grouped":
            return grouped_experts(rows, self.gate_up_proj, self.down_proj, offsets)
        parts = rows.tensor_split(offsets[:-1].tolist())
        return torch.cat([F.linear(swiglu(F.linear(p, u)), d) for p, u, d in zip(parts, self.gate_up_proj, self.down_proj)])


def by_hand(here: Here, layer: Layer) -> Way:
    if layer.shape.experts % here.world:
        raise RuntimeError(f"{layer.shape.experts} experts do not divide over {here.world} ranks")
    made = ByHand(here, layer)
    return Way(made, [made.gate_up_proj, made.down_proj, layer.router])


def transformers_blocks(here: Here, layer: Layer) -> tuple[Any, Any]:
    """(a Qwen3-MoE block with these parameters, the same under transformers' expert-parallel plan)."""
    from transformers import Qwen3MoeConfig, Qwen3MoeModel
    from transformers.distributed import DistributedConfig

    s = layer.shape
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=s.hidden, moe_intermediate_size=s.inter, num_experts=s.experts, num_experts_per_tok=s.top_k,
        norm_topk_prob=True, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, decoder_sparse_step=1,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with layer.router.device:
        model = Qwen3MoeModel(config).to(layer.router.dtype).eval()
    block = model.layers[0].mlp
    with torch.no_grad():
        for mine, theirs in ((block.gate.weight, layer.router), (block.experts.gate_up_proj, layer.gate_up_proj)):
            mine.copy_(theirs)
        block.experts.down_proj.copy_(layer.down_proj)
    whole = copy.deepcopy(block)
    mesh = dist.init_device_mesh(here.device.type, (here.world,))
    plan = DistributedConfig(tp_size=here.world, tp_plan="auto", enable_expert_parallel=True)
    return whole, Qwen3MoeModel.maybe_distribute_model(model, plan, mesh).layers[0].mlp


def transformers_path(here: Here, layer: Layer, compiled: bool, train: bool) -> Way:
    if layer.shared_up is not None:
        raise RuntimeError("a Qwen3-MoE block has no shared expert")
    torch._dynamo.reset()
    whole, spread = transformers_blocks(here, layer)
    block = torch.compile(spread, dynamic=False) if compiled else spread

    def result(of: Any, x: Any) -> Any:
        out = of(x.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)

    def wanted(x: Any, grad: Any) -> list[Any]:
        x = x.detach().requires_grad_(train)
        with torch.set_grad_enabled(train):
            out = result(whole, x)
        return [out.detach(), *(torch.autograd.grad(out, [x], grad) if train else [])]

    return Way(lambda x: result(block, x), [], True, "router in " + str(layer.router.dtype).removeprefix("torch."), wanted)


def paths(here: Here, layer: Layer, tokens: int, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Way]]]:
    for name in args.providers:
        yield f"ours {name}", lambda name=name: ours(here, layer, name, tokens, args, False)  # type: ignore[misc]
        if args.graphs and not args.train:
            yield f"ours {name}+graphs", lambda name=name: ours(here, layer, name, tokens, args, True)  # type: ignore[misc]
    if "by-hand" in args.rivals:
        yield "by hand", lambda: by_hand(here, layer)
    if "transformers" in args.rivals:
        yield "transformers", lambda: transformers_path(here, layer, False, args.train)
        yield "transformers compiled", lambda: transformers_path(here, layer, True, args.train)


# ---------------------------------------------------------------- measuring
class Batch(NamedTuple):
    """This rank's tokens and its part of the output's gradient, and those of all ranks."""

    x: Any
    grad: Any
    x_all: Any
    grad_all: Any


def batch_of(here: Here, layer: Layer, tokens: int, dtype: torch.dtype, seed: int) -> Batch:
    g = torch.Generator(here.device).manual_seed(seed)
    x, grad = (torch.randn((here.world * tokens, layer.shape.hidden), device=here.device, generator=g).to(dtype) for _ in range(2))
    own = slice(here.rank * tokens, (here.rank + 1) * tokens)
    return Batch(x[own].clone(), grad[own].clone(), x, grad)


def step_of(path: Way, batch: Batch, train: bool) -> Callable[[], list[Any]]:
    """A call that returns the output, and in training the gradients of x and the parameters too."""
    x, grad = (batch.x_all, batch.grad_all) if path.all_tokens else (batch.x, batch.grad)
    x = x.detach().clone().requires_grad_(train)

    def forward() -> list[Any]:
        with torch.no_grad():
            return [path.call(x)]

    def forward_backward() -> list[Any]:
        for p in (x, *path.parameters):
            p.grad = None
        out = path.call(x)
        out.backward(grad)
        return [out.detach(), x.grad, *(p.grad for p in path.parameters)]

    return forward_backward if train else forward


def errors(here: Here, path: Way, batch: Batch, found: list[Any], expected: list[Any]) -> list[float]:
    """Of out by rows, and of gradients as a whole; expected: `exact` of all ranks' tokens."""
    if path.wanted is not None:
        expected = path.wanted(batch.x_all, batch.grad_all)
    tokens = batch.x.shape[0]
    own = slice(None) if path.all_tokens else slice(here.rank * tokens, (here.rank + 1) * tokens)
    result = [timing.row_error(found[0], expected[0][own])]
    if len(found) == 1:
        return result
    result.append(_relative(found[1], expected[1][own]) / 2)
    if path.parameters:
        first, end = expert_range(expected[2].shape[0], here.world, here.rank)
        router = found[4].float().clone()
        dist.all_reduce(router)
        pairs = ((found[2], expected[2][first:end]), (found[3], expected[3][first:end]), (router, expected[4]))
        result += [_relative(a, b) / 2 for a, b in pairs]
    return result


def _relative(a: Any, b: Any) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9))


def measured(here: Here, clock: Clock, layer: Layer, make: Callable[[], Way], batches: list[Any], args: Any) -> dict[str, Any]:
    """batches: of (Batch, what is right for it)."""
    path = make()
    worst = 0.0
    for batch, expected in batches:
        timing.poison(batch.x.shape, batch.x.dtype, here.device)
        worst = max([worst, *errors(here, path, batch, step_of(path, batch, args.train)(), expected)])
    batch = batches[0][0]
    (us,) = clock.times([step_of(path, batch, args.train)])
    worst = max(timing.told(worst))
    rate = here.world * batch.x.shape[0] / us * 1e6
    return {
        "us": round(us, 1),
        "tokens_per_s": round(rate),
        "error": f"{worst:.1e}",
        "ok": worst <= LIMIT[args.torch_dtype],
        "note": path.note,
    }


def attempt(here: Here, clock: Clock, layer: Layer, make: Callable[[], Way], batches: list[Any], args: Any) -> dict[str, Any]:
    """A path that cannot be had on any rank has its reason as note."""
    row, why = None, ""
    try:
        row = measured(here, clock, layer, make, batches, args)
    except Exception as error:  # noqa: BLE001  rivals and libraries may fail with anything
        if not isinstance(error, LookupError | RuntimeError):
            traceback.print_exc()
        why = reason(error)
    whys = timing.told(why)
    if any(whys) and not all(whys):
        raise SystemExit(f"only some ranks failed: {whys}")
    torch._dynamo.reset()
    gc.collect()
    exchange.destroy_all()
    if here.cuda:
        torch.cuda.empty_cache()
    return row or {"us": "", "tokens_per_s": "", "error": "", "ok": not layer_is_wrong(why), "note": why}


def reason(error: Exception) -> str:
    """In a line."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, LookupError) else f"{type(error).__name__}: {text}")[:400]


def layer_is_wrong(why: str) -> bool:
    """Is it a failure of ours, and not a provider's refusal or what a rival cannot do?"""
    return "not rewritten" in why or "ExchangeError" in why


def supported(here: Here, shape: Shape) -> list[str]:
    return [p.name for p in registry.providers("comm") if EXCHANGE in p.kernels]


def markdown(rows: list[dict[str, Any]], args: argparse.Namespace, here: Here) -> str:
    shape = SHAPES[args.shape]
    what = "a training step (forward and backward)" if args.train else "a forward"
    gradients = " (gradients: half of the relative error of the whole)" if args.train else ""
    lines = [
        "# One MoE layer over ranks", "",
        f"`{timing.command()}` on {datetime.date.today()}: {timing.hardware(here)}, {timing.software('transformers')}. "
        f"{args.shape}: hidden {shape.hidden}, intermediate {shape.inter}, {shape.experts} experts, top-{shape.top_k}, {args.dtype}"
        f"{', a shared expert' if args.shared else ''}. Session {timing.session()}.", "",
        f"Microseconds of {what}, maximum over ranks of the median; tokens/s of all ranks; error: the largest relative error of a "
        f"row{gradients}, WRONG if over {LIMIT[args.torch_dtype]:.0e}.", "",
    ]  # fmt: skip
    for tokens in args.tokens:
        own = [row for row in rows if row["tokens"] == tokens]
        times = [row["us"] for row in own if row["us"] and row["ok"] and row["path"].startswith("ours")]
        lines += [f"## {tokens} tokens a rank", "", "| path | us | tokens/s | times our best | error | |", "|" + "---|" * 6]
        for row in own:
            if not row["us"]:
                lines.append(f"| {row['path']} | - | - | - | - | {row['note']} |")
                continue
            ratio = f"{row['us'] / min(times):.2f}" if times and row["ok"] else "-" if row["ok"] else "WRONG"
            lines.append(f"| {row['path']} | {row['us']:.0f} | {row['tokens_per_s']} | {ratio} | {row['error']} | {row['note']} |")
        lines.append("")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3", choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 128, 4096])
    parser.add_argument("--providers", nargs="*", help="comm providers; default: all that are registered")
    parser.add_argument("--rivals", nargs="*", default=["by-hand", "transformers"], choices=["by-hand", "transformers"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--style", default="grouped", choices=STYLES, help="how the layer is written; grouped_mm takes bfloat16 alone")
    parser.add_argument("--inner", default="inductor", help="the compiler behind moe_compile")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="ours with CUDA graphs too")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--name", help="of the files in benchmarks/results; default: none are written")
    parser.add_argument("--cpu", action="store_true", help="gloo processes, although there are GPUs")
    args = parser.parse_args()
    args.torch_dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args = parse_args()
    here = timing.join(args.cpu)
    args.providers = supported(here, SHAPES[args.shape]) if args.providers is None else args.providers
    clock = Clock(here, args.repeats)
    layer = Layer(SHAPES[args.shape], args.torch_dtype, here.device, args.style, args.shared)
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        made = [batch_of(here, layer, tokens, args.torch_dtype, seed) for seed in (1, 2)]
        batches = [(batch, exact(layer, batch.x_all, batch.grad_all, args.train)) for batch in made]
        for name, make in paths(here, layer, tokens, args):
            row = attempt(here, clock, layer, make, batches, args)
            rows.append({"shape": args.shape, "train": args.train, "tokens": tokens, "path": name, **row})
            here.say(rows[-1])
    here.say(markdown(rows, args, here))
    if here.rank == 0 and args.name:
        write(rows, args, here)
    timing.leave(not all(row["ok"] for row in rows))


def write(rows: list[dict[str, Any]], args: argparse.Namespace, here: Here) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{args.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / f"{args.name}.md").write_text(markdown(rows, args, here))


if __name__ == "__main__":
    main()
