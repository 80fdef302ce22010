"""Experts chosen by numbers of the data, not by scores: `token_ids % E`, as in Hash Layers.

What is left of a division by E is in 0..E-1 by construction, whatever is divided.  A table of experts that is looked up says nothing of the
kind, as it may hold any number: that is refused.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from .decisions import Decision, callee, tensor_of

_COMPARES = {"eq", "__eq__", "one_hot", "sort", "argsort", "bincount", "histc"}
_READS = {"getitem", "__getitem__", "index_select", "embedding"}


def hashed(graph: Graph) -> list[Decision]:
    """What is left of divisions of given integers, where masks, sorts or rows of parameters are made of it."""
    found = [(n, _experts(n)) for n in graph.nodes]
    return [Decision(n, n, ((0, e), False)) for n, e in found if e and _given(n) and _selects(n, e)]


def _experts(n: Node) -> int:
    """E of `integers % E`, 0 for any other node."""
    if n.op not in ("call_function", "call_method") or callee(n) not in ("mod", "remainder", "__mod__") or len(n.args) < 2 or n.kwargs:
        return 0
    e, whole = n.args[1], tensor_of(n.args[0])
    integers = whole is not None and not whole.dtype.is_floating_point and whole.dtype.itemsize >= 4
    return e if integers and type(e) is int and e > 1 else 0


def _given(n: Node) -> bool:
    """Is it computed from integers that the graph is given?  (Numbers of rows, slots and positions are made of `arange`.)"""
    todo, seen = [n], set()
    while todo:
        m = todo.pop()
        if m in seen:
            continue
        seen.add(m)
        t = tensor_of(m)
        if t is not None and not t.dtype.is_floating_point:
            if m.op == "placeholder":
                return True
            todo.extend(m.all_input_nodes)
    return False


def _selects(n: Node, e: int) -> bool:
    todo, seen = [n], {n}
    while todo:
        for u in todo.pop().users:
            t = tensor_of(u)
            if callee(u) in _COMPARES or (callee(u) in _READS and _has_experts(u.args[0], e)):
                return True
            if u not in seen and t is not None and not t.dtype.is_floating_point:
                seen.add(u)
                todo.append(u)
    return False


def _has_experts(x: object, e: int) -> bool:
    t = tensor_of(x)
    return isinstance(x, Node) and x.op in ("placeholder", "get_attr") and t is not None and t.dim() > 1 and t.shape[0] == e


__all__ = ["hashed"]
