"""Ops dequantize_experts and quantize_experts: all experts' weights out of and into a form of quantized.py, without gradients.

passes/quantize.py takes dequantize_experts out of a graph where it feeds a stage op: the stage reads values and scales in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import quantized
from ._register import below_autograd, register_op
from .quantized import BLOCK, MX_BLOCK, Quantized

SCHEMA = "dequantize_experts(Tensor values, Tensor scales, str kind, str axes, ScalarType dtype) -> Tensor w"
QUANTIZE_SCHEMA = "quantize_experts(Tensor w, str kind, str axes) -> (Tensor values, Tensor scales)"


def _kernel(values: Any, scales: Any, kind: str, axes: str, dtype: Any) -> Any:
    """[E, O, I], with axes "io" [E, I, O]: value * scale in float32, rounded to dtype."""
    return quantized.dequantize(Quantized(values, scales, kind, axes), dtype)


def _fake(values: Any, scales: Any, kind: str, axes: str, dtype: Any) -> Any:
    return values.new_empty(quantized.dense_shape(Quantized(values, scales, kind, axes)), dtype=dtype)


def _quantize_kernel(w: Any, kind: str, axes: str) -> tuple[Any, Any]:
    found = quantized.quantize_weights(w, kind, axes=axes)
    return found.values, found.scales


def _quantize_fake(w: Any, kind: str, axes: str) -> tuple[Any, Any]:
    values, scales = quantized.shapes_of(kind, axes, w.shape)
    return w.new_empty(values, dtype=quantized.values_dtype(kind)), w.new_empty(scales, dtype=quantized.scales_dtype(kind))


def _constant(*args: Any) -> Any:
    """Without a gradient for anything that is quantised, or was."""
    with below_autograd():
        return OP.overload(*args)


def _quantize_constant(*args: Any) -> Any:
    with below_autograd():
        return QUANTIZE_OP.overload(*args)


OP = register_op(SCHEMA, _kernel, _fake, _constant)
QUANTIZE_OP = register_op(QUANTIZE_SCHEMA, _quantize_kernel, _quantize_fake, _quantize_constant)


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples of quantize_experts: each kind, both orders, sizes of whole blocks and others."""
    generator = torch.Generator().manual_seed(0)
    for kind in quantized.KINDS:
        for axes in ("oi",) if kind == "mxfp4" else ("oi", "io"):
            for sizes in ((2, 2 * BLOCK, BLOCK), (3, 40, 5 * MX_BLOCK)):
                w = torch.randn(sizes, generator=generator).to(device, dtype)
                yield w.transpose(1, 2) if axes == "io" else w, kind, axes
