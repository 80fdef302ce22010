"""What an engine is made for, how large its workspace is, and how its kernels are launched."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

REGISTERS = 65536  # of one multiprocessor
FUSED_TOKENS = 512  # up to here the dispatch finds its places itself
GROUP = 128  # columns that share an fp8 scale


@dataclasses.dataclass(frozen=True)
class Shape:
    """max_tokens: the most of one rank in one call. hidden: the widest row. capacity: batched rows of one local expert, 0: none."""

    world: int
    max_tokens: int
    hidden: int
    top_k: int
    num_experts: int
    dtype: Any
    quant: str = "none"
    capacity: int = 0

    @property
    def rows(self) -> int:
        """R: those that can come to a rank."""
        return self.world * self.max_tokens

    @property
    def experts_per_rank(self) -> int:
        return -(-self.num_experts // self.world)

    @property
    def fp8(self) -> bool:
        return self.quant == "fp8"

    def region_sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of each region."""
        world, item, batched = self.world, self.dtype.itemsize, self.experts_per_rank * self.capacity
        back = max(self.rows, self.max_tokens * self.top_k if self.capacity else 0)
        slots = self.rows * self.top_k * 4
        words = {"started": world, "pushed": world, "landed": back, "counts": world * self.num_experts, "counted": world}
        sizes = {name: 8 * count for name, count in words.items()} | {
            "ids": slots, "weights_0": slots, "weights_1": slots, "sources": 4 * batched, "back": back * self.hidden * item,
            "batched": batched * self.hidden * item, "rows": self.rows * self.hidden * (1 if self.fp8 else item),
            "scales": self.rows * (self.hidden // GROUP) * 4 if self.fp8 else 0,
        }  # fmt: skip
        return {name: sizes[name] for name in names}


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


@functools.cache
def next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def registers(warps: int, programs: int) -> int:
    """The most per thread with which that many programs fit on one multiprocessor; they are handed out in eights."""
    return REGISTERS // (32 * warps * programs) // 8 * 8


@functools.cache
def splits_of(tokens: int, width: int, processors: int, wanted: int = 0) -> tuple[int, int]:
    """(parts of a row so that few tokens still occupy all multiprocessors, columns of a part, whole groups)."""
    splits = wanted or max(1, min(8, processors // max(1, tokens)))
    columns = -(-width // (splits * GROUP)) * GROUP
    return -(-width // columns), columns
