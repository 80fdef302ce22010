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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .symmetric import STAGES, CapacityExceeded, ExchangeTimeout, Layout, Workspace, open_workspace

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANKS = 8
MAX_TOKENS = 65535  # places are counted in 16 bits
MAX_HIDDEN = 16384
GROUP = 128  # columns that share an fp8 scale
REGISTERS = 65536  # of one multiprocessor
MAX_BATCHED_SLOTS = 8192  # T * K of one rank: every program looks at all of them
FUSED_TOKENS = 512  # up to here the dispatch finds its places itself


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


@dataclasses.dataclass
class Tuning:
    """Launch sizes, as measured on H200s. programs: per multiprocessor.

    tile (a power of two): rows that a program returns between two signals, and tokens that it adds up at once. lag: rows returned
    before the sum of tokens of those numbers starts (0: as many as are under way at once, so that few programs wait).
    Up to FUSED_TOKENS tokens a rank: one program a token, tile 1, all rows before all sums.
    """

    push_warps: int = 4
    push_programs: int = 4
    push_splits: int = 0  # parts of a row; 0 chooses by the number of tokens
    collect_warps: int = 4
    collect_programs: int = 4
    tile: int = 4
    lag: int = 0


def _next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


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
        _check_problem(world, max_tokens, hidden, top_k, num_experts, dtype, quant)
        if not 0 <= batched_capacity * num_experts < 1 << 31:
            raise ValueError(f"batched_capacity must be 0 or more and below 2**31 / num_experts, got {batched_capacity}")
        self.max_tokens, self.hidden, self.top_k, self.num_experts = max_tokens, hidden, top_k, num_experts
        self.dtype, self.quant, self.timeout_seconds, self.capacity = dtype, quant, timeout_seconds, batched_capacity
        self.world, self.rows = world, world * max_tokens
        self.experts_per_rank = -(-num_experts // world)
        self.tuning = Tuning()
        self._workspace = workspace if workspace is not None else open_workspace(group, self.layout(world), _device_of())
        self.rank, self.ranks, self.device = self._workspace.rank, self._workspace.ranks, self._workspace.memory.device
        self._processors = 4 if self.device.type == "cpu" else torch.cuda.get_device_properties(self.device).multi_processor_count
        self._views: dict[Any, Any] = {}
        self._dropped, self.may_drop = 0, may_drop
        if workspace is None:
            self._first_values()

    def layout(self, world: int) -> Layout:
        """The regions of a rank's workspace, in the order of nvlink_kernels.REGIONS."""
        from . import nvlink_kernels as kernels

        return Layout.of(_sizes(self, world, kernels.REGIONS))

    def _first_values(self) -> None:
        """ids of no expert in all rows; the workspace itself is zeroed."""
        self._view("ids", torch.int32, (self.rows, self.top_k)).fill_(-1)

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
        out of the sum, and make a later call (or check) raise CapacityExceeded.
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
        return torch.empty((self.rows, self.hidden if width is None else width), dtype=self.dtype, device=self.device)

    def check(self) -> None:
        """Raises ExchangeTimeout if a kernel gave up waiting, and once CapacityExceeded for rows dropped. Reads host words; no sync."""
        failure = self.failure()
        if failure is not None:
            raise failure
        dropped, self._dropped = self._workspace.status_word(3) - self._dropped, self._workspace.status_word(3)
        if dropped and not self.may_drop:
            raise CapacityExceeded(dropped, self.capacity)

    def failure(self) -> ExchangeTimeout | None:
        """What made a kernel give up waiting, if one did. Reads host words; no sync."""
        workspace = self._alive()
        stage = workspace.status_word(0)
        if not stage:
            return None
        peer = self.ranks[min(max(workspace.status_word(1), 0), self.world - 1)]
        return ExchangeTimeout(STAGES.get(stage, str(stage)), self.ranks, peer, self.timeout_seconds)

    def destroy(self) -> None:
        """Frees the workspace. No rank may still be inside a call: synchronise the group first. Further calls of destroy do nothing."""
        if self._workspace is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._views.clear()
        self._workspace = None  # type: ignore[assignment]

    # ---- preparation -------------------------------------------------------------------------------------------------------------

    def prepare_dispatch(self, x_TH: Any, ids_TK: Any, weights: Sequence[Any] = (), copy: bool = False) -> Call:
        self.check()
        self._check_tokens(x_TH, ids_TK, weights)
        table = torch.empty((x_TH.shape[0] + 2, self.world), dtype=torch.int32, device=self.device)
        launch = self._push(x_TH, table, ids_TK, weights)
        return Call(launch, lambda: self._received(table, len(weights), copy))

    def prepare_send(self, x_TH: Any, handle: list[Any]) -> Call:
        self.check()
        table = self._table(handle, x_TH.shape[0])
        width = x_TH.shape[1] if x_TH.dim() == 2 else 0
        self._check_rows("x", x_TH, (table.shape[0] - 2, width))
        rows = self._view("rows", x_TH.dtype, (self.rows, width))
        return Call(self._push(x_TH, table, None, ()), lambda: self._clone(rows, table))

    def prepare_collect(self, rows: Any, handle: list[Any], out_dtype: torch.dtype | None = None, slots: Any = None) -> Call:
        self.check()
        table = self._table(handle)
        width = rows.shape[1] if rows.dim() == 2 else 0
        self._check_rows("rows", rows, (rows.shape[0] if slots is not None else self.rows, width))
        if slots is not None:
            self._check_slots(*slots)
        self._view("back", rows.dtype, (self.rows, width))
        out = torch.empty((table.shape[0] - 2, width), dtype=out_dtype or rows.dtype, device=self.device)
        return Call(self._collect(rows, table, out, slots), lambda: out)

    def prepare_dispatch_batched(self, x_TH: Any, ids_TK: Any) -> Call:
        self.check()
        self._check_batched()
        self._check_tokens(x_TH, ids_TK, ())
        if ids_TK.numel() > MAX_BATCHED_SLOTS:
            raise ValueError(f"dispatch_batched takes up to {MAX_BATCHED_SLOTS} slots (T * K), got {ids_TK.numel()}; use dispatch")
        places = torch.empty((x_TH.shape[0], self.top_k), dtype=torch.int32, device=self.device)
        counts = torch.empty((self.experts_per_rank,), dtype=torch.int32, device=self.device)
        rows = self._view("batched", self.dtype, (self.experts_per_rank, self.capacity, self.hidden))
        return Call(self._push_batched(x_TH, ids_TK, places, counts), lambda: Batched(rows, counts, [places, counts]), 3)

    def prepare_collect_batched(self, y_ECO: Any, topk_weights_TK: Any, handle: list[Any], out_dtype: torch.dtype | None = None) -> Call:
        self.check()
        self._check_batched()
        if len(handle) != 2:
            raise ValueError(f"handle must be the one that dispatch_batched returned, got {handle!r}")
        rows = y_ECO.flatten(0, 1) if y_ECO.dim() == 3 and y_ECO.is_contiguous() else y_ECO
        self._check_rows("y [experts of this rank * capacity, O]", rows, (self.experts_per_rank * self.capacity, rows.shape[-1]))
        _check_tensor("topk_weights", topk_weights_TK, tuple(handle[0].shape), self.device)
        if topk_weights_TK.dtype != torch.float32:
            raise ValueError(f"topk_weights must be float32, got {topk_weights_TK.dtype}")
        self._view("back", rows.dtype, (self.max_tokens * self.top_k, rows.shape[1]))
        out = torch.empty((handle[0].shape[0], rows.shape[1]), dtype=out_dtype or rows.dtype, device=self.device)
        return Call(self._collect_batched(rows, topk_weights_TK, handle, out), lambda: out)

    def _push_batched(self, x: Any, ids: Any, places: Any, counts: Any) -> Callable[[int], None]:
        from . import nvlink_kernels as kernels

        tokens, width = x.shape
        most, rank, timeout = self._sizes()

        def launch(phase: int) -> None:
            kernels.push_batched_kernel[(1 + tokens if phase in (0, 2) else 1,)](
                x, ids, places, counts, *self._common(), tokens, most, self.capacity, rank, timeout, W=self.world,
                WP=_next_power(self.world), K=self.top_k, KP=_next_power(self.top_k), E=self.num_experts,
                EP=_next_power(self.num_experts), EL=self.experts_per_rank, H=width, BLOCK=_next_power(width),
                BN=max(16, _next_power(tokens * self.top_k)), PHASE=phase, TIMER=self.device.type == "cuda", num_warps=8,
            )  # fmt: skip

        return launch

    def _collect_batched(self, rows: Any, weights: Any, handle: list[Any], out: Any) -> Callable[[int], None]:
        from . import nvlink_kernels as kernels

        tokens, width = out.shape
        most, rank, timeout = self._sizes()
        programs = self._processors * self.tuning.collect_programs

        def launch(phase: int) -> None:
            kernels.collect_batched_kernel[(programs,)](
                rows, *handle, weights, out, *self._common(), tokens, most, self.capacity, rank, timeout, W=self.world,
                WP=_next_power(self.world), K=self.top_k, KP=_next_power(self.top_k), EL=self.experts_per_rank,
                EQ=_next_power(self.experts_per_rank), WIDTH=width, BLOCK=_next_power(width), PHASE=phase,
                TIMER=self.device.type == "cuda", num_warps=self.tuning.collect_warps,
                maxnreg=_registers(self.tuning.collect_warps, self.tuning.collect_programs),
            )  # fmt: skip

        return launch

    def _push(self, x: Any, table: Any, ids: Any, weights: Sequence[Any]) -> Callable[[int], None]:
        from . import nvlink_kernels as kernels

        tokens, width = x.shape
        fused = ids is not None and tokens <= FUSED_TOKENS
        few, quant = tokens <= FUSED_TOKENS, self.quant == "fp8" and ids is not None
        splits = self.tuning.push_splits or _splits(tokens, self._processors)
        columns = -(-width // (splits * GROUP)) * GROUP
        splits = -(-width // columns)
        programs = tokens * splits if few else self._processors * self.tuning.push_programs
        weight_0, weight_1 = [*weights, self._workspace.state, self._workspace.state][:2]
        experts = dict(E=self.num_experts, EL=self.experts_per_rank, W=self.world, K=self.top_k)

        def launch(phase: int) -> None:
            if ids is not None and not fused and phase != 2:
                kernels.plan_kernel[(-(-tokens // 128),)](
                    ids, table, tokens, **experts, KP=_next_power(self.top_k), BT=128, BEFORE=1024, num_warps=8
                )
            kernels.push_kernel[(1 if phase == 2 else 1 + programs,)](
                x, table if ids is None else ids, weight_0, weight_1, table, *self._common(), tokens, *self._sizes(), **experts,
                WP=_next_power(self.world), KP=_next_power(self.top_k), H=width, SPLITS=splits, COLS=columns,
                BLOCK=_next_power(columns), BT=max(16, _next_power(tokens)) if fused else 16, FUSED=fused, META=ids is not None,
                NW=len(weights), QUANT=quant, PHASE=phase, TIMER=self.device.type == "cuda", num_warps=self.tuning.push_warps,
            )  # fmt: skip

        return launch

    def _collect(self, rows: Any, table: Any, out: Any, slots: Any) -> Callable[[int], None]:
        from . import nvlink_kernels as kernels

        tokens, width = out.shape
        few, tuning = tokens <= FUSED_TOKENS, self.tuning
        tile = 1 if few else tuning.tile
        places, weights = slots if slots is not None else (table, self._workspace.state)
        warps, per_processor = (tuning.collect_warps, tuning.collect_programs) if slots is None else (8, 2)  # more registers a thread
        programs = self._processors * per_processor
        lag = self.max_tokens if few else tuning.lag or max(512, programs * tile // self.world)

        def launch(phase: int) -> None:
            kernels.collect_kernel[(programs,)](
                rows, places, weights, table, out, *self._common(), tokens, *self._sizes()[:2], lag, self._sizes()[2], W=self.world,
                WP=_next_power(self.world), K=self.top_k, WIDTH=width, BLOCK=_next_power(width), BT=tile, SLOTS=slots is not None,
                PHASE=phase, TIMER=self.device.type == "cuda", num_warps=warps, maxnreg=_registers(warps, per_processor),
            )  # fmt: skip

        return launch

    def _common(self) -> tuple[Any, Any, Any]:
        workspace = self._alive()
        return workspace.addresses, workspace.state, workspace.status

    def _sizes(self) -> tuple[int, int, int]:
        return self.max_tokens, self.rank, int(self.timeout_seconds * 1e9)

    def _received(self, table: Any, num_weights: int, copy: bool) -> Received:
        row_dtype = torch.float8_e4m3fn if self.quant == "fp8" else self.dtype
        rows = self._view("rows", row_dtype, (self.rows, self.hidden))
        scales = self._view("scales", torch.float32, (self.rows, self.hidden // GROUP if self.quant == "fp8" else 0))
        slots = (self.rows, self.top_k)
        ids = self._view("ids", torch.int32, slots)
        weights = [self._view(f"weights_{i}", torch.float32, slots) for i in range(num_weights)]
        if copy:
            rows, scales, ids, weights = self._clone(rows, table), scales.clone(), ids.clone(), [each.clone() for each in weights]
        return Received(rows, scales, ids, weights, [table])

    def _clone(self, rows_RX: Any, table: Any) -> Any:
        """rows with zeros where none came."""
        if rows_RX.dtype == torch.float8_e4m3fn:
            return rows_RX.clone()
        came_WM = torch.arange(self.max_tokens, device=self.device) < table[-1].unsqueeze(1)
        return torch.where(came_WM.view(-1, 1), rows_RX, 0)

    def _view(self, region: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        key = region, dtype, shape
        if key not in self._views:
            self._views[key] = self._alive().view(region, dtype, shape)
        return self._views[key]

    # ---- checks ------------------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Not destroyed."""
        return self._workspace is not None

    def _alive(self) -> Workspace:
        if self._workspace is None:
            raise RuntimeError("the nvlink exchange was destroyed; make a new NvlinkEngine")
        return self._workspace

    def _check_batched(self) -> None:
        if self.capacity < 1:
            raise ValueError("the exchange was made without room for the batched format; give NvlinkEngine a batched_capacity")
        if self.quant != "none":
            raise ValueError(f"the batched format carries rows as they are, the exchange was made with quant {self.quant!r}")

    def _table(self, handle: list[Any], tokens: int | None = None) -> Any:
        table = handle[0] if handle else None
        if table is None or table.dim() != 2 or table.shape[1] != self.world or table.shape[0] < 2 or table.dtype != torch.int32:
            raise ValueError(f"handle must be the one that dispatch of an exchange of {self.world} ranks returned, got {handle!r}")
        if tokens is not None and table.shape[0] - 2 != tokens:
            raise ValueError(f"x has {tokens} tokens, the handle's dispatch had {table.shape[0] - 2}")
        return table

    def _check_tokens(self, x: Any, ids: Any, weights: Sequence[Any]) -> None:
        tokens = x.shape[0] if x.dim() == 2 else 0
        self._check_rows("x", x, (tokens, self.hidden))
        if x.dtype != self.dtype:
            raise ValueError(f"x is {x.dtype}, the exchange was made for {self.dtype}")
        if tokens > self.max_tokens:
            raise ValueError(f"x has {tokens} tokens, the exchange was made for max_tokens={self.max_tokens}; make it with a larger one")
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
        if len(weights) > 2:
            raise ValueError(f"at most 2 weight tensors travel with the rows, got {len(weights)}")
        _check_tensor("ids", ids, (tokens, self.top_k), self.device)
        for weight in weights:
            _check_tensor("weights", weight, (tokens, self.top_k), self.device)
            if weight.dtype != torch.float32:
                raise ValueError(f"weights must be float32, got {weight.dtype}")

    def _check_rows(self, name: str, rows: Any, shape: tuple[int, int]) -> None:
        _check_tensor(name, rows, shape, self.device)
        if rows.dtype not in DTYPES or rows.shape[1] * rows.dtype.itemsize % 16 or not rows.shape[1] or rows.shape[1] > MAX_HIDDEN:
            raise ValueError(
                f"{name} must have rows of bfloat16, float16 or float32 and of a multiple of 16 bytes, 1 to {MAX_HIDDEN} columns, got "
                f"{tuple(rows.shape)} {rows.dtype}; pad the last dimension"
            )
        if rows.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes, it starts at {rows.data_ptr():#x}; clone it")

    def _check_slots(self, places: Any, weights: Any) -> None:
        for name, tensor, dtype in (("places", places, torch.int32), ("weights", weights, torch.float32)):
            _check_tensor(name, tensor, (self.rows, self.top_k), self.device)
            if tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def _sizes(exchange: NvlinkEngine, world: int, names: Sequence[str]) -> dict[str, int]:
    """Bytes of each region."""
    rows, top_k, item = world * exchange.max_tokens, exchange.top_k, exchange.dtype.itemsize
    fp8, capacity = exchange.quant == "fp8", exchange.capacity
    local = -(-exchange.num_experts // world)
    back = max(rows, exchange.max_tokens * top_k if capacity else 0)
    slots = rows * top_k * 4
    sizes = {
        "started": 8 * world, "pushed": 8 * world, "landed": 8 * back, "ids": slots, "weights_0": slots, "weights_1": slots,
        "scales": rows * (exchange.hidden // GROUP) * 4 if fp8 else 0, "rows": rows * exchange.hidden * (1 if fp8 else item),
        "back": back * exchange.hidden * item, "counts": 8 * world * exchange.num_experts, "counted": 8 * world,
        "sources": 4 * local * capacity, "batched": local * capacity * exchange.hidden * item,
    }  # fmt: skip
    return {name: sizes[name] for name in names}


def _registers(warps: int, programs: int) -> int:
    """The most per thread with which that many programs fit on one multiprocessor; they are handed out in eights."""
    return REGISTERS // (32 * warps * programs) // 8 * 8


def _splits(tokens: int, processors: int) -> int:
    """Parts of a row so that few tokens still occupy all multiprocessors."""
    return max(1, min(8, processors // max(1, tokens)))


def _world_of(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_world_size(group)


def _device_of() -> Any:
    return torch.device("cuda", torch.cuda.current_device())


def _check_tensor(name: str, tensor: Any, shape: tuple[int, ...], device: Any) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the exchange is on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def _check_problem(world: int, max_tokens: int, hidden: int, top_k: int, experts: int, dtype: Any, quant: str) -> None:
    if not 1 <= world <= MAX_RANKS:
        raise ValueError(f"the nvlink exchange takes 1 to {MAX_RANKS} ranks of one host, the group has {world}")
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"max_tokens must be 1 to {MAX_TOKENS}, got {max_tokens}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if not 1 <= hidden <= MAX_HIDDEN or hidden * dtype.itemsize % 16:
        raise ValueError(f"hidden must be 1 to {MAX_HIDDEN} and a multiple of 16 bytes, got {hidden} of {dtype}; pad it")
    if quant not in ("none", "fp8"):
        raise ValueError(f"quant must be 'none' or 'fp8', got {quant!r}")
    if quant == "fp8" and hidden % GROUP:
        raise ValueError(f"quant 'fp8' needs hidden to be a multiple of {GROUP}, got {hidden}")
    if top_k < 1 or experts < 1:
        raise ValueError(f"top_k and num_experts must be at least 1, got {top_k} and {experts}")
