"""What ranks run in tests of the exchanges (tests/ranks.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moe_compile.ops import combine, quantize_dispatch
from moe_compile.ops.comm import exchange, payload
from moe_compile.ops.comm.setup import Setup, local_range

PROGRAM = "mm(1, relu(mm(0, x)))"
ROUTINGS = ("random", "one expert", "one rank", "an expert without tokens", "ids of no expert", "duplicates")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend_config() else torch.device("cpu")


def setup_for(hidden: int, top_k: int, experts: int, dtype: torch.dtype, **fields: Any) -> Setup:
    return Setup(dist.group.WORLD.group_name, hidden, top_k, experts, str(dtype).removeprefix("torch."), **fields)


def ids_for(tokens: int, top_k: int, experts: int, routing: str, g: torch.Generator) -> torch.Tensor:
    ids = torch.rand((tokens, experts), generator=g).topk(top_k, -1).indices
    if routing == "one expert":
        ids[:] = -1
        ids[:, 0] = experts - 1
    if routing == "one rank":
        ids = ids % max(1, experts // dist.get_world_size())
    if routing == "an expert without tokens":
        ids = torch.where(ids == 0, -1, ids)
    if routing == "ids of no expert":
        ids[torch.rand(ids.shape, generator=g) < 0.3] = -1
        ids[torch.rand(ids.shape, generator=g) < 0.1] = experts + 5
    if routing == "duplicates" and top_k > 1:
        ids[:, 1] = ids[:, 0]
    return ids


def everyone(mine: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all ranks, which may differ in their first extent."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine.detach().cpu())
    return found


def layer(provider: str, x: Any, ids: Any, w: Any, weights: list[Any], setup: Setup, experts_provider: str) -> Any:
    """One layer over ranks by the stage ops; weights are those of this rank."""
    got = quantize_dispatch.OP.overload(x, ids, setup.num_experts, setup.quant, provider, [w], setup.text)
    rows, scales, order, offsets, handle, (w_RK,) = got
    if setup.quant != "none":
        rows = payload.OP.overload(rows, scales, x.dtype)
    args = (rows, order, offsets, None, weights, [], PROGRAM, "eio,eio", "", setup.top_k, w_RK, x.dtype, experts_provider)
    y = torch.ops.moe_compile.permute_experts_combine(*args)
    return combine.OP.overload(y, None, handle, x.dtype, provider, setup.text)


def reference(x: Any, ids: Any, w: Any, weights: list[Any]) -> Any:
    """The same on one rank with all experts, in float64."""
    x, w, (up, down) = x.double(), w.double(), [each.double() for each in weights]
    out = torch.zeros((x.shape[0], down.shape[2]), dtype=torch.float64) + 0 * (x.sum() + w.sum() + up.sum() + down.sum())
    for k in range(ids.shape[1]):
        for t in range(ids.shape[0]):
            e = int(ids[t, k])
            if 0 <= e < up.shape[0]:
                out[t] = out[t] + w[t, k] * (torch.relu(x[t] @ up[e]) @ down[e])
    return out


def one_layer(
    provider: str, tokens: list[int], top_k: int, num_experts: int, routing: str, seed: int, dtype: torch.dtype = torch.float32,
    experts_provider: str = "cpu_grouped", backward: bool = True, **fields: Any,
) -> None:  # fmt: skip
    """Forward and gradients over the ranks against one process in float64."""
    rank, world, hidden, inter = dist.get_rank(), dist.get_world_size(), 16, 8
    shared, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 * seed + rank)
    full = [torch.randn(s, generator=shared) * 0.3 for s in ((num_experts, hidden, inter), (num_experts, inter, hidden))]
    count = tokens[rank % len(tokens)]
    x, w = torch.randn((count, hidden), generator=own), torch.rand((count, top_k), generator=own)
    ids, grad = ids_for(count, top_k, num_experts, routing, own), torch.randn((count, hidden), generator=own)
    first, end = local_range(num_experts, world, rank)
    setup = setup_for(hidden, top_k, num_experts, dtype, **fields)
    mine = [t.clone().to(device(), dtype).requires_grad_(backward) for t in (x, w.float(), *(each[first:end].clone() for each in full))]
    mine[1] = w.clone().to(device()).requires_grad_(backward)
    out = layer(provider, mine[0], ids.to(device()), mine[1], mine[2:], setup, experts_provider)
    x, w = x.to(dtype), w.clone()
    wanted_of = [x.double().requires_grad_(), w.double().requires_grad_(), *(each.to(dtype).double().requires_grad_() for each in full)]
    wanted = reference(wanted_of[0], ids, wanted_of[1], wanted_of[2:])
    limit = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype] if setup.quant == "none" else 8e-2
    what = f"{provider} {routing} rank {rank} of {world}, tokens {tokens}, K {top_k}, E {num_experts}"
    _close(out, wanted, limit, f"output, {what}")
    if not backward:
        return
    out.backward(grad.to(device(), dtype))
    wanted.backward(grad.double())
    _close(mine[0].grad, wanted_of[0].grad, limit, f"gradient of x, {what}")
    _close(mine[1].grad, wanted_of[1].grad, limit, f"gradient of the weights, {what}")
    for at, (got, each) in enumerate(zip(mine[2:], wanted_of[2:], strict=True)):
        total = sum(everyone(each.grad))[first:end]  # type: ignore[index]
        _close(got.grad, total, limit, f"gradient of parameter {at}, {what}")


def _close(got: torch.Tensor, wanted: torch.Tensor, limit: float, what: str) -> None:
    assert got.shape == wanted.shape, (what, got.shape, wanted.shape)
    if wanted.numel():
        error = float((got.detach().cpu().double() - wanted.detach()).abs().max() / wanted.detach().abs().max().clamp(min=1e-3))
        assert error <= limit, f"{what}: relative error {error:.1e}, limit {limit:.0e}"


def many_layers(provider: str, seed: int, **fields: Any) -> int:
    """Every routing, unequal and zero tokens, K = 1 and K = E, experts that do not divide evenly; all in one go, as ranks start slowly."""
    done = 0
    for routing in ROUTINGS:
        for tokens in ([5, 3, 0, 7], [1, 0, 2, 1], [0], [33, 4, 9, 1]):
            for top_k, num_experts in ((2, 8), (1, 4), (4, 4), (3, 7)):
                one_layer(provider, tokens, top_k, num_experts, routing, seed + done, **fields)
                done += 1
    exchange.destroy_all()
    return done
