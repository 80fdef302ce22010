"""Provider "pplx": pplx-kernels' `AllToAll` inside one host, for inference with few tokens a rank.

Each slot's row goes to its expert's place: rows [E_local, W * room, H]. The combine weights the rows and adds them up in float32, rounded
to bfloat16. Nothing is read on the host, so a CUDA graph can hold it. The library knows no "no expert" and no repeated one: a token must
name K different experts.

A rank that dies or stalls: the kernels of the others wait without end; the library has no timeout. It ends the process (exit code 1)
where CUDA returns an error. Only its setup, which talks over the group on the CPU, raises (an ExchangeError, after the group's timeout).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .. import registry
from . import libraries, library_exchange, payload
from .exchange import CAP, EXCHANGE, HANDLE, RECEIVED, SLOTS, ExchangeError, ExpertTokensMetadata, Received, marks
from .library_exchange import BatchedExchange
from .setup import Setup

NAME = "pplx"
COLUMNS = 8  # a row's must be a multiple: 16 bytes
SCALE_COLUMNS = 512  # an fp8 row's must be a multiple: 16 bytes of scales
PROCESSORS = 132  # of an H100 or H200
SPEED = ({2: 500.0, 4: 350.0, 8: 290.0}, {2: 350.0, 4: 210.0, 8: 140.0})  # ranks -> GB/s of all slots' rows, there and back
SYNCHRONIZED = "MOE_COMPILE_PPLX_SYNCHRONIZED"  # set to 1: this build's dispatch waits before it takes the next token
ENTRY = "ops._ops.all_to_all_intranode_create"


class _Turns:
    """The library's object, and whether a dispatch waits for its combine: the two must take turns."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.sent = False

    def destroy(self) -> None:
        self.kernels.destroy()


class Pplx(BatchedExchange):
    """handle: as BatchedExchange says; what else the combine needs, the library keeps until it is called."""

    name = NAME
    module = "pplx_kernels"

    def sizes(self) -> tuple[Any, ...]:
        setup = self.setup
        return setup.max_tokens, setup.num_experts, setup.top_k, setup.hidden, setup.quant

    def make(self) -> Any:
        tokens, experts, top_k, hidden, quant = self.sizes()
        limit, unfit = cap(self.setup), group_refusal(self.group)
        if limit and tokens > limit:
            raise ExchangeError(f"{NAME}: max_tokens is {tokens}, its kernels are right up to {limit} a call; dispatch them in chunks")
        if unfit:
            raise ExchangeError(unfit)
        wide, scales = (hidden, hidden // 128 * 4) if quant == "fp8" else (hidden * 2, 0)
        return _Turns(
            self.library.AllToAll.intranode(
                max_num_tokens=tokens, num_experts=experts, experts_per_token=top_k, rank=self.rank, world_size=self.world, dp_size=1,
                hidden_dim=hidden, hidden_dim_bytes=wide, hidden_dim_scale_bytes=scales, group_name=self.setup.group,
            )
        )  # fmt: skip

    def dispatch_views(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        self.check("dispatch")
        self.check_tokens(x_TH.shape[0], self.setup.max_tokens)
        if self.held.sent:
            raise ExchangeError(
                f"{NAME} dispatch: the dispatch before it has had no combine, and the library can hold only one; run the layers of a model "
                "one after the other, or choose another ParallelConfig.comm (after an exception between the two, call "
                "moe_compile.ops.comm.exchange.destroy_all() on all ranks)"
            )
        # uint32 for the library; the handle keeps int32, which torch can do more with
        sent, (experts, places) = ids_TK.to(torch.int32, copy=True).contiguous(), self.places()
        rows, scales = self._rows(x_TH)
        got = rows.new_empty((experts, places, rows.shape[1]))
        got_scales = None if scales is None else scales.new_empty((experts, places, scales.shape[1]))
        counts = torch.empty(experts, dtype=torch.int32, device=rows.device)
        with self.calling("dispatch"):
            self.held.kernels.dispatch(
                out_expert_num_tokens=counts, out_expert_x=got, out_expert_x_scale=got_scales, dp_x=rows, dp_x_scale=scales,
                indices=sent.view(torch.uint32), bound_m=None,
            )  # fmt: skip
        self.held.sent = True
        width = x_TH.shape[1]
        rows = got.view(experts * places, -1)[:, :width].contiguous()
        scales = (
            x_TH.new_empty(0).float() if got_scales is None else got_scales.view(experts * places, -1)[:, : -(-width // 128)].contiguous()
        )
        handle = [*marks(x_TH.shape[0], rows.shape[0], x_TH), sent, sent.new_empty(0, dtype=torch.int64)]
        return Received(rows, scales, None, [], handle, ExpertTokensMetadata(counts))

    def _rows(self, x_TH: Any) -> tuple[Any, Any]:
        """Rows and scales as they are sent, of the setup's width."""
        wide = self.wide(x_TH)
        return (wide, None) if self.setup.quant == "none" else payload.quantize_rows(wide, self.setup.quant)

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        self.check("combine")
        if not self.held.sent:
            raise ExchangeError(f"{NAME} combine: there was no dispatch before it, whose rows it could bring back; they must take turns")
        sent, width, hidden = handle[2], rows_RX.shape[1], self.setup.hidden
        rows = self.wide(rows_RX).view(*self.places(), hidden)
        weights, out = self.slot_weights(weights_TK, handle), rows.new_empty((sent.shape[0], hidden))
        with self.calling("combine"):
            self.held.kernels.combine(out_tokens=out, indices=sent.view(torch.uint32), weights=weights, expert_y=rows, bound_m=None)
        self.held.sent = False
        return out[:, :width].contiguous().to(out_dtype)


def supports(problem: registry.Problem) -> str | None:
    return (
        libraries.refusal(NAME, problem, training=False, quant=("none", "fp8"))
        or libraries.tokens_refusal(NAME, problem)
        or limits(problem)
        or (group_refusal(None) if dist.is_available() and dist.is_initialized() else None)
        or libraries.missing("pplx_kernels", "AllToAll.intranode", ENTRY)
    )


def limits(problem: registry.Problem) -> str | None:
    """What the kernels do not take, whatever is installed."""
    step = COLUMNS if problem.quant == "none" else SCALE_COLUMNS
    if problem.hidden % step:
        return f"{NAME} takes rows of a multiple of {step} columns as quant {problem.quant!r}, hidden is {problem.hidden}"
    if not problem.ids_valid:
        return f"{NAME} knows neither a slot without an expert nor an expert twice for a token, and these ids are not known to have none"
    return None


def group_refusal(group: Any) -> str | None:
    """The library exchanges addresses on the CPU, over the group's own backend for it."""
    backends = dist.get_backend_config(group)
    if "cpu" in backends or "gloo" in backends:
        return None
    return (
        f"{NAME} exchanges addresses over the group on the CPU, its backend is {backends!r}; use init_process_group('cpu:gloo,cuda:nccl')"
    )


def cap(setup: Setup) -> int:
    """The most tokens of one dispatch that are right: a block of its kernel sends a second token before the first is read; 0: no limit.

    A build whose dispatch waits at the end of its loop over tokens has no such limit; the environment variable SYNCHRONIZED says so.
    """
    if os.environ.get(SYNCHRONIZED) == "1":
        return 0
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count if torch.cuda.is_available() else PROCESSORS
    return min(PROCESSORS, processors)


def cost(problem: registry.Problem) -> float:
    """Microseconds: measured on H200s, a row for each slot, in chunks."""
    tokens = problem.max_tokens or problem.tokens or 1024
    chunks = 1 if os.environ.get(SYNCHRONIZED) == "1" else -(-tokens // PROCESSORS)
    return chunks * 40.0 + libraries.microseconds(problem, (problem.tokens or tokens) * problem.top_k, *SPEED)


def received(tokens: Any, setup: Setup) -> int:
    return library_exchange.batched_rows(setup, setup.max_tokens)


def slots(setup: Setup) -> int:
    """A place is one expert's."""
    return 1


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    sent = ids_TK.new_empty(ids_TK.shape, dtype=torch.int32)
    return [*marks(x_TH.shape[0], rows, x_TH), sent, sent.new_empty((0,), dtype=torch.int64)]


KERNELS: dict[str, Callable[..., Any]] = {EXCHANGE: Pplx, RECEIVED: received, HANDLE: handle_like, SLOTS: slots, CAP: cap}
PROVIDER = registry.register(registry.Provider(NAME, "comm", KERNELS, cost, supports))
