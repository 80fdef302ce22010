"""Runs an expert program for a few slots, each by itself (gemv.py)."""

from __future__ import annotations

from typing import Any

import torch

from moe_compile.ops.layout import Params

from . import configs
from .launch import biases_of, columns, multiplied, shape_of, starts_early, type_of, weights_of
from .layers import Layer


def fits(layers: tuple[Layer, ...], tokens: int, top_k: int) -> bool:
    return configs.few(tokens, top_k) and bool(layers[0].products)


def run(
    layers: tuple[Layer, ...],
    x_TH: Any,
    ids_TK: Any,
    num_experts: int,
    weights: Params,
    biases: Params,
    route_w: Any,
    sum_w: Any,
    dtype: Any,
) -> Any:
    """out [T, O]: each token's rows, weighed by sum_w [T, K] (None: ones) and added up in float32."""
    rows, share = x_TH, ids_TK.shape[1]
    ids_TK = ids_TK.contiguous()
    for layer in layers[:-1]:
        rows, share = _slots(layer, rows, share, ids_TK, num_experts, weights, biases, route_w), 1
    return _tokens(layers[-1], rows, share, ids_TK, num_experts, weights, biases, route_w, sum_w, dtype, len(layers) > 1)


def _slots(layer: Layer, rows: Any, share: int, ids: Any, num_experts: int, weights: Params, biases: Params, route_w: Any) -> Any:
    from .gemv import slots_kernel

    out = torch.empty((ids.numel(), layer.width), dtype=layer.dtype, device=rows.device)
    strip, given, fixed = _common(layer, rows, ids, num_experts, weights, biases, last=False)
    early, follows = starts_early(rows.device), share == 1
    if out.numel():
        slots_kernel[(-(-layer.width // strip.cols), ids.numel())](
            rows, *given[:4], route_w if layer.reads_w else ids, ids, out, *given[4:], SHARE=share, PDL=early, WAITS=follows, **fixed,
            **({"launch_pdl": True} if early and follows else {}),
        )  # fmt: skip
    return out


def _tokens(
    layer: Layer, rows: Any, share: int, ids: Any, num_experts: int, weights: Params, biases: Params, route_w: Any, sum_w: Any, dtype: Any,
    follows: bool,
) -> Any:  # fmt: skip
    from .gemv import tokens_kernel

    tokens, top_k = ids.shape
    out = torch.empty((tokens, layer.width), dtype=dtype, device=rows.device)
    strip, given, fixed = _common(layer, rows, ids, num_experts, weights, biases, last=True)
    pdl = follows and starts_early(rows.device)
    if out.numel():
        sum_w = sum_w if sum_w is None or sum_w.stride(1) == 1 else sum_w.contiguous()
        (num, inner, width, stride), strides = given[4:8], given[8:]
        tokens_kernel[(-(-layer.width // strip.cols), tokens)](
            rows, *given[:4], route_w if layer.reads_w else ids, ids, ids if sum_w is None else sum_w, out, num, inner, width, stride,
            0 if sum_w is None else sum_w.stride(0), *strides, K=top_k, SHARE=share, WEIGHTED=sum_w is not None,
            WIDE=strip.depth >= inner, PDL=pdl, **fixed, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return out


def _common(
    layer: Layer, rows: Any, ids: Any, num_experts: int, weights: Params, biases: Params, last: bool
) -> tuple[configs.Strip, tuple[Any, ...], dict[str, Any]]:
    """What both kernels are given: operands and strides, and what they are compiled for."""
    from .epilogue import epilogue_of

    w = weights_of(layer, weights)
    b, b_strides = biases_of(layer, biases)
    shape = shape_of(layer, weights, ids.numel(), num_experts, rows)
    strip = configs.strip(shape, not w.transposed, last)
    names = ("START0", "STEP0", "START1", "STEP1", "BSTART0", "BSTEP0", "BSTART1", "BSTEP1")
    fixed = {
        **dict(zip(names, columns(layer), strict=True)), "EPILOGUE": epilogue_of(layer), "READS_W": layer.reads_w,
        "BIASES": len(layer.biases), "PRODUCTS": len(layer.products), "W_FROM": w.source, "W_TYPE": type_of(w.dtype),
        "DTYPE": multiplied(layer.operand, rows.device), "BN": strip.cols, "BK": strip.depth, "EVEN": rows.shape[1] % strip.depth == 0,
        "num_warps": strip.warps,
    }  # fmt: skip
    return strip, (*w.operands, *b, num_experts, rows.shape[1], layer.width, rows.stride(0), *w.strides, *b_strides), fixed
