"""Walk a functional ATen graph on abstract values, from one routing decision on.

Everything before the decision is a leaf; what no rule covers becomes a leaf, too, and the reason is kept.  The graph may still be growing
(the tracer calls `value` while it traces), so nothing here looks forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from .algebra import unary
from .expr import ZERO, Expr, Leaf, Refused, Var, const, raw
from .quantized import NUMBERS
from .rules import RULES
from .sizes import shape_of, size_of
from .value import Value

CONSTANTS = {
    "arange", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "empty_like", "empty", "new_zeros", "new_ones", "new_empty",
    "new_full", "scalar_tensor",
}  # fmt: skip

_VIEWS = {"view.default", "_unsafe_view.default", "reshape.default", "t.default", "transpose.int", "permute.default", "unsqueeze.default",
          "squeeze.dim", "expand.default", "select.int", "slice.Tensor", "alias.default", "detach.default", "unbind.int"}  # fmt: skip
LIMITS = {torch.uint8: (0, 256), torch.int8: (-128, 128)}
_ROWS = ", and its rows depend on data"
Facts = dict[Node, tuple[tuple[int, int], bool]]  # routing decision -> (range of its ids, distinct along the last dim)


def opname(node: Node) -> str:
    """ "add.Tensor" for an ATen overload, "ns.op.overload" for another, the function's name for the rest."""
    t = node.target
    if isinstance(t, torch._ops.OpOverload):
        return str(t).removeprefix("aten.")
    return getattr(t, "__name__", str(t))


def ancestors(node: Node) -> set[Node]:
    seen: set[Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo.extend(n.all_input_nodes)
    return seen


class Interp:
    """Values of the nodes that come after the routing decision `ids`.

    `training`: gradients flow, so `detach` and `no_grad` are part of the meaning (the pointwise function `stop`).
    `closed`: weights that are computed from quantised numbers are tensors like others, not looked into.
    """

    def __init__(self, ids: Node, facts: Facts, training: bool = False, closed: bool = False):
        self.before, self.ids, self.facts, self.training = ancestors(ids), ids, facts, training
        self.memo: dict[Node, Any] = {}
        self.reasons: dict[Node, str] = {}
        self.sorts: dict[Any, str] = {}
        self.constant: Callable[[Node], Any] = _no_constant  # the elements of a tensor that is a constant of the graph
        self._constants: dict[Any, Leaf] = {}
        self.closed = closed
        self._numbers: dict[Node, tuple[bool, bool]] = {}  # is it computed from quantised numbers, from the ids?

    def all_hit(self, node: Node, mask: Value) -> None:
        """Only a probe (a later front end) knows more about a nonzero than its rule."""

    def value(self, node: Node) -> Any:
        if node not in self.memo:
            self.memo[node] = self._checked(node)
        found = self.memo[node]
        if isinstance(found, Refused):
            raise found
        return found

    def _checked(self, node: Node) -> Any:
        try:
            return self._value(node)
        except Refused as e:
            return e

    def _value(self, node: Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt | int) and (n := size_of(val)) is not None:
            return Value((), const(n) if isinstance(n, int) else raw("size", n))
        name = opname(node)
        if node in self.facts:
            return self.leaf(node)
        if self.closed and self._dequantises(node, name):
            return self.leaf(node)
        if node.op != "call_function" or (node in self.before and name.split(".")[0] not in CONSTANTS):
            return self.leaf(node)
        if node.target is operator.getitem and node.args[0].op == "call_function" and opname(node.args[0]) in RULES:
            return self.value(node.args[0])[node.args[1]]
        if name in ("cat.default", "stack.default") and all(a in self.facts for a in node.args[0]):
            # several decisions side by side (top-2 as two top-1) are one: ids in range, perhaps the same twice
            self.facts[node] = ((0, max(self.facts[a][0][1] for a in node.args[0])), False)
            return self.leaf(node)
        if name not in RULES:
            of = node.args[0] if node.target is operator.getitem and isinstance(node.args[0], Node) else node
            self.reasons[node] = f"no rule for {opname(of)}"
            return self.leaf(node)
        return self._apply(node, name)

    def _dequantises(self, node: Node, name: str) -> bool:
        """Is a node the floating-point result, before any view of it, of a computation on quantised numbers and no routing?"""
        val = node.meta.get("val")
        if node.op != "call_function" or not isinstance(val, torch.Tensor) or not val.dtype.is_floating_point or name in _VIEWS:
            return False
        return self._sources(node) == (True, False)

    def _sources(self, node: Node) -> tuple[bool, bool]:
        if node not in self._numbers:
            val = node.meta.get("val")
            below = [self._sources(n) for n in node.all_input_nodes]
            numbers = isinstance(val, torch.Tensor) and val.dtype in NUMBERS and val.dim() >= 2 and node.op == "placeholder"
            self._numbers[node] = (numbers or any(a for a, _ in below), node is self.ids or any(b for _, b in below))
        return self._numbers[node]

    def _apply(self, node: Node, name: str) -> Any:
        try:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self.value)
            return self._no_grad(node, RULES[name](self, node, *args, **kwargs))
        except Refused as e:
            self.reasons[node] = str(e)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError) as e:
            # A form that the rule was not written for: the node stays closed, which is always right.
            self.reasons[node] = f"the rule for {name} does not know this form ({type(e).__name__}: {e})"
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise Refused(self.reasons[node])
        return self.leaf(node)

    def _no_grad(self, node: Node, out: Any) -> Any:
        val = node.meta.get("val")
        if not (self.training and node.meta.get("no_grad") and isinstance(out, Value)):
            return out
        if isinstance(val, torch.Tensor) and val.dtype.is_floating_point:
            return Value(out.dims, unary("stop", out.expr))
        return out

    def leaf(self, node: Node) -> Value:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            raise Refused(self.reasons.get(node) or f"no rule for {opname(node)}")
        shape = shape_of(val)
        if None in shape:
            why = self.reasons.get(node) or f"no rule for {opname(node)}"
            raise Refused(why if why.endswith(_ROWS) else why + _ROWS)
        leaf = self._leaf(node, tuple(shape), val.dtype)
        vs: list[Expr] = [Var(s) if s != 1 else ZERO for s in shape]
        return Value([(v,) if isinstance(v, Var) else () for v in vs], raw("load", leaf, *vs))

    def _leaf(self, node: Node, shape: tuple, dtype: torch.dtype) -> Leaf:
        rng, distinct = self.facts.get(node, (None, False))
        known = self.constant(node)
        made = node.op == "call_function" and self._sources(node) == (True, False)
        leaf = Leaf([node], shape, rng, distinct, not dtype.is_floating_point, LIMITS.get(dtype), known, made)
        if known is None:
            return leaf
        with _disable_current_modes():
            elements = tuple(known.flatten().tolist())
        if leaf.integer and elements:
            leaf.limits = (int(min(elements)), int(max(elements)) + 1)
        return self._constants.setdefault((shape, dtype, elements), leaf)  # alike wherever it is made


def _no_constant(node: Node) -> Any:
    return None


# ---------------------------------------------------------------- routing decisions
_DECISIONS = {"topk.default": 1, "max.dim": 1, "min.dim": 1, "sort.default": 1, "sort.stable": 1}


def decision(node: Node) -> tuple[tuple[int, int], bool] | None:
    """Range and distinctness of the ids that `node` holds, if it is a routing decision."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].op == "call_function":
        src = node.args[0]
        if _DECISIONS.get(opname(src)) == node.args[1]:
            return _chosen(src)
    if opname(node) == "argmax.default" and len(node.args) > 1 and isinstance(node.args[1], int):
        n = shape_of(node.args[0].meta["val"])[node.args[1]]  # type: ignore[union-attr]
        return ((0, n), False) if isinstance(n, int) else None
    return None


def _chosen(src: Node) -> tuple[tuple[int, int], bool] | None:
    scores = src.args[0].meta["val"]  # type: ignore[union-attr]
    name, rank = opname(src), scores.dim()
    if not scores.dtype.is_floating_point or rank == 0:
        return None  # a sort of ids is a permutation, not a decision
    args = list(src.args) + [None] * 4
    d = {
        "topk.default": args[2],
        "max.dim": args[1],
        "min.dim": args[1],
        "sort.default": args[1],
        "sort.stable": src.kwargs.get("dim"),
    }[name]
    d = (d if d is not None else -1) % rank
    n = shape_of(scores)[d]
    if not isinstance(n, int):
        return None
    return (0, n), not name.startswith(("max", "min")) and d == rank - 1


def reasons_after(it: Interp, nodes: Iterable[Node]) -> dict[str, str]:
    return {n.name: it.reasons[n] for n in nodes if n in it.reasons}
