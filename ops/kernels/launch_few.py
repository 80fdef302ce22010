"""Runs an expert program for a few slots, each by itself (gemv.py)."""

from __future__ import annotations

from typing import Any

import torch

from moe_compile.ops.layout import Params
from moe_compile.ops.replay import start

from . import configs
from .launch import biases_of, columns, multiplied, shape_of, starts_early, two, type_of, weights_of
from .layers import Layer
from .tiles import power


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
        start(
            slots_kernel, (-(-layer.width // strip.cols), ids.numel()),
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
    sum_w = sum_w if sum_w is None or sum_w.stride(1) == 1 else sum_w.contiguous()
    if out.numel() and fixed["ACROSS"] and len(layer.products) == 1 and configs.in_parts(strip, layer.width, tokens):
        _by_parts(layer, rows, share, ids, route_w, sum_w, out, strip, given, fixed, pdl)
    elif out.numel() and _plain(layer) and not fixed["ACROSS"] and configs.at_once(strip, rows.shape[1], top_k):
        _all_slots(rows, share, ids, sum_w, out, strip, given, fixed, pdl)
    elif out.numel():
        (num, inner, width, stride), strides = given[4:8], given[8:]
        start(
            tokens_kernel, (-(-layer.width // strip.cols), tokens),
            rows, *given[:4], route_w if layer.reads_w else ids, ids, ids if sum_w is None else sum_w, out, num, inner, width, stride,
            0 if sum_w is None else sum_w.stride(0), *strides, K=top_k, SHARE=share, WEIGHTED=sum_w is not None,
            WIDE=strip.depth >= inner and not fixed["ACROSS"], PDL=pdl, **fixed, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return out


def _plain(layer: Layer) -> bool:
    """Is a layer a product and nothing more?"""
    return not layer.body and len(layer.products) == 1


def _all_slots(
    rows: Any, share: int, ids: Any, sum_w: Any, out: Any, strip: configs.Strip, given: tuple[Any, ...], fixed: dict[str, Any], pdl: bool
) -> None:
    """A last layer that is a plain product with inputs next to each other: a token's slots at a time."""
    from .gemv_linear import linear_kernel

    (w, _, _, _, num, inner, width, stride), (expert, i, o, *_) = given[:8], given[8:]
    tokens, top_k = ids.shape
    start(
        linear_kernel, (-(-width // strip.cols), tokens),
        rows, w, ids, ids if sum_w is None else sum_w, out, num, inner, width, stride, 0 if sum_w is None else sum_w.stride(0), expert, i,
        o, START=fixed["START0"], STEP=fixed["STEP0"], K=top_k, KP=power(top_k), SHARE=share, WEIGHTED=sum_w is not None, PDL=pdl,
        **{name: fixed[name] for name in ("W_FROM", "W_TYPE", "DTYPE", "BN", "BK", "num_warps")},
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _by_parts(
    layer: Layer, rows: Any, share: int, ids: Any, route_w: Any, sum_w: Any, out: Any, strip: configs.Strip, given: tuple[Any, ...],
    fixed: dict[str, Any], pdl: bool,
) -> None:  # fmt: skip
    """A last layer of one product, outputs next to each other: slots and parts of the inputs by themselves, then their sum."""
    from .gemv_across import parts_kernel, sum_parts_kernel

    (w, _, b0, b1, num, inner, width, stride), (expert, i, o, _, _, _, *b_strides) = given[:8], given[8:]
    inputs = configs.inputs_of_a_part(strip, inner, width, ids.numel())
    split = -(-inner // inputs)
    parts = torch.empty((split, ids.numel(), width), dtype=torch.float32, device=rows.device)
    early = starts_early(rows.device)
    start(
        parts_kernel, (-(-width // strip.cols), ids.numel(), split),
        rows, w, ids, parts, num, inner, width, inputs, stride, expert, i, o, START=fixed["START0"], SHARE=share, PDL=early, WAITS=pdl,
        **{name: fixed[name] for name in ("W_FROM", "W_TYPE", "DTYPE", "BN", "BK", "EVEN", "num_warps")},
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    start(
        sum_parts_kernel, (-(-width // configs.SUMMED), out.shape[0]),
        parts, b0, b1, route_w if layer.reads_w else ids, ids, ids if sum_w is None else sum_w, out, num, ids.numel(), width,
        0 if sum_w is None else sum_w.stride(0), *b_strides, K=ids.shape[1], S=split, WEIGHTED=sum_w is not None, BN=configs.SUMMED,
        PDL=early, **{name: fixed[name] for name in ("BSTART0", "BSTEP0", "BSTART1", "BSTEP1", "EPILOGUE", "READS_W", "BIASES")},
        num_warps=1, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def _common(
    layer: Layer, rows: Any, ids: Any, num_experts: int, weights: Params, biases: Params, last: bool
) -> tuple[configs.Strip, tuple[Any, ...], dict[str, Any]]:
    """What both kernels are given: operands and strides, and what they are compiled for."""
    from .epilogue import epilogue_of

    w = weights_of(layer, weights)
    b, b_strides = biases_of(layer, biases)
    shape = shape_of(layer, weights, ids.numel(), num_experts, rows)
    paired = w.transposed and _paired(layer, weights)
    across = paired or (w.transposed and all(each.step == 1 for each in layer.products))
    strip = configs.strip(shape, not across, last, paired, _plain(layer))
    names = ("START0", "STEP0", "START1", "STEP1", "BSTART0", "BSTEP0", "BSTART1", "BSTEP1")
    fixed = {
        **dict(zip(names, columns(layer), strict=True)), "EPILOGUE": epilogue_of(layer), "READS_W": layer.reads_w,
        "BIASES": len(layer.biases), "PRODUCTS": len(layer.products), "W_FROM": w.source, "W_TYPE": type_of(w.dtype),
        "DTYPE": multiplied(layer.operand, rows.device), "BN": strip.cols, "BK": strip.depth, "EVEN": rows.shape[1] % strip.depth == 0,
        "ACROSS": across, "PAIRED": paired, "num_warps": strip.warps,
    }  # fmt: skip
    return strip, (*w.operands, *b, num_experts, rows.shape[1], layer.width, rows.stride(0), *w.strides, *b_strides), fixed


def _paired(layer: Layer, weights: Params) -> bool:
    """Do two products' columns take turns, so that they make up one matrix?"""
    first, second = two(layer.products)
    whole = first.of == second.of and weights.fan(first.of)[1] == 2 * layer.width
    return whole and first.step == second.step == 2 and {first.start, second.start} == {0, 1}
