"""Tile sizes of the backward's kernels, by shape alone, as configs.py's are for the forward."""

from __future__ import annotations

from dataclasses import dataclass

STAGED = 200 * 1024  # bytes of shared memory for tiles under way


@dataclass(frozen=True)
class Grid:
    """rows, cols, depth of a tile; group: blocks that share a weight tile in L2."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    described: bool = True


def block_rows(slots: int, experts: int) -> int:
    """A backward is bound by products, not by reading weights, unless experts have few rows."""
    rows = slots / max(1, experts)
    return 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128


def reverse_tiles(rows: int, width: int, inner: int, itemsize: int) -> Grid:
    """Of dh = grad @ W.T, whose epilogue holds two products and as many gradients in registers: few columns."""
    return _fitted(rows, min(64, _power(width)), min(64, _power(inner)), itemsize, 8 if rows >= 64 else 4)


def weight_tiles(fan_in: int, fan_out: int, itemsize: int) -> Grid:
    """Of rows.T @ grad: an expert's matrix, over its rows."""
    return _fitted(min(128, _power(fan_in)), min(256 if itemsize == 2 else 128, _power(fan_out)), 64, itemsize, 8)


def _fitted(rows: int, cols: int, depth: int, itemsize: int, warps: int) -> Grid:
    stages = 4
    while stages > 2 and stages * depth * (rows + cols) * itemsize > STAGED:
        stages -= 1
    return Grid(rows, cols, depth, warps if rows * cols >= 4096 else 4, stages)


def _power(size: int) -> int:
    """The least power of two that is not below size, 16 or more."""
    return 1 << max(4, (size - 1).bit_length())
