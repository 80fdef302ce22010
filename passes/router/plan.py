"""Which of the user's nodes give way to `route`: the op takes the place of those that hold the weights or the ids.   (read-only)"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moe_compile.ops.route import Routing

from ..decisions import tensor_of
from ..lift import Refused
from ..lift.places import tensor, told
from .nodes import rows, shape, topk_part
from .read import Router
from .window import Traced


@dataclass(frozen=True)
class Cut:
    """A node whose readers get the op's weights (part 0) or ids (part 1) instead; `before`: readers of what it held earlier."""

    node: Node
    part: int
    shape: tuple[int, ...] | None  # None: [T, K], as the op gives it
    before: frozenset[Node]


@dataclass(frozen=True)
class Plan:
    """One edit, in the nodes of the window it was made for.  `source`: the user's top-k, where the op is put."""

    routing: Routing
    logits: Node
    bias: Node | None
    source: Node
    cuts: tuple[Cut, ...]
    removed: tuple[Node, ...] = ()

    @property
    def reads(self) -> list[Node]:
        return [n for n in (self.logits, self.bias) if n is not None]

    @property
    def added(self) -> int:
        reshapes = (dims(self.logits) != 2) + sum(c.shape is not None for c in self.cuts)
        return 1 + len({c.part for c in self.cuts}) + reshapes


def dims(n: Node) -> int:
    t = tensor_of(n)
    return 2 if t is None else t.dim()


def alternatives(router: Router) -> Iterator[Router]:
    """From the scores, which stay if something else reads them; and from the logits."""
    if router.scores is not router.logits:
        yield replace(router, routing=router.routing._replace(score="none", score_dtype=None), logits=router.scores)
    yield router


def plan_of(traced: Traced, router: Router, training: bool) -> Plan:
    """Everything but what is removed.  Raises Refused."""
    if router.weights is None:
        raise Refused("the weights are made in another way than route's")
    logits = _holder(traced, router.logits)
    bias = None if router.bias is None else _holder(traced, router.bias)
    source = traced.trace.owner.get(topk_part(router.ids, 1))
    if source is None:
        raise Refused("the choice is made outside of the window")
    if training:
        _check_gradients(router, bias)
    cuts = [*_cuts(traced, router.weights, 0), *_cuts(traced, router.ids, 1)]
    return Plan(router.routing, logits, bias, source, tuple(cuts))


def _holder(traced: Traced, a: Node) -> Node:
    """The node that holds a value from before the op to the window's end."""
    for n in (*traced.window.inputs, *traced.window.nodes):
        if traced.trace.at_def.get(n) is a and traced.now.get(n) is a:
            return n
    raise Refused(f"what is computed within a call of {told(a)} is needed outside of it")


def _check_gradients(router: Router, bias: Node | None) -> None:
    if bias is not None and ((t := tensor_of(bias)) is None or t.requires_grad):
        raise Refused("the bias of the choice takes part in the gradients")
    if any(a.meta.get("no_grad") for a in router.differentiated()):
        raise Refused("a part of the router is computed without gradients")


# ---------------------------------------------------------------- cuts
def _cuts(traced: Traced, value: Node, part: int) -> Iterator[Cut]:
    """The nodes through which the value is read once it is made, which an in-place op may do in older memory.  Raises Refused."""
    maker = traced.trace.owner.get(rows(value))
    if maker is None:
        raise Refused("the weights or the ids come from outside of the window")
    order = {n: i for i, n in enumerate(traced.window.nodes)}
    for n in traced.window.nodes:
        before = frozenset(u for u in n.users if order.get(u, len(order)) <= order[maker])
        if len(before) == len(n.users) or not _holds(traced, n, value, order[n] >= order[maker], maker):
            continue
        outside = traced.window.read_outside(n)
        if any(u < maker for u in outside):
            raise Refused(f"{tensor(n)} is read before it is changed in place")
        sizes = shape(traced.trace.at_def[n])
        if len(sizes) == 2 or outside:  # else views of two dimensions are cut, and it falls with them
            yield Cut(n, part, None if len(sizes) == 2 else _static(sizes), before)


def _holds(traced: Traced, n: Node, value: Node, younger: bool, maker: Node) -> bool:
    """Does n hold the value from when it was made?  Older nodes may, where it was written into their memory."""
    if younger:
        a = traced.trace.at_def.get(n)
        return isinstance(a, Node) and rows(a) is rows(value)
    t, made = tensor_of(n), tensor_of(maker)
    if t is None or made is None or t.untyped_storage()._cdata != made.untyped_storage()._cdata:
        return False
    if not _same_memory(t, made):
        raise Refused(f"{tensor(n)} shows a part of what is changed in place")
    return True


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def _static(sizes: list[Any]) -> tuple[int, ...]:
    """Arguments of a reshape to these sizes."""
    free = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
    if len(free) > 1:
        raise Refused("ids of a shape with two unknown extents are read outside of the router")
    return tuple(-1 if i in free else s for i, s in enumerate(sizes))
