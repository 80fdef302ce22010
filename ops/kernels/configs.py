"""Which tile sizes a layer's GEMM takes: the only file with policy for kernels.

What was measured for such a layer on such a device is taken first (tuned.py). The rules here choose by shape alone, from what the host
knows (slots, experts, widths, element size): rows an expert, on average, tell whether reading weights or multiplying is the bound.
Measured on H200s; see benchmarks/notes.md.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from . import tuned
from .tiles import Shape as Shape
from .tiles import Strip as Strip
from .tiles import Tiles as Tiles
from .tiles import power

STAGED = 224 * 1024  # bytes of shared memory that tiles under way may take; an H100 or H200 has 227 KiB a program


FEW_SLOTS = 16  # up to so many, of up to FEW_TOKENS tokens, each slot is computed by itself
FEW_TOKENS = 1


def few(tokens: int, top_k: int) -> bool:
    return tokens <= FEW_TOKENS and tokens * top_k <= FEW_SLOTS


def strip(shape: Shape, along: bool, last: bool, paired: bool = False, plain: bool = False) -> Strip:
    """along: inputs are next to each other in memory. last: the layer adds up the slots; one load covers its inner width where it can.

    paired: columns of two products take turns in memory, a program reads both. plain: a last layer is a product and nothing more.
    """
    rule = functools.partial(_strip, shape, last, plain) if along else functools.partial(_strip_across, shape, last, paired)
    found: Strip = tuned.chosen(tuned.few_role(along, last), shape, 0, rule)
    return found


MOST_HELD = 32768  # numbers of all slots in the registers of a program with 8 warps


def _strip(shape: Shape, last: bool, plain: bool = False) -> Strip:
    inner = power(shape.inner, 16)
    if not last:
        return Strip(2, min(1024, inner), 2)
    held = power(shape.slots) * inner
    if plain and held <= MOST_HELD:  # gemv_linear.py
        return Strip(1, inner, 8 if held > MOST_HELD // 2 else 4)
    if inner <= 1024:
        return Strip(2, inner, 2)
    return Strip(1, 2048, 1) if inner == 2048 else Strip(1, 4096, 4) if inner == 4096 else Strip(2, 2048, 2)


def at_once(strip: Strip, inner: int, slots: int) -> bool:
    """Can a program hold the inputs of a plain last layer's columns for all slots of a token?"""
    return strip.depth >= inner and strip.cols * strip.depth * power(slots) <= MOST_HELD


PROGRAMS = 512  # from which on enough loads are under way for memory's full rate
MOST_PARTS = 8  # of a layer's inputs
SUMMED = 64  # columns that a program adds up parts of


def _strip_across(shape: Shape, last: bool, paired: bool) -> Strip:
    """Columns lie next to each other: more of them for a program where there are many, else more inputs at a time."""
    if last or shape.products == 1:
        found = Strip(32, 256, 4)
    elif paired:
        found = Strip(16, 128, 8)
    elif shape.width * shape.slots >= 64 * PROGRAMS:
        found = Strip(64, 128, 8)
    else:
        found = Strip(32, 512, 4)
    return Strip(min(found.cols, power(shape.width, 16)), min(found.depth, power(shape.inner, 16)), found.warps)


def in_parts(strip: Strip, width: int, tokens: int) -> bool:
    """Are a token's columns too few programs?"""
    return -(-width // strip.cols) * tokens < PROGRAMS


def inputs_of_a_part(strip: Strip, inner: int, width: int, slots: int) -> int:
    """Inputs, a multiple of the strip's depth, that one program multiplies, so that there are enough programs."""
    programs = -(-width // strip.cols) * slots
    parts = min(MOST_PARTS, -(-PROGRAMS // programs), -(-inner // strip.depth))
    return -(-inner // (parts * strip.depth)) * strip.depth


def router(tokens: int, experts: int, groups: int) -> tuple[int, int]:
    """(tokens of a program, warps): one warp a token, while that many programs fill a device."""
    if experts > 512:
        return 1, 4
    return (1, 1) if tokens <= 1024 or groups > 1 else (4, 4)


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
SPREAD_ROWS = 192  # rows an expert from which it does: with fewer, much of a block is padding, which a gather leaves out
SKIP_ROWS = 768  # rows an expert up to which padding is left out: with more, the masks cost more


def tiles(shape: Shape, rows: int, first: bool) -> Tiles:
    """first: the layer reads x through slots."""
    found: Tiles = tuned.chosen(tuned.FIRST if first else tuned.NEXT, shape, rows, lambda: _tiles(shape, rows, first))
    return found


def _tiles(shape: Shape, rows: int, first: bool) -> Tiles:
    two = shape.products == 2
    if rows == 16:
        found = Tiles(rows, 64, 256, 4, 3, swap=True, early=True) if two else Tiles(rows, 128, 128, 4, 3, swap=True, early=True)
    elif rows == 32:
        found = Tiles(rows, 128, 128, 8, 3, swap=True, early=True) if two else Tiles(rows, 64, 128, 4, 4, swap=True, early=True)
    elif rows == 64 and shape.slots / shape.experts <= 48:
        found = Tiles(rows, 64 if two else 128, 64, 4, 4, skip=first)
    else:
        own = shape.slots / shape.experts
        spread = first and rows == 128 and shape.products * shape.width > SPREAD_WIDTH and own > SPREAD_ROWS
        skip = first and not spread and own <= SKIP_ROWS
        found = Tiles(rows, 128 if two else 256, 64, 8, 4, persistent=True, half=not two, spread=spread, skip=skip)
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
    cols = min(t.cols, power(shape.width, 16))
    depth = min(t.depth, power(shape.inner, 16))
    t = replace(t, cols=cols, depth=depth, half=t.half and cols >= 32)
    while _staged(t, shape) > STAGED and t.stages > 2:
        t = replace(t, stages=t.stages - 1)
    while _staged(t, shape) > STAGED and t.depth > 16:
        t = replace(t, depth=t.depth // 2)
    return t


def _staged(t: Tiles, shape: Shape) -> int:
    store = t.rows * t.cols * shape.itemsize // (2 if t.half else 1)
    return t.stages * t.depth * (t.rows + shape.products * t.cols) * shape.itemsize + (store if t.persistent else 0)
