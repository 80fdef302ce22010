"""Experts as transformers' grouped_mm formula reads them, their weights from `dequantize_experts`."""

from __future__ import annotations

from typing import Any

import torch


class Dequantized:
    """Stands for an experts module whose weights [E, out, in] were not quantised.

    module: gives what is not about weights. gate: its gate, a function of (module, [rows, 2I]); None: its act_fn alone.
    """

    is_transposed = False
    is_concatenated = True

    def __init__(self, module: Any, up: Any, down: Any, biases: tuple[Any, Any] | None = None, gate: Any = None) -> None:
        self.module, self.num_experts = module, module.num_experts
        self.has_gate, self.gate, self.has_bias = gate is not None, gate, biases is not None
        self.gate_up_proj = self.up_proj = up
        self.down_proj = down
        self.gate_up_proj_bias: Any = biases[0] if biases is not None else None
        self.down_proj_bias: Any = biases[1] if biases is not None else None
        self.up_proj_bias = self.gate_up_proj_bias

    def _apply_gate(self, gate_up: Any) -> Any:
        return self.gate(self.module, gate_up)

    def act_fn(self, up: Any) -> Any:
        return self.module.act_fn(up)


def experts(stand_in: Dequantized, x_TH: Any, ids_TK: Any, weights_TK: Any) -> Any:
    """out [T, H] by the formula that transformers has for experts in any float type."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(stand_in, x_TH, ids_TK, weights_TK)


def dequantize(values: Any, scales: Any, kind: str, dtype: torch.dtype) -> Any:
    """Weights [E, out, in] of a kind of ops/quantized.py."""
    return torch.ops.moe_compile.dequantize_experts(values, scales, kind, "oi", dtype)
