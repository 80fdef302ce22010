"""Provider "inline" of the experts: torch code around grouped products, for Inductor to write the rest.

Its op permute_experts_combine_inline has no kernel: whoever traces it (AOTAutograd) sees its parts, so that the gather, the
expert's pointwise steps and the weighted sum become one pass each. Forward and backward only gather: autograd's own
backward of an index would be a scatter with atomic adds. Products are torch's grouped_mm where Inductor can trace that
(bfloat16, rows of 16 bytes), else the op of grouped.py. Where the two stages cannot be one, and when nobody compiles
(validation), the device's own provider runs.
"""

from __future__ import annotations

from typing import Any

import torch

from . import combine, experts, experts_cpu, experts_cuda, grouped, registry
from ._register import register_composite
from .evaluate import Reads, step_value, tilings
from .experts_combine import prepare
from .infer import product_dtypes
from .layout import quantised
from .program import parse

NAME = experts.COMBINED + "_inline"
SCHEMA = (
    f"{NAME}({experts.ARGS_WITHOUT_PROVIDER}, Tensor? combine_weights_TK, ScalarType? out_dtype, Tensor tokens_N, Tensor places_N, "
    "bool in_range) -> Tensor out_TO"
)


def _inline(*args: Any) -> Any:
    *stages, tokens, places, in_range = args
    call, out_dtype = prepare(*stages)
    slots = _Slots(call, tokens, places, in_range)
    layouts = args[7].split(",")  # weight_layout, an entry a weight

    def mm(index: int, rows: Any) -> Any:
        j = call.program.steps[index].attrs[0]
        return _product(call, j, layouts[j].strip(), rows)

    reads = Reads(lambda: slots.rows_of(call.x), lambda: slots.take(call.topk_weights.reshape(-1, 1)), mm, slots.bias)
    values: list[Any] = []
    parts: dict[int, Any] = {}  # columns that were split off together
    for index, step in enumerate(call.program.steps):
        if step.op == "cols" and index not in parts:
            parts |= _split(call, step.args[0], values[step.args[0]])
        value = parts[index] if index in parts else step_value(index, step, [values[arg] for arg in step.args], reads)
        values.append(value.detach() if step.op == "stop" else value)
    y_NO = values[-1].expand(call.order.shape[0], call.out_shape[2])
    return slots.sum(y_NO, call.combine_weights, out_dtype)


def _split(call: experts.Call, whole: int, value: Any) -> dict[int, Any]:
    """All slices of a value that they tile, by the steps that take them: one split, whose backward is one concatenation.

    Each slice's own backward would be zeros around it, and their sum evaluates both sides for every column.
    """
    at = sorted(tilings(call.program, call.values).get(whole, ()), key=lambda index: call.program.steps[index].attrs)
    slices = [call.program.steps[index].attrs for index in at]
    if not at or len(set(slices)) < len(slices):
        return {}
    if all(step == 1 for *_, step in slices):
        return dict(zip(at, value.split([stop - start for start, stop, _ in slices], -1), strict=True))
    if all(step == len(slices) for *_, step in slices):
        return dict(zip(at, value.unflatten(-1, (-1, len(slices))).unbind(-1), strict=True))
    return {}


def _product(call: experts.Call, j: int, layout: str, rows: Any) -> Any:
    slot = call.weights.slots[j]
    tensors = list(call.weights.tensors[slot.first : slot.first + slot.num])
    if rows.dtype == torch.bfloat16 and (_on_able_gpu(rows) or (slot.stacked and tensors[0].dtype == rows.dtype and not rows.is_cuda)):
        whole = (tensors[0] if slot.stacked else torch.stack(tensors)).to(rows.dtype)
        whole = whole.transpose(1, 2) if slot.axes == "oi" else whole
        if _aligned(rows) and _aligned(whole) and whole.shape[2] % 8 == 0:  # the last for the backward's product
            return torch._grouped_mm(rows, whole, offs=call.offsets)
    return grouped.differentiable(rows, call.offsets, tensors, layout)


def _on_able_gpu(rows: Any) -> bool:
    return bool(rows.is_cuda and experts_cuda.supports_device(str(rows.device)) is None)


def _aligned(matrix: Any) -> bool:
    """Whether grouped_mm takes its layout: dense along one dimension, steps of 16 bytes along the other, and from a multiple of 16 on."""
    row, column = matrix.stride()[-2:]
    dense, step = (column, row) if column == 1 else (row, column)
    return bool(dense == 1 and step * matrix.element_size() % 16 == 0 and matrix.storage_offset() * matrix.element_size() % 16 == 0)


class _Slots:
    """Slots in sorted order: which token's each is, and where each has gone (sort_slots of quantize_dispatch.py)."""

    def __init__(self, call: experts.Call, tokens: Any, places: Any, in_range: bool) -> None:
        """in_range: every slot has an expert. Else the rows of those that have none are undefined and count as zero."""
        self.call, self.order, self.tokens, self.places = call, call.order, tokens, places
        self.valid = None
        if not in_range:
            has_experts = call.offsets.shape[0] > 0
            self.valid = (self._positions() < (call.offsets[-1] if has_experts else 0)).unsqueeze(-1)

    def _positions(self) -> Any:
        return torch.arange(self.order.shape[0], dtype=torch.int32, device=self.order.device)

    def rows_of(self, x_TH: Any) -> Any:
        return _Permute.apply(x_TH, self.tokens, self.places, self.valid, self.call.top_k)

    def take(self, by_slot_N1: Any) -> Any:
        return _Permute.apply(by_slot_N1, self.order, self.places, self.valid, 1)

    def bias(self, j: int) -> Any:
        """Bias j of each row's expert; rows without one take the last expert's."""
        slot, tensors = self.call.biases.slots[j], self.call.biases.tensors
        stacked = tensors[slot.first] if slot.stacked else torch.stack(list(tensors[slot.first : slot.first + slot.num]))
        expert = torch.searchsorted(self.call.offsets, self._positions(), right=True).clamp(max=stacked.shape[0] - 1)
        return _take(stacked, expert)

    def sum(self, y_NO: Any, weights_TK: Any, out_dtype: Any) -> Any:
        return _Combine.apply(y_NO, weights_TK, self.tokens, self.order, self.places, self.valid, out_dtype, self.call.top_k)


def _defined(rows: Any, valid: Any) -> Any:
    return rows if valid is None else torch.where(valid, rows, 0)


def _take(source: Any, index: Any) -> Any:
    """source[index] for indices known to be in range, so that Inductor need not check them in its inner loop."""
    return torch.ops.aten._unsafe_index(source, [index])


class _Permute(torch.autograd.Function):
    """rows[n] = source[index[n]]; each row of the source is read top_k times."""

    @staticmethod
    def forward(ctx: Any, source: Any, index: Any, places: Any, valid: Any, top_k: int) -> Any:
        ctx.save_for_backward(places, valid)
        ctx.top_k = top_k
        return _take(source, index)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        places, valid = ctx.saved_tensors
        terms = _take(_defined(grad, valid), places)
        if ctx.top_k > 1:
            wide = torch.promote_types(grad.dtype, torch.float32)
            terms = terms.view(-1, ctx.top_k, grad.shape[1]).to(wide).sum(1).to(grad.dtype)
        return terms, None, None, None, None


class _Combine(torch.autograd.Function):
    """out[t] = sum_k w[t, k] * y[places[t, k]]; slots without an expert count as zero rows."""

    @staticmethod
    def forward(ctx: Any, y: Any, weights: Any, tokens: Any, order: Any, places: Any, valid: Any, out_dtype: Any, top_k: int) -> Any:
        ctx.save_for_backward(y if weights is not None and ctx.needs_input_grad[1] else None, weights, tokens, order, places, valid)
        ctx.dtype = y.dtype
        wide = combine.accumulate_dtype(y, weights)
        terms = _take(_defined(y, valid), places).view(-1, top_k, y.shape[1]).to(wide)
        if weights is not None:
            terms = terms * weights.to(wide).unsqueeze(-1)
        return terms.sum(1).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad_TO: Any) -> tuple[Any, ...]:
        y, weights, tokens, order, places, valid = ctx.saved_tensors
        wide = torch.promote_types(torch.promote_types(ctx.dtype, torch.float32), ctx.dtype if weights is None else weights.dtype)
        grad = _take(grad_TO.to(wide), tokens)
        dw = None
        if y is not None:
            products = _defined(grad * y.to(wide), valid).sum(1)
            dw = _take(products, places).view_as(weights).to(weights.dtype)
        if weights is not None:
            grad = grad * _take(weights.reshape(-1), order).to(wide).unsqueeze(-1)
        return _defined(grad, valid).to(ctx.dtype), dw, *[None] * 6


OP = register_composite(SCHEMA, _inline)


# On a CPU, values [N, width] up to which fresh buffers for all rows cost less than blocks of rows: the C library takes larger ones
# from the system in every call, at 2 us a page (benchmarks/notes.md).
BUFFER_BYTES = 24 << 20


def _own(device: str) -> registry.Provider:
    return experts_cpu.PROVIDER if device == "cpu" else experts_cuda.PROVIDER


def cost(problem: registry.Problem) -> float:
    """Microseconds: what the device's own provider takes, less the calls and passes that Inductor saves."""
    own = _own(problem.device)
    if own.supports(problem) is not None:  # one expert after the other
        return 100.0 + 50.0 * problem.num_experts
    return 0.9 * own.cost(problem) - 30.0


def supports(problem: registry.Problem) -> str | None:
    if problem.compiler != "inductor":
        return f"inline is torch code for Inductor, the inner compiler is {problem.compiler or 'another'}"
    if problem.world > 1:
        return f"inline is fused with a sum on the same rank, world is {problem.world}"
    if quantised(problem.weight_layout):
        return f"inline multiplies weights of a float type, the layout is {problem.weight_layout!r}"
    if problem.tokens == 0:
        return "inline leaves a graph of 0 tokens to others, as Inductor writes kernels that it cannot compile"
    if problem.format != "standard":
        return f"inline takes standard rows, format is {problem.format!r}"
    if problem.training and parse(problem.program).num_biases:
        return "inline has no fast gradient of biases"
    slots = (problem.tokens or 0) * problem.top_k
    needed = slots * max(problem.hidden, problem.intermediate) * problem.dtype.itemsize
    if problem.device == "cpu" and needed > BUFFER_BYTES:
        return f"inline takes buffers of up to {BUFFER_BYTES >> 20} MiB on a CPU, {slots} rows need {needed >> 20}"
    return None


def _kernel_of(op: str) -> Any:
    """The kernel of the device's own provider, or the reference where that does not multiply the call's dtypes."""

    def kernel(call: experts.Call, *rest: Any) -> Any:
        own = "cpu_grouped" if call.x.device.type == "cpu" else "cuda_grouped_mm" if _grouped_on_gpu(call) else "reference"
        return registry.kernel("experts", own, op)(call, *rest)

    return kernel


def _grouped_on_gpu(call: experts.Call) -> bool:
    """Whether torch's grouped_mm takes every product of the program."""
    w_dtype = torch.float32 if call.topk_weights is None else call.topk_weights.dtype
    narrow = all(dtype == torch.bfloat16 for dtype in product_dtypes(call.program, call.x.dtype, w_dtype))
    widths = [width for j in range(len(call.weights.slots)) for width in call.weights.fan(j)]
    return narrow and all(width % 8 == 0 for width in widths) and _on_able_gpu(call.x)


PROVIDER = registry.register(
    registry.Provider(
        "inline", "experts", {NAME: _inline, **{op: _kernel_of(op) for op in (experts.NAME, experts.BACKWARD)}}, cost, supports
    )
)
