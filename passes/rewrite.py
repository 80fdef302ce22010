"""Region -> stage ops: splice the new code into a graph and take the old one out.  Decides nothing.

Before:   mask = one_hot(ids); for e: rows = where(mask[e]); out.index_add_(0, rows, expert_e(x[rows]) * w[rows])
After:    d = quantize_dispatch(x, ids); y = permute_experts_unpermute(x, d...); out = combine(y, w)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .decisions import callee, returns_itself, tensor_of, writes_in_place
from .emit import Emitter, size_argument
from .lift import Refused
from .lift.algebra import add
from .lift.places import tensor
from .lift.sizes import prod, shape_of, size_of
from .liveness import Remap, same_storage
from .quantize import sunk
from .region import MoERegion
from .shard import Spread
from .stages import emit_stages
from .window import CREATORS


@dataclass(frozen=True)
class Spliced:
    """`added`: new nodes; `removed`: how many old ones are gone; `value`: the node that holds the block's output."""

    added: list[Node]
    removed: int
    value: Node


def weight_layouts(region: MoERegion) -> str:
    """The layout text of the region's weights, as emission will write it (what providers are asked about)."""
    probe = Emitter(Graph(), region, lambda n: n)
    return ",".join(sunk(probe, *probe.parameter(p, "eio"))[1] for p in region.formula.weights)


def splice(graph: Graph, region: MoERegion, providers: dict[str, str], at: Remap = lambda n: n, spread: Spread | None = None) -> Spliced:
    """Replace the region in `graph`, where `at` gives the copy of each of the region's nodes.  Raises Refused and leaves it alone.

    spread: how it lies over ranks, None for one rank.
    """
    root = at(region.root)
    before = set(graph.nodes)
    emitter = Emitter(graph, region, at)
    try:
        with graph.inserting_before(root):
            value = _emit(emitter, providers, spread)
            _call_by_one_name(region, at)
            written = {region.target} if region.target is not None else set()
            removed = region.liveness.removable(emitter.read, at, written)
            _check_sources(region, emitter.read, set(removed), at)
            spare = [] if region.target is None else [at(n) for n in region.liveness.leading_to(region.target, emitter.read, removed, at)]
            if region.target is not None:
                graph.call_method("copy_", (at(region.target), value))
    except (Refused, LookupError):
        _erase(graph, [n for n in reversed(graph.nodes) if n not in before])
        raise
    added = [n for n in graph.nodes if n not in before]
    for n in added:
        n.meta.setdefault("stack_trace", root.meta.get("stack_trace"))
        n.meta.setdefault("nn_module_stack", root.meta.get("nn_module_stack"))
    like = root if region.target is None else at(region.target)
    value.meta["example_value"] = like.meta.get("example_value")  # a later window may start behind it
    root.replace_all_uses_with(value if region.target is None else at(region.target))
    dead = [root, *[at(n) for n in reversed(removed)]]
    _erase(graph, dead)
    if region.target is not None:
        kept = len(graph.nodes)
        added = _forget_accumulator(graph, at(region.target), value, added)
        if len(graph.nodes) < kept:
            _erase_unused(graph, spare)
    return Spliced(added, len(dead), value)


def _call_by_one_name(region: MoERegion, at: Remap) -> None:
    """cur = y.mul_(w) is y: who reads cur reads y, which the block's output is written to, and need not know what stood in it."""
    if region.target is None:
        return
    target = at(region.target)
    same = {target}
    for n in (at(n) for n in region.nodes if n is not region.root):
        if returns_itself(n) and n.args and n.args[0] in same:
            same.add(n)
            n.replace_all_uses_with(target)


def _erase(graph: Graph, nodes: list[Node]) -> None:
    """In the given order: users before what they use."""
    for n in nodes:
        if n.users:
            raise RuntimeError(f"{n.name} should be dead and is used by {[u.name for u in n.users][:5]}")
        graph.erase_node(n)


def _check_sources(region: MoERegion, read: set[Node], removed: set[Node], at: Remap) -> None:
    for n in read:
        if region.liveness.changed_before_root(n, removed, at):
            raise Refused(f"{tensor(n)} is changed in place between the routing and the end of the experts")


def _forget_accumulator(graph: Graph, target: Node, value: Node, added: list[Node]) -> list[Node]:
    """out = zeros(..); out.copy_(value)  ->  value, where nothing else has a view of out. So for what the first expert gives."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    write = next(u for u in target.users if callee(u) == "copy_" and u.args[1] is value)
    if not _has_own_memory(target) or any(order[u] < order[write] for u in target.users):
        return added
    graph.erase_node(write)
    target.replace_all_uses_with(value)
    graph.erase_node(target)
    return [n for n in added if n is not write]


def _has_own_memory(n: Node) -> bool:
    """Is the node's tensor new, and laid out as ours?"""
    t = tensor_of(n)
    if callee(n) in CREATORS or t is None:
        return callee(n) in CREATORS
    made = n.op in ("call_function", "call_method") and not writes_in_place(n)
    return made and _contiguous(t) and not any(same_storage(n, i) for i in n.all_input_nodes)


def _erase_unused(graph: Graph, spare: list[Node]) -> None:
    """What only led to an accumulator that is gone; in program order."""
    for n in reversed(spare):
        if not n.users:
            graph.erase_node(n)


def _emit(em: Emitter, providers: dict[str, str], spread: Spread | None) -> Node:
    f = em.region.formula
    autocast = _autocast_on(em.region)
    off = em.call(torch.amp.autocast_mode._enter_autocast, *autocast) if autocast else None
    out = emit_stages(em, providers, spread)
    if f.rest:
        out = em.method("to", em.call(operator.add, out, em.matrix(add(*f.rest), f.feat)), f.dtype)
    if off is not None:
        em.call(torch.amp.autocast_mode._exit_autocast, off)
    return _as_root(em, out)


def _as_root(em: Emitter, out: Node) -> Node:
    """The output in the root's own shape; only contiguous roots are replaced, so that every later view stays valid."""
    like = tensor_of(em.region.root if em.region.target is None else em.region.target)
    if like is None:
        raise Refused("the output's shape is not known")
    shape = shape_of(like)
    if em.region.target is None and not _contiguous(like):
        raise Refused("the experts' output is not contiguous in the original")
    if len(shape) == 2:
        return out
    free = [i for i, s in enumerate(shape) if not isinstance(s, int)]
    if len(free) <= 1:
        return em.method("reshape", out, *[-1 if i in free else s for i, s in enumerate(shape)])
    return em.method("reshape", out, *[size_argument(em, s, like.shape[i]) for i, s in enumerate(shape)])


def _contiguous(t: torch.Tensor) -> bool:
    """Row-major, as far as the strides say without a guard on symbolic extents."""
    shape, strides = shape_of(t), [size_of(s) for s in t.stride()]
    return all(n == 1 or s == prod(shape[i + 1 :]) for i, (n, s) in enumerate(zip(shape, strides)))


def _autocast_on(region: MoERegion) -> tuple[Any, ...] | None:
    """Arguments of an autocast-off region, where autocast is in force at the root: the formula has its casts already."""
    on = region.trace.autocast_at_root
    return (on, None, False, None) if on else None
