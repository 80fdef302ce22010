"""Runs a layer by scaled_hopper.py, where its operands are what that kernel takes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from moe_compile.ops.quantized import BLOCK
from moe_compile.ops.replay import start

from .launch import describable, processors
from .layers import Layer
from .plan import Plan

if TYPE_CHECKING:
    from .launch_scaled import Operands, Rows

ROWS = 128  # of a block
BOX = 64  # rows of a box of results
SHARED = 227 * 1024  # bytes of shared memory that a program can have
BARRIERS = 512  # bytes for them
STAGE = (ROWS + 2 * BLOCK) * BLOCK + 4 * ROWS  # bytes of a step under way
TYPES = {torch.float8_e4m3fn: "float8e4nv", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MOST_INPUTS = 1 << 16  # whose scales have room in shared memory beside the tiles
REGISTERS = 168  # of a thread, where three groups of four warps share a multiprocessor's


def suits(layer: Layer, own: Operands, device: Any) -> bool:
    """Is the kernel right for the layer's weights and epilogue? It is for Hopper alone."""
    return (
        on_hopper(device)
        and own.kind == "fp8"
        and own.form in ("one", "apart")
        and own.inner <= MOST_INPUTS
        and not own.transposed
        and not layer.biases
        and not layer.reads_w
        and layer.dtype.itemsize <= 2
        and all(each.step == 1 and each.start % own.out_block == 0 for each in layer.products)
        and all(value.is_contiguous() and describable(value, value.dtype) for value in own.values)
    )


def takes(layer: Layer, own: Operands, rows: Rows, out: Rows, plan: Plan) -> bool:
    """Are rows and results in the form that it takes too?"""
    whole = plan.block_rows == ROWS and not rows.gather and plan.slots.shape[0] % 4 == 0
    return suits(layer, own, rows.values.device) and whole and all(describable(each, each.dtype) for each in (rows.values, out.values))


@functools.lru_cache(maxsize=16)
def on_hopper(device: Any) -> bool:
    return bool(device.type == "cuda") and torch.cuda.get_device_capability(device)[0] == 9 and _known()


def _known() -> bool:
    """Has this Triton the Gluon that the kernel is written for? Gluon is experimental and may change."""
    from moe_compile.logs import warn_once

    try:
        from . import scaled_hopper  # noqa: F401
    except (ImportError, AttributeError) as error:
        warn_once(f"this Triton has another Gluon ({error}): many rows with e4m3 weights take the kernel for other GPUs, which is slower.")
        return False
    return True


def run(layer: Layer, own: Operands, rows: Rows, out: Rows, plan: Plan, group: int) -> None:
    """Writes out, [P, width] and its scales."""
    from .epilogue import epilogue_of
    from .scaled_hopper import hopper_kernel

    first, second = layer.products[0], layer.products[-1]
    a_scales = _boxes(rows.scales, 1, ROWS, swizzled=False) if rows.mode == "step" else rows.scales
    w = [_boxes(value.flatten(0, 1), BLOCK) for value in own.values]
    outs = [value.shape[1] for value in own.values]
    steps, two = -(-own.inner // BLOCK), len(layer.products) > 1
    most_steps = max(32, 1 << (steps - 1).bit_length())
    num_tiles = -(-layer.width // (BLOCK if two else 2 * BLOCK))
    programs = min(plan.blocks.shape[0] * num_tiles, processors(rows.values.device))
    start(
        hopper_kernel, (programs,),
        _boxes(rows.values, ROWS), a_scales, *w, *own.scales, _boxes(out.values, BOX), out.scales, plan.blocks, plan.num_blocks, steps,
        layer.width, own.scales[0].shape[1] - 1, num_tiles, programs, *outs, plan.slots.shape[0], *own.scale_strides, START0=first.start,
        START1=second.start if two else first.start + BLOCK, TWO=two, EPILOGUE=epilogue_of(layer), W_SCALES=own.mode, A_SCALES=rows.mode,
        OUT_BLOCK=own.out_block, OUT="plain" if out.scales is None else "fp8", GROUP=group,
        STAGES=_stages(most_steps, out.values.element_size()), MOST_STEPS=most_steps, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def _stages(most_steps: int, size: int) -> int:
    """Steps that are under way beside the scales of the weights of two tiles and the results, `size` bytes each."""
    return (SHARED - 4 * 4 * most_steps - ROWS * BLOCK * size - BARRIERS) // STAGE


def _boxes(values: Any, high: int, wide: int = BLOCK, swizzled: bool = True) -> Any:
    """A descriptor of boxes [high, wide]."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if swizzled:
        layout = gl.NVMMASharedLayout.get_default_for([high, wide], getattr(gl, TYPES[values.dtype]))
    else:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * values.element_size(), rank=2)
    return TensorDescriptor.from_tensor(values, [high, wide], layout)
