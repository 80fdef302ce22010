"""Router -> the stage op `route`, where that leaves fewer nodes.  All or nothing for each router; what is not understood stays.

Before:   p = softmax(logits); v, ids = topk(p, 2); v /= v.sum(-1, keepdim=True)
After:    r = route(logits, None, 2, "softmax", "sum", ...); v, ids = r[0], r[1]

1. window.py    the nodes between the logits and the dispatch, traced
2. read.py      the constants, and the ATen nodes of logits, bias, ids and weights
3. plan()       which of the user's nodes give way: those that hold the ids or the weights are replaced, what nobody reads then falls
4. check()      the window before and after, executed
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

from moe_compile.ops.route import Routing

from .decisions import _LAYERS as LAYERS
from .decisions import callee, tensor_of
from .lift import Refused
from .lift.sizes import shape_of
from .liveness import Liveness, Remap
from .router import Router, Window, describe, input_name, read_router, spelled_out, traced, window_before
from .router.nodes import rows, shape, topk_part
from .routing_check import check
from .standalone import window_module
from .validate import Mismatch
from .window import ambients

log = logging.getLogger("moe_compile")


# ---------------------------------------------------------------- what is done
@dataclass(frozen=True)
class Cut:
    """A node whose readers get the op's weights (part 0) or ids (part 1) instead; `before`: readers of what it held earlier."""

    node: Node
    part: int
    shape: tuple[int, ...] | None  # None: [T, K], as the op gives it
    before: frozenset[Node]


@dataclass(frozen=True)
class Plan:
    """One edit, in the nodes of the window it was made for."""

    routing: Routing
    logits: Node
    bias: Node | None
    source: Node  # the user's top-k, where the op is put
    cuts: tuple[Cut, ...]
    removed: tuple[Node, ...] = ()

    @property
    def added(self) -> int:
        return 1 + len({c.part for c in self.cuts}) + sum(c.shape is not None for c in self.cuts) + (_dims(self.logits) != 2)


@dataclass(frozen=True)
class Outcome:
    """What became of a router: its text, and the nodes removed and added (0, 0: it stays)."""

    text: str
    removed: int = 0
    added: int = 0
    check: str | None = None


def _dims(n: Node) -> int:
    t = tensor_of(n)
    return 2 if t is None else t.dim()


# ---------------------------------------------------------------- the pass
class Routings:
    """The routers of one graph, one after the other."""

    def __init__(self, gm: GraphModule, training: bool, validate: bool):
        self.gm, self.training, self.validate = gm, training, validate
        self.ambient = ambients(gm.graph, torch.is_grad_enabled())
        self.known: dict[Any, tuple[Window, Plan | None, Outcome]] = {}
        self.texts: dict[Node, str] = {}  # of the new nodes, for a second block with the same ids

    def run(self, added: Iterable[Node]) -> Outcome:
        """The router of one block; `added`: the nodes that were spliced for it.  Never raises for a router it does not like."""
        try:
            dispatch, weights = _readers(list(added))
            if dispatch.args[1] in self.texts:
                return Outcome(self.texts[dispatch.args[1]])
            window = window_before(dispatch, dispatch.args[1], weights, self.ambient)
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
        window = traced(self.gm, window)
        ids, weights = _now(window, window.ids), None if window.weights is None else _now(window, window.weights)
        text = spelled_out(ids, weights, _names(window))
        try:
            router = read_router(ids, weights)
            text = describe(router, weights, _names(window))
            plan = self._plan(window, router)
            return plan, Outcome(text, len(plan.removed), plan.added, self._check(window, plan))
        except (Refused, Mismatch) as e:
            log.debug("router stays: %s", e)
            return None, Outcome(text)

    def _plan(self, window: Window, router: Router) -> Plan:
        """Raises Refused where `route` cannot stand for it, or saves nothing."""
        plans = [self._trial(window, r) for r in _alternatives(router)]
        best = max(reversed(plans), key=lambda p: len(p.removed) - p.added)
        if len(best.removed) <= best.added:
            raise Refused(f"{len(best.removed)} nodes would be replaced by {best.added}")
        return best

    def _trial(self, window: Window, router: Router) -> Plan:
        """Edits a copy to see what falls."""
        plan = plan_of(window, router, self.training)
        new, copy = module_of(self.gm, window)
        _insert(new.graph, plan, copy.__getitem__, copy[plan.source])
        needed = [n for n in (plan.logits, plan.bias) if n is not None]
        assert window.trace is not None and window.now is not None
        given = frozenset(rows(a) for a in (router.ids, router.weights) if a is not None)
        live = Liveness(window.trace, window.nodes, window.inputs, window.now, replaced=given)
        return replace(plan, removed=tuple(live.removable(needed, copy.__getitem__)))

    def _check(self, window: Window, plan: Plan) -> str | None:
        if not self.validate:
            return None
        old, _ = module_of(self.gm, window)
        new, copy = module_of(self.gm, window)
        added = splice(new.graph, plan, copy.__getitem__, copy[plan.source])
        if self._elsewhere(plan.source):
            _move(added, min(u for n in added for u in n.users if u not in added))
        new.recompile()
        return check(window, old, new, self.training)

    def _apply(self, window: Window, first: Window, plan: Plan | None, outcome: Outcome) -> Outcome:
        if plan is None:
            return outcome
        here = dict(zip(first.position, window.position))
        source = here[plan.source]
        if (place := self._place(plan, here)) is None:
            return Outcome(outcome.text)
        added = splice(self.gm.graph, plan, here.__getitem__, source)
        if place is not source:
            _move(added, place)
        self.texts.update((n, outcome.text) for n in added)
        return outcome if window is first else replace(outcome, check=None)

    def _elsewhere(self, source: Node) -> bool:
        """Is the choice made under no_grad, where the weights would get no gradients?"""
        return self.training and not self.ambient[source].grad

    def _place(self, plan: Plan, here: dict[Node, Node]) -> Node | None:
        """The user's top-k; where that is under no_grad, the first reader of a result, if it is not."""
        if not self._elsewhere(here[plan.source]):
            return here[plan.source]
        gone = {here[n] for n in plan.removed}
        readers = [u for c in plan.cuts for u in here[c.node].users if u not in gone]
        first = min(readers, default=None)
        return first if first in self.ambient and self.ambient[first].grad else None


def _readers(added: list[Node]) -> tuple[Node, Node | None]:
    """The dispatch, and what weighs its slots."""
    ops = torch.ops.moe_compile
    dispatch = next((n for n in added if n.target is ops.quantize_dispatch.default), None)
    experts = next((n for n in added if n.target is ops.permute_experts_unpermute.default), None)
    if dispatch is None or experts is None:
        raise Refused("no dispatch stands for the block")
    weights = [u.args[1] for u in experts.users if u.target is ops.combine.default] + [experts.args[3]]
    for u in experts.users:  # slots that nobody sums: rows times weights[..., None]
        if u.target is operator.mul and isinstance(u.args[1], Node) and callee(u.args[1]) == "unsqueeze":
            weights.append(u.args[1].args[0])
    return dispatch, next((w for w in weights if isinstance(w, Node)), None)


def _now(window: Window, n: Node) -> Node:
    assert window.now is not None
    if n not in window.now:
        raise Refused(f"the value of {n.name} is not known")
    return window.now[n]


def _names(window: Window) -> dict[Node, str]:
    assert window.trace is not None
    return {a: input_name(n, callee(n) in LAYERS) for n in window.inputs if isinstance(a := window.trace.at_def.get(n), Node)}


# ---------------------------------------------------------------- the plan
def _alternatives(router: Router) -> list[Router]:
    """From the logits; and from the scores, where those stay because something else reads them."""
    if router.scores is router.logits:
        return [router]
    return [router, replace(router, routing=router.routing._replace(score="none", score_dtype=None), logits=router.scores)]


def plan_of(window: Window, router: Router, training: bool) -> Plan:
    """Everything but what is removed.  Raises Refused."""
    if router.weights is None:
        raise Refused("the weights are made in another way than route's")
    logits = _holder(window, router.logits)
    bias = None if router.bias is None else _holder(window, router.bias)
    source = _owner(window, router.ids)
    if training:
        _check_gradients(router, bias)
    cuts = [*_cuts(window, router.weights, 0), *_cuts(window, router.ids, 1)]
    return Plan(router.routing, logits, bias, source, tuple(cuts))


def _holder(window: Window, a: Node) -> Node:
    """The node that holds a value from before the op to the window's end."""
    assert window.trace is not None and window.now is not None
    for n in (*window.inputs, *window.nodes):
        if window.trace.at_def.get(n) is a and window.now.get(n) is a:
            return n
    raise Refused(f"no node of the user's graph holds {a.name}")


def _owner(window: Window, ids: Node) -> Node:
    """The user's top-k."""
    topk = topk_part(ids, 1)
    assert window.trace is not None
    if topk not in window.trace.owner:
        raise Refused("the choice is made outside of the window")
    return window.trace.owner[topk]


def _check_gradients(router: Router, bias: Node | None) -> None:
    if bias is not None and ((t := tensor_of(bias)) is None or t.requires_grad):
        raise Refused("the bias of the choice takes part in the gradients")
    if any(a.meta.get("no_grad") for a in router.differentiated()):
        raise Refused("a part of the router is computed without gradients")


def _cuts(window: Window, value: Node, part: int) -> list[Cut]:
    """The nodes through which the value is read once it is made, which an in-place op may do in older memory.  Raises Refused."""
    assert window.trace is not None
    maker = window.trace.owner.get(rows(value))
    if maker is None:
        raise Refused("the weights or the ids come from outside of the window")
    order = {n: i for i, n in enumerate(window.nodes)}
    found = []
    for n in window.nodes:
        before = frozenset(u for u in n.users if order.get(u, len(order)) <= order[maker])
        if len(before) < len(n.users) and _holds(n, value, maker, order, window):
            if any(u < maker for u in window.read_outside(n)):
                raise Refused(f"{n.name} is read before it is changed in place")
            sizes = shape(window.trace.at_def[n])
            if len(sizes) == 2 or window.read_outside(n):  # else views of two dimensions are cut, and it falls with them
                found.append(Cut(n, part, None if len(sizes) == 2 else _static(sizes), before))
    return found


def _holds(n: Node, value: Node, maker: Node, order: dict[Node, int], window: Window) -> bool:
    """Does n hold the value from when it was made?  Older nodes may, where it was written into their memory."""
    assert window.trace is not None
    if order[n] >= order[maker]:
        a = window.trace.at_def.get(n)
        return isinstance(a, Node) and rows(a) is rows(value)
    t, made = tensor_of(n), tensor_of(maker)
    if t is None or made is None or t.untyped_storage()._cdata != made.untyped_storage()._cdata:
        return False
    if (t.shape, t.stride(), t.storage_offset()) != (made.shape, made.stride(), made.storage_offset()):
        raise Refused(f"{n.name} shows a part of what is changed in place")
    return True


def _static(sizes: list[Any]) -> tuple[int, ...]:
    """Arguments of a reshape to these sizes."""
    free = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
    if len(free) > 1:
        raise Refused("ids of a shape with two unknown extents are read outside of the router")
    return tuple(-1 if i in free else s for i, s in enumerate(sizes))


# ---------------------------------------------------------------- the edit
def module_of(gm: GraphModule, window: Window) -> tuple[GraphModule, dict[Node, Node]]:
    """The window by itself: its inputs -> every tensor of it that is read outside."""
    seen = [n for n in window.nodes if window.read_outside(n)]
    return window_module(gm, window.inputs, window.nodes, window.ambient.autocast, seen)


def splice(graph: Graph, plan: Plan, at: Remap, place: Node) -> list[Node]:
    """Put the op before `place` and take out what falls; the new nodes in order."""
    added = _insert(graph, plan, at, place)
    gone = [at(n) for n in plan.removed]
    while gone:
        free = [n for n in gone if not n.users]
        if not free:
            raise RuntimeError(f"nodes that should be dead are still used: {[n.name for n in gone][:5]}")
        for n in free:
            graph.erase_node(n)
        gone = [n for n in gone if n not in set(free)]
    return added


def _move(added: list[Node], place: Node) -> None:
    for n in added:
        place.prepend(n)


def _insert(graph: Graph, plan: Plan, at: Remap, place: Node) -> list[Node]:
    new: list[Node] = []
    with graph.inserting_before(place):
        logits_TE = at(plan.logits)
        if _dims(plan.logits) != 2:
            logits_TE = graph.call_method("reshape", (logits_TE, -1, shape_of(tensor_of(plan.logits))[-1]))  # type: ignore[arg-type]
            new.append(logits_TE)
        bias = None if plan.bias is None else at(plan.bias)
        route = graph.call_function(torch.ops.moe_compile.route.default, (logits_TE, bias, *plan.routing))
        parts = {i: graph.call_function(operator.getitem, (route, i)) for i in sorted({c.part for c in plan.cuts})}
        new += [route, *parts.values()]
        for c in plan.cuts:
            value = parts[c.part]
            if c.shape is not None:
                value = graph.call_method("reshape", (value, *c.shape))
                new.append(value)
            kept = {at(n) for n in c.before}
            at(c.node).replace_all_uses_with(value, delete_user_cb=lambda u, kept=kept: u not in kept)
    for n in new:
        n.meta.update({k: v for k, v in at(plan.source).meta.items() if k in ("stack_trace", "nn_module_stack")})
    return new


__all__ = ["Outcome", "Routings"]
