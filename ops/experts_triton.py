"""Provider "triton" of the experts: our grouped GEMMs (kernels/), the gate in their epilogue, any layout of weights in place.

    plan = blocks of rows of one expert each, from order and offsets; a GEMM with epilogue a layer; one pass that adds up a token's rows

Nothing is read back to the host, so CUDA graphs hold it. Routing weights of the sum are applied in float32, in the order of k: results are
the same to the bit in every run. Bound by reading the weights for few rows an expert, by the tensor cores for many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import registry
from .evaluate import reverse_plan
from .experts import BACKWARD, COMBINED, COMBINED_BACKWARD, COMBINED_SAVING, LOCAL, NAME, SAVING, SORTED, Call
from .infer import product_dtypes
from .kernels import configs, configs_backward, launch, launch_backward, launch_few
from .kernels.layers import FLOATS, Layer, layers_of, typical_layers, unfit
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


def forward_saving(call: Call, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """y, and the products that the backward reads."""
    y_PO, plan, saved = _rows_saving(call, needs_grad)
    return launch.to_slots(y_PO, plan, call.x.shape[0] * call.top_k).view(call.out_shape), saved


def forward_combined_saving(call: Call, out_dtype: Any, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """out, and the products that the backward reads."""
    y_PO, plan, saved = _rows_saving(call, needs_grad)
    return launch.add_up(y_PO, plan, call.combine_weights, call.x.shape[0], call.top_k, out_dtype), saved


def backward(call: Call, grad: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order; grad [N, O] of the slots' rows, or [T, O] of their sum."""
    layers = layers_of(call.program, call.values)
    plan = _plan(call, configs_backward.block_rows(call.order.shape[0], call.offsets.shape[0]))
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=bool(saved)).kept
    z = launch_backward.saved_products(call, layers, saved, kept, plan)
    return launch_backward.gradients(call, layers, grad, z, needs_grad, plan)


def _rows_saving(call: Call, needs_grad: Sequence[bool]) -> tuple[Any, Plan, list[Any]]:
    layers = layers_of(call.program, call.values)
    reason = launch_backward.unfit(layers, call.program)
    if reason is not None:
        raise ValueError(f"triton: {reason}; choose another provider for training")
    plan = _plan(call, configs_backward.block_rows(call.order.shape[0], call.offsets.shape[0]))
    kept = [call.program.steps[step].attrs[0] for step in reverse_plan(call.program, call.needs(needs_grad), keep=True).kept]
    saves = launch.Saves({j: launch_backward.new_product(call, layers[-2], j) for j in kept}, call.offsets)
    return _through(call, layers, plan, saves), plan, [saves.products[j] for j in kept]


def _rows(call: Call) -> tuple[Any, Plan]:
    """(y [P, O] in the plan's rows, the plan)."""
    layers = layers_of(call.program, call.values)
    plan = _plan(call, configs.block_rows(_shape(call, layers, call.order.shape[0], call.offsets.shape[0])))
    return _through(call, layers, plan), plan


def _plan(call: Call, block_rows: int) -> Plan:
    return plan_of_order(call.order, call.offsets, call.x.shape[0] * call.top_k, block_rows)


def _through(call: Call, layers: tuple[Layer, ...], plan: Plan, saves: launch.Saves | None = None) -> Any:
    return launch.run(layers, *_inputs(call), call.weights, call.biases, call.top_k, plan, saves)


def _inputs(call: Call) -> tuple[Any, Any]:
    """x with its columns next to each other, and the program's routing weights."""
    x_TH = call.x if call.x.stride(-1) == 1 else call.x.contiguous()
    return x_TH, None if call.topk_weights is None else call.topk_weights.contiguous()


def _shape(call: Call, layers: tuple[Layer, ...], slots: int, num_experts: int) -> configs.Shape:
    return launch.shape_of(next(layer for layer in layers if layer.products), call.weights, slots, num_experts, call.x)


def supports(problem: registry.Problem) -> str | None:
    if not problem.device.startswith("cuda"):
        return f"triton runs on cuda, device is {problem.device}"
    if problem.format != "standard":
        return f"triton takes standard rows, format is {problem.format!r}"
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
    reason = unfit(program, problem.dtype, parse_layout(problem.weight_layout))
    return reason or (launch_backward.unfit(typical_layers(program, problem.dtype), program) if problem.training else None)


def cost(problem: registry.Problem) -> float:
    """Microseconds: launches, the weights of the experts hit at 4 TB/s, 600 TFLOP/s (float32: 150).

    Training, and experts over ranks, are rated behind cuda_grouped_mm until they have been measured on GPUs.
    """
    slots = (problem.tokens or 1024) * problem.top_k
    weights = 3 * problem.hidden * problem.intermediate
    reads = min(problem.num_experts, slots) * weights * problem.dtype.itemsize / 4e6
    products = slots * 2 * weights / (1.5e8 if problem.dtype == torch.float32 else 6e8)
    measured = not problem.training and problem.world == 1
    return 15.0 + reads + products if measured else 75.0 + 2 * (reads + products)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may be another than that of the call's tensors."""

    @functools.wraps(kernel)
    def launched(call: Call, *args: Any) -> Any:
        with torch.cuda.device_of(call.x):
            return kernel(call, *args)

    return launched


_KERNELS: dict[str, Callable[..., Any]] = {
    NAME: forward,
    SORTED: forward_sorted,
    COMBINED: forward_combined,
    LOCAL: forward_local,
    SAVING: forward_saving,
    BACKWARD: backward,
    COMBINED_SAVING: forward_combined_saving,
    COMBINED_BACKWARD: backward,
}
KERNELS = {name: _on_its_device(kernel) for name, kernel in _KERNELS.items()}
PROVIDER = registry.register(registry.Provider("triton", "experts", KERNELS, cost, supports))
