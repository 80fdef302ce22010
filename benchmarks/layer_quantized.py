"""Ways to compute one MoE layer with quantised weights beside ours: libraries by their public module names, and a dequantised copy.

All start from rows of bfloat16 and end with them: what quantises rows is within the time.
"""

from __future__ import annotations

from typing import Any

import torch
from layer_case import Case, Layer, interleave
from layer_peers import Maker, Peer, Unsupported, by_hand, cuda_forward, triton_kernels

from moe_compile.ops.quantized import BLOCK


# ---------------------------------------------------------------- vLLM
def vllm(layer: Layer, case: Case) -> Peer:
    """fused_experts: vLLM's Triton kernels (int4 and few rows: its CUDA kernel) with the configurations that it ships for this device."""
    cuda_forward("vLLM's fused_experts", layer, case, train=False)
    if layer.kind == "mxfp4":
        raise Unsupported("vLLM's fused_experts takes no mxfp4 on this device: vLLM calls triton_kernels")
    whole_groups("vLLM's fused_experts", layer)
    from vllm.model_executor.layers.fused_moe import config, fused_moe  # type: ignore[import-not-found]

    name, make, group = {
        "fp8_block": ("fp8_w8a8", config.fp8_w8a8_moe_quant_config, [BLOCK, BLOCK]),
        "int8": ("int8_w8a16", config.int8_w8a16_moe_quant_config, [0, BLOCK]),
        "int4": ("int4_w4a16", config.int4_w4a16_moe_quant_config, [0, BLOCK]),
    }[layer.kind]
    tuned = fused_moe.get_moe_configs(case.shape.experts, case.shape.inter, name, *group) is not None
    w13, w2 = vllm_values(layer)
    given = make(w1_scale=layer.quantized[0].scales, w2_scale=layer.quantized[1].scales, block_shape=group)

    def call(x: Any, ids: Any, weights: Any) -> Any:
        return fused_moe.fused_experts(x, w13, w2, weights, ids, quant_config=given)

    return Peer(call, [], note="tuned" if tuned else "no tuned configuration for this shape: its default")


def vllm_values(layer: Layer) -> Any:
    """int8 as number + 128 in a byte; the others as they are."""
    values = [each.values for each in layer.quantized]
    if layer.kind != "int8":
        return values
    return layer.once("vLLM int8", lambda: [each.view(torch.uint8) ^ 128 for each in values])


def whole_groups(name: str, layer: Layer) -> None:
    """Raises Unsupported where a library takes only whole groups of 128 columns."""
    for columns in (layer.shape.hidden, layer.shape.inter):
        if columns % BLOCK:
            raise Unsupported(f"{name} takes multiples of {BLOCK} columns, there are {columns}")


# ---------------------------------------------------------------- DeepGEMM
def deep_gemm(layer: Layer, case: Case) -> Peer:
    """Its grouped e4m3 product for contiguous rows, twice. It leaves sort, quantisation, gate and sum to its users: our Triton kernels in
    layer_triton.py, as few passes as there can be."""
    cuda_forward("DeepGEMM", layer, case, train=False)
    if not layer.quantises_rows:
        raise Unsupported(f"DeepGEMM multiplies e4m3 rows and weights, these are {layer.kind}")
    whole_groups("DeepGEMM", layer)
    import deep_gemm as library  # type: ignore[import-not-found]
    import layer_triton as own

    shape, (w13, w2) = case.shape, layer.quantized
    aligned = library.get_m_alignment_for_contiguous_layout()
    rows = own.padded_rows(case.tokens * shape.top_k, shape.experts, aligned)

    def product(rows_RI: Any, scales_GR: Any, w: Any, places: own.Places) -> Any:
        out = torch.empty((rows, w.values.shape[1]), dtype=torch.bfloat16, device=rows_RI.device)
        library.m_grouped_fp8_gemm_nt_contiguous((rows_RI, scales_GR.t()), (w.values, w.scales), out, places.owners)
        return out

    def call(x: Any, ids: Any, weights: Any) -> Any:
        places = own.places_of(ids, shape.experts, aligned, rows)
        up = product(*own.spread(x, ids, places), w13, places)
        down = product(*own.gate(up, places), w2, places)
        return own.add_up(down, weights, places)

    return Peer(call, [])


# ---------------------------------------------------------------- triton_kernels
def mx_matrices(layer: Layer) -> list[tuple[Any, Any]]:
    """mxfp4 weights and scales in the layouts that triton_kernels takes for this device."""
    if layer.kind != "mxfp4":
        raise Unsupported(f"triton_kernels multiplies bfloat16 rows with mxfp4 weights, these are {layer.kind}")
    from triton_kernels.matmul_ogs import PrecisionConfig  # type: ignore[import-not-found]
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor  # type: ignore[import-not-found]
    from triton_kernels.tensor_details import layout  # type: ignore[import-not-found]

    def matrix(values: Any, scales: Any) -> tuple[Any, Any]:
        """values [E, O, I/32, 16], scales [E, O, I/32]: in the library the inputs come before the outputs."""
        of_values, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        of_scales, more = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1)
        wide = wrap_torch_tensor(values.flatten(2).transpose(1, 2), dtype=FP4)
        own = convert_layout(wrap_torch_tensor(scales.transpose(1, 2)), of_scales, **more)
        return convert_layout(wide, of_values, **options), PrecisionConfig(weight_scale=own)

    def make() -> list[tuple[Any, Any]]:
        w13, w2 = layer.quantized
        return [matrix(interleave(w13.values), interleave(w13.scales)), matrix(w2.values, w2.scales)]

    return list(layer.once("triton_kernels mxfp4", make))


# ---------------------------------------------------------------- all of them
MAKERS: dict[str, Maker] = {
    "vLLM": vllm,
    "DeepGEMM": deep_gemm,
    "triton_kernels": triton_kernels(False, mx_matrices),
    "triton_kernels, ids packed before": triton_kernels(True, mx_matrices),
    "hand grouped_mm, dequantised before": by_hand,
}
