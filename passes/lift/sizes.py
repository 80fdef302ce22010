"""Arithmetic on extents that may be symbolic.

A `Size` is a Python int, a sympy expression over Dynamo's backed size symbols (a token count under `dynamic=True`), or None where the
extent depends on data.  Two sizes are the same only if that is proved; nothing here looks at a hint.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

Size = Any  # int | sympy.Expr | None


def size_of(s: Any) -> Size:
    """Extent of a fake tensor's dimension: an int, a sympy expression, or None (unbacked, so data-dependent)."""
    if isinstance(s, int):
        return s
    if isinstance(s, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

        if free_unbacked_symbols(s):
            return None
        expr = s.node.expr
        return int(expr) if expr.is_number else expr
    return None


def shape_of(t: torch.Tensor) -> list[Size]:
    return [size_of(s) for s in t.shape]


@functools.lru_cache(maxsize=65536)
def _times(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    import sympy

    out = sympy.expand(a * b)
    return int(out) if out.is_number else out


def prod(sizes: Iterable[Size]) -> Size:
    """Product; None as soon as one factor is None."""
    out: Size = 1
    for s in sizes:
        if s is None:
            return None
        out = _times(out, s)
    return out


@functools.lru_cache(maxsize=65536)
def quotient(a: Size, b: Size) -> Size:
    """a / b where b is proved to divide a, else None."""
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if a == b:
        return 1
    import sympy

    q = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.fraction(sympy.together(q))[1] != 1:  # (s + 1) / 2 has its denominator in the coefficients
        return None
    return int(q) if q.is_number else q


def at_most(a: Size, b: Size) -> bool:
    """Is a <= b proved?"""
    if a is None or b is None:
        return False
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    q = quotient(b, a)
    return (isinstance(q, int) and q >= 1) or _not_negative(b, a)


@functools.lru_cache(maxsize=65536)
def _not_negative(a: Size, b: Size) -> bool:
    """Is a - b >= 0, as far as sympy knows from the symbols being extents?"""
    import sympy

    return sympy.expand(a - b).is_nonnegative is True
