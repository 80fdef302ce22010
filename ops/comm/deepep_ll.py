"""Provider "deepep_ll": DeepEP's low-latency kernels (`deep_ep.Buffer` of V1 or V2), for inference with few tokens a rank.

Each slot's row goes to its expert's place: rows [E_local, W * room, H]. The combine weights the rows and adds them up in float32, rounded
to bfloat16. Nothing is read on the host, so a CUDA graph can hold it.

A rank that dies or stalls: the kernels of the others wait 100 s, whatever the setup's timeout is, print "DeepEP timeout" and stop the
device; the library raises nothing itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from .. import registry
from . import libraries, library_exchange
from .exchange import CAP, EXCHANGE, HANDLE, RECEIVED, SLOTS, ExpertTokensMetadata, Received, marks
from .library_exchange import BatchedExchange
from .library_rows import clean_ids, last_slots, without_repeats
from .setup import Setup

NAME = "deepep_ll"
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  # widths that kernels are compiled for
MOST_SLOTS = 11
MOST_EXPERTS = 1848  # 14 groups of warps on each of 132 multiprocessors
SPEED = {2: 575.0, 4: 350.0, 8: 285.0}  # ranks -> GB/s of all slots' rows, there and back alike
DEPTH = "NVSHMEM_QP_DEPTH"
WITHOUT_RDMA = "MOE_COMPILE_DEEPEP_LL_WITHOUT_RDMA"  # set to 1: this V1 does not insist on queue pairs


class LowLatency(BatchedExchange):
    """handle: as BatchedExchange says; DeepEP's own are sources int32 [E_local, W * room] and ranges int64 [E_local, W].

    DeepEP warns that at most two results may be alive. That holds for its receive hooks and its zero-copy buffers; called as here, the
    kernel has copied the rows into tensors of their own when it ends, so a result lives as long as it is used.
    """

    name = NAME
    module = "deep_ep"

    @property
    def room(self) -> int:
        return room_of(self.setup, self.world)

    def sizes(self) -> tuple[Any, ...]:
        """Where flags and rows lie in the buffer depends on all of these."""
        return self.room, self.setup.hidden, self.setup.num_experts

    def make(self) -> Any:
        buffer, (room, hidden, experts) = self.library.Buffer, self.sizes()
        size = buffer.get_low_latency_rdma_size_hint(room, hidden, self.world, experts)
        return buffer(
            self.group, num_nvl_bytes=0, num_rdma_bytes=size, low_latency_mode=True, num_qps_per_rank=experts // self.world,
            explicitly_destroy=True,
        )  # fmt: skip

    def dispatch_views(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        self.check("dispatch")
        self.check_tokens(x_TH.shape[0], self.setup.max_tokens)
        ids = clean_ids(ids_TK, self.setup.num_experts, self.library.topk_idx_t)
        last = ids.new_empty(0) if self.setup.ids_valid else last_slots(ids)
        sent = ids if self.setup.ids_valid else without_repeats(ids, last)  # an expert has places for each token once
        fp8, width, wide = self.setup.quant == "fp8", x_TH.shape[1], self.wide(x_TH)
        with self.calling("dispatch"):
            got, counts, own, _, _ = self.held.low_latency_dispatch(wide, sent, self.room, self.setup.num_experts, use_fp8=fp8)
        rows, scales = got if fp8 else (got, None)
        rows = rows.view(-1, self.setup.hidden)[:, :width].contiguous()
        scales = x_TH.new_empty(0).float() if scales is None else scales.reshape(rows.shape[0], -1)[:, : -(-width // 128)].contiguous()
        handle = [*marks(x_TH.shape[0], rows.shape[0], x_TH), sent, last, own[0], own[1]]
        return Received(rows, scales, None, [], handle, ExpertTokensMetadata(counts))

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        self.check("combine")
        setup, width = self.setup, rows_RX.shape[1]
        rows = self.wide(rows_RX).view(*self.places(), setup.hidden)
        weights = self.slot_weights(weights_TK, handle)
        with self.calling("combine"):
            own = (handle[4], handle[5], self.room, setup.hidden, setup.num_experts)
            out = self.held.low_latency_combine(rows, handle[2], weights, own)[0]
        return out[:, :width].contiguous().to(out_dtype)


def room_of(setup: Setup, world: int) -> int:
    """Places of one rank's tokens for an expert: at least max_tokens, and W * room a multiple of 4."""
    step = 4 // math.gcd(4, world)
    return -(-setup.max_tokens // step) * step


def supports(problem: registry.Problem) -> str | None:
    return (
        libraries.refusal(NAME, problem, training=False, quant=("none", "fp8"))
        or libraries.tokens_refusal(NAME, problem)
        or limits(problem)
        or libraries.missing("deep_ep", "Buffer.low_latency_dispatch", "Buffer.low_latency_combine", "topk_idx_t")
        or queue_pairs()
    )


def limits(problem: registry.Problem) -> str | None:
    """What the kernels do not take, whatever is installed."""
    if problem.hidden not in HIDDEN:
        return f"{NAME} has kernels for hidden {', '.join(map(str, HIDDEN))}, hidden is {problem.hidden}"
    if problem.top_k > MOST_SLOTS or problem.num_experts > MOST_EXPERTS:
        found = f"top_k {problem.top_k} and {problem.num_experts}"
        return f"{NAME} takes top_k <= {MOST_SLOTS} and up to {MOST_EXPERTS} experts, got {found} experts"
    if _most_tokens() < 4:
        return f"{NAME} needs {DEPTH} of at least 10, it is {os.environ.get(DEPTH)}"
    return None


def queue_pairs() -> str | None:
    """V1's kernels stop the device without RDMA queue pairs, though they use none inside a host; V2's do not."""
    library, _ = libraries.find("deep_ep")
    if libraries.has(library, "ElasticBuffer") or libraries.has_rdma() or os.environ.get(WITHOUT_RDMA) == "1":
        return None
    return (
        f"{NAME}: the low-latency kernels of DeepEP V1 need an RDMA device on this host, /sys/class/infiniband shows none; install DeepEP "
        f"V2, or a V1 without that assertion and set {WITHOUT_RDMA}=1"
    )


def _most_tokens() -> int:
    """Of one dispatch: the library wants two places in a queue for each."""
    return int(os.environ.get(DEPTH, "1024")) // 2 - 1


def cap(setup: Setup | None) -> int:
    """The most tokens of one dispatch, a multiple of 4, whatever the setup is."""
    return max(4, _most_tokens() // 4 * 4)


def cost(problem: registry.Problem) -> float:
    """Microseconds: measured on H200s, a row for each slot, in chunks."""
    tokens = problem.max_tokens or problem.tokens or 1024
    chunks, rows = -(-tokens // cap(None)), (problem.tokens or tokens) * problem.top_k
    return chunks * (45.0 if problem.ids_valid else 68.0) + libraries.microseconds(problem, rows, SPEED, SPEED)


def received(tokens: Any, setup: Setup) -> int:
    return library_exchange.batched_rows(setup, room_of(setup, setup.world))


def slots(setup: Setup) -> int:
    """A place is one expert's."""
    return 1


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    local, sent = setup.num_experts // setup.world, ids_TK.new_empty(ids_TK.shape, dtype=torch.int64)
    sources = ids_TK.new_empty((local, rows // local), dtype=torch.int32)
    own = [library_exchange.last_like(ids_TK, setup), sources, sent.new_empty((local, setup.world))]
    return [*marks(x_TH.shape[0], rows, x_TH), sent, *own]


KERNELS: dict[str, Callable[..., Any]] = {EXCHANGE: LowLatency, RECEIVED: received, HANDLE: handle_like, SLOTS: slots, CAP: cap}
PROVIDER = registry.register(registry.Provider(NAME, "comm", KERNELS, cost, supports))
