"""What the benchmarks over ranks share: who is here, timing on all ranks alike, and what was measured on which software.

Started by torchrun: one process a GPU (NCCL and gloo), or gloo processes where there is no GPU.

A time is the maximum over ranks of the median over repeats. Before each sample the L2 cache is overwritten (CUDA; not with
flush=False) and the ranks are aligned by an all-reduce. "eager": the device is idle when the clock starts, so that the host's part counts.
"graph": the replay is queued behind the all-reduce, so that only the device's part counts. CUDA events; on a CPU the wall clock.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import hashlib
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FLUSH_BYTES = 256 << 20  # several times the L2 cache
HEAD_START = 500_000  # cycles that the device waits while the host queues a sample of a graph
STATUS_SECONDS = 120  # that ranks wait for each other's word between measurements


@dataclasses.dataclass(frozen=True)
class Here:
    """This process among the ranks."""

    rank: int
    world: int
    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def say(self, *words: Any) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            print(*words, flush=True)


def join(cpu: bool = False) -> Here:
    """Joins the ranks that torchrun started, and turns warnings off. Exits with a hint if it did not start them."""
    if "RANK" not in os.environ:
        raise SystemExit(f"start it with torchrun --nproc-per-node=N {' '.join(sys.argv)}")
    warnings.filterwarnings("ignore")
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and not cpu:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return Here(dist.get_rank(), dist.get_world_size(), device)


def leave(failed: bool) -> None:
    """Ends this process, without taking anything down: communicators that a CUDA graph holds would wait for ever, libraries' threads may
    still run. Exit code 1 if anything failed on any rank."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    failed = any(told(failed))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)


_status_group: list[Any] = []


def told(own: Any) -> list[Any]:
    """What every rank says. Over gloo, so it works after an error on the device; raises RuntimeError if a rank does not answer."""
    if not _status_group:
        _status_group.append(dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=STATUS_SECONDS)))
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, own, group=_status_group[0])
    return answers


class Clock:
    """Times calls alike on all ranks."""

    def __init__(self, here: Here, repeats: int, flush: bool = True) -> None:
        self.here, self.repeats = here, repeats
        self.one = torch.ones(1, device=here.device)
        self.scratch = torch.empty(FLUSH_BYTES if flush and here.cuda else 0, dtype=torch.uint8, device=here.device)

    def times(self, steps: Sequence[Callable[[], Any]], graph: bool = False, warm: int = 3) -> list[float]:
        """Microseconds of each step; the steps are called in turn, `repeats` times."""
        for _ in range(warm):
            for step in steps:
                step()
        take = self._wall if not self.here.cuda else self._events
        samples = [[take(step, graph) for step in steps] for _ in range(self.repeats)]
        if self.here.cuda:
            torch.cuda.synchronize()
        own = [statistics.median(read() for read in column) for column in zip(*samples)]
        return [max(column) for column in zip(*told(own))]

    def _events(self, step: Callable[[], Any], graph: bool) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if graph:
            torch.cuda._sleep(HEAD_START)
        self.scratch.zero_()
        dist.all_reduce(self.one)
        if not graph:
            torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        if not graph:
            torch.cuda.synchronize()
        return lambda: begin.elapsed_time(end) * 1e3

    def _wall(self, step: Callable[[], Any], graph: bool) -> Callable[[], float]:
        dist.all_reduce(self.one)
        begin = time.perf_counter()
        step()
        spent = (time.perf_counter() - begin) * 1e6
        return lambda: spent


def captured(call: Callable[[], Any]) -> tuple[Any, Any]:
    """(CUDA graph of one call, what the call returned); its tensors get new values with each replay."""
    torch.cuda.synchronize()
    told(None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    torch.cuda.synchronize()
    told(None)
    return graph, result


def poison(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """The allocator's next tensor of this size most likely holds NaN, so that an element that nobody writes shows."""
    torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)


def row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of a row (2-norm), in float32; infinity for NaN."""
    if not got.numel():
        return 0.0
    wide = want.float()
    off = (got.float() - wide).norm(dim=1) / wide.norm(dim=1).clamp(min=1e-6)
    return float(torch.nan_to_num(off, nan=float("inf")).max())


# ---------------------------------------------------------------- what was measured where
def session() -> str:
    """The same for all that was measured on one machine since it started; only such times are compared."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    known = boot.read_text() if boot.exists() else f"{platform.node()} {datetime.date.today()}"
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def hardware(here: Here) -> str:
    if here.cuda:
        return f"{here.world} x {torch.cuda.get_device_name(here.device)}"
    return f"{here.world} gloo processes on {os.cpu_count()} CPU cores"


def software(*packages: str) -> str:
    """torch, Triton and NCCL as loaded, and the versions of installed packages."""
    found = [f"torch {torch.__version__}"]
    for name in ("triton", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if torch.cuda.is_available():
        from moe_compile.ops.comm.libraries import nccl_version

        version = nccl_version()
        found.append("NCCL " + ".".join(map(str, version)) if version else "no NCCL")
    return ", ".join(found)


def command() -> str:
    """The generic command line of this run."""
    world = os.environ.get("WORLD_SIZE", "N")
    return f"torchrun --nproc-per-node {world} benchmarks/{Path(sys.argv[0]).name} {' '.join(map(_short, sys.argv[1:]))}".rstrip()


def _short(argument: str) -> str:
    """Paths outside of the repository without their folders."""
    return Path(argument).name if os.path.isabs(argument) else argument


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a CSV file, which gets a header if it is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
