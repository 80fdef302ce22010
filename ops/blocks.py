"""Cuts the slots sorted by expert into blocks of rows that are worked off together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Block(NamedTuple):
    """Rows start..stop of the sorted slots: runs of one expert each, by expert and length."""

    start: int
    stop: int
    experts: list[int]
    sizes: list[int]

    @property
    def mean_rows(self) -> int:
        """Mean rows an expert."""
        return (self.stop - self.start) // len(self.sizes)


def cut(ends: Sequence[int], rows_per_block: int) -> list[Block]:
    """Blocks of at most rows_per_block rows. Experts stay whole, but for those of more rows, which are split evenly.

    ends: the end of each expert's rows, ascending (offsets of quantize_dispatch).
    """
    blocks: list[Block] = []
    block = Block(0, 0, [], [])
    start = 0
    for expert, end in enumerate(ends):
        if block.sizes and end - block.start > rows_per_block:
            blocks.append(block._replace(stop=start))
            block = Block(start, start, [], [])
        for pieces in range(-(-(end - start) // rows_per_block), 0, -1):  # how many are left
            size = -(-(end - start) // pieces)
            block.experts.append(expert)
            block.sizes.append(size)
            start += size
            if pieces > 1:
                blocks.append(block._replace(stop=start))
                block = Block(start, start, [], [])
    return [*blocks, block._replace(stop=start)] if block.sizes else blocks


def split(block: Block, rows: Any, dim: int = 0) -> Sequence[Any]:
    """A view a run, of rows (or of columns, dim 1) of the block; far cheaper than slicing run by run."""
    views: Sequence[Any] = torch.split_with_sizes(rows, block.sizes, dim)
    return views
