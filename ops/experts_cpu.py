"""Provider "cpu_grouped" of the experts: one GEMM an expert and weight, straight on the parameters, no padding.

Slots sorted by expert are worked off in blocks of rows whose intermediates stay in the L2 cache. In a block the rows are
gathered once, each expert's run goes through one mm, pointwise steps run over the whole block, and the results are
scattered to slot order once. So few rows cost few calls, and many rows no trip to memory.
Bound by reading the used experts' weights below some 32 rows an expert, by the GEMMs above. benchmarks/notes.md has
what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import registry
from .evaluate import Adjoints, Reads, evaluate, reverse, reverse_plan
from .experts import BACKWARD, NAME, SAVING, Call, empty_grads, empty_saved
from .layout import view
from .program import Program

# Values of a block, bytes. Smaller blocks fit L2 and still lose to the calls they add: 512 rows of float32 at
# H = I*2 = 512 beat 128 by 10 %, and 4096 by 5 to 30 % (benchmarks/notes.md).
BLOCK_BYTES = 4 << 20
MIN_ROWS, MAX_ROWS = 64, 2048

# Mean rows an expert for which W @ rows.T beats rows @ W.T on an [out, in] weight: oneDNN bfloat16 on any number of
# threads, MKL float32 from two (benchmarks/notes.md).
TRANSPOSED_ROWS = {torch.float32: range(12, 40), torch.bfloat16: range(2, 128), torch.float16: range(2, 128)}


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

    @property
    def sizes(self) -> list[int]:
        return [run.stop - run.start for run in self.runs]

    def split(self, rows: Any, dim: int = 0) -> Sequence[Any]:
        """One view a run: far cheaper than slicing run by run."""
        return torch.split_with_sizes(rows, self.sizes, dim)


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

    def reads(self, block: Block, saved: dict[int, Any] | None = None, fill: bool = False) -> Reads:
        """What a block's evaluation reads; saved products [N, out] by step are written (fill) or read back."""
        slots = self.call.order[block.start : block.stop]
        tokens = self.tokens[block.start : block.stop]

        def mm(index: int, rows: Any) -> Any:
            j = self.call.program.steps[index].attrs[0]
            if saved is None or index not in saved:
                return self.mm(block, j, rows)
            out = saved[index][block.start : block.stop]
            return self.rowwise(block, j, rows, out) if fill else out

        return Reads(
            lambda: self.call.x.index_select(0, tokens),
            lambda: self.flat_w.index_select(0, slots),
            mm,
            lambda j: self.bias(block, j),
        )

    def mm(self, block: Block, j: int, rows: Any) -> Any:
        weights = self.weights(block, j, rows.dtype)
        if not (j in self.inner and _prefers_transposed(block, rows.dtype, weights[0])):
            return self.rowwise(block, j, rows, rows.new_empty((rows.shape[0], weights[0].shape[1])))
        out_t = rows.new_empty((weights[0].shape[1], rows.shape[0]))
        for weight, part, out in zip(weights, block.split(rows.t(), 1), block.split(out_t, 1), strict=True):
            torch.mm(weight.t(), part, out=out)
        return out_t.t()

    def rowwise(self, block: Block, j: int, rows: Any, result: Any) -> Any:
        weights = self.weights(block, j, rows.dtype)
        for weight, part, out in zip(weights, block.split(rows), block.split(result), strict=True):
            torch.mm(part, weight, out=out)
        return result

    def bias(self, block: Block, j: int) -> Any:
        if len(block.runs) == 1:
            return self.call.biases.of(j, block.runs[0].expert)
        vectors = torch.stack([self.call.biases.of(j, run.expert) for run in block.runs])
        return vectors.repeat_interleave(torch.tensor(block.sizes), 0, output_size=block.stop - block.start)


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
    rows = (block.stop - block.start) // len(block.runs)
    if weight.stride(0) != 1 or rows not in TRANSPOSED_ROWS.get(dtype, ()):
        return False
    return dtype != torch.float32 or torch.get_num_threads() > 1


def rows_per_block(call: Call) -> int:
    """How many rows of all the program's values fit in BLOCK_BYTES (column slices and constants take no room)."""
    width = 0
    for step, value in zip(call.program.steps, call.values, strict=True):
        width += value.width * value.dtype.itemsize if step.op not in ("cols", "const") else 0
    return max(MIN_ROWS, min(MAX_ROWS, BLOCK_BYTES // max(1, width)))


def forward(call: Call) -> Any:
    """y [T, K, O] in slot order; rows of slots without an expert are zero."""
    return _forward(call, None)


def forward_saving(call: Call, needs_grad: Sequence[bool]) -> tuple[Any, list[Any]]:
    """y, and the products that the backward reads; the GEMMs write them where they are kept."""
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=True).kept
    saved = empty_saved(call, needs_grad)
    return _forward(call, dict(zip(kept, saved, strict=True))), saved


def _forward(call: Call, saved: dict[int, Any] | None) -> Any:
    tokens, top_k, width = call.out_shape
    y_NO = call.x.new_empty((tokens * top_k, width), dtype=call.values[-1].dtype)
    experts = _Experts(call, rows_per_block(call))
    for block in experts.blocks:
        rows = evaluate(call.program, experts.reads(block, saved, fill=True))[-1]
        slots = call.order[block.start : block.stop]
        y_NO.index_copy_(0, slots, rows.expand(len(slots), width))
    y_NO.index_fill_(0, call.order[experts.used :], 0)
    for product in (saved or {}).values():
        product[experts.used :] = 0  # rows of no expert: nothing reads them, but an op's result is all defined
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


def backward(call: Call, grad_NO: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order; pointwise values are recomputed, products too if none are saved."""
    plan = reverse_plan(call.program, call.needs(needs_grad), keep=bool(saved))
    products = dict(zip(plan.kept, saved, strict=True))
    experts = _Experts(call, rows_per_block(call))
    sums = _Sums(call, needs_grad, experts)
    for block in experts.blocks:
        slots = call.order[block.start : block.stop]
        values = evaluate(call.program, experts.reads(block, products), plan)
        grad = grad_NO.index_select(0, slots)
        dx, dw = reverse(call.program, call.values, values, grad, plan, sums.adjoints(block))
        if dx is not None:
            sums.dx_TH.index_add_(0, experts.tokens[block.start : block.stop], dx.to(sums.dx_TH.dtype))
        if dw is not None:
            sums.grads[1].view(-1).index_copy_(0, slots, dw.view(-1))
    return sums.finish()


class _Sums:
    """Where a backward's sums go: x in float32 or wider, each weight's gradient where it is returned."""

    def __init__(self, call: Call, needs_grad: Sequence[bool], experts: _Experts) -> None:
        self.call, self.experts = call, experts
        self.grads = empty_grads(call, needs_grad)
        split = 2 + len(call.weights.tensors)
        self.weights, self.biases = self.grads[2:split], self.grads[split:]
        self.needs = call.needs(needs_grad)
        self.seen: set[tuple[int, int]] = set()
        wide = torch.promote_types(call.x.dtype, torch.float32)
        self.dx_TH = torch.zeros_like(call.x, dtype=wide) if needs_grad[0] else None
        for grad in (self.grads[1], *self.biases):
            grad.zero_()

    def adjoints(self, block: Block) -> Adjoints:
        return Adjoints(
            lambda j, rows, grad, wanted: self.mm(block, j, rows, grad, wanted),
            lambda j, grad: self.bias(block, j, grad),
        )

    def mm(self, block: Block, j: int, rows: Any, grad: Any, wanted: bool) -> Any:
        grads = block.split(grad)
        if self.needs.weights[j]:
            for run, part, grad_part in zip(block.runs, block.split(rows), grads, strict=True):
                self.add(j, run.expert, part, grad_part)
        if not wanted:
            return None
        weights = self.experts.weights(block, j, grad.dtype)
        back = grad.new_empty((grad.shape[0], weights[0].shape[0]))
        for weight, part, out in zip(weights, grads, block.split(back), strict=True):
            torch.mm(part, weight.t(), out=out)
        return back

    def add(self, j: int, expert: int, rows: Any, grad: Any) -> None:
        target = view(self.call.weights.slots[j], self.weights, expert)
        if target is None:
            return
        first = (j, expert) not in self.seen
        self.seen.add((j, expert))
        if target.dtype != rows.dtype:
            product = rows.t() @ grad
            target.copy_(product) if first else target.add_(product)
        elif first:
            torch.mm(rows.t(), grad, out=target)
        else:
            target.addmm_(rows.t(), grad)

    def bias(self, block: Block, j: int, grad: Any) -> None:
        parts = [grad] if len(block.runs) == 1 else [part.sum(0) for part in block.split(grad)]
        for run, part in zip(block.runs, parts, strict=True):
            target = view(self.call.biases.slots[j], self.biases, run.expert)
            if target is not None:
                target.add_(part)

    def finish(self) -> list[Any]:
        """Zeroes the gradients of experts without rows, and casts that of x."""
        for j, slot in enumerate(self.call.weights.slots):
            for expert in range(self.call.offsets.shape[0]):
                target = view(slot, self.weights, expert) if (j, expert) not in self.seen else None
                if target is not None:
                    target.zero_()
        if self.dx_TH is not None:
            self.grads[0] = self.dx_TH.to(self.call.x.dtype)
        return self.grads


PROVIDER = registry.register(
    registry.Provider(
        "cpu_grouped",
        "experts",
        {NAME: forward, SAVING: forward_saving, BACKWARD: backward},
        cost,
        supports,
    )
)
