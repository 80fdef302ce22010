"""Addresses of tensors into a table on the device."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def address_kernel(table, first, addresses):
    """table[first + i] = addresses[i]; int64 table, a tuple of whole numbers."""
    for i in tl.static_range(len(addresses)):
        tl.store(table + first + i, tl.cast(addresses[i], tl.int64))
