"""Identical layers are lifted and validated once: is the code behind another routing decision the same, node by node?

Two windows are the same when, walked in step, their nodes call the same things with the same constants, and the tensors that they read
from outside agree in shape, dtype, strides and gradient, one for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from .decisions import Decision, callee, tensor_of
from .lift.sizes import size_of
from .liveness import is_assertion
from .pulled import dequantisation
from .region import MoERegion
from .window import CREATORS, Ambient, is_size, symbolic


class Recorded:
    """A region's window with its arguments kept, as splicing erases the nodes themselves."""

    def __init__(self, region: MoERegion, ambient: Ambient, decisions: dict[Node, Decision]):
        self.region, self.ambient = region, ambient
        self.code = {n: (n.op, n.target, n.args, n.kwargs) for n in region.nodes}
        self.facts = {n: decisions[n].facts for n in region.inputs if n in decisions}
        first = region.decision.ids
        self.body = [n for n in region.nodes if not n < first]
        self.pulled = set(region.nodes) - set(self.body)

    def match(self, d: Decision, ambient: Ambient, decisions: dict[Node, Decision]) -> dict[Node, Node] | None:
        """Node of the recorded window -> node of the graph behind decision d, if they are the same."""
        if ambient.grad != self.ambient.grad or len(ambient.autocast) != len(self.ambient.autocast):
            return None
        if any(a.args != b.args or a.kwargs != b.kwargs for a, b in zip(ambient.autocast, self.ambient.autocast)):
            return None
        walk = _Walk(self, d, decisions)
        return walk.table if walk.same() and self._same_aliases(walk.table) else None

    def _same_aliases(self, table: dict[Node, Node]) -> bool:
        """Do the same inputs share memory?  What is written through one name may be read through another."""
        old = [n for n in self.region.inputs if tensor_of(n) is not None and n in table]
        return groups(old) == groups([table[n] for n in old])


def groups(nodes: list[Node]) -> list[int]:
    """For each node the position of the first one whose tensor has the same memory."""
    first: dict[int, int] = {}
    memory = (t.untyped_storage()._cdata for n in nodes if (t := tensor_of(n)) is not None)
    return [first.setdefault(m, i) for i, m in enumerate(memory)]


class _Walk:
    def __init__(self, recorded: Recorded, d: Decision, decisions: dict[Node, Decision]):
        self.recorded, self.d, self.decisions = recorded, d, decisions
        self.table: dict[Node, Node] = {}
        self.taken: set[Node] = set()
        self.moved: set[Node] = set()

    def same(self) -> bool:
        if not self._pair(self.recorded.region.decision.ids, self.d.ids):
            return False
        n = self.d.ids.next
        for old in self.recorded.body:
            while is_size(n):  # Dynamo computes a size where it first needs it
                n = n.next
            if n.op in ("output", "root") or not self._code(old, n):
                return False
            self._take(old, n)
            n = n.next
        return True

    def _take(self, old: Node, new: Node) -> None:
        self.table[old] = new
        self.taken.add(new)

    def _code(self, old: Node, new: Node) -> bool:
        op, target, args, kwargs = self.recorded.code[old]
        if is_assertion(new):  # its message names the symbol
            return target == new.target and self._argument(args[:1], new.args[:1])
        return (
            op == new.op
            and (target == new.target)
            and self._argument(args, new.args)
            and self._argument(kwargs, new.kwargs)
            and alike(symbolic(old), symbolic(new))
        )

    def _argument(self, a: Any, b: Any) -> bool:
        if isinstance(a, Node):
            return isinstance(b, Node) and (alike(symbolic(a), symbolic(b)) if is_size(a) else self._pair(a, b))
        if isinstance(a, tuple | list):
            return isinstance(b, tuple | list) and len(a) == len(b) and all(self._argument(x, y) for x, y in zip(a, b))
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(self._argument(a[k], b[k]) for k in a)
        if isinstance(a, slice):
            return isinstance(b, slice) and self._argument((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return type(a) is type(b) and bool(a == b)

    def _pair(self, old: Node, new: Node) -> bool:
        """Nodes already paired stay so; others are a constant made inside, or an input of the window."""
        if old in self.table:
            return self.table[old] is new
        if new in self.taken:
            return False
        if old in self.recorded.pulled:
            if not self._movable(new) or not self._code(old, new):
                return False
        elif (
            old in self.recorded.code
            or self.recorded.facts.get(old) != (self.decisions[new].facts if new in self.decisions else None)
            or not alike(symbolic(old), symbolic(new))
        ):
            return False
        self._take(old, new)
        return True

    def _movable(self, new: Node) -> bool:
        """May a node before the decision be run behind it?  What the walk asks for by a chain's end holds for the chain."""
        if callee(new) in CREATORS and all(not u < self.d.ids for u in new.users):
            return True
        if new not in self.moved:
            self.moved.update(dequantisation(new, self.d.ids.next) or ())
        return new in self.moved


def alike(a: Any, b: Any) -> bool:
    """Do two recorded values agree in all that the analysis looks at?"""
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.SymInt | int) and isinstance(b, torch.SymInt | int):
        return size_of(a) == size_of(b)
    if isinstance(a, torch.SymFloat) and isinstance(b, torch.SymFloat):
        return a.node.has_hint() and b.node.has_hint() and float(a) == float(b)  # both are guarded by this
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b)
    return (
        (a.dtype, a.device, a.requires_grad) == (b.dtype, b.device, b.requires_grad)
        and list(map(size_of, a.shape)) == list(map(size_of, b.shape))
        and list(map(size_of, a.stride())) == list(map(size_of, b.stride()))
    )


def first_match(
    known: list[Recorded], d: Decision, ambient: Ambient, decisions: dict[Node, Decision]
) -> tuple[Recorded, dict[Node, Node]] | None:
    """The recorded region that stands behind d as well, with the node table."""
    found: Iterator[tuple[Recorded, dict[Node, Node]]] = (
        (r, table) for r in known if (table := r.match(d, ambient, decisions)) is not None
    )
    return next(found, None)
