"""Several GPUs: checks the nvlink exchange on random inputs and times it beside NCCL. One process a GPU:

    torchrun --nproc-per-node=4 tests/gpu_nvlink_worker.py --check 500 --bench 4096 128

Exits with 1 if anything was wrong. Times: CUDA events, mean of the iterations, maximum over ranks, ranks aligned before each.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_compile.ops.comm.peer.engine import NvlinkEngine
from moe_compile.ops.comm.peer.workspace import ExchangeTimeout


class Worker:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(self.device)
        dist.init_process_group("nccl", device_id=self.device)
        self.bad = torch.zeros(8, dtype=torch.int64, device=self.device)
        self.failures = 0

    def log(self, *words: Any) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def make(self, **options: Any) -> NvlinkEngine:
        defaults = dict(max_tokens=128, hidden=512, top_k=8, num_experts=64, dtype=torch.bfloat16, timeout_seconds=5.0)
        return NvlinkEngine(dist.group.WORLD, **{**defaults, **options})

    # ---- checks ------------------------------------------------------------------------------------------------------------------

    def inputs(self, exchange: NvlinkEngine, rank: int, seed: int, tokens: int | None = None) -> tuple[Any, Any, Any]:
        """x, ids and weights of any rank: every rank can make those of all."""
        host = torch.Generator().manual_seed(seed * 64 + rank)
        generator = torch.Generator(self.device).manual_seed(seed * 64 + rank)
        most, experts, kind = exchange.shape.max_tokens, exchange.shape.num_experts, seed % 7
        if tokens is None:
            tokens = (
                [0, 1, most][int(torch.randint(0, 3, (1,), generator=host))]
                if kind == 0
                else int(torch.randint(0, most + 1, (1,), generator=host))
            )
        x = torch.randn((tokens, exchange.shape.hidden), device=self.device, generator=generator).to(exchange.shape.dtype)
        ids = torch.rand((tokens, experts), device=self.device, generator=generator).topk(min(exchange.shape.top_k, experts), 1).indices
        if kind == 1:
            ids = torch.randint(-1, experts + 1, ids.shape, device=self.device, generator=generator)
        if kind == 2:
            ids.fill_(seed // 7 % experts)
        if kind == 3:
            ids = ids // 8
        return x, ids, torch.rand(ids.shape, device=self.device, generator=generator)

    def wrong(self, index: int, a: Any, b: Any, tolerance: float = 0.0) -> None:
        """Counts elements of a that are not b, on the device."""
        a, b = a.float(), b.float()
        self.bad[index] += (~((a - b).abs() <= tolerance * (1 + b.abs()))).sum()

    def check_dispatch(self, exchange: NvlinkEngine, every: list[Any], got: Any) -> None:
        most, local = exchange.shape.max_tokens, exchange.shape.experts_per_rank
        for src, (x, ids, weights) in enumerate(every):
            mine = (ids >= 0) & (ids < exchange.shape.num_experts) & (ids // local == self.rank)
            sent = mine.any(1).nonzero().squeeze(1)
            rows, n = slice(src * most, (src + 1) * most), sent.shape[0]
            expected = torch.full((most, exchange.shape.top_k), -1, dtype=torch.int32, device=self.device)
            expected[:n] = torch.where(mine, ids - self.rank * local, -1)[sent].int()
            self.wrong(0, got.ids[rows], expected)
            plain = got.rows[rows][:n].float()
            if exchange.shape.quant == "fp8":
                plain = (plain.unflatten(1, (-1, 128)) * got.scales[rows][:n].unsqueeze(2)).flatten(1)
                self.wrong(1, plain, x[sent], 0.08)
            else:
                self.wrong(1, plain, x[sent])
            self.wrong(2, got.weights[0][rows][:n], torch.where(mine, weights, 0)[sent])

    def expected(self, exchange: NvlinkEngine, x: Any, ids: Any) -> Any:
        """Each rank d returns x * (d + 1), rounded."""
        valid = (ids >= 0) & (ids < exchange.shape.num_experts)
        total = torch.zeros(x.shape, device=self.device)
        for d in range(self.world):
            goes = (valid & (ids // exchange.shape.experts_per_rank == d)).any(1, keepdim=True)
            total += torch.where(goes, (x.float() * (d + 1)).to(x.dtype).float(), 0)
        return total

    def poison(self, tokens: int, width: int) -> None:
        """The next torch.empty of this size gets NaN."""
        torch.full((tokens, width), float("nan"), device=self.device, dtype=torch.float32)

    def check(self, number: int, **options: Any) -> None:
        exchange = self.make(**options)
        self.bad.zero_()
        for seed in range(number):
            every = [self.inputs(exchange, rank, seed) for rank in range(self.world)]
            x, ids, weights = every[self.rank]
            if seed % 5 == 4:
                torch.cuda._sleep(int(1e5) * (self.rank + seed % 3))
            got = exchange.dispatch(x, ids, [weights], copy=seed % 11 == 0)
            self.check_dispatch(exchange, every, got)
            rows = (got.rows.float() * (self.rank + 1)).to(exchange.shape.dtype) if exchange.shape.quant == "none" else None
            if rows is None:
                rows = torch.full(
                    (exchange.shape.rows, exchange.shape.hidden), float(self.rank + 1), dtype=exchange.shape.dtype, device=self.device
                )
                x = torch.ones_like(x)
            for _ in range(1 + (seed % 6 == 0)):
                self.poison(x.shape[0], exchange.shape.hidden)
                out = exchange.collect(rows, got.handle, torch.float32)
                self.wrong(3, out, self.expected(exchange, x, ids), 1e-5)
            if seed % 4 == 0 and exchange.shape.quant == "none":
                self.check_more(exchange, every, got, x)
        self.report(f"{number} exchanges {options}")
        self.check_replay(exchange, max(1, number // 4))
        exchange.destroy()

    def check_more(self, exchange: NvlinkEngine, every: list[Any], got: Any, x: Any) -> None:
        """send of another tensor, and collect with the weighting of slots inside."""
        ids, weights = got.ids.clone(), got.weights[0].clone()
        for _ in range(2):
            other = exchange.send(-x[:, : exchange.shape.hidden // 2].contiguous(), got.handle)
            for src, (theirs, _, _) in enumerate(every):
                used = (ids[src * exchange.shape.max_tokens :][: exchange.shape.max_tokens] >= 0).any(1).sum()
                sent = self.sent(exchange, every[src][1])
                row = src * exchange.shape.max_tokens + torch.arange(sent.shape[0], device=self.device)
                self.wrong(4, other[row], -theirs[sent][:, : exchange.shape.hidden // 2])
                self.wrong(4, used, torch.tensor(sent.shape[0], device=self.device))
        used = ids >= 0
        places = torch.where(used, used.flatten().cumsum(0).view_as(ids) - 1, -1).int()
        slots = torch.randn((int(used.sum()) + 1, exchange.shape.hidden), device=self.device).to(exchange.shape.dtype)
        rows = (slots[places.clamp(min=0).long()].float() * torch.where(used, weights, 0).unsqueeze(2)).sum(1).to(exchange.shape.dtype)
        expected = exchange.collect(rows, got.handle, torch.float32)
        self.wrong(5, exchange.collect_slots(slots, places, weights, got.handle, torch.float32), expected, 2e-2)

    def sent(self, exchange: NvlinkEngine, ids: Any) -> Any:
        mine = (ids >= 0) & (ids < exchange.shape.num_experts) & (ids // exchange.shape.experts_per_rank == self.rank)
        return mine.any(1).nonzero().squeeze(1)

    def check_replay(self, exchange: NvlinkEngine, number: int) -> None:
        """A captured graph of two exchanges on new values and routings, plain calls between the replays."""
        if exchange.shape.quant != "none":
            return
        tokens = max(1, exchange.shape.max_tokens - 3 * self.rank)
        x, ids, weights = (each.clone() for each in self.inputs(exchange, self.rank, 6, tokens))

        def layer() -> Any:
            out = x
            for _ in range(2):
                got = exchange.dispatch(out.to(exchange.shape.dtype), ids, [weights])
                out = exchange.collect((got.rows.float() * (self.rank + 1)).to(exchange.shape.dtype), got.handle, torch.float32)
            return out

        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer()
        for seed in range(number):
            for static, fresh in zip((x, ids, weights), self.inputs(exchange, self.rank, seed * 7 + 4 + seed % 3, tokens)):
                static.copy_(fresh)
            out.fill_(float("nan"))
            graph.replay()
            once = self.expected(exchange, x, ids).to(exchange.shape.dtype)
            self.wrong(6, out, self.expected(exchange, once, ids), 2e-2)
            if seed % 3 == 0:
                layer()
        self.report(f"{number} graph replays of two exchanges, max_tokens {exchange.shape.max_tokens}")

    def check_storm(self, number: int, **options: Any) -> None:
        """Calls without any sync of the host, ranks delayed at random, so that a buffer used too early would show."""
        exchange = self.make(**options)
        host = torch.Generator().manual_seed(self.rank)
        every = [[self.inputs(exchange, rank, seed * 7 + 4 + seed % 3) for rank in range(self.world)] for seed in range(number)]
        torch.cuda.synchronize()
        kept = []
        for each in every:
            x, ids, weights = each[self.rank]
            kinds = torch.randint(0, 4, (3,), generator=host).tolist()
            for kind in kinds:
                torch.cuda._sleep([0, 0, 20000, 200000][kind])
            got = exchange.dispatch(x, ids, [weights], copy=True)
            sent = exchange.send(-x, got.handle)
            torch.cuda._sleep([0, 50000, 0, 0][kinds[0]])
            outs = [exchange.collect((got.rows.float() * (self.rank + 1)).to(exchange.shape.dtype), got.handle, torch.float32)]
            torch.cuda._sleep([0, 0, 50000, 0][kinds[1]])
            outs.append(exchange.collect((sent.float() * (self.rank + 1)).to(exchange.shape.dtype), got.handle, torch.float32))
            kept.append((got, sent, outs))
        for each, (got, sent, outs) in zip(every, kept):
            self.check_dispatch(exchange, each, got)
            self.wrong(4, sent, -got.rows)
            expected = self.expected(exchange, *each[self.rank][:2])
            self.wrong(3, outs[0], expected, 1e-5)
            self.wrong(5, outs[1], -expected, 1e-5)
        self.report(f"{number} times 4 calls without a sync {options}")
        exchange.destroy()

    def check_first_call_in_capture(self) -> None:
        """Kernels that were never compiled before, inside a capture."""
        exchange = self.make(hidden=640)
        x, ids, weights = self.inputs(exchange, self.rank, 5, 32)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = exchange.collect(exchange.dispatch(x, ids, [weights]).rows, exchange.dispatch(x, ids, [weights]).handle)
            graph.replay()
            torch.cuda.synchronize()
            self.log("ok   first call inside a capture", bool(out.isfinite().all()))
        except Exception as error:  # noqa: BLE001  only reported
            self.log("first call inside a capture:", type(error).__name__, str(error)[:200])
        exchange.destroy()

    def check_timeout(self) -> None:
        """The last rank stays away: the others must neither hang nor go on silently."""
        exchange = self.make(timeout_seconds=1.0)
        x, ids, weights = self.inputs(exchange, self.rank, 5, 32)
        for _ in range(2):
            got = exchange.dispatch(x, ids, [weights])
            exchange.collect(got.rows, got.handle)
        torch.cuda.synchronize()
        dist.barrier()
        started = time.monotonic()
        if self.rank != self.world - 1:
            got = exchange.dispatch(x, ids, [weights])
            torch.cuda.synchronize()
            try:
                exchange.collect(got.rows, got.handle)
                self.log("BAD  no ExchangeTimeout")
                self.failures += 1
            except ExchangeTimeout as error:
                self.log(f"ok   after {time.monotonic() - started:.1f} s: {error}")
        torch.cuda.synchronize()
        dist.barrier()
        exchange.destroy()

    def host_time(self) -> None:
        """Microseconds of the host for one call."""
        exchange = self.make()
        x, ids, weights = self.inputs(exchange, self.rank, 5, 32)
        for number in (3, 200):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(number):
                got = exchange.dispatch(x, ids, [weights])
            middle = time.perf_counter()
            torch.cuda.synchronize()
            again = time.perf_counter()
            for _ in range(number):
                exchange.collect(got.rows, got.handle)
            stopped = time.perf_counter()
        torch.cuda.synchronize()
        self.log(f"host: dispatch {(middle - started) / number * 1e6:.0f} us collect {(stopped - again) / number * 1e6:.0f} us")
        exchange.destroy()

    def check_batched(self, number: int, **options: Any) -> None:
        """The rows in their exact order, the weighted sum, and that both formats can take turns."""
        exchange = self.make(**options)
        for seed in range(number):
            every = [self.inputs(exchange, rank, seed * 7 + 4 + seed % 3) for rank in range(self.world)]
            x, ids, weights = every[self.rank]
            got = exchange.dispatch_batched(x, ids)
            slots = torch.cat([each.flatten() for _, each, _ in every])
            source = torch.cat([each.repeat_interleave(exchange.shape.top_k, 0) for each, _, _ in every])
            for expert in range(exchange.shape.experts_per_rank):
                rows = source[slots == self.rank * exchange.shape.experts_per_rank + expert]
                self.wrong(0, got.rows[expert, : rows.shape[0]], rows)
                self.wrong(1, got.counts[expert], torch.tensor(rows.shape[0], device=self.device))
            experts = torch.arange(exchange.shape.experts_per_rank, device=self.device) + self.rank * exchange.shape.experts_per_rank
            y = (got.rows.float() * (1 + experts[:, None, None])).to(exchange.shape.dtype)
            for _ in range(1 + seed % 2):
                self.poison(x.shape[0], exchange.shape.hidden)
                out = exchange.collect_batched(y, weights, got.handle, torch.float32)
                terms = (x.float()[:, None] * (1 + ids)[:, :, None]).to(exchange.shape.dtype).float() * weights[:, :, None]
                self.wrong(3, out, terms.sum(1), 1e-4)
            if seed % 3 == 0:
                plain = exchange.dispatch(x, ids, [weights])
                self.check_dispatch(exchange, every, plain)
        self.report(f"{number} batched exchanges {options}")
        exchange.destroy()

    def report(self, what: str) -> None:
        torch.cuda.synchronize()
        dist.all_reduce(self.bad)
        bad = self.bad.tolist()
        self.failures += sum(bad)
        self.log("ok  " if not any(bad) else f"BAD {bad}", what)
        self.bad.zero_()

    # ---- times -------------------------------------------------------------------------------------------------------------------

    def bench(self, call: Callable[[], Any], iterations: int = 15, warm: int = 3, between: Callable[[], Any] | None = None) -> float:
        """Microseconds. `between` runs after each call, not timed."""
        one = torch.ones(1, device=self.device)
        for _ in range(warm):
            call()
            if between:
                between()
        torch.cuda.synchronize()
        dist.barrier()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iterations)]
        for start, end in events:
            torch.cuda._sleep(int(1e6))
            dist.all_reduce(one)
            start.record()
            call()
            end.record()
            if between:
                between()
        torch.cuda.synchronize()
        mean = torch.tensor(sum(a.elapsed_time(b) for a, b in events) / iterations * 1e3, device=self.device)
        dist.all_reduce(mean, op=dist.ReduceOp.MAX)
        return float(mean)

    def graphed(self, call: Callable[[], Any]) -> Callable[[], None]:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def times(self, tokens: int) -> None:
        args = self.args
        exchange = self.make(max_tokens=tokens, hidden=args.hidden, num_experts=args.experts, top_k=args.top_k)
        x, ids, weights = self.inputs(exchange, self.rank, 5, tokens)
        rows = torch.randn((exchange.shape.rows, args.hidden), device=self.device).bfloat16()
        expected = None
        sent = torch.stack([((ids // exchange.shape.experts_per_rank) == d).any(1).sum() for d in range(self.world)])
        remote = int(sent.sum() - sent[self.rank]) * args.hidden * 2
        self.log(f"T={tokens} world={self.world} remote MB each way {remote / 1e6:.1f} floor {remote / 450e3:.0f} us each way")
        for name, changes in self.variants(tokens):
            for key, value in changes.items():
                setattr(exchange.tuning, key, value)
            try:
                out, line = self.time_one(exchange, x, ids, weights, rows, remote)
                expected = out if expected is None else expected
                self.log(f"  {name:60s} {line}" + ("" if torch.equal(out, expected) else "  DIFFERENT RESULT"))
            except Exception as error:  # noqa: BLE001  a variant that does not compile must not end the table
                self.log(f"  {name}: {type(error).__name__} {str(error)[:200]}")
        self.times_slots(exchange, x, ids, weights)
        exchange.destroy()
        if tokens * args.top_k <= 2048:
            self.times_batched(tokens, x, ids, weights)
        if args.fp8:
            self.times_fp8(tokens, x, ids, weights)
        if args.nccl:
            self.times_nccl(tokens, x, ids, exchange)
        torch.cuda.empty_cache()

    def time_one(self, exchange: NvlinkEngine, x: Any, ids: Any, weights: Any, rows: Any, remote: int) -> tuple[Any, str]:
        got = exchange.dispatch(x, ids, [weights])
        out = exchange.collect(rows, got.handle)
        push = self.bench(lambda: exchange.dispatch(x, ids, [weights]), between=lambda: exchange.collect(rows, got.handle))
        pull = self.bench(lambda: exchange.collect(rows, got.handle), between=lambda: exchange.dispatch(x, ids, [weights]))
        whole = self.bench(self.graphed(lambda: exchange.collect(rows, exchange.dispatch(x, ids, [weights]).handle)))
        rate = remote / 1e3
        line = f"dispatch {push:7.1f} ({rate / push:4.0f} GB/s) collect {pull:7.1f} ({rate / pull:4.0f}) both, graph {whole:7.1f}"
        return out, line

    def times_batched(self, tokens: int, x: Any, ids: Any, weights: Any) -> None:
        args = self.args
        capacity = self.world * tokens
        exchange = self.make(max_tokens=tokens, hidden=args.hidden, num_experts=args.experts, top_k=args.top_k, batched_capacity=capacity)
        y = torch.randn((exchange.shape.experts_per_rank, capacity, args.hidden), device=self.device).bfloat16()
        handle = exchange.dispatch_batched(x, ids).handle
        push = self.bench(lambda: exchange.dispatch_batched(x, ids), between=lambda: exchange.collect_batched(y, weights, handle))
        pull = self.bench(lambda: exchange.collect_batched(y, weights, handle), between=lambda: exchange.dispatch_batched(x, ids))
        whole = self.bench(self.graphed(lambda: exchange.collect_batched(y, weights, exchange.dispatch_batched(x, ids).handle)))
        self.log(f"  batched: dispatch {push:7.1f} collect {pull:7.1f} both, graph {whole:7.1f}")
        exchange.destroy()

    def times_slots(self, exchange: NvlinkEngine, x: Any, ids: Any, weights: Any) -> None:
        got = exchange.dispatch(x, ids, [weights], copy=True)
        used = got.ids >= 0
        places = torch.where(used, used.flatten().cumsum(0).view_as(got.ids) - 1, -1).int()
        y = torch.randn((int(used.sum()) + 1, exchange.shape.hidden), device=self.device).bfloat16()
        us = self.bench(
            lambda: exchange.collect_slots(y, places, got.weights[0], got.handle), between=lambda: exchange.dispatch(x, ids, [weights])
        )
        self.log(f"  collect of weighted slots {us:7.1f}")

    def variants(self, tokens: int) -> list[tuple[str, dict[str, int]]]:
        if self.args.variants:
            found = [{k: int(v) for k, v in (p.split("=") for p in each.split(","))} for each in self.args.variants.split("/")]
            return [(str(each).replace("'", ""), each) for each in found]
        push = [(4, 4), (4, 8), (2, 8), (8, 2)]
        collect = [(8, 3, 4, 512), (4, 4, 4, 512), (4, 5, 2, 512), (8, 2, 4, 2048)]
        keys = ("push_warps", "push_programs", "collect_warps", "collect_programs", "tile", "lag")
        return [(str((*p, *c)), dict(zip(keys, (*p, *c)))) for p, c in zip(push, itertools.cycle(collect))]

    def times_fp8(self, tokens: int, x: Any, ids: Any, weights: Any) -> None:
        args = self.args
        exchange = self.make(max_tokens=tokens, hidden=args.hidden, num_experts=args.experts, top_k=args.top_k, quant="fp8")
        rows = torch.randn((exchange.shape.rows, args.hidden), device=self.device).bfloat16()
        got = exchange.dispatch(x, ids, [weights])
        push = self.bench(lambda: exchange.dispatch(x, ids, [weights]), between=lambda: exchange.collect(rows, got.handle))
        self.log(f"  fp8 dispatch {push:7.1f}")
        exchange.destroy()

    def times_nccl(self, tokens: int, x: Any, ids: Any, exchange: NvlinkEngine) -> None:
        """De-duplicated all-to-all with the counts on the host, and all-gather with reduce-scatter."""
        owner = ids // exchange.shape.experts_per_rank

        def plan() -> tuple[Any, list[int], list[int]]:
            goes = torch.zeros((tokens, self.world), dtype=torch.bool, device=self.device).scatter_(1, owner, True)
            send = goes.sum(0)
            receive = torch.empty_like(send)
            dist.all_to_all_single(receive, send)
            here = torch.stack([send, receive]).tolist()
            return goes.t().nonzero()[:, 1], here[0], here[1]

        source, out, into = plan()
        sent, received = x[source], torch.empty((sum(into), x.shape[1]), dtype=x.dtype, device=self.device)
        total = torch.zeros((tokens, x.shape[1]), device=self.device)

        def whole() -> None:
            rows, a, b = plan()
            r = torch.empty((sum(b), x.shape[1]), dtype=x.dtype, device=self.device)
            dist.all_to_all_single(r, x[rows], b, a)
            back = torch.empty_like(sent)
            dist.all_to_all_single(back, r, a, b)
            total.zero_().index_add_(0, rows, back.float())

        there = self.bench(lambda: dist.all_to_all_single(received, sent, into, out))
        back = self.bench(lambda: dist.all_to_all_single(sent, received, out, into))
        self.log(
            f"  NCCL all-to-all: dispatch {there:7.1f} combine {back:7.1f} (rows ready, counts known); whole path {self.bench(whole):7.1f}"
        )
        every = torch.empty((tokens * self.world, x.shape[1]), dtype=x.dtype, device=self.device)
        mine = torch.empty_like(x)
        gather = self.bench(lambda: dist.all_gather_into_tensor(every, x))
        scatter = self.bench(lambda: dist.reduce_scatter_tensor(mine, every))
        self.log(f"  NCCL all-gather {gather:7.1f} reduce-scatter {scatter:7.1f}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--bench", type=int, nargs="*", default=[])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--variants", default="")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--nccl", action="store_true")
    worker = Worker(parser.parse_args())
    if worker.args.check:
        n = worker.args.check
        worker.check(n)
        worker.check(max(1, n // 4), max_tokens=700, hidden=1024)
        worker.check(max(1, n // 4), max_tokens=16, hidden=2880, dtype=torch.float32, num_experts=10, top_k=3)
        worker.check_batched(max(1, n // 4), batched_capacity=worker.world * 128)
        worker.check(max(1, n // 4), max_tokens=64, hidden=1024, quant="fp8")
        worker.check_storm(max(1, n // 4))
        worker.check_storm(max(1, n // 16), max_tokens=1000, hidden=1024)
        worker.check(4, max_tokens=4096, hidden=7168, num_experts=256)
        worker.check_first_call_in_capture()
        worker.check_timeout()
        worker.host_time()
    for tokens in worker.args.bench:
        worker.times(tokens)
    worker.log("DONE", "failures", worker.failures)
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(1 if worker.failures else 0)


if __name__ == "__main__":
    main()
