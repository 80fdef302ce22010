"""Where does a Dynamo graph decide which experts a token takes?  Every top-k (max, sort, argmax) of scores is asked."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .lift.sizes import shape_of

_INDEX_RESULT = {"topk", "max", "min", "sort"}
CHOICES = {*_INDEX_RESULT, "argmax", "argmin", "argsort"}


@dataclass(frozen=True)
class Decision:
    """A top-k of scores.

    `ids`: the node that holds the chosen indices; `source`: the call that chose; `facts`: (range of the ids, distinct along the last dim).
    """

    ids: Node
    source: Node
    facts: tuple[tuple[int, int], bool]


def callee(n: Node) -> str:
    """Short name of what a node calls: "topk" for torch.topk, Tensor.topk and aten.topk alike."""
    if n.op == "call_method":
        return str(n.target)
    if n.op != "call_function":
        return ""
    packet = getattr(n.target, "overloadpacket", None)
    return getattr(packet or n.target, "__name__", str(n.target))


_INPLACE = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}


def returns_itself(n: Node) -> bool:
    """An in-place op of torch's own, whose result is another name of its first argument."""
    name = callee(n)
    if name.startswith("__i") and name.endswith("__") and name[2:-2] in _INPLACE:
        return True
    return name in _INPLACE or (name.endswith("_") and not name.endswith("__")) or _asked_in_place(n, name)


# where torch.nn.functional takes `inplace`
_INPLACE_AT = {
    "relu": 1, "silu": 1, "mish": 1, "hardswish": 1, "hardsigmoid": 1, "relu6": 1, "selu": 1, "leaky_relu": 2, "elu": 2, "celu": 2,
    "dropout": 3, "alpha_dropout": 3, "hardtanh": 3, "threshold": 3, "rrelu": 4,
}  # fmt: skip


def _asked_in_place(n: Node, name: str) -> bool:
    at = _INPLACE_AT.get(name)
    return n.kwargs.get("inplace") is True or (at is not None and len(n.args) > at and n.args[at] is True)


def writes_to(n: Node) -> list[Node]:
    """The nodes whose tensors n writes into."""
    if n.op not in ("call_function", "call_method"):
        return []
    if isinstance(n.target, torch._ops.OpOverload):
        return _mutable_arguments(n, n.target._schema)
    if isinstance(n.target, torch._ops.HigherOrderOperator) and "checkpoint" not in callee(n):
        return list(n.all_input_nodes)  # a kernel that Dynamo wrapped: it may write anywhere
    found = [n.args[0] if n.args else n.kwargs.get("input")] if returns_itself(n) else []
    return _nodes([*found, n.kwargs.get("out")])


def ancestors(n: Node) -> set[Node]:
    """All that a node is computed from."""
    found: set[Node] = set()
    todo = list(n.all_input_nodes)
    while todo:
        each = todo.pop()
        if each not in found:
            found.add(each)
            todo.extend(each.all_input_nodes)
    return found


def between(first: Node, last: Node) -> list[Node]:
    """Nodes from first up to, not including, last."""
    found, n = [], first
    while n is not last:
        found.append(n)
        n = n.next
    return found


def _mutable_arguments(n: Node, schema: Any) -> list[Node]:
    given = {**dict(zip([a.name for a in schema.arguments], n.args)), **n.kwargs}
    written = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _nodes(written)


def _nodes(values: list[Any]) -> list[Node]:
    return [x for v in values for x in (v if isinstance(v, list | tuple) else [v]) if isinstance(x, Node)]


def writes_in_place(n: Node) -> bool:
    return bool(writes_to(n))


def tensor_of(n: object) -> torch.Tensor | None:
    """The fake tensor that Dynamo recorded for a node, None for other values."""
    v = n.meta.get("example_value", n.meta.get("val")) if isinstance(n, Node) else None
    return v if isinstance(v, torch.Tensor) else None


def decisions(graph: Graph) -> list[Decision]:
    """All routing decisions, in program order."""
    found = (_decision(n) for n in graph.nodes if n.op in ("call_function", "call_method") and n.users)
    return [d for d in found if d is not None]


def _decision(n: Node) -> Decision | None:
    if n.target is operator.getitem and isinstance(n.args[0], Node) and callee(n.args[0]) in _INDEX_RESULT and n.args[1] == 1:
        return _facts(n, n.args[0], callee(n.args[0]))
    if callee(n) in ("argmax", "argmin") and isinstance(_argument(n, 1, "dim"), int):
        return _facts(n, n, "argmax")
    if callee(n) == "argsort":
        return _facts(n, n, "sort")
    return None


def _argument(n: Node, i: int, name: str) -> Any:
    return n.args[i] if len(n.args) > i else n.kwargs.get(name)


def _facts(ids: Node, source: Node, kind: str) -> Decision | None:
    scores, chosen = tensor_of(_argument(source, 0, "input")), tensor_of(ids)
    if chosen is None or chosen.dtype.is_floating_point or (kind in ("max", "min") and not isinstance(_argument(source, 1, "dim"), int)):
        return None  # the larger of two tensors, say
    if scores is None or not scores.dtype.is_floating_point or scores.dim() == 0:
        return None
    d = _argument(source, 2 if kind == "topk" else 1, "dim")
    d = (d if isinstance(d, int) else -1) % scores.dim()
    n = shape_of(scores)[d]
    if not isinstance(n, int):
        return None
    distinct = kind in ("topk", "sort") and d == scores.dim() - 1
    return Decision(ids, source, ((0, n), distinct))


_LAYERS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "embedding"}


def feeds(d: Decision, later: Decision) -> bool:
    """Is d a step of a later decision (the choice of groups before that of experts)?  No layer stands between them."""
    todo, seen = [d.ids], set()
    while todo:
        n = todo.pop()
        if n is later.source:
            return True
        if n not in seen and n < later.source and callee(n) not in _LAYERS:
            seen.add(n)
            todo.extend(n.users)
            for target in writes_to(n):  # what was written is read under the tensor's own name
                todo.extend(u for u in target.users if n < u)
    return False


def among_pairs(d: Decision, earlier: list[Decision]) -> bool:
    """Product keys: d chooses among numbers made of an earlier choice's ids, and what it chooses are rows of a table."""
    before = {e.ids for e in earlier}
    chosen = [n for n in d.ids.users if callee(n) in ("gather", "take_along_dim", "getitem") and n.args[0] is not d.ids]
    made = [n for n in chosen if isinstance(n.args[0], Node) and before & _integers_behind(n.args[0])]
    return any(_is_table(other) for n in made for u in _integers_from(n) for other in u.all_input_nodes)


def _is_table(n: Node) -> bool:
    t = tensor_of(n)
    return n.op in ("placeholder", "get_attr") and t is not None and t.dtype.is_floating_point and t.dim() == 2


def _integers_from(n: Node) -> set[Node]:
    """All that reads the node, or integers that are computed from it."""
    todo, seen = [n], set()
    while todo:
        for u in todo.pop().users:
            t = tensor_of(u)
            if u not in seen and t is not None and not t.dtype.is_floating_point:
                todo.append(u)
            seen.add(u)
    return seen


def _integers_behind(n: Node) -> set[Node]:
    """The node and what it is computed from, as far as these are integers."""
    todo, seen = [n], set()
    while todo:
        n = todo.pop()
        t = tensor_of(n)
        if n not in seen and (t is None or not t.dtype.is_floating_point):
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return seen


def chosen_by_caller(graph: Graph) -> Node | None:
    """Integers given to the graph that it compares with one number after the other, as where the caller says which expert to take."""
    for n in graph.nodes:
        t = tensor_of(n)
        if n.op == "placeholder" and t is not None and not t.dtype.is_floating_point and t.dtype != torch.bool:
            numbers = _compared(n)
            if len(numbers) > 1 and numbers == set(range(len(numbers))):
                return n
    return None


def _compared(n: Node) -> set[int]:
    """The numbers that these integers, or a view of them, are compared with."""
    found = set()
    for u in n.users:
        if callee(u) == "eq" and isinstance(u.args[-1], int):
            found.add(u.args[-1])
        elif callee(u) in ("view", "reshape", "unsqueeze", "flatten", "getitem", "expand", "squeeze", "to", "long"):
            found |= _compared(u)
    return found


def written(d: Decision, graph: Graph) -> bool:
    """Does anything write into the memory of d's ids?  Then what the top-k made sure of no longer holds."""
    mine = tensor_of(d.ids)
    if mine is None:
        return True
    targets = (tensor_of(target) for n in graph.nodes for target in writes_to(n))
    return any(t is not None and t.untyped_storage()._cdata == mine.untyped_storage()._cdata for t in targets)


def leaves_graph(d: Decision) -> bool:
    """Do the choices themselves (ids, masks, counts) leave the graph?  Then code behind a graph break may use them."""
    todo, seen = [d.ids], set()
    while todo:
        n = todo.pop()
        if n.op == "output":
            return True
        t = tensor_of(n)
        if n not in seen and (t is None or not t.dtype.is_floating_point):
            seen.add(n)
            todo.extend(n.users)
    return False


def window_end(d: Decision, later: list[Decision]) -> Node | None:
    """Where the search behind d ends: at the next decision after the ids are first used."""
    first_use = min(d.ids.users)
    return next((x.source for x in later if first_use < x.source), None)
