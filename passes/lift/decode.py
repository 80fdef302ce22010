"""What an expression is worth where all that it depends on is known: every byte that a weight can be, every index of a dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .expr import Expr, Refused, is_const

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "neg": torch.neg, "abs": torch.abs, "floor": torch.floor, "exp2": torch.exp2, "square": torch.square, "div": torch.div,
    "reciprocal": torch.reciprocal, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}


def evaluate(e: Expr, table: Mapping[Expr, torch.Tensor], at: Callable[[int, int], torch.Tensor | None] | None = None) -> torch.Tensor:
    """e in float64 where the expressions of `table` have the values given there; casts between floats change nothing.

    at(c, n): what stands in the place of the fixed digit c of n, None for c itself.  Raises Refused for what is not known here.
    """
    memo: dict[Expr, torch.Tensor] = {}

    def go(x: Expr) -> torch.Tensor:
        if x in table:
            return table[x].double()
        if x not in memo:
            memo[x] = compute(x)
        return memo[x]

    def compute(x: Expr) -> torch.Tensor:
        a = x.args
        if x.op == "const":
            return torch.tensor(float(a[0]), dtype=torch.float64)
        if x.op == "undef":
            return torch.tensor(float("nan"), dtype=torch.float64)
        if x.op in ("add", "mul"):
            return _fold(torch.add if x.op == "add" else torch.mul, [go(y) for y in a])
        if x.op in ("idiv", "mod"):
            return torch.floor(go(a[0]) / a[1]) if x.op == "idiv" else torch.remainder(go(a[0]), a[1])
        if x.op == "mix":
            return mixed(a)
        if x.op == "cast" and a[1].is_floating_point:
            return go(a[0])
        if x.op == "not":
            return 1 - go(a[0])
        if x.op == "where":
            return torch.where(go(a[0]) != 0, go(a[1]), go(a[2]))
        if x.op == "sel":
            return _chosen(go(a[0]), [go(y) for y in a[1:]])
        if x.op == "e4m3":
            return go(a[0]).to(torch.uint8).view(torch.float8_e4m3fn).double()
        if x.op == "load" and a[0].constant is not None:
            return a[0].constant[tuple(go(i).long() for i in a[1:])].double()
        if x.op in _FUNCTIONS:
            out = _FUNCTIONS[x.op](*[go(y) for y in a])
            return out.double() if x.op in _COMPARISONS else out
        raise Refused(f"`{x.op}` in the dequantisation of a weight")

    def mixed(a: tuple[Any, ...]) -> torch.Tensor:
        out = torch.tensor(0.0, dtype=torch.float64)
        for d, n in zip(a[::2], a[1::2]):
            place = at(d.args[0], n) if at is not None and is_const(d) else None
            out = out * n + (go(d) if place is None else place)
        return out

    return go(e)


def _fold(f: Callable[..., Any], parts: list[torch.Tensor]) -> torch.Tensor:
    out = parts[0]
    for p in parts[1:]:
        out = f(out, p)
    return out


def _chosen(i: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    out = parts[0]
    for n, p in enumerate(parts[1:], 1):
        out = torch.where(i == n, p, out)
    return out
