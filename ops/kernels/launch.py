"""Runs an expert program's layers by the grouped GEMM: what lies where in memory, and which form of the kernel reads it so."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from moe_compile.ops.layout import Params
from moe_compile.ops.replay import start

from . import configs, fitting
from .layers import Columns, Layer
from .plan import Plan

MOST_TOGETHER = 4  # programs of a multiprocessor
CLEARING = 4  # programs that write an expert's padding
ALIGNMENT = 16  # bytes: of the addresses and strides that a descriptor takes
PRECISION = {torch.float32: "tf32x3"}  # three products of tf32: close to float32, on tensor cores


class Weights(NamedTuple):
    """How the products of a layer are read: the kernel's W_FROM and FORM, two operands, six strides (expert, in, out), and their type."""

    source: str
    form: str
    operands: tuple[Any, Any]
    strides: tuple[int, ...]
    transposed: bool
    dtype: torch.dtype


class Saves(NamedTuple):
    """Where products are kept for a backward: [N, OUT] by weight number, in the order of slots; ends int32 [E] of the experts in it."""

    products: Mapping[int, Any]
    ends: Any


def run(
    layers: tuple[Layer, ...], x_TH: Any, route_w: Any, weights: Params, biases: Params, top_k: int, plan: Plan, saves: Saves | None = None
) -> Any:
    """y [P, O]: the last layer's rows, sorted by expert in the plan's blocks; rows behind an expert's last are undefined.

    route_w: float [T, K] of the program's w, or None.
    """
    rows, gather = x_TH, not plan.in_place
    if not layers[0].products:
        rows, gather, layers = spread(x_TH, plan, top_k, layers[0], route_w), False, layers[1:]
    for layer in layers:
        shape = shape_of(layer, weights, plan.likely, plan.counts.shape[0], rows)
        tiles = configs.tiles(shape, plan.block_rows, rows is x_TH)
        saved = saves is not None and any(each.of in saves.products for each in layer.products)
        if tiles.stages > 3 and (saved or any(each.step > 1 for each in layer.products)):
            tiles = dataclasses.replace(tiles, stages=3)  # products are laid out anew, which takes shared memory too
        if plan.sparse and not tiles.persistent:
            tiles = configs.changed(tiles, shape, persistent=True)
        if gather and tiles.spread and describable(rows, layer.operand):
            rows, gather = spread(x_TH, plan, top_k), False
        rows, gather = _layer(layer, tiles, rows, gather, weights, biases, route_w, top_k, plan, saves), False
    return rows


def shape_of(layer: Layer, weights: Params, slots: int, experts: int, rows: Any) -> configs.Shape:
    """What the tiles of a layer are chosen by."""
    slot = weights.slots[layer.products[0].of]
    return configs.Shape(
        slots, experts, rows.shape[1], layer.width, len(layer.products), layer.operand.itemsize, slot.axes + ("" if slot.stacked else "*"),
        rows.device,
    )  # fmt: skip


def product(layer: Layer, rows_PI: Any, weights: Params, width: int, plan: Plan) -> Any:
    """[P, width] = rows by the layer's one weight, its outputs read as inputs."""
    layer = dataclasses.replace(layer, width=width, dtype=rows_PI.dtype)
    shape = shape_of(layer, weights, plan.rows.shape[0], plan.counts.shape[0], rows_PI)
    tiles = configs.tiles(shape, plan.block_rows, False)
    return _layer(layer, tiles, rows_PI, False, weights, weights, None, 1, plan, turned=True)


def _layer(
    layer: Layer, t: configs.Tiles, rows: Any, gather: bool, weights: Params, biases: Params, route_w: Any, top_k: int, plan: Plan,
    saves: Saves | None = None, turned: bool = False,
) -> Any:  # fmt: skip
    """out [P, width] of one layer; gather: rows are x, read through the plan's slots."""
    out = torch.empty((plan.slots.shape[0], layer.width), dtype=layer.dtype, device=rows.device)
    if t.rows != plan.block_rows:
        raise ValueError(f"tiles of {t.rows} rows do not fit the plan's blocks of {plan.block_rows}")
    if not out.numel():
        return out
    fitting.start(
        t, (layer, turned, rows.device), configs.smaller,
        lambda fit: _launch(layer, fit, rows, gather, weights, biases, route_w, top_k, plan, saves, turned, out),
        f"{layer} on {rows.device}",
    )  # fmt: skip
    return out


def _launch(
    layer: Layer, t: configs.Tiles, rows: Any, gather: bool, weights: Params, biases: Params, route_w: Any, top_k: int, plan: Plan,
    saves: Saves | None, turned: bool, out: Any,
) -> None:  # fmt: skip
    import triton

    from .epilogue import epilogue_of
    from .grouped_gemm import layer_kernel

    w = weights_of(layer, weights, t, turned)
    b, b_strides = biases_of(layer, biases)
    described = not gather and describable(rows, layer.operand)
    stored = describable(out, layer.dtype)
    a = descriptor(rows, [t.rows, t.depth]) if described else rows
    to = descriptor(out, [t.rows, t.cols // 2 if t.half else t.cols]) if stored else out
    early = t.early and starts_early(rows.device)
    z = [None if saves is None else saves.products.get(each.of) for each in layer.products]
    z = z if len(z) == 2 else [*z, None]
    kept = [*z, *_boxes_of_saved(layer, z, t), *(0 if each is None else each.stride(0) for each in z)]
    num_tiles = triton.cdiv(layer.width, t.cols)
    programs = in_turn(t, layer, plan, rows.device) if t.persistent else plan.blocks.shape[0] * num_tiles
    start(
        layer_kernel, (programs,),
        a, *w.operands, *b, route_w if layer.reads_w else plan.slots, to, plan.slots, plan.blocks, plan.num_blocks,
        rows.shape[1], layer.width, num_tiles, programs, rows.stride(0), out.stride(0), *w.strides, *b_strides, *kept,
        plan.counts, plan.firsts, plan.counts if saves is None else saves.ends, *columns(layer),
        EPILOGUE=epilogue_of(layer), READS_W=layer.reads_w, BIASES=len(layer.biases), TOP_K=top_k,
        A_FROM="gather" if gather else "tma" if described else "rows", W_FROM=w.source,
        W_TYPE=type_of(w.dtype), DTYPE=multiplied(layer.operand, rows.device), FORM=w.form, TRANSPOSED=w.transposed, SWAP=t.swap,
        EVEN=rows.shape[1] % t.depth == 0, PRECISION=PRECISION.get(layer.operand, "tf32"), STORE="tma" if stored else "ptr",
        BM=t.rows, BN=t.cols, BK=t.depth, HALF=t.half and stored, SKIP=t.skip, GROUP=t.group, PERSISTENT=t.persistent,
        num_warps=t.warps, num_stages=t.stages, EARLY=early, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def _boxes_of_saved(layer: Layer, z: Sequence[Any], t: configs.Tiles) -> list[Any]:
    """Descriptors for products that are saved, where no box reaches beyond the product's columns."""
    plain = layer.width % t.cols == 0 and all(each.step == 1 for each in layer.products)
    return [descriptor(each, [t.rows, t.cols]) if each is not None and plain and describable(each, each.dtype) else None for each in z]


def spread(x_TH: Any, plan: Plan, top_k: int, layer: Layer | None = None, route_w: Any = None, clear: bool = False) -> Any:
    """[P, H]: x's rows in sorted order, as the layer (one without products) changes them. clear: zeros behind an expert's last row, up to
    the end of its blocks."""
    from .epilogue import epilogue_of
    from .rows import spread_kernel

    tokens, hidden = x_TH.shape
    out = torch.empty((plan.slots.shape[0], hidden), dtype=x_TH.dtype if layer is None else layer.dtype, device=x_TH.device)
    if tokens and hidden:
        block, warps = _row_block(hidden)
        clearing = CLEARING * plan.counts.shape[0] if clear else 0
        start(
            spread_kernel, (tokens + clearing, -(-hidden // block)),
            x_TH, plan.rows, route_w if route_w is not None else plan.rows, out, plan.counts, plan.firsts, tokens, hidden, x_TH.stride(0),
            K=top_k, EPILOGUE=None if layer is None else epilogue_of(layer), READS_W=layer is not None and layer.reads_w, BLOCK=block,
            PARTS=CLEARING if clear else 0, ROWS=plan.block_rows, num_warps=warps,
        )  # fmt: skip
    return out


def unspread(x_TH: Any, drows_PH: Any, plan: Plan, layer: Layer, route_w: Any, dx_TH: Any, dw_TK: Any) -> None:
    """The backward of spread with a layer: writes dx [T, H] and, where wanted, dw float32 [T, K]."""
    from .epilogue import adjoint_of
    from .rows import unspread_kernel

    (tokens, hidden), top_k = x_TH.shape, plan.rows.shape[0] // max(1, x_TH.shape[0])
    if tokens and hidden:
        block, warps = _row_block(hidden)
        start(
            unspread_kernel, (tokens,),
            x_TH, drows_PH, plan.rows, route_w if route_w is not None else plan.rows, dx_TH, dw_TK, hidden, x_TH.stride(0), dx_TH.stride(0),
            K=top_k, KP=1 << max(0, top_k - 1).bit_length(), ADJOINT=adjoint_of(layer), READS_W=layer.reads_w, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def add_up(y_PO: Any, plan: Plan, weights_TK: Any, tokens: int, top_k: int, dtype: torch.dtype, into: Any = None) -> Any:
    """out [T, O] = sum_k weights[t, k] * y[rows[t, k]], in float32; `into` a tensor that is given for it."""
    from .rows import sum_kernel

    width = y_PO.shape[1]
    out = torch.empty((tokens, width), dtype=dtype, device=y_PO.device) if into is None else into
    if out.numel():
        block, warps = _row_block(width if tokens > 256 else min(width, 512))
        given, early = weights_TK is not None, plan.block_rows <= 32 and starts_early(y_PO.device)
        stride = 0
        if given:
            weights_TK = weights_TK if weights_TK.stride(1) == 1 else weights_TK.contiguous()
            stride = weights_TK.stride(0)
        start(
            sum_kernel, (tokens, -(-width // block)),
            y_PO, plan.rows, weights_TK if given else plan.rows, out, width, stride, K=top_k, WEIGHTED=given, BLOCK=block, EARLY=early,
            num_warps=warps, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out


def to_slots(y_PO: Any, plan: Plan, slots: int) -> Any:
    """[N, O] in slot order, zero for slots without an expert."""
    return add_up(y_PO, plan, None, slots, 1, y_PO.dtype)


# ---------------------------------------------------------------- where parameters lie
def weights_of(layer: Layer, weights: Params, t: configs.Tiles | None = None, turned: bool = False) -> Weights:
    """How the kernel reads the layer's weights; without tiles, by addresses and two products apart. turned: outputs as inputs."""
    first, second = two(layer.products)
    slots = [weights.slots[each.of] for each in (first, second)]
    tensors = [weights.tensors[slot.first] for slot in slots]
    if (slots[0].stacked, slots[0].axes, tensors[0].dtype) != (slots[1].stacked, slots[1].axes, tensors[1].dtype):
        raise ValueError("both weights of a layer must be stacked or both lists, with axes in the same order and of one dtype")
    transposed = (slots[0].axes == "io") != turned
    form = _form(layer, weights) if t is not None else "one" if len(layer.products) == 1 else "apart"
    strides = tuple(s for slot, tensor in zip(slots, tensors, strict=True) for s in strides_of(slot, tensor, turned))
    if not slots[0].stacked:
        lists = [alike(weights.tensors[slot.first : slot.first + slot.num]) for slot in slots]
        strides = tuple(s for slot, own in zip(slots, lists, strict=True) for s in strides_of(slot, own[0], turned))
        tables = [table(own) for own in (lists if slots[0] != slots[1] else lists[:1])]
        return Weights("table", "apart" if form == "halves" else form, (tables[0], tables[-1]), strides, transposed, tensors[0].dtype)
    if t is not None and t.described and _boxed(layer, form, tensors, transposed):
        cols = t.cols * (2 if form == "pairs" else 1)
        # with swap, both halves in one box would go through registers, which the next step's would overwrite (docs/kernels.md)
        if form == "halves" and not transposed and not t.swap:
            tensor = tensors[0]
            view = tensor.view(2 * tensor.shape[0], tensor.shape[1] // 2, tensor.shape[2]) if tensor.is_contiguous() else None
            if view is not None:
                box = descriptor(view, [2, t.cols, t.depth])
                return Weights("tma", form, (box, box), strides, False, tensor.dtype)
        boxes = [descriptor(tensor, [1, t.depth, cols] if transposed else [1, cols, t.depth]) for tensor in tensors]
        return Weights("tma", "apart" if form == "halves" else form, (boxes[0], boxes[1]), strides, transposed, tensors[0].dtype)
    return Weights("stack", "apart" if form == "halves" else form, (tensors[0], tensors[1]), strides, transposed, tensors[0].dtype)


def _boxed(layer: Layer, form: str, tensors: Sequence[Any], transposed: bool) -> bool:
    """Can descriptors bring the products' columns: next to each other, and from a multiple of 16 bytes on where they lie along memory?"""
    step = 2 if form == "pairs" else 1
    unit = ALIGNMENT // layer.operand.itemsize
    begin = [0] if form == "pairs" else [each.start for each in layer.products]
    return (
        all(describable(tensor, layer.operand) for tensor in tensors)
        and all(each.step == step for each in layer.products)
        and not (transposed and any(start % unit for start in begin))
    )


def _form(layer: Layer, weights: Params) -> str:
    if len(layer.products) == 1:
        return "one"
    first, second = layer.products
    if first.of == second.of and weights.fan(first.of)[1] == 2 * layer.width:
        if (first.start, first.step, second.start, second.step) == (0, 1, layer.width, 1):
            return "halves"
        if (first.start, first.step, second.start, second.step) == (0, 2, 1, 2):
            return "pairs"
    return "apart"


def two(columns: tuple[Columns, ...]) -> tuple[Columns, Columns]:
    """The first and the last; the kernel reads the second only where there are two."""
    if not columns:
        return Columns(0, 0, 0), Columns(0, 0, 0)
    return columns[0], columns[-1]


def columns(layer: Layer) -> list[int]:
    """Start and step of both products and both biases."""
    return [number for each in (*two(layer.products), *two(layer.biases)) for number in (each.start, each.step)]


def strides_of(slot: Any, tensor: Any, turned: bool = False) -> tuple[int, int, int]:
    """(expert, in, out) of a weight."""
    expert, *rest = tensor.stride() if slot.stacked else (0, *tensor.stride())
    return (expert, rest[0], rest[1]) if (slot.axes == "io") != turned else (expert, rest[1], rest[0])


def biases_of(layer: Layer, biases: Params) -> tuple[tuple[Any, Any], tuple[int, int]]:
    """Up to two stacked biases [E, O] with their strides; those of a list are stacked, which is small beside any weight."""
    if not layer.biases:
        return (None, None), (0, 0)
    own = [_stacked(biases, each.of) for each in two(layer.biases)]
    return (own[0], own[1]), (own[0].stride(0), own[1].stride(0))


def _stacked(biases: Params, j: int) -> Any:
    slot = biases.slots[j]
    whole = biases.tensors[slot.first] if slot.stacked else torch.stack(list(biases.tensors[slot.first : slot.first + slot.num]))
    return whole if whole.stride(1) == 1 else whole.contiguous()


def table(tensors: Any) -> Any:
    """int64 [E]: where each expert's tensor is. Written by a kernel from its arguments: capturable, and never out of date."""
    from .tables import address_kernel

    out = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for first in range(0, len(tensors), ADDRESSES):
        start(address_kernel, (1,), out, first, tuple(tensors[first : first + ADDRESSES]), num_warps=1)
    return out


def alike(tensors: Sequence[Any]) -> list[Any]:
    """The tensors of a list, with the first one's dtype and strides and from a multiple of 16 bytes on: those that differ as copies."""
    first = tensors[0] if 1 in tensors[0].stride() else tensors[0].contiguous()
    return [_like(tensor, first) for tensor in tensors]


def _like(tensor: Any, first: Any) -> Any:
    if tensor.dtype == first.dtype and tensor.stride() == first.stride() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return torch.empty_like(first).copy_(tensor)


ADDRESSES = 64  # of one launch


# ---------------------------------------------------------------- descriptors
def describable(tensor: Any, dtype: torch.dtype) -> bool:
    """Can a tensor memory access descriptor of the rows' dtype stand for it?"""
    if tensor.dtype != dtype or not _has_descriptors(tensor.device) or tensor.numel() == 0:
        return False
    unit = tensor.element_size()
    aligned = tensor.data_ptr() % ALIGNMENT == 0 and all(stride * unit % ALIGNMENT == 0 and stride > 0 for stride in tensor.stride()[:-1])
    return bool(aligned and tensor.stride(-1) == 1)


def descriptor(tensor: Any, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


@functools.lru_cache(maxsize=64)
def _has_descriptors(device: Any) -> bool:
    if device.type != "cuda":
        return True  # the interpreter
    return bool(torch.cuda.get_device_capability(device) >= (9, 0))


@functools.lru_cache(maxsize=64)
def starts_early(device: Any) -> bool:
    """Are there programmatic dependent launches? From compute capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def in_turn(t: configs.Tiles, layer: Layer, plan: Plan, device: Any) -> int:
    """Programs that take tiles in turn: one a multiprocessor, or where tiles are small for few rows as many as one holds at once."""
    if not plan.sparse:
        return processors(device)
    held = t.stages * t.depth * (t.rows + len(layer.products) * t.cols) + t.rows * t.cols
    return processors(device) * max(1, min(MOST_TOGETHER, configs.STAGED // (held * layer.operand.itemsize)))


@functools.lru_cache(maxsize=64)
def processors(device: Any) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


def type_of(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def multiplied(dtype: torch.dtype, device: Any) -> Any:
    """The type that tl.dot gets: Triton's interpreter multiplies the bits of bfloat16."""
    return type_of(torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" else dtype)


def _row_block(width: int) -> tuple[int, int]:
    """(columns, warps) of a program that moves rows."""
    block = min(4096, max(32, 1 << max(0, width - 1).bit_length()))
    block = min(block, 2048)
    return block, max(1, min(8, block // 512))
