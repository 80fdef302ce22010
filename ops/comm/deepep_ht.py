"""Provider "deepep_ht": DeepEP's high-throughput kernels inside one host (`deep_ep.Buffer`, of V1 or V2).

Each token goes once to every rank that has one of its experts, with its ids and one set of weights; the combine adds rows up unweighted in
float32 and rounds to bfloat16. The number of received rows is read on the host (DeepEP's kernel writes it there), so workspaces have the
exact size; a setup that says cuda_graphs, with max_tokens, gets W * max_tokens rows instead and reads nothing.

A dispatch copies bytes, so rows of any dtype are sent as they are. What is summed must be bfloat16; float32 sums of up to 32 numbers a
token (gradients of the routing weights) go by the channel that the combine has for weights, exactly.

A rank that dies or stalls: DeepEP waits 100 s, whatever the setup's timeout is. A dispatch that reads counts then raises on the host (an
ExchangeError); everything else, and every combine, waits in a kernel, which prints "DeepEP timeout" and stops the device.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import registry
from . import libraries, payload
from .exchange import EXCHANGE, HANDLE, RECEIVED, ExpertTokensMetadata, Received, marks
from .library_exchange import LibraryExchange
from .library_rows import clean_ids, pack, unpack, widen
from .setup import Setup

NAME = "deepep_ht"
SMS = 64  # multiprocessors of a kernel, two to a channel; 24 take 1.25 times as long (4096 tokens, 4 H200)
CHUNKS = {2: (24, 10), 4: (6, 9), 8: (6, 4)}  # ranks -> tokens that a channel sends at once there and back: DeepEP's own tuning
QUEUE = 256  # tokens that a channel holds
ROW_BYTES = 32  # a row's bytes must be a multiple: each half of it is moved in units of 16
MOST_BYTES = 16352  # of a row: half of it and a barrier share 8192 bytes
MOST_SLOTS = 32  # numbers of the weights' channel
MOST_EXPERTS = 128  # of a rank: a thread each
SUM_STEP = 8  # a summed row's columns must be a multiple
SPEED = {2: 310.0, 4: 305.0, 8: 350.0}  # ranks -> GB/s of all rows, there and back alike


class HighThroughput(LibraryExchange):
    """handle: the two marks, then DeepEP's own: rank_prefix [W, W], channel_prefix [W, C], received_prefix [W, C], sources [R], all
    int32, is_in_rank bool [T, W], heads int32 [T, W].

    The combine writes into heads, to the same values each time, so a handle may be used again.
    """

    name = NAME
    module = "deep_ep"

    def __init__(self, setup: Setup, device: Any) -> None:
        super().__init__(setup, device)
        self.worst = _worst(setup)
        self.dispatch_config, self.combine_config = self._configs()

    def sizes(self) -> tuple[Any, ...]:
        return (self.setup.hidden,)

    def _configs(self) -> list[Any]:
        return [self.library.Config(SMS, chunk, QUEUE, 6, 128) for chunk in CHUNKS[self.world]]

    def make(self) -> Any:
        size = max(config.get_nvl_buffer_size_hint(self.setup.hidden * 2, self.world) for config in self._configs())
        return self.library.Buffer(self.group, num_nvl_bytes=size, num_rdma_bytes=0, low_latency_mode=False, explicitly_destroy=True)

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        self.check("dispatch")
        if self.worst:
            self.check_tokens(x_TH.shape[0], self.setup.max_tokens)
        ids = clean_ids(ids_TK, self.setup.num_experts, self.library.topk_idx_t)
        first = weights[0].float().contiguous() if weights else torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        rows, scales = payload.quantize_rows(x_TH, self.setup.quant)
        sent = pack(rows, ROW_BYTES) if self.setup.quant == "none" else (rows, scales)
        with self.calling("dispatch"):
            got, got_ids, got_first, counts, own = self._dispatch_new(sent, ids, first)
        rows, scales = (unpack(got, x_TH.shape[1], x_TH.dtype), x_TH.new_empty(0).float()) if self.setup.quant == "none" else got
        handle = [*marks(x_TH.shape[0], rows.shape[0], x_TH), *own]
        mine = got_ids >= 0
        moved = [got_first, *(self.send(w.contiguous(), handle) for w in weights[1:])][: len(weights)]
        moved = [torch.where(mine, got, 0).to(w.dtype) for got, w in zip(moved, weights, strict=True)]
        return Received(rows, scales, got_ids.to(torch.int32), moved, handle, _metadata(counts, x_TH.device))

    def _dispatch_new(self, sent: Any, ids_TK: Any, weights_TK: Any) -> tuple[Any, ...]:
        """(rows or (rows, scales), ids [R, K], weights [R, K], rows of each local expert or nothing, DeepEP's handle)."""
        per_rank, _, per_expert, in_rank, _ = self.held.get_dispatch_layout(ids_TK, self.setup.num_experts)
        found = self.held.dispatch(
            sent, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=ids_TK,
            topk_weights=weights_TK, num_worst_tokens=self.world * self.setup.max_tokens if self.worst else 0, config=self.dispatch_config,
        )  # fmt: skip
        return tuple(found[:5])

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        self.check("send")
        sent = pack(x_TX, ROW_BYTES)
        with self.calling("send"):
            got = self.held.dispatch(sent, handle=tuple(handle[2:]), config=self.dispatch_config)[0]
        rows = unpack(got, x_TX.shape[1], x_TX.dtype)
        if not self.worst:
            return rows
        held = torch.arange(rows.shape[0], device=rows.device) < handle[2][-1, self.rank]
        return torch.where(held.unsqueeze(1), rows, 0)

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        self.check("combine")
        width = rows_RX.shape[1]
        narrow = width <= MOST_SLOTS and (rows_RX.dtype != torch.bfloat16 or width == self.setup.top_k)
        if not narrow:
            self.check_sum(rows_RX)
        rows = rows_RX.new_zeros((rows_RX.shape[0], 2 * SUM_STEP), dtype=torch.bfloat16) if narrow else widen(rows_RX, SUM_STEP)
        numbers = rows_RX.float().contiguous() if narrow else None
        with self.calling("combine"):
            out, out_numbers, _ = self.held.combine(rows, tuple(handle[2:]), topk_weights=numbers, config=self.combine_config)
        found = out_numbers if narrow else out[:, :width].contiguous()
        return found.to(out_dtype)


def _metadata(counts: list[int], device: Any) -> ExpertTokensMetadata | None:
    if not counts:
        return None
    return ExpertTokensMetadata(torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True), tuple(counts))


def _worst(setup: Setup) -> bool:
    """Does a dispatch give the most rows that can come, and read no count?"""
    return bool(setup.max_tokens and setup.cuda_graphs)


def supports(problem: registry.Problem) -> str | None:
    return (
        libraries.refusal(NAME, problem, training=True, quant=("none", "fp8"))
        or limits(problem)
        or libraries.missing("deep_ep", "Buffer", "Config", "topk_idx_t")
    )


def limits(problem: registry.Problem) -> str | None:
    """What the kernels do not take, whatever is installed."""
    row, local = problem.hidden * (1 if problem.quant == "fp8" else 2), problem.num_experts // problem.world
    if problem.world not in CHUNKS:
        return f"{NAME} has kernels for {', '.join(map(str, CHUNKS))} ranks of a host, world is {problem.world}"
    if row % ROW_BYTES or row > MOST_BYTES:
        return f"{NAME} sends rows of up to {MOST_BYTES} bytes and multiples of {ROW_BYTES}; hidden {problem.hidden} makes {row} bytes"
    if problem.top_k > MOST_SLOTS or local > MOST_EXPERTS:
        return f"{NAME} takes top_k <= {MOST_SLOTS} and {MOST_EXPERTS} experts a rank, got top_k {problem.top_k} and {local} experts a rank"
    if problem.cuda_graphs and not problem.max_tokens:
        return f"{NAME} reads counts on the host, CUDA graphs cannot hold it without ParallelConfig.max_tokens_per_rank"
    return None


def cost(problem: registry.Problem) -> float:
    """Microseconds: measured on H200s, and the host's wait for the counts."""
    wait = 0.0 if problem.cuda_graphs else 50.0
    return 80.0 + wait + libraries.microseconds(problem, libraries.rows_by_rank(problem), SPEED, SPEED)


def received(tokens: Any, setup: Setup) -> int | None:
    return setup.world * setup.max_tokens if _worst(setup) else None


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    def ints(*shape: Any) -> Any:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    world, tokens = setup.world, x_TH.shape[0]
    in_rank = ids_TK.new_empty((tokens, world), dtype=torch.bool)
    own = [ints(world, world), ints(world, SMS // 2), ints(world, SMS // 2), ints(rows), in_rank, ints(tokens, world)]
    return [*marks(tokens, rows, x_TH), *own]


PROVIDER = registry.register(
    registry.Provider(NAME, "comm", {EXCHANGE: HighThroughput, RECEIVED: received, HANDLE: handle_like}, cost, supports)
)
