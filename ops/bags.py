"""Weighted sums of rows on a CPU by torch's embedding_bag, which keeps the sum of one output row in registers, in float32.

5 to 10 times as fast as index_add_ and bmm (benchmarks/notes.md), and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch


def sum_rows(rows_RO: Any, index_M: Any, starts_T: Any, weights_M: Any) -> Any:
    """out[t] = sum of weights[m] * rows[index[m]] over starts[t] <= m < starts[t + 1]; an empty sum is zero.

    rows float64, float32, bfloat16 or float16; out [T, O] has its dtype, and so must have the weights (None: ones).
    """
    if len(starts_T) == 0 or len(index_M) == 0 or rows_RO.shape[1] == 0:
        return rows_RO.new_zeros((len(starts_T), rows_RO.shape[1]))
    return torch.embedding_bag(rows_RO, index_M, starts_T, False, 0, False, weights_M)[0]


def starts(tokens: int, top_k: int) -> Any:
    """Where each token's slots begin."""
    return torch.arange(0, tokens * top_k, top_k) if top_k else torch.zeros(tokens, dtype=torch.int64)


def dtype_of_sum(rows_dtype: Any, weights_dtype: Any, out_dtype: Any) -> Any:
    """The dtype in which sum_rows takes rows and weights so that nothing is rounded before the sum, and the sum once."""
    dtype = rows_dtype if weights_dtype is None else torch.promote_types(rows_dtype, weights_dtype)
    return dtype if dtype == out_dtype and dtype.is_floating_point else torch.promote_types(dtype, torch.float32)


# Bytes of rows that wait for their sum. The C library gives such a buffer from memory that it has already touched; beyond 32 MiB
# every call takes fresh pages from the system, at 2 us each (16 ms for 33 MB, more than the sum).
WAITING_BYTES = 24 << 20


class TokenSums:
    """out[t] = sum of scale * row over a token's slots, where rows come sorted by expert and not by token.

    Rows are written into a buffer (`room`) in the order of `order_N`, slot numbers t * top_k + k, and summed when it is full.
    order_N: as far as slots have an expert. scales_N: by slot number, or None.
    """

    def __init__(self, like: Any, order_N: Any, scales_N: Any, shape_TKO: tuple[int, int, int], out_dtype: Any, largest: int) -> None:
        """like: a tensor of the rows' dtype. largest: the most rows asked for at once."""
        self.tokens, self.top_k, width = shape_TKO
        self.order, self.out_dtype, self.whole = order_N, out_dtype, len(order_N) == self.tokens * self.top_k
        dtype = dtype_of_sum(like.dtype, None if scales_N is None else scales_N.dtype, out_dtype)
        rows = len(order_N)
        if rows * width * dtype.itemsize > WAITING_BYTES:  # parts of a sum are not rounded
            dtype = torch.promote_types(dtype, torch.float32)
            rows = min(rows, max(largest, WAITING_BYTES // (width * dtype.itemsize)))
        self.scales = None if scales_N is None else scales_N.to(dtype)
        self.buffer_RO = like.new_empty((rows, width), dtype=dtype)
        self.start = 0  # the first row of the buffer is row `start` of all
        self.out_TO: Any = None

    def room(self, start: int, stop: int) -> Any:
        """Where rows start..stop go; blocks of rows are asked for in order."""
        if stop - self.start > len(self.buffer_RO):
            self._sum(start)
        return self.buffer_RO[start - self.start : stop - self.start]

    def finish(self) -> Any:
        """out [T, O]"""
        self._sum(len(self.order))
        return self.out_TO.to(self.out_dtype)

    def _sum(self, stop: int) -> None:
        index, starts_T, scales = self._by_token(stop)
        part = sum_rows(self.buffer_RO, index, starts_T, scales)
        self.out_TO = part if self.out_TO is None else self.out_TO.add_(part)
        self.start = stop

    def _by_token(self, stop: int) -> tuple[Any, Any, Any]:
        """The buffer's rows token by token: their places, where each token's begin, their scales."""
        slots = self.order[self.start : stop]
        firsts = starts(self.tokens, self.top_k)
        if self.whole and len(slots) == len(self.order):
            return torch.empty_like(slots).index_copy_(0, slots, torch.arange(len(slots))), firsts, self.scales
        slots, places = slots.sort()
        return places, torch.searchsorted(slots, firsts), None if self.scales is None else self.scales[slots]
