"""A router as a line for people:  w = renorm(topk_2(softmax(logits)))

ids = topk_2(sigmoid(logits) + bias, 1 of 2 groups by top2 sum); w = sigmoid(logits)[ids] / (sum + 1e-20) * 2.5
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch.fx import Node

from moe_compile.ops.route import Routing

from .nodes import dtype, floats, op, rows
from .read import Router

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
SHORT = {"_softmax": "softmax", "max": "max", "index": "gather"}
DEPTH = 6


def describe(router: Router, weights: Node | None, names: dict[Node, str]) -> str:
    """`weights`: what the combine reads, perhaps more than the router's; `names`: what the ATen graph's inputs are called."""
    r = router.routing
    known = {**names, router.logits: _logits(router.logits, names), router.ids: "ids"}
    scores = known[router.scores] = _scores(router, known)
    topk = _topk(router, scores)
    direct = router.weights is None or r.weights_from == "choice" or (router.bias is None and r.num_groups == 1)
    text = "" if direct else f"ids = {topk}; "
    if router.weights is None:
        return f"ids = {topk}" + ("" if weights is None else f"; w = {_plain(expression(weights, known))}")
    mine = _weights(r, topk if direct else f"{scores}[ids]")
    if weights is not None and rows(weights) is not rows(router.weights):
        known[rows(router.weights)] = known[router.weights] = f"({mine})" if re.search(r" [-+/*] ", mine) else mine
        mine = _plain(expression(weights, known))
    return f"{text}w = {mine}"


def _plain(text: str) -> str:
    """Without the parentheses around all of it."""
    depths = list(itertools.accumulate((c == "(") - (c == ")") for c in text))
    return text[1:-1] if text.startswith("(") and 0 not in depths[:-1] else text


def _logits(a: Node, names: dict[Node, str]) -> str:
    """The layer's output is just called that; what stands between is spelled out."""
    return "logits" if rows(a) in names else expression(a, {n: "logits" if "logits" in t else t for n, t in names.items()})


def _scores(router: Router, known: dict[Node, str]) -> str:
    r, text = router.routing, known[router.logits]
    if r.score_dtype is not None and r.score_dtype != dtype(router.logits):
        text = f"{_name(r.score_dtype)}({text})"
    return text if r.score == "none" else f"{r.score}({text})"


def _topk(router: Router, scores: str) -> str:
    r = router.routing
    bias = " + bias" if router.bias is not None else ""
    fill = "" if r.group_fill == float("-inf") else f", {r.group_fill:g} elsewhere"
    groups = f", {r.top_groups} of {r.num_groups} groups by {r.group_score.replace('_', ' ')}{fill}" if r.num_groups > 1 else ""
    return f"topk_{r.top_k}({scores}{bias}{groups})"


def _weights(r: Routing, picked: str) -> str:
    low = f" + {r.eps:g}" if r.eps_mode == "add" else f", at least {r.eps:g}"
    if r.normalize == "softmax":
        picked = f"softmax({picked})"
    elif r.normalize == "sum":
        picked = f"renorm({picked})" if r.eps == 0.0 and r.eps_mode == "add" else f"{picked} / (sum{low})"
    text = picked if r.scale == 1.0 else f"{picked} * {r.scale:g}"
    return text if r.weight_dtype is None else f"{_name(r.weight_dtype)}({text})"


def _name(t: torch.dtype) -> str:
    return str(t).removeprefix("torch.")


def expression(a: Any, known: dict[Node, str], depth: int = DEPTH) -> str:
    """An ATen node in words, down to what is known."""
    if not isinstance(a, Node):
        return f"{a:g}" if isinstance(a, float) else str(a)
    r = a if a in known else rows(a)
    if r in known:
        return known[r]
    if depth == 0 or r.op != "call_function":
        return "…"
    if op(r) == "getitem" and not floats(r):
        return f"arg{expression(r.args[0], known, depth - 1)}"
    if op(r) == "getitem" and r.args[1] == 0:
        return expression(r.args[0], known, depth - 1)
    if op(r) == "_to_copy":
        return f"{_name(r.meta['val'].dtype)}({expression(r.args[0], known, depth - 1)})"
    operands = [expression(x, known, depth - 1) for x in r.args if isinstance(x, Node) or op(r) in INFIX]
    if op(r) in INFIX and len(operands) == 2:
        return f"({operands[0]} {INFIX[op(r)]} {operands[1]})"
    if op(r) == "index":
        return f"{operands[0]}[{', '.join(expression(x, known, depth - 1) for x in r.args[1])}]"
    if op(r) == "topk":
        return f"topk_{r.args[1]}({operands[0]})"
    return f"{SHORT.get(op(r), op(r))}({', '.join(operands)})"


def input_name(n: Node, layer: bool) -> str:
    """ "bias" for l_self_modules_..._buffers_e_score_correction_bias_, "logits" for the output of a layer."""
    if layer:
        return "logits"
    return re.split(r"_(?:parameters|buffers)_", n.name)[-1].strip("_")
