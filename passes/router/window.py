"""The Dynamo nodes between a router's logits and the dispatch of its tokens, traced to functional ATen.   (read-only)"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..decisions import _LAYERS as LAYERS
from ..decisions import callee, tensor_of, writes_to
from ..lift import Refused
from ..lift.places import tensor
from ..lift.sizes import shape_of, size_of
from ..window import CONTEXT, Ambient, Trace, is_size, symbolic

FAR = 120  # nodes walked back before this is something else than a router


@dataclass
class Window:
    """What a routing is computed by.

    nodes: in program order, in-place writers and changes of mode included; inputs: what they read from outside, in the order of use.
    ids, weights: what the dispatch and the combine read (weights: None where nothing weighs); ambient: in force before the first node.
    """

    nodes: list[Node]
    inputs: list[Node]
    ids: Node
    weights: Node | None
    ambient: Ambient

    def __post_init__(self) -> None:
        self.position = {n: i for i, n in enumerate([*self.inputs, *self.nodes])}

    def read_outside(self, n: Node) -> list[Node]:
        return [u for u in n.users if u not in self.position]

    def _readers(self, n: Node) -> tuple[bool, int]:
        outside = self.read_outside(n)
        return bool(outside), sum(u < self.nodes[-1] for u in outside)

    def key(self) -> tuple[Any, ...]:
        """Equal for windows with the same code on the same kinds of tensors, whose values are read from outside alike."""
        code = tuple((n.op, n.target, self._constant(n.args), self._constant(n.kwargs), self._readers(n)) for n in self.nodes)
        kinds = tuple(_kind(symbolic(n)) for n in self.inputs)
        autocast = tuple(self._constant((a.args, a.kwargs)) for a in self.ambient.autocast)
        return code, kinds, self.ambient.grad, autocast, self._constant((self.ids, self.weights))

    def _constant(self, a: Any) -> Any:
        if isinstance(a, Node):
            return ("node", self.position[a]) if a in self.position else ("size", _kind(symbolic(a)))
        if isinstance(a, tuple | list):
            return tuple(map(self._constant, a))
        if isinstance(a, dict):
            return tuple((k, self._constant(v)) for k, v in sorted(a.items()))
        if isinstance(a, slice):
            return ("slice", self._constant((a.start, a.stop, a.step)))
        return type(a), repr(a)


def _kind(v: Any) -> Any:
    if isinstance(v, torch.Tensor):
        return v.dtype, str(v.device), v.requires_grad, tuple(shape_of(v)), tuple(map(size_of, v.stride()))
    if isinstance(v, torch.SymInt | int):
        return size_of(v)
    return type(v), repr(v)


@dataclass(frozen=True)
class Traced:
    """A window with its ATen graph; `now`: the ATen node that holds each node's value at the window's end."""

    window: Window
    trace: Trace
    now: dict[Node, Node]

    def value(self, n: Node | None) -> Any:
        if n is not None and n not in self.now:
            raise Refused(f"the value of {tensor(n)} is not known")
        return None if n is None else self.now[n]

    def names(self) -> dict[Node, str]:
        """What the inputs are called: "logits" is the output of a layer, "bias" l_self_modules_..._buffers_e_score_correction_bias_."""
        held = ((self.trace.at_def.get(n), n) for n in self.window.inputs)
        return {a: "logits" if callee(n) in LAYERS else _tail(n.name) for a, n in held if isinstance(a, Node)}


def _tail(name: str) -> str:
    return re.split(r"_(?:parameters|buffers)_", name)[-1].strip("_")


def window_before(dispatch: Node, ids: Node, weights: Node | None, ambient: dict[Node, Ambient]) -> Window:
    """What leads to ids and weights, before dispatch. Raises Refused where the way back to the logits is too long."""
    goals = [n for n in (ids, weights) if n is not None]
    found = _ancestors(goals)
    nodes = _in_order(found, dispatch)
    while writers := _writers(found, nodes, dispatch):
        found |= _ancestors(writers)
        nodes = _in_order(found, dispatch)
    if not nodes:
        raise Refused("the ids are no result of a router in this graph")
    nodes = _with_context(nodes, dispatch)
    inside = set(nodes)
    inputs = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside and callee(a) != "_enter_autocast")
    return Window(nodes, list(inputs), ids, weights, ambient[nodes[0]])


def _ancestors(goals: Iterable[Node]) -> set[Node]:
    """Back to layers and the graph's inputs; with a tuple come all its parts."""
    found: set[Node] = set()
    todo = list(goals)
    while todo:
        n = todo.pop()
        if n in found or not _computed(n):
            continue
        found.add(n)
        if len(found) > FAR:
            raise Refused("no layer that makes logits stands near the routing decision")
        todo.extend(n.all_input_nodes)
        if isinstance(symbolic(n), tuple | list):
            todo.extend(u for u in n.users if u.target is operator.getitem)
    return found


def _computed(n: Node) -> bool:
    return n.op in ("call_function", "call_method") and callee(n) not in LAYERS and not is_size(n) and "moe_compile" not in str(n.target)


def _in_order(found: set[Node], end: Node) -> list[Node]:
    left, nodes, n = len(found), [], end.prev
    while left and n.op != "root":
        if n in found:
            nodes.append(n)
            left -= 1
        n = n.prev
    return nodes[::-1]


def _writers(found: set[Node], nodes: list[Node], end: Node) -> list[Node]:
    """In-place ops before `end` on memory that the nodes found so far hold or read."""
    read = {a for n in found for a in n.all_input_nodes}
    storages = {t.untyped_storage()._cdata for n in found | read if (t := tensor_of(n)) is not None}
    writers, n = [], nodes[0] if nodes else end
    while n is not end:
        written = [t for target in writes_to(n) if (t := tensor_of(target)) is not None]
        if n not in found and any(t.untyped_storage()._cdata in storages for t in written):
            writers.append(n)
        n = n.next
    return writers


def _with_context(nodes: list[Node], end: Node) -> list[Node]:
    """The nodes with what changes the gradient mode or autocast between them and up to the end."""
    inside, out, n = set(nodes), [], nodes[0]
    while n is not end:
        if n in inside or callee(n) in CONTEXT:
            out.append(n)
        n = n.next
    return out


def trace_window(gm: GraphModule, window: Window) -> Traced:
    """Raises Refused where an input is not known."""
    unknown = [n.name for n in window.inputs if symbolic(n) is None]
    if unknown:
        raise Refused(f"nothing is known about {', '.join(unknown)}")
    trace, now = Trace(gm, window.nodes, window.inputs, window.ambient), dict[Node, Node]()

    def at_end(trace: Trace, n: Node) -> bool:
        if n is window.nodes[-1]:
            for m in [*window.inputs, *window.nodes]:
                found = trace.now(m) if m in trace.env else None
                if isinstance(found, Node):
                    now[m] = found
        return False

    trace.run(at_end)
    return Traced(window, trace, now)
