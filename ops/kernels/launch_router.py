"""Runs a router in one kernel (router.py), and says which it takes."""

from __future__ import annotations

from typing import Any

import torch

from moe_compile.ops.replay import start

from . import configs
from .launch import type_of
from .plan import limits, supports
from .tiles import power

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHOSEN = 64  # each takes a pass over them
MOST_GROUPS = 32  # each is code of its own


def unfit(device: Any, experts: int, dtypes: tuple[Any, ...], top_k: int, groups: int = 1) -> str | None:
    """None if the kernel takes such a router, else why not. dtypes: of logits, scores, the bias and weights, None where there is none."""
    why = supports(device, experts) if device.type == "cuda" else limits(experts)
    if why is not None:
        return why
    if top_k > MOST_CHOSEN:
        return f"takes top_k up to {MOST_CHOSEN}, got {top_k}"
    if groups > MOST_GROUPS:
        return f"takes up to {MOST_GROUPS} groups of experts, got {groups}"
    wrong = [dtype for dtype in dtypes if dtype is not None and dtype not in DTYPES]
    return f"takes {', '.join(str(d) for d in DTYPES)}, got {wrong[0]}" if wrong else None


def run(logits_TE: Any, bias_E: Any, routing: Any, weight_dtype: Any) -> tuple[Any, Any]:
    """weights [T, K] of weight_dtype and ids int64 [T, K] of logits [T, E] and bias [E], of DTYPES; routing: an ops.route.Routing.

    What unfit() refuses must not come here.
    """
    from .router import route_kernel

    tokens, experts = logits_TE.shape
    weights = torch.empty((tokens, routing.top_k), dtype=weight_dtype, device=logits_TE.device)
    ids = torch.empty((tokens, routing.top_k), dtype=torch.int64, device=logits_TE.device)
    if not tokens:
        return weights, ids
    scores = routing.score_dtype or logits_TE.dtype
    choices = scores if bias_E is None else torch.promote_types(scores, bias_E.dtype)
    rows, warps = configs.router(tokens, experts, routing.num_groups)
    start(
        route_kernel, (-(-tokens // rows),),
        logits_TE, logits_TE if bias_E is None else bias_E.contiguous(), weights, ids, tokens, *logits_TE.stride(), E=experts,
        K=routing.top_k, SCORE=routing.score, NORMALIZE=routing.normalize, EPS=routing.eps, CLAMPS=routing.eps_mode == "clamp",
        SCALE=routing.scale, GROUPS=routing.num_groups, TOP=routing.top_groups, SUM=routing.group_score == "top2_sum",
        FILL=routing.group_fill, BIASED=bias_E is not None, OF_CHOICE=routing.weights_from == "choice", SCORES=type_of(scores),
        CHOICES=type_of(choices), BT=rows, BE=power(experts, 16), BK=power(routing.top_k, 2), BG=power(routing.num_groups, 2),
        num_warps=warps,
    )  # fmt: skip
    return weights, ids
