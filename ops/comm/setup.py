"""What a graph says of the ranks that share its experts, and of what they exchange: a text, as an op takes no process group.

"hidden=64,top_k=2,num_experts=8,dtype=bfloat16,quant=none,max_tokens=4096,timeout=300.0,capacity=0,overflow=error,
cuda_graphs=False,ids_valid=True,group=3"
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@dataclasses.dataclass(frozen=True)
class Setup:
    """One layer's exchange. Layers that say the same share their provider's state.

    group: name of the process group whose ranks share the experts. hidden, top_k, num_experts (of all ranks), dtype: of the tokens.
    quant: of the rows on the wire. max_tokens: the most a rank dispatches, 0: unknown. timeout: seconds to wait for another rank.
    capacity, overflow: as in ParallelConfig; 0: as many as can come. cuda_graphs: no call may read anything back to the host.
    ids_valid: each of a token's ids names an expert, and no expert twice.
    """

    group: str
    hidden: int
    top_k: int
    num_experts: int
    dtype: str = "float32"
    quant: str = "none"
    max_tokens: int = 0
    timeout: float = 300.0
    capacity: int = 0
    overflow: str = "error"
    cuda_graphs: bool = False
    ids_valid: bool = False

    @property
    def text(self) -> str:
        fields = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if f.name != "group"]
        return ",".join([*fields, f"group={self.group}"])

    @classmethod
    def parse(cls, text: str) -> Setup:
        """The setup of a text. Raises ValueError if it is none."""
        return _parse(text)

    @property
    def torch_dtype(self) -> Any:
        return getattr(torch, self.dtype)

    @property
    def process_group(self) -> Any:
        """Raises RuntimeError if no such group exists in this process."""
        try:
            return distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type,unused-ignore]
        except Exception as error:
            raise RuntimeError(
                f"the compiled graph exchanges tokens over process group {self.group!r}, which this process does not have ({error}); "
                "it was compiled before torch.distributed was initialised again: compile the model anew"
            ) from error

    @property
    def world(self) -> int:
        return dist.get_world_size(self.process_group)


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Setup:
    head, found, group = text.partition("group=")
    try:
        given = dict(part.split("=") for part in head.split(",") if part)
        fields = {f.name: _READ[str(f.type)](given[f.name]) for f in dataclasses.fields(Setup) if f.name != "group"}
        if not found:
            raise KeyError("group")
        return Setup(group, **fields)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{text!r} is no parallel setup ({error!r}); take it from Setup(...).text") from error


_READ: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": {"True": True, "False": False}.__getitem__}


def chunk_size(num_experts: int, world: int) -> int:
    """Experts of a rank, of the last ones maybe fewer: expert e is on rank e // chunk, as torch.chunk and DTensor's Shard(0) cut."""
    return -(-num_experts // world)


def local_range(num_experts: int, world: int, rank: int) -> tuple[int, int]:
    """(first, end) of a rank's experts."""
    size = chunk_size(num_experts, world)
    return min(rank * size, num_experts), min((rank + 1) * size, num_experts)
