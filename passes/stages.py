"""Formula -> the stage ops as nodes, on one rank or over ranks.  Decides nothing.

one rank:     d = quantize_dispatch(x, ids); y = permute_experts_unpermute(x, d...); out = combine(y, w)
over ranks:   d = quantize_dispatch(x, ids, w); y = permute_experts_combine(rows, d..., w's of the rows); out = combine(y)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .emit import Emitter, holder
from .lift import Refused
from .lift.expr import Expr
from .lift.index import in_range
from .lift.program import Param
from .lift.sizes import prod
from .quantize import sunk
from .shard import Spread, is_mark, local_of

Tensors = tuple[list[Node], str]  # a parameter's nodes and their layout


@dataclass(frozen=True)
class Inputs:
    """What the stages read. x [T, H]; ids, w (applied to the result), inner (read by the program) [T, K]."""

    x: Node
    ids: Node
    w: Node | None
    inner: Node | None
    weights: list[Tensors]
    biases: list[Tensors]


def emit_stages(em: Emitter, providers: dict[str, str], spread: Spread | None) -> Node:
    """The node of out [T, O], or of the slots' rows [T*K, O] where nobody sums them."""
    f = em.region.formula
    inputs = Inputs(
        _frozen(em, "x", em.matrix(f.x, f.x_feat)),
        _need(_slots(em, em.matrix(f.ids, f.slots), f.ids)),
        _slots(em, em.matrix(f.weight, f.slots) if f.weight is not None else None, f.weight),
        _slots(em, em.matrix(f.inner, f.slots) if f.inner is not None else None, f.inner),
        [_frozen_list(em, f"mm{j}", *sunk(em, *_parameter(em, p, "eio", spread))) for j, p in enumerate(f.weights)],
        [_frozen_list(em, f"b{j}", *_parameter(em, p, "eo", spread)) for j, p in enumerate(f.biases)],
    )
    return _local(em, inputs, providers) if spread is None else _over_ranks(em, inputs, providers, spread)


def _need(n: Node | None) -> Node:
    if n is None:
        raise Refused("the ids are a constant")
    return n


# ---------------------------------------------------------------- one rank
def _local(em: Emitter, a: Inputs, providers: dict[str, str]) -> Node:
    f, ops = em.region.formula, torch.ops.moe_compile
    sent = em.call(ops.quantize_dispatch.default, a.x, a.ids, f.num_experts, "none", providers["comm"])
    sent.meta["ids_in_range"] = in_range(f.ids, f.num_experts)
    order, offsets, handle = (em.call(operator.getitem, sent, i) for i in (2, 3, 4))
    y_TKO = em.call(
        ops.permute_experts_unpermute.default, a.x, order, offsets, a.inner, *_params(em, a), f.top_k, providers["experts"],
    )  # fmt: skip
    if f.summed:
        return em.call(ops.combine.default, y_TKO, a.w, handle, f.dtype, providers["comm"])
    return _each_slot(em, y_TKO, a.w)


def _params(em: Emitter, a: Inputs) -> tuple[Any, ...]:
    """weights, biases, program and layouts, as the experts' ops take them."""
    layouts = [",".join(layout for _, layout in params) for params in (a.weights, a.biases)]
    return _flat(a.weights), _flat(a.biases), em.region.formula.program, *layouts


def _each_slot(em: Emitter, y_TKO: Node, w_TK: Node | None) -> Node:
    """Nobody sums over the slots here: their rows, weighted, one after the other."""
    if w_TK is not None:
        y_TKO = em.call(operator.mul, y_TKO, em.method("unsqueeze", w_TK, -1))
    rows = em.method("reshape", y_TKO, -1, prod(v.size for v in em.region.formula.feat))
    return em.method("to", rows, em.region.formula.dtype)


# ---------------------------------------------------------------- over ranks
def _over_ranks(em: Emitter, a: Inputs, providers: dict[str, str], spread: Spread) -> Node:
    f = em.region.formula
    tokens = a if f.summed else _slots_as_tokens(em, a, f.top_k)
    whole = tokens.x
    if spread.sharing is not None:
        tokens = _taken(em, tokens, spread)
    if spread.chunks > 1:
        parts = [_exchanged(em, _chunk(em, tokens, i, spread), providers, spread) for i in range(spread.chunks)]
        out = em.call(torch.cat, parts)
    else:
        out = _exchanged(em, tokens, providers, spread)
    if spread.sharing is not None:
        s = spread.sharing
        count = em.method("size", whole, 0)
        out = em.call(torch.ops.moe_compile.join_tokens.default, out, count, s.mode, s.world, s.rank, s.setup.text)
    return out


def _map_tokens(a: Inputs, f: Any) -> Inputs:
    """The inputs with f(node, fill) in the place of each tensor that has a row a token."""
    w, inner = (None if n is None else f(n, 0.0) for n in (a.w, a.inner))
    return Inputs(f(a.x, 0.0), f(a.ids, -1.0), w, inner, a.weights, a.biases)


def _slots_as_tokens(em: Emitter, a: Inputs, top_k: int) -> Inputs:
    """Each slot a token of its own with one expert, so that its row comes back alone."""

    def column(n: Node | None) -> Node | None:
        return None if n is None else em.method("reshape", n, -1, 1)

    x = em.call(torch.repeat_interleave, a.x, top_k, 0) if top_k > 1 else a.x
    return Inputs(x, _need(column(a.ids)), column(a.w), column(a.inner), a.weights, a.biases)


def _taken(em: Emitter, a: Inputs, spread: Spread) -> Inputs:
    s = spread.sharing
    assert s is not None
    op = torch.ops.moe_compile.take_tokens.default
    return _map_tokens(a, lambda n, fill: em.call(op, n, fill, s.mode, s.world, s.rank, s.setup.text))


def _chunk(em: Emitter, a: Inputs, i: int, spread: Spread) -> Inputs:
    part = slice(i * spread.chunk, (i + 1) * spread.chunk)
    return _map_tokens(a, lambda n, fill: em.call(operator.getitem, n, part))


def _exchanged(em: Emitter, a: Inputs, providers: dict[str, str], spread: Spread) -> Node:
    f, ops, setup = em.region.formula, torch.ops.moe_compile, spread.setup
    comm, experts = providers["comm"], providers["experts"]
    if spread.batched and a.inner is not None:
        raise Refused(f"{comm} does not bring routing weights to the experts, which read them")
    moved = [] if spread.batched else [n for n in (a.w, a.inner) if n is not None]
    sent = em.call(ops.quantize_dispatch.default, a.x, a.ids, f.num_experts, setup.quant, comm, moved, setup.text)
    rows, order, offsets, handle, brought = (em.call(operator.getitem, sent, i) for i in (0, 2, 3, 4, 5))
    if setup.quant != "none":
        rows = em.call(ops.dequantize_rows.default, rows, em.call(operator.getitem, sent, 1), spread.dtype)
    got = {n: em.call(operator.getitem, brought, i) for i, n in enumerate(moved)}
    w, inner = (got.get(n) if n is not None else None for n in (a.w, a.inner))
    slots = 1 if spread.batched else setup.top_k
    y_RO = em.call(
        ops.permute_experts_combine.default, rows, order, offsets, inner, *_params(em, a), slots, w, f.dtype, experts
    )  # fmt: skip
    return em.call(ops.combine.default, y_RO, a.w if spread.batched else None, handle, f.dtype, comm, setup.text)


# ---------------------------------------------------------------- parameters
def _parameter(em: Emitter, p: Param, order: str, spread: Spread | None) -> Tensors:
    """All experts' nodes, or over ranks those of this rank."""
    if spread is None:
        return em.parameter(p, order)
    first, end = spread.first, spread.end
    if p.listed:
        return _listed(em, p, order, spread)
    mark = holder(em.region, p.leaf.nodes[0])
    if not is_mark(em.at(mark)):
        (node,), layout = em.parameter(p, order)
        if not layout.startswith("e"):
            raise Refused(f"experts are not the first dimension of a stacked parameter (layout {layout}), so it cannot be cut by rank")
        return [em.method("narrow", node, 0, first, end - first)], layout
    if p.dims[0][0].role != "e":
        raise Refused("a parameter was sharded along another dimension than its experts'")
    local = local_of(em.at(mark), spread)
    return em.parameter(p, order, instead={mark: _need(local)}, experts=end - first)


def _listed(em: Emitter, p: Param, order: str, spread: Spread) -> Tensors:
    only, behind = slice(spread.first, spread.end), {}
    for expert, leaf in enumerate(p.leaf.nodes[only], spread.first):
        mark = holder(em.region, leaf)
        if is_mark(em.at(mark)):
            local = local_of(em.at(mark), spread)
            if local is None:
                raise Refused(f"expert {expert} should be on this rank and was sharded to another one")
            behind[mark] = local
    return em.parameter(p, order, only, behind)


def _frozen(em: Emitter, name: str, n: Node) -> Node:
    """What the original reads only where no gradient flows gets no gradient (not zeros, which an optimiser would act on)."""
    return em.method("detach", n) if name in em.region.formula.frozen else n


def _frozen_list(em: Emitter, name: str, nodes: list[Node], layout: str) -> Tensors:
    return [_frozen(em, name, n) for n in nodes], layout


def _flat(params: list[Tensors]) -> list[Node]:
    return [n for nodes, _ in params for n in nodes]


def _slots(em: Emitter, n: Node | float | None, e: Expr | None) -> Node | None:
    """Ids or weights for every slot: one that all slots of a token share is repeated."""
    if e is None or not isinstance(n, Node):
        return None
    f = em.region.formula
    shared = not any(v in e.free for v in f.slots)
    return em.method("expand", n, -1, f.top_k) if shared and f.top_k > 1 else n
