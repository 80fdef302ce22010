"""Runs an expert program with quantised weights for a few slots, each by itself (scaled_gemv.py, scaled_linear.py)."""

from __future__ import annotations

from typing import Any

import torch

from moe_compile.ops.layout import Params
from moe_compile.ops.quantized import BLOCK, MX_BLOCK, Quantized
from moe_compile.ops.replay import start

from . import configs_scaled
from .launch import biases_of, columns, starts_early, type_of
from .launch_scaled import KINDS, Operands, on_a_gpu, operands_of
from .layers import Layer
from .tiles import power


def fits(weights: list[Quantized]) -> bool:
    """Are few slots faster each by itself than in blocks?"""
    return all(configs_scaled.few(KINDS[q.kind], q.fan[0] * q.fan[1]) for q in weights)


def run(
    layers: tuple[Layer, ...], x_TH: Any, ids_TK: Any, num_experts: int, weights: list[Quantized], biases: Params, route_w: Any, sum_w: Any,
    dtype: torch.dtype,
) -> Any:  # fmt: skip
    """out [T, O]: each token's rows, weighed by sum_w [T, K] (None: ones) and added up in float32. All layers have products."""
    rows, share = x_TH if x_TH.stride(-1) == 1 else x_TH.contiguous(), ids_TK.shape[1]
    ids_TK = ids_TK.contiguous()
    for layer in layers[:-1]:
        own = operands_of(layer, weights)
        rows, share = _slots(layer, own, rows, share, ids_TK, num_experts, biases, route_w), 1
    own = operands_of(layers[-1], weights)
    return _tokens(layers[-1], own, rows, share, ids_TK, num_experts, biases, route_w, sum_w, dtype, len(layers) > 1)


def _slots(layer: Layer, own: Operands, rows: Any, share: int, ids: Any, num_experts: int, biases: Params, route_w: Any) -> Any:
    from .scaled_gemv import scaled_slots_kernel

    out = torch.empty((ids.numel(), layer.width), dtype=layer.dtype, device=rows.device)
    given, sizes, fixed = _common(layer, own, rows, num_experts, biases, last=False)
    early, follows = starts_early(rows.device), share == 1
    if out.numel():
        start(
            scaled_slots_kernel, (-(-layer.width // fixed["BN"]), ids.numel()),
            *given, route_w if layer.reads_w else ids, ids, out, *sizes, SHARE=share, PDL=early, WAITS=follows, **fixed,
            **({"launch_pdl": True} if early and follows else {}),
        )  # fmt: skip
    return out


def _tokens(
    layer: Layer, own: Operands, rows: Any, share: int, ids: Any, num_experts: int, biases: Params, route_w: Any, sum_w: Any,
    dtype: torch.dtype, follows: bool,
) -> Any:  # fmt: skip
    from .scaled_gemv import scaled_tokens_kernel

    tokens, top_k = ids.shape
    out = torch.empty((tokens, layer.width), dtype=dtype, device=rows.device)
    given, sizes, fixed = _common(layer, own, rows, num_experts, biases, last=True)
    pdl = follows and starts_early(rows.device)
    sum_w = sum_w if sum_w is None or sum_w.stride(1) == 1 else sum_w.contiguous()
    warps = 0 if layer.body or len(layer.products) > 1 or own.transposed else _held_by(own, top_k)
    if out.numel() and warps:
        _all_slots(own, given, sizes, fixed, share, ids, sum_w, out, pdl, warps)
    elif out.numel():
        start(
            scaled_tokens_kernel, (-(-layer.width // fixed["BN"]), tokens),
            *given, route_w if layer.reads_w else ids, ids, ids if sum_w is None else sum_w, out, *sizes[:5],
            0 if sum_w is None else sum_w.stride(0), *sizes[5:], K=top_k, SHARE=share, WEIGHTED=sum_w is not None,
            WIDE=fixed["G"] * fixed["Q"] >= own.units, PDL=pdl, **fixed, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return out


def _held_by(own: Operands, top_k: int) -> int:
    """Warps whose registers hold a column for all slots of a token; 0: too many numbers, or packed ones, whose rows lie apart then."""
    return 0 if own.per > 1 else configs_scaled.at_once(power(own.steps) * BLOCK, top_k)


def _all_slots(
    own: Operands, given: tuple[Any, ...], sizes: tuple[Any, ...], fixed: dict[str, Any], share: int, ids: Any, sum_w: Any, out: Any,
    pdl: bool, warps: int,
) -> None:  # fmt: skip
    """A last layer that is a plain product with inputs next to each other."""
    from .scaled_linear import scaled_linear_kernel

    (rows, w, _, s, *_), (tokens, top_k) = given, ids.shape
    num, inner, _, steps, width, stride_a, e, i, o, _, _, _, se, si, so, *_ = sizes
    groups, names = power(steps), ("KIND", "W_SCALES", "OUT_BLOCK", "DTYPE")
    start(
        scaled_linear_kernel, (width, tokens),
        rows, w, s, ids, ids if sum_w is None else sum_w, out, num, inner, steps, width, stride_a, 0 if sum_w is None else sum_w.stride(0),
        e, i, o, se, si, so, START=fixed["START0"], STEP=fixed["STEP0"], K=top_k, KP=power(top_k), SHARE=share, WEIGHTED=sum_w is not None,
        G=groups, Q=BLOCK, EVEN=inner == groups * BLOCK, PDL=pdl, **{name: fixed[name] for name in names}, num_warps=warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _common(
    layer: Layer, own: Operands, rows: Any, num_experts: int, biases: Params, last: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """What both kernels are given: tensors, sizes and strides, and what they are compiled for."""
    from .epilogue import epilogue_of

    if rows.shape[1] != own.inner:
        raise ValueError(f"rows have {rows.shape[1]} columns, the layer's weights have {own.inner} inputs")
    b, b_strides = biases_of(layer, biases)
    per_group = (MX_BLOCK if own.mode == "inner" else BLOCK) // own.per
    cols, groups, warps = configs_scaled.strip(own.units, per_group, own.values[0].element_size(), own.transposed, last)
    names = ("START0", "STEP0", "START1", "STEP1", "BSTART0", "BSTEP0", "BSTART1", "BSTEP1")
    on_gpu = on_a_gpu(rows.device)
    fixed = {
        **dict(zip(names, columns(layer), strict=True)), "EPILOGUE": epilogue_of(layer), "READS_W": layer.reads_w,
        "BIASES": len(layer.biases), "PRODUCTS": len(layer.products), "KIND": own.kind, "PER": own.per, "W_SCALES": own.mode,
        "OUT_BLOCK": own.out_block, "BN": cols, "G": groups, "Q": per_group, "EVEN": own.units % (groups * per_group) == 0,
        "FAST": on_gpu and own.per == 4, "num_warps": warps,
        "DTYPE": type_of(torch.bfloat16 if on_gpu and (own.per == 4 or own.kind in ("int8", "e4m3")) else torch.float32),
    }  # fmt: skip
    sizes = num_experts, own.inner, own.units, own.steps, layer.width, rows.stride(0), *own.strides, *own.scale_strides, *b_strides
    return (rows, *own.values, *own.scales, *b), sizes, fixed
