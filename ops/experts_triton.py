"""Provider "triton" of the experts: our grouped GEMMs (kernels/), the gate in their epilogue, any layout of weights in place.

    plan = blocks of rows of one expert each, from order and offsets; a GEMM with epilogue a layer; one pass that adds up a token's rows

Nothing is read back to the host, so CUDA graphs hold it. Routing weights of the sum are applied in float32, in the order of k: results are
the same to the bit in every run. Bound by reading the weights for few rows an expert, by the tensor cores for many.
"""

from __future__ import annotations

from typing import Any

import torch

from . import registry
from .experts import COMBINED, LOCAL, NAME, SORTED, Call
from .infer import product_dtypes
from .kernels import configs, launch, launch_few
from .kernels.layers import FLOATS, Layer, layers_of, unfit
from .kernels.plan import Plan, plan_of_ids, plan_of_order
from .kernels.plan import supports as can_sort
from .layout import parse_layout
from .program import parse


def forward(call: Call) -> Any:
    """y [T, K, O] in slot order; rows of slots without an expert are zero."""
    y_PO, plan = _rows(call)
    return launch.to_slots(y_PO, plan, call.x.shape[0] * call.top_k).view(call.out_shape)


def forward_sorted(call: Call) -> tuple[Any, Any]:
    """(y [P, O], int32 [N] the row of each slot in it, -1 for none)."""
    y_PO, plan = _rows(call)
    return y_PO, plan.rows


def forward_combined(call: Call, out_dtype: Any) -> Any:
    """out [T, O]"""
    y_PO, plan = _rows(call)
    return launch.add_up(y_PO, plan, call.combine_weights, call.x.shape[0], call.top_k, out_dtype)


def forward_local(call: Call, ids_TK: Any, num_experts: int, out_dtype: Any) -> Any:
    """out [T, O] straight from the ids; one token's slots each by itself, without sorting."""
    layers = layers_of(call.program, call.values)
    if launch_few.fits(layers, *ids_TK.shape):
        x_TH, weights_TK = _inputs(call)
        given = (call.weights, call.biases, weights_TK, call.combine_weights)
        return launch_few.run(layers, x_TH, ids_TK, num_experts, *given, out_dtype)
    plan = plan_of_ids(ids_TK, num_experts, configs.block_rows(_shape(call, layers, ids_TK.numel(), num_experts)))
    return launch.add_up(_through(call, layers, plan), plan, call.combine_weights, call.x.shape[0], call.top_k, out_dtype)


def _rows(call: Call) -> tuple[Any, Plan]:
    """(y [P, O] in the plan's rows, the plan)."""
    layers = layers_of(call.program, call.values)
    rows = configs.block_rows(_shape(call, layers, call.order.shape[0], call.offsets.shape[0]))
    plan = plan_of_order(call.order, call.offsets, call.x.shape[0] * call.top_k, rows)
    return _through(call, layers, plan), plan


def _through(call: Call, layers: tuple[Layer, ...], plan: Plan) -> Any:
    return launch.run(layers, *_inputs(call), call.weights, call.biases, call.top_k, plan)


def _inputs(call: Call) -> tuple[Any, Any]:
    """x with its columns next to each other, and the program's routing weights."""
    x_TH = call.x if call.x.stride(-1) == 1 else call.x.contiguous()
    return x_TH, None if call.topk_weights is None else call.topk_weights.contiguous()


def _shape(call: Call, layers: tuple[Layer, ...], slots: int, num_experts: int) -> configs.Shape:
    first = next(layer for layer in layers if layer.products)
    return configs.Shape(slots, num_experts, call.x.shape[1], first.width, len(first.products), first.operand.itemsize)


def supports(problem: registry.Problem) -> str | None:
    if not problem.device.startswith("cuda"):
        return f"triton runs on cuda, device is {problem.device}"
    if problem.format != "standard":
        return f"triton takes standard rows, format is {problem.format!r}"
    if problem.training:
        return "triton has no backward yet, gradients are wanted"
    reason = can_sort(problem.device, problem.num_experts)
    return _unfit(problem) or (None if reason is None else f"triton {reason}")


def _unfit(problem: registry.Problem) -> str | None:
    """What of the program the kernels do not compute."""
    if not problem.program:
        return None
    program = parse(problem.program)
    wrong = next((dtype for dtype in product_dtypes(program, problem.dtype) if dtype not in FLOATS), None)
    if wrong is not None:
        return f"triton multiplies float32, bfloat16 and float16, the program multiplies {wrong}"
    return unfit(program, problem.dtype, parse_layout(problem.weight_layout))


def cost(problem: registry.Problem) -> float:
    """Microseconds: launches, the weights of the experts hit at 4 TB/s, 600 TFLOP/s (float32: 20)."""
    slots = (problem.tokens or 1024) * problem.top_k
    weights = 3 * problem.hidden * problem.intermediate
    used = min(problem.num_experts, slots)
    return 15.0 + used * weights * problem.dtype.itemsize / 4e6 + slots * 2 * weights / (2e7 if problem.dtype == torch.float32 else 6e8)


PROVIDER = registry.register(
    registry.Provider(
        "triton", "experts", {NAME: forward, SORTED: forward_sorted, COMBINED: forward_combined, LOCAL: forward_local}, cost, supports
    )
)
