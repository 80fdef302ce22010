"""transformers' mxfp4: GPT-OSS blocks whose forward, router included, goes to kernels from the hub.

Each such block of a model gets a forward by which Dynamo sees the formula, with the experts' blocks of 32 numbers and their exponents as
plain tensors.  Where the hub's kernels had them rearranged, they are arranged back into new tensors, beside those that the kernels keep.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

import moe_compile.ops  # noqa: F401  (registers dequantize_experts)
from moe_compile.ops.quantized import MX_BLOCK

from .dequantized import Dequantized, dequantize, experts
from .ours import compiling_for_us

MODULE = "transformers.integrations.mxfp4"
NAMES = ("gate_up_proj", "down_proj")
BEFORE = "_forward_before_moe_compile"  # a block's own forward
BYTES = MX_BLOCK // 2


def prepare(model: Any) -> list[str]:
    """Why blocks were left out, each reason once."""
    library = sys.modules.get(MODULE)
    if library is None or not hasattr(library, "mlp_forward") or not isinstance(model, torch.nn.Module):
        return []
    blocks = [m for m in model.modules() if getattr(m.__dict__.get("forward"), "__func__", None) is library.mlp_forward]
    return list(dict.fromkeys(reason for block in blocks if (reason := _prepare_block(block)) is not None))


def restore(model: Any) -> None:
    for block in model.modules() if isinstance(model, torch.nn.Module) else ():
        if (before := block.__dict__.pop(BEFORE, None)) is not None:
            block.forward = before
            for name in NAMES:
                for buffer in _buffers(name):
                    delattr(block.experts, buffer)


def _buffers(name: str) -> tuple[str, str]:
    return f"{name}_plain_blocks", f"{name}_plain_scales"


def _prepare_block(block: Any) -> str | None:
    found = {}
    for name in NAMES:
        plain = plain_weights(block.experts, name)
        if isinstance(plain, str):
            return plain
        found[name] = plain
    for name, tensors in found.items():
        for buffer, tensor in zip(_buffers(name), tensors):
            block.experts.register_buffer(buffer, tensor, persistent=False)
    setattr(block, BEFORE, block.forward)
    block.forward = MethodType(forward, block)
    return None


# ---------------------------------------------------------------- tensors
def plain_weights(module: Any, name: str) -> tuple[Any, Any] | str:
    """Blocks uint8 [E, out, in / 32, 16] and exponents uint8 [E, out, in / 32] of a weight of an experts module, or why there are none."""
    count, hidden, inner = module.num_experts, module.hidden_size, module.intermediate_size
    out, width = (2 * inner, hidden) if name == "gate_up_proj" else (hidden, inner)
    scales = getattr(getattr(module, f"{name}_precision_config", None), "weight_scale", None)
    if scales is None:
        return f"the mxfp4 experts' {name} has no scales yet; load a checkpoint before compiling"
    blocks = _arranged(getattr(module, name), (count, out, width // 2))
    exponents = _arranged(scales, (count, out, width // MX_BLOCK))
    if blocks is None or exponents is None:
        return (
            f"the mxfp4 experts' {name} lies in a layout that tells no way back to blocks of {MX_BLOCK}; load the model with "
            "Mxfp4Config(dequantize=True) to have these experts compiled"
        )
    return blocks.unflatten(2, (-1, BYTES)), exponents


def _arranged(tensor: Any, shape: tuple[int, int, int]) -> Any:
    """[E, out, bytes] of a plain tensor (its last dimension perhaps in blocks), or of one that the kernels' library wraps [E, in, out]."""
    if isinstance(tensor, torch.Tensor):
        whole = tensor.flatten(2) if tensor.dim() == 4 else tensor
        return whole if whole.dtype == torch.uint8 and tuple(whole.shape) == shape else None
    storage: Any = getattr(tensor, "storage", None)
    back = getattr(getattr(storage, "layout", None), "unswizzle_data", None)
    if back is None:
        return None
    whole = back(storage.data).transpose(-1, -2)
    if whole.dim() != 3 or whole.dtype != torch.uint8 or any(have < want for have, want in zip(whole.shape, shape)):
        return None
    return whole[: shape[0], : shape[1], : shape[2]].contiguous()  # what is beyond pads tiles


# ---------------------------------------------------------------- the block
def forward(self: Any, hidden_states: Any) -> Any:
    if compiling_for_us():
        return formula(self, hidden_states)
    return getattr(self, BEFORE)(hidden_states)


def formula(block: Any, x: Any) -> tuple[Any, Any]:
    """The block's output and the router's logits."""
    router = block.router
    rows_TH = x.reshape(-1, router.hidden_dim)
    logits_TE = F.linear(rows_TH, router.weight, router.bias)
    top_TK, ids_TK = torch.topk(logits_TE, router.top_k, dim=-1)
    out_TH = experts(_stand_in(block.experts, x.dtype), rows_TH, ids_TK, torch.softmax(top_TK, dim=1, dtype=top_TK.dtype))
    return out_TH.reshape(x.shape[0], -1, router.hidden_dim), logits_TE


def _stand_in(module: Any, dtype: torch.dtype) -> Dequantized:
    tensors = [[getattr(module, buffer) for buffer in _buffers(name)] for name in NAMES]
    up, down = (dequantize(blocks, scales, "mxfp4", dtype) for blocks, scales in tensors)
    biases = module.gate_up_proj_bias.to(dtype), module.down_proj_bias.to(dtype)
    return Dequantized(module, up, down, biases, gate=_gate)


def _gate(module: Any, gate_up: Any) -> Any:
    """Gate and up in turns, both clamped."""
    gate = gate_up[..., ::2].clamp(max=module.limit)
    up = gate_up[..., 1::2].clamp(min=-module.limit, max=module.limit)
    return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
