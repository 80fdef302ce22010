"""Provider "cpu_grouped" of the experts: one GEMM an expert and weight, straight on the parameters, no padding.

Slots sorted by expert are worked off in blocks of rows. In a block the rows are gathered once, each expert's run goes
through one mm, pointwise steps run over the whole block, and the results are scattered to slot order once. So few
rows cost few calls, and many rows never fill a temporary of N rows, which costs more in page faults than its pass.
Bound by reading the used experts' weights below some 32 rows an expert, by the GEMMs above; benchmarks/notes.md has
what was tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import registry
from .bags import TokenSums
from .blocks import Block, cut, split
from .evaluate import Adjoints, Reads, evaluate, reverse, reverse_plan
from .experts import (
    BACKWARD,
    COMBINED,
    COMBINED_BACKWARD,
    COMBINED_SAVING,
    NAME,
    SAVING,
    Call,
    empty_grads,
    empty_saved,
    unfit_for_training,
)
from .layout import views
from .products_cpu import Products, for_weight_gradient
from .program import Program

# Values of a block, bytes. Smaller blocks fit L2 and still lose to the calls they add, and experts in several blocks have their
# weights packed again: 6 MiB lose 5 % at 1024 rows an expert (benchmarks/notes.md).
BLOCK_BYTES = 16 << 20
MIN_ROWS, MAX_ROWS = 64, 4096


@functools.lru_cache(maxsize=1024)
def inner_products(program: Program) -> frozenset[int]:
    """Weights whose products only feed other products: their values may lie feature by feature in memory.

    The others reach the result, which is scattered by rows, and a transposed scatter costs more than the mm saves.
    """
    outer = {len(program.steps) - 1}
    for index in reversed(range(len(program.steps))):
        if index in outer and program.steps[index].op != "mm":
            outer.update(program.steps[index].args)
    weights = [(step.attrs[0], index) for index, step in enumerate(program.steps) if step.op == "mm"]
    return frozenset(j for j, _ in weights) - {j for j, index in weights if index in outer}


class Rows:
    """What a block reads beside the weights: its slots' rows of x, routing weights and biases."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.ends = call.offsets.tolist()
        self.used = self.ends[-1] if self.ends else 0
        self.tokens = call.order if call.top_k == 1 else call.order.div(call.top_k, rounding_mode="floor")
        self.flat_w: Any = None if call.topk_weights is None else call.topk_weights.reshape(-1, 1)
        self.flat_scale: Any = None if call.combine_weights is None else call.combine_weights.reshape(-1, 1)
        self.blocks = cut(self.ends, rows_per_block(call))

    def reads(self, block: Block, mm: Callable[[int, Any], Any]) -> Reads:
        return Reads(
            lambda: self.call.x.index_select(0, self.tokens[block.start : block.stop]),
            lambda: self.flat_w.index_select(0, self.slots(block)),
            mm,
            lambda j: self.bias(block, j),
        )

    def slots(self, block: Block) -> Any:
        return self.call.order[block.start : block.stop]

    def scale(self, block: Block) -> Any:
        """The combine's weight of each row [R, 1], or None."""
        return None if self.flat_scale is None else self.flat_scale.index_select(0, self.slots(block))

    def bias(self, block: Block, j: int) -> Any:
        vectors = [self.call.biases.of(j, expert) for expert in block.experts]
        if len(vectors) == 1:
            return vectors[0]
        sizes = torch.tensor(block.sizes)
        return torch.stack(vectors).repeat_interleave(sizes, 0, output_size=block.stop - block.start)


def rows_per_block(call: Call) -> int:
    """How many rows of all the program's values fit in BLOCK_BYTES (column slices and constants take no room)."""
    width = 0
    for step, value in zip(call.program.steps, call.values, strict=True):
        width += value.width * value.dtype.itemsize if step.op not in ("cols", "const") else 0
    return max(MIN_ROWS, min(MAX_ROWS, BLOCK_BYTES // max(1, width)))


def forward(call: Call) -> Any:
    """y [T, K, O] in slot order; rows of slots without an expert are zero."""
    return _forward(call, {})


def forward_saving(call: Call, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """y, and the products that the backward reads; the GEMMs write them where they are kept."""
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=True).kept
    saved = empty_saved(call, needs_grad)
    return _forward(call, dict(zip(kept, saved, strict=True))), saved


def _forward(call: Call, saved: dict[int, Any]) -> Any:
    tokens, top_k, width = call.out_shape
    left_out = tokens * top_k > call.order.shape[0]
    y_NO = (call.x.new_zeros if left_out else call.x.new_empty)((tokens * top_k, width), dtype=call.values[-1].dtype)
    rows = Rows(call)
    products = Products(call.weights, call.offsets, rows.blocks, inner_products(call.program))
    for block in rows.blocks:
        values = evaluate(call.program, rows.reads(block, _forward_mm(call, products, block, saved)))
        y_NO.index_copy_(0, rows.slots(block), values[-1].expand(block.stop - block.start, width))
    if rows.used < len(call.order):
        y_NO.index_fill_(0, call.order[rows.used :], 0)
    _define_rest(saved, rows.used)
    return y_NO.view(tokens, top_k, width)


def _define_rest(saved: dict[int, Any], used: int) -> None:
    """Zeroes the products of slots without an expert: nothing reads them, but an op's result is all defined."""
    for product in saved.values():
        product[used:] = 0


def _forward_mm(
    call: Call, products: Products, block: Block, saved: dict[int, Any], written: dict[int, Any] | None = None
) -> Callable[[int, Any], Any]:
    """A block's products; those in saved or written go where that says."""
    places = {**(written or {}), **{index: kept[block.start : block.stop] for index, kept in saved.items()}}

    def mm(index: int, rows: Any) -> Any:
        j, rows = call.program.steps[index].attrs[0], call.rows_seen(index, rows)
        if index in places:
            return products.into(block, j, rows, places[index])
        return products.forward(block, j, rows)

    return mm


def backward(call: Call, grad_NO: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order; pointwise values are recomputed, products too if none are saved."""
    return _backward(call, lambda rows, block: grad_NO.index_select(0, rows.slots(block)), saved, needs_grad)


def _backward(call: Call, grad_of: Callable[[Rows, Block], Any], saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    plan = reverse_plan(call.program, call.needs(needs_grad), keep=bool(saved))
    kept = dict(zip(plan.kept, saved, strict=True))
    rows = Rows(call)
    products = Products(call.weights, call.offsets, rows.blocks, inner_products(call.program))
    sums = Sums(call, needs_grad, products)
    for block in rows.blocks:
        values = evaluate(call.program, rows.reads(block, _kept_mm(call, products, block, kept)), plan)
        found = reverse(call.program, call.values, values, grad_of(rows, block), plan, sums.adjoints(block), rows.scale(block))
        if found.x is not None:
            sums.dx_TH.index_add_(0, rows.tokens[block.start : block.stop], found.x.to(sums.dx_TH.dtype))
        if found.w is not None:
            sums.grads[1].view(-1).index_copy_(0, rows.slots(block), found.w.view(-1))
        if found.scale is not None:
            target = sums.grads[-1].view(-1)
            target.index_copy_(0, rows.slots(block), found.scale.view(-1).to(target.dtype))
    return sums.finish()


def forward_combined(call: Call, out_dtype: Any) -> Any:
    """out [T, O]: rows wait in the order of the experts for their token's sum, so that nothing is scattered."""
    return _forward_combined(call, out_dtype, {})


def forward_combined_saving(call: Call, out_dtype: Any, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """out, and the products that the backward reads."""
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=True).kept
    saved = empty_saved(call, needs_grad)
    return _forward_combined(call, out_dtype, dict(zip(kept, saved, strict=True))), saved


def _forward_combined(call: Call, out_dtype: Any, saved: dict[int, Any]) -> Any:
    rows = Rows(call)
    products = Products(call.weights, call.offsets, rows.blocks, inner_products(call.program))
    largest = max((block.stop - block.start for block in rows.blocks), default=0)
    like = call.x.new_empty(0, dtype=call.values[-1].dtype)
    scales = None if rows.flat_scale is None else rows.flat_scale.view(-1)
    sums = TokenSums(like, call.order[: rows.used], scales, call.out_shape, out_dtype, largest)
    last = len(call.program.steps) - 1
    for block in rows.blocks:
        room = sums.room(block.start, block.stop)
        written = {last: room} if room.dtype == like.dtype else {}
        result = evaluate(call.program, rows.reads(block, _forward_mm(call, products, block, saved, written)))[-1]
        if result is not room:
            room.copy_(result.expand(block.stop - block.start, -1))
    _define_rest(saved, rows.used)
    return sums.finish()


def backward_combined(call: Call, grad_TO: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order; no row of y is computed again where the program ends in a product."""
    return _backward(call, lambda rows, block: grad_TO.index_select(0, rows.tokens[block.start : block.stop]), saved, needs_grad)


def _kept_mm(call: Call, products: Products, block: Block, kept: dict[int, Any]) -> Callable[[int, Any], Any]:
    def mm(index: int, rows: Any) -> Any:
        if index in kept:
            return kept[index][block.start : block.stop]
        return products.forward(block, call.program.steps[index].attrs[0], rows)

    return mm


class Sums:
    """Where a backward's sums go: x in float32 or wider, each weight's gradient where it is returned."""

    def __init__(self, call: Call, needs_grad: Sequence[bool], products: Products) -> None:
        self.products = products
        self.x_dtype = call.x.dtype
        self.grads = empty_grads(call, needs_grad)
        split_at = 2 + len(call.weights.tensors)
        self.weights = [views(slot, self.grads[2:split_at]) for slot in call.weights.slots]
        self.biases = [views(slot, self.grads[split_at:]) for slot in call.biases.slots]
        self.seen: set[tuple[int, int]] = set()
        self.dx_TH: Any = torch.zeros_like(call.x, dtype=sum_dtype(call.x.dtype)) if needs_grad[0] else None
        for grad in (self.grads[1], *self.grads[split_at:]):  # those that slots without an expert leave as they are
            grad.zero_()

    def adjoints(self, block: Block) -> Adjoints:
        def mm(j: int, rows: Any, grad: Any, wanted: bool) -> Any:
            if rows is not None and self.weights[j]:
                self.add_products(block, j, rows, grad)
            return self.products.back(block, j, grad) if wanted else None

        def bias(j: int, grad: Any) -> None:
            parts = [grad] if len(block.sizes) == 1 else [part.sum(0) for part in split(block, grad)]
            for expert, part in zip(block.experts, parts, strict=True):
                if self.biases[j] and self.biases[j][expert] is not None:
                    self.biases[j][expert].add_(part)

        return Adjoints(mm, bias)

    def add_products(self, block: Block, j: int, rows: Any, grad: Any) -> None:
        """Adds rows.T @ grad, run by run."""
        rows, grad = for_weight_gradient(block, rows, grad, self.products.weights.slots[j].axes)
        parts = zip(block.experts, split(block, rows.t(), 1), split(block, grad), strict=True)
        for expert, left, right in parts:
            target = self.weights[j][expert]
            if target is None:
                continue
            first = (j, expert) not in self.seen
            self.seen.add((j, expert))
            if not first:
                target.add_(left @ right)
            elif target.dtype == left.dtype:
                torch.mm(left, right, out=target)
            else:
                target.copy_(left @ right)

    def finish(self) -> list[Any]:
        """Zeroes the weight gradients of experts without rows, and casts the gradient of x."""
        for j, targets in enumerate(self.weights):
            for expert, target in enumerate(targets):
                if target is not None and (j, expert) not in self.seen:
                    target.zero_()
        if self.dx_TH is not None:
            self.grads[0] = self.dx_TH.to(self.x_dtype)
        return self.grads


def sum_dtype(dtype: Any) -> Any:
    return torch.promote_types(dtype, torch.float32)


def cost(problem: registry.Problem) -> float:
    """Microseconds: 10 a GEMM call, the weights at 20 GB/s, the arithmetic at 100 GFLOP/s."""
    slots = (problem.tokens or 1024) * problem.top_k
    used = min(problem.num_experts, slots)
    weights = 3 * problem.hidden * problem.intermediate
    return 50.0 + used * (20.0 + weights * problem.dtype.itemsize / 2e4) + slots * 2 * weights / 1e5


def supports(problem: registry.Problem) -> str | None:
    if problem.device != "cpu":
        return f"cpu_grouped runs on cpu, device is {problem.device}"
    if problem.format != "standard":
        return f"cpu_grouped takes standard rows, format is {problem.format!r}"
    return unfit_for_training(problem)


PROVIDER = registry.register(
    registry.Provider(
        "cpu_grouped",
        "experts",
        {
            NAME: forward,
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
