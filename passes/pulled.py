"""What stands before a window and is seen as part of it: weights that are dequantised from parameters alone, before the router."""

from __future__ import annotations

import torch
from torch.fx import Node

from .decisions import callee, tensor_of, writes_to
from .lift.quantized import NUMBERS

LONGEST = 64  # nodes
_OPS = {
    "to", "float", "bfloat16", "half", "int", "long", "type", "mul", "truediv", "div", "sub", "add", "neg", "getitem", "view", "reshape",
    "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "repeat_interleave", "repeat", "permute", "transpose", "t", "contiguous",
    "and_", "rshift", "bitwise_and", "bitwise_right_shift", "__and__", "__rshift__", "floordiv", "mod", "remainder", "floor_divide",
    "stack", "cat", "concat", "ldexp", "exp2", "pow", "kron", "where", "ge", "gt", "lt", "le", "eq", "index_select", "detach", "clone",
    "reciprocal", "ones", "zeros", "tensor", "arange",
}  # fmt: skip


def dequantisation(a: Node, first: Node) -> list[Node] | None:
    """The nodes that make `a` out of quantised numbers and other inputs of the graph, in order, if they may be run at `first` instead."""
    t = tensor_of(a)
    if t is None or not t.dtype.is_floating_point or t.dtype.itemsize == 1:
        return None
    made, leaves = _chain(a)
    if made is None or not any(map(_numbers, leaves)):
        return None
    ends = {a, *made}
    if any(u < first and u not in ends for n in made for u in n.users) or _written({*made, *leaves}, first):
        return None
    return sorted(made)


def _chain(a: Node) -> tuple[set[Node] | None, set[Node]]:
    """(the nodes behind a with itself, None where one is of another kind; the inputs that they read)"""
    made: set[Node] = set()
    leaves: set[Node] = set()
    todo = [a]
    while todo:
        n = todo.pop()
        if n in made or n in leaves:
            continue
        if n.op in ("placeholder", "get_attr"):
            leaves.add(n)
            continue
        if callee(n) not in _OPS or len(made) == LONGEST or "out" in n.kwargs:
            return None, leaves
        made.add(n)
        todo.extend(n.all_input_nodes)
    return made, leaves


def _numbers(n: Node) -> bool:
    t = tensor_of(n)
    return t is not None and t.dtype in NUMBERS and t.dim() >= 2


def _written(nodes: set[Node], first: Node) -> bool:
    """Does anything before `first` write into the memory of one of these?"""
    memory = {t.untyped_storage()._cdata for n in nodes if isinstance(t := tensor_of(n), torch.Tensor)}
    n = first.prev
    while n.op != "root":
        for target in writes_to(n):
            t = tensor_of(target)
            if t is None or t.untyped_storage()._cdata in memory:
                return True
        n = n.prev
    return False
