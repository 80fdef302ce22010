"""Provider "nvlink_batched": the nvlink exchange in the batched format, rows sorted by expert as they arrive: [E_local, capacity, H].

A row for each slot, few tokens (T * K <= 8192), no host sync. The routing weights are applied where the token came from, in float32.
More rows for an expert than its capacity: left out of the sum on all ranks alike, and an error at the next dispatch, unless
ParallelConfig.overflow allows it.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import registry
from . import costs, nvlink
from .exchange import CAP, EXCHANGE, HANDLE, RECEIVED, SLOTS, ExpertTokensMetadata, Received, marks, place_ids
from .nvlink import Nvlink, limits, missing, narrowed
from .peer.checks import MAX_BATCHED_SLOTS
from .peer.engine import NvlinkEngine
from .setup import Setup, chunk_size

NAME = "nvlink_batched"


class NvlinkBatched(Nvlink):
    """handle: the two marks, then places int32 [T, K] and counts int32 [E_local]. R = E_local * capacity."""

    name = NAME
    format = "batched"

    def open(self, **options: Any) -> NvlinkEngine:
        return super().open(batched_capacity=capacity(self.setup), may_drop=self.setup.overflow == "drop", **options)

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        got = self.dispatch_views(x_TH, ids_TK, weights)
        assert got.metadata is not None
        ids = place_ids(got.metadata.counts_E, capacity(self.setup))
        return got._replace(rows=torch.where(ids >= 0, got.rows, 0), ids=ids)

    def dispatch_views(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        self.check_tokens(x_TH.shape[0])
        got = self.engine.dispatch_batched(self.wide(x_TH), ids_TK.contiguous())
        rows = narrowed(got.rows.flatten(0, 1), x_TH.shape[1])
        handle = [*marks(x_TH.shape[0], rows.shape[0], x_TH), *got.handle]
        return Received(rows, x_TH.new_empty(0).float(), None, [], handle, ExpertTokensMetadata(got.counts))

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        raise NotImplementedError(f"{self.name} has no backward; choose comm='nvlink' for training")

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        places, counts = handle[2:]
        weights = torch.ones_like(places, dtype=torch.float32) if weights_TK is None else weights_TK.float().contiguous()
        room = self._room(rows_RX.dtype)
        return nvlink.by_columns(rows_RX, room, lambda part: self.engine.collect_batched(part, weights, [places, counts], out_dtype))

    def collect_slots(self, y_SO: Any, places_RK: Any, weights_RK: Any, handle: list[Any], out_dtype: Any) -> Any:
        raise NotImplementedError(f"{self.name} takes rows where they arrived; call collect")


def capacity(setup: Setup) -> int:
    """Rows of one expert: as asked, else as many as can come."""
    most = setup.world * setup.max_tokens * (1 if setup.ids_valid else setup.top_k)
    return min(setup.capacity, most) if setup.capacity else most


def supports(problem: registry.Problem) -> str | None:
    why = limits(NAME, problem)
    if why is None and problem.quant != "none":
        why = f"{NAME} carries rows as they are, quant is {problem.quant!r}"
    if why is None and problem.training:
        why = f"{NAME} has no backward, gradients are wanted"
    if why is None and chunk_size(problem.num_experts, problem.world) * problem.world != problem.num_experts:
        why = f"{NAME} needs as many experts on each rank, num_experts is {problem.num_experts}, world {problem.world}"
    return why or missing(NAME)


def cost(problem: registry.Problem) -> float:
    """Microseconds: measured on 4 H200, a row for each slot at 300 GB/s each way, in chunks."""
    tokens = problem.tokens or costs.TOKENS
    sent = tokens * problem.top_k * (problem.world - 1) / problem.world * problem.hidden * problem.dtype.itemsize
    return 24.0 * max(1.0, tokens * problem.top_k / MAX_BATCHED_SLOTS) + 2 * sent / 3.0e5


def received(tokens: Any, setup: Setup) -> int:
    return chunk_size(setup.num_experts, setup.world) * capacity(setup)


def slots(setup: Setup) -> int:
    """A place is one expert's."""
    return 1


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    counts = ids_TK.new_empty((chunk_size(setup.num_experts, setup.world),), dtype=torch.int32)
    return [*marks(x_TH.shape[0], rows, x_TH), ids_TK.new_empty(ids_TK.shape, dtype=torch.int32), counts]


def cap(setup: Setup) -> int:
    """The most tokens of one dispatch."""
    return max(1, MAX_BATCHED_SLOTS // setup.top_k)


KERNELS: dict[str, Any] = {EXCHANGE: NvlinkBatched, RECEIVED: received, HANDLE: handle_like, SLOTS: slots, CAP: cap}
PROVIDER = registry.register(registry.Provider(NAME, "comm", KERNELS, cost, supports))
