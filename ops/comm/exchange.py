"""What a comm provider of several ranks implements, its state, and what goes wrong between ranks.

An exchange moves rows: `dispatch` sends each token once to every rank that has one of its experts, `collect` sums what the ranks
made of it, `send` repeats the dispatch for other rows (the backward of collect, as collect is the backward of dispatch).
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import registry
from .setup import Setup

# Names of a comm provider's kernels.
EXCHANGE = "exchange"  # (Setup, device) -> Exchange
RECEIVED = "received_rows"  # (tokens, Setup) -> rows that dispatch gives, None if only the data tells
HANDLE = "handle_like"  # (x, ids, rows, Setup) -> fakes of the handle
SLOTS = "slots"  # (Setup) -> slots of a received row, for the batched format; without it K
CAP = "token_cap"  # (Setup) -> the most tokens of one dispatch, 0: no limit; more go in chunks
SCALE_BLOCK = 128  # columns that share a scale


class ExchangeError(RuntimeError):
    """An exchange between ranks failed: a rank is dead, stalled, or sent more than fits. Names the stage and the group."""


@dataclasses.dataclass(frozen=True)
class ExpertTokensMetadata:
    """Tokens per local expert: counts_E int32 on the device, and on the CPU where the provider knows them without a wait of its own.

    With the CPU's copy workspaces have the exact size; without it, the proven worst case.
    """

    counts_E: Any
    counts_cpu: tuple[int, ...] | None = None


class Received(NamedTuple):
    """What a rank got.

    rows [R, H] (in quant's dtype), scales [R, H/128] float32 or [0]; ids int32 [R, K], this rank's own numbering, -1 for slots of
    other ranks and for rows that hold nothing (None from dispatch_views in the batched format: the counts tell); weights: one [R, K] for
    each that was sent, zero where ids is -1. Batched rows beyond an expert's count are undefined from dispatch_views.
    handle: what send and collect need; handle[0] has T rows, handle[1] has R.
    """

    rows: Any
    scales: Any
    ids: Any
    weights: list[Any]
    handle: list[Any]
    metadata: ExpertTokensMetadata | None = None


class Exchange(abc.ABC):
    """One provider's state for one group: made once, shared by all layers of its shape, destroyed once."""

    name: str
    format: str = "standard"

    def __init__(self, setup: Setup, device: Any) -> None:
        self.setup, self.device = setup, device
        self.group = setup.process_group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.ranks = dist.get_process_group_ranks(self.group)
        self.rows_known = registry.get("comm", self.name).kernels[RECEIVED](0, setup) is not None  # R before the call

    @abc.abstractmethod
    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        """Sends tokens to their experts' ranks. Raises ExchangeError."""

    @abc.abstractmethod
    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        """rows [R, X]: each token's row of x wherever dispatch sent the token; zeros in rows that hold nothing. Raises ExchangeError."""

    @abc.abstractmethod
    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        """out [T, X]: the sum of a token's rows over ranks. Raises ExchangeError.

        weights: only for the batched format, which sums slots.
        """

    def dispatch_views(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        """As dispatch; what it gives may be views of a workspace, valid until the next call. Not for tensors that a graph keeps."""
        return self.dispatch(x_TH, ids_TK, weights)

    def collect_slots(self, y_SO: Any, places_RK: Any, weights_RK: Any, handle: list[Any], out_dtype: Any) -> Any:
        """collect of rows[r] = sum_k weights[r, k] * y[places[r, k]] (weights None: ones; places int32, -1: nothing)."""
        return self.collect(sum_slots(y_SO, places_RK, weights_RK, out_dtype), handle, out_dtype)

    def check(self) -> None:  # noqa: B027  most raise in the call itself
        """Raises ExchangeError if an earlier call failed on the device. No sync."""

    def destroy(self) -> None:  # noqa: B027  most hold nothing
        """Gives back what the exchange holds; a second call does nothing."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Turns what the communication library raises into an ExchangeError that names the stage and the ranks."""
        started = time.monotonic()
        try:
            yield
        except ExchangeError:
            raise
        except RuntimeError as error:
            waited = time.monotonic() - started
            raise ExchangeError(
                f"{self.name} {name}: rank {dist.get_rank()} got no answer from its expert-parallel group (ranks {self.ranks}) after "
                f"{waited:.1f} s (timeout {self.setup.timeout:g} s); another rank has died, stalled, or runs another program: "
                f"{(str(error).splitlines() or [''])[0]}"
            ) from error

    def wait(self, work: Any, on_host: bool = False) -> None:
        """Lets the current stream wait for a collective, on a CPU (or on_host) this process, at most the setup's timeout."""
        if work is None:
            return
        if self.device.type == "cpu":
            work.wait(datetime.timedelta(seconds=self.setup.timeout))
            return
        work.wait()
        if on_host:
            self._wait_for_stream()

    def _wait_for_stream(self) -> None:
        """NCCL's own waiting with a timeout looks once a millisecond; this looks all the time."""
        done, until = torch.cuda.Event(), time.monotonic() + self.setup.timeout
        done.record(torch.cuda.current_stream(self.device))
        while not done.query():
            if time.monotonic() > until:
                raise RuntimeError(f"timed out after {self.setup.timeout:g} s")
            time.sleep(0)


_exchanges: dict[tuple[str, str, Any], Exchange] = {}


def exchange_of(provider: str, parallel: str, device: Any) -> Exchange:
    """The provider's exchange for a setup text, made at its first use."""
    key = (provider, parallel, torch.device(device))
    found = _exchanges.get(key)
    if found is None:
        make: Callable[..., Exchange] = registry.kernel("comm", provider, EXCHANGE)
        found = _exchanges[key] = make(Setup.parse(parallel), key[2])
    return found


def check_all() -> None:
    """Raises ExchangeError if a call of any exchange failed on the device: for callers that only replay CUDA graphs. No sync."""
    for each in _exchanges.values():
        each.check()


def destroy_all() -> None:
    """Destroys every exchange, the last made first. Call it before torch.distributed.destroy_process_group; a second call does nothing.

    All ranks must call it alike. It also runs at interpreter exit, after an exception too, where the process groups still stand.
    """
    errors = []
    while _exchanges:
        _, found = _exchanges.popitem()
        try:
            found.destroy()
        except Exception as error:  # noqa: BLE001  the others must be given back all the same
            errors.append(error)
    if errors:
        raise ExchangeError(f"destroying the exchanges failed: {'; '.join(map(str, errors))}") from errors[0]


@atexit.register
def _at_exit() -> None:
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(ExchangeError):  # the interpreter is going; what a dead peer does is of no use now
            destroy_all()
    _exchanges.clear()


def sum_slots(y_SO: Any, places_RK: Any, weights_RK: Any, out_dtype: Any) -> Any:
    """rows [R, O]: the weighted sum of each row's slots, accumulated in float32 or wider, slot after slot."""
    wide = torch.promote_types(y_SO.dtype, torch.float32)
    rows = y_SO.new_zeros((places_RK.shape[0], y_SO.shape[1]), dtype=wide)
    if y_SO.shape[0] == 0:
        return rows.to(out_dtype)
    for k in range(places_RK.shape[1]):
        at = places_RK[:, k]
        scale = torch.ones_like(at, dtype=wide) if weights_RK is None else weights_RK[:, k].to(wide)
        part = y_SO.index_select(0, at.clamp(min=0)).to(wide) * scale.unsqueeze(1)
        rows += part.masked_fill_((at < 0).unsqueeze(1), 0)
    return rows.to(out_dtype)


def place_ids(counts_E: Any, places: int) -> Any:
    """ids int32 [E * places, 1] of batched rows: the expert of each place that holds a row, -1 for the others."""
    expert = torch.arange(counts_E.shape[0], dtype=torch.int32, device=counts_E.device).unsqueeze(1)
    place = torch.arange(places, dtype=torch.int32, device=counts_E.device)
    return torch.where(place < counts_E.unsqueeze(1), expert, -1).view(-1, 1)


def marks(tokens: int, rows: int, like: Any) -> list[Any]:
    """The first two tensors of a handle, which tell T and R by their shapes."""
    return [like.new_empty((tokens, 0)), like.new_empty((rows, 0))]
