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

from .decisions import callee, tensor_of
from .emit import Emitter, size_argument
from .lift import Refused
from .lift.algebra import add
from .lift.expr import Expr
from .lift.index import bounds
from .lift.sizes import prod, shape_of, size_of
from .liveness import Remap
from .region import MoERegion
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
    return ",".join(probe.parameter(p, "eio")[1] for p in region.formula.weights)


def splice(graph: Graph, region: MoERegion, providers: dict[str, str], quant: str, at: Remap = lambda n: n) -> Spliced:
    """Replace the region in `graph`, where `at` gives the copy of each of the region's nodes.  Raises Refused and leaves it alone."""
    root = at(region.root)
    before = set(graph.nodes)
    emitter = Emitter(graph, region, at)
    try:
        with graph.inserting_before(root):
            value = _emit(emitter, providers, quant)
            written = {region.target} if region.target is not None else set()
            removed = region.liveness.removable(emitter.read | written, at)
            _check_sources(region, emitter.read, set(removed), at)
            if region.target is not None:
                graph.call_method("copy_", (at(region.target), value))
    except Refused:
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
        added = _forget_accumulator(graph, at(region.target), value, added)
    return Spliced(added, len(dead), value)


def _erase(graph: Graph, nodes: list[Node]) -> None:
    """In the given order: users before what they use."""
    for n in nodes:
        if n.users:
            raise RuntimeError(f"{n.name} should be dead and is used by {[u.name for u in n.users][:5]}")
        graph.erase_node(n)


def _check_sources(region: MoERegion, read: set[Node], removed: set[Node], at: Remap) -> None:
    for n in read:
        if region.liveness.changed_before_root(n, removed, at):
            raise Refused(f"{n.name} is changed in place between the routing and the end of the experts")


def _forget_accumulator(graph: Graph, target: Node, value: Node, added: list[Node]) -> list[Node]:
    """out = zeros(..); out.copy_(value)  ->  value, where nothing else has a view of out."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    write = next(u for u in target.users if callee(u) == "copy_" and u.args[1] is value)
    if callee(target) not in CREATORS or any(order[u] < order[write] for u in target.users):
        return added
    graph.erase_node(write)
    target.replace_all_uses_with(value)
    graph.erase_node(target)
    return [n for n in added if n is not write]


def _emit(em: Emitter, providers: dict[str, str], quant: str) -> Node:
    f, ops = em.region.formula, torch.ops.moe_compile
    autocast = _autocast_on(em.region)
    off = em.call(torch.amp.autocast_mode._enter_autocast, *autocast) if autocast else None
    x_TH = _frozen(em, "x", em.matrix(f.x, f.x_feat))
    ids_TK = _slots(em, em.matrix(f.ids, f.slots), f.ids)
    w_TK = em.matrix(f.weight, f.slots) if f.weight is not None else None
    inner_TK = em.matrix(f.inner, f.slots) if f.inner is not None else None
    weights = [_frozen_list(em, f"mm{j}", *em.parameter(p, "eio")) for j, p in enumerate(f.weights)]
    biases = [_frozen_list(em, f"b{j}", *em.parameter(p, "eo")) for j, p in enumerate(f.biases)]
    sent = em.call(ops.quantize_dispatch.default, x_TH, ids_TK, f.num_experts, quant, providers["comm"])
    sent.meta["ids_in_range"] = _in_range(f.ids, f.num_experts)
    order, offsets, handle = (em.call(operator.getitem, sent, i) for i in (2, 3, 4))
    y_TKO = em.call(
        ops.permute_experts_unpermute.default, x_TH, order, offsets, _slots(em, inner_TK, f.inner), _flat(weights), _flat(biases),
        f.program, ",".join(w for _, w in weights), ",".join(b for _, b in biases), f.top_k, providers["experts"],
    )  # fmt: skip
    if f.summed:
        out = em.call(ops.combine.default, y_TKO, _slots(em, w_TK, f.weight), handle, f.dtype, providers["comm"])
    else:
        out = _each_slot(em, y_TKO, _slots(em, w_TK, f.weight))
    if f.rest:
        out = em.method("to", em.call(operator.add, out, em.matrix(add(*f.rest), f.feat)), f.dtype)
    if off is not None:
        em.call(torch.amp.autocast_mode._exit_autocast, off)
    return _as_root(em, out)


def _in_range(ids: Expr, num_experts: int) -> bool:
    """Is every id known to be an expert's?"""
    known = bounds(ids)
    return known is not None and known[0] >= 0 and isinstance(known[1], int) and known[1] <= num_experts


def _frozen(em: Emitter, name: str, n: Node) -> Node:
    """What the original reads only where no gradient flows gets no gradient (not zeros, which an optimiser would act on)."""
    return em.method("detach", n) if name in em.region.formula.frozen else n


def _frozen_list(em: Emitter, name: str, nodes: list[Node], layout: str) -> tuple[list[Node], str]:
    return [_frozen(em, name, n) for n in nodes], layout


def _each_slot(em: Emitter, y_TKO: Node, w_TK: Node | None) -> Node:
    """Nobody sums over the slots here: their rows, weighted, one after the other."""
    if w_TK is not None:
        y_TKO = em.call(operator.mul, y_TKO, em.method("unsqueeze", w_TK, -1))
    rows = em.method("reshape", y_TKO, -1, prod(v.size for v in em.region.formula.feat))
    return em.method("to", rows, em.region.formula.dtype)


def _flat(params: list[tuple[list[Node], str]]) -> list[Node]:
    return [n for nodes, _ in params for n in nodes]


def _slots(em: Emitter, n: Node | float | None, e: Expr | None) -> Node | None:
    """Ids or weights for every slot: one that all slots of a token share is repeated."""
    if e is None or not isinstance(n, Node):
        return None
    f = em.region.formula
    shared = not any(v in e.free for v in f.slots)
    return em.method("expand", n, -1, f.top_k) if shared and f.top_k > 1 else n


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
