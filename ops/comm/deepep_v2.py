"""Provider "deepep_v2": DeepEP V2's `ElasticBuffer` inside one host.

Each token goes once to every rank that has one of its experts; W * max_tokens rows are given back, of which the first ones hold tokens, so
nothing is read on the host and a CUDA graph can hold it. The combine adds rows up unweighted and rounds to bfloat16; its channel for
weights brings float32 sums of K numbers a token (gradients of the routing weights), exactly.

The kernels stop the device where a token names an expert twice. So unless the setup says that its ids are valid, repeats are sent as "no
expert", and the ids themselves follow as bytes along the same way; the combine is then told of all of them. Of repeated slots the last is
sent: the kernels take a token's last slot with an expert of a rank for its place there, and combine and dispatch must see the same one.

A rank that dies or stalls: the kernels of the others wait for the setup's timeout, print "DeepEP ... timeout" and stop the device; the
library raises nothing itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from .. import registry
from . import libraries, payload
from .exchange import EXCHANGE, HANDLE, RECEIVED, Received, marks
from .library_exchange import LibraryExchange
from .library_rows import clean_ids, last_slots, pack, unpack, widen, without_repeats
from .setup import Setup

NAME = "deepep_v2"
COLUMNS = 256  # a summed row's must be a multiple
ROW_BYTES = 2 * COLUMNS  # of what is sent beside the tokens
MOST_SLOTS = 32
MOST_EXPERTS = 2048
OLDEST_NCCL = (2, 30, 4)
SPEED = {2: 485.0, 4: 345.0, 8: 285.0}  # ranks -> GB/s of all rows, there and back alike
DISPATCH = ("topk_idx", "topk_weights", "num_experts", "num_max_tokens_per_rank", "num_sms", "handle", "do_handle_copy", "do_cpu_sync")
# An EPHandle's fields. Its numbers are the setup's, so that only tensors travel in the graph, and it is put together again from them.
TENSORS = (
    "topk_idx", "psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert", "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata", "dst_buffer_slot_idx",
)  # fmt: skip
NUMBERS = (
    "do_expand", "num_experts", "expert_alignment", "num_max_tokens_per_rank", "num_sms", "num_recv_tokens", "num_expanded_tokens",
    "num_recv_tokens_per_expert_list", "token_metadata_at_forward", "channel_linked_list",
)  # fmt: skip


class Elastic(LibraryExchange):
    """handle: the two marks, then the tensors of TENSORS: ids int64 [T, K] with repeats, rows up to each rank int32 [W], two int32
    [E_local], sources int32 [R, K + 2], places int32 [T, K]."""

    name = NAME
    module = "deep_ep"

    @functools.cached_property
    def sms(self) -> int:
        """Multiprocessors of a kernel."""
        return int(self.held.get_theoretical_num_sms(self.setup.num_experts, self.setup.top_k))

    def sizes(self) -> tuple[Any, ...]:
        return self.setup.max_tokens, -(-self.setup.hidden // COLUMNS) * COLUMNS, self.setup.timeout

    def make(self) -> Any:
        tokens, hidden, timeout = self.sizes()
        first = torch.zeros(1, device=self.device)
        self.wait(dist.all_reduce(first, group=self.group, async_op=True))  # it takes over torch's communicator, which this makes
        seconds = max(1, round(timeout))
        with libraries.environment("EP_DISABLE_GIN", "1"):  # one host: no queue pairs, which it would insist on
            return self.library.ElasticBuffer(
                self.group, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=0, prefer_overlap_with_compute=False,
                num_cpu_timeout_secs=seconds, num_gpu_timeout_secs=seconds, explicitly_destroy=True,
            )  # fmt: skip

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        self.check("dispatch")
        self.check_tokens(x_TH.shape[0], self.setup.max_tokens)
        ids = clean_ids(ids_TK, self.setup.num_experts, self.library.topk_idx_t)
        rows, scales = payload.quantize_rows(x_TH, self.setup.quant)
        sent = rows.contiguous() if self.setup.quant == "none" else (rows, scales)
        first = weights[0].float().contiguous() if weights else None
        with self.calling("dispatch"):
            got, got_ids, got_first, own, _ = self.held.dispatch(
                sent, topk_idx=self._sendable(ids), topk_weights=first, num_experts=self.setup.num_experts,
                num_max_tokens_per_rank=self.setup.max_tokens, num_sms=self.sms, do_handle_copy=False,
                do_cpu_sync=False,
            )  # fmt: skip
        rows, scales = (got, x_TH.new_empty(0).float()) if self.setup.quant == "none" else got
        handle = [*marks(x_TH.shape[0], rows.shape[0], x_TH), ids, *(getattr(own, name) for name in TENSORS[1:])]
        if not self.setup.ids_valid:
            got_ids = self._numbers(ids.to(torch.int32), handle) - self.rank * (self.setup.num_experts // self.world)
        got_ids = self._local_ids(got_ids, handle)
        arrived = [got_first, *(self._numbers(w.contiguous(), handle) for w in weights[1:])][: len(weights)]
        moved = [torch.where(got_ids >= 0, got, 0).to(w.dtype) for got, w in zip(arrived, weights, strict=True)]
        return Received(rows, scales.contiguous(), got_ids, moved, handle)

    def _local_ids(self, ids_RK: Any, handle: list[Any]) -> Any:
        """int32, -1 for other ranks' slots and for rows that hold nothing."""
        own = (ids_RK >= 0) & (ids_RK < self.setup.num_experts // self.world)
        return torch.where(self._held_rows(handle) & own, ids_RK, -1).to(torch.int32)

    def _held_rows(self, handle: list[Any]) -> Any:
        """bool [R, 1]: which rows hold a token; the others hold what was there before."""
        return (torch.arange(handle[1].shape[0], device=handle[1].device) < handle[3][-1]).unsqueeze(1)

    def _own(self, handle: list[Any], ids_TK: Any) -> Any:
        """DeepEP's handle, for these ids: its combine must see repeats, whose numbers come back each to its slot, its dispatch must not."""
        rows, setup = handle[1].shape[0], self.setup
        numbers: tuple[Any, ...] = (False, setup.num_experts, 1, setup.max_tokens, self.sms, rows, 0, [], None, None)
        return self.library.EPHandle(**dict(zip(NUMBERS, numbers, strict=True)), **dict(zip(TENSORS, [ids_TK, *handle[3:]], strict=True)))

    def _sendable(self, ids_TK: Any) -> Any:
        return ids_TK if self.setup.ids_valid else without_repeats(ids_TK, last_slots(ids_TK))

    def _numbers(self, numbers_TK: Any, handle: list[Any]) -> Any:
        """What was sent beside the tokens, [R, K]; anything in rows that hold nothing."""
        own = self._own(handle, self._sendable(handle[2]))
        with self.calling("send"):
            got = self.held.dispatch(pack(numbers_TK, ROW_BYTES), num_experts=self.setup.num_experts, num_sms=self.sms, handle=own)[0]
        return unpack(got, numbers_TK.shape[1], numbers_TK.dtype)

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        self.check("send")
        return torch.where(self._held_rows(handle), self._numbers(x_TX, handle), 0)

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        self.check("combine")
        width = rows_RX.shape[1]
        narrow = width == self.setup.top_k and rows_RX.dtype != torch.bfloat16  # each slot's number, from the rank of its expert alone
        if not narrow:
            self.check_sum(rows_RX)
        rows = rows_RX.new_zeros((rows_RX.shape[0], COLUMNS), dtype=torch.bfloat16) if narrow else widen(rows_RX, COLUMNS)
        numbers = rows_RX.float().contiguous() if narrow else None
        with self.calling("combine"):
            out, out_numbers, _ = self.held.combine(rows, handle=self._own(handle, handle[2]), topk_weights=numbers)
        found = out_numbers if narrow else out[:, :width].contiguous()
        return found.to(out_dtype)


def supports(problem: registry.Problem) -> str | None:
    return (
        libraries.refusal(NAME, problem, training=True, quant=("none", "fp8"))
        or libraries.tokens_refusal(NAME, problem)
        or limits(problem)
        or surroundings()
        or libraries.missing("deep_ep", "ElasticBuffer", "EPHandle", "topk_idx_t")
        or _signatures()
    )


def limits(problem: registry.Problem) -> str | None:
    """What the kernels do not take, whatever is installed."""
    if problem.hidden % COLUMNS:
        return f"{NAME} takes rows of a multiple of {COLUMNS} columns, hidden is {problem.hidden}"
    if problem.top_k > MOST_SLOTS or problem.num_experts > MOST_EXPERTS:
        found = f"top_k {problem.top_k} and {problem.num_experts}"
        return f"{NAME} takes top_k <= {MOST_SLOTS} and up to {MOST_EXPERTS} experts, got {found} experts"
    return None


def surroundings() -> str | None:
    """What the library needs of this process and host."""
    found = libraries.nccl_version()
    if found is None or found < OLDEST_NCCL:
        has = "none" if found is None else ".".join(map(str, found))
        wanted = ".".join(map(str, OLDEST_NCCL))
        return f"{NAME} needs NCCL >= {wanted}, this process has loaded {has}; put a newer nvidia-nccl before torch's own on sys.path"
    absent = [tool for tool in ("nvcc", "cuobjdump") if libraries.cuda_tool(tool) is None]
    if absent:
        return f"{NAME} compiles its kernels when they are first used and found no {absent[0]}; set CUDA_HOME to a CUDA toolkit"
    return None


def _signatures() -> str | None:
    library, _ = libraries.find("deep_ep")
    lost = libraries.lacks(library.ElasticBuffer.dispatch, *DISPATCH) or libraries.lacks(library.EPHandle, *TENSORS, *NUMBERS)
    return f"{NAME} is adapted to deep_ep 2.1, the one at {library.__file__} does not know {lost!r}; install version 2.1" if lost else None


def cost(problem: registry.Problem) -> float:
    """Microseconds: measured on H200s; ids that may repeat follow in a dispatch of their own."""
    extra = 0.0 if problem.ids_valid else 45.0
    return 45.0 + extra + libraries.microseconds(problem, libraries.rows_by_rank(problem), SPEED, SPEED)


def received(tokens: Any, setup: Setup) -> int:
    return setup.world * setup.max_tokens


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    def ints(*shape: Any) -> Any:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    local = setup.num_experts // setup.world
    own = [ints(setup.world), ints(local), ints(local), ints(rows, setup.top_k + 2), ints(*ids_TK.shape)]
    return [*marks(x_TH.shape[0], rows, x_TH), ids_TK.new_empty(ids_TK.shape, dtype=torch.int64), *own]


PROVIDER = registry.register(registry.Provider(NAME, "comm", {EXCHANGE: Elastic, RECEIVED: received, HANDLE: handle_like}, cost, supports))
