"""One object of a communication library for all layers of a size, and what its exceptions become.

A rank that dies or stalls: the libraries wait in their kernels, so what they do about it differs and is said in each adapter. What one
raises becomes an ExchangeError (`LibraryExchange.calling`). A kernel that stops the device takes the process' CUDA context with it: the
next call that looks at the device raises, one of these or any of torch's, and the process must be started again.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from .exchange import Exchange, ExchangeError, Received, place_ids
from .libraries import need, told
from .library_rows import widen
from .setup import Setup

# In what the libraries raise: another rank is gone; this process' device has stopped.
LOST = ("timeout", "timed out", "connection", "cpu wait")
STOPPED = ("cuda error", "launch failure")


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
            raise ExchangeError(f"{where} {self._why(error, group, time.monotonic() - started)}: {told(error)}") from error

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

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        """With an id for each place."""
        got = self.dispatch_views(x_TH, ids_TK, weights)
        assert got.metadata is not None
        return got._replace(ids=place_ids(got.metadata.counts_E, self.places()[1]))

    @abc.abstractmethod
    def dispatch_views(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        """Without ids; metadata has the counts."""

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
