"""The engine of the nvlink exchange: expert parallelism inside one host, by Triton kernels that write straight into the peers' memory.

A token's row goes once to each rank that has one of its experts, to row src * max_tokens + j of that rank's buffer, where j counts
the tokens that src sends there. j depends on src's own ids alone, so nothing is agreed upon before rows are written. On the way back
each rank writes a row to where its owner adds up, again at a place that both know. No call reads anything back to the host.

Why no rank overwrites what another still reads
    All ranks make the same calls in the same order; the kernels number them on the device (op 1, 2, ...), so a replayed CUDA graph
    goes on counting. One rule holds for every op: a rank ends op s only after it has a signal of op s from EVERY peer (their rows'
    signal in a dispatch, "started" in a collect). A stream runs its kernels in order, so at the start of its op s a rank knows
    (1) that every peer has started op s - 1, and (2) that all work which a peer issued before its op s - 1 is done.
    rows    A peer's buffer is written in op s. Its readers stand between the last push p (dispatch or send) and the peer's next op
            (a view is valid until the next call). If p + 1 <= s - 1, they are done by (2). If p = s - 1, two pushes follow each
            other, and the kernel first waits until every peer says that it has started op s.
    back    A peer's buffer of returned rows is written in collect s and read only inside the peer's own last collect c. If
            c + 1 <= s - 1 that kernel has ended by (2); if c = s - 1 the kernel waits for "started" as above.
    pushed  The word of op p is read until p ends. A peer writes the next one in a push p' > p: either an op between them made it
            wait for us to have ended p, or p' = p + 1 and it waited for our "started p'".
    landed  Words hold the op, only grow, and are compared with >=. A word of a later collect cannot come early, by `back`.
    counts  Of batched calls: two buffers in turn. Op s writes what op s - 2 or an earlier one read.
    Whether two uses follow each other is read from the device's state, not from the host's, so it is right in a replayed graph.
Within an op, data are made visible by release at system scope after a barrier of the program (or after all programs arrived by an
acquire-release counter), and acquire at system scope before the read. Places in a waiting loop are 64-bit and never reset.
Calls of one exchange belong on one stream (or streams ordered by events); other ranks' calls may come late by timeout_seconds.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .checks import MAX_BATCHED_SLOTS, check_batched, check_rows, check_shape, check_slots, check_tokens, check_weights, table_of
from .launch import FUSED_TOKENS, GROUP, Shape, Tuning, next_power, registers, splits_of
from .workspace import STAGES, CapacityExceeded, ExchangeTimeout, Layout, Workspace, open_workspace


class Received(NamedTuple):
    """What came: rows [R, H], scales [R, H/128] (or empty), ids [R, K] of local experts or -1, weights of [R, K], R = W * max_tokens."""

    rows: Any
    scales: Any
    ids: Any
    weights: list[Any]
    handle: list[Any]


class Batched(NamedTuple):
    """What came in the batched format: rows [EL, C, H] of which the first counts[e] of each local expert are valid."""

    rows: Any
    counts: Any
    handle: list[Any]


@dataclasses.dataclass
class Call:
    """One prepared op. launch(phase): 0 is the whole op, 1..phases its parts (for tests of several ranks in one process)."""

    launch: Callable[[int], None]
    result: Callable[[], Any]
    phases: int = 2


class NvlinkEngine:
    """One exchange of a group. Collective: every rank makes the same calls in the same order, with any number of tokens of its own.

    max_tokens: the most tokens of one rank in one call. hidden: the widest row. dtype: of rows. quant: "none", or "fp8" to send
    e4m3 rows with one float32 scale per 128 columns (amax / 448). Raises ValueError for what the kernels do not take and
    MemoryError, on all ranks, where the workspace does not fit. Not usable after destroy(). batched_capacity: C of the batched
    format, rows of one local expert (0: no room for it); may_drop: rows beyond it are no error.
    """

    def __init__(
        self,
        group: Any,
        *,
        max_tokens: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        dtype: torch.dtype,
        quant: str = "none",
        timeout_seconds: float = 60.0,
        batched_capacity: int = 0,
        may_drop: bool = False,
        workspace: Workspace | None = None,
    ) -> None:
        world = workspace.world if workspace is not None else _world_of(group)
        self.shape = Shape(world, max_tokens, hidden, top_k, num_experts, dtype, quant, batched_capacity)
        check_shape(self.shape)
        self._kernels = _kernels()
        self.timeout_seconds, self.tuning = timeout_seconds, Tuning()
        self._workspace = workspace if workspace is not None else open_workspace(group, self.layout(), _device_of())
        self.rank, self.ranks, self.device = self._workspace.rank, self._workspace.ranks, self._workspace.memory.device
        self._on_gpu = self.device.type == "cuda"
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count if self._on_gpu else 4
        self._timeout_ns = int(timeout_seconds * 1e9)
        self._views: dict[Any, Any] = {}
        self._dropped, self.may_drop = 0, may_drop

    def layout(self) -> Layout:
        """The regions of a rank's workspace."""
        return Layout.of(self.shape.region_sizes(self._kernels.REGIONS))

    # ---- calls -------------------------------------------------------------------------------------------------------------------

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: Sequence[Any] = (), copy: bool = False) -> Received:
        """Sends each token's row once to every rank that has one of its experts, with its ids and weights (0..2 float32 [T, K]).

        The tensors received are views, valid until the next call, or (copy) clones with zero rows in holes. Outside [0, E): no expert.
        """
        call = self.prepare_dispatch(x_TH, ids_TK, weights, copy)
        call.launch(0)
        return call.result()

    def send(self, x_TH: Any, handle: list[Any]) -> Any:
        """rows [R, width] of another x [T, width], sent the way of the dispatch that gave the handle: a clone, zeros in holes."""
        call = self.prepare_send(x_TH, handle)
        call.launch(0)
        return call.result()

    def collect(self, rows_RO: Any, handle: list[Any], out_dtype: torch.dtype | None = None) -> Any:
        """out [T, O]: the sum, accumulated in float32, of each token's rows on all ranks that got it. Rows are read where they are."""
        call = self.prepare_collect(rows_RO, handle, out_dtype)
        call.launch(0)
        return call.result()

    def collect_slots(self, y_NO: Any, places_RK: Any, weights_RK: Any, handle: list[Any], out_dtype: torch.dtype | None = None) -> Any:
        """collect of rows[r] = sum_k weights[r, k] * y[places[r, k]] (float32; int32 places, -1 for none), without writing those rows."""
        call = self.prepare_collect(y_NO, handle, out_dtype, (places_RK, weights_RK))
        call.launch(0)
        return call.result()

    def dispatch_batched(self, x_TH: Any, ids_TK: Any) -> Batched:
        """Sends a row for every slot, sorted by expert where it arrives: lower ranks first, then earlier tokens.

        rows is a view, valid until the next call; counts is not. Rows beyond batched_capacity are dropped on all ranks alike, left
        out of the sum, and make a later dispatch (or check) raise CapacityExceeded.
        """
        call = self.prepare_dispatch_batched(x_TH, ids_TK)
        call.launch(0)
        return call.result()

    def collect_batched(self, y_ECO: Any, topk_weights_TK: Any, handle: list[Any], out_dtype: torch.dtype | None = None) -> Any:
        """out [T, O] = sum_k topk_weights[t, k] * (row of slot t, k), in float32, for the last dispatch_batched."""
        call = self.prepare_collect_batched(y_ECO, topk_weights_TK, handle, out_dtype)
        call.launch(0)
        return call.result()

    def rows_to_collect(self, width: int | None = None) -> Any:
        """An uninitialised [R, width] for the experts' output. Any tensor serves: collect reads rows where they are."""
        shape = self.shape
        return torch.empty((shape.rows, shape.hidden if width is None else width), dtype=shape.dtype, device=self.device)

    def check(self) -> None:
        """Raises ExchangeTimeout if a kernel gave up waiting, and once CapacityExceeded for rows dropped. Reads host words; no sync."""
        words = self._alive().words
        total = words[3]
        dropped, self._dropped = total - self._dropped, total
        if dropped and not self.may_drop:  # all ranks know; one that tells first may leave the others waiting
            raise CapacityExceeded(dropped, self.shape.capacity)
        self._check_peers()

    def _check_peers(self) -> None:
        if self._alive().words[0]:
            raise self._failure()

    def failure(self) -> ExchangeTimeout | None:
        """What made a kernel give up waiting, if one did. Reads host words; no sync."""
        return self._failure() if self._alive().words[0] else None

    def _failure(self) -> ExchangeTimeout:
        stage, peer = self._workspace.words[:2]
        return ExchangeTimeout(
            STAGES.get(stage, str(stage)), self.ranks, self.ranks[min(max(peer, 0), self.shape.world - 1)], self.timeout_seconds
        )

    def destroy(self) -> None:
        """Frees the workspace. No rank may still be inside a call: synchronise the group first. Further calls of destroy do nothing."""
        if self._workspace is not None and self._on_gpu:
            torch.cuda.synchronize(self.device)
        self._views.clear()
        self._workspace = None  # type: ignore[assignment]

    # ---- preparation -------------------------------------------------------------------------------------------------------------

    def prepare_dispatch(self, x_TH: Any, ids_TK: Any, weights: Sequence[Any] = (), copy: bool = False) -> Call:
        self.check()
        check_tokens(self.shape, x_TH, ids_TK, weights, self.device)
        table = torch.empty((x_TH.shape[0] + 2, self.shape.world), dtype=torch.int32, device=self.device)
        launch = self._push(x_TH, table, ids_TK, weights)
        return Call(launch, lambda: self._received(table, len(weights), copy))

    def prepare_send(self, x_TH: Any, handle: list[Any]) -> Call:
        self.check()
        table = table_of(self.shape, handle, x_TH.shape[0])
        width = x_TH.shape[1] if x_TH.dim() == 2 else 0
        check_rows("x", x_TH, (table.shape[0] - 2, width), self.device)
        rows = self._view("rows", x_TH.dtype, (self.shape.rows, width))
        return Call(self._push(x_TH, table, None, ()), lambda: self._clone(rows, table))

    def prepare_collect(self, rows: Any, handle: list[Any], out_dtype: torch.dtype | None = None, slots: Any = None) -> Call:
        self._check_peers()
        table = table_of(self.shape, handle)
        width = rows.shape[1] if rows.dim() == 2 else 0
        check_rows("rows", rows, (rows.shape[0] if slots is not None else self.shape.rows, width), self.device)
        if slots is not None:
            places, weights = slots
            check_slots(self.shape, places, weights, self.device)
        self._view("back", rows.dtype, (self.shape.rows, width))
        out = torch.empty((table.shape[0] - 2, width), dtype=out_dtype or rows.dtype, device=self.device)
        return Call(self._collect(rows, table, out, slots), lambda: out)

    def prepare_dispatch_batched(self, x_TH: Any, ids_TK: Any) -> Call:
        self.check()
        shape = self.shape
        check_batched(shape)
        check_tokens(shape, x_TH, ids_TK, (), self.device)
        if ids_TK.numel() > MAX_BATCHED_SLOTS:
            raise ValueError(f"dispatch_batched takes up to {MAX_BATCHED_SLOTS} slots (T * K), got {ids_TK.numel()}; use dispatch")
        places = torch.empty((x_TH.shape[0], shape.top_k), dtype=torch.int32, device=self.device)
        counts = torch.empty((shape.experts_per_rank,), dtype=torch.int32, device=self.device)
        rows = self._view("batched", shape.dtype, (shape.experts_per_rank, shape.capacity, shape.hidden))
        return Call(self._push_batched(x_TH, ids_TK, places, counts), lambda: Batched(rows, counts, [places, counts]), 3)

    def prepare_collect_batched(self, y_ECO: Any, topk_weights_TK: Any, handle: list[Any], out_dtype: torch.dtype | None = None) -> Call:
        self._check_peers()
        shape = self.shape
        check_batched(shape)
        if len(handle) != 2:
            raise ValueError(f"handle must be the one that dispatch_batched returned, got {handle!r}")
        rows = y_ECO.flatten(0, 1) if y_ECO.dim() == 3 and y_ECO.is_contiguous() else y_ECO
        places = shape.experts_per_rank * shape.capacity
        check_rows("y [experts of this rank * capacity, O]", rows, (places, rows.shape[-1]), self.device)
        check_weights("topk_weights", topk_weights_TK, tuple(handle[0].shape), self.device)
        self._view("back", rows.dtype, (shape.max_tokens * shape.top_k, rows.shape[1]))
        out = torch.empty((handle[0].shape[0], rows.shape[1]), dtype=out_dtype or rows.dtype, device=self.device)
        return Call(self._collect_batched(rows, topk_weights_TK, handle, out), lambda: out)

    # ---- launches ----------------------------------------------------------------------------------------------------------------

    def _push(self, x: Any, table: Any, ids: Any, weights: Sequence[Any]) -> Callable[[int], None]:
        tokens, width = x.shape
        kernels, shape, tuning = self._kernels, self.shape, self.tuning
        few = tokens <= FUSED_TOKENS
        fused = ids is not None and few
        splits, columns = splits_of(tokens, width, self._processors, tuning.push_splits)
        programs = tokens * splits if few else self._processors * tuning.push_programs
        weight_0, weight_1 = [*weights, self._workspace.state, self._workspace.state][:2]
        experts = {"E": shape.num_experts, "EL": shape.experts_per_rank, "W": shape.world, "K": shape.top_k, "KP": next_power(shape.top_k)}

        def launch(phase: int) -> None:
            if ids is not None and not fused and phase != 2:
                kernels.plan_kernel[(-(-tokens // 128),)](ids, table, tokens, **experts, BT=128, BEFORE=1024, num_warps=8)
            kernels.push_kernel[(1 if phase == 2 else 1 + programs,)](
                x, table if ids is None else ids, weight_0, weight_1, table, *self._common(), tokens, *self._sizes(), **experts,
                WP=next_power(shape.world), H=width, SPLITS=splits, COLS=columns, BLOCK=next_power(columns),
                BT=max(16, next_power(tokens)) if fused else 16, FUSED=fused, META=ids is not None, NW=len(weights),
                QUANT=shape.fp8 and ids is not None, PHASE=phase, TIMER=self._on_gpu, num_warps=tuning.push_warps,
            )  # fmt: skip

        return launch

    def _collect(self, rows: Any, table: Any, out: Any, slots: Any) -> Callable[[int], None]:
        tokens, width = out.shape
        few, tuning, shape = tokens <= FUSED_TOKENS, self.tuning, self.shape
        tile = 1 if few else tuning.tile
        places, weights = slots if slots is not None else (table, self._workspace.state)
        warps, per_processor = (tuning.collect_warps, tuning.collect_programs) if slots is None else (8, 2)  # more registers a thread
        programs = self._processors * per_processor
        lag = shape.max_tokens if few else tuning.lag or max(512, programs * tile // shape.world)

        def launch(phase: int) -> None:
            self._kernels.collect_kernel[(programs,)](
                rows, places, weights, table, out, *self._common(), tokens, shape.max_tokens, self.rank, lag, self._timeout_ns,
                W=shape.world, WP=next_power(shape.world), K=shape.top_k, WIDTH=width, BLOCK=next_power(width), BT=tile,
                SLOTS=slots is not None, PHASE=phase, TIMER=self._on_gpu, num_warps=warps, maxnreg=registers(warps, per_processor),
            )  # fmt: skip

        return launch

    def _push_batched(self, x: Any, ids: Any, places: Any, counts: Any) -> Callable[[int], None]:
        tokens, width = x.shape
        shape, (most, rank, timeout) = self.shape, self._sizes()

        def launch(phase: int) -> None:
            self._kernels.push_batched_kernel[(1 + tokens if phase in (0, 2) else 1,)](
                x, ids, places, counts, *self._common(), tokens, most, shape.capacity, rank, timeout, W=shape.world,
                WP=next_power(shape.world), K=shape.top_k, KP=next_power(shape.top_k), E=shape.num_experts,
                EP=next_power(shape.num_experts), EL=shape.experts_per_rank, H=width, BLOCK=next_power(width),
                BN=max(16, next_power(tokens * shape.top_k)), PHASE=phase, TIMER=self._on_gpu, num_warps=8,
            )  # fmt: skip

        return launch

    def _collect_batched(self, rows: Any, weights: Any, handle: list[Any], out: Any) -> Callable[[int], None]:
        tokens, width = out.shape
        shape, (most, rank, timeout), tuning = self.shape, self._sizes(), self.tuning
        programs = self._processors * tuning.collect_programs

        def launch(phase: int) -> None:
            self._kernels.collect_batched_kernel[(programs,)](
                rows, *handle, weights, out, *self._common(), tokens, most, shape.capacity, rank, timeout, W=shape.world,
                WP=next_power(shape.world), K=shape.top_k, KP=next_power(shape.top_k), EL=shape.experts_per_rank,
                EQ=next_power(shape.experts_per_rank), WIDTH=width, BLOCK=next_power(width), PHASE=phase, TIMER=self._on_gpu,
                num_warps=tuning.collect_warps, maxnreg=registers(tuning.collect_warps, tuning.collect_programs),
            )  # fmt: skip

        return launch

    def _common(self) -> tuple[Any, Any, Any]:
        workspace = self._alive()
        return workspace.addresses, workspace.state, workspace.status

    def _sizes(self) -> tuple[int, int, int]:
        return self.shape.max_tokens, self.rank, self._timeout_ns

    # ---- what came ---------------------------------------------------------------------------------------------------------------

    def _received(self, table: Any, num_weights: int, copy: bool) -> Received:
        rows, scales, ids, *weights = self._views_of(num_weights)
        if copy:
            rows, scales, ids, weights = self._clone(rows, table), scales.clone(), ids.clone(), [each.clone() for each in weights]
        return Received(rows, scales, ids, weights, [table])

    def _views_of(self, num_weights: int) -> list[Any]:
        """rows, scales, ids and weights as they lie in the workspace."""
        found = self._views.get(num_weights)
        if found is None:
            shape, slots = self.shape, (self.shape.rows, self.shape.top_k)
            found = self._views[num_weights] = [
                self._view("rows", torch.float8_e4m3fn if shape.fp8 else shape.dtype, (shape.rows, shape.hidden)),
                self._view("scales", torch.float32, (shape.rows, shape.hidden // GROUP if shape.fp8 else 0)),
                self._view("ids", torch.int32, slots),
                *(self._view(f"weights_{i}", torch.float32, slots) for i in range(num_weights)),
            ]
        return found

    def _clone(self, rows_RX: Any, table: Any) -> Any:
        """rows with zeros where none came."""
        if rows_RX.dtype == torch.float8_e4m3fn:
            return rows_RX.clone()
        came_WM = torch.arange(self.shape.max_tokens, device=self.device) < table[-1].unsqueeze(1)
        return torch.where(came_WM.view(-1, 1), rows_RX, 0)

    def _view(self, region: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        key = region, dtype, shape
        if key not in self._views:
            self._views[key] = self._alive().view(region, dtype, shape)
        return self._views[key]

    @property
    def alive(self) -> bool:
        """Not destroyed."""
        return self._workspace is not None

    def _alive(self) -> Workspace:
        if self._workspace is None:
            raise RuntimeError("the nvlink exchange was destroyed; make a new NvlinkEngine")
        return self._workspace


def _kernels() -> Any:
    """The kernels by name; importing them imports triton."""
    from . import batched, collect, push, signals

    every: dict[str, Any] = {**vars(push), **vars(collect), **vars(batched), "REGIONS": signals.REGIONS}
    return types.SimpleNamespace(**{name: value for name, value in every.items() if name.endswith("_kernel") or name == "REGIONS"})


def _world_of(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_world_size(group)


def _device_of() -> Any:
    return torch.device("cuda", torch.cuda.current_device())
