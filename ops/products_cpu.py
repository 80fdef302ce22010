"""Rows sorted by expert times their experts' weights, on a CPU: one GEMM an expert, straight on the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from .blocks import Block, split
from .layout import Params

# Mean rows an expert for which W @ rows.T beats rows @ W.T on an [out, in] weight: oneDNN bfloat16 on any number of
# threads, MKL float32 from two (benchmarks/notes.md).
TRANSPOSED_ROWS = {torch.float32: range(12, 40), torch.bfloat16: range(2, 128), torch.float16: range(2, 128)}

# Mean rows an expert up to which a copy of one operand pays for a weight gradient, where that operand has at least
# COPIED_WIDTH features: 158 -> 82 us at 16 rows of 512 float32, 143 -> 87 at 64 rows of bfloat16, nothing at 256 features.
COPIED_ROWS = {torch.float32: 24, torch.bfloat16: 64, torch.float16: 64}
COPIED_WIDTH = 512


class Products:
    """The products of rows with their experts' weights, and the views of weights that they need."""

    def __init__(self, weights: Params, offsets: Any, blocks: list[Block], inner: Collection[int] = ()) -> None:
        """inner: weights whose products may lie feature by feature in memory."""
        self.weights = weights
        self.inner = inner
        used = sum(len(block.experts) for block in blocks)
        self.few = 4 * used < offsets.shape[0]
        self.offsets = offsets if len(blocks) == 1 and 2 * used >= offsets.shape[0] else None
        self.views: dict[tuple[int, Any, bool], Any] = {}

    def forward(self, block: Block, j: int, rows: Any) -> Any:
        """rows @ W, in whichever memory order is faster."""
        if not (j in self.inner and self._prefers_transposed(block, j, rows.dtype)):
            if self._all_at_once(j, rows):
                return self._grouped(j, rows, transposed=False)
            return self.into(block, j, rows, rows.new_empty((rows.shape[0], self.weights.fan(j)[1])))
        out_t = rows.new_empty((self.weights.fan(j)[1], rows.shape[0]))
        weights = self.of_runs(block, j, rows.dtype, transposed=True)
        multiply(weights, split(block, rows.t(), 1), split(block, out_t, 1))
        return out_t.t()

    def into(self, block: Block, j: int, rows: Any, out: Any) -> Any:
        """rows @ W, written to out."""
        multiply(split(block, rows), self.of_runs(block, j, rows.dtype), split(block, out))
        return out

    def back(self, block: Block, j: int, grad: Any) -> Any:
        """grad @ W.T"""
        if self._all_at_once(j, grad):
            return self._grouped(j, grad, transposed=True)
        out = grad.new_empty((grad.shape[0], self.weights.fan(j)[0]))
        multiply(split(block, grad), self.of_runs(block, j, grad.dtype, transposed=True), split(block, out))
        return out

    def _all_at_once(self, j: int, rows: Any) -> bool:
        """Whether torch's own loop over the experts takes it: 4 % of a layer of 32 experts and 64 tokens."""
        slot = self.weights.slots[j]
        return self.offsets is not None and slot.stacked and in_one_call(rows, self.weights.tensors[slot.first], "e" + slot.axes)

    def _grouped(self, j: int, rows: Any, transposed: bool) -> Any:
        slot = self.weights.slots[j]
        weight = self.weights.tensors[slot.first]
        return torch._grouped_mm(rows, weight if (slot.axes == "io") != transposed else weight.transpose(1, 2), offs=self.offsets)

    def of_runs(self, block: Block, j: int, dtype: Any, transposed: bool = False) -> list[Any]:
        """Weight j of each run's expert, [in, out] or [out, in], in the rows' dtype."""
        key = (j, dtype, transposed)
        if key not in self.views:
            self.views[key] = self._views(*key)
        views = self.views[key]
        return [views[expert] for expert in block.experts]

    def _views(self, j: int, dtype: Any, transposed: bool) -> Any:
        if self.weights.first(j).dtype == dtype and not self.few:
            return self.weights.all(j, transposed)

        def make(expert: int) -> Any:
            weight = self.weights.of(j, expert).to(dtype)
            return weight.t() if transposed else weight

        return _Lazy(make)

    def _prefers_transposed(self, block: Block, j: int, dtype: Any) -> bool:
        if self.weights.slots[j].axes != "oi" or block.mean_rows not in TRANSPOSED_ROWS.get(dtype, ()):
            return False
        return dtype != torch.float32 or torch.get_num_threads() > 1


def in_one_call(rows: Any, weight: Any, layout: str) -> bool:
    """Whether torch's grouped_mm takes them on a CPU: one weight for all experts, of the rows' dtype, and rows of 16 bytes each."""
    if layout not in ("eio", "eoi") or rows.dtype != weight.dtype or rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(_aligned(each) for each in (rows, weight)) and weight.shape[1] * weight.element_size() % 16 == 0


def _aligned(matrix: Any) -> bool:
    row_bytes = matrix.shape[-1] * matrix.element_size()
    return bool(row_bytes % 16 == 0 and matrix.is_contiguous() and matrix.data_ptr() % 16 == 0)


class _Lazy(dict[int, Any]):
    """Weights by expert, made when first asked for: casts, and views where few experts of many are used."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, expert: int) -> Any:
        self[expert] = self.make(expert)
        return self[expert]


def multiply(lefts: Sequence[Any], rights: Sequence[Any], outs: Sequence[Any]) -> None:
    """out = left @ right for each: this loop is the grouped GEMM, 2 us an expert around its mm."""
    for left, right, out in zip(lefts, rights, outs, strict=True):
        torch.mm(left, right, out=out)


def for_weight_gradient(block: Block, rows: Any, grad: Any, axes: str) -> tuple[Any, Any]:
    """Of few rows, copies the operand that MKL and oneDNN want column by column: rows for an [out, in] gradient, else grad."""
    if block.mean_rows > COPIED_ROWS.get(rows.dtype, 0):
        return rows, grad
    if axes == "oi":
        return (rows.t().contiguous().t() if rows.shape[1] >= COPIED_WIDTH else rows), grad
    return rows, (grad.t().contiguous().t() if grad.shape[1] >= COPIED_WIDTH else grad)
