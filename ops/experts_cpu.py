"""Provider "cpu_grouped" of the experts: one GEMM an expert and weight, straight on the parameters, no padding.

Slots sorted by expert are worked off in blocks of rows whose intermediates stay in the L2 cache. In a block the rows are
gathered once, each expert's run goes through one mm, pointwise steps run over the whole block, and the results are
scattered to slot order once. So few rows cost few calls, and many rows no trip to memory.
Bound by reading the used experts' weights below some 32 rows an expert, by the GEMMs above. benchmarks/notes.md has
what was tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import registry
from .evaluate import Adjoints, Reads, evaluate, reverse
from .experts import NAME, Call, empty_grads
from .layout import view
from .program import Program

# Intermediates of a block: 2 MiB of L2 a core on the machine measured; half of it leaves room for the weights.
BLOCK_BYTES = 1 << 20
MIN_ROWS, MAX_ROWS = 64, 1024

# Runs for which W @ rows.T beats rows @ W.T on an [out, in] weight (MKL float32, oneDNN bfloat16; benchmarks/notes.md).
TRANSPOSED_ROWS = {torch.float32: range(12, 56), torch.bfloat16: range(2, 192), torch.float16: range(2, 192)}


class Run(NamedTuple):
    """Rows start..stop of a block belong to one expert."""

    expert: int
    start: int
    stop: int


class Block(NamedTuple):
    """Rows start..stop of the sorted slots, and the runs in it (counted from the block's start)."""

    start: int
    stop: int
    runs: list[Run]


def plan(ends: list[int], rows_per_block: int) -> list[Block]:
    """Cuts the sorted slots into blocks of at most rows_per_block rows; an expert is split only if it is larger."""
    blocks: list[Block] = []
    runs: list[Run] = []
    first = start = 0
    for expert, end in enumerate(ends):
        while start < end:
            if runs and end - first > rows_per_block:
                blocks.append(Block(first, start, runs))
                first, runs = start, []
            stop = min(end, first + rows_per_block)
            runs.append(Run(expert, start - first, stop - first))
            start = stop
    if runs:
        blocks.append(Block(first, start, runs))
    return blocks


class _Lazy(dict[int, Any]):
    """Views by expert, made when first asked for."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, expert: int) -> Any:
        self[expert] = self.make(expert)
        return self[expert]


class _Experts:
    """One call's state: the plan, and views of the weights made once."""

    def __init__(self, call: Call, rows_per_block: int) -> None:
        self.call = call
        ends = call.offsets.tolist()
        self.used = ends[-1] if ends else 0
        self.blocks = plan(ends, rows_per_block)
        self.tokens = call.order if call.top_k == 1 else call.order.div(call.top_k, rounding_mode="floor")
        self.flat_w = None if call.topk_weights is None else call.topk_weights.reshape(-1, 1)
        self.views: dict[tuple[int, Any], Any] = {}
        self.inner = inner_products(call.program)

    def weights(self, block: Block, j: int, dtype: Any) -> list[Any]:
        """Weight j of each run's expert, in the rows' dtype."""
        if (j, dtype) not in self.views:
            self.views[j, dtype] = self._views(j, dtype)
        views = self.views[j, dtype]
        return [views[run.expert] for run in block.runs]

    def _views(self, j: int, dtype: Any) -> Any:
        cast = self.call.weights.first(j).dtype != dtype
        runs = sum(len(block.runs) for block in self.blocks)
        if not cast and 4 * runs >= self.call.offsets.shape[0]:
            return self.call.weights.all(j)
        # Few experts of many (decoding): a view costs a microsecond, so only theirs are made.
        return _Lazy(lambda expert: self.call.weights.of(j, expert).to(dtype))

    def reads(self, block: Block) -> Reads:
        slots = self.call.order[block.start : block.stop]
        return Reads(
            self.call.x.index_select(0, self.tokens[block.start : block.stop]),
            None if self.flat_w is None else self.flat_w.index_select(0, slots),
            lambda j, rows: self.mm(block, j, rows),
            lambda j: self.bias(block, j),
        )

    def mm(self, block: Block, j: int, rows: Any) -> Any:
        weights = self.weights(block, j, rows.dtype)
        transposed = j in self.inner and _prefers_transposed(block, rows.dtype, weights[0])
        if len(weights) == 1:
            return torch.mm(weights[0].t(), rows.t()).t() if transposed else torch.mm(rows, weights[0])
        sizes = [run.stop - run.start for run in block.runs]
        if transposed:
            out_t = rows.new_empty((weights[0].shape[1], rows.shape[0]))
            for weight, part, out in zip(weights, rows.t().split(sizes, 1), out_t.split(sizes, 1), strict=True):
                torch.mm(weight.t(), part, out=out)
            return out_t.t()
        result = rows.new_empty((rows.shape[0], weights[0].shape[1]))
        for weight, part, out in zip(weights, rows.split(sizes), result.split(sizes), strict=True):
            torch.mm(part, weight, out=out)
        return result

    def bias(self, block: Block, j: int) -> Any:
        if len(block.runs) == 1:
            return self.call.biases.of(j, block.runs[0].expert)
        vectors = torch.stack([self.call.biases.of(j, run.expert) for run in block.runs])
        sizes = torch.tensor([run.stop - run.start for run in block.runs])
        return vectors.repeat_interleave(sizes, 0, output_size=block.stop - block.start)


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


def _prefers_transposed(block: Block, dtype: Any, weight: Any) -> bool:
    window = TRANSPOSED_ROWS.get(dtype)
    rows = (block.stop - block.start) // len(block.runs)
    return window is not None and rows in window and weight.stride(0) == 1


def rows_per_block(call: Call) -> int:
    """How many rows of all the program's values fit in BLOCK_BYTES."""
    width = sum(value.width * value.dtype.itemsize for value in call.values if value.dtype is not None)
    return max(MIN_ROWS, min(MAX_ROWS, BLOCK_BYTES // max(1, width)))


def forward(call: Call) -> Any:
    """y [T, K, O] in slot order; rows of slots without an expert are zero."""
    tokens, top_k, width = call.out_shape
    y_NO = call.x.new_empty((tokens * top_k, width), dtype=call.values[-1].dtype)
    experts = _Experts(call, rows_per_block(call))
    for block in experts.blocks:
        rows = evaluate(call.program, experts.reads(block))[-1]
        slots = call.order[block.start : block.stop]
        y_NO.index_copy_(0, slots, rows.expand(len(slots), width))
    y_NO.index_fill_(0, call.order[experts.used :], 0)
    return y_NO.view(tokens, top_k, width)


def cost(problem: registry.Problem) -> float:
    """Microseconds: 10 a GEMM call, the weights at 20 GB/s, the arithmetic at 100 GFLOP/s."""
    slots = (problem.tokens or 1024) * problem.top_k
    used = min(problem.num_experts, slots)
    weights = 3 * problem.hidden * problem.intermediate
    return 50.0 + used * (20.0 + weights * problem.dtype.itemsize / 2e4) + slots * 2 * weights / 1e5


def supports(problem: registry.Problem) -> str | None:
    if problem.device != "cpu":
        return f"cpu_grouped runs on cpu, device is {problem.device}"
    return None if problem.format == "standard" else f"cpu_grouped takes standard rows, format is {problem.format!r}"


def backward(call: Call, grad_NO: Any, needs_grad: list[bool]) -> list[Any]:
    """Gradients in call.parameters() order, from recomputed values; half precision is summed in float32."""
    grads = empty_grads(call, needs_grad)
    experts = _Experts(call, MAX_ROWS)
    sums = _Sums(call, grads, needs_grad, experts)
    needs = call.needs(needs_grad)
    for block in experts.blocks:
        slots = call.order[block.start : block.stop]
        values = evaluate(call.program, experts.reads(block))
        adjoints = Adjoints(
            lambda j, rows, grad, wanted, block=block: sums.mm(block, j, rows, grad, wanted),
            lambda j, grad, block=block: sums.bias(block, j, grad),
        )
        dx, dw = reverse(call.program, values, grad_NO.index_select(0, slots), needs, adjoints)
        if dx is not None:
            sums.dx_TH.index_add_(0, experts.tokens[block.start : block.stop], dx.to(sums.dx_TH.dtype))
        if dw is not None:
            grads[1].view(-1).index_copy_(0, slots, dw.view(-1))
    return sums.finish()


class _Sums:
    """Where a backward's sums go: x in float32 or wider, each weight's gradient where it is returned."""

    def __init__(self, call: Call, grads: list[Any], needs_grad: list[bool], experts: _Experts) -> None:
        self.call, self.grads, self.experts = call, grads, experts
        self.needs = call.needs(needs_grad)
        split = 2 + len(call.weights.tensors)
        self.weights, self.biases = grads[2:split], grads[split:]
        self.seen: set[tuple[int, int]] = set()
        wide = torch.promote_types(call.x.dtype, torch.float32)
        self.dx_TH = torch.zeros_like(call.x, dtype=wide) if needs_grad[0] else None
        if needs_grad[1]:
            grads[1].zero_()
        for bias in self.biases:
            bias.zero_()

    def mm(self, block: Block, j: int, rows: Any, grad: Any, wanted: bool) -> Any:
        back = grad.new_empty(rows.shape) if wanted else None
        weights = self.experts.weights(block, j, grad.dtype)
        for run, weight in zip(block.runs, weights, strict=True):
            part = grad[run.start : run.stop]
            if self.needs.weight(j):
                self.add(j, run.expert, rows[run.start : run.stop], part)
            if back is not None:
                torch.mm(part, weight.t(), out=back[run.start : run.stop])
        return back

    def add(self, j: int, expert: int, rows: Any, grad: Any) -> None:
        target = view(self.call.weights.slots[j], self.weights, expert)
        if not target.numel():
            return
        first = (j, expert) not in self.seen
        self.seen.add((j, expert))
        if target.dtype == rows.dtype:
            torch.mm(rows.t(), grad, out=target) if first else target.addmm_(rows.t(), grad)
        elif first:
            target.copy_(rows.t() @ grad)
        else:
            target.add_(rows.t() @ grad)

    def bias(self, block: Block, j: int, grad: Any) -> None:
        for run in block.runs:
            target = view(self.call.biases.slots[j], self.biases, run.expert)
            if target.numel():
                target.add_(grad if len(block.runs) == 1 else grad[run.start : run.stop].sum(0))

    def finish(self) -> list[Any]:
        for j, slot in enumerate(self.call.weights.slots):
            for expert in range(self.call.offsets.shape[0]):
                if (j, expert) not in self.seen:
                    view(slot, self.weights, expert).zero_() if self.needs.weight(j) else None
        if self.dx_TH is not None:
            if self.dx_TH.dtype == self.grads[0].dtype:
                self.grads[0] = self.dx_TH
            else:
                self.grads[0].copy_(self.dx_TH)
        return self.grads


PROVIDER = registry.register(
    registry.Provider("cpu_grouped", "experts", {NAME: forward, NAME + "_backward": backward}, cost, supports)
)
