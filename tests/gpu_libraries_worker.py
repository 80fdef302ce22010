"""Several GPUs of one host: the adapters of DeepEP and pplx-kernels over the real libraries, checked and timed. One process a GPU:

    torchrun --nproc-per-node 4 tests/gpu_libraries_worker.py deepep_ht deepep_ll [--stall deepep_v2]

DeepEP V1 and V2 are one module name, so each is a run of its own. Expert e multiplies by 1 + e/E: a token's result is
x * sum_k w_k (1 + e_k/E), whatever the ranks are. Gradients come by autograd through the ops. Times are those of dispatch + collect with
nothing between, CUDA events over 20 calls, the maximum over ranks. --stall: the last rank stays away, and the others tell what they see.
Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_compile.ops import combine, payload, quantize_dispatch, registry
from moe_compile.ops.comm import exchange, library_exchange
from moe_compile.ops.comm.setup import Setup

LIMITS = {"none": 1e-2, "fp8": 6e-2}
NUMBERS = 1e-4  # of gradients of the routing weights, which are summed in float32
EXPERTS, TOP_K = 64, 8
RAGGED = [33, 1, 7, 0]  # tokens of each rank
BATCHED = ("deepep_ll", "pplx")


class Worker:
    """One provider's checks on this rank."""

    verbose = False

    def __init__(self, provider: str, device: torch.device, hidden: int) -> None:
        self.provider, self.device, self.hidden = provider, device, hidden
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.batched = provider in BATCHED
        self.cases, self.bad, self.times = 0, list[str](), list[str]()
        self.largest = 0.0

    def __str__(self) -> str:
        ok = f"{self.cases - len(self.bad)} of {self.cases} comparisons ok, largest error in bfloat16 {self.largest:.1e}"
        times = "; ".join(self.times) or "not taken"
        return f"{self.provider} on {self.world} GPUs, hidden {self.hidden}: {ok}; us of dispatch + collect: {times}"

    # ------------------------------------------------------------ problems
    def setup(self, **fields: Any) -> Setup:
        base = dict(hidden=self.hidden, top_k=TOP_K, num_experts=EXPERTS, dtype="bfloat16", timeout=30.0)
        return Setup(**{**base, "group": dist.group.WORLD.group_name, **fields})

    def inputs(self, tokens: int, routing: str, seed: int, setup: Setup) -> tuple[Any, Any, Any]:
        g = torch.Generator(self.device).manual_seed(1000 * seed + self.rank)
        top_k, experts, device = setup.top_k, setup.num_experts, self.device
        x = torch.randn((tokens, self.hidden), device=device, generator=g).bfloat16()
        chosen = {"one rank": experts // self.world, "expert without": experts - 1}.get(routing, experts)
        ids = torch.rand((tokens, chosen), device=device, generator=g).topk(top_k).indices + (routing == "expert without")
        if routing == "holes":
            ids[torch.rand(ids.shape, device=device, generator=g) < 0.2] = -1
            ids[torch.rand(ids.shape, device=device, generator=g) < 0.1] = experts + 5
        if routing == "repeats":
            ids[:, top_k // 2] = ids[:, 0]
            ids[:, -1] = ids[:, 1]
        if routing == "all repeats":
            ids[:] = 3
        return x, ids, torch.rand((tokens, top_k), device=device, generator=g)

    def factors(self, setup: Setup) -> Any:
        return 1 + torch.arange(setup.num_experts, device=self.device, dtype=torch.float32) / setup.num_experts

    def layer(self, x: Any, ids: Any, w: Any, setup: Setup) -> Any:
        """The layer over ranks by the stage ops."""
        moved = [] if self.batched else [w]
        got = quantize_dispatch.OP.overload(x, ids, setup.num_experts, setup.quant, self.provider, moved, setup.text)
        rows, scales, order, offsets, handle, brought = got
        if setup.quant != "none":
            rows = payload.OP.overload(rows, scales, x.dtype)
        local = setup.num_experts // self.world
        own = torch.cat([self.factors(setup)[self.rank * local : (self.rank + 1) * local], torch.zeros(1, device=self.device)])
        expert = _experts(order, offsets, (rows.shape[0], 1 if self.batched else brought[0].shape[1]))
        factor = own[expert] if self.batched else own[expert] * brought[0]
        live = (expert < local).any(1, keepdim=True)
        y = torch.where(live, rows.float() * factor.sum(1, keepdim=True), 0).bfloat16()
        return combine.OP.overload(y, w if self.batched else None, handle, x.dtype, self.provider, setup.text)

    def wanted(self, x: Any, ids: Any, w: Any, setup: Setup) -> Any:
        valid, last = (ids >= 0) & (ids < setup.num_experts), setup.num_experts - 1
        return x.double() * (w.double() * self.factors(setup).double()[ids.clamp(0, last)] * valid).sum(1, keepdim=True)

    # ------------------------------------------------------------ checks
    def note(self, what: str, got: Any, wanted: Any, limit: float) -> None:
        """Compares on all ranks alike."""
        error = torch.zeros((), device=self.device, dtype=torch.float64)
        if wanted.numel():
            error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-6)
        error = torch.where(torch.isfinite(error), error, 9e9)
        dist.all_reduce(error, dist.ReduceOp.MAX)
        self.cases += 1
        self.largest = max(self.largest, float(error) if limit == LIMITS["none"] else 0.0)
        if not float(error) < limit:
            self.bad.append(f"{what}: {float(error):.1e}")
        if self.verbose and self.rank == 0:
            print(f"  {self.provider} {what}: {float(error):.1e}", flush=True)

    def once(self, tokens: list[int], routing: str, backward: bool = False, **fields: Any) -> None:
        """One call, with gradients if asked."""
        setup, seed = self.setup(**fields), self.cases
        x, ids, w = self.inputs(tokens[self.rank % len(tokens)], routing, seed, setup)
        mine, theirs = [[t.clone().requires_grad_(backward) for t in ts] for ts in ((x, w), (x.double(), w.double()))]
        out, wanted = self.layer(mine[0], ids, mine[1], setup), self.wanted(theirs[0], ids, theirs[1], setup)
        what = f"{routing} {tokens} {fields or ''}"
        self.note(what, out.detach(), wanted.detach(), LIMITS[setup.quant])
        if backward:
            grad = torch.randn(x.shape, device=self.device).bfloat16()
            out.backward(grad)
            wanted.backward(grad.double())
            self.note(f"gradient of x, {what}", mine[0].grad, theirs[0].grad, LIMITS["none"])
            self.note(f"gradient of the weights, {what}", mine[1].grad, theirs[1].grad, NUMBERS)

    def replayed(self, tokens: int, routings: list[str], **fields: Any) -> None:
        """One CUDA graph, replayed twice with every routing."""
        setup = self.setup(**fields)
        held = self.inputs(tokens, routings[0], 1, setup)
        graph, out = _captured(lambda: self.layer(*held, setup))
        for turn, routing in enumerate(routings * 2):
            for old, new in zip(held, self.inputs(tokens, routing, 10 + turn, setup), strict=True):
                old.copy_(new)
            out.fill_(float("nan"))
            graph.replay()
            self.note(f"replay {turn} {routing} {tokens} {fields}", out, self.wanted(*held, setup), LIMITS[setup.quant])

    # ------------------------------------------------------------ times
    def timed(self, tokens: int, eager: bool = False, **fields: Any) -> None:
        """Microseconds of dispatch + collect."""
        setup = self.setup(**fields)
        x, ids, w = self.inputs(tokens, "random", 3, setup)
        own = exchange.exchange_of(self.provider, setup.text, self.device)

        def both() -> Any:
            got = own.dispatch(x, ids, [] if self.batched else [w])
            return own.collect(got.rows, got.handle, torch.bfloat16, w if self.batched else None)

        call = both if eager else _captured(both)[0].replay
        for _ in range(3):
            call()
        dist.barrier()
        torch.cuda.synchronize()
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        for _ in range(20):
            call()
        ended.record()
        torch.cuda.synchronize()
        found = torch.tensor([begun.elapsed_time(ended) * 50], device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        more = "" if setup.ids_valid else ", any ids"
        self.times.append(f"{tokens} tokens {'eager' if eager else 'graph'}{more} {float(found):.0f}")


def _experts(order: Any, offsets: Any, shape: tuple[int, int]) -> Any:
    """int64 [R, slots]: the local expert of each slot, their number for none, and for those that order leaves out."""
    place = torch.searchsorted(offsets.long(), torch.arange(order.shape[0], device=order.device), right=True)
    none = torch.full(shape, offsets.shape[0], device=order.device)
    return none.view(-1).scatter_(0, order, place).view(shape)


def _captured(call: Callable[[], Any]) -> tuple[Any, Any]:
    """(the call's CUDA graph, what it writes)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    torch.cuda.synchronize()
    dist.barrier()
    return graph, out


# ---------------------------------------------------------------- what each provider is asked
ALL = ["random", "one rank", "holes", "repeats", "expert without"]


def standard(worker: Worker, graphs: bool) -> None:
    """Providers that bring a row for each token: with gradients."""
    static = worker.provider == "deepep_v2"
    most = {"max_tokens": 4096 if static else 0}
    for tokens, routing in (
        ([4096, 4000], "random"), (RAGGED, "holes"), ([1, 0], "random"), ([0], "random"), ([257, 64], "one rank"),
        ([65, 31], "expert without"), ([40, 9], "repeats"), ([12], "all repeats"),
    ):  # fmt: skip
        worker.once(tokens, routing, True, **most)
    for routing in ("random", "holes", "repeats", "one rank"):  # fewer slots than ranks, with 4 of them
        worker.once([120, 31], routing, True, top_k=2, max_tokens=most["max_tokens"] and 128)
    worker.once([333, 40], "random", True, ids_valid=True, **most)
    worker.once([333, 40], "random", quant="fp8", ids_valid=True, **most)
    if not graphs:
        return
    small = {"max_tokens": 128, "cuda_graphs": True}
    worker.once([100, 31], "holes", True, **small)
    worker.replayed(128, ALL, **small)
    worker.replayed(128, ["random", "one rank"], ids_valid=True, **small)
    worker.timed(128, **small)
    worker.timed(128, ids_valid=True, **small)
    worker.timed(4096, ids_valid=True, max_tokens=4096, cuda_graphs=True)
    for tokens in (128, 4096) if not static else ():
        worker.timed(tokens, True, ids_valid=True)


def batched(worker: Worker, graphs: bool) -> None:
    """Providers that bring a row for each slot: for inference."""
    only_valid = worker.provider == "pplx"
    most = {"max_tokens": 128, "ids_valid": only_valid}
    for tokens, routing in (
        ([128, 127], "random"), (RAGGED, "random"), ([1, 0], "random"), ([0], "random"), ([128], "one rank"), ([65, 31], "expert without"),
    ):  # fmt: skip
        worker.once(tokens, routing, **most)
    for routing in () if only_valid else ("holes", "repeats", "all repeats"):
        worker.once([128, 40], routing, **most)
    worker.once([128, 40], "random", top_k=2, **most)
    worker.once([128, 40], "random", quant="fp8", **most)
    worker.once([128, 40], "random", max_tokens=128, ids_valid=True)
    if graphs:
        worker.replayed(128, ["random", "one rank", "expert without"] if only_valid else ALL, **most)
        for valid in (True,) if only_valid else (True, False):
            worker.timed(128, max_tokens=128, ids_valid=valid)
    if os.environ.get("MOE_COMPILE_PPLX_SYNCHRONIZED") == "1" and only_valid:
        worker.once([1024, 1000], "random", max_tokens=1024, ids_valid=True)
    several_objects(worker, most)


def several_objects(worker: Worker, most: dict[str, Any]) -> None:
    """Layers of other sizes have an object of their own; one that is given back leaves the others alone."""
    other = {**most, "max_tokens": 64, "num_experts": 32}
    worker.once([30, 31], "random", **other)
    worker.once([30, 31], "random", **most)
    exchange.exchange_of(worker.provider, worker.setup(**other).text, worker.device).destroy()
    exchange._exchanges.pop((worker.provider, worker.setup(**other).text, worker.device))
    worker.once([30, 31], "random", **most)


def check(provider: str, device: torch.device, hidden: int) -> Worker:
    worker, graphs = Worker(provider, device, hidden), device.type == "cuda"
    problem = registry.Problem(
        stage="comm", device=device.type, dtype=torch.bfloat16, hidden=hidden, num_experts=EXPERTS, top_k=TOP_K, world=worker.world,
        max_tokens=128, ids_valid=True,
    )  # fmt: skip
    why = registry.get("comm", provider).supports(problem)
    if why is not None and graphs:
        worker.bad.append(f"not supported: {why}")
        return worker
    (batched if worker.batched else standard)(worker, graphs)
    if graphs:
        torch.cuda.synchronize()
    for _ in range(2):
        exchange.destroy_all()
    if library_exchange._lent:
        worker.bad.append(f"not given back: {library_exchange._lent}")
    if not worker.batched:  # made anew
        worker.once([9, 3], "random", True, max_tokens=64)
        exchange.destroy_all()
    return worker


# ---------------------------------------------------------------- a rank that stays away
def stall(provider: str, device: torch.device, hidden: int) -> None:
    """Never returns: the device does not survive it."""
    worker, seconds = Worker(provider, device, hidden), 8.0
    setup = dataclasses.replace(worker.setup(max_tokens=128, ids_valid=True), timeout=seconds)
    inputs = worker.inputs(16, "random", 1, setup)
    worker.layer(*inputs, setup)
    torch.cuda.synchronize()
    dist.barrier()
    if worker.rank == worker.world - 1:
        time.sleep(seconds + 7)
        os._exit(0)
    started = time.monotonic()
    own = exchange.exchange_of(provider, setup.text, device)
    own.dispatch(inputs[0], inputs[1], [])
    for call in (torch.cuda.synchronize, exchange.check_all, lambda: own.dispatch(inputs[0], inputs[1], []), exchange.destroy_all):
        try:
            call()
            told = "nothing happened"
        except Exception as error:  # noqa: BLE001  told
            told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if worker.rank == 0:
            print(f"  after {time.monotonic() - started:.1f} s {call.__name__}: {told}", flush=True)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("providers", nargs="*")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--stall", default="")
    parser.add_argument("--verbose", action="store_true", help="print each comparison")
    args = parser.parse_args()
    Worker.verbose = args.verbose
    cuda, rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    wrong = 0
    for provider in args.providers:
        begun = time.monotonic()
        try:
            found = check(provider, device, args.hidden)
        except Exception as error:  # noqa: BLE001  told
            traceback.print_exc()
            print(f"{provider} on {dist.get_world_size()} GPUs: FAILED on rank {rank}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        wrong += len(found.bad)
        if rank == 0:
            print(found, f"; {time.monotonic() - begun:.0f} s", *(f"\n  WRONG {each}" for each in found.bad), sep="", flush=True)
    if args.stall:
        stall(args.stall, device, args.hidden)
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
