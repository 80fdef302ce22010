"""Runs an expert program's layers with quantised weights: which rows each layer reads, and how its kernel reads the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from moe_compile.ops.layout import Params
from moe_compile.ops.quantized import BLOCK, LONGEST_ROW, ROWS_TOO, Quantized
from moe_compile.ops.replay import start

from . import configs_scaled, fitting, launch_batched, launch_hopper
from .launch import (
    ALIGNMENT,
    PRECISION,
    biases_of,
    columns,
    describable,
    descriptor,
    in_turn,
    multiplied,
    spread,
    starts_early,
    two,
)
from .layers import Layer
from .plan import Plan
from .tiles import Shape, Tiles

E4M3 = torch.float8_e4m3fn
RUNS = {"int4": 4, "fp4": 4}
# what a kernel multiplies: "fp8" with rows in e4m3, the others as the rows' type
KINDS = {
    "fp8_block": "fp8", "fp8_channel": "fp8", "fp8_block_w": "e4m3", "fp8_channel_w": "e4m3", "mxfp4": "fp4", "int8": "int8",
    "int4": "int4",
}  # fmt: skip


class Rows(NamedTuple):
    """A layer's rows. scales: float32 [ceil(width / 128), P] (mode "step"), [P] ("once") or None ("none"). gather: read through slots."""

    values: Any
    scales: Any
    mode: str
    gather: bool = False


class Operands(NamedTuple):
    """How the kernel reads a layer's weights; both of two values each, strides as (expert, in, out) of each."""

    kind: str
    form: str
    values: tuple[Any, Any]
    strides: tuple[int, ...]
    scales: tuple[Any, Any]
    scale_strides: tuple[int, ...]
    per: int  # numbers of a unit of memory
    mode: str
    out_block: int
    transposed: bool
    inner: int
    units: int
    steps: int
    layout: str  # axes and kind of the weights, for Shape


def run(
    layers: tuple[Layer, ...], x_TH: Any, route_w: Any, weights: list[Quantized], biases: Params, top_k: int, plan: Plan,
    x_scales: Any = None,
) -> Any:  # fmt: skip
    """y [P, O] as launch.run. x_TH: of a float type, or e4m3 with x_scales float32 [T, ceil(H / 128)] or [T, 1]."""
    changed, layers = (layers[0], layers[1:]) if not layers[0].products else (None, layers)
    own = [operands_of(layer, weights) for layer in layers]
    _check_rows(x_TH, x_scales, own[0], changed is not None)
    x_TH = x_TH if x_TH.stride(-1) == 1 else x_TH.contiguous()
    rows = enter(own[0], layers[0], x_TH, x_scales, changed, route_w, top_k, plan)
    for i, layer in enumerate(layers):
        follows = own[i + 1] if i + 1 < len(own) else None
        if follows is not None and follows.inner != layer.width:
            raise ValueError(f"weights of layer {i + 1} have {follows.inner} inputs, layer {i} gives {layer.width} columns")
        rows = _layer(layer, own[i], follows, rows, biases, route_w, top_k, plan)
    return rows.values


def block_rows(layers: tuple[Layer, ...], weights: list[Quantized], slots: int, num_experts: int) -> int:
    """Rows of the plan's blocks."""
    layers = tuple(each for each in layers if each.products)
    every = [operands_of(layer, weights) for layer in layers]
    own, layer = every[0], layers[0]
    shape = _shape(layer, own, slots, num_experts)
    roles = all(launch_hopper.suits(each, its, weights[0].values.device) for each, its in zip(layers, every, strict=True))
    return configs_scaled.block_rows(shape, own.kind, roles)


def _shape(layer: Layer, own: Operands, slots: int, num_experts: int) -> Shape:
    device = own.values[0].device
    return Shape(slots, num_experts, own.inner, layer.width, len(layer.products), layer.operand.itemsize, own.layout, device)


def on_a_gpu(device: Any) -> bool:
    """Not in Triton's interpreter, which takes no assembly."""
    return bool(device.type == "cuda")


# ---------------------------------------------------------------- rows
def enter(first: Operands, layer: Layer, x_TH: Any, x_scales: Any, changed: Layer | None, route_w: Any, top_k: int, plan: Plan) -> Rows:
    """x as the first layer reads it: in sorted order, but for few rows and weights of a byte. changed: a layer without products before."""
    if plan.in_place and changed is None and first.per == 1:
        return _in_place(first, x_TH, x_scales, plan)
    if x_scales is not None:
        return _take(x_TH, x_scales, top_k, plan)
    if first.kind == "fp8":
        return _quantize(x_TH, first.mode == "step", changed, layer.operand, route_w, top_k, plan)
    if first.per > 1:
        return Rows(_in_runs(x_TH, first.per, layer.operand, changed, route_w, top_k, plan), None, "none")
    if changed is not None:
        return Rows(spread(x_TH, plan, top_k, changed, route_w), None, "none")
    if plan.block_rows >= 64 and describable(x_TH, layer.operand):
        return Rows(spread(x_TH, plan, top_k), None, "none")
    return Rows(x_TH, None, "none", gather=True)


def _in_place(first: Operands, x_RH: Any, x_scales: Any, plan: Plan) -> Rows:
    """Rows of the batched format where they are, those within the counts quantised for e4m3 weights."""
    if x_scales is None and first.kind != "fp8":
        return Rows(x_RH, None, "none")
    grouped = (first.mode == "step" or x_RH.shape[1] > LONGEST_ROW) if x_scales is None else x_scales.shape[1] > 1
    if x_scales is None:
        x_RH, scales = launch_batched.quantize(x_RH, grouped, plan)
    else:
        scales = launch_batched.turn_scales(x_scales, plan) if grouped else x_scales.reshape(1, -1)
    return Rows(x_RH, scales, "step") if grouped else Rows(x_RH, scales.view(-1), "once")


def _quantize(x_TH: Any, grouped: bool, changed: Layer | None, dtype: torch.dtype, route_w: Any, top_k: int, plan: Plan) -> Rows:
    """e4m3 with scales of 128 columns (grouped) or of a row."""
    from .epilogue import epilogue_of
    from .scaled_rows import quantize_kernel

    tokens, hidden = x_TH.shape
    grouped = grouped or hidden > LONGEST_ROW
    total = plan.slots.shape[0]
    out = torch.empty((total, hidden), dtype=E4M3, device=x_TH.device)
    scales = torch.empty((-(-hidden // BLOCK) if grouped else 1, total), dtype=torch.float32, device=x_TH.device)
    block = max(BLOCK, 1 << (hidden - 1).bit_length())
    block = min(block, 2048) if grouped else block
    if tokens:
        start(
            quantize_kernel, (tokens, -(-hidden // block)),
            x_TH, plan.rows, plan.rows if route_w is None else route_w, out, scales, hidden, total, x_TH.stride(0), K=top_k,
            EPILOGUE=None if changed is None else epilogue_of(changed), READS_W=changed is not None and changed.reads_w,
            DTYPE=multiplied(dtype, x_TH.device), GROUP=BLOCK if grouped else block, BLOCK=block, BY_HAND=not on_a_gpu(x_TH.device),
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return Rows(out, scales, "step") if grouped else Rows(out, scales.view(-1), "once")


def _take(x_TH: Any, x_scales: Any, top_k: int, plan: Plan) -> Rows:
    """e4m3 rows, which an exchange brought, in sorted order."""
    from .scaled_rows import take_kernel

    tokens, hidden = x_TH.shape
    total, groups = plan.slots.shape[0], x_scales.shape[1]
    out = torch.empty((total, hidden), dtype=E4M3, device=x_TH.device)
    scales = torch.empty((groups, total), dtype=torch.float32, device=x_TH.device)
    block = min(4096, max(BLOCK, 1 << (hidden - 1).bit_length()))
    if tokens:
        start(
            take_kernel, (tokens, -(-hidden // block)),
            x_TH, x_scales, plan.rows, out, scales, hidden, groups, total, x_TH.stride(0), *x_scales.stride(), K=top_k, BLOCK=block,
            GROUPS=1 << (groups - 1).bit_length(), num_warps=max(1, min(8, block // 1024)),
        )  # fmt: skip
    return Rows(out, scales, "step") if groups > 1 or hidden <= BLOCK else Rows(out, scales.view(-1), "once")


def _in_runs(x_TH: Any, runs: int, dtype: torch.dtype, changed: Layer | None, route_w: Any, top_k: int, plan: Plan) -> Any:
    """[P, H rounded up to 128], each 128 columns as the units of 4-bit weights lie."""
    from .epilogue import epilogue_of
    from .scaled_rows import runs_kernel

    tokens, hidden = x_TH.shape
    wide = _rounded(hidden)
    out = torch.empty((plan.slots.shape[0], wide), dtype=dtype, device=x_TH.device)
    block = min(2048, 1 << (wide - 1).bit_length())
    if tokens:
        start(
            runs_kernel, (tokens, -(-wide // block)),
            x_TH, plan.rows, plan.rows if route_w is None else route_w, out, hidden, wide, x_TH.stride(0), K=top_k,
            EPILOGUE=None if changed is None else epilogue_of(changed), READS_W=changed is not None and changed.reads_w, RUNS=runs,
            BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return out


# ---------------------------------------------------------------- layers
def _layer(
    layer: Layer, own: Operands, follows: Operands | None, rows: Rows, biases: Params, route_w: Any, top_k: int, plan: Plan
) -> Rows:  # fmt: skip
    """The layer's rows, as the layer that follows reads them."""
    out = _room(layer, follows, plan)
    if not out.values.numel():
        return out
    shape = _shape(layer, own, plan.likely, plan.counts.shape[0])
    t = configs_scaled.tiles(shape, plan.block_rows, own.kind, own.form == "pairs", out.scales is not None)
    if launch_hopper.takes(layer, own, rows, out, plan):
        launch_hopper.run(layer, own, rows, out, plan, t.group)
        return out
    t = replace(t, persistent=t.persistent or plan.sparse)
    fitting.start(
        t, (layer, own.kind, out.values.device), configs_scaled.smaller,
        lambda fit: _launch(layer, fit, own, follows, rows, out, biases, route_w, top_k, plan),
        f"{layer} with {own.kind} weights on {out.values.device}",
    )  # fmt: skip
    return out


def _room(layer: Layer, follows: Operands | None, plan: Plan) -> Rows:
    """Memory for the layer's rows."""
    total, device = plan.slots.shape[0], plan.slots.device
    if follows is not None and follows.kind == "fp8":
        scales = torch.empty((-(-layer.width // BLOCK), total), dtype=torch.float32, device=device)
        return Rows(torch.empty((total, layer.width), dtype=E4M3, device=device), scales, "step")
    width = _rounded(layer.width) if follows is not None and follows.per > 1 else layer.width
    return Rows(torch.empty((total, width), dtype=layer.dtype, device=device), None, "none")


def _launch(
    layer: Layer, t: Tiles, own: Operands, follows: Operands | None, rows: Rows, out: Rows, biases: Params, route_w: Any,
    top_k: int, plan: Plan,
) -> None:  # fmt: skip
    from .epilogue import epilogue_of
    from .scaled_gemm import scaled_kernel

    device, inner, limit = rows.values.device, rows.values.shape[1], out.values.shape[1]
    run_of = t.depth // own.per
    b, b_strides = biases_of(layer, biases)
    described = not rows.gather and describable(rows.values, rows.values.dtype)
    runs = follows.per if follows is not None else 1
    stored = runs == 1 and describable(out.values, out.values.dtype)
    boxed = _boxed(layer, own)
    early = t.early and starts_early(device)
    num_tiles = -(-limit // t.cols)
    programs = in_turn(t, layer, plan, device) if t.persistent else plan.blocks.shape[0] * num_tiles
    wide = t.cols * (2 if own.form == "pairs" else 1)
    a = descriptor(rows.values, [t.rows, t.depth]) if described else rows.values
    w = [_box(own, value, wide, run_of) for value in own.values] if boxed else own.values
    to = descriptor(out.values, [t.rows, t.cols]) if stored else out.values
    start(
        scaled_kernel, (programs,),
        a, rows.scales, *w, *own.scales, *b, route_w if layer.reads_w else plan.slots, to, out.scales, plan.slots, plan.blocks,
        plan.num_blocks, inner, own.units, own.steps, layer.width, limit, num_tiles, programs,
        rows.values.stride(0), out.values.stride(0), plan.slots.shape[0], *own.strides, *own.scale_strides, *b_strides,
        *columns(layer), EPILOGUE=epilogue_of(layer), READS_W=layer.reads_w, BIASES=len(layer.biases), TOP_K=top_k, KIND=own.kind,
        PER=own.per, W_SCALES=own.mode, A_SCALES=rows.mode, OUT_BLOCK=own.out_block, ONE=_one_scale(layer, own, wide),
        A_FROM="gather" if rows.gather else "tma" if described else "rows", W_FROM="tma" if boxed else "stack", W_TYPE=None,
        DTYPE=multiplied(layer.operand, device), FORM=own.form, TRANSPOSED=own.transposed, SWAP=t.swap,
        EVEN=inner % t.depth == 0 and own.units % run_of == 0, PRECISION=PRECISION.get(layer.operand, "tf32"),
        ASSEMBLY=on_a_gpu(device), OUT="fp8" if out.scales is not None else "plain", RUNS=runs, STORE="tma" if stored else "ptr",
        BM=t.rows, BN=t.cols, BK=t.depth, GROUP=t.group, PERSISTENT=t.persistent, num_warps=t.warps, num_stages=t.stages,
        EARLY=early, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def _one_scale(layer: Layer, own: Operands, wide: int) -> bool:
    """Have all columns of a tile one scale?"""
    starts = [0] if own.form == "pairs" else [each.start for each in layer.products if each.step == 1]
    whole = own.form == "pairs" or len(starts) == len(layer.products)
    return whole and own.mode == "step" and own.out_block % wide == 0 and not any(start % own.out_block for start in starts)


def _boxed(layer: Layer, own: Operands) -> bool:
    """Can descriptors bring the products' columns? See launch._boxed."""
    step = 2 if own.form == "pairs" else 1
    unit = ALIGNMENT // own.values[0].element_size()
    begin = [0] if own.form == "pairs" else [each.start for each in layer.products]
    return (
        all(describable(value, value.dtype) for value in own.values)
        and all(each.step == step for each in layer.products)
        and not (own.transposed and any(start % unit for start in begin))
    )


def _box(own: Operands, value: Any, wide: int, units: int) -> Any:
    return descriptor(value, [1, units, wide] if own.transposed else [1, wide, units])


# ---------------------------------------------------------------- weights
def operands_of(layer: Layer, weights: list[Quantized]) -> Operands:
    """Where the layer's weights and scales lie; that they are what their kind says, layout.Params has seen to."""
    first, second = (weights[each.of] for each in two(layer.products))
    if (first.kind, first.axes, first.fan[0], first.grouped) != (second.kind, second.axes, second.fan[0], second.grouped):
        raise ValueError(f"both weights of a layer must be quantised alike, got {_words(first)} and {_words(second)}")
    inner = first.fan[0]
    pairs = [_units(q) for q in (first, second)]
    values, per = (pairs[0][0], pairs[1][0]), pairs[0][1]
    if pairs[1][1] != per:
        raise ValueError("both weights of a layer must lie alike in memory: make them contiguous")
    mode = "inner" if first.kind == "mxfp4" else "step" if first.grouped else "once"
    group = 32 if mode == "inner" else BLOCK
    return Operands(
        KINDS[first.kind], form_of(layer, first.fan[1]), values, (*_strides(values[0], first.axes), *_strides(values[1], first.axes)),
        (first.scales, second.scales), (*_scale_strides(first), *_scale_strides(second)), per, mode,
        BLOCK if first.stored == "fp8_block" else 1, first.axes == "io", inner, -(-inner // per), -(-inner // group),
        f"{first.axes}:{first.kind}",
    )  # fmt: skip


def _words(q: Quantized) -> str:
    return f"{q.kind} {q.axes} with {q.fan[0]} inputs" + (" in groups" if q.grouped else "")


def form_of(layer: Layer, outputs: int) -> str:
    """See grouped_gemm.py; halves are two products apart here, each with its scales. outputs: of the first product's weight."""
    if len(layer.products) == 1:
        return "one"
    a, b = layer.products
    if a.of == b.of and outputs == 2 * layer.width and (a.start, a.step, b.start, b.step) == (0, 2, 1, 2):
        return "pairs"
    return "apart"


def _units(q: Quantized) -> tuple[Any, int]:
    """(values as [E, O, units], or [E, units, O], numbers a unit): four numbers of 4 bits as an int16 where that is possible."""
    if KINDS[q.kind] not in RUNS:
        return q.values, 1
    values = q.values
    if q.kind == "mxfp4":
        if values.stride(3) != 1 or values.stride(2) != values.shape[3]:
            raise ValueError(f"blocks of mxfp4 weights must lie next to each other, strides are {values.stride()}; make them contiguous")
        values = values.flatten(2)
    even = all(stride % 2 == 0 for stride in values.stride()[:-1]) and values.storage_offset() % 2 == 0
    if q.axes == "oi" and values.stride(2) == 1 and values.shape[2] % 2 == 0 and even:
        return values.view(torch.int16), 4
    return values, 2


def _strides(value: Any, axes: str) -> tuple[int, int, int]:
    """(expert, in, out)"""
    expert, *rest = value.stride()
    return (expert, rest[0], rest[1]) if axes == "io" else (expert, rest[1], rest[0])


def _scale_strides(q: Quantized) -> tuple[int, int, int]:
    """(expert, in, out), in 0 where each output has one scale."""
    if q.stored == "fp8_channel":
        return q.scales.stride(0), 0, q.scales.stride(1)
    expert, inner, outer = _strides(q.scales, q.axes)
    return expert, inner if q.grouped else 0, outer


def _rounded(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def _check_rows(x_TH: Any, x_scales: Any, first: Operands, changed: bool) -> None:
    if x_TH.shape[1] != first.inner:
        raise ValueError(f"x has {x_TH.shape[1]} columns, the first layer's weights have {first.inner} inputs")
    if x_scales is None and x_TH.dtype == E4M3:
        raise ValueError("x is e4m3 without scales; give x_scales, float32 [tokens, ceil(hidden / 128)] or [tokens, 1]")
    if x_scales is None:
        return
    if x_TH.dtype != E4M3 or first.kind != "fp8" or changed:
        raise ValueError(
            f"rows with scales must be e4m3 and go straight to weights of kind {' or '.join(ROWS_TOO)}, got rows of {x_TH.dtype} for "
            f"{first.kind}{' behind a change' if changed else ''}; dequantise them"
        )
    wanted = [[x_TH.shape[0], -(-x_TH.shape[1] // BLOCK)], [x_TH.shape[0], 1]]
    if list(x_scales.shape) not in wanted or x_scales.dtype != torch.float32:
        raise ValueError(f"x_scales must be float32 {wanted[0]} or {wanted[1]}, got {x_scales.dtype} {list(x_scales.shape)}")
