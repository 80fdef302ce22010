"""Exchanges of tokens between ranks, timed and checked: every comm provider beside the raw libraries' own calls.

    torchrun --nproc-per-node 4 benchmarks/exchange.py [--tokens 1 16 128 512 4096] [--hidden 7168] [--experts 256] [--top-k 8]
             [--payloads none fp8] [--providers nvlink alltoall raw ...] [--out results/x.csv] [--plugin my_provider.py]

Timed: dispatch (from ids to rows on the experts' ranks, quantised on the way with payload fp8), collect (to combined rows), and both in
one go; eager and, where the provider can be captured, in a CUDA graph. ranks_timing.py says how. Checked in the same run: fresh random
tokens and routings against a float32 reference, outputs poisoned first. A row that is off is marked WRONG, and the exit code is 1.
Two versions of DeepEP cannot be in one process: run it once in each library's environment with the same --out, which is added to;
`python benchmarks/plot.py x.csv` makes one table and a picture of all. --plugin runs a Python file first, which may register providers.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plot
import ranks_timing as timing
import torch
from exchange_candidates import Candidate, Case, Inputs, candidates
from ranks_timing import Clock, Here

from moe_compile.ops.comm import exchange
from moe_compile.ops.comm.setup import local_range

LIMITS = {"none": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}, "fp8": 5e-2}  # largest relative error of a row
ROUNDS = 3  # fresh inputs that each candidate is checked on, in each mode


class Bench:
    """All measurements of one case."""

    def __init__(self, here: Here, clock: Clock, case: Case) -> None:
        self.here, self.clock, self.case = here, clock, case
        first, end = local_range(case.experts, here.world, here.rank)
        self.factors = 1 + torch.arange(case.experts, device=here.device, dtype=torch.float32) / case.experts
        self.own = self.factors[first:end]

    @property
    def limit(self) -> float:
        found: Any = LIMITS[self.case.payload]
        return float(found if self.case.payload == "fp8" else found[self.case.dtype])

    def inputs(self, seed: int) -> Inputs:
        case, device = self.case, self.here.device
        g = torch.Generator(device).manual_seed(1009 * seed + self.here.rank)
        x = torch.randn((case.tokens, case.hidden), device=device, generator=g).to(case.dtype)
        ids = torch.rand((case.tokens, case.experts), device=device, generator=g).topk(case.top_k, -1).indices
        w = torch.rand((case.tokens, case.top_k), device=device, generator=g) + 0.1
        return Inputs(x, ids, w / w.sum(1, keepdim=True))

    def error(self, out: Any, inputs: Inputs) -> float:
        """Largest over the ranks."""
        want = inputs.x.float() * (inputs.w * self.factors[inputs.ids]).sum(1, keepdim=True)
        return max(timing.told(timing.row_error(out, want)))

    def once(self, candidate: Candidate, inputs: Inputs) -> Any:
        """A whole exchange, with the stand-in for experts in it."""
        candidate.prepare(inputs)
        got = candidate.dispatch(inputs)
        results = candidate.experts(got, self.own)
        timing.poison(inputs.x.shape, inputs.x.dtype, self.here.device)
        return candidate.finish(candidate.collect(results, got, inputs))

    def ready(self, candidate: Candidate, inputs: Inputs) -> list[Any]:
        """What collect is given for these inputs; each dispatch has had its collect."""
        candidate.prepare(inputs)
        got = candidate.dispatch(inputs)
        results = candidate.experts(got, self.own)
        candidate.collect(results, got, inputs)
        return results

    def eager(self, candidate: Candidate) -> dict[str, Any]:
        candidate.open(False)
        errors = []
        for seed in range(ROUNDS):
            fresh = self.inputs(10 + seed)
            errors.append(self.error(self.once(candidate, fresh), fresh))
        inputs = self.inputs(1)
        state: dict[str, Any] = {}
        results = self.ready(candidate, inputs)

        def dispatch() -> None:
            state["got"] = candidate.dispatch(inputs)

        def collect() -> None:
            candidate.collect(results, state.pop("got"), inputs)

        def both() -> None:
            candidate.collect(results, candidate.dispatch(inputs), inputs)

        parts, whole = self.clock.times([dispatch, collect]), self.clock.times([both])
        return self.row(parts + whole, max(errors))

    def graph(self, candidate: Candidate) -> dict[str, Any]:
        candidate.open(True)
        inputs = self.inputs(1)
        for _ in range(2):
            self.once(candidate, inputs)
        results = self.ready(candidate, inputs)
        there, got = timing.captured(lambda: candidate.dispatch(inputs))
        back, out = timing.captured(lambda: candidate.collect(results, got, inputs))
        whole, out_whole = timing.captured(lambda: candidate.collect(results, candidate.dispatch(inputs), inputs))
        errors = [self.uniform(candidate, inputs, results, whole, out_whole)]
        for seed in range(ROUNDS):
            if not candidate.routing_stays:
                for static, fresh in zip(inputs, self.inputs(20 + seed)):
                    static.copy_(fresh)
                self._prepared(candidate, inputs)
            there.replay()
            for static, fresh in zip(results, candidate.experts(got, self.own)):
                static.copy_(fresh)
            out.fill_(float("nan"))
            back.replay()
            errors.append(self.error(candidate.finish(out), inputs))
        parts = self.clock.times([there.replay, back.replay], graph=True)
        row = self.row(parts + self.clock.times([whole.replay], graph=True), max(errors))
        torch.cuda.synchronize()
        return row

    def uniform(self, candidate: Candidate, inputs: Inputs, results: list[Any], whole: Any, out: Any) -> float:
        """Error of the graph of dispatch and collect with the same row from every expert: rows may arrive in another order than before."""
        g = torch.Generator(self.here.device).manual_seed(5)  # on all ranks alike
        row = torch.randn(self.case.hidden, device=self.here.device, generator=g).to(self.case.dtype)
        results[0].copy_(torch.where((results[0] != 0).any(-1, keepdim=True), row, torch.zeros_like(row)))
        out.fill_(float("nan"))
        whole.replay()
        hit_TW = torch.zeros((self.case.tokens, self.here.world), device=self.here.device)
        hit_TW.scatter_(1, inputs.ids // candidate.local, 1.0)
        times = inputs.w if candidate.weighted or candidate.slots else hit_TW
        return max(timing.told(timing.row_error(candidate.finish(out), row.float() * times.sum(1, keepdim=True))))

    def _prepared(self, candidate: Candidate, inputs: Inputs) -> None:
        """Prepares anew what a captured graph reads: into the same tensors."""
        before = {name: value for name, value in vars(candidate).items() if _tensors(value)}
        candidate.prepare(inputs)
        for name, old in before.items():
            for a, b in zip(_tensors(old), _tensors(getattr(candidate, name))):
                if a is not b:
                    a.copy_(b)
            setattr(candidate, name, old)

    def row(self, times: list[float], error: float) -> dict[str, Any]:
        names = ("dispatch_us", "collect_us", "both_us")
        return {**{n: round(t, 1) for n, t in zip(names, times)}, "error": f"{error:.1e}", "ok": error <= self.limit, "note": ""}


def _tensors(value: Any) -> list[Any]:
    """The tensors in a value: itself, or in a tuple or list."""
    if isinstance(value, tuple | list):
        return [t for each in value for t in _tensors(each)]
    return [value] if isinstance(value, torch.Tensor) else []


def measured(here: Here, clock: Clock, case: Case, make: Callable[[Case], Candidate], modes: list[str]) -> list[dict[str, Any]]:
    """One row for each mode. A failure that all ranks have is a row; another one is raised."""
    rows = []
    for mode in modes:
        candidate = make(case)
        why = "no CUDA graphs on a CPU" if mode == "graph" and not here.cuda else candidate.refusal(mode == "graph")
        whys = timing.told(why)
        row: dict[str, Any]
        if any(whys):
            row = _nothing("not supported: " + next(filter(None, whys)), True)
        else:
            row = _attempt(Bench(here, clock, case), candidate, mode)
        rows.append({"name": candidate.name, "kind": _kind(candidate), "mode": mode, **row})
    return rows


def _kind(candidate: Candidate) -> str:
    return candidate.kind if candidate.complete else "part"


def _attempt(bench: Bench, candidate: Candidate, mode: str) -> dict[str, Any]:
    row, why = None, ""
    try:
        row = getattr(bench, mode)(candidate)
        candidate.close()
    except Exception as error:  # noqa: BLE001  a library may fail with anything, and the others shall still be measured
        traceback.print_exc()
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
    whys = timing.told(why)
    del candidate
    gc.collect()
    if bench.here.cuda:
        torch.cuda.empty_cache()
    if all(whys):
        exchange.destroy_all()
    elif any(whys):
        raise SystemExit(f"rank {whys.index(next(filter(None, whys)))} alone failed: {next(filter(None, whys))}")
    return row if row is not None else _nothing("failed: " + why, False)


def _nothing(note: str, ok: bool) -> dict[str, Any]:
    return {**dict.fromkeys(("dispatch_us", "collect_us", "both_us", "error"), ""), "ok": ok, "note": note}


def chosen(name: str, wanted: list[str]) -> bool:
    """Is a candidate asked for? "raw": all raw ones; a name: also its variants, as nvlink+slots, and the raw calls of that library."""
    plain = name.removeprefix("raw ").split("+")[0].split(",")[0]
    return not wanted or name in wanted or plain in wanted or ("raw" in wanted and name.startswith("raw "))


def load(path: str) -> None:
    """Runs a Python file as a module."""
    name = Path(path).stem
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 512, 4096], help="tokens a rank")
    parser.add_argument("--tokens-fp8", nargs="*", type=int, help="those of payload fp8, if fewer")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--payloads", nargs="+", default=["none", "fp8"], choices=["none", "fp8"])
    parser.add_argument("--providers", nargs="*", default=[], help="names; a library's name takes its raw calls too; raw: all raw calls")
    parser.add_argument("--modes", nargs="+", choices=["eager", "graph"], help="default: both, on a CPU eager")
    parser.add_argument("--sms", nargs="+", type=int, default=[24, 64], help="multiprocessors of DeepEP's raw high-throughput kernels")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-flush", action="store_true", help="leave the L2 cache as it is before a sample")
    parser.add_argument("--out", type=Path, help="CSV file to add to")
    parser.add_argument("--libraries", help="versions that no package tells, for the table's header")
    parser.add_argument("--plugin", nargs="*", default=[], help="Python files to run first")
    parser.add_argument("--cpu", action="store_true", help="gloo processes, although there are GPUs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    here = timing.join(args.cpu)
    for path in args.plugin:
        load(path)
    modes = args.modes or (["eager", "graph"] if here.cuda else ["eager"])
    clock = Clock(here, args.repeats, not args.no_flush)
    makers = {name: make for name, make in candidates(here, args.sms).items() if chosen(name, args.providers)}
    software = ", ".join(filter(None, (timing.software("deep_ep", "pplx_kernels"), args.libraries)))
    about = {
        "session": timing.session(), "hardware": timing.hardware(here), "software": software,
        "command": timing.command(), "date": str(datetime.date.today()), "world": here.world, "hidden": args.hidden, "top_k": args.top_k,
        "experts": args.experts, "dtype": args.dtype, "flush": here.cuda and not args.no_flush, "repeats": args.repeats,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for payload in args.payloads:
        sizes = args.tokens if payload == "none" or args.tokens_fp8 is None else args.tokens_fp8
        for tokens in sizes:
            case = Case(tokens, args.hidden, args.top_k, args.experts, getattr(torch, args.dtype), payload)
            for make in makers.values():
                found = measured(here, clock, case, make, modes)
                found = [{**about, "payload": payload, "tokens": tokens, **row} for row in found]
                rows += found
                if here.rank == 0 and args.out:
                    timing.append(args.out, found)
    here.say(plot.table([{key: str(value) for key, value in row.items()} for row in rows]))
    timing.leave(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
