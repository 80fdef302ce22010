"""A choice that is limited to the best groups of experts, as in DeepSeek V2 and V3.

group_scores = choice.view(T, G, E // G).amax(-1)  |  .topk(2)[0].sum(-1)
mask = zeros_like(group_scores).scatter_(1, group_scores.topk(g)[1], 1)      or ones, scatter_ 0
choice.masked_fill(~mask.unsqueeze(-1).expand(T, G, E // G).reshape(T, E).bool(), fill)   or where, or filled while still [T, G, E // G]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .nodes import argument, dtype, is_last, is_number, op, plain, rows, shape, topk_part


class Groups(NamedTuple):
    number: int
    best: int
    score: str  # max | top2_sum
    fill: float  # the score of experts outside of the best groups


def ungrouped(choice: Node) -> tuple[Node, Groups | None]:
    """(the scores of all experts, the groups); no groups where every expert may be chosen, or where this is something else."""
    masked = _masked(rows(choice))
    if masked is None:
        masked = _masked(_split_source(rows(choice)))
    if masked is None:
        return choice, None
    scores, mask, keep, fill = masked
    split = shape(scores)[-2:] if len(shape(scores)) == 3 else [shape(scores)[-1]]
    chosen = _marked_groups(mask, keep, split)
    whole = rows(_split_source(scores)) if len(split) == 2 else rows(scores)
    kind = None if chosen is None else _group_score(chosen.args[0], plain(whole))
    if chosen is None or kind is None:
        return choice, None
    count, best = shape(chosen.args[0])[-1], argument(chosen, 1, "k")
    return whole, None if best == count else Groups(count, best, kind, float(fill))


def _split_source(a: Any) -> Any:
    """Past one view between [T, E] and [T, G, E // G]."""
    return a.args[0] if op(a) in ("view", "_unsafe_view") and {len(shape(a)), len(shape(a.args[0]))} == {2, 3} else a


def _masked(a: Any) -> tuple[Node, Node, bool, float] | None:
    """(scores, mask, True if the mask marks what stays, the value of the rest)."""
    if op(a) == "masked_fill" and is_number(a.args[2]) and shape(a) == shape(a.args[0]):
        return a.args[0], a.args[1], False, a.args[2]
    if op(a) == "where" and len(a.args) == 3 and shape(a) == shape(a.args[1]) and dtype(a) == dtype(a.args[1]):
        value = a.args[2].args[0] if op(a.args[2]) == "scalar_tensor" else 0.0 if op(a.args[2]) == "zeros_like" else _filler(a.args[2])
        return None if value is None else (a.args[1], a.args[0], True, value)
    return None


def _filler(a: Any) -> float | None:
    """The number that a fresh tensor is filled with."""
    for name, value in (("zeros", 0.0), ("ones", 1.0)):
        if op(a) in (name, f"{name}_like", f"new_{name}"):
            return value
    if op(a) in ("full", "full_like", "new_full"):
        value = argument(a, 2 if op(a) == "new_full" else 1, "fill_value")
        return float(value) if isinstance(value, int | float) else None
    return None


# ---------------------------------------------------------------- the mask
def _marked_groups(mask: Any, keep: bool, split: list[Any]) -> Node | None:
    """The top-k of groups, if the mask tells for each expert whether its group was chosen (keep), or whether it was not."""
    mask, keep = _truth(mask, keep)
    marks = _one_per_group(mask, split)
    if op(marks) != "scatter" or len(shape(marks)) != 2 or not is_last(marks, marks.args[1]):
        return None
    before, after, topk = _filler(marks.args[0]), marks.args[3], topk_part(marks.args[2], 1)
    if not isinstance(after, int | float) or {before, float(after)} != {0.0, 1.0} or bool(after) is not keep:
        return None
    return topk if topk is not None and shape(topk.args[0]) == shape(marks) else None


def _truth(mask: Any, keep: bool) -> tuple[Any, bool]:
    """Past negations and comparisons with zero."""
    while True:
        negated = op(mask) == "bitwise_not" and dtype(mask) == torch.bool
        if negated or op(mask) == "logical_not" or (op(mask) == "eq" and _is_zero(mask.args[1])):
            mask, keep = mask.args[0], not keep
        elif (op(mask) in ("ne", "gt") and _is_zero(mask.args[1])) or (op(mask) == "_to_copy" and dtype(mask) == torch.bool):
            mask = mask.args[0]
        else:
            return mask, keep


def _is_zero(x: Any) -> bool:
    return isinstance(x, int | float) and x == 0


def _one_per_group(mask: Any, split: list[Any]) -> Any:
    """The marks [T, G] behind a mask that repeats each for its group's experts, None if it does not.  `split`: [E], or [G, E // G]."""
    a = mask
    if op(a) == "repeat_interleave" and len(split) == 1:
        each, dim = argument(a, 1, "repeats"), argument(a, 2, "dim")
        fits = isinstance(each, int) and is_last(a, dim) and shape(a)[-1:] == split and len(shape(a)) == 2
        return a.args[0] if fits else None
    if len(split) == 1:
        while op(a) in ("view", "_unsafe_view", "clone") and len(shape(a)) == 2:
            a = a.args[0]
        split = shape(a)[-2:] if len(shape(a)) == 3 else []
        if not split or shape(mask)[-1] != split[0] * split[1]:
            return None
    while op(a) in ("expand", "clone", "alias") and len(shape(a)) == 3:
        a = a.args[0]
    fits = op(a) == "unsqueeze" and is_last(a, a.args[1]) and shape(a)[-2:] == [split[0], 1]
    return a.args[0] if fits else None


# ---------------------------------------------------------------- the groups' scores
def _group_score(scores: Any, choice: Any) -> str | None:
    """max | top2_sum, if `scores` [T, G] are that of the choice's groups."""
    kind, grouped = _reduced(scores)
    fits = kind and op(grouped) == "view" and len(shape(grouped)) == 3 and len(shape(scores)) == 2
    return kind if fits and plain(_split_source(grouped)) is choice else None


def _reduced(a: Any) -> tuple[str | None, Any]:
    if op(a) == "amax" and is_last(a.args[0], argument(a, 1, "dim")) and not argument(a, 2, "keepdim", False):
        return "max", a.args[0]
    if op(a) == "getitem" and a.args[1] == 0 and op(m := a.args[0]) == "max" and is_last(m.args[0], argument(m, 1, "dim")):
        return "max", m.args[0]
    if op(a) == "sum" and len(a.args) > 1 and is_last(a.args[0], a.args[1]) and dtype(a) == dtype(a.args[0]):
        topk = topk_part(a.args[0], 0)
        if topk is not None and argument(topk, 1, "k") == 2:
            return "top2_sum", topk.args[0]
    return None, None
