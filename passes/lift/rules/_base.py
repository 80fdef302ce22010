"""The rule table and what rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..expr import Expr, Refused, Var
from ..sizes import Size, shape_of
from ..value import Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        for n in names:
            RULES[n] = f
        return f

    return register


def dim_of(d: int, n: int) -> int:
    return d + n if d < 0 else d


def out_shape(node: torch.fx.Node) -> list[Size]:
    return shape_of(node.meta["val"])


def known_shape(node: torch.fx.Node) -> list[Size]:
    s = out_shape(node)
    if None in s:
        raise Refused("a constant of data-dependent shape")
    return s


def filled(node: torch.fx.Node, e: Expr) -> Value:
    return Value([(Var(n),) if n != 1 else () for n in known_shape(node)], e)


def fixed(n: Size, what: str) -> int:
    """An extent that the rule needs as a number."""
    if not isinstance(n, int):
        raise Refused(f"{what} needs a fixed extent, this one is {'data-dependent' if n is None else n}")
    return n
