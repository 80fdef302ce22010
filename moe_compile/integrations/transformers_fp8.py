"""transformers' fine-grained fp8: FP8Experts, whose forward goes through the registry ALL_FP8_EXPERTS_FUNCTIONS to kernels from the hub.

Each function of that registry is wrapped: for our backend Dynamo traces the formula, otherwise what stood there is called.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

import moe_compile.ops  # noqa: F401  (registers dequantize_experts)
from moe_compile.ops.quantized import BLOCK, MX_BLOCK

from .dequantized import Dequantized, dequantize, experts
from .ours import compiling_for_us

MODULE = "transformers.integrations.finegrained_fp8"
_installed: dict[str, Callable[..., Any]] = {}


def install() -> None:
    library: Any = sys.modules.get(MODULE)
    functions = getattr(library, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    if functions is None or not hasattr(library, "FP8Experts"):
        return
    for name in [*functions.keys(), "eager"]:
        if name not in _installed:
            own = functions[name] if name in functions else inspect.unwrap(library.FP8Experts.forward)
            _installed[name] = functions[name] = _wrapped(own)


def remove() -> None:
    functions = getattr(sys.modules.get(MODULE), "ALL_FP8_EXPERTS_FUNCTIONS", {})
    for name, ours in _installed.items():
        if name in functions and functions[name] is ours:
            del functions[name]
    _installed.clear()


def _wrapped(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        if compiling_for_us() and unfit(self) is None:
            return formula(self, hidden_states, top_k_index, top_k_weights)
        return own(self, hidden_states, top_k_index, top_k_weights)

    return forward


def unfit(module: Any) -> str | None:
    """Why a module's own function is kept."""
    if module.activation_scheme == "static":
        return "activations with static scales"
    if getattr(module, "has_bias", False):
        return "experts with biases"
    values = [module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj]
    scales = [module.gate_up_proj_scale_inv if module.has_gate else module.up_proj_scale_inv, module.down_proj_scale_inv]
    odd = next((v for v, s in zip(values, scales) if _kind(v, s, module.block_size) is None), None)
    return None if odd is None else f"weights of {odd.dtype} in blocks of {module.block_size}"


def formula(module: Any, x_TH: Any, ids_TK: Any, weights_TK: Any) -> Any:
    """What FP8Experts computes: rows and weights in e4m3, or weights in e2m1 and rows as they are."""
    up, up_scale = (module.gate_up_proj, module.gate_up_proj_scale_inv) if module.has_gate else (module.up_proj, module.up_proj_scale_inv)
    stand_in = Dequantized(
        module,
        _weight(up, up_scale, module.block_size, x_TH.dtype),
        _weight(module.down_proj, module.down_proj_scale_inv, module.block_size, x_TH.dtype),
        gate=type(module)._apply_gate if module.has_gate else None,
    )
    return experts(stand_in, x_TH, ids_TK, weights_TK)


def _kind(values: Any, scales: Any, block_size: Any) -> str | None:
    """The kind of ops/quantized.py that a weight with these scales is, None for none."""
    experts_, out, inner = values.shape
    if values.dtype == torch.int8:  # two e2m1 a byte
        return "mxfp4" if scales.dtype == torch.float8_e8m0fnu and scales.shape == (experts_, out, 2 * inner // MX_BLOCK) else None
    if values.dtype != torch.float8_e4m3fn:
        return None
    if block_size is None:  # a scale an expert, or for gate and up
        return "fp8_channel" if scales.shape[2] == 1 and out % scales.shape[1] == 0 else None
    blocks = (-(-out // BLOCK), -(-inner // BLOCK))
    return "fp8_block" if tuple(block_size) == (BLOCK, BLOCK) and tuple(scales.shape[1:]) == blocks else None


def _weight(values: Any, scales: Any, block_size: Any, dtype: torch.dtype) -> Any:
    """[E, out, in]"""
    kind = _kind(values, scales, block_size)
    if kind == "mxfp4":
        return dequantize(values.view(torch.uint8).unflatten(2, (-1, MX_BLOCK // 2)), scales.view(torch.uint8), kind, dtype)
    scales = scales if scales.dtype == torch.float32 else scales.float()
    if kind == "fp8_channel":
        scales = scales.squeeze(2).repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
    return dequantize(values, scales, str(kind), dtype)
