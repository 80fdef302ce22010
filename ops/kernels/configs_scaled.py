"""Tiles of the GEMMs with quantised weights: policy alone, as configs.py has it for others.

What was measured (tuned.py) is taken first, as there. A tile is as deep as a scale holds (128 inputs), and has the columns of one scale of
the next layer's rows (128). Weights that are turned into numbers in registers are the tensor core's M side, which can be read from there.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from . import tuned
from .configs import STAGED
from .tiles import Shape, Tiles, power

DEPTH = 128
COLS = 128
STAGES = 3  # more programs of a multiprocessor hide more than more tiles under way in each
DEEPER = 5  # but not where a last layer's programs are fewer than multiprocessors, as for one token
PROCESSORS = 132  # of an H100 or H200
MOST_TURNED = 1 << 24
PACKED = ("int4", "fp4")
BY_WARP = ("int8", "fp4")  # few rows are faster where each warp multiplies by itself (mma.sync: programs of fewer than four warps)


def few(kind: str, numbers: int) -> bool:
    """Take a token's slots each by itself? numbers: of an expert's weight. Turning many into numbers takes longer than multiplying them on
    the tensor core, whose tiles waste only what one slot does not use; numbers of 4 bits take long to turn at any size."""
    return kind not in PACKED and numbers < MOST_TURNED


def rows_shape(shape: Shape, roles: bool) -> Shape:
    """What the rows of blocks are known by."""
    return replace(shape, layout=f"{shape.layout}:roles") if roles else shape


def tiles_shape(shape: Shape, pairs: bool) -> Shape:
    """What a layer's tiles are known by."""
    return replace(shape, layout=f"{shape.layout}:pairs") if pairs else shape


def tiles_role(quantised_next: bool) -> str:
    return tuned.SCALED_INNER if quantised_next else tuned.SCALED


def block_rows(shape: Shape, kind: str, roles: bool) -> int:
    """Rows of a block, all layers of a call share them. roles: of warps in the kernel for many rows (scaled_hopper.py)."""
    found: int = tuned.chosen(tuned.SCALED_ROWS, rows_shape(shape, roles), 0, lambda: _block_rows(shape, kind, roles))
    return found


def _block_rows(shape: Shape, kind: str, roles: bool) -> int:
    rows = shape.slots / max(1, shape.experts)
    if rows <= 8:
        return 16
    if rows <= (40 if kind == "fp8" else 24):
        return 32
    return 128 if roles or (rows > 64 and kind in PACKED) else 64


def tiles(shape: Shape, rows: int, kind: str, pairs: bool, quantised_next: bool) -> Tiles:
    """kind: "fp8", "e4m3", "int8", "int4" or "fp4"; pairs: one tile holds the columns of two products."""
    rule = functools.partial(_tiles, shape, rows, kind, pairs, quantised_next)
    found: Tiles = tuned.chosen(tiles_role(quantised_next), tiles_shape(shape, pairs), rows, rule)
    return found


def _tiles(shape: Shape, rows: int, kind: str, pairs: bool, quantised_next: bool) -> Tiles:
    """As tiles.

    In e4m3 each step's sum is added up outside the tensor core, which others use meanwhile: programs share a multiprocessor. They do too
    where weights become numbers in registers, four warps for 64 columns: what a group of four multiplies at a time; or two, see BY_WARP.
    """
    few = rows <= 32
    cols = COLS // 2 if pairs and not quantised_next else COLS
    if kind == "fp8":
        warps = 4 if few or (rows == 64 and cols * (2 if pairs else 1) <= COLS) else 8
        alone = not quantised_next and -(-shape.width // cols) * min(shape.slots, shape.experts) < PROCESSORS
        t = Tiles(rows, cols, DEPTH, warps, (DEEPER if alone else STAGES) if few else 2, 1 if few else 8, swap=few, early=few)
    else:
        by_warp = rows == 16 and kind in BY_WARP
        cols = cols if (few and kind != "fp4" and not by_warp) or quantised_next else cols // 2
        t = Tiles(rows, cols, DEPTH, 2 if by_warp else 4, STAGES, 1 if few else 8, swap=True, early=few, spread=rows >= 64)
    while t.stages > 2 and staged(t, shape, kind, pairs) > STAGED:
        t = replace(t, stages=t.stages - 1)
    return t


def smaller(t: Tiles) -> Tiles | None:
    """What to try where tiles do not fit in a device's shared memory; None: nothing else."""
    return replace(t, stages=t.stages - 1) if t.stages > 1 else None


def staged(t: Tiles, shape: Shape, kind: str, pairs: bool) -> int:
    """Bytes of shared memory of the tiles under way."""
    bits = 4 if kind in ("int4", "fp4") else 8
    cols = t.cols * (2 if pairs else shape.products)
    item = 1 if kind == "fp8" else shape.itemsize
    store = t.rows * t.cols * shape.itemsize if t.persistent else 0
    return t.stages * t.depth * (t.rows * item + cols * bits // 8) + store


MOST_HELD = 32768  # numbers of all slots in the registers of a program with 8 warps


def at_once(inner: int, top_k: int) -> int:
    """Warps of a program that holds a plain last layer's column, `inner` bytes, for all slots of a token; 0: there are too many."""
    held = inner * power(top_k)
    if held > MOST_HELD:
        return 0
    return 8 if held > MOST_HELD // 2 else 4 if held > 2048 else 2


STRIP = 2048  # bytes of each column that a program of the kernels for single slots holds


def strip(units: int, per_group: int, size: int, transposed: bool, last: bool) -> tuple[int, int, int]:
    """(columns, groups of inputs, warps) of a program for single slots; units of `size` bytes along the inputs, per_group with one scale.

    last: the layer adds up the slots, one load covers its inputs where it can.
    """
    if transposed:
        return 64, 1, 4
    most = 2 * STRIP if last else STRIP
    groups = 1
    while groups * per_group * size < most and groups * per_group < units:
        groups *= 2
    held = groups * per_group * size
    warps = max(1, min(4, held // 1024))
    return max(1 if held > STRIP else 2, 2 * 32 * warps // (groups * per_group)), groups, warps  # two units a thread at least
