"""Provider "alltoall": all_to_all_single of the rows, one copy of a token for each rank that has one of its experts (NCCL, gloo).

Counts go first and are read on the host, so workspaces have the exact size and no CUDA graph can hold it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import registry
from ..sizes import dynamic_size
from . import payload
from .exchange import EXCHANGE, HANDLE, RECEIVED, Exchange, ExpertTokensMetadata, Received, marks
from .setup import Setup, chunk_size, local_range


class AllToAll(Exchange):
    """handle: the two marks, tokens_S (the token of each sent row, rank after rank), splits [2, W] on the CPU (sent, received)."""

    name = "alltoall"

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        ranks_S, tokens_S, sent, received, counts = self._plan(ids_TK)
        splits = torch.tensor([sent, received], dtype=torch.int64)
        handle = [*marks(x_TH.shape[0], sum(received), x_TH), tokens_S, splits]
        rows, scales = payload.quantize_rows(x_TH, self.setup.quant)
        ids_SK, own = self._local_ids(ids_TK[tokens_S], ranks_S)
        rows = self._forth(rows[tokens_S], handle, "dispatch of rows")
        scales = self._forth(scales[tokens_S], handle, "dispatch of scales") if self.setup.quant != "none" else x_TH.new_empty(0).float()
        ids = self._forth(ids_SK, handle, "dispatch of ids")
        moved = [self._forth(torch.where(own, w[tokens_S], 0), handle, "dispatch of weights") for w in weights]
        return Received(rows, scales, ids, moved, handle, ExpertTokensMetadata(counts.to(x_TH.device), tuple(counts.tolist())))

    def _plan(self, ids_TK: Any) -> tuple[Any, Any, list[int], list[int], Any]:
        """(rank and token of each row to send, rows sent and received by rank, rows of each local expert)."""
        size = chunk_size(self.setup.num_experts, self.world)
        valid = (ids_TK >= 0) & (ids_TK < self.setup.num_experts)
        ids = torch.where(valid, ids_TK, self.world * size).long()
        wanted_TW = torch.zeros((ids.shape[0], self.world + 1), dtype=torch.bool, device=ids.device)
        wanted_TW.scatter_(1, ids // size, True)
        wanted_TW = wanted_TW[:, : self.world]
        experts = torch.zeros(self.world * size + 1, dtype=torch.int64, device=ids.device)
        experts.scatter_add_(0, ids.reshape(-1), torch.ones_like(ids).reshape(-1))
        counts = torch.cat([wanted_TW.sum(0).unsqueeze(1), experts[:-1].view(self.world, size)], 1).to(torch.int64)
        told = torch.empty_like(counts)
        with self.stage("exchange of counts"):
            self.wait(dist.all_to_all_single(told, counts, group=self.group, async_op=True), on_host=True)
            both = torch.stack([counts, told]).cpu()
        ranks_S, tokens_S = (column.clone() for column in wanted_TW.t().nonzero(as_tuple=True))  # not views: an op's results are its own
        first, end = local_range(self.setup.num_experts, self.world, self.rank)
        return ranks_S, tokens_S, both[0, :, 0].tolist(), both[1, :, 0].tolist(), both[1, :, 1:].sum(0)[: end - first].to(torch.int32)

    def _local_ids(self, ids_SK: Any, ranks_S: Any) -> tuple[Any, Any]:
        """(ids in the receiver's numbering, int32, -1 for the slots of other ranks; which are its own)."""
        size = chunk_size(self.setup.num_experts, self.world)
        first = (ranks_S * size).unsqueeze(1)
        own = (ids_SK >= first) & (ids_SK < (first + size).clamp(max=self.setup.num_experts))
        return torch.where(own, ids_SK - first, -1).to(torch.int32), own

    def _forth(self, rows: Any, handle: list[Any], stage: str) -> Any:
        sent, received = handle[3].tolist()
        return self._move(rows, received, sent, stage)

    def _move(self, rows: Any, received: list[int], sent: list[int], stage: str) -> Any:
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        there, here = _bytes(out), _bytes(rows)
        with self.stage(stage):
            self.wait(dist.all_to_all_single(there, here, received, sent, group=self.group, async_op=True))
        return out

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        return self._forth(x_TX[handle[2]], handle, "send")

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        sent, received = handle[3].tolist()
        back_SX = self._move(rows_RX, sent, received, "combine")
        out = back_SX.new_zeros((handle[0].shape[0], rows_RX.shape[1]), dtype=torch.promote_types(rows_RX.dtype, torch.float32))
        for tokens, part in zip(handle[2].split(sent), back_SX.split(sent), strict=True):  # a rank's tokens are distinct: no race
            out.index_add_(0, tokens, part.to(out.dtype))
        return out.to(out_dtype)


def _bytes(rows: Any) -> Any:
    """The rows as bytes, which every backend moves."""
    if rows.numel() == 0:
        return rows.new_empty((rows.shape[0], 0), dtype=torch.uint8)
    dense = rows if rows.is_contiguous() and rows.stride(-1) == 1 else rows.clone(memory_format=torch.contiguous_format)
    return (
        dense.view(rows.shape[0], -1).view(torch.uint8)
        if dense.stride(-1) == 1
        else dense.reshape(-1).view(torch.uint8).view(len(rows), -1)
    )


def supports(problem: registry.Problem) -> str | None:
    if problem.world < 2:
        return "alltoall exchanges between ranks, world is 1"
    if problem.cuda_graphs:
        return "alltoall reads counts on the host, CUDA graphs cannot hold it"
    return payload_support("alltoall", problem)


def payload_support(name: str, problem: registry.Problem) -> str | None:
    """None if rows can travel in the problem's quantisation, else why not."""
    if problem.quant == "fp8" and problem.training:
        return f"{name} quantises rows for inference only, gradients are wanted"
    if problem.quant not in ("none", "fp8"):
        return f"{name} moves rows as they are or as fp8, quant is {problem.quant!r}"
    return None


def cost(problem: registry.Problem) -> float:
    """Microseconds: the counts' way over the host, and each rank's share of rows there and back at 300 GB/s (gloo 1)."""
    share = problem.world * (1 - (1 - 1 / problem.world) ** problem.top_k)
    sent = (problem.tokens or 1024) * share * (problem.world - 1) / problem.world * problem.hidden * problem.dtype.itemsize
    speed = 3e5 if problem.device.startswith("cuda") else 1e3
    return (
        (450.0 if problem.device.startswith("cuda") else 900.0)
        + sent * (0.5 if problem.quant == "fp8" else 1.0) / speed
        + sent * 2.5 / speed
    )


def received(tokens: Any, setup: Setup) -> None:
    """Only the data tells."""


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    sent = ids_TK.new_empty((dynamic_size(x_TH),), dtype=torch.int64)
    return [*marks(x_TH.shape[0], rows, x_TH), sent, sent.new_empty((2, setup.world), device="cpu")]


PROVIDER = registry.register(
    registry.Provider("alltoall", "comm", {EXCHANGE: AllToAll, RECEIVED: received, HANDLE: handle_like}, cost, supports)
)
