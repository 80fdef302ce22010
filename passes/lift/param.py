"""An expert's parameter as the formula reads it: which tensor, and what each of its dimensions is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .expr import Expr, Leaf, Var, alpha
from .sizes import Size, prod


@dataclass(frozen=True)
class Digit:
    """One factor of a parameter's dimension: role `e` expert, `i` input feature, `o` output feature, or a fixed index (`c`)."""

    role: str
    size: Size
    at: int = 0


@dataclass(frozen=True)
class Param:
    """A weight or bias: the leaf, and for each of its dimensions (the expert stack of a list excluded) the digits it is made of.

    format: how its numbers become weights, None where they are the weights.
    """

    leaf: Leaf
    dims: tuple[tuple[Digit, ...], ...]
    format: Format | None = None

    @property
    def digits(self) -> list[Digit]:
        return [d for dim in self.dims for d in dim]

    @property
    def letters(self) -> str:
        return "".join(d.role for d in self.digits)

    @property
    def listed(self) -> bool:
        return len(self.leaf.nodes) > 1

    @property
    def num_experts(self) -> int:
        return len(self.leaf.nodes) if self.listed else next(d.size for d in self.digits if d.role == "e")

    def extent(self, roles: str) -> Size:
        return prod(d.size for d in self.digits if d.role in roles)

    def key(self) -> Any:
        """Equal for parameters that differ only in the columns used."""
        roles = tuple(tuple(("o" if d.role == "c" else d.role, d.size) for d in dim) for dim in self.dims)
        return tuple(self.leaf.nodes), roles, self.format and self.format.key()


@dataclass(frozen=True)
class Scale:
    """A tensor of scales.  outs, ins: the place of each block of outputs, of inputs, along its o and its i digits; () where it has none."""

    param: Param
    outs: tuple[int, ...]
    ins: tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """values * scale in a form of `moe_compile.ops.quantized`.

    expr: the scale of a block, over `names`, which stand for the elements of `scales`.  blocks: how many along outputs and inputs.
    """

    kind: str
    dtype: torch.dtype
    expr: Expr
    names: tuple[Var, ...]
    scales: tuple[Scale, ...]
    blocks: tuple[int, int]

    def key(self) -> Any:
        tensors = tuple((s.param.key(), tuple(s.param.dims), s.outs, s.ins) for s in self.scales)
        return self.kind, alpha(self.expr, self.names), tensors, self.blocks
