"""What the adapters of communication libraries share: finding a library and saying what is missing, ids and rows as libraries take them,
and one library object for all layers of a size.

No library is imported before its provider is asked about a problem that it could take otherwise; importing this file imports none.

A rank that dies or stalls: the libraries wait in their kernels, so what they do about it differs and is said in each adapter. What one
raises becomes an ExchangeError (`LibraryExchange.calling`). A kernel that stops the device takes the process' CUDA context with it: the
next call that looks at the device raises, one of these or any of torch's, and the process must be started again.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..registry import Problem
from .exchange import Exchange, ExchangeError
from .setup import Setup

SOURCES = {"deep_ep": "https://github.com/deepseek-ai/DeepEP", "pplx_kernels": "https://github.com/ppl-ai/pplx-kernels"}
HOST_RANKS = 8  # the most ranks of one host that the libraries join
# In what the libraries raise: another rank is gone; this process' device has stopped.
LOST = ("timeout", "timed out", "connection", "cpu wait")
STOPPED = ("cuda error", "launch failure")


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
        return None, f"the module {module} does not import ({_told(error)}); {get}"


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


def _told(error: BaseException) -> str:
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


# ---------------------------------------------------------------- ids
def clean_ids(ids_TK: Any, num_experts: int, dtype: Any) -> Any:
    """The ids in a dense tensor of their own, -1 for those outside of [0, E)."""
    return torch.where((ids_TK >= 0) & (ids_TK < num_experts), ids_TK, -1).to(dtype).contiguous()


def last_slots(ids_TK: Any) -> Any:
    """int64 [T, K]: the last of a token's slots that has the same id."""
    slots = torch.arange(ids_TK.shape[1], device=ids_TK.device)
    return torch.where(ids_TK.unsqueeze(2) == ids_TK.unsqueeze(1), slots, 0).amax(2)


def without_repeats(ids_TK: Any, last_TK: Any) -> Any:
    """The ids, -1 where a later slot of the token has the same."""
    return torch.where(last_TK == torch.arange(ids_TK.shape[1], device=ids_TK.device), ids_TK, -1)


# ---------------------------------------------------------------- rows as bytes
def pack(rows_TX: Any, granule: int) -> Any:
    """bfloat16 [T, n]: the rows' bytes, zeros up to a multiple of `granule` bytes. Dispatches copy bytes, whatever they mean."""
    rows_TX = rows_TX.contiguous() if rows_TX.stride(-1) == 1 else rows_TX.clone(memory_format=torch.contiguous_format)
    extra = -(rows_TX.shape[1] * rows_TX.element_size()) % granule
    if rows_TX.dtype == torch.bfloat16:
        return F.pad(rows_TX, (0, extra // 2)) if extra else rows_TX
    return F.pad(rows_TX.view(torch.uint8), (0, extra)).view(torch.bfloat16)


def unpack(packed: Any, width: int, dtype: Any) -> Any:
    """What `pack` made bytes of: [R, width]."""
    if dtype == torch.bfloat16:
        return packed[:, :width].contiguous()
    return packed.view(torch.uint8)[:, : width * dtype.itemsize].contiguous().view(dtype)


def widen(rows_RX: Any, step: int) -> Any:
    """The rows, zeros behind, with a multiple of `step` columns."""
    extra = -rows_RX.shape[1] % step
    return F.pad(rows_RX, (0, extra)) if extra else rows_RX.contiguous()


# ---------------------------------------------------------------- one object for all layers
@dataclasses.dataclass
class _Lent:
    thing: Any
    users: int = 0


_lent: dict[Any, _Lent] = {}


def _borrow(key: Any, make: Callable[[], Any]) -> Any:
    found = _lent.get(key)
    if found is None:
        found = _lent[key] = _Lent(make())
    found.users += 1
    return found.thing


def _give_back(key: Any, destroy: Callable[[Any], None]) -> None:
    found = _lent[key]
    found.users -= 1
    if not found.users:
        destroy(_lent.pop(key).thing)


class LibraryExchange(Exchange):
    """An exchange whose state is a library's object, which the exchanges of one group and of the same `sizes` share.

    It is made at the first layer's first call, by all ranks of the group alike, and never grows: other sizes get another object. The
    last exchange that is destroyed destroys it.
    """

    module: str

    def __init__(self, setup: Setup, device: Any) -> None:
        """Raises ExchangeError, if the library is not there or makes no object, or inside the capture of a CUDA graph."""
        super().__init__(setup, device)
        self.library = need(self.name, self.module)
        self._key: Any = (self.name, setup.group, str(device), *self.sizes())
        self._held = _borrow(self._key, self._make_checked)

    @abc.abstractmethod
    def sizes(self) -> tuple[Any, ...]:
        """What the library's object is made for; setups that agree in it share the object."""

    @abc.abstractmethod
    def make(self) -> Any:
        """The library's object. All ranks of the group call it together."""

    def _make_checked(self) -> Any:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ExchangeError(f"{self.name}: its buffers cannot be made while a CUDA graph is captured; call the model once before")
        with self.calling(f"setup for {self.sizes()}"):
            return self.make()

    @property
    def held(self) -> Any:
        """The library's object. Raises ExchangeError after destroy."""
        if self._key is None:
            raise ExchangeError(f"{self.name}: this exchange was destroyed; exchange_of makes a new one")
        return self._held

    def check(self, stage: str = "check") -> None:
        if self.device.type == "cuda":
            with self.calling(stage):
                if not torch.cuda.is_current_stream_capturing():
                    torch.cuda.current_stream(self.device).query()

    def destroy(self) -> None:
        key, self._key, self._held = self._key, None, None
        if key is not None:
            _give_back(key, self._destroy)

    def _destroy(self, thing: Any) -> None:
        """No rank may free what another still writes to."""
        with self.calling("destroy"):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.wait(dist.barrier(group=self.group, async_op=True), on_host=True)
            thing.destroy()

    @contextlib.contextmanager
    def calling(self, stage: str) -> Iterator[None]:
        """Turns what the library raises into an ExchangeError with the stage and the ranks."""
        started = time.monotonic()
        try:
            yield
        except (ExchangeError, torch.OutOfMemoryError):
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            where = f"{self.name} {stage}: rank {dist.get_rank()}"
            group = f"its expert-parallel group (ranks {self.ranks})"
            raise ExchangeError(f"{where} {self._why(error, group, time.monotonic() - started)}: {_told(error)}") from error

    def _why(self, error: Exception, group: str, waited: float) -> str:
        """What an exception of the library means, as far as its text tells."""
        text, library = str(error).lower(), self.library.__name__
        if any(word in text for word in LOST):
            return f"got no answer from {group} after {waited:.1f} s; another rank has died, stalled, or runs another program"
        if any(word in text for word in STOPPED):
            return (
                f"of {group} found its device stopped; {library} stops it where another rank does not answer (what it printed stands "
                "above), or an earlier kernel of this process failed; start the processes again"
            )
        return f'of {group} was refused by {library}; choose another ParallelConfig.comm, or "auto"'

    def check_tokens(self, tokens: int, limit: int) -> None:
        """Raises ExchangeError for more tokens than the library's object has places for."""
        if tokens > limit:
            raise ExchangeError(
                f"{self.name} dispatch: rank {dist.get_rank()} has {tokens} tokens, ParallelConfig.max_tokens_per_rank is {limit}; "
                "set it to the most tokens that any rank will bring, on all ranks"
            )

    def check_sum(self, rows_RX: Any) -> None:
        """Raises ValueError for rows that the library cannot add up."""
        if rows_RX.dtype != torch.bfloat16:
            raise ValueError(
                f"{self.name} adds up rows of bfloat16, or {self.setup.top_k} numbers a token; got {rows_RX.dtype} "
                f"{list(rows_RX.shape)}; cast them, or choose another ParallelConfig.comm"
            )


class BatchedExchange(LibraryExchange):
    """A library that gives each local expert a block of places: rows [E_local * capacity, H], capacity = W * room.

    handle: the two marks, sent_TK (the ids as the library got them), last_TK (the slot that stands for a slot, where ids may repeat; else
    empty), and the library's own tensors.
    """

    format = "batched"

    @property
    def room(self) -> int:
        """Places of one rank's tokens for an expert."""
        return self.setup.max_tokens

    def places(self) -> tuple[int, int]:
        """(experts of this rank, places of each)."""
        return self.setup.num_experts // self.world, self.world * self.room

    def place_ids(self, counts_E: Any) -> Any:
        """ids int32 [R, 1]: the expert of each place that holds a token, -1 for the others."""
        experts, places = self.places()
        expert = torch.arange(experts, dtype=torch.int32, device=counts_E.device).unsqueeze(1)
        taken = torch.arange(places, dtype=torch.int32, device=counts_E.device).unsqueeze(0) < counts_E.unsqueeze(1)
        return torch.where(taken, expert, -1).view(-1, 1)

    def wide(self, rows_RX: Any) -> Any:
        """The rows, zeros behind, of the setup's width. Raises ValueError for rows that are wider, or of no dtype that can be sent."""
        if rows_RX.dtype != torch.bfloat16 or rows_RX.shape[1] > self.setup.hidden:
            raise ValueError(
                f"{self.name} moves rows of bfloat16 and up to {self.setup.hidden} columns; got {rows_RX.dtype} {list(rows_RX.shape)}; "
                "cast them, or choose another ParallelConfig.comm"
            )
        return widen(rows_RX, self.setup.hidden)

    def slot_weights(self, weights_TK: Any, handle: list[Any]) -> Any:
        """float32 [T, K]: 1 without weights; a repeated id's weight goes to the slot that was sent."""
        sent, last = handle[2], handle[3]
        if weights_TK is None:
            weights_TK = torch.ones(sent.shape, dtype=torch.float32, device=sent.device)
        weights_TK = weights_TK.float().contiguous()
        return weights_TK if last.dim() == 1 else torch.zeros_like(weights_TK).scatter_add_(1, last, weights_TK)

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        """Raises ValueError: there is no backward."""
        raise ValueError(f"{self.name} has no backward; train with a provider that has one (ParallelConfig.comm)")


def batched_rows(setup: Setup, room: int) -> int:
    """Rows of a batched dispatch, on every rank: E_local * W * room."""
    return setup.num_experts // setup.world * setup.world * room


def last_like(ids_TK: Any, setup: Setup) -> Any:
    """A fake of BatchedExchange's last_TK."""
    return ids_TK.new_empty((0,) if setup.ids_valid else ids_TK.shape, dtype=torch.int64)


# ---------------------------------------------------------------- what it costs
def rows_by_rank(problem: Problem) -> float:
    """Rows of one rank's tokens, one for each rank that has a token's experts (its own too), if the experts are chosen evenly."""
    return (problem.tokens or 1024) * problem.world * (1 - (1 - 1 / problem.world) ** problem.top_k)


def microseconds(problem: Problem, rows: float, there: dict[int, float], back: dict[int, float]) -> float:
    """Rows there and back at so many GB/s, measured with 2, 4 and 8 ranks; fp8 sends half of the bytes there."""
    size, ranks = rows * problem.hidden * problem.dtype.itemsize, min((n for n in there if n >= problem.world), default=max(there))
    return size * (0.53 if problem.quant == "fp8" else 1.0) / (there[ranks] * 1e3) + size / (back[ranks] * 1e3)
