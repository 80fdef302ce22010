"""Router -> the stage op `route`, where that leaves fewer nodes.  All or nothing for each router; what is not understood stays.

Before:   p = softmax(logits); v, ids = topk(p, 2); v /= v.sum(-1, keepdim=True)
After:    r = route(logits, None, 2, "softmax", "sum", ...); v, ids = r[0], r[1]

1. window.py    the nodes between the logits and the dispatch, traced
2. read.py      the constants, and the ATen nodes of logits, bias, ids and weights
3. plan.py      which nodes give way; on a copy: what nobody reads then
4. routing_check.py    the window before and after, executed
5. splice()     the same edit in the user's graph

A window with the same code as an earlier one (the next layer) goes straight to 5.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.ops import route

from .decisions import callee, tensor_of
from .lift import Refused
from .lift.sizes import shape_of
from .liveness import Liveness, Remap
from .router import Plan, Router, Traced, Window, describe, read_router, spelled_out, trace_window, window_before
from .router.nodes import rows
from .router.plan import alternatives, dims, plan_of
from .routing_check import check
from .standalone import window_module
from .validate import Mismatch
from .window import ambients

log = logging.getLogger("moe_compile")


@dataclass(frozen=True)
class Outcome:
    """What became of a router: its text, the nodes removed and added (0, 0: it stays), and the provider of `route`."""

    text: str
    removed: int = 0
    added: int = 0
    check: str | None = None
    provider: str = ""


class Routings:
    """The routers of one graph, one after the other."""

    def __init__(self, gm: GraphModule, training: bool, validate: bool):
        self.gm, self.training, self.validate = gm, training, validate
        self.ambient = ambients(gm.graph, torch.is_grad_enabled())
        self.known: dict[Any, tuple[Window, Plan | None, Outcome]] = {}
        self.texts: dict[Any, str] = {}  # of the new nodes, for a second block with the same ids

    def run(self, added: Iterable[Node]) -> Outcome:
        """The router of one block; `added`: the nodes that were spliced for it.  Never raises for a router it does not like."""
        try:
            readers = _readers(list(added))
            if readers.ids in self.texts:
                return Outcome(self.texts[readers.ids])
            window = window_before(readers.dispatch, readers.ids, readers.weights, self.ambient)
            key = window.key()
            if key not in self.known:
                self.known[key] = (window, *self._first(window))
        except Refused as e:
            return Outcome(f"not recovered: {e}")
        except Exception as e:  # nothing is edited yet, and the user's model must run whatever we trip over
            log.debug("internal error in the router pass", exc_info=True)
            return Outcome(f"not recovered: internal error ({type(e).__name__}: {e}); please report it")
        return self._apply(window, *self.known[key])

    def _first(self, window: Window) -> tuple[Plan | None, Outcome]:
        traced = trace_window(self.gm, window)
        ids, weights, names = traced.value(window.ids), traced.value(window.weights), traced.names()
        text = spelled_out(ids, weights, names)
        try:
            router = read_router(ids, weights)
            text = describe(router, weights, names)
            plan = self._plan(traced, router)
            return plan, Outcome(text, len(plan.removed), plan.added, self._check(traced, plan))
        except (Refused, Mismatch) as e:
            log.debug("router stays: %s", e)
            return None, Outcome(text)

    def _plan(self, traced: Traced, router: Router) -> Plan:
        """Raises Refused where `route` cannot stand for it, or saves nothing."""
        plans = list(filter(None, (self._trial(traced, r) for r in alternatives(router))))
        if not plans:
            plan_of(traced, router, self.training)  # raises the reason
        best = max(plans, key=lambda p: len(p.removed) - p.added)
        if len(best.removed) <= best.added:
            raise Refused(f"{len(best.removed)} nodes would be replaced by {best.added}")
        return best

    def _trial(self, traced: Traced, router: Router) -> Plan | None:
        """Edits a copy to see what falls."""
        try:
            plan = plan_of(traced, router, self.training)
        except Refused:
            return None
        new, copy = _copy(self.gm, traced.window)
        _insert(new.graph, plan, copy.__getitem__)
        given = frozenset(rows(a) for a in (router.ids, router.weights) if a is not None)
        live = Liveness(traced.trace, traced.window.nodes, traced.window.inputs, traced.now, replaced=given)
        return replace(plan, removed=tuple(live.removable(plan.reads, copy.__getitem__)))

    def _check(self, traced: Traced, plan: Plan) -> str | None:
        if not self.validate:
            return None
        old, _ = _copy(self.gm, traced.window)
        new, copy = _copy(self.gm, traced.window)
        added = splice(new.graph, plan, copy.__getitem__)
        if self._without_gradients(plan.source):
            _move(added, min(u for n in added for u in n.users if u not in added))
        new.recompile()
        return check(traced, old, new, self.training)

    def _apply(self, window: Window, first: Window, plan: Plan | None, outcome: Outcome) -> Outcome:
        if plan is None:
            return outcome
        here = dict(zip(first.position, window.position))
        place = self._place(plan, here)
        if place is None:
            return Outcome(outcome.text)
        added = splice(self.gm.graph, plan, here.__getitem__)
        if place is not here[plan.source]:
            _move(added, place)
        self.texts.update((n, outcome.text) for n in added)
        outcome = replace(outcome, provider=provider_of(next(n for n in added if n.target is route.OP.overload)))
        return outcome if window is first else replace(outcome, check=None)

    def _place(self, plan: Plan, here: dict[Node, Node]) -> Node | None:
        """The user's top-k; where that is under no_grad, the first reader of a result, if that is not."""
        if not self._without_gradients(here[plan.source]):
            return here[plan.source]
        gone = {here[n] for n in plan.removed}
        readers = [u for c in plan.cuts for u in here[c.node].users if u not in gone]
        first = min(readers, default=None)
        return first if first in self.ambient and self.ambient[first].grad else None

    def _without_gradients(self, n: Node) -> bool:
        return self.training and not self.ambient[n].grad


@dataclass(frozen=True)
class _Readers:
    """The dispatch, the ids that it was given, and what weighs its slots."""

    dispatch: Node
    ids: Node
    weights: Node | None


def provider_of(n: Node) -> str:
    """Who computes a node of `route`."""
    logits, bias = (None if a is None else tensor_of(a) for a in n.args[:2])
    by_kernel = logits is not None and logits.device.type == "cuda" and route.unfit(logits, bias, route.Routing(*n.args[2:])) is None
    return (route.TRITON if by_kernel else route.PROVIDER).name


def _readers(added: list[Node]) -> _Readers:
    ops = torch.ops.moe_compile
    dispatch = next((n for n in added if n.target is ops.quantize_dispatch.default), None)
    found = (ops.permute_experts_unpermute.default, ops.permute_experts_combine.default)
    experts = next((n for n in added if n.target in found), None)
    if dispatch is None or experts is None:
        raise Refused("no dispatch stands for the block")
    sent: Any = dispatch.args[5] if len(dispatch.args) > 5 else []
    weights = [*sent, *(u.args[1] for u in experts.users if u.target is ops.combine.default)]
    if not sent:
        weights.append(experts.args[3])
    for u in experts.users:  # slots that nobody sums: rows times weights[..., None]
        if u.target is operator.mul and isinstance(u.args[1], Node) and callee(u.args[1]) == "unsqueeze":
            weights.append(u.args[1].args[0])
    own = set(added)
    ids: Any = dispatch.args[1]
    return _Readers(dispatch, _given(ids, own), next((_given(w, own) for w in weights if isinstance(w, Node)), None))


def _given(n: Node, added: set[Node]) -> Node:
    """What the block was given, behind the part of it that this rank takes or a chunk holds."""
    ours = (torch.ops.moe_compile.take_tokens.default, operator.getitem)
    while n in added and (n.target in ours or (n.target == "reshape" and n.args[1:] == (-1, 1))):
        n = n.args[0]  # type: ignore[assignment]
    return n


# ---------------------------------------------------------------- the edit
def _copy(gm: GraphModule, window: Window) -> tuple[GraphModule, dict[Node, Node]]:
    """The window by itself: its inputs -> everything of it that is read outside."""
    seen = [n for n in window.nodes if window.read_outside(n)]
    return window_module(gm, window.inputs, window.nodes, window.ambient.autocast, seen)


def splice(graph: Graph, plan: Plan, at: Remap) -> list[Node]:
    """Put the op before the user's top-k and take out what falls; the new nodes in order."""
    added = _insert(graph, plan, at)
    gone = [at(n) for n in plan.removed]
    while gone:
        free = {n for n in gone if not n.users}
        if not free:
            raise RuntimeError(f"nodes that should be dead are still used: {[n.name for n in gone][:5]}")
        for n in free:
            graph.erase_node(n)
        gone = [n for n in gone if n not in free]
    return added


def _insert(graph: Graph, plan: Plan, at: Remap) -> list[Node]:
    added: list[Node] = []

    def new(node: Node) -> Node:
        node.meta.update({k: v for k, v in at(plan.source).meta.items() if k in ("stack_trace", "nn_module_stack")})
        added.append(node)
        return node

    with graph.inserting_before(at(plan.source)):
        logits_TE, like = at(plan.logits), tensor_of(plan.logits)
        if like is not None and dims(plan.logits) != 2:
            logits_TE = new(graph.call_method("reshape", (logits_TE, -1, shape_of(like)[-1])))
        bias = None if plan.bias is None else at(plan.bias)
        route = new(graph.call_function(torch.ops.moe_compile.route.default, (logits_TE, bias, *plan.routing)))
        parts = {i: new(graph.call_function(operator.getitem, (route, i))) for i in sorted({c.part for c in plan.cuts})}
        for c in plan.cuts:
            value = parts[c.part] if c.shape is None else new(graph.call_method("reshape", (parts[c.part], *c.shape)))
            kept = {at(n) for n in c.before}
            at(c.node).replace_all_uses_with(value, delete_user_cb=lambda u, kept=kept: u not in kept)
    return added


def _move(added: list[Node], place: Node) -> None:
    for n in added:
        place.prepend(n)


__all__ = ["Outcome", "Routings"]
