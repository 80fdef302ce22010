"""Real ranks for tests: processes that stay, joined over gloo (and NCCL on GPUs), and run functions that they are given by name.

    with Ranks(4) as ranks:
        results = ranks.run(cases.exchange, "alltoall", seed=3)     # what each rank returned

A function must be importable by its module's name, so it stands in a module beside the tests, not in a test file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT = 120.0


class RankError(AssertionError):
    """A rank raised; the message has the traceback of every rank that did."""


class Ranks:
    """`world` processes in one torch.distributed world. One that fails a call lives on; one that hangs ends them all."""

    def __init__(self, world: int, device: str = "cpu", timeout: float = 60.0) -> None:
        """timeout: seconds of torch.distributed's default process group."""
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._ends, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(theirs, rank, world, device, store, timeout), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self.processes.append(process)
        self._collect(TIMEOUT, self._ends)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        """What each rank returned, in their order. Raises RankError."""
        for end in self._ends:
            end.send((function.__module__, function.__qualname__, args, kwargs))
        return self._collect(timeout, self._ends)

    def run_some(self, alive: list[int], function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        """As run, on all ranks, but only the answers of `alive` are awaited: the others may die."""
        for end in self._ends:
            end.send((function.__module__, function.__qualname__, args, kwargs))
        return self._collect(timeout, [self._ends[rank] for rank in alive])

    def _collect(self, timeout: float, ends: list[Any]) -> list[Any]:
        answers: dict[Any, Any] = {}
        until = time.monotonic() + timeout
        while len(answers) < len(ends):
            ready = wait([end for end in ends if end not in answers], max(0.0, until - time.monotonic()))
            if not ready:
                missing = [rank for rank, end in enumerate(self._ends) if end in ends and end not in answers]
                self.close()
                raise RankError(f"no answer from ranks {missing} within {timeout:g} s")
            for end in ready:
                try:
                    answers[end] = end.recv()
                except EOFError:
                    answers[end] = (False, "the process died")
        failed = [f"rank {self._ends.index(end)}:\n{answers[end][1]}" for end in ends if not answers[end][0]]
        if failed:
            raise RankError("\n".join(failed))
        return [answers[end][1] for end in ends]

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _serve(end: Any, rank: int, world: int, device: str, store: str, timeout: float) -> None:
    import importlib

    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["XDG_CACHE_HOME"] = str(Path(store).parent)  # nothing that a user calibrated decides here
    try:
        _join(rank, world, device, store, timeout)
        end.send((True, None))
    except Exception:  # noqa: BLE001  told to the parent
        end.send((False, traceback.format_exc()))
        return
    while (task := end.recv()) is not None:
        module, name, args, kwargs = task
        try:
            end.send((True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:  # noqa: BLE001  told to the parent
            end.send((False, traceback.format_exc()))
    os._exit(0)  # what a test broke in torch.distributed must not hang here


def _join(rank: int, world: int, device: str, store: str, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend, extra = "gloo", {}
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend, extra = "cpu:gloo,cuda:nccl", {"device_id": torch.device("cuda", rank)}
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout), **extra
    )
