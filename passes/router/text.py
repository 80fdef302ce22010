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

from .nodes import ROW_VIEWS, dtype, floats, op, rows
from .read import Router

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
SHORT = {"_softmax": "softmax", "_log_softmax": "log_softmax", "log_sigmoid_forward": "logsigmoid"}
END = 2**63 - 1
OVER_AXES = ("sum", "mean", "prod", "amax", "amin", "max", "min")  # over all of them without `dim`
DEPTH, LONG = 8, 200
SILENT = ("keepdim", "dtype", "half_to_float", "layout", "device", "pin_memory", "memory_format", "sorted", "size", "implicit")


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


def spelled_out(ids: Node, weights: Node | None, names: dict[Node, str]) -> str:
    """A router that is none of route's: the ops themselves."""
    chosen = _plain(expression(ids, names))
    text = f"ids = {chosen}"
    if weights is not None:
        text += f"; w = {_plain(expression(weights, {**names, ids: 'ids', rows(ids): 'ids'}))}"
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


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
    r = a
    while r not in known and op(r) in (*ROW_VIEWS, "expand", "contiguous"):
        r = r.args[0]
    if r in known or r.op != "call_function" or depth == 0:
        return known.get(r, "…")
    arguments = list(r.args[0]) if op(r) == "cat" else [x for x in r.args if isinstance(x, Node) or op(r) in INFIX]
    texts = [expression(x, known, depth - 1) for x in arguments]
    return _call(r, op(r), texts, [expression(x, known, depth - 1) for x in r.args[1]] if op(r) == "index" else [])


def _call(a: Node, name: str, texts: list[str], ids: list[str]) -> str:
    if name in INFIX and len(texts) == 2:
        return f"({texts[0]} {INFIX[name]} {texts[1]})"
    first = _plain(texts[0]) if texts else ""
    if name == "getitem":
        return first if floats(a) else f"arg{first}"
    if name == "index":
        return f"{texts[0]}[{', '.join(ids)}]"
    if name == "slice":
        start, end = (*a.args, 0, END)[2:4]
        return f"{texts[0]}[{start or ''}:{'' if end == END else end}]"
    if name == "_to_copy":
        return f"{_name(a.meta['val'].dtype)}({first})"
    if name == "topk":
        called, shown = ("topk" if (*a.args, -1, True)[3] else "smallest") + f"_{a.args[1]}", _settings(a, skip=("k", "largest"))
    else:
        called, shown = SHORT.get(name, name), _settings(a)
    return f"{called}({', '.join([first, *texts[1:], *shown])})"


def _settings(a: Node, skip: tuple[str, ...] = ()) -> list[str]:
    """What else an op is called with: numbers and axes that are neither the default nor the last axis, by name."""
    schema = getattr(a.target, "_schema", None)
    if schema is None:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, a.args, strict=False)} | a.kwargs
    usual = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    texts = []
    for name, value in given.items():
        if name in (*skip, *SILENT) or _holds_nodes(value) or value == usual.get(name, ...):
            continue
        if name == "dim" and _is_last(a, value):
            continue
        texts.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    if op(a) in OVER_AXES and given.get("dim") in (None, []):
        texts.append("all axes")
    return texts


def _holds_nodes(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, list | tuple) and any(isinstance(v, Node) for v in value))


def _is_last(a: Node, dim: Any) -> bool:
    of = a.args[0].meta.get("val") if isinstance(a.args[0], Node) else None
    axes = list(dim) if isinstance(dim, list | tuple) else [dim]
    return axes == [-1] or (isinstance(of, torch.Tensor) and axes == [of.dim() - 1])
