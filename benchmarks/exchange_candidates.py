"""What benchmarks/exchange.py times: our comm providers, and the libraries' own calls without us ("raw ...").

A candidate moves the rows of one Case. What an expert makes of a row is a multiplication by a number that the expert is known by, done
between dispatch and collect and not timed, so that a token's result is x * sum_k w_k * factor[ids_k] whatever the ranks are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ranks_timing import Here

from moe_compile.ops import registry
from moe_compile.ops.comm import exchange, libraries, payload
from moe_compile.ops.comm.exchange import EXCHANGE, Exchange
from moe_compile.ops.comm.setup import Setup, chunk_size, local_range

CHUNK = 16384  # rows that the stand-in for experts computes at once
SECONDS = 60.0  # that ranks wait for each other in an exchange


class Case(NamedTuple):
    """One problem; payload "none" or "fp8", of the dispatched rows."""

    tokens: int
    hidden: int
    top_k: int
    experts: int
    dtype: torch.dtype
    payload: str


class Inputs(NamedTuple):
    """A rank's tokens: x [T, H], ids int64 [T, K] (distinct), w float32 [T, K]."""

    x: Any
    ids: Any
    w: Any


class Got(NamedTuple):
    """What a dispatch brought: as ops.comm.exchange.Received. live [R, 1]: which rows hold something, where ids do not tell."""

    rows: Any
    scales: Any
    ids: Any
    weights: list[Any]
    handle: Any
    live: Any = None


class Candidate:
    """One way to exchange. Opened, used and closed by all ranks alike.

    weighted: dispatch gives a row for each slot, and collect weighs them; slots: what collect is given are slots that it weighs.
    routing_stays: its captured graph is right for one
    routing only. complete: dispatch and collect are all that there is to do.
    """

    name = ""
    kind = "raw"
    weighted = False
    slots = False
    routing_stays = False
    complete = True

    def __init__(self, here: Here, case: Case) -> None:
        self.here, self.case = here, case
        self.local = chunk_size(case.experts, here.world)

    def refusal(self, graph: bool) -> str | None:
        """Why it cannot take the case, in a CUDA graph or not."""
        return None

    def open(self, graph: bool) -> None:
        """Makes what the calls need."""

    def close(self) -> None:
        """Gives it back."""

    def prepare(self, inputs: Inputs) -> None:
        """What is taken as known before the clock starts."""

    def dispatch(self, inputs: Inputs) -> Any:
        raise NotImplementedError

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        raise NotImplementedError

    def finish(self, out: Any) -> Any:
        """What is left to do after the clock stopped."""
        return out

    def experts(self, got: Any, factors_E: Any) -> list[Any]:
        """What collect is given."""
        return [weighed(got, None if self.weighted else got.weights[0], factors_E, self.case.dtype)]


# ---------------------------------------------------------------- the stand-in for experts
def weighed(got: Any, weights_RK: Any, factors_E: Any, dtype: torch.dtype) -> Any:
    """rows[r] * sum_k weights[r, k] * factors[ids[r, k]] (weights None: ones), zeros where a row holds nothing."""
    own = got.ids >= 0
    each = torch.where(own, factors_E[got.ids.clamp(min=0).long()], 0.0)
    factor_R1 = (each if weights_RK is None else torch.where(own, weights_RK.float(), 0.0) * each).sum(1, keepdim=True)
    live = own.any(1, keepdim=True) if getattr(got, "live", None) is None else got.live & own.any(1, keepdim=True)
    out = torch.empty(got.rows.shape, dtype=dtype, device=got.rows.device)
    for at in range(0, out.shape[0], CHUNK):
        part = slice(at, at + CHUNK)
        out[part] = torch.where(live[part], _plain(got, part) * factor_R1[part], 0.0)
    return out


def _plain(got: Any, part: Any) -> Any:
    """Rows in float32, without their quantisation. part: a slice or indices."""
    rows = got.rows[part].float()
    if got.rows.dtype != torch.float8_e4m3fn:
        return rows
    return rows * got.scales[part].repeat_interleave(exchange.SCALE_BLOCK, 1)[:, : rows.shape[1]]


def slots_of(got: Any, factors_E: Any, dtype: torch.dtype) -> list[Any]:
    """[y [R*K, H], one row for each slot of this rank, in their order, and places int32 [R, K] in it, -1 for none]."""
    own = got.ids >= 0
    places = torch.where(own.view(-1), own.view(-1).cumsum(0) - 1, -1).to(torch.int32).view(own.shape)
    rows_S, slots_S = own.nonzero(as_tuple=True)
    y = torch.zeros((own.numel(), got.rows.shape[1]), dtype=dtype, device=got.rows.device)
    for at in range(0, rows_S.shape[0], CHUNK):
        row, slot = rows_S[at : at + CHUNK], slots_S[at : at + CHUNK]
        y[at : at + row.shape[0]] = (_plain(got, row) * factors_E[got.ids[row, slot].long()].unsqueeze(1)).to(dtype)
    return [y, places]


# ---------------------------------------------------------------- our providers
class Provided(Candidate):
    """A registered provider, through the calls that a compiled model makes for inference."""

    kind = "provider"

    def __init__(self, here: Here, case: Case, provider: registry.Provider) -> None:
        super().__init__(here, case)
        self.provider, self.name = provider, provider.name

    def refusal(self, graph: bool) -> str | None:
        why = self.provider.supports(_problem(self.here, self.case, graph))
        cap = self.provider.kernels.get(exchange.CAP)
        if why is None and cap is not None and 0 < cap(_setup(self.case, graph)) < self.case.tokens:
            return f"{self.name} takes {cap(_setup(self.case, graph))} tokens a call, a compiled model would send more in chunks"
        return why

    def open(self, graph: bool) -> None:
        self.own = exchange.exchange_of(self.name.partition("+")[0], _setup(self.case, graph).text, self.here.device)
        self.weighted = self.own.format == "batched"

    def close(self) -> None:
        exchange.destroy_all()

    def dispatch(self, inputs: Inputs) -> Any:
        return self.own.dispatch_views(inputs.x, inputs.ids, [] if self.weighted else [inputs.w])

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        return self.own.collect(results[0], got.handle, self.case.dtype, inputs.w if self.weighted else None)


class ProvidedSlots(Provided):
    """The same, its collect given a row for each slot, which it weighs and sums."""

    slots = True

    def __init__(self, here: Here, case: Case, provider: registry.Provider) -> None:
        super().__init__(here, case, provider)
        self.name = f"{provider.name}+slots"

    def experts(self, got: Any, factors_E: Any) -> list[Any]:
        return slots_of(got, factors_E, self.case.dtype)

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        y, places = results
        return self.own.collect_slots(y, places, got.weights[0], got.handle, self.case.dtype)


def _problem(here: Here, case: Case, graph: bool) -> registry.Problem:
    return registry.Problem(
        stage="comm", device=here.device.type, dtype=case.dtype, hidden=case.hidden, num_experts=case.experts, top_k=case.top_k,
        tokens=case.tokens, quant=case.payload, world=here.world, max_tokens=case.tokens, cuda_graphs=graph, ids_valid=True,
    )  # fmt: skip


def _setup(case: Case, graph: bool) -> Setup:
    return Setup(
        group=dist.group.WORLD.group_name, hidden=case.hidden, top_k=case.top_k, num_experts=case.experts, quant=case.payload,
        dtype=str(case.dtype).removeprefix("torch."), max_tokens=case.tokens, timeout=SECONDS, cuda_graphs=graph, ids_valid=True,
    )  # fmt: skip


# ---------------------------------------------------------------- torch.distributed alone
class RawAllToAll(Candidate):
    """The collective of a de-duplicated exchange: rows gathered, counts on the host, and no sum afterwards."""

    name = "raw all_to_all_single, rows gathered, no sum"
    routing_stays = True
    complete = False

    def refusal(self, graph: bool) -> str | None:
        return "rows travel as they are" if self.case.payload != "none" else None

    def prepare(self, inputs: Inputs) -> None:
        owner = inputs.ids // self.local
        goes_TW = torch.zeros((inputs.x.shape[0], self.here.world), dtype=torch.bool, device=inputs.x.device).scatter_(1, owner, True)
        self.to, self.tokens = goes_TW.t().nonzero(as_tuple=True)
        count = goes_TW.sum(0)
        coming = torch.empty_like(count)
        dist.all_to_all_single(coming, count)
        self.out, self.into = count.tolist(), coming.tolist()
        self.sent = inputs.x[self.tokens]
        self.received, self.back = self.sent.new_empty((sum(self.into), self.case.hidden)), torch.empty_like(self.sent)
        first = (self.to * self.local).unsqueeze(1)
        own = owner[self.tokens] == self.to.unsqueeze(1)
        self.ids = self._moved(torch.where(own, inputs.ids[self.tokens] - first, -1))
        self.weights = self._moved(torch.where(own, inputs.w[self.tokens], 0.0))

    def _moved(self, sent: Any) -> Any:
        got = sent.new_empty((sum(self.into), *sent.shape[1:]))
        dist.all_to_all_single(got, sent.contiguous(), self.into, self.out)
        return got

    def dispatch(self, inputs: Inputs) -> Got:
        dist.all_to_all_single(self.received, self.sent, self.into, self.out)
        return Got(self.received, None, self.ids, [self.weights], None)

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        dist.all_to_all_single(self.back, results[0], self.out, self.into)
        return self.back

    def finish(self, out: Any) -> Any:
        total = torch.zeros((self.case.tokens, self.case.hidden), device=out.device)
        return total.index_add_(0, self.tokens, out.float())


class RawAllGather(Candidate):
    """all_gather of the rows and reduce_scatter of the sums; ids and weights are known everywhere."""

    name = "raw all_gather + reduce_scatter, ids known"
    complete = False

    def refusal(self, graph: bool) -> str | None:
        return "rows travel as they are" if self.case.payload != "none" else None

    def open(self, graph: bool) -> None:
        shape = (self.case.tokens * self.here.world, self.case.hidden)
        self.every = torch.empty(shape, dtype=self.case.dtype, device=self.here.device)
        self.sum = torch.empty((self.case.tokens, self.case.hidden), dtype=self.case.dtype, device=self.here.device)

    def prepare(self, inputs: Inputs) -> None:
        first, end = local_range(self.case.experts, self.here.world, self.here.rank)
        ids, weights = (t.new_empty((t.shape[0] * self.here.world, t.shape[1])) for t in (inputs.ids, inputs.w))
        dist.all_gather_into_tensor(ids, inputs.ids)
        dist.all_gather_into_tensor(weights, inputs.w)
        self.known = torch.where((ids >= first) & (ids < end), ids - first, -1), [weights]

    def dispatch(self, inputs: Inputs) -> Got:
        dist.all_gather_into_tensor(self.every, inputs.x)
        return Got(self.every, None, *self.known, None)

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        dist.reduce_scatter_tensor(self.sum, results[0])
        return self.sum


# ---------------------------------------------------------------- the libraries
class RawLibrary(Candidate):
    """Calls of a library as its own documentation shows them. fp8: rows come quantised where its call takes them so."""

    module = ""
    attributes: tuple[str, ...] = ()

    def refusal(self, graph: bool) -> str | None:
        if not self.here.cuda:
            return "runs on CUDA devices"
        return libraries.missing(self.module, *self.attributes)

    @property
    def library(self) -> Any:
        return libraries.need(self.name, self.module)

    def open(self, graph: bool) -> None:
        self.buffer = self.made()

    def made(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        torch.cuda.synchronize()
        dist.barrier()
        self.buffer.destroy()

    def prepare(self, inputs: Inputs) -> None:
        self.ids = inputs.ids.to(getattr(self.library, "topk_idx_t", torch.int64))
        self.sent = inputs.x if self.case.payload == "none" else payload.quantize_rows(inputs.x, "fp8")


class RawHighThroughput(RawLibrary):
    """DeepEP Buffer: get_dispatch_layout, dispatch with the counts read on the host, combine."""

    module, attributes = "deep_ep", ("Buffer", "Config")

    def __init__(self, here: Here, case: Case, processors: int) -> None:
        super().__init__(here, case)
        self.processors, self.name = processors, f"raw deepep_ht, {processors} SMs"

    def refusal(self, graph: bool) -> str | None:
        return super().refusal(graph) or ("reads counts on the host" if graph else None)

    def made(self) -> Any:
        buffer = self.library.Buffer
        buffer.set_num_sms(self.processors)
        self.configs = buffer.get_dispatch_config(self.here.world), buffer.get_combine_config(self.here.world)
        size = max(config.get_nvl_buffer_size_hint(self.case.hidden * 2, self.here.world) for config in self.configs)
        return buffer(dist.group.WORLD, num_nvl_bytes=size, explicitly_destroy=True)

    def dispatch(self, inputs: Inputs) -> Got:
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.ids, self.case.experts)
        got, ids, weights, _, handle, _ = self.buffer.dispatch(
            self.sent, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=self.ids,
            topk_weights=inputs.w, config=self.configs[0],
        )  # fmt: skip
        rows, scales = got if isinstance(got, tuple) else (got, None)
        return Got(rows, scales, ids, [weights], handle)

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        return self.buffer.combine(results[0], got.handle, config=self.configs[1])[0]


class RawLowLatency(RawLibrary):
    """DeepEP Buffer: low_latency_dispatch and low_latency_combine."""

    name = "raw deepep_ll"
    module, attributes = "deep_ep", ("Buffer.low_latency_dispatch",)
    weighted = True

    def refusal(self, graph: bool) -> str | None:
        most = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024")) // 2 - 1
        return super().refusal(graph) or (f"takes {most} tokens a call" if self.case.tokens > most else None)

    def made(self) -> Any:
        case, world = self.case, self.here.world
        self.room = -(-case.tokens // 4) * 4
        size = self.library.Buffer.get_low_latency_rdma_size_hint(self.room, case.hidden, world, case.experts)
        return self.library.Buffer(
            dist.group.WORLD, num_rdma_bytes=size, low_latency_mode=True, num_qps_per_rank=case.experts // world, explicitly_destroy=True
        )

    def dispatch(self, inputs: Inputs) -> Got:
        fp8 = self.case.payload == "fp8"
        got, counts, handle, _, _ = self.buffer.low_latency_dispatch(inputs.x, self.ids, self.room, self.case.experts, use_fp8=fp8)
        rows, scales = got if fp8 else (got, None)
        return Got(rows, scales, counts, [], handle)

    def experts(self, got: Any, factors_E: Any) -> list[Any]:
        return [_batched(got, factors_E, self.case.dtype)]

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        return self.buffer.low_latency_combine(results[0], self.ids, inputs.w, got.handle)[0]


def _batched(got: Any, factors_E: Any, dtype: torch.dtype) -> Any:
    """What experts make of rows [E_local, C, H], of which the first got.ids[e] (counts) are there."""
    experts, places, hidden = got.rows.shape
    there = torch.arange(places, device=got.ids.device) < got.ids.unsqueeze(1)
    ids = torch.where(there, torch.arange(experts, device=got.ids.device).unsqueeze(1), -1).view(-1, 1)
    scales = None if got.scales is None else got.scales.reshape(experts * places, -1)
    return weighed(Got(got.rows.reshape(-1, hidden), scales, ids, [], None), None, factors_E, dtype).view(got.rows.shape)


class RawElastic(RawLibrary):
    """DeepEP V2 ElasticBuffer: dispatch without a wait on the host, and combine."""

    name = "raw deepep_v2"
    module, attributes = "deep_ep", ("ElasticBuffer",)

    def refusal(self, graph: bool) -> str | None:
        version = libraries.nccl_version() if self.here.cuda else None
        old = version is not None and version < (2, 30, 4)
        return super().refusal(graph) or (f"needs NCCL 2.30.4, this process has {version}" if old else None)

    def made(self) -> Any:
        os.environ.setdefault("EP_DISABLE_GIN", "1")
        return self.library.ElasticBuffer(
            dist.group.WORLD, num_max_tokens_per_rank=self.case.tokens, hidden=self.case.hidden, num_topk=self.case.top_k,
            explicitly_destroy=True,
        )  # fmt: skip

    def dispatch(self, inputs: Inputs) -> Got:
        got, ids, weights, handle, _ = self.buffer.dispatch(
            self.sent, topk_idx=self.ids, topk_weights=inputs.w, num_experts=self.case.experts, do_cpu_sync=False
        )
        rows, scales = got if isinstance(got, tuple) else (got, None)
        return Got(rows, scales, ids, [weights], handle)

    def experts(self, got: Any, factors_E: Any) -> list[Any]:
        """Rows beyond those that came, and their ids, are left over from before."""
        count = got.handle.psum_num_recv_tokens_per_scaleup_rank[-1]
        live = (torch.arange(got.rows.shape[0], device=got.rows.device) < count).unsqueeze(1)
        return super().experts(got._replace(ids=torch.where(live, got.ids, -1)), factors_E)

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        return self.buffer.combine(results[0], handle=got.handle)[0]


class RawPplx(RawLibrary):
    """pplx-kernels AllToAll.intranode: dispatch and combine."""

    name = "raw pplx"
    module, attributes = "pplx_kernels", ("AllToAll.intranode", "ops._ops.all_to_all_intranode_create")
    weighted = True

    def refusal(self, graph: bool) -> str | None:
        unsafe = self.case.tokens > 132 and os.environ.get("MOE_COMPILE_PPLX_SYNCHRONIZED") != "1"
        return super().refusal(graph) or ("its dispatch is wrong beyond 132 tokens a rank" if unsafe else None)

    def made(self) -> Any:
        case, world, fp8 = self.case, self.here.world, self.case.payload == "fp8"
        wide, scales = (case.hidden, case.hidden // 128 * 4) if fp8 else (case.hidden * 2, 0)
        shape = (case.experts // world, case.tokens * world, case.hidden)
        self.counts = torch.empty(shape[0], dtype=torch.int32, device=self.here.device)
        self.rows = torch.empty(shape, dtype=torch.float8_e4m3fn if fp8 else case.dtype, device=self.here.device)
        self.scales = torch.empty((*shape[:2], case.hidden // 128), device=self.here.device) if fp8 else None
        self.out = torch.empty((case.tokens, case.hidden), dtype=case.dtype, device=self.here.device)
        return self.library.AllToAll.intranode(
            case.tokens, case.experts, case.top_k, self.here.rank, world, 1, case.hidden, wide, scales,
            group_name=dist.group.WORLD.group_name,
        )  # fmt: skip

    def prepare(self, inputs: Inputs) -> None:
        super().prepare(inputs)
        self.sent = self.sent if isinstance(self.sent, tuple) else (self.sent, None)
        self.ids = inputs.ids.to(torch.int32).view(torch.uint32)

    def dispatch(self, inputs: Inputs) -> Got:
        self.buffer.dispatch(self.counts, self.rows, self.scales, *self.sent, self.ids, None)
        return Got(self.rows, self.scales, self.counts, [], None)

    def experts(self, got: Any, factors_E: Any) -> list[Any]:
        return [_batched(got, factors_E, self.case.dtype)]

    def collect(self, results: list[Any], got: Any, inputs: Inputs) -> Any:
        self.buffer.combine(self.out, self.ids, inputs.w, results[0], None)
        return self.out


def candidates(here: Here, processors: list[int]) -> dict[str, Callable[[Case], Candidate]]:
    """All by name. processors: how many multiprocessors DeepEP's high-throughput kernels get in its raw calls."""
    found: list[Callable[[Case], Candidate]] = []
    for provider in registry.providers("comm"):
        kernel = provider.kernels.get(EXCHANGE)
        if kernel is None:
            continue
        found.append(lambda case, p=provider: Provided(here, case, p))  # type: ignore[misc]
        own_slots = getattr(kernel, "collect_slots", Exchange.collect_slots) is not Exchange.collect_slots
        if own_slots and getattr(kernel, "format", "standard") == "standard":
            found.append(lambda case, p=provider: ProvidedSlots(here, case, p))  # type: ignore[misc]
    for raw in (RawAllToAll, RawAllGather, RawLowLatency, RawElastic, RawPplx):
        found.append(lambda case, c=raw: c(here, case))  # type: ignore[misc]
    found += [lambda case, n=n: RawHighThroughput(here, case, n) for n in processors]  # type: ignore[misc]
    nothing = Case(1, 128, 1, here.world, torch.bfloat16, "none")
    return {make(nothing).name: make for make in found}
