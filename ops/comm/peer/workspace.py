"""Memory that all ranks of one host can address: allocation, layout, and what a wait that gave up says."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..exchange import ExchangeError

ALIGNMENT = 1024  # bytes: of every region
STATE_WORDS = 32  # int64 words of device state that only this rank's kernels touch
STATUS_WORDS = 8  # int64 words of pinned host memory that kernels write and the host reads without a sync
SIGNALS = ("started", "pushed", "landed", "counted")  # regions of words that peers wait for
STAGES = {1: "dispatch", 2: "collect", 3: "dispatch, before its first row (a peer never came)", 4: "counts of dispatch_batched"}


class ExchangeTimeout(ExchangeError):
    """A kernel waited for a peer longer than the limit and gave up; the exchange cannot be used any more."""

    def __init__(self, stage: str, ranks: list[int], peer: int, seconds: float) -> None:
        self.stage, self.ranks, self.peer, self.seconds = stage, ranks, peer, seconds
        super().__init__(
            f"{stage} of the nvlink exchange waited {seconds:g} s for rank {peer} of ranks {ranks}. Either that rank died or hangs, or it "
            "makes fewer exchange calls than the others; results since are not valid. Restart the job, or give a larger timeout"
        )


class CapacityExceeded(ExchangeError):
    """More rows came for one local expert than its buffer holds; the rest were dropped."""

    def __init__(self, dropped: int, capacity: int) -> None:
        self.dropped, self.capacity = dropped, capacity
        super().__init__(
            f"{dropped} rows were dropped in dispatch_batched: one expert got more than its capacity={capacity} of them. "
            "Give a larger ParallelConfig.capacity: world size * max_tokens_per_rank is always enough (times top_k if a token may name an "
            "expert twice)"
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Regions of one workspace: name -> (offset, bytes), in the order given."""

    regions: Mapping[str, tuple[int, int]]
    nbytes: int

    @staticmethod
    def of(sizes: Mapping[str, int]) -> Layout:
        """Every region starts at a multiple of ALIGNMENT; a region of no bytes is valid and takes none."""
        offset, regions = 0, {}
        for name, nbytes in sizes.items():
            regions[name] = (offset, nbytes)
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return Layout(regions, offset)

    def addresses(self, bases: list[int], device: Any) -> Any:
        """int64 [regions, W]: where each region starts on each rank."""
        rows = [[base + offset for base in bases] for offset, _ in self.regions.values()]
        return torch.tensor(rows, dtype=torch.int64, device=device)


@dataclasses.dataclass
class Workspace:
    """One rank's share: memory uint8 [nbytes], addresses int64 [regions, W], state and status words, and what keeps them alive."""

    rank: int
    world: int
    ranks: list[int]
    layout: Layout
    memory: Any
    addresses: Any
    state: Any
    status: Any
    owner: Any = None

    def view(self, region: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        """The first elements of a region as a tensor. Raises ValueError if the region is too small."""
        offset, room = self.layout.regions[region]
        wanted = dtype.itemsize
        for size in shape:
            wanted *= size
        if wanted > room:
            raise ValueError(f"{shape} of {dtype} needs {wanted} bytes, the region {region!r} of the nvlink workspace has {room}")
        return self.memory[offset : offset + wanted].view(dtype).view(shape)

    def clear(self) -> None:
        """Signals of no op and ids of no expert: all that a first call relies on. Before any peer may write."""
        for region in SIGNALS:
            self._bytes(region).zero_()
        self._bytes("ids").fill_(255)  # -1

    def _bytes(self, region: str) -> Any:
        offset, nbytes = self.layout.regions[region]
        return self.memory[offset : offset + nbytes]

    @functools.cached_property
    def words(self) -> Any:
        """The host words, as the kernels last wrote them: reading is no sync."""
        return (ctypes.c_int64 * STATUS_WORDS).from_address(self.status.data_ptr())


def new_state(device: Any) -> Any:
    """State words before the first call: no operation yet, none has used a buffer."""
    state = torch.zeros(STATE_WORDS, dtype=torch.int64, device=device)
    state[1:3] = -1
    return state


def open_workspace(group: Any, layout: Layout, device: Any) -> Workspace:
    """Allocates and maps the workspace of every rank. Collective; raises MemoryError on all ranks if it does not fit on one."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    _require_room(group, layout.nbytes, device)
    memory = symmetric_memory.empty(layout.nbytes, dtype=torch.uint8, device=device)
    try:
        owner = symmetric_memory.rendezvous(memory, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"ranks {dist.get_process_group_ranks(group)} cannot map each other's memory; the nvlink exchange needs GPUs of one host with "
            f"NVLink between all of them: choose another provider for this group. torch says: {str(error).splitlines()[0]}"
        ) from error
    bases, rank = [int(base) for base in owner.buffer_ptrs], dist.get_rank(group)
    if bases[rank] != memory.data_ptr():
        raise RuntimeError(
            f"symmetric memory of rank {rank} is at {memory.data_ptr():#x}, torch says {bases[rank]:#x}; use torch 2.11 to 2.13"
        )
    status = torch.zeros(STATUS_WORDS, dtype=torch.int64).pin_memory()
    workspace = Workspace(
        rank,
        len(bases),
        dist.get_process_group_ranks(group),
        layout,
        memory,
        layout.addresses(bases, device),
        new_state(device),
        status,
        owner,
    )
    workspace.clear()
    torch.cuda.synchronize(device)
    _least(group, 0, device)  # nobody writes to a peer before that peer has cleared its own
    return workspace


def _require_room(group: Any, nbytes: int, device: Any) -> None:
    free = torch.cuda.mem_get_info(device)[0]
    least = _least(group, free, device)
    if least < nbytes:
        raise MemoryError(
            f"the nvlink workspace needs {nbytes} bytes ({nbytes / 2**30:.2f} GiB) on each rank; this rank has {free} free, the fullest "
            f"{least}. Give a smaller max_tokens_per_rank or capacity, or free memory (torch.cuda.empty_cache()) first"
        )


def _least(group: Any, value: int, device: Any) -> int:
    """The smallest value of all ranks, when all have come."""
    import torch.distributed as dist

    least = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return int(least)
