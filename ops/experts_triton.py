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

from . import experts_batched, registry
from .comm.payload import dequantize
from .evaluate import reverse_plan
from .experts import (
    BACKWARD,
    CARRIED,
    COMBINED,
    COMBINED_BACKWARD,
    COMBINED_SAVING,
    GRADIENTS,
    LAST,
    LOCAL,
    NAME,
    REVERSE,
    SAVING,
    SHARED,
    SORTED,
    SORTED_E4M3,
    Call,
    unfit_for_training,
)
from .infer import product_dtypes
from .kernels import configs, configs_backward, launch, launch_backward, launch_few, launch_scaled, launch_scaled_few
from .kernels.layers import FLOATS, Layer, layers_of, typical_layers, unfit
from .kernels.plan import Plan, block_within, kept_plan, kept_words, open_plan, plan_of_counts, plan_of_ids, plan_of_order
from .kernels.plan import supports as can_sort
from .layout import parse_layout, quantised
from .program import parse
from .quantized import PACKED, ROWS_TOO, Quantized

MIXED = "all weights of a program are quantised, or none"


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
    own = _quantized(call)
    if launch_few.fits(layers, *ids_TK.shape) and (own is None or launch_scaled_few.fits(own)):
        x_TH, weights_TK = _inputs(call)
        run = launch_few.run if own is None else launch_scaled_few.run
        weights: Any = call.weights if own is None else own
        return run(layers, x_TH, ids_TK, num_experts, weights, call.biases, weights_TK, call.combine_weights, out_dtype)
    plan = plan_of_ids(ids_TK, num_experts, _block_rows(call, layers, ids_TK.numel(), num_experts))
    return launch.add_up(_through(call, layers, plan), plan, call.combine_weights, call.x.shape[0], call.top_k, out_dtype)


def forward_batched(call: Call, batch: experts_batched.Batch) -> Any:
    """y [R, O] in the places of x's rows; those beyond the counts are undefined."""
    layers = layers_of(call.program, call.values)
    rows = block_within(_block_rows(call, layers, batch.expected, batch.counts_E.shape[0]), batch.capacity)
    plan = plan_of_counts(batch.counts_E, batch.capacity, rows, expected=batch.expected, most=batch.most)
    y_PO = _through(call, layers, plan)
    return y_PO if plan.in_place else launch.to_slots(y_PO, plan, call.x.shape[0])


def forward_saving(call: Call, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """y, and the products that the backward reads."""
    y_PO, plan, saved = _rows_saving(call, needs_grad)
    return launch.to_slots(y_PO, plan, call.x.shape[0] * call.top_k).view(call.out_shape), saved


def forward_combined_saving(call: Call, out_dtype: Any, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """out, and the products that the backward reads."""
    y_PO, plan, saved = _rows_saving(call, needs_grad)
    return launch.add_up(y_PO, plan, call.combine_weights, call.x.shape[0], call.top_k, out_dtype), saved


def reverse(call: Call, grad: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """From grad, [N, O] of the slots' rows or [T, O] of their sum, to the first products: launch_backward.Carried's tensors."""
    layers, (products, shared) = layers_of(call.program, call.values), _saved(saved)
    plan = _training_plan(call, shared)
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=bool(saved)).kept
    z = launch_backward.saved_products(call, layers, products, kept, plan)
    return launch_backward.reverse(call, layers, grad, z, needs_grad, plan).tensors()


def carried_types(call: Call, needs_grad: Sequence[bool]) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """(shape, dtype) of what reverse gives."""
    return launch_backward.carried_types(call, _layers(call), needs_grad)


def last_of(call: Call) -> tuple[list[bool], list[bool]]:
    """Which of reverse's tensors, and which of call.parameters(), are of the gradients of the last products' weights and biases."""
    layers = _layers(call)
    return launch_backward.Carried.of_last(layers), launch_backward.parameters_of_last(call, layers)


def _layers(call: Call) -> tuple[Layer, ...]:
    symbolic = any(not isinstance(value.width, int) for value in call.values)  # which no cache takes
    return (layers_of.__wrapped__ if symbolic else layers_of)(call.program, call.values)


def gradients(call: Call, carried: list[Any], shared: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order from what reverse gave."""
    layers = layers_of(call.program, call.values)
    return launch_backward.gradients(call, layers, launch_backward.Carried.of(carried), needs_grad, _training_plan(call, shared))


def backward(call: Call, grad: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Both at once."""
    return gradients(call, reverse(call, grad, saved, needs_grad), _saved(saved)[1], needs_grad)


def shared_types(call: Call) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """The plan, which is the same in all ops of a training step. Sizes may be symbolic."""
    return [((kept_words(call.order.shape[0], call.x.shape[0] * call.top_k, call.offsets.shape[0]),), torch.int32)]


def _saved(saved: list[Any]) -> tuple[list[Any], list[Any]]:
    """(products, what is shared); nothing is where a caller has nothing saved."""
    return saved[:-1], saved[-1:]


def _training_plan(call: Call, shared: Sequence[Any]) -> Plan:
    given, num_slots, num_experts = call.order.shape[0], call.x.shape[0] * call.top_k, call.offsets.shape[0]
    block_rows = configs_backward.block_rows(given, num_experts)
    if not shared:
        return kept_plan(call.order, call.offsets, num_slots, block_rows)
    return open_plan(shared[0], given, num_slots, num_experts, block_rows)


def _rows_saving(call: Call, needs_grad: Sequence[bool]) -> tuple[Any, Plan, list[Any]]:
    layers = layers_of(call.program, call.values)
    reason = launch_backward.unfit(layers, call.program)
    if reason is not None:
        raise ValueError(f"triton: {reason}; choose another provider for training")
    plan = _training_plan(call, ())
    kept = [call.program.steps[step].attrs[0] for step in reverse_plan(call.program, call.needs(needs_grad), keep=True).kept]
    saves = launch.Saves({j: launch_backward.new_product(call, layers[-2], j) for j in kept}, call.offsets)
    return _through(call, layers, plan, saves), plan, [*(saves.products[j] for j in kept), plan.words]


def _rows(call: Call) -> tuple[Any, Plan]:
    """(y [P, O] in the plan's rows, the plan)."""
    layers = layers_of(call.program, call.values)
    block_rows = _block_rows(call, layers, call.order.shape[0], call.offsets.shape[0])
    plan = plan_of_order(call.order, call.offsets, call.x.shape[0] * call.top_k, block_rows)
    return _through(call, layers, plan), plan


def _block_rows(call: Call, layers: tuple[Layer, ...], slots: int, num_experts: int) -> int:
    own = _quantized(call)
    if own is not None:
        return launch_scaled.block_rows(layers, own, slots, num_experts)
    return configs.block_rows(_shape(call, layers, slots, num_experts))


def _quantized(call: Call) -> list[Quantized] | None:
    """The weights where they are quantised, None where none is. Raises ValueError where only some are."""
    own = [call.weights.quantized(j) for j in range(len(call.weights.slots))]
    if not any(own):
        return None
    whole = [each for each in own if each is not None]
    if len(whole) < len(own):
        raise ValueError(f"triton: {MIXED}; dequantise the others, or quantise all")
    return whole


def _through(call: Call, layers: tuple[Layer, ...], plan: Plan, saves: launch.Saves | None = None) -> Any:
    own = _quantized(call)
    if own is not None:
        x_TH, route_w = _inputs(call)
        x_scales = call.x_scales
        if x_scales is not None and not layers[0].products:  # rows that are changed before their product
            x_TH, x_scales = dequantize(x_TH, x_scales, layers[0].operand), None
        return launch_scaled.run(layers, x_TH, route_w, own, call.biases, call.top_k, plan, x_scales)
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
    if problem.format not in ("standard", "batched"):
        return f"triton takes standard or batched rows, format is {problem.format!r}"
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
    reason = unfit(program, problem.dtype, parse_layout(problem.weight_layout)) or _unfit_quantised(problem)
    return reason or (launch_backward.unfit(typical_layers(program, problem.dtype), program) if problem.training else None)


def _unfit_quantised(problem: registry.Problem) -> str | None:
    """What of quantised weights the kernels do not compute."""
    slots = parse_layout(problem.weight_layout)
    if not quantised(problem.weight_layout):
        return None
    if not all(slot.kind for slot in slots):
        return f"triton: {MIXED}, the layout is {problem.weight_layout!r}"
    for layer in typical_layers(parse(problem.program), problem.dtype):
        if len({(slots[each.of].kind, slots[each.of].axes) for each in layer.products}) > 1:
            return f"triton multiplies weights of one kind at a time, the layout is {problem.weight_layout!r}"
    if problem.dtype == torch.float32:
        return "triton multiplies quantised weights with rows of bfloat16 or float16, they are float32"
    major, minor = torch.cuda.get_device_capability(problem.device)
    if (major, minor) < (9, 0) and any(slot.kind.startswith("fp8") for slot in slots):
        return f"triton multiplies e4m3 from compute capability 9.0 on, {problem.device} has {major}.{minor}"
    return unfit_for_training(problem)


def cost(problem: registry.Problem) -> float:
    """Microseconds: launches, the weights of the experts hit at 4 TB/s, 600 TFLOP/s (float32: 150; e4m3 rows: 1000).

    Experts over ranks are rated behind cuda_grouped_mm until they have been measured on GPUs.
    """
    slots = (problem.tokens or 1024) * problem.top_k
    weights = 3 * problem.hidden * problem.intermediate
    bytes_each, rate = float(problem.dtype.itemsize), 1.5e8 if problem.dtype == torch.float32 else 6e8
    if quantised(problem.weight_layout):
        slot = parse_layout(problem.weight_layout)[0]
        bytes_each, rate = (0.5 if slot.kind in PACKED else 1.0), (1e9 if slot.kind in ROWS_TOO else rate)
    reads = min(problem.num_experts, slots) * weights * bytes_each / 4e6
    products = slots * 2 * weights / rate
    return 15.0 + reads + products if problem.world == 1 else 75.0 + 2 * (reads + products)


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
    SORTED_E4M3: forward_sorted,
    COMBINED: forward_combined,
    LOCAL: forward_local,
    experts_batched.NAME: forward_batched,
    SAVING: forward_saving,
    BACKWARD: backward,
    COMBINED_SAVING: forward_combined_saving,
    COMBINED_BACKWARD: backward,
    REVERSE: reverse,
    GRADIENTS: gradients,
}
KERNELS = {name: _on_its_device(kernel) for name, kernel in _KERNELS.items()} | {
    CARRIED: carried_types,
    LAST: last_of,
    SHARED: shared_types,
}
PROVIDER = registry.register(registry.Provider("triton", "experts", KERNELS, cost, supports, replays=True))
