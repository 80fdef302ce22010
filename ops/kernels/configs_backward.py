"""Tile sizes of the backward's kernels, by shape alone, as configs.py's are for the forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .tiles import power

STAGED = 224 * 1024  # bytes of shared memory for tiles under way


@dataclass(frozen=True)
class Piece:
    """Rows and columns that a program has in registers at a time. each: programs of a multiprocessor. in_place: h over dh."""

    rows: int
    cols: int
    warps: int
    each: int
    in_place: bool


@dataclass(frozen=True)
class Grid:
    """rows, cols, depth of a tile. each: programs of a multiprocessor. flat: the loops over tiles and their steps become one."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    each: int = 1
    flat: bool = False


def block_rows(slots: int, experts: int) -> int:
    """A backward is bound by products, not by reading weights, unless experts have few rows."""
    rows = slots / max(1, experts)
    return 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128


def reverse_rows(block_rows: int, width: int) -> Piece:
    """Of the pass back through the epilogue: bound by memory. In place only where each number has one thread."""
    cols = min(512, power(width, 16))
    while cols > 128 and -(-width // cols) * cols > 1.1 * width:
        cols //= 2
    rows = min(block_rows, 16, 2048 // cols)
    return Piece(rows, cols, 4, 16, in_place=rows * cols >= 4 * 32 * 8)


def read_columns(hidden: int) -> int:
    """Columns of x that stand in sorted order at a time: half of many, for the gradients of weights have the most memory under way."""
    return max(1, hidden) if hidden < 1024 else -(-hidden // 256) * 128


def weight_tiles(high: int, wide: int, itemsize: int, block_rows: int) -> Grid:
    """Of an expert's gradient [high, wide] over its rows, in steps that a block holds several of."""
    cols = min(256 if itemsize == 2 else 128, power(wide, 16))
    t = Grid(min(128, power(high, 16)), cols, min(64, block_rows), 8, 4, flat=True)
    while t.stages > 2 and t.stages * t.depth * (t.rows + t.cols) * itemsize > STAGED:
        t = replace(t, stages=t.stages - 1)
    return replace(t, warps=t.warps if t.rows * t.cols >= 4096 else 4)


def smaller(t: Grid) -> Grid | None:
    """What to try where tiles do not fit in a device's shared memory: fewer under way, then smaller ones. None: there are none."""
    if t.stages > 2:
        return replace(t, stages=t.stages - 1)
    return replace(t, cols=t.cols // 2, stages=3) if t.cols > 16 else None
