"""Which tile sizes a layer's GEMM takes: the only file with policy for kernels.

What was measured for such a layer on such a device is taken first (tuned.py). The rules here choose by shape alone, from what the host
knows (slots, experts, widths, element size): rows an expert, on average, tell whether reading weights or multiplying is the bound.
Measured on H200s; see benchmarks/notes.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import tuned
from .tiles import Shape as Shape
from .tiles import Strip as Strip
from .tiles import Tiles as Tiles

STAGED = 224 * 1024  # bytes of shared memory that tiles under way may take; an H100 or H200 has 227 KiB a program


FEW_SLOTS = 16  # up to so many, of up to FEW_TOKENS tokens, each slot is computed by itself
FEW_TOKENS = 1


def few(tokens: int, top_k: int) -> bool:
    return tokens <= FEW_TOKENS and tokens * top_k <= FEW_SLOTS


def strip(shape: Shape, along: bool, last: bool) -> Strip:
    """along: inputs are next to each other in memory. last: the layer adds up the slots; one load covers its inner width where it can."""
    found: Strip = tuned.chosen(tuned.few_role(along, last), shape, 0, lambda: _strip(shape, along, last))
    return found


def _strip(shape: Shape, along: bool, last: bool) -> Strip:
    if not along:
        return Strip(min(128, max(16, _power(shape.width))), 16, 4)
    inner = max(16, _power(shape.inner))
    if not last:
        return Strip(2, min(1024, inner), 2)
    if inner <= 1024:
        return Strip(2, inner, 2)
    return Strip(1, 2048, 1) if inner == 2048 else Strip(1, 4096, 4) if inner == 4096 else Strip(2, 2048, 2)


def block_rows(shape: Shape) -> int:
    """Rows of a block: all layers of a call share them. Few experts have large weights, which a second block would read again."""
    found: int = tuned.chosen(tuned.ROWS, shape, 0, lambda: _block_rows(shape))
    return found


def _block_rows(shape: Shape) -> int:
    rows = shape.slots / max(1, shape.experts)
    if rows <= 8:
        return 16
    if rows <= 24:
        return 32
    return 64 if rows <= (40 if shape.experts <= FEW_EXPERTS else 96) else 128


FEW_EXPERTS = 16
SPREAD_WIDTH = 2048  # columns from which sorting the rows first costs less than gathering them again for each tile of columns


def tiles(shape: Shape, rows: int, first: bool) -> Tiles:
    """first: the layer reads x through slots."""
    found: Tiles = tuned.chosen(tuned.FIRST if first else tuned.NEXT, shape, rows, lambda: _tiles(shape, rows, first))
    return found


def _tiles(shape: Shape, rows: int, first: bool) -> Tiles:
    two = shape.products == 2
    if rows == 16:
        found = Tiles(rows, 64, 256, 4, 3, 1, swap=True, early=True) if two else Tiles(rows, 128, 128, 4, 3, 1, swap=True, early=True)
    elif rows == 32:
        found = Tiles(rows, 128, 128, 8, 3, 1, swap=True, early=True) if two else Tiles(rows, 64, 128, 4, 4, 4, swap=True, early=True)
    elif rows == 64 and shape.slots / shape.experts <= 48:
        found = Tiles(rows, 64, 64, 4, 4, spread=first) if two else Tiles(rows, 128, 64, 4, 4, spread=first)
    else:
        group = 1 if shape.experts <= FEW_EXPERTS and shape.slots / shape.experts <= 96 else 8  # about one block an expert
        spread = first and rows == 128 and shape.products * shape.width > SPREAD_WIDTH
        found = Tiles(rows, 128 if two else 256, 64, 8, 4, group, persistent=True, half=not two, spread=spread)
    return _fitted(found, shape)


def smaller(t: Tiles) -> Tiles | None:
    """What to try where tiles do not fit in a device's shared memory: fewer under way, then smaller ones. None: there are none."""
    if t.stages > 2:
        return replace(t, stages=t.stages - 1)
    if t.depth > 16:
        return replace(t, depth=t.depth // 2, stages=3)
    return replace(t, cols=t.cols // 2, half=False) if t.cols > 16 else None


def changed(t: Tiles, shape: Shape, **fields: Any) -> Tiles:
    """Tiles with other values, made to fit."""
    return _fitted(replace(t, **fields), shape)


def _fitted(t: Tiles, shape: Shape) -> Tiles:
    """Smaller where the matrices are, and where elements are wide: tiles of all stages have to fit in shared memory."""
    cols = min(t.cols, max(16, _power(shape.width)))
    depth = min(t.depth, max(16, _power(shape.inner)))
    t = replace(t, cols=cols, depth=depth, half=t.half and cols >= 32)
    while _staged(t, shape) > STAGED and t.stages > 2:
        t = replace(t, stages=t.stages - 1)
    while _staged(t, shape) > STAGED and t.depth > 16:
        t = replace(t, depth=t.depth // 2)
    return t


def _staged(t: Tiles, shape: Shape) -> int:
    store = t.rows * t.cols * shape.itemsize // (2 if t.half else 1)
    return t.stages * t.depth * (t.rows + shape.products * t.cols) * shape.itemsize + (store if t.persistent else 0)


def _power(size: int) -> int:
    """The least power of two that is not below size."""
    return 1 << max(0, size - 1).bit_length()
