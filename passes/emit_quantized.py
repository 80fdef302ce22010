"""Quantised weights as nodes: numbers and scales as `dequantize_experts` takes them, views of the model's tensors where possible."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from moe_compile.ops.quantized import MX_BLOCK, values_dtype

from .decisions import tensor_of
from .holders import holder
from .lift import Refused
from .lift.expr import Expr, is_const
from .lift.param import Param, Scale
from .lift.quantized import dtype_of
from .lift.sizes import Size

if TYPE_CHECKING:
    from .emit import Emitter

EVERY = slice(None)


def dequantised(em: Emitter, p: Param, order: str, only: slice = EVERY) -> tuple[list[Node], str]:
    """The node of a weight with a format, and its layout; only: the experts wanted.

    Experts in a tensor each are stacked as they are stored: a copy of the numbers, a half or a quarter of the weights' bytes.
    """
    assert p.format is not None
    values, axes = _values(em, p, order, only)
    scales = _scales(em, p, axes, only)
    op = torch.ops.moe_compile.dequantize_experts.default
    return [em.call(op, values, scales, p.format.kind, axes, p.format.dtype)], "e" + axes


# ---------------------------------------------------------------- numbers
def _values(em: Emitter, p: Param, order: str, only: slice) -> tuple[Node, str]:
    """The numbers as their kind wants them, and "oi" or "io"."""
    assert p.format is not None
    kind, plain = p.format.kind, dataclasses.replace(p, format=None)
    nodes, layout = em.parameter(plain, "eoi" if kind == "mxfp4" else order, only if p.listed else EVERY)
    axes = layout.split("*")[0].removeprefix("e")
    if kind == "mxfp4" and axes == "io":
        nodes, axes = [em.method("transpose", n, -1, -2) for n in nodes], "oi"
    node = _all_experts(em, nodes, p.listed, only)
    if dtype_of(p.leaf) != values_dtype(kind):
        node = em.method("view", node, values_dtype(kind))
    if kind == "mxfp4":
        groups = int(p.extent("i")) * 2 // MX_BLOCK
        node = em.method("unflatten", node, 2, (groups, MX_BLOCK // 2))
    return node, axes


def _all_experts(em: Emitter, nodes: Sequence[Node], listed: bool, only: slice) -> Node:
    """One tensor with the experts wanted as its first dimension."""
    if listed:
        return em.call(torch.stack, list(nodes))
    return nodes[0] if only == EVERY else em.call(operator.getitem, nodes[0], only)


# ---------------------------------------------------------------- scales
def _scales(em: Emitter, p: Param, axes: str, only: slice) -> Node:
    f = p.format
    assert f is not None
    whole = _computed(em, f.expr, {name: _scale(em, s, f.kind, f.blocks, only) for name, s in zip(f.names, f.scales)})
    if not isinstance(whole, Node):  # no scale, or a number
        one = em.existing(holder(em.region, p.leaf.nodes[0]))
        whole = em.call(torch.full, (1, 1, 1), float(whole), dtype=torch.float32, device=em.call(getattr, one, "device"))
    experts = len(range(*only.indices(int(p.num_experts))))
    whole = em.method("expand", whole, experts, *f.blocks)
    if f.kind == "fp8_channel_w":
        whole = em.method("squeeze", whole, 2)
    elif axes == "io":
        whole = em.method("transpose", whole, 1, 2)
    return em.method("contiguous", whole)


def _computed(em: Emitter, e: Expr, table: dict[Expr, Node]) -> Any:
    """A scale's expression on its tensors, or a number."""
    if e in table:
        return table[e]
    if is_const(e):
        return e.args[0]
    if e.op == "cast":
        return _computed(em, e.args[0], table)
    if e.op == "reciprocal" and is_const(e.args[0]):
        return 1 / e.args[0].args[0]
    return em.pointwise(e, [_computed(em, a, table) if isinstance(a, Expr) else a for a in e.args])


def _scale(em: Emitter, s: Scale, kind: str, blocks: tuple[int, int], only: slice) -> Node:
    """A tensor of scales as [E, outputs or 1, inputs or 1], an element for each block."""
    node = _flat(em, s.param, only)
    for dim, (places, role) in enumerate(((s.outs, "o"), (s.ins, "i")), 1):
        node = _picked(em, node, dim, places, s.param.extent(role)) if places else node
    return _as_dtype(em, node, dtype_of(s.param.leaf), kind)


def _as_dtype(em: Emitter, node: Node, was: torch.dtype | None, kind: str) -> Node:
    """mxfp4: exponents, as bytes; else numbers."""
    wanted = torch.uint8 if kind == "mxfp4" else torch.float32
    if was == wanted:
        return node
    return em.method("view" if kind == "mxfp4" else "to", node, wanted)


def _flat(em: Emitter, p: Param, only: slice) -> Node:
    """[E, outputs, inputs] of a tensor of scales, in its own order of blocks."""
    held = [holder(em.region, n) for n in p.leaf.nodes[only if p.listed else EVERY]]
    if em.region.interp.training and any(t is not None and t.requires_grad for t in map(tensor_of, held)):
        raise Refused("scales of quantised weights would be trained; freeze them, or compile under no_grad")
    nodes = [em.existing(n) for n in held]
    roles, sizes = [d.role for d in p.digits], [-1 if d.role == "e" else d.size for d in p.digits]
    if any(len(dim) != 1 for dim in p.dims):
        nodes = [em.method("reshape", n, *sizes) for n in nodes]
    for i in reversed(range(len(roles))):
        if roles[i] == "c":
            nodes = [em.method("select", n, i, p.digits[i].at) for n in nodes]
    roles = [r for r in roles if r != "c"]
    node = _all_experts(em, nodes, p.listed, EVERY)
    roles = ["e", *roles] if p.listed else roles
    perm = [i for c in "eoi" for i, r in enumerate(roles) if r == c]
    if perm != sorted(perm):
        node = em.method("permute", node, *perm)
    node = em.method("reshape", node, -1, p.extent("o"), p.extent("i"))
    return node if p.listed or only == EVERY else em.call(operator.getitem, node, only)


def _picked(em: Emitter, node: Node, dim: int, places: tuple[int, ...], size: Size) -> Node:
    """Those of a dimension that belong to blocks 0, 1, ...: all in order, every n-th, or each repeated."""
    if places == tuple(range(size)):
        return node
    start, step = places[0], places[1] - places[0] if len(places) > 1 else 1
    if step > 0 and places == tuple(range(start, start + step * len(places), step)):
        return em.call(operator.getitem, node, (EVERY,) * dim + (slice(start, start + step * len(places), step),))
    times = next((i for i, at in enumerate(places) if at != start), len(places))
    if places != tuple(start + i // times for i in range(len(places))):
        raise Refused("scales that lie in another order than the blocks of the weight")
    last = places[-1] + 1
    some = em.call(operator.getitem, node, (EVERY,) * dim + (slice(start, last),)) if (start, last) != (0, size) else node
    wide = em.call(torch.repeat_interleave, some, times, dim)
    extra = (last - start) * times != len(places)
    return em.call(operator.getitem, wide, (EVERY,) * dim + (slice(0, len(places)),)) if extra else wide
