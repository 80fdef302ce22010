"""What the adapters of communication libraries share: finding a library, saying what is missing, and what their calls cost.

No library is imported before its provider is asked about a problem that it could take otherwise; importing this file imports none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..registry import Problem
from .exchange import ExchangeError

SOURCES = {"deep_ep": "https://github.com/deepseek-ai/DeepEP", "pplx_kernels": "https://github.com/ppl-ai/pplx-kernels"}
HOST_RANKS = 8  # the most ranks of one host that the libraries join


# ---------------------------------------------------------------- finding a library
@functools.cache
def find(module: str) -> tuple[Any, str]:
    """(the module, "") or (None, why it cannot be used and how to get it). Imports it at the first call."""
    get = f"build it from {SOURCES[module]} for this torch and CUDA, into this Python's path"
    try:
        if importlib.util.find_spec(module) is None:
            return None, f"the module {module} is not installed; {get}"
        return importlib.import_module(module), ""
    except Exception as error:  # noqa: BLE001  a library may check its surroundings with anything
        return None, f"the module {module} does not import ({told(error)}); {get}"


def forget() -> None:
    """Looks for the libraries anew at the next question."""
    find.cache_clear()


def missing(module: str, *attributes: str) -> str | None:
    """None if the module is there with all of the attributes, else what is missing and how to get it."""
    found, why = find(module)
    if found is None:
        return why
    for attribute in attributes:
        if not has(found, attribute):
            return (
                f"the module {module} at {getattr(found, '__file__', '?')} has no {attribute}: it is another or an older package of that "
                f"name, or one whose binary did not load; build it from {SOURCES[module]}"
            )
    return None


def has(module: Any, attribute: str) -> bool:
    """Is there module.a.b.c?"""
    for name in attribute.split("."):
        module = getattr(module, name, None)
    return module is not None


def need(provider: str, module: str) -> Any:
    """The module. Raises ExchangeError saying why it is not there."""
    found, why = find(module)
    if found is None:
        raise ExchangeError(f"{provider}: {why}")
    return found


def lacks(function: Any, *parameters: str) -> str | None:
    """The first of the parameters that the function does not take; None if it takes all."""
    known = inspect.signature(function).parameters
    return next((name for name in parameters if name not in known), None)


def told(error: BaseException) -> str:
    """An exception's class and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# ---------------------------------------------------------------- what every adapter refuses
def refusal(name: str, problem: Problem, *, training: bool, quant: tuple[str, ...]) -> str | None:
    """What no library takes, or this one does not: None, or the reason. Touches no library.

    training: whether it has a backward. quant: what it can send.
    """
    world, experts = problem.world, problem.num_experts
    if world < 2:
        return f"{name} exchanges between ranks, world is 1"
    if not problem.device.startswith("cuda"):
        return f"{name} runs on CUDA devices, device is {problem.device!r}"
    if not problem.same_host or world > HOST_RANKS:
        hosts = "one host" if problem.same_host else "several hosts"
        return f"{name} is adapted to up to {HOST_RANKS} ranks of one host, world is {world} on {hosts}"
    if problem.dtype != torch.bfloat16:
        return f"{name} sums rows in bfloat16, dtype is {problem.dtype}"
    if experts % world:
        return f"{name} needs as many experts on each rank: num_experts is {experts}, world {world}"
    if problem.training and not training:
        return f"{name} has no backward, gradients are wanted"
    if problem.quant not in quant:
        return f"{name} sends rows as {' or '.join(quant)}, quant is {problem.quant!r}"
    if problem.quant != "none" and problem.training:
        return f"{name} quantises rows for inference only, gradients are wanted"
    return _device_refusal(name)


def _device_refusal(name: str) -> str | None:
    if not torch.cuda.is_available():
        return f"{name} needs a CUDA device in this process, torch.cuda.is_available() is False"
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        return f"{name} is built for compute capability 9.0 and up, the device has {major}.{minor}"
    if torch.cuda.device_count() > 1 and not torch.cuda.can_device_access_peer(0, 1):
        return f"{name} needs devices that reach each other's memory (NVLink), devices 0 and 1 do not"
    return None


def tokens_refusal(name: str, problem: Problem) -> str | None:
    """For libraries whose buffers have a place for each token: the most tokens must be known."""
    return None if problem.max_tokens else f"{name} needs ParallelConfig.max_tokens_per_rank, its buffers have places for so many tokens"


# ---------------------------------------------------------------- surroundings
def nccl_version() -> tuple[int, ...] | None:
    """(major, minor, patch) of the NCCL that this process has loaded, None if none; torch.cuda.nccl.version() tells torch's own."""
    maps = Path("/proc/self/maps")
    paths = [line.split()[-1] for line in maps.read_text().splitlines() if "libnccl.so" in line] if maps.exists() else []
    if not paths:
        return None
    number = ctypes.c_int()
    ctypes.CDLL(paths[0]).ncclGetVersion(ctypes.byref(number))
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def cuda_tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit: under CUDA_HOME, CUDA_PATH, on the PATH or in /usr/local/cuda. None if it is not there."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(name, path=str(Path(home) / "bin"))
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def has_rdma() -> bool:
    """Has this host an RDMA device?"""
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable where it is not set, until the end of the block."""
    absent = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if absent:
            os.environ.pop(name, None)


# ---------------------------------------------------------------- what it costs
def rows_by_rank(problem: Problem) -> float:
    """Rows of one rank's tokens, one for each rank that has a token's experts (its own too), if the experts are chosen evenly."""
    return (problem.tokens or 1024) * problem.world * (1 - (1 - 1 / problem.world) ** problem.top_k)


def microseconds(problem: Problem, rows: float, there: dict[int, float], back: dict[int, float]) -> float:
    """Rows there and back at so many GB/s, measured with 2, 4 and 8 ranks; fp8 sends half of the bytes there."""
    size, ranks = rows * problem.hidden * problem.dtype.itemsize, min((n for n in there if n >= problem.world), default=max(there))
    return size * (0.53 if problem.quant == "fp8" else 1.0) / (there[ranks] * 1e3) + size / (back[ranks] * 1e3)
