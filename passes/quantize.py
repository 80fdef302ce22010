"""Quantised weights of the stage ops: dequantize_experts sunk into the op that reads what it makes.

Before:   w = dequantize_experts(values, scales, "int8", "oi", dtype); y = permute_experts_unpermute(x, ..., [w], ..., "eoi")
After:    y = permute_experts_unpermute(x, ..., [values, scales], ..., "eoi:int8")

Behind dequantize_experts may stand what does not change it: casts, detach, the two inner dimensions exchanged, a range of the experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from moe_compile.ops.quantized import ROWS_TOO, stored

from .decisions import callee, tensor_of, writes_to
from .emit import Emitter
from .liveness import same_storage

WEIGHTS, LAYOUT = 4, 7  # arguments of both experts' ops
UNCHANGED = ("detach", "contiguous", "float", "double", "bfloat16", "half")


class _Made(NamedTuple):
    """A weight as it comes from dequantize_experts: its inner dimensions exchanged, and ranges of the experts (first, number)."""

    node: Node
    turned: bool = False
    ranges: tuple[tuple[Any, Any], ...] = ()


def sunk(em: Emitter, nodes: list[Node], layout: str) -> tuple[list[Node], str]:
    """The nodes and layout of a parameter, or the values and scales that it is made of. Not in training: there are no gradients then."""
    if layout not in ("eoi", "eio") or em.region.interp.training:
        return nodes, layout
    made = _made(nodes[0])
    if made is None:
        return nodes, layout
    values, scales, kind, axes = (_argument(made.node, i, name) for i, name in enumerate(("values", "scales", "kind", "axes")))
    wanted = _exchanged(layout[1:]) if made.turned else layout[1:]
    if wanted != axes and stored(kind) != "fp8_block":  # whose scales are alike in both directions
        return nodes, layout
    if tensor_of(made.node) is not None and not (_steady(values) and _steady(scales)):  # in the user's own code
        return nodes, layout
    for first, number in reversed(made.ranges):
        values, scales = (em.method("narrow", each, 0, first, number) for each in (values, scales))
    return [values, scales], f"e{wanted}:{kind}"


def rows_as_they_are(graph: Graph) -> None:
    """Stage ops of a copy that is held against the original: rows are not quantised, as dequantize_experts tells nothing of rows."""
    ops = torch.ops.moe_compile
    for n in graph.nodes:
        if n.op == "call_function" and n.target in (ops.permute_experts_unpermute.default, ops.permute_experts_combine.default):
            entries = [entry.strip() for entry in str(n.args[LAYOUT]).split(",")]
            n.update_arg(LAYOUT, ",".join(f"{e}_w" if e.partition(":")[2] in ROWS_TOO else e for e in entries))


def drop_unread(graph: Graph) -> None:
    """Takes out every dequantize_experts that nobody reads any more, with what stood behind it."""
    for n in reversed(list(graph.nodes)):
        if not n.users and n.op in ("call_function", "call_method") and _made(n) is not None:
            graph.erase_node(n)


def left_dequantised(graph: Graph) -> list[str]:
    """A note where experts' weights are dequantised in each call."""
    left = [n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.moe_compile.permute_experts_unpermute.default]
    if not any(_made(each) is not None for n in left for each in n.args[WEIGHTS]):
        return []
    return ["quantised weights are dequantised in each call, as gradients are wanted; call the model under torch.no_grad()"]


def _made(n: Node) -> _Made | None:
    op = torch.ops.moe_compile.dequantize_experts
    if n.op == "call_function" and n.target in (op, op.default):
        return _Made(n)
    if n.op not in ("call_function", "call_method") or not n.args or not isinstance(n.args[0], Node):
        return None
    below, name = _made(n.args[0]), callee(n)
    if below is None:
        return None
    if name in UNCHANGED or (name in ("to", "type") and _is_cast(n)):
        return below
    if _turns(n, name):
        return below._replace(turned=not below.turned)
    if name == "narrow" and len(n.args) == 4 and n.args[1] == 0:
        return below._replace(ranges=(*below.ranges, (n.args[2], n.args[3])))
    return None


def _is_cast(n: Node) -> bool:
    """To a floating-point type and nothing else."""
    return not n.kwargs and len(n.args) == 2 and isinstance(n.args[1], torch.dtype) and n.args[1].is_floating_point


def _turns(n: Node, name: str) -> bool:
    """Does a call exchange the dimensions 1 and 2 of three?"""
    given = n.args[1] if len(n.args) == 2 and isinstance(n.args[1], tuple | list) else n.args[1:]
    if n.kwargs or not all(isinstance(d, int) for d in given):
        return False
    dims = [d % 3 for d in given]
    return (name in ("transpose", "swapaxes", "swapdims") and sorted(dims) == [1, 2]) or (name == "permute" and dims == [0, 2, 1])


def _exchanged(axes: str) -> str:
    return axes[::-1]


def _argument(n: Node, i: int, name: str) -> Any:
    return n.args[i] if len(n.args) > i else n.kwargs[name]


def _steady(n: Node) -> bool:
    """Does nothing in its graph write into a tensor, or into another view of it?"""
    written = (target for each in n.graph.nodes for target in writes_to(each))
    return not any(
        target is n or (tensor_of(target) is not None and tensor_of(n) is not None and same_storage(target, n)) for target in written
    )
