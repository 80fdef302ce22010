"""Experts of rows in the batched format: [E_local * capacity, H], of which each expert's first counts[e] hold something.

A provider with a kernel for it computes them where they lie, without an order, and writes their results to the same rows; what stands in
rows beyond the counts, before or after, is undefined and never read. Counts stay on the device. For another provider the rows are slots
like any others, each with one expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .experts import Call
from .kernels import launch_batched

NAME = "batched_experts"  # (call without order, perhaps with x_scales, Batch) -> y [R, O] in the rows' places


class Batch(NamedTuple):
    """counts int32 [E_local], at most capacity each; their sum is likely to be `expected` and at most `most`."""

    counts_E: Any
    capacity: int
    expected: int
    most: int


def batch_of(got: Any, own: Any, tokens: int) -> Batch:
    """Of what an exchange `own` brought, to which this rank gave so many tokens: the other ranks are taken to have given as many."""
    rows, local = got.rows.shape[0], got.metadata.counts_E.shape[0]
    setup = own.setup
    most = min(rows, own.world * setup.max_tokens * setup.top_k)
    return Batch(got.metadata.counts_E, rows // local, max(1, min(most, tokens * setup.top_k)), most)


def plain_rows(got: Any, batch: Batch, dtype: Any) -> Any:
    """The rows that came, in dtype. Kernels of this name are Triton's, so Triton is there."""
    if got.rows.dtype == dtype:
        return got.rows
    return launch_batched.dequantize(got.rows, got.scales, batch.counts_E, batch.expected, dtype)


def check(call: Call, batch: Batch) -> None:
    """Raises ValueError for counts that do not fit the rows, and for programs that read routing weights."""
    experts, rows = batch.counts_E.shape[0], call.x.shape[0]
    if rows != experts * batch.capacity:
        raise ValueError(f"rows of {experts} experts with a capacity of {batch.capacity} must be {experts * batch.capacity}, got {rows}")
    if call.topk_weights is not None or call.top_k != 1:
        raise ValueError(
            f"rows of the batched format come without routing weights and are one slot each, got top_k={call.top_k}"
            f"{' and weights' if call.topk_weights is not None else ''}; choose a provider of the standard format"
        )
