"""Functional ATen -> Router, from the weights and the ids back to the logits, one small function for each notion.

It takes what it knows from the top: whatever stands beneath is "the logits", whatever stands above "the weights" stays the user's.  Order
of operations and dtypes are those of ops/route.py to the bit, or it is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from moe_compile.ops.route import Routing

from ..lift import Refused
from .groups import Groups, ungrouped
from .nodes import argument, dtype, floats, is_last, is_number, op, plain, rows, shape, topk_part, uncast


@dataclass(frozen=True)
class Router:
    """A routing's constants, and the ATen nodes around it.

    logits [.., E] and bias [E] are read, ids [.., K] and weights [.., K] given (None: nothing weighs).  scores: what the bias is added to.
    """

    routing: Routing
    logits: Node
    scores: Node
    bias: Node | None
    ids: Node
    weights: Node | None

    def differentiated(self) -> set[Node]:
        """The nodes between logits and weights through which gradients flow."""
        found: set[Node] = set()
        todo = [self.weights] if self.weights is not None else []
        while todo:
            a = todo.pop()
            carries = floats(a) or isinstance(a.meta.get("val"), tuple | list)
            if carries and a not in found and a is not self.logits and a is not self.bias:
                found.add(a)
                todo.extend(a.all_input_nodes)
        return found


def read_router(ids: Node, weights: Node | None) -> Router:
    """The router behind the ids of a dispatch and the weights of its combine.  Raises Refused."""
    a = rows(ids)
    a = rows(a.args[0]) if op(a) == "_to_copy" and not floats(a) else a
    topk = topk_part(a, 1)
    if topk is None:
        raise Refused("the experts are not chosen by a top-k of scores")
    found = (r for w in _outermost(weights, topk) if (r := _weighing(w, topk, a)) is not None)
    return next(found, None) or _choosing(topk, a)


def _outermost(weights: Node | None, topk: Node) -> Iterator[Node]:
    """The weights and what they are made of, nearest first."""
    todo: list[Node] = [weights] if weights is not None else []
    seen: set[Node] = set()
    while todo:
        a = todo.pop(0)
        if a not in seen and a is not topk and floats(a):
            seen.add(a)
            yield a
            todo.extend(a.all_input_nodes)


def _choosing(topk: Node, ids: Node) -> Router:
    """Weights made in a way that `route` has not, or none."""
    choice, groups = ungrouped(topk.args[0])
    scores, bias = _unbiased(choice) or (choice, None)
    name, cast, logits = _scores(scores)
    return Router(_constants(topk, groups, score=name, score_dtype=cast), logits, scores, bias, ids, None)


def _weighing(a: Node, topk: Node, ids: Node) -> Router | None:
    """The router whose weights a is, if the weights and the choice are of the same scores."""
    w = _weights(a, topk)
    if w is None:
        return None
    choice, groups = ungrouped(topk.args[0])
    scores, bias = _unbiased(choice) or (choice, None)
    if w.source is None or rows(w.source) is rows(topk.args[0]):
        origin = "scores" if groups is None and bias is None else "choice"
    elif rows(w.source) in (rows(scores), plain(scores)):  # a detached choice chooses the same
        scores, origin = rows(w.source), "scores"
    else:
        return None
    name, cast, logits = _scores(scores)
    if w.early is not None:
        if name != "none" or cast is not None or origin != "scores" or bias is not None or not _wider(w.early, dtype(logits)):
            return None
        cast = w.early
    routing = _constants(
        topk, groups, score=name, score_dtype=cast, normalize=w.normalize, eps=w.eps, eps_mode=w.eps_mode, scale=w.scale,
        weight_dtype=w.late, weights_from=origin,
    )  # fmt: skip
    return Router(routing, logits, scores, bias, ids, a)


def _constants(topk: Node, groups: Groups | None, **known: Any) -> Routing:
    g = groups or Groups(1, 1, "max", 0.0)
    return Routing(
        top_k=argument(topk, 1, "k"), sorted=argument(topk, 4, "sorted", True), num_groups=g.number, top_groups=g.best,
        group_score=g.score, group_fill=g.fill, **known,
    )  # fmt: skip


def _wider(a: torch.dtype, b: torch.dtype | None) -> bool:
    """Are all values of b values of a?  Then the top-k of the one is that of the other."""
    return b is not None and a != b and torch.promote_types(a, b) == a


# ---------------------------------------------------------------- scores
class Scores(NamedTuple):
    name: str
    cast: torch.dtype | None
    logits: Node


def _scores(a: Node) -> Scores:
    """softmax, sigmoid or sqrt(softplus) over the experts, of logits that may be cast before; else the scores are the logits."""
    r = rows(a)
    if op(r) == "_softmax" and is_last(r, r.args[1]):
        inner, cast = uncast(r.args[0])
        return Scores("softmax", dtype(r) if r.args[2] else cast, inner)
    if op(r) == "sigmoid":
        return Scores("sigmoid", *uncast(r.args[0])[::-1])
    if op(r) == "sqrt" and op(inner := r.args[0]) == "softplus" and len(inner.args) == 1 and not inner.kwargs:
        return Scores("sqrtsoftplus", *uncast(inner.args[0])[::-1])
    inner, cast = uncast(r)
    return Scores("none", cast, inner if cast else a)


def _unbiased(choice: Node) -> tuple[Node, Node] | None:
    """(scores, bias) of scores + bias, one for each expert."""
    a = rows(choice)
    if op(a) != "add" or a.kwargs or not floats(*a.args):
        return None
    pairs = ((s, b) for s, b in (a.args, a.args[::-1]) if shape(b) == shape(a)[-1:] and shape(s) == shape(a))
    return next(pairs, None)


# ---------------------------------------------------------------- weights
class Weights(NamedTuple):
    """source: what the weights are picked from at the ids; None for the values of the top-k.  early, late: casts around the arithmetic."""

    source: Node | None
    normalize: str
    eps: float
    eps_mode: str
    scale: float
    early: torch.dtype | None
    late: torch.dtype | None


def _weights(a: Node, topk: Node) -> Weights | None:
    rest, late = uncast(rows(a))
    rest, scale = _scaled(rows(rest))
    rest, normalize, eps, mode, fused = _normalised(rows(rest))
    rest, early = (rest, fused) if fused else uncast(rows(rest))
    picked, source = _picked(rows(rest), topk)
    return Weights(source, normalize, eps, mode, scale, early, late) if picked else None


def _scaled(a: Node) -> tuple[Node, float]:
    return (a.args[0], float(a.args[1])) if op(a) == "mul" and is_number(a.args[1]) else (a, 1.0)


def _normalised(a: Node) -> tuple[Node, str, float, str, torch.dtype | None]:
    """(what is normalised over the slots, how, eps, how eps is used, the cast that the op does first)."""
    if op(a) == "_softmax" and is_last(a, a.args[1]):
        return a.args[0], "softmax", 0.0, "add", dtype(a) if a.args[2] else None
    if op(a) == "div" and len(a.args) == 2 and not a.kwargs and isinstance(a.args[1], Node):
        total, eps, mode = _bounded(a.args[1])
        if _is_sum(total, a.args[0]):
            return a.args[0], "sum", eps, mode, None
    return a, "none", 0.0, "add", None


def _bounded(a: Node) -> tuple[Node, float, str]:
    """(sum, eps, add | clamp) of a denominator."""
    if op(a) == "add" and is_number(a.args[1]) and not a.kwargs:
        return a.args[0], float(a.args[1]), "add"
    if op(a) in ("clamp", "clamp_min") and argument(a, 2, "max") is None and is_number(low := argument(a, 1, "min")):
        return a.args[0], float(low), "clamp"
    return a, 0.0, "add"


def _is_sum(a: Any, of: Node) -> bool:
    """Over the last dimension, which stays with extent 1."""
    keepdim = op(a) == "unsqueeze" and is_last(a, a.args[1])
    a = a.args[0] if keepdim else a
    if op(a) != "sum" or len(a.args) < 2 or dtype(a) != dtype(of) or a.args[0] is not of:
        return False
    return is_last(of, a.args[1]) and keepdim is not bool(argument(a, 2, "keepdim", False))


def _picked(a: Node, topk: Node) -> tuple[bool, Node | None]:
    if topk_part(a, 0) is topk:
        return True, None
    if op(a) == "gather" and is_last(a, a.args[1]) and _is_ids(a.args[2], topk, shape(a.args[0])[-1]):
        return True, a.args[0]
    return False, None


def _is_ids(a: Any, topk: Node, experts: Any) -> bool:
    """The chosen ids; take_along_dim wraps them, which changes nothing within range."""
    a = rows(a)
    a = rows(a.args[0]) if op(a) == "remainder" and a.args[1] == experts else a
    return topk_part(a, 1) is topk
