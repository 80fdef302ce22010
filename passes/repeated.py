"""A choice that the code makes again, of the same scores: `for e in range(E): mask = p.argmax(-1) == e`.

Its readers get the first one's results, so that one decision stands before all experts. That is undone where nothing is rewritten.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from .decisions import CHOICES, callee, tensor_of, writes_to
from .window import CONTEXT

Inputs = tuple[Node, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Repeated:
    """Nodes that nobody reads any more, with what stood before each, and who read them."""

    nodes: list[tuple[Node, Node]]
    readers: list[Inputs]

    def forget(self) -> None:
        """The repetitions go; to be called where something was rewritten."""
        for n, _ in reversed(self.nodes):
            if not n.users and not n._erased:
                n.graph.erase_node(n)

    def undo(self) -> None:
        for reader, args, kwargs in reversed(self.readers):
            reader.args, reader.kwargs = args, kwargs
        for n, before in reversed(self.nodes):
            before.append(n)


def merge(graph: Graph) -> Repeated:
    """Repetitions under the same gradient and autocast mode, of tensors that nothing is written into, scores and results.

    What leaves the graph may be written into behind it, so it stays a tensor of its own.
    """
    merged = Repeated([], [])
    first: dict[Hashable, Node] = {}
    written: set[int | None] | None = None
    for n in list(graph.nodes):
        if callee(n) in CONTEXT:
            first.clear()
        elif (key := _key(n)) is not None and (kept := first.setdefault(key, n)) is not n:
            written = _written(graph) if written is None else written
            if _untouched(n, written) and _untouched(kept, written):
                merged.readers.extend((u, u.args, u.kwargs) for u in n.users)
                n.replace_all_uses_with(kept)
                merged.nodes.append((n, n.prev))
                _choice(kept).append(n)  # out of the code behind the decision
    return merged


def _key(n: Node) -> Hashable | None:
    """What is equal for two nodes that compute the same: a choice, or a part of one."""
    part = callee(n) == "getitem" and isinstance(n.args[0], Node) and callee(n.args[0]) in CHOICES
    if n.op not in ("call_function", "call_method") or not (part or callee(n) in CHOICES) or "out" in n.kwargs:
        return None
    key = (n.op, n.target, n.args, tuple(sorted(n.kwargs.items())))
    try:
        hash(key)
    except TypeError:  # a list of dimensions, say
        return None
    return key


def _choice(n: Node) -> Node:
    """The choice that n is, or is a part of."""
    return n if callee(n) in CHOICES else n.all_input_nodes[0]


def _written(graph: Graph) -> set[int | None]:
    """The memory of all that is written into, or leaves the graph; None: some that is written into is not known."""
    leaving = {_memory(a) for n in graph.nodes if n.op == "output" for a in n.all_input_nodes}
    return {_memory(target) for n in graph.nodes for target in writes_to(n)} | (leaving - {None})


def _memory(n: object) -> int | None:
    t = tensor_of(n)
    return None if t is None else int(t.untyped_storage()._cdata)


def _untouched(n: Node, written: set[int | None]) -> bool:
    parts = [u for u in n.users if callee(u) == "getitem"] if tensor_of(n) is None else [n]
    own = {_memory(each) for each in (*parts, *n.all_input_nodes) if tensor_of(each) is not None}
    return None not in written and not own & written


__all__ = ["Repeated", "merge"]
