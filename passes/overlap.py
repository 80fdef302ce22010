"""Lets an exchange of rows go on beside what the model computes independently of it, a shared expert above all.

Before:   s = shared(x); out = exchange_experts(x, ids, ...); y = out + s
After:    token = start_exchange(x, ids, ..., tag); s = shared(x); out = finish_exchange(token, [x, ids, ...], ...); y = out + s
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_compile.ops.comm.setup import Setup

from .decisions import ancestors, between, callee, tensor_of, writes_in_place
from .select import overlaps

WORTH = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}  # what takes as long as an exchange


def overlap(gm: GraphModule, pays: Callable[[Any, Setup], bool] = overlaps) -> int:
    """Starts exchanges early in place, where it pays; returns how many."""
    tags = (str(i) for i in itertools.count())
    exchanges = [n for n in gm.graph.nodes if n.target is torch.ops.moe_compile.exchange_experts.default]
    return sum(_started(gm, n, tags) for n in exchanges if _pays(n, pays))


def _pays(exchange: Node, pays: Callable[[Any, Setup], bool]) -> bool:
    out = tensor_of(exchange)
    return out is not None and pays(out, Setup.parse(str(exchange.args[-1])))


def _started(gm: GraphModule, exchange: Node, tags: Any) -> bool:
    if not exchange.users:
        return False
    chain, first = _reader(exchange)
    beside = _independent([exchange, *chain], first)
    if not any(callee(n) in WORTH for n in beside) or any(_may_exchange(n) for n in beside):
        return False
    at = exchange
    for n in _movable(exchange, set(beside)):
        at.append(n)
        at = n
    for n in chain:
        first.prepend(n)
    _split(gm, exchange, chain[0] if chain else first, next(tags))
    return True


def _may_exchange(n: Node) -> bool:
    """An op of ours, or a body that may have some: exchanges follow each other, and a result waits under its graph's tag alone."""
    return "moe_compile" in str(n.target) or isinstance(n.target, torch._ops.HigherOrderOperator)


def _reader(exchange: Node) -> tuple[list[Node], Node]:
    """(views and casts of the result one after the other, the first node that does more than pass them on)."""
    chain: list[Node] = []
    n = exchange
    while len(n.users) == 1:
        (user,) = n.users
        if user.op == "output" or writes_in_place(user) or set(user.all_input_nodes) != {n}:
            return chain, user
        chain.append(user)
        n = user
    return (chain, min(n.users)) if n.users else (chain[:-1], n)


def _independent(results: list[Node], first: Node) -> list[Node]:
    """What the first reader needs beside the exchange and its views (results), and these do not, in program order."""
    mine, beside = ancestors(results[0]), ancestors(first)
    return sorted(n for n in beside if n not in mine and n not in results and n.op not in ("placeholder", "get_attr"))


def _movable(exchange: Node, beside: set[Node]) -> list[Node]:
    """Those before the exchange that may as well run after it, in program order; none where anything is written in place meanwhile."""
    before = sorted(n for n in beside if n < exchange)
    if not before or any(writes_in_place(n) for n in between(before[0], exchange)):
        return []
    late: set[Node] = set()
    for n in reversed(before):
        if all(u > exchange or u in late for u in n.users):
            late.add(n)
    return [n for n in before if n in late]


def _split(gm: GraphModule, exchange: Node, first: Node, tag: str) -> None:
    ops, out = torch.ops.moe_compile, tensor_of(exchange)
    assert out is not None
    with gm.graph.inserting_before(exchange):
        token = gm.graph.call_function(ops.start_exchange.default, (*exchange.args, tag))
    with gm.graph.inserting_before(first):
        tokens = gm.graph.call_function(torch.ops.aten.sym_size.int, (exchange.args[0], 0))
        kept = [n for n in exchange.all_input_nodes if n.op != "get_attr"]
        finish = gm.graph.call_function(ops.finish_exchange.default, (token, kept, tokens, out.shape[1], out.dtype, tag))
    finish.meta = dict(exchange.meta)
    exchange.replace_all_uses_with(finish)
    gm.graph.erase_node(exchange)
