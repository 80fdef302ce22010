"""Which nodes of a window does nobody need once a value of it is computed otherwise?

Dynamo's graph has in-place ops and aliases, so its own uses do not tell; the functional ATen graph behind it has neither.  A Dynamo node
may go if every ATen node that it made is dead, and no node that stays reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .decisions import ancestors, callee, tensor_of, writes_in_place, writes_to
from .window import CONTEXT, Trace

Remap = Callable[[Node], Node]
aten = torch.ops.aten
WHOLE_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default)  # all elements, in their order


@dataclass(frozen=True)
class Liveness:
    """`nodes`, `inputs`: of the window that `trace` has run; `now`: the ATen node that holds each one's value at its end.

    `root`: the Dynamo node that is replaced, `cut` the ATen node of its value: what only leads there is dead.  None: nothing is replaced,
    the window's own users have been taken away; `replaced`: the ATen nodes whose value they read elsewhere now.
    """

    trace: Trace
    nodes: list[Node]
    inputs: list[Node]
    now: dict[Node, Node]
    root: Node | None = None
    cut: Node | None = None
    replaced: frozenset[Node] = frozenset()

    def removable(self, needed: Iterable[Node], at: Remap, written: Iterable[Node] = ()) -> list[Node]:
        """Nodes of the window that nobody needs once root's value is computed otherwise.

        `needed`: what the new code reads; `written`: what it fills as a whole, so that only the memory is needed, not what stood there.
        `at(n)`: the node of the graph at hand that stands for the window's node n.
        """
        inside = {at(n) for n in self.nodes}
        seen = {n for n in self.nodes if n is not self.root and any(u not in inside for u in at(n).users)}
        keep = seen | set(needed) | set(written)
        live = self._live(seen, set(needed), self._read_later(set(written), inside, at))
        dead = [n for n in self.nodes if n is not self.root and n not in keep and self._droppable(n, live, at)]
        return self._closed(dead, at)

    def _droppable(self, n: Node, live: set[Node], at: Remap) -> bool:
        if callee(at(n)) in CONTEXT or n.op == "get_attr":
            return False
        return not any(a in live or _random(a) for a in self.trace.created[n])

    def leading_to(self, target: Node, needed: Iterable[Node], removed: Iterable[Node], at: Remap) -> list[Node]:
        """Nodes of the window that stay only because target is computed from them, in program order."""
        inside, gone, needed = {at(n) for n in self.nodes}, set(removed), set(needed)
        seen = {n for n in self.nodes if n is not self.root and n is not target and any(u not in inside for u in at(n).users)}
        live, before = self._live(seen, needed, set()), ancestors(at(target))
        keep = {*seen, *needed, *gone, target}
        return [n for n in self.nodes if at(n) in before and n not in keep and n is not self.root and self._droppable(n, live, at)]

    def _read_later(self, written: set[Node], inside: set[Node], at: Remap) -> set[Node]:
        """Those of `written` that nodes outside read only when they are filled."""
        if self.root is None or not written:
            return set()
        order = {n: i for i, n in enumerate(at(self.root).graph.nodes)}
        return {n for n in written if all(order[u] > order[at(self.root)] for u in at(n).users if u not in inside)}

    def _cuts(self) -> set[Node]:
        """The ATen nodes of root's value: what the root writes through a view is a view of what it writes to the whole."""
        found: set[Node] = set()
        a, own = self.cut, set() if self.root is None else set(self.trace.created[self.root])
        while a is not None and a not in found:
            found.add(a)
            whole = a.all_input_nodes[0] if a.target in WHOLE_VIEWS else None
            a = whole if whole in own else None
        return found

    def _live(self, seen: set[Node], needed: set[Node], filled: set[Node]) -> set[Node]:
        """ATen nodes that still matter: values seen outside, values the new code reads, and inputs changed for good."""
        seeds = [self._at_def(n) for n in needed if n in self.trace.at_def]
        seeds += [a for n in seen for a in (self.now.get(n), None if n in filled else self._at_def(n))]
        seeds += [self.now[n] for n in self.inputs if n in self.now and self.now[n] is not self._at_def(n)]
        live, cuts = set[Node](), self._cuts()
        todo = [a for s in seeds for a in (s if isinstance(s, list) else [s]) if isinstance(a, Node)]
        while todo:
            a = todo.pop()
            if a not in cuts and a not in self.replaced and a not in live:
                live.add(a)
                todo.extend(a.all_input_nodes)
        return live

    def _at_def(self, n: Node) -> Any:
        return self.trace.at_def.get(n)

    def _closed(self, dead: list[Node], at: Remap) -> list[Node]:
        """A node that a kept one reads is kept as well; assertions on removed values go with them."""
        gone, inside, root = {at(n): n for n in dead}, {at(n): n for n in self.nodes}, None if self.root is None else at(self.root)
        changed = True
        while changed:
            changed = False
            for m in list(gone):
                readers = [u for u in m.users if u not in gone and u is not root]
                if any(not (is_assertion(u) and u in inside) for u in readers):
                    del gone[m]
                    changed = True
                else:
                    gone.update({u: inside[u] for u in readers})
        return [n for n in self.nodes if at(n) in gone]

    def changed_before_root(self, n: Node, removed: set[Node], at: Remap) -> bool:
        """Does a node that stays change n between its definition and the root?"""
        was, is_ = self._at_def(n), self.now.get(n)
        if not isinstance(was, Node) or not isinstance(is_, Node) or was is is_:
            return False
        seen: set[Node] = set()
        todo = [is_]
        while todo:
            a = todo.pop()
            if a in seen or a is was:
                continue
            seen.add(a)
            owner = self.trace.owner.get(a)
            stays = owner is not None and owner not in removed and owner is not self.root
            if stays and writes_in_place(at(owner)) and _writes(at(owner), at(n)):  # type: ignore[arg-type]
                return True
            todo.extend(a.all_input_nodes)
        return False


def _writes(m: Node, n: Node) -> bool:
    """Does m's in-place op change a tensor of n's storage?  By Dynamo's fake tensors, which share it like the real ones."""
    return any(same_storage(target, n) for target in writes_to(m))


def same_storage(m: object, n: object) -> bool:
    """Do two nodes' tensors share memory?  What is not known is assumed to."""
    a, b = tensor_of(m), tensor_of(n)
    return a is None or b is None or a.untyped_storage()._cdata == b.untyped_storage()._cdata


def is_assertion(n: Node) -> bool:
    return callee(n) in {
        "_assert_scalar",
        "_assert_async",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }


def _random(a: Node) -> bool:
    return isinstance(a.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in a.target.tags
