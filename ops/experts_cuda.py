"""Provider "cuda_grouped_mm" of the experts: all rows at once through torch.nn.functional.grouped_mm.

    rows = x[order // K]; each product is one grouped_mm over offsets; pointwise steps run on all rows; one scatter

Nothing is read back to the host, so a call can be captured in a CUDA graph. A parameter that is a list of tensors
(a ModuleList) is stacked in each call: a copy of those weights, until there is a kernel that takes pointers.
Bound by reading the weights for few rows an expert, by the GEMMs else. The rows of slots without an expert stay
undefined between the products, as grouped_mm leaves them, and are masked where they would leave the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import registry
from .evaluate import Adjoints, Reads, evaluate, reverse, reverse_plan
from .experts import (
    BACKWARD,
    COMBINED,
    COMBINED_BACKWARD,
    COMBINED_SAVING,
    NAME,
    SAVING,
    SORTED,
    Call,
    empty_grads,
    unfit_for_training,
)
from .infer import product_dtypes
from .layout import Slot, quantised
from .program import parse
from .quantized import dequantize

ALIGNMENT = 16  # bytes: what torch asks of the strides and pointers of a grouped_mm operand


class Grouped:
    """One call's rows, sorted by expert, and the products of them."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.tokens = call.order.div(call.top_k, rounding_mode="floor")
        position = torch.arange(call.order.shape[0], dtype=torch.int32, device=call.x.device)
        # E for the rows of slots without an expert, which stand behind all others
        self.expert_N = torch.searchsorted(call.offsets, position, right=True)
        self.no_expert_N1 = (self.expert_N == call.offsets.shape[0]).unsqueeze(1)
        self.stacks: dict[tuple[int, Any], Any] = {}

    def reads(self, mm: Callable[[int, Any], Any]) -> Reads:
        call = self.call
        return Reads(
            lambda: call.x.index_select(0, self.tokens),
            lambda: call.topk_weights.reshape(-1, 1).index_select(0, call.order),
            mm,
            self.bias,
        )

    def mm(self, index: int, rows: Any) -> Any:
        weight = self.weight(self.call.program.steps[index].attrs[0], rows.dtype)
        return F.grouped_mm(aligned(self.call.rows_seen(index, rows)), weight, offs=self.call.offsets)

    def weight(self, j: int, dtype: Any) -> Any:
        """Weight j as one [E, in, out] in the rows' dtype: the parameter itself, a stack or cast of it, or its dequantised values."""
        if (j, dtype) not in self.stacks:
            slot, quantised = self.call.weights.slots[j], self.call.weights.quantized(j)
            own = self.call.weights.tensors[slot.first : slot.first + slot.num]
            whole = dequantize(quantised, dtype) if quantised is not None else own[0] if slot.stacked else torch.stack(list(own))
            whole = whole.transpose(1, 2) if slot.axes == "oi" else whole
            self.stacks[j, dtype] = aligned(whole.to(dtype))
        return self.stacks[j, dtype]

    def bias(self, j: int) -> Any:
        slot = self.call.biases.slots[j]
        own = self.call.biases.tensors[slot.first : slot.first + slot.num]
        vectors = own[0] if slot.stacked else torch.stack(list(own))
        return vectors.index_select(0, self.expert_N.clamp(max=self.call.offsets.shape[0] - 1))

    def to_slots(self, rows: Any) -> Any:
        """Rows in slot order, those of no expert zero."""
        rows = rows.masked_fill(self.no_expert_N1, 0)
        slots = self.call.x.shape[0] * self.call.top_k
        left_out = slots > self.call.order.shape[0]
        y_NO = rows.new_zeros((slots, rows.shape[1])) if left_out else rows.new_empty(rows.shape)
        return y_NO.index_copy_(0, self.call.order, rows)

    def scale(self) -> Any:
        """The combine's weight of each row [N, 1], or None."""
        weights = self.call.combine_weights
        return None if weights is None else weights.reshape(-1, 1).index_select(0, self.call.order)

    def sum_of_tokens(self, rows: Any, out_dtype: Any) -> Any:
        """out [T, O]: each token's rows, weighed, added in float32 or wider in any order (in one, if torch is asked for determinism)."""
        wide, scale = torch.promote_types(rows.dtype, torch.float32), self.scale()
        rows = rows.to(wide) if scale is None else rows * scale.to(wide)
        out_TO = rows.new_zeros((self.call.x.shape[0], rows.shape[1]))
        return out_TO.index_add_(0, self.tokens, rows.masked_fill_(self.no_expert_N1, 0)).to(out_dtype)


def aligned(matrix: Any) -> Any:
    """The matrix itself if grouped_mm takes its layout, else a contiguous copy."""
    elements = ALIGNMENT // matrix.element_size()
    row, column = matrix.stride()[-2:]
    dense = (column == 1 and row % elements == 0) or (row == 1 and column % elements == 0)
    return matrix if dense and matrix.data_ptr() % ALIGNMENT == 0 else matrix.contiguous().clone()


def forward(call: Call) -> Any:
    """y [T, K, O] in slot order; rows of slots without an expert are zero."""
    return forward_saving(call, [False] * len(call.parameters()))[0]


def forward_sorted(call: Call) -> tuple[Any, Any]:
    """(y in the order of call.order, rows behind the last expert's undefined; int32 [N] the row of each slot, -1 for none)."""
    grouped = Grouped(call)
    y_NO = evaluate(call.program, grouped.reads(grouped.mm))[-1].expand(call.order.shape[0], call.values[-1].width).contiguous()
    place = torch.arange(call.order.shape[0], dtype=torch.int32, device=call.x.device)
    rows = torch.full((call.x.shape[0] * call.top_k,), -1, dtype=torch.int32, device=call.x.device)
    return y_NO, rows.index_copy_(0, call.order, place.masked_fill(grouped.no_expert_N1[:, 0], -1))


def forward_saving(call: Call, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """y, and the products that the backward reads (their rows of no expert are undefined)."""
    grouped = Grouped(call)
    values = evaluate(call.program, grouped.reads(grouped.mm))
    rows = values[-1].expand(call.order.shape[0], call.values[-1].width)
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=True).kept
    return grouped.to_slots(rows).view(call.out_shape), [values[index].contiguous() for index in kept]


def forward_combined(call: Call, out_dtype: Any) -> Any:
    """out [T, O]: rows stay sorted by expert up to their token's sum."""
    return forward_combined_saving(call, out_dtype, [False] * len(call.parameters()))[0]


def forward_combined_saving(call: Call, out_dtype: Any, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """out, and the products that the backward reads."""
    grouped = Grouped(call)
    values = evaluate(call.program, grouped.reads(grouped.mm))
    rows = values[-1].expand(call.order.shape[0], call.values[-1].width)
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=True).kept
    return grouped.sum_of_tokens(rows, out_dtype), [values[index].contiguous() for index in kept]


def backward_combined(call: Call, grad_TO: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order, the combine's weights last."""
    return _backward(call, lambda grouped: grad_TO.index_select(0, grouped.tokens), saved, needs_grad)


def backward(call: Call, grad_NO: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order; weight gradients by grouped_mm over the rows, x summed in float32."""
    return _backward(call, lambda grouped: grad_NO.index_select(0, call.order), saved, needs_grad)


def _backward(call: Call, grad_of: Callable[[Grouped], Any], saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    plan = reverse_plan(call.program, call.needs(needs_grad), keep=bool(saved))
    kept = dict(zip(plan.kept, saved, strict=True))
    grouped = Grouped(call)
    reads = grouped.reads(lambda index, rows: kept[index] if index in kept else grouped.mm(index, rows))
    values = evaluate(call.program, reads, plan)
    sums = Sums(grouped, needs_grad)
    found = reverse(call.program, call.values, values, grad_of(grouped), plan, sums.adjoints(), grouped.scale())
    return sums.finish(found.x, found.w, found.scale)


class Sums:
    """Where a backward's gradients go, in call.parameters() order; each is written once if its parameter is used once."""

    def __init__(self, grouped: Grouped, needs_grad: Sequence[bool]) -> None:
        self.grouped, self.call = grouped, grouped.call
        self.grads = empty_grads(self.call, needs_grad)
        self.written = [False] * len(self.grads)
        self.first_bias = 2 + len(self.call.weights.tensors)

    def adjoints(self) -> Adjoints:
        return Adjoints(self.mm, self.bias)

    def mm(self, j: int, rows: Any, grad: Any, wanted: bool) -> Any:
        grad, offsets = aligned(grad), self.call.offsets
        if rows is not None:
            slot = self.call.weights.slots[j]
            left, right = (grad, aligned(rows)) if slot.axes == "oi" else (aligned(rows), grad)
            self.put(2 + slot.first, F.grouped_mm(left.t(), right, offs=offsets), slot)
        if not wanted:
            return None
        return F.grouped_mm(grad, self.grouped.weight(j, grad.dtype).transpose(1, 2), offs=offsets)

    def bias(self, j: int, grad: Any) -> None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        sums = torch.zeros((self.call.offsets.shape[0] + 1, grad.shape[1]), dtype=wide, device=grad.device)
        sums.index_add_(0, self.grouped.expert_N, grad.masked_fill(self.grouped.no_expert_N1, 0).to(wide))
        slot = self.call.biases.slots[j]
        self.put(self.first_bias + slot.first, sums[:-1], slot)

    def put(self, first: int, whole: Any, slot: Slot) -> None:
        """Adds a gradient [E, ...] to the parameter's tensors, by handing it over where that is possible."""
        for at, part in enumerate([whole] if slot.stacked else whole.unbind(0), first):
            target = self.grads[at]
            if target.shape != part.shape:
                continue  # a stand-in: this tensor needs no gradient
            if self.written[at]:
                target.add_(part)
            elif slot.stacked and (part.dtype, part.stride()) == (target.dtype, target.stride()):
                self.grads[at] = part
            else:
                target.copy_(part)
            self.written[at] = True

    def finish(self, dx_NH: Any, dw_N1: Any, dscale_N1: Any) -> list[Any]:
        """Puts the gradients of x and of both weights, and zeroes what nothing flowed into."""
        if dx_NH is not None:
            by_slot = self.grouped.to_slots(dx_NH).view(-1, self.call.top_k, dx_NH.shape[1])
            self.grads[0].copy_(by_slot.sum(1, dtype=torch.promote_types(dx_NH.dtype, torch.float32)))
        if dw_N1 is not None:
            self.grads[1].copy_(self.grouped.to_slots(dw_N1).view(self.grads[1].shape))
        self.written[:2] = [dx_NH is not None, dw_N1 is not None]
        if dscale_N1 is not None:
            self.grads[-1].copy_(self.grouped.to_slots(dscale_N1).view(self.grads[-1].shape))
            self.written[-1] = True
        for grad, written in zip(self.grads, self.written, strict=True):
            if not written:
                grad.zero_()
        return self.grads


def supports(problem: registry.Problem) -> str | None:
    if not problem.device.startswith("cuda"):
        return f"cuda_grouped_mm runs on cuda, device is {problem.device}"
    if problem.format != "standard":
        return f"cuda_grouped_mm takes standard rows, format is {problem.format!r}"
    dtypes = product_dtypes(parse(problem.program), problem.dtype) if problem.program else (problem.dtype,)
    wrong = next((dtype for dtype in dtypes if dtype != torch.bfloat16), None)
    if wrong is not None:
        return f"torch's grouped_mm kernel multiplies bfloat16, the program multiplies {wrong}; use autocast or model.bfloat16()"
    for name, size in (("hidden", problem.hidden), ("intermediate", problem.intermediate)):
        if size * torch.bfloat16.itemsize % ALIGNMENT:
            return f"grouped_mm needs rows of a multiple of {ALIGNMENT} bytes, {name} size {size} is not a multiple of 8"
    return unfit_for_training(problem) or supports_device(problem.device)


def supports_device(device: str) -> str | None:
    """None if torch's grouped_mm runs on a CUDA device, else why not."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"grouped_mm needs compute capability 8.0, {device} has {major}.{minor}"


def cost(problem: registry.Problem) -> float:
    """Microseconds: a dozen launches, the weights at 3 TB/s (copied once more if they are stacked), 400 TFLOP/s.

    Quantised weights are turned into others of the rows' type first, one expert after the other.
    """
    slots = (problem.tokens or 1024) * problem.top_k
    used = min(problem.num_experts, slots)
    weights = 3 * problem.hidden * problem.intermediate
    copies = 3 if "*" in problem.weight_layout else 1
    launches = 60.0 + (100.0 * problem.num_experts if quantised(problem.weight_layout) else 0.0)
    return launches + used * copies * weights * 2 / 3e6 + slots * 2 * weights / 4e8


PROVIDER = registry.register(
    registry.Provider(
        "cuda_grouped_mm",
        "experts",
        {
            NAME: forward,
            SORTED: forward_sorted,
            SAVING: forward_saving,
            BACKWARD: backward,
            COMBINED: forward_combined,
            COMBINED_SAVING: forward_combined_saving,
            COMBINED_BACKWARD: backward_combined,
        },
        cost,
        supports,
    )
)
