"""What `moe-compile tune` tries for quantised weights: the questions that launch_scaled.py asks, and answers near others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from moe_compile.ops.kernels import configs_scaled, launch_hopper, tuned
from moe_compile.ops.kernels.launch_scaled import KINDS, form_of
from moe_compile.ops.kernels.layers import Layer
from moe_compile.ops.kernels.tiles import Shape, Tiles
from moe_compile.ops.quantized import KINDS as WAYS
from moe_compile.ops.quantized import odd_inputs

DTYPES = ("bfloat16", "float16")
LAYOUTS = ("eoi", "eio")
MOST_STAGES = 6
GROUPS = (1, 4, 8, 16)
MULTIPLIED = 64  # columns that four warps multiply at a time; fewer are computed twice
MOST_COLS, MOST_PACKED = 256, 128  # of numbers of 4 bits: rows behind a layer are ordered within 128 columns
ROLES = (tuned.SCALED, tuned.SCALED_INNER)


def check(quant: str, dtype: str, layout: str) -> None:
    """Raises ValueError where layers with such weights have no kernels."""
    if quant not in WAYS:
        raise ValueError(f"quant is {quant!r}; give one of {', '.join(WAYS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r} with quantised weights; give one of {', '.join(DTYPES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r} with quantised weights; give one of {', '.join(LAYOUTS)}")
    if quant == "mxfp4" and layout != "eoi":
        raise ValueError(f"layout is {layout!r}, mxfp4 weights have inputs next to each other: give eoi")


def check_inputs(quant: str, fans: Sequence[tuple[int, int]]) -> None:
    for inputs, _ in fans:
        reason = odd_inputs(quant, inputs)
        if reason is not None:
            raise ValueError(f"{reason}; give other sizes or another --quant")


def singly(quant: str, fans: Sequence[tuple[int, int]]) -> bool:
    """Are few slots computed one by one? There is nothing to tune then."""
    return all(configs_scaled.few(KINDS[quant], inputs * outputs) for inputs, outputs in fans)


def questions(
    quant: str, layout: str, layers: Sequence[Layer], fans: Sequence[tuple[int, int]], slots: int, experts: int, hidden: int
) -> list[tuple[str, Shape]]:
    """(role, shape) of each layer with a product. fans: (inputs, outputs) of each weight."""
    own = [each for each in layers if each.products]
    inner, found = (layers[0].width if not layers[0].products else hidden), []
    for layer in own:
        shape = Shape(slots, experts, inner, layer.width, len(layer.products), layer.operand.itemsize, f"{layout[1:]}:{quant}")
        pairs = form_of(layer, fans[layer.products[0].of][1]) == "pairs"
        inside = KINDS[quant] == "fp8" and layer is not own[-1]
        found.append((configs_scaled.tiles_role(inside), configs_scaled.tiles_shape(shape, pairs)))
        inner = layer.width
    return found


def has_roles(quant: str, layers: Sequence[Layer]) -> bool:
    """Does this machine's GPU take the kernel for many rows of e4m3 (scaled_hopper.py), of which only the order of tiles is chosen?"""
    plain = all(not each.biases and not each.reads_w for each in layers if each.products)
    return KINDS[quant] == "fp8" and plain and torch.cuda.is_available() and launch_hopper.on_hopper(torch.device("cuda"))


def rows_shape(asked: Sequence[tuple[str, Shape]], roles: bool) -> Shape:
    shape = asked[0][1]
    return configs_scaled.rows_shape(replace(shape, layout=shape.layout.removesuffix(":pairs")), roles)


def block_rows(quant: str, asked: Sequence[tuple[str, Shape]], roles: bool) -> int:
    return configs_scaled.block_rows(rows_shape(asked, False), KINDS[quant], roles)


def tiles(quant: str, role: str, shape: Shape, rows: int) -> Tiles:
    plain = replace(shape, layout=shape.layout.removesuffix(":pairs"))
    return configs_scaled.tiles(plain, rows, KINDS[quant], plain != shape, role == tuned.SCALED_INNER)


CHANGES = (  # factors of two of cols and warps, and steps of stages
    (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (0, 0, 2), (1, 1, 0), (-1, -1, 0), (1, 0, -1), (-1, 0, 1),
    (1, 1, -1),
)  # fmt: skip


def near_tiles(t: Tiles, role: str, shape: Shape, roles: bool) -> Iterator[Tiles]:
    """Tiles that differ a little. How deep they are (what a scale holds), which of both is the M side, and with one scale's columns their
    number, stays. roles: as of has_roles."""
    for group in GROUPS:
        yield replace(t, group=group)
    if roles and t.rows == launch_hopper.ROWS:
        return
    for cols, warps, stages in CHANGES:
        yield from _sane(replace(t, cols=_scaled(t.cols, cols), warps=_scaled(t.warps, warps), stages=t.stages + stages), t, role, shape)
    yield replace(t, persistent=not t.persistent)
    yield replace(t, early=not t.early)


def _sane(t: Tiles, before: Tiles, role: str, shape: Shape) -> Iterator[Tiles]:
    both = t.cols * (2 if shape.layout.endswith(":pairs") else 1)
    held = t.rows * t.cols * shape.products / (32 * max(1, t.warps))
    whole = not t.swap or both >= MULTIPLIED * t.warps // 4
    most = MOST_PACKED if KINDS[shape.layout.split(":")[1]] in configs_scaled.PACKED else MOST_COLS
    sizes = 16 <= t.cols <= most and 2 <= t.warps <= 8 and 1 <= t.stages <= MOST_STAGES and held <= 128
    if sizes and whole and (role != tuned.SCALED_INNER or t.cols == before.cols):
        yield t


def _scaled(value: int, power: int) -> int:
    return value << power if power >= 0 else value >> -power


def quantised(quant: str, layout: str, weights: Sequence[Any]) -> list[Any]:
    """The op's tensors of stacked weights, which lie as the layout says: values, then scales, of each."""
    from moe_compile.ops.quantized import quantize_weights

    found: list[Any] = []
    for weight in weights:
        own = quantize_weights(weight, quant, axes=layout[1:])
        found += [own.values, own.scales]
    return found
