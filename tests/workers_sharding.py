"""Processes for the tests of sharded models: one function a world, run by every rank, and the models that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_compile.checkpoint import gather_state_dict, load_sharded, save_sharded
from moe_compile.config import ParallelConfig
from moe_compile.gradients import clip_grad_norm_, ddp, ignored_parameters
from moe_compile.ops.expert_shard import SHARDS
from moe_compile.sharding import expert_owner, expert_parameters, expert_range, shard_experts

H, INTER, E, K = 8, 6, 7, 2  # uneven over 2 and over 4 ranks


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INTER), nn.Linear(INTER, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Listed(nn.Module):
    """A loop over a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = torch.topk(self.gate(x).softmax(-1), K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


class Stacked(nn.Module):
    """Weights gathered by the chosen ids."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.up_bias, self.down = (nn.Parameter(torch.randn(E, *shape) / 3) for shape in ((INTER, H), (INTER,), (H, INTER)))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = torch.topk(self.gate(x).softmax(-1), K)
        hidden = torch.tanh(torch.einsum("tkih,th->tki", self.up[ids], x) + self.up_bias[ids])
        return (torch.einsum("tkhi,tki->tkh", self.down[ids], hidden) * w[..., None]).sum(1)


class Both(nn.Module):
    """Two layers, as a model has them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Listed(), Stacked()])
        self.head = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def build(cls: type[nn.Module] = Both) -> Any:
    """The same on every rank."""
    torch.manual_seed(0)
    return cls()


class _Collect(torch.autograd.Function):
    """What the exchange amounts to: every rank computes with all experts, and gradients come home summed."""

    @staticmethod
    def forward(ctx: Any, held: Tensor, shape: tuple[int, ...], spans: list[tuple[int, int]], group: Any) -> Tensor:
        ctx.span, ctx.group, ctx.held = spans[dist.get_rank(group)], group, held.shape
        whole = held.new_zeros(shape)
        first, last = ctx.span
        if first < last:
            whole[first:last] = held
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        first, last = ctx.span
        return (grad[first:last] if first < last else grad.new_zeros(ctx.held)), None, None, None


class Exchanged(nn.Module):
    """A sharded model that computes, in eager code and without the compiler: `whole` lends its code."""

    def __init__(self, sharded: nn.Module, whole: nn.Module, parallel: Any) -> None:
        super().__init__()
        self.sharded = sharded
        self.__dict__.update(whole=whole, parallel=parallel)

    def forward(self, x: Tensor) -> Tensor:
        values = dict(self.sharded.named_parameters())
        for path, module in self.sharded.named_modules():
            for name, shard in vars(module).get(SHARDS, {}).items():
                values[f"{path}.{name}"] = self.collect(module._parameters.get(name), shard)
        return torch.func.functional_call(self.whole, values, (x,))

    def collect(self, held: Any, shard: Any) -> Tensor:
        ep, group = shard.ep, self.parallel.ep_group
        if shard.kind == "stacked":
            return _Collect.apply(held, shard.shape, [expert_range(shard.num_experts, ep, r) for r in range(ep)], group)
        owner = expert_owner(shard.first, shard.num_experts, ep)
        held = torch.zeros(1, requires_grad=True) if held is None else held[None]
        return _Collect.apply(held, (1, *shard.shape), [(0, int(r == owner)) for r in range(ep)], group)[0]


def groups(ep: int, world: int) -> ParallelConfig:
    """ep neighbours in each ep group; a collective call."""
    ep_groups = [dist.new_group(list(range(first, first + ep))) for first in range(0, world, ep)]
    replicas = [dist.new_group(list(range(first, world, ep))) for first in range(ep)] if ep < world else None
    rank, dp = dist.get_rank(), world // ep
    replica = replicas[rank % ep] if replicas else None
    return ParallelConfig(ep=ep, dp=dp, ep_group=ep_groups[rank // ep], dp_group=replica)  # replica_group: found by us


def batches(world: int) -> list[Tensor]:
    return [torch.randn(5, H, generator=torch.Generator().manual_seed(rank)) for rank in range(world)]


def same(got: dict[str, Tensor] | None, want: dict[str, Tensor], atol: float = 0.0) -> None:
    assert got is not None
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def training(rank: int, world: int, ep: int, gradients: str) -> None:
    """One step with DDP: as one process with all tokens, and the mean (or the sum) of the losses."""
    parallel, reference, whole = groups(ep, world), build(), build()
    model = shard_experts(build(), parallel, gradients=gradients)
    trained = ddp(Exchanged(model, whole, parallel), parallel)
    trained(batches(world)[rank]).square().mean().backward()
    losses = torch.stack([reference(x).square().mean() for x in batches(world)])
    losses.mean().backward()
    factor = world if gradients == "sum" else 1
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            full, shard = f"{path}.{name}", vars(module).get(SHARDS, {}).get(name)
            want = wanted[full] if shard is None else wanted[full] * factor
            if shard is not None and shard.kind == "stacked":
                want = want[shard.first : shard.first + p.shape[0]]
            torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-7, msg=lambda m, full=full: f"{full}: {m}")
    if gradients == "mean":
        _step(model, reference, parallel)


def _step(model: nn.Module, reference: nn.Module, parallel: Any) -> None:
    for norm_type in (2.0, float("inf")):
        limit = 0.5 * float(torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()], norm_type))
        want = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit, norm_type)
        torch.testing.assert_close(clip_grad_norm_(model, limit, parallel, norm_type), want)
    for each in (model, reference):
        torch.optim.SGD(each.parameters(), lr=1.0).step()
    got = gather_state_dict(model, parallel)
    if dist.get_rank() == 0:
        same(got, reference.state_dict(), atol=1e-6)
    else:
        assert got is None


def checkpoints(rank: int, world: int, folder: Path) -> None:
    """Saved by all ranks, read by pairs of them; gathered on the last."""
    parallel, want = groups(world, world), build().state_dict()
    model = shard_experts(build(), parallel)
    save_sharded(model, folder, parallel)
    got = gather_state_dict(model, parallel, dst=world - 1)
    if rank == world - 1:
        same(got, want)
    assert (got is None) == (rank != world - 1)
    if world < 4:
        return
    pairs = groups(2, world)
    with torch.device("meta"):
        fresh = build()
    assert load_sharded(shard_experts(fresh, pairs), folder, pairs).missing == ()
    got = gather_state_dict(fresh, pairs, dst=3)
    if rank == 3:
        same(got, want)


def dtensors(rank: int, world: int, folder: Path) -> None:
    """Experts that are DTensors already, and the rest by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh, want = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)), build(Stacked).state_dict()
    parallel = ParallelConfig(ep=world, ep_group=mesh.get_group("ep"))
    model = build(Stacked)
    model.up = nn.Parameter(distribute_tensor(model.up.detach(), mesh, [Shard(0)]))
    model.down = nn.Parameter(distribute_tensor(model.down.detach(), mesh, [Replicate()]))
    with pytest.raises(ValueError, match="down is a DTensor"):
        shard_experts(model, parallel)
    model.down = nn.Parameter(distribute_tensor(build(Stacked).down.detach(), mesh, [Shard(0)]))
    shard_experts(model, parallel)
    assert isinstance(expert_parameters(model)["up"], DTensor)
    assert tuple(model.up.shape) == (E, INTER, H)
    _traces(model)
    fully_shard(model, mesh=mesh, ignored_params=ignored_parameters(model))
    assert isinstance(model.gate.weight, DTensor)
    assert not isinstance(expert_parameters(model)["up_bias"], DTensor)
    got = gather_state_dict(model, parallel)
    if rank == 0:
        same(got, want)
    model.load_state_dict({**{n: p * 0 for n, p in want.items() if n != "gate.weight"}}, strict=False)
    assert not expert_parameters(model)["up"].to_local().any()
    shard_folder = folder / "dtensors"
    save_sharded(shard_experts(build(Stacked), parallel), shard_folder, parallel)
    load_sharded(model, shard_folder, parallel)
    got = gather_state_dict(model, parallel)
    if rank == 0:
        same(got, want)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = clip_grad_norm_(model, 1.0, parallel)
    torch.testing.assert_close(norm, torch.tensor(float(sum(v.numel() for v in want.values()))).sqrt())


def _traces(model: nn.Module) -> None:
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.extend(node for node in gm.graph.nodes if "expert_shard" in str(node.target))
        return gm.forward

    with pytest.raises(RuntimeError, match="spread over"):
        torch.compile(model, backend=backend)(torch.randn(4, H))
    assert [node.meta["example_value"].shape[0] for node in seen] == [E] * 3
    assert all(type(node.args[0].meta["example_value"]).__name__ == "FakeTensor" or "Parameter" in str(node.args[0]) for node in seen)


def world_of_two(folder: str) -> None:
    rank = dist.get_rank()
    training(rank, 2, 2, "mean")
    checkpoints(rank, 2, Path(folder))
    dtensors(rank, 2, Path(folder))


def world_of_four(folder: str) -> None:
    rank = dist.get_rank()
    for gradients in ("mean", "sum"):
        training(rank, 4, 2, gradients)
    checkpoints(rank, 4, Path(folder))
