"""Provider "allgather": every rank gets every token (all-gather), and the sums come back by reduce-scatter.

Ranks pad to a common number of tokens: the setup's max_tokens, so that nothing is read on the host and a CUDA graph can hold it; or,
where that is not known, the largest count, which is exchanged first. Partial sums travel in the rows' dtype, as reduce-scatter adds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import registry
from . import collectives, payload
from .alltoall import payload_support
from .exchange import EXCHANGE, HANDLE, RECEIVED, Exchange, ExchangeError, Received, marks
from .setup import Setup, local_range


class AllGather(Exchange):
    """handle: the two marks. R = W * padded tokens; rank r's tokens are rows r*R/W and on."""

    name = "allgather"

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        room = self._room(x_TH.shape[0])
        handle = marks(x_TH.shape[0], self.world * room, x_TH)
        rows, scales = payload.quantize_rows(x_TH, self.setup.quant)
        rows = self._gather(rows, room, "dispatch of rows")
        scales = self._gather(scales, room, "dispatch of scales") if self.setup.quant != "none" else x_TH.new_empty(0).float()
        ids = self._gather(ids_TK, room, "dispatch of ids", -1)
        first, end = local_range(self.setup.num_experts, self.world, self.rank)
        own = (ids >= first) & (ids < end)
        moved = [torch.where(own, self._gather(w, room, "dispatch of weights"), 0) for w in weights]
        return Received(rows, scales, torch.where(own, ids - first, -1).to(torch.int32), moved, handle)

    def _room(self, tokens: int) -> int:
        limit = self.setup.max_tokens
        if limit:
            if tokens > limit:
                raise ExchangeError(
                    f"allgather dispatch: rank {dist.get_rank()} has {tokens} tokens, ParallelConfig.max_tokens_per_rank is {limit}; "
                    "set it to the most tokens that any rank will bring, on all ranks"
                )
            return limit
        most = torch.tensor([tokens], device=self.device)
        with self.stage("exchange of counts"):
            self.wait(dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group, async_op=True), on_host=True)
            return int(most.item())

    def _gather(self, rows: Any, room: int, stage: str, fill: int = 0) -> Any:
        padded = F.pad(rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows, (0, 0, 0, room - rows.shape[0]), value=fill)
        out, padded = padded.new_empty((self.world * room, rows.shape[1])), padded.contiguous()
        with self.stage(stage):
            self.wait(collectives.all_gather(out, padded, group=self.group, async_op=True))
        return out.view(rows.dtype)

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        return self._gather(x_TX, handle[1].shape[0] // self.world, "send")

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        tokens = handle[0].shape[0]
        out, rows_RX = rows_RX.new_empty((handle[1].shape[0] // self.world, rows_RX.shape[1])), rows_RX.contiguous()
        with self.stage("combine"):
            self.wait(collectives.reduce_scatter(out, rows_RX, group=self.group, async_op=True))
        return out[:tokens].to(out_dtype, copy=True)


def supports(problem: registry.Problem) -> str | None:
    if problem.world < 2:
        return "allgather exchanges between ranks, world is 1"
    if problem.cuda_graphs and not problem.max_tokens:
        return "allgather needs ParallelConfig.max_tokens_per_rank under CUDA graphs, else it reads counts on the host"
    return payload_support("allgather", problem)


def cost(problem: registry.Problem) -> float:
    """Microseconds: every token to every rank and a sum back, at 350 GB/s (gloo 1)."""
    tokens = problem.max_tokens or problem.tokens or 1024
    sent = tokens * (problem.world - 1) * problem.hidden * problem.dtype.itemsize
    speed = 3.5e5 if problem.device.startswith("cuda") else 1e3
    return (150.0 if problem.device.startswith("cuda") else 500.0) + sent * (1.5 if problem.quant == "fp8" else 2.0) / speed


def received(tokens: Any, setup: Setup) -> int | None:
    return setup.world * setup.max_tokens if setup.max_tokens else None


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    return marks(x_TH.shape[0], rows, x_TH)


PROVIDER = registry.register(
    registry.Provider("allgather", "comm", {EXCHANGE: AllGather, RECEIVED: received, HANDLE: handle_like}, cost, supports)
)
