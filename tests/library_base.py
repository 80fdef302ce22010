"""What the stand-ins of communication libraries share: objects that are counted, and torch.distributed's slow collectives."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist

ALIVE: list[Any] = []  # library objects that were made and not destroyed
MADE: list[Any] = []  # all of them


def everyone(thing: Any) -> list[Any]:
    """What each rank has."""
    mine, found = io.BytesIO(), [b""] * dist.get_world_size()
    torch.save(thing, mine)  # tensors of fp8 can be saved, not pickled
    dist.all_gather_object(found, mine.getvalue())
    return [torch.load(io.BytesIO(each), weights_only=False) for each in found]


def local_ids(idx: Any, num_experts: int, rank: int) -> Any:
    local = num_experts // dist.get_world_size()
    return torch.where((idx >= rank * local) & (idx < (rank + 1) * local), idx - rank * local, -1)


def to_ranks(idx: Any, num_experts: int) -> Any:
    """bool [T, W]: which ranks have one of the token's experts."""
    world = dist.get_world_size()
    return torch.stack([(local_ids(idx, num_experts, r) >= 0).any(1) for r in range(world)], 1).view(len(idx), world)


def shuffled(things: Any) -> Any:
    """In another order: places that kernels take by atomics."""
    order = torch.randperm(len(things))
    return things[order] if isinstance(things, torch.Tensor) else [things[i] for i in order.tolist()]


def padded(rows: Any, count: int, fill: Any) -> Any:
    return torch.cat([rows, torch.full((count - len(rows), *rows.shape[1:]), fill, dtype=rows.dtype)])


class Living:
    def __init__(self, explicitly_destroy: bool) -> None:
        self.explicitly_destroy = explicitly_destroy
        ALIVE.append(self)
        MADE.append(self)

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        ALIVE.remove(self)  # ValueError the second time
