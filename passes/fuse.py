"""What Inductor gets of the stages: torch code that it can fuse with what stands around, and experts with combine in one op.

Before:   y = permute_experts_unpermute(x, order, offsets, ...); out = combine(y, w, handle, dtype, "local")
After:    out = permute_experts_combine(x, order, offsets, ..., w, dtype, provider)

or, in inference, by a provider that sorts for itself: out = local_experts(x, ids, ..., w, dtype, provider)
Over ranks, in inference, all three become one: out = exchange_experts(x, ids, w, ...), beside which other work may go on (overlap.py).

The graph that users see and compare has the stages; moe_compile/inductor.py calls this on the way down. An op named *_inline
is traced through (ops/_register.py): its provider is torch code anyway.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_compile.ops import experts_combine, inline, quantize_dispatch, registry, route
from moe_compile.ops.experts import LOCAL

from .decisions import between, tensor_of, writes_in_place
from .lift.sizes import shape_of
from .overlap import overlap
from .routing import provider_of


def fuse(gm: GraphModule) -> int:
    """Fuses in place wherever it can, in the bodies of higher-order ops too; returns how many nodes it replaced."""
    count = 0
    for part in [part for part in gm.modules() if isinstance(part, GraphModule)]:
        done = [_replaced(part, n) for n in list(part.graph.nodes) if n.op == "call_function"]
        count += sum(done) + overlap(part)
        if any(done):
            part.recompile()
    return count


def _replaced(gm: GraphModule, n: Node) -> bool:
    ops = torch.ops.moe_compile
    if n.target is ops.route.default and _routes_inline(n):
        n.target = route.INLINE_OP.overload
        return True
    if n.target is ops.combine.default and _spread(gm, n):
        return True
    if n.target is ops.combine.default and _fusible(n, n.args[0]):
        _fuse(gm, n, n.args[0])
        return True
    return False


def _routes_inline(n: Node) -> bool:
    """On a GPU what the kernel does not take.

    On a CPU Inductor repeats what made a weight for every few elements of the row that it weighs: fine for a short sum.
    """
    logits, routing = tensor_of(n.args[0]), route.Routing(*n.args[2:])
    if logits is not None and any(size == 0 for size in shape_of(logits)):
        return False  # nothing to fuse
    if not _on_cpu(n.args[0]):
        return provider_of(n) == route.PROVIDER.name
    values = (n.args[1] is None and routing.num_groups == 1) or routing.weights_from == "choice"  # of the top-k itself, no gather
    return values and (routing.normalize == "none" or routing.top_k <= 4)


def _on_cpu(n: Node) -> bool:
    t = tensor_of(n)
    return t is None or t.device.type == "cpu"


def _spread(gm: GraphModule, combine: Node) -> bool:
    """Dispatch, experts and combine over ranks as one op, where no gradient is wanted and nobody else reads what travels."""
    ops = torch.ops.moe_compile
    y: Any = combine.args[0]
    if len(combine.args) < 6 or not combine.args[5] or y.target is not ops.permute_experts_combine.default or _wants_gradient(gm):
        return False
    sent = y.args[1].args[0]
    if sent.target is not ops.quantize_dispatch.default or _written_between(sent, combine):
        return False
    inside = [n for n in between(sent, combine) if n is sent or any(a in (sent, *sent.users) for a in n.all_input_nodes)]
    inside.append(y)
    if any(u is not combine and u not in inside for n in inside for u in n.users):
        return False
    _fuse_spread(gm, combine, y, sent)
    for n in [combine, *reversed(list(dict.fromkeys(inside)))]:
        gm.graph.erase_node(n)
    return True


def _wants_gradient(gm: GraphModule) -> bool:
    tensors = (tensor_of(n) for n in gm.graph.nodes if n.op in ("placeholder", "get_attr"))
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _fuse_spread(gm: GraphModule, combine: Node, y: Node, sent: Node) -> None:
    x, ids, _, _, comm, moved, parallel = sent.args
    _, _, _, inner, weights, biases, *texts, top_k, w, _, experts = y.args
    at = [-1 if n is None else n.args[1] for n in (w, inner)]
    args = (x, ids, moved, *at, combine.args[1], weights, biases, *texts, top_k, combine.args[3], comm, experts, parallel)
    with gm.graph.inserting_before(combine):
        fused = gm.graph.call_function(torch.ops.moe_compile.exchange_experts.default, args)
    fused.meta = dict(combine.meta)
    combine.replace_all_uses_with(fused)


def _fusible(combine: Node, experts: Node) -> bool:
    """Rows that nobody else reads, on this rank, by a provider that does both stages at once; nothing is written in between."""
    ops = torch.ops.moe_compile
    if combine.args[-1] != "local" or experts.target is not ops.permute_experts_unpermute.default:
        return False
    dispatch = experts.args[1].args[0]
    if dispatch.target is not ops.quantize_dispatch.default or experts.args[2].args[0] is not dispatch:
        return False
    return len(experts.users) == 1 and _target(experts) is not None and not _written_between(experts, combine)


def _target(experts: Node) -> str | None:
    kernels = registry.get("experts", experts.args[-1]).kernels
    return next((name for name in (inline.NAME, experts_combine.NAME) if name in kernels), None)


def _written_between(first: Node, last: Node) -> bool:
    return any(writes_in_place(n) for n in between(first, last)[1:])


def _fuse(gm: GraphModule, combine: Node, experts: Node) -> None:
    target = str(_target(experts))
    if target == experts_combine.NAME and LOCAL in registry.get("experts", experts.args[-1]).kernels and not _wants_gradient(gm):
        target = LOCAL
    args = _arguments(gm, combine, experts, target)
    with gm.graph.inserting_before(combine):
        fused = gm.graph.call_function(getattr(torch.ops.moe_compile, target).default, args)
    fused.meta = dict(combine.meta)
    combine.replace_all_uses_with(fused)
    dispatch = experts.args[1].args[0]
    for n in (combine, experts, *dispatch.users, dispatch):
        if not n.users:
            gm.graph.erase_node(n)


def _arguments(gm: GraphModule, combine: Node, experts: Node, target: str) -> tuple[Any, ...]:
    """Those of the op that takes the place of both."""
    _, topk_weights, _, out_dtype, _ = combine.args
    x, order, offsets, *inputs, top_k, provider = experts.args
    if target == LOCAL:
        _, ids, num_experts, *_ = order.args[0].args
        return x, ids, num_experts, *inputs, topk_weights, out_dtype, provider
    if target == inline.NAME:
        order, offsets, *places = _sorted(gm, experts)
        return x, order, offsets, *inputs, top_k, topk_weights, out_dtype, *places
    return x, order, offsets, *inputs, top_k, topk_weights, out_dtype, provider


def _sorted(gm: GraphModule, experts: Node) -> tuple[Any, ...]:
    """order, offsets, tokens, places and whether all ids are in range: more of the dispatch than the stages pass on.

    On a CPU as one op: its small steps cost Inductor more to compile than it saves. On a GPU each is a launch.
    """
    dispatch = experts.args[1].args[0]
    _, ids, num_experts, *_ = dispatch.args
    in_range = bool(dispatch.meta.get("ids_in_range"))
    with gm.graph.inserting_before(dispatch):
        op = quantize_dispatch.SORT_OP if _on_cpu(experts.args[4][0]) else quantize_dispatch.INLINE_SORT_OP
        found = gm.graph.call_function(op.overload, (ids, num_experts, in_range))
        return (*[gm.graph.call_function(operator.getitem, (found, i)) for i in range(4)], in_range)
