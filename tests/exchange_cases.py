"""What ranks run in tests of the exchanges (tests/ranks.py)."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_compile.ops import combine, quantize_dispatch, registry
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
    batched = exchange.SLOTS in registry.get("comm", provider).kernels  # such a provider weighs where the token came from
    moved = [] if batched else [w]
    got = quantize_dispatch.OP.overload(x, ids, setup.num_experts, setup.quant, provider, moved, setup.text)
    rows, scales, order, offsets, handle, brought = got
    if setup.quant != "none":
        rows = payload.OP.overload(rows, scales, x.dtype)
    slots, w_RK = (1, None) if batched else (setup.top_k, brought[0])
    args = (rows, order, offsets, None, weights, [], PROGRAM, "eio,eio", "", slots, w_RK, x.dtype, experts_provider)
    y = torch.ops.moe_compile.permute_experts_combine(*args)
    return combine.OP.overload(y, w if batched else None, handle, x.dtype, provider, setup.text)


def fused_layer(provider: str, x: Any, ids: Any, w: Any, weights: list[Any], setup: Setup, experts_provider: str) -> Any:
    """The same as one op, for inference: rows may be views of a workspace, and slots summed on the way back."""
    batched = exchange.SLOTS in registry.get("comm", provider).kernels
    moved, slots, at, late = ([], 1, -1, w) if batched else ([w], setup.top_k, 0, None)
    return torch.ops.moe_compile.exchange_experts(
        x, ids, moved, at, -1, late, weights, [], PROGRAM, "eio,eio", "", slots, x.dtype, provider, experts_provider, setup.text
    )


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
    experts_provider: str = "", backward: bool = True, hidden: int = 16, **fields: Any,
) -> None:  # fmt: skip
    """Forward and gradients over the ranks against one process in float64."""
    rank, world, inter = dist.get_rank(), dist.get_world_size(), 8
    grouped = "cpu_grouped" if device().type == "cpu" else "cuda_grouped_mm" if hidden % 8 == 0 else "reference"
    experts_provider = experts_provider or grouped
    shared, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 * seed + rank)
    full = [torch.randn(s, generator=shared) * 1.2 / s[1] ** 0.5 for s in ((num_experts, hidden, inter), (num_experts, inter, hidden))]
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
    limit = {torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype] if setup.quant == "none" else 0.2  # three bits of mantissa
    what = f"{provider} {routing} rank {rank} of {world}, tokens {tokens}, K {top_k}, E {num_experts}"
    _close(out, wanted, limit, f"output, {what}")
    if not backward:
        alone = [t.detach() for t in mine]
        together = fused_layer(provider, alone[0], ids.to(device()), alone[1], alone[2:], setup, experts_provider)
        _close(together, wanted, limit, f"output of one op, {what}")
        return
    out.backward(grad.to(device(), dtype))
    wanted.backward(grad.double())
    _close(mine[0].grad, wanted_of[0].grad, limit, f"gradient of x, {what}")
    _close(mine[1].grad, wanted_of[1].grad, limit, f"gradient of the weights, {what}")
    for at, (got, each) in enumerate(zip(mine[2:], wanted_of[2:], strict=True)):
        total = sum(everyone(each.grad))[first:end]  # type: ignore[index]
        _close(got.grad, total, limit, f"gradient of parameter {at}, {what}")


def _close(got: torch.Tensor, wanted: torch.Tensor, limit: float, what: str) -> None:
    """Compares on all ranks before any of them raises: ranks that go on alone would wait for each other."""
    told, size = "", float(wanted.numel() and wanted.detach().abs().max())
    if got.shape != wanted.shape:
        told = f"{what}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    elif wanted.numel():
        least = 1e-3 if limit < 1e-3 else 0.5  # one token's few numbers may all be small, their summands are not
        error = float((got.detach().cpu().double() - wanted.detach()).abs().max()) / max(size, least)
        told = "" if error <= limit else f"{what}: relative error {error:.1e}, limit {limit:.0e}"
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    assert not any(every), "; ".join(filter(None, every))


def many_layers(
    provider: str, seed: int, sizes: Any = ((2, 8), (1, 4), (4, 4), (3, 7)), routings: Any = ROUTINGS, **fields: Any
) -> int:  # fmt: skip
    """Every routing, unequal and zero tokens, K = 1 and K = E, experts that do not divide evenly; all in one go, as ranks start slowly."""
    done = 0
    for routing in routings:
        for tokens in ([5, 3, 0, 7], [1, 0, 2, 1], [0], [33, 4, 9, 1]):
            for top_k, num_experts in sizes:
                one_layer(provider, tokens, top_k, num_experts, routing, seed + done, **fields)
                done += 1
    exchange.destroy_all()
    return done


def exact_slots(provider: str, seed: int, **fields: Any) -> int:
    """As many_layers, where the number of received slots is read back though the rows' is known, as it is where they are large."""
    with mock.patch.object(quantize_dispatch, "EXACT_BYTES", 0):
        return many_layers(provider, seed, max_tokens=40, **fields)


def first_exchanges(provider: str, seed: int, times: int, **fields: Any) -> None:
    """The first exchange of a workspace, many times, by ranks that come to it at different moments."""
    for turn in range(times):
        if turn % dist.get_world_size() == dist.get_rank():
            torch.randn((6000, 6000), device=device()).cumsum(0)  # what its stream still does while the others have begun
        one_layer(provider, [5, 3, 0, 7], 1, 4, "random", seed + turn, backward=False, **fields)
        exchange.destroy_all()


def replayed(
    provider: str, seed: int, dtype: torch.dtype, hidden: int, routings: Any = ROUTINGS, experts_provider: str = "cuda_grouped_mm",
    **fields: Any,
) -> None:  # fmt: skip
    """A layer in a CUDA graph, replayed with other tokens and routings."""
    top_k, num_experts, count, world = 2, 8, 6 + dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    full = [torch.randn(s, generator=torch.Generator().manual_seed(seed)) / s[1] ** 0.5 for s in ((8, hidden, 8), (8, 8, hidden))]
    first, end = local_range(num_experts, world, dist.get_rank())
    own = [each[first:end].to(device(), dtype) for each in full]
    setup = setup_for(hidden, top_k, num_experts, dtype, cuda_graphs=True, **fields)
    x, ids, w = torch.zeros((count, hidden)), torch.zeros((count, top_k), dtype=torch.int64), torch.zeros((count, top_k))
    x, ids, w = x.to(device(), dtype), ids.to(device()), w.to(device())
    layers = (layer, fused_layer)
    with torch.no_grad():
        for _ in range(2):
            outs = [each(provider, x, ids, w, own, setup, experts_provider) for each in layers]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [each(provider, x, ids, w, own, setup, experts_provider) for each in layers]
    for turn, routing in enumerate([*routings, *routings]):
        chosen = ids_for(count, top_k, num_experts, routing, g)
        now = torch.randn((count, hidden), generator=g), chosen, torch.rand((count, top_k), generator=g)
        for held, new in zip((x, ids, w), now, strict=True):
            held.copy_(new)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        wanted = reference(x.cpu(), now[1], now[2], [each.to(dtype) for each in full])
        for out in outs:
            _close(out, wanted, 6e-2, f"{provider} replay {turn}, {routing}, rank {dist.get_rank()}")
    torch.cuda.synchronize()
    dist.barrier()
    del graph
    exchange.destroy_all()


def too_many_rows() -> None:
    """All tokens of all ranks go to one expert, which has room for fewer."""
    num_experts, count, world = 2 * dist.get_world_size(), 6, dist.get_world_size()
    x, w = torch.ones((count, 16), device=device()), torch.ones((count, 2), device=device())
    ids = torch.tensor([[1, 2]] * count, device=device())
    weights = [torch.ones(s, device=device()) for s in ((2, 16, 8), (2, 8, 16))]
    whole = None
    for overflow, room in (("drop", 0), ("drop", 4), ("error", 4)):
        setup = setup_for(16, 2, num_experts, torch.float32, max_tokens=8, capacity=room, overflow=overflow)
        out = layer("nvlink_batched", x, ids, w, weights, setup, "reference")
        torch.cuda.synchronize()
        whole = out if room == 0 else whole
        assert whole is not None
        if room:
            kept = (out / whole).sum() * 2  # slots: each gave the same
            total = kept.clone() / 16
            dist.all_reduce(total)
            assert round(float(total)) == 2 * min(room, world * count), (overflow, float(total))
        if overflow == "drop":
            exchange.check_all()
        else:
            with pytest.raises(exchange.ExchangeError, match="capacity=4"):
                exchange.check_all()
    dist.barrier()
    exchange.destroy_all()
