"""What tests/test_benchmarks.py runs in processes that stay: a benchmark's main(), as if from the command line, on one process or on ranks.

A start, and the import of transformers and Dynamo, cost more than a benchmark of tiny sizes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

FOLDER = Path(__file__).parent.parent / "benchmarks"


class Done(NamedTuple):
    """As subprocess.CompletedProcess tells."""

    returncode: int
    stdout: str
    stderr: str


def alone(script: str, *args: str, children: bool = False) -> Done:
    """main() of a benchmark of one process. children: moe_layer.py starts its measuring processes, else it measures here."""
    start()
    if script == "moe_layer" and not children:
        with mock.patch.object(importlib.import_module(script), "messages", measured_here):
            return called(script, args)
    return called(script, args)


def on_ranks(script: str, *args: str) -> Done:
    """main() of a benchmark over ranks, in processes that are joined already; what it compiles itself, without Inductor."""
    import torch
    import torch.distributed as dist

    start()
    timing: Any = importlib.import_module("ranks_timing")
    joined = timing.Here(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))

    def leave(failed: bool) -> None:
        raise SystemExit(int(any(timing.told(failed))))

    quick = functools.partial(torch.compile, backend="eager")
    with mock.patch.multiple(timing, join=lambda cpu: joined, leave=leave), mock.patch.object(torch, "compile", quick):
        return called(script, args)


def start() -> None:
    import torch

    torch.set_num_threads(1)
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    torch._dynamo.reset()
    gc.freeze()  # benchmarks collect garbage often


def called(script: str, args: tuple[str, ...]) -> Done:
    module: Any = importlib.import_module(script)
    out, errors, code = io.StringIO(), io.StringIO(), 0
    told = (contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors))
    with mock.patch.object(sys, "argv", [module.__file__, *args]), as_it_was(), told[0], told[1]:
        try:
            module.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=sys.stderr)
    return Done(code, out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Without the providers that a plugin registered, afterwards."""
    from moe_compile.ops import registry

    with mock.patch.dict(registry._providers):
        yield


def measured_here(job: dict[str, Any], patience: float) -> Iterator[dict[str, Any]]:
    """moe_layer.messages without a process of its own."""
    layer, measure = importlib.import_module("moe_layer"), importlib.import_module("layer_measure")
    found: list[dict[str, Any]] = []
    measure.points(layer.parse_args(), job, found.append)
    yield from found


def quiet_environment() -> None:
    """Of a process that stays."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["OMP_NUM_THREADS"] = "1"  # of its children
