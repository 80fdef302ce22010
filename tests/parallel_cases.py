"""What ranks run in tests of whole models over ranks (tests/ranks.py)."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from typing import Any

import exchange_cases
import torch
import torch.distributed as dist
from corpus.harness import error
from corpus.hf_zoo import MOE_LAYERS, ZOO, build, first_tensor
from corpus.styles import CASES
from exchange_cases import device
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import moe_compile
from moe_compile import calibration
from moe_compile.gradients import ddp
from moe_compile.ops.comm import costs, exchange
from moe_compile.ops.comm.setup import local_range
from moe_compile.ops.registry import Problem
from moe_compile.sharding import shard_experts


def config(ep: int, tp: int = 1, dp: int = 1, **fields: Any) -> moe_compile.ParallelConfig:
    return moe_compile.ParallelConfig.from_torchrun(ep, tp, dp, **fields)


def data_rank(parallel: moe_compile.ParallelConfig) -> int:
    """Which of the different batches is this rank's; tp is the fastest axis."""
    return dist.get_rank() // parallel.tp


def compiled_of(model: Any, parallel: moe_compile.ParallelConfig, inner: Any = "eager") -> tuple[Any, moe_compile.RewriteReport]:
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    return moe_compile.compile(model, inner=inner, parallel=parallel, report=report), report


def batch_of(kwargs: dict[str, Any], seed: int, batch: int | None = None) -> dict[str, Any]:
    """Other tokens of the same kind; batch: rows of it."""
    g = torch.Generator().manual_seed(seed)
    ids = kwargs["input_ids"]
    ids = torch.randint(3, 90, (batch or ids.shape[0], ids.shape[1]), generator=g)
    return {k: v.to(device()) if isinstance(v, torch.Tensor) else v for k, v in {**kwargs, "input_ids": ids}.items()}


def real_model(name: str, axes: dict[str, Any], sharded: bool, batches: list[int] | None = None, inner: str = "eager") -> str:
    """Logits of a zoo model over ranks equal those of the whole model on this rank's tokens."""
    parallel = config(**axes)
    model, kwargs = ZOO[name]()
    model = model.to(device())
    whole = copy.deepcopy(model)
    if sharded:
        shard_experts(model, parallel)
    compiled, report = compiled_of(model, parallel, inner)
    for call in range(3):
        own = data_rank(parallel)
        inputs = batch_of(kwargs, 100 * call + own, batches[(own + call) % len(batches)] if batches else None)
        with torch.no_grad():
            off = error(first_tensor(compiled(**inputs)), first_tensor(whole(**inputs)))
        assert off < 1e-5, (name, axes, off, str(report))
    assert len(report.rewritten) >= MOE_LAYERS[name], str(report)
    assert parallel.ep == 1 or all(region.ranks for region in report.rewritten), str(report)
    exchange.destroy_all()
    return str(report)


def sharded_and_whole(name: str, parallel: moe_compile.ParallelConfig, inner: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A zoo model, sharded and compiled, and the same whole in eager mode; its arguments."""
    model, kwargs = ZOO[name]()
    model = model.to(device())
    whole = copy.deepcopy(model)
    return compiled_of(shard_experts(model, parallel), parallel, inner)[0], whole, kwargs


def in_fp8(name: str, axes: dict[str, Any], sharded: bool, inner: str = "eager") -> dict[str, float]:
    """A zoo model with quant="fp8" over ranks: rows travel in e4m3, experts multiply e4m3. Its errors: of weights, of the logits."""
    parallel = config(**axes)
    model, kwargs = ZOO[name]()
    model = model.to(device())
    whole = copy.deepcopy(model)
    if sharded:
        shard_experts(model, parallel)
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(model, inner=inner, parallel=parallel, report=report, options={"quant": "fp8"})
    inputs = batch_of(kwargs, data_rank(parallel))
    with torch.no_grad():
        got, want = first_tensor(compiled(**inputs)), first_tensor(whole(**inputs))
    found = {"logits": float((got - want).norm() / want.norm())}
    for region in report.rewritten:
        assert region.quant_errors, str(report)
        found.update(region.quant_errors)
    assert report.rewritten, str(report)
    exchange.destroy_all()
    return found


def fused(name: str, axes: dict[str, Any], limit: float = 1e-5) -> None:
    """What passes/fuse.py makes of dispatch, experts and combine over ranks computes the same."""
    from moe_compile.passes.fuse import fuse

    seen: list[str] = []

    def inner(gm: Any, inputs: Any) -> Any:
        fuse(gm)
        seen.extend(str(n.target) for n in gm.graph.nodes if "moe_compile" in str(n.target))
        return gm

    parallel = config(**axes)
    compiled, whole, kwargs = sharded_and_whole(name, parallel, inner)
    inputs = batch_of(kwargs, dist.get_rank() // parallel.tp, 1 + dist.get_rank() // parallel.tp)
    with torch.no_grad():
        off = error(first_tensor(compiled(**inputs)), first_tensor(whole(**inputs)))
    assert off < limit, (name, axes, off)
    assert seen.count("moe_compile.exchange_experts.default") == MOE_LAYERS[name], seen
    assert not any("quantize_dispatch" in target or "combine" in target for target in seen), seen
    exchange.destroy_all()


def overlapped(name: str, axes: dict[str, Any], inner: str = "eager") -> None:
    """Exchanges that go on beside the shared experts (as on a GPU) compute the same, and are started before these."""
    from moe_compile.passes.fuse import fuse
    from moe_compile.passes.overlap import overlap

    order: list[str] = []

    def compiled_by(gm: Any, inputs: Any) -> Any:
        fuse(gm)
        overlap(gm, lambda x, setup: True)
        gm.graph.lint()
        gm.recompile()
        order.extend(getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes if n.op == "call_function")
        return gm if inner == "eager" else torch._dynamo.lookup_backend(inner)(gm, inputs)

    compiled, whole, kwargs = sharded_and_whole(name, config(**axes), compiled_by)
    for call in range(4):
        inputs = batch_of(kwargs, 10 * call + dist.get_rank(), 1 + (dist.get_rank() + call) % 3)
        with torch.no_grad():
            off = error(first_tensor(compiled(**inputs)), first_tensor(whole(**inputs)))
        assert off < 1e-5, (name, axes, off)
    start, finish = order.index("start_exchange.default"), order.index("finish_exchange.default")
    assert order[start:finish].count("linear") >= 2, order[start : finish + 1]
    exchange.destroy_all()


def graphed(name: str, axes: dict[str, Any]) -> None:
    """A whole bfloat16 model replayed as CUDA graphs, other tokens each time; shared experts beside the exchange.

    Rounding may lead a token near a tie to another expert, so four of five tokens have to agree; a stale replay is wrong in all.
    """
    parallel = config(**axes)
    model, kwargs = ZOO[name]()
    model = model.to(device(), torch.bfloat16).requires_grad_(False)
    whole = copy.deepcopy(model)
    shard_experts(model, parallel)
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(model, parallel=parallel, report=report, mode="reduce-overhead")
    for call in range(6):
        inputs = batch_of(kwargs, 10 * call + dist.get_rank(), 2)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            got, wanted = first_tensor(compiled(**inputs)).double(), first_tensor(whole(**inputs)).double()
        off = ((got - wanted).abs().amax(-1) / wanted.abs().amax(-1)).flatten().sort().values
        assert off[int(0.8 * len(off))] < 5e-2, (name, call, off.tolist())
    assert all(region.providers["comm"] == axes["comm"] for region in report.rewritten), str(report)
    exchange.check_all()
    torch.cuda.synchronize()
    dist.barrier()
    exchange.destroy_all()


def by_ddp(model: Any, compiled: Any, parallel: Any) -> Any:
    return ddp(compiled, parallel)


def by_fsdp2(model: Any, compiled: Any, parallel: Any) -> Any:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params=moe_compile.ignored_parameters(model))
    return compiled


class Sparse(torch.nn.Module):
    """A plain block with its own number of experts."""

    def __init__(self, num_experts: int, hidden: int = 16) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(num_experts)
        self.gate = torch.nn.Parameter(torch.randn((num_experts, hidden), generator=g) * 0.5)
        self.up = torch.nn.Parameter(torch.randn((num_experts, 8, hidden), generator=g) * 0.3)
        self.down = torch.nn.Parameter(torch.randn((num_experts, hidden, 8), generator=g) * 0.3)

    def forward(self, x: Any) -> Any:
        weights, ids = torch.topk((x @ self.gate.t()).softmax(-1), 2)
        h = torch.relu(torch.einsum("tkih,th->tki", self.up[ids], x))
        return x + (torch.einsum("tkhi,tki->tkh", self.down[ids], h) * weights.unsqueeze(-1)).sum(1)


def layers_of_other_sizes() -> None:
    """Under FSDP2, which makes Dynamo take numbers of modules for variables, a step of layers with different numbers of experts."""
    parallel = config(dist.get_world_size())
    model = torch.nn.Sequential(Sparse(4), Sparse(8), Sparse(6)).to(device())
    whole = copy.deepcopy(model)
    shard_experts(model, parallel)
    ignored = moe_compile.ignored_parameters(model)
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    compiled, report = compiled_of(model, parallel)
    batches = [
        torch.randn((5 + rank, 16), generator=torch.Generator().manual_seed(rank)).to(device()) for rank in range(parallel.data_ranks)
    ]
    compiled(batches[data_rank(parallel)]).square().mean().backward()
    torch.stack([whole(x).square().mean() / len(batches) for x in batches]).sum().backward()
    _same("layers of other sizes", model, whole, parallel, dict(model.named_parameters()))
    assert len(report.rewritten) == 3, str(report)
    exchange.destroy_all()


def few_tokens(axes: dict[str, Any], counts: list[int], inner: str = "eager") -> None:
    """Forward and gradients of a block whose ranks have these numbers of tokens, none and fewer than tensor-parallel ranks among them."""
    parallel = config(**axes)
    for seed, shift in enumerate(range(len(counts))):
        model = Sparse(8).to(device())
        whole = copy.deepcopy(model)
        shard_experts(model, parallel)
        compiled, report = compiled_of(model, parallel, inner)
        inputs = [_tokens_of(rank, counts[(rank + shift) % len(counts)], seed) for rank in range(parallel.data_ranks)]
        x = inputs[data_rank(parallel)].clone().requires_grad_()
        wanted = [each.clone().requires_grad_() for each in inputs]
        out = compiled(x)
        outs = [whole(each) for each in wanted]
        out.square().sum().backward()
        torch.cat(outs).square().sum().backward()
        mine = data_rank(parallel)
        assert out.shape == outs[mine].shape
        assert torch.allclose(out, outs[mine], atol=1e-5), (axes, counts, shift)
        assert torch.allclose(x.grad, wanted[mine].grad, atol=1e-5), (axes, counts, shift)
        first, end = local_range(8, parallel.ep, dist.get_rank(parallel.ep_group))
        for name in ("up", "down"):
            got, full = dict(model.named_parameters())[name].grad, dict(whole.named_parameters())[name].grad
            assert torch.allclose(got * parallel.data_ranks, full[first:end], atol=1e-4), (axes, counts, shift, name)
        assert len(report.rewritten) == 1, str(report)
        exchange.destroy_all()


def _tokens_of(rank: int, count: int, seed: int) -> Any:
    return torch.randn((count, 16), generator=torch.Generator().manual_seed(100 * seed + rank)).to(device())


def calibrated() -> tuple[dict[str, list[int]], bool]:
    """(sizes that calibrate timed of each provider, whether a later configuration finds the same times again)."""
    problem = Problem("comm", "cpu", torch.float32, 32, num_experts=4, top_k=2, tokens=16, world=dist.get_world_size())
    table = moe_compile.calibrate(config(2), hidden=32, num_experts=4, top_k=2, dtype=torch.float32, tokens=(4, 64), repeats=3)
    there = {name: costs.measured(name, problem) for name in table.points}
    costs.forget()
    assert costs.measured("alltoall", problem) is None
    dist.barrier()  # the first rank has written
    config(2)
    again = {name: costs.measured(name, problem) for name in table.points}
    dist.barrier()
    if dist.get_rank() == 0:
        calibration.cache_file().write_text("[{]")
    dist.barrier()
    costs.forget()
    config(2)
    assert costs.measured("alltoall", problem) is None  # and the broken file has only been warned of
    dist.barrier()
    if dist.get_rank() == 0:
        calibration.cache_file().unlink()
    return {name: sorted(points) for name, points in table.points.items()}, there == again


def sizes_apart() -> list[tuple[int, str]]:
    """(tokens, exchange) of calls of one compiled model with few and with many tokens; equal on all ranks."""
    key = costs.Key("cpu", 2, "none")
    points = {"allgather": {1: 50.0, 4096: 4000.0}, "alltoall": {1: 100.0, 4096: 1000.0}}
    costs.use(key, costs.Table(costs.Shape(16, 2, 4), "a test", points))
    parallel = config(2, equal_tokens=True)
    model = Sparse(8).requires_grad_(False)
    torch._dynamo.reset()
    report, found = moe_compile.RewriteReport(), []
    compiled = moe_compile.compile(shard_experts(copy.deepcopy(model), parallel), inner=_remembers(found), parallel=parallel, report=report)
    calls = []
    for tokens in (4, 512, 6, 700, 3):
        x = torch.randn((tokens, 16), generator=torch.Generator().manual_seed(tokens + dist.get_rank()))
        assert error(compiled(x), model(x)) < 1e-5
        calls.append((tokens, found[-1]))
    costs.forget()
    exchange.destroy_all()
    return calls


def _remembers(found: list[str]) -> Any:
    """An inner compiler whose graphs append, when they run, the exchange that they use."""

    def compiled_by(gm: Any, inputs: Any) -> Any:
        names = [str(n.args[4]) for n in gm.graph.nodes if n.target is torch.ops.moe_compile.quantize_dispatch.default]

        def run(*args: Any) -> Any:
            found.extend(names)
            return gm(*args)

        return run

    return compiled_by


def one_step(name: str, axes: dict[str, Any], inner: str = "eager", reduced: Any = by_ddp) -> None:
    """A training step with DDP or FSDP2 over sharded experts equals the whole model's step on the mean loss of all batches."""
    parallel = config(**axes)
    model, kwargs = build(name)
    model = model.to(device())
    whole = copy.deepcopy(model).train()
    shard_experts(model.train(), parallel)
    compiled, report = compiled_of(model, parallel, inner)
    wrapped = reduced(model, compiled, parallel)
    local = dict(model.named_parameters())
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, whole)]
    for step in range(2):
        batches = [batch_of(kwargs, 10 * step + rank) for rank in range(parallel.data_ranks)]
        batches = [{**each, "labels": each["input_ids"]} for each in batches]
        loss = wrapped(**batches[data_rank(parallel)]).loss
        loss.backward()
        wanted = [whole(**each).loss / len(batches) for each in batches]
        torch.stack(wanted).sum().backward()
        assert abs(float(loss) - float(wanted[data_rank(parallel)]) * len(batches)) < 1e-5
        _same(name, model, whole, parallel, local)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert len(report.rewritten) >= MOE_LAYERS[name], str(report)
    assert not report.refused, str(report)
    exchange.destroy_all()


def _same(name: str, model: Any, whole: Any, parallel: Any, local: dict[str, Any]) -> None:
    """Gradients and parameters, the local part of sharded ones."""
    full, rank = dict(whole.named_parameters()), dist.get_rank(parallel.ep_group)
    largest = max(float(p.grad.abs().max()) for p in full.values() if p.grad is not None)
    for n, p in model.named_parameters():
        got = {"gradient": _full(p.grad), "value": _full(p.detach())}
        for what, mine in got.items():
            theirs = full[n].grad if what == "gradient" else full[n].detach()
            if theirs is not None and mine is not None and theirs.shape != mine.shape:
                size = -(-theirs.shape[0] // parallel.ep)
                theirs = theirs[rank * size : rank * size + mine.shape[0]]
            assert (mine is None) == (theirs is None), (name, n, what)
            if mine is not None:
                off = float((mine - theirs).abs().max()) / (largest if what == "gradient" else 1.0)
                assert off < 2e-5, (name, n, what, off)


def _full(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def styles(names: list[str], axes: dict[str, Any], sharded: bool) -> dict[str, str]:
    """Each style of writing a block over ranks equals itself on one; the reason for those that are not rewritten."""
    reasons = {}
    parallel = config(**axes)
    for name in names:
        block = CASES[name].factory()
        whole = copy.deepcopy(block)
        own = dist.get_rank() // parallel.tp
        inputs = [_rows(x, 3 * own) for x in CASES[name].inputs()]
        try:
            if sharded:
                shard_experts(block, parallel)
            compiled, report = compiled_of(block, parallel)
            with torch.no_grad():
                got, want = first_tensor(compiled(*inputs)), first_tensor(whole(*inputs))
        except Exception as e:  # noqa: BLE001  told to the test
            reasons[name] = f"{type(e).__name__}: {str(e)[:300]}"
            continue
        limit = 1e-5 if want.dtype == torch.float32 else 2e-2
        off = error(got, want)  # a style that draws random numbers is refused, and differs
        reasons[name] = "refused" if not report.rewritten else f"wrong by {off:.1e}" if not off < limit else ""
    return reasons


def _rows(x: Any, drop: int) -> Any:
    """Other numbers, and fewer tokens."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(drop)).to(x.dtype)
    return x[..., : x.shape[-2] - drop, :].contiguous()


def dead_rank(provider: str, dies: int, how: str) -> str:
    """One rank dies or stalls in the middle of the layers; what the others are told, and after how many seconds."""
    parallel = config(dist.get_world_size(), comm=provider, timeout=4.0)
    num_experts = 2 * dist.get_world_size()
    setup = exchange_cases.setup_for(
        16, 2, num_experts, torch.float32, timeout=4.0, max_tokens=0 if provider in ("alltoall", "allgather") else 8
    )
    setup = dataclasses.replace(setup, group=parallel.ep_group.group_name)
    g = torch.Generator().manual_seed(dist.get_rank())
    weights = [torch.randn(s, generator=g).to(device()) for s in ((2, 16, 8), (2, 8, 16))]
    experts = "cpu_grouped" if device().type == "cpu" else "cuda_grouped_mm"
    started = 0.0
    try:
        for layer in range(6):
            if layer == 3:
                _all_there()  # opening and compiling are not what is timed
                started = time.monotonic()
                if dist.get_rank() == dies:
                    return _gone(how)
            x, w = torch.randn((5, 16), generator=g), torch.rand((5, 2), generator=g)
            ids = torch.randint(0, num_experts, (5, 2), generator=g)
            exchange_cases.layer(provider, *(t.to(device()) for t in (x, ids, w)), weights, setup, experts)
        if device().type == "cuda":
            torch.cuda.synchronize()
        exchange.check_all()
    except exchange.ExchangeError as error:
        return f"{time.monotonic() - started:.1f} s: {error}"
    return "nothing happened"


def _all_there() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _gone(how: str) -> str:
    if how == "dies":
        os._exit(3)
    time.sleep(8)
    return "stalled"
