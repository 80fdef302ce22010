"""Provider "nvlink": ours, inside one host, by Triton kernels that write into the peers' memory (peer/).

Each token's row goes once to each rank that has one of its experts; the sum on the way back is in float32. Nothing is read on the host,
so CUDA graphs hold it; all ranks have room for W * max_tokens rows. Weights of the routing travel in float32.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from .. import registry
from . import costs
from .exchange import CAP, EXCHANGE, HANDLE, RECEIVED, Exchange, ExchangeError, Received, marks
from .peer.checks import DTYPES, MAX_HIDDEN, MAX_RANKS, MAX_TOKENS
from .peer.engine import NvlinkEngine
from .peer.launch import GROUP
from .setup import Setup
from .watch import watch

NAME = "nvlink"
ROW_BYTES = 16  # a row's bytes are a multiple
WORKSPACE = 2 << 30  # bytes, about; more tokens go in chunks
LEAST_CHUNK = 1024  # tokens


class Nvlink(Exchange):
    """handle: the two marks, and the engine's table int32 [T + 2, W]."""

    name = NAME

    def __init__(self, setup: Setup, device: Any) -> None:
        super().__init__(setup, device)
        self.hidden = padded(setup.hidden, setup.torch_dtype)
        self.engine = self.open()
        watch(self.engine)

    def open(self, **options: Any) -> NvlinkEngine:
        """The engine. Collective. Raises ExchangeError under capture, MemoryError on all ranks where the workspace does not fit."""
        if torch.cuda.is_current_stream_capturing():
            raise ExchangeError(
                f"{self.name}: the first call opens a workspace, which no CUDA graph can hold; call once before the capture"
            )
        s = self.setup
        return NvlinkEngine(
            self.group, max_tokens=s.max_tokens, hidden=self.hidden, top_k=s.top_k, num_experts=s.num_experts, dtype=s.torch_dtype,
            quant=s.quant, timeout_seconds=s.timeout, **options,
        )  # fmt: skip

    def dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        return self._dispatch(x_TH, ids_TK, weights, copy=True)

    def dispatch_views(self, x_TH: Any, ids_TK: Any, weights: list[Any]) -> Received:
        return self._dispatch(x_TH, ids_TK, weights, copy=False)

    def _dispatch(self, x_TH: Any, ids_TK: Any, weights: list[Any], copy: bool) -> Received:
        self.check_tokens(x_TH.shape[0])
        moved = [w.float().contiguous() for w in weights]
        got = self.engine.dispatch(self.wide(x_TH), ids_TK.contiguous(), moved, copy)
        width = x_TH.shape[1]
        rows, scales = narrowed(got.rows, width), narrowed(got.scales, -(-width // GROUP) if self.setup.quant == "fp8" else 0)
        handle = [*marks(x_TH.shape[0], rows.shape[0], x_TH), *got.handle]
        if self.setup.quant == "none":
            scales = scales.view(0) if scales.numel() == 0 else scales
        return Received(rows, scales, got.ids, [w.to(given.dtype) for w, given in zip(got.weights, weights, strict=True)], handle)

    def send(self, x_TX: Any, handle: list[Any]) -> Any:
        return by_columns(x_TX, self._room(x_TX.dtype), lambda part: self.engine.send(part, handle[2:]))

    def collect(self, rows_RX: Any, handle: list[Any], out_dtype: Any, weights_TK: Any = None) -> Any:
        return by_columns(rows_RX, self._room(rows_RX.dtype), lambda part: self.engine.collect(part, handle[2:], out_dtype))

    def collect_slots(self, y_SO: Any, places_RK: Any, weights_RK: Any, handle: list[Any], out_dtype: Any) -> Any:
        weights = torch.ones_like(places_RK, dtype=torch.float32) if weights_RK is None else weights_RK.float().contiguous()
        room, places = self._room(y_SO.dtype), places_RK.contiguous()
        return by_columns(y_SO, room, lambda part: self.engine.collect_slots(part, places, weights, handle[2:], out_dtype))

    def _room(self, dtype: Any) -> int:
        """Columns of a dtype that the workspace has room for in a row."""
        return self.hidden * self.setup.torch_dtype.itemsize // dtype.itemsize

    def wide(self, x_TH: Any) -> Any:
        return F.pad(x_TH, (0, self.hidden - x_TH.shape[1])) if x_TH.shape[1] < self.hidden else aligned(x_TH)

    def check_tokens(self, tokens: int) -> None:
        limit = self.setup.max_tokens
        if tokens > limit:
            raise ExchangeError(
                f"{self.name} dispatch: rank {self.rank} of ranks {self.ranks} has {tokens} tokens, its workspace has room for {limit}; "
                "set ParallelConfig.max_tokens_per_rank to the most tokens that any rank will bring, on all ranks"
            )

    def check(self) -> None:
        self.engine.check()

    def destroy(self) -> None:
        self.engine.destroy()


def aligned(x: Any) -> Any:
    """x, contiguous and from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ROW_BYTES else x


def padded(columns: int, dtype: Any) -> int:
    """The next number of columns whose bytes are a multiple of ROW_BYTES."""
    step = ROW_BYTES // dtype.itemsize
    return -(-columns // step) * step


def narrowed(rows: Any, width: int) -> Any:
    return rows if rows.shape[1] == width else rows[:, :width].contiguous()


def by_columns(rows: Any, room: int, call: Any) -> Any:
    """call(rows) by as many columns at a time as there is room for, padded to whole units."""
    width = rows.shape[1]
    wide = padded(width, rows.dtype)
    if wide <= room:
        return narrowed(call(aligned(rows if wide == width else F.pad(rows, (0, wide - width)))), width)
    step = room // (ROW_BYTES // rows.dtype.itemsize) * (ROW_BYTES // rows.dtype.itemsize)
    return torch.cat([by_columns(rows[:, at : at + step], room, call) for at in range(0, width, step)], 1)


def supports(problem: registry.Problem) -> str | None:
    return limits(NAME, problem) or missing(NAME)


def limits(name: str, problem: registry.Problem) -> str | None:
    """What the kernels do not take, on whatever machine."""
    if problem.world < 2:
        return f"{name} exchanges between ranks, world is 1"
    if not problem.device.startswith("cuda"):
        return f"{name} runs on CUDA devices, device is {problem.device!r}"
    if problem.world > MAX_RANKS or not problem.same_host:
        return (
            f"{name} takes up to {MAX_RANKS} ranks of one host, world is {problem.world}{'' if problem.same_host else ' on several hosts'}"
        )
    if problem.dtype not in DTYPES:
        return f"{name} moves rows of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, dtype is {problem.dtype}"
    if problem.hidden > MAX_HIDDEN:
        return f"{name} takes hidden <= {MAX_HIDDEN}, hidden is {problem.hidden}"
    if not problem.max_tokens:
        return f"{name} needs ParallelConfig.max_tokens_per_rank, its workspace has a place for each token"
    if problem.quant == "fp8" and problem.hidden % GROUP:
        return f"{name} quantises blocks of {GROUP} columns, hidden is {problem.hidden}"
    if problem.quant == "fp8" and problem.training:
        return f"{name} quantises rows for inference only, gradients are wanted"
    return None if problem.quant in ("none", "fp8") else f"{name} moves rows as they are or as fp8, quant is {problem.quant!r}"


def missing(name: str) -> str | None:
    """What this machine lacks."""
    if importlib.util.find_spec("triton") is None:
        return f"{name} needs triton, which is not installed: pip install moe_compile[nvlink]"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return f"{name} needs an NVIDIA device in this process, torch.cuda.is_available() is {torch.cuda.is_available()}"
    if torch.cuda.get_device_capability() < (9, 0):
        return f"{name} is proven from compute capability 9.0 on, the device has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    here, count = torch.cuda.current_device(), torch.cuda.device_count()
    if not all(torch.cuda.can_device_access_peer(here, other) for other in range(count) if other != here):
        return f"{name} needs devices that reach each other's memory (NVLink), device {here} does not reach all others"
    return None


def cost(problem: registry.Problem) -> float:
    """Microseconds: measured on 4 H200, 335 GB/s each way of all rows that leave the rank (fp8 half the bytes there)."""
    sent = costs.bytes_sent(problem)
    return 18.0 + sent * (0.55 if problem.quant == "fp8" else 1.0) / 3.35e5 + sent / 3.35e5


def received(tokens: Any, setup: Setup) -> int:
    return setup.world * setup.max_tokens


def handle_like(x_TH: Any, ids_TK: Any, rows: Any, setup: Setup) -> list[Any]:
    table = ids_TK.new_empty((x_TH.shape[0] + 2, setup.world), dtype=torch.int32)
    return [*marks(x_TH.shape[0], rows, x_TH), table]


def cap(setup: Setup) -> int:
    """The most tokens of one dispatch."""
    most = WORKSPACE // (2 * setup.world * setup.hidden * setup.torch_dtype.itemsize)
    return min(MAX_TOKENS // 128 * 128, max(LEAST_CHUNK, most // 128 * 128))


KERNELS: dict[str, Any] = {EXCHANGE: Nvlink, RECEIVED: received, HANDLE: handle_like, CAP: cap}
PROVIDER = registry.register(registry.Provider(NAME, "comm", KERNELS, cost, supports))
