"""Stage op route: from router logits to each token's K experts and their weights.

    scores = score(logits)                        softmax | sigmoid | sqrtsoftplus | none, over E
    choice = scores + bias                        the bias chooses, it does not weigh
    choice = group_fill outside the best groups   DeepSeek V2 (group score "max") and V3 ("top2_sum")
    ids = topk(choice, K)
    weights = normalize(scores[ids]) * scale      none | sum (eps added to the sum, or its lower bound) | softmax over K
                                                  or choice[ids]: the values of that top-k (DeepSeek V2)

Every step is the torch function that routers are written with, so ties and NaN come out as they do there, to the bit. On GPUs all steps
are one kernel (kernels/router.py) where it takes the router (unfit): it chooses the same experts, and orders equal ones by their numbers.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import registry
from ._register import below_autograd, register_composite, register_op
from .functions import ABOVE
from .kernels import launch_router

NAME = "route"
SCHEMA = (
    f"{NAME}(Tensor logits_TE, Tensor? bias_E, int top_k, str score, str normalize, float eps, str eps_mode, "
    "float scale, int num_groups, int top_groups, str group_score, float group_fill, ScalarType? score_dtype, "
    "ScalarType? weight_dtype, bool sorted, str weights_from) -> (Tensor weights_TK, Tensor ids_TK)"
)


class Routing(NamedTuple):
    """The constants of a router, in the order of the op's arguments after logits and bias."""

    top_k: int
    score: str = "softmax"
    normalize: str = "none"
    eps: float = 0.0
    eps_mode: str = "add"
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    group_fill: float = 0.0
    score_dtype: Any = None
    weight_dtype: Any = None
    sorted: bool = True
    weights_from: str = "scores"


def _sqrtsoftplus(logits: Any) -> Any:
    return torch.nn.functional.softplus(logits).sqrt()


# name -> (scores of logits, gradient of logits from that of scores: (grad, scores, logits))
_SCORES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any, Any], Any]]] = {
    "softmax": (
        lambda logits: torch.softmax(logits, -1),
        lambda g, s, logits: torch.ops.aten._softmax_backward_data(g, s, -1, s.dtype),
    ),
    "sigmoid": (torch.sigmoid, lambda g, s, logits: torch.ops.aten.sigmoid_backward(g, s)),
    "sqrtsoftplus": (
        _sqrtsoftplus,
        lambda g, s, logits: torch.ops.aten.softplus_backward(g / (2 * s), logits, 1.0, 20.0),
    ),
    "none": (lambda logits: logits, lambda g, s, logits: g),
}
_CHOICES = {
    "score": tuple(_SCORES),
    "normalize": ("none", "sum", "softmax"),
    "eps_mode": ("add", "clamp"),
    "group_score": ("max", "top2_sum"),
    "weights_from": ("scores", "choice"),
}


def reference(logits_TE: Any, bias_E: Any, routing: Routing) -> tuple[Any, Any]:
    """weights [T, K] and ids int64 [T, K]."""
    scores_TE = _scores(logits_TE, routing)
    choice_TE, _ = _choice(scores_TE, bias_E, routing)
    chosen_TK, ids_TK = torch.topk(choice_TE, routing.top_k, dim=-1, sorted=routing.sorted)
    weighs = routing.weights_from == "choice" or choice_TE is scores_TE
    weights_TK = _normalize(chosen_TK if weighs else scores_TE.gather(-1, ids_TK), routing)
    if routing.scale != 1.0:
        weights_TK = weights_TK * routing.scale
    return weights_TK.to(routing.weight_dtype or weights_TK.dtype), ids_TK


def _scores(logits: Any, routing: Routing) -> Any:
    return _SCORES[routing.score][0](logits.to(routing.score_dtype or logits.dtype))


def _choice(scores_TE: Any, bias_E: Any, routing: Routing) -> tuple[Any, Any]:
    """What the top-k is of, and which experts it leaves out (None: none): those outside of the best groups have group_fill."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if routing.num_groups == 1:
        return choice_TE, None
    out_TE = ~_in_best_groups(choice_TE, routing)
    return choice_TE.masked_fill(out_TE, routing.group_fill), out_TE


def _in_best_groups(choice_TE: Any, routing: Routing) -> Any:
    """Is an expert in one of the best top_groups of num_groups groups?"""
    tokens, experts = choice_TE.shape
    grouped = choice_TE.view(tokens, routing.num_groups, experts // routing.num_groups)
    group_scores = grouped.max(-1).values if routing.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    best = torch.topk(group_scores, routing.top_groups, dim=-1, sorted=False).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return keep.unsqueeze(-1).expand(grouped.shape).reshape(tokens, experts)


def _denominator(gathered: Any, routing: Routing) -> Any:
    total = gathered.sum(-1, keepdim=True)
    if routing.eps_mode == "clamp":
        return total.clamp(min=routing.eps)
    return total + routing.eps if routing.eps != 0.0 else total


def _normalize(gathered: Any, routing: Routing) -> Any:
    if routing.normalize == "softmax":
        return torch.softmax(gathered, -1)
    return gathered / _denominator(gathered, routing) if routing.normalize == "sum" else gathered


def _normalize_backward(grad: Any, gathered: Any, routing: Routing) -> Any:
    if routing.normalize == "none":
        return grad
    if routing.normalize == "softmax":
        weights = torch.ops.aten._softmax(gathered, -1, False)
        return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
    below = _denominator(gathered, routing)
    shared = -(grad * gathered / (below * below)).sum(-1, keepdim=True)
    if routing.eps_mode == "clamp":
        shared = torch.where(ABOVE(gathered.sum(-1, keepdim=True), routing.eps), shared, 0)
    return grad / below + shared


def _check(logits: Any, routing: Routing) -> None:
    for field, allowed in _CHOICES.items():
        if getattr(routing, field) not in allowed:
            raise ValueError(f"route: {field} {getattr(routing, field)!r} is unknown; known: {', '.join(allowed)}")
    experts = logits.shape[-1]
    if logits.dim() != 2 or not 1 <= routing.top_k <= experts:
        raise ValueError(f"route: top_k {routing.top_k} of logits {tuple(logits.shape)}; logits are [T, E], 1 <= K <= E")
    if routing.num_groups > 1 and experts % routing.num_groups:
        raise ValueError(f"route: {experts} experts do not divide into {routing.num_groups} groups")
    if routing.num_groups > 1 and not 1 <= routing.top_groups <= routing.num_groups:
        raise ValueError(f"route: top_groups {routing.top_groups} of {routing.num_groups} groups; 1 <= top_groups <= num_groups")
    if routing.num_groups > 1 and routing.group_score == "top2_sum" and experts < 2 * routing.num_groups:
        raise ValueError(f"route: top2_sum adds two experts of a group; {experts} experts in {routing.num_groups} groups are fewer")


def _kernel(logits: Any, bias: Any, *constants: Any) -> tuple[Any, Any]:
    routing = Routing(*constants)
    _check(logits, routing)
    if logits.is_cuda and not _by_torch.get() and unfit(logits, bias, routing) is None:
        return by_kernel(logits, bias, routing)
    return reference(logits, bias, routing)


_by_torch = contextvars.ContextVar("by_torch", default=False)


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """Calls inside are torch's functions to the bit, on GPUs too: what a router means."""
    token = _by_torch.set(True)
    try:
        yield
    finally:
        _by_torch.reset(token)


def unfit(logits: Any, bias: Any, routing: Routing) -> str | None:
    """None if the kernel takes such a router, else why not. logits [T, E], bias [E]; fake tensors will do."""
    dtypes = (logits.dtype, routing.score_dtype, None if bias is None else bias.dtype, routing.weight_dtype)
    return launch_router.unfit(logits.device, int(logits.shape[-1]), dtypes, routing.top_k, routing.num_groups)


def by_kernel(logits: Any, bias: Any, routing: Routing) -> tuple[Any, Any]:
    """weights [T, K] and ids int64 [T, K] of a router that is not unfit()."""
    return launch_router.run(logits, bias, routing, _weights_dtype(logits, bias, routing))


def _fake(logits: Any, bias: Any, *constants: Any) -> tuple[Any, Any]:
    routing = Routing(*constants)
    _check(logits, routing)
    shape = (logits.shape[0], routing.top_k)
    dtype = _weights_dtype(logits, bias, routing)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


def _weights_dtype(logits: Any, bias: Any, routing: Routing) -> torch.dtype:
    dtype = routing.score_dtype or logits.dtype
    if routing.weights_from == "choice" and bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
    return routing.weight_dtype or dtype


# The backward is plain torch in the caller's graph, where autocast would turn torch.softmax and softplus into float32.
_SCORES_UNDER_AUTOCAST: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda logits: torch.ops.aten._softmax(logits, -1, False),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.ops.aten.softplus(logits, 1.0, 20.0).sqrt(),
    "none": lambda logits: logits,
}


class _Differentiable(torch.autograd.Function):
    """Keeps logits and ids; the scores are cheaper to compute again than to keep."""

    @staticmethod
    def forward(ctx: Any, logits: Any, bias: Any, *constants: Any) -> tuple[Any, Any]:
        with below_autograd():
            weights, ids = OP.overload(logits, bias, *constants)
        ctx.save_for_backward(logits, bias, ids)
        ctx.mark_non_differentiable(ids)
        ctx.routing = Routing(*constants)
        return weights, ids

    @staticmethod
    def backward(ctx: Any, grad_weights: Any, _: Any) -> tuple[Any, ...]:
        """Plain torch, which Inductor fuses with what stands around it."""
        logits, bias, ids = ctx.saved_tensors
        routing = ctx.routing
        scores = _SCORES_UNDER_AUTOCAST[routing.score](logits.to(routing.score_dtype or logits.dtype))
        weighing, out = _choice(scores, bias, routing) if routing.weights_from == "choice" else (scores, None)
        grad = grad_weights.to(weighing.dtype) * routing.scale
        picked = _normalize_backward(grad, weighing.gather(-1, ids), routing)
        grad_scores = torch.zeros_like(weighing).scatter(-1, ids, picked).to(scores.dtype)
        if out is not None:
            grad_scores = grad_scores.masked_fill(out, 0)
        grad_logits = _SCORES[routing.score][1](grad_scores, scores, logits.to(scores.dtype))
        return grad_logits.to(logits.dtype), *[None] * (1 + len(Routing._fields))


def _autograd(logits: Any, *rest: Any) -> tuple[Any, Any]:
    if torch.is_grad_enabled() and logits.requires_grad:
        weights, ids = _Differentiable.apply(logits, *rest)
        return weights, ids
    with below_autograd():
        weights, ids = OP.overload(logits, *rest)
        return weights, ids


class _Inline(_Differentiable):
    """The same with its forward in the caller's graph."""

    @staticmethod
    def forward(ctx: Any, logits: Any, bias: Any, *constants: Any) -> tuple[Any, Any]:
        weights, ids = _kernel(logits, bias, *constants)
        ctx.save_for_backward(logits, bias, ids)
        ctx.mark_non_differentiable(ids)
        ctx.routing = Routing(*constants)
        return weights, ids


OP = register_op(SCHEMA, _kernel, _fake, _autograd, replays=lambda args: not _by_torch.get())
INLINE_OP = register_composite(SCHEMA.replace(NAME, NAME + "_inline"), _Inline.apply)


def cost(problem: registry.Problem) -> float:
    """Microseconds: a handful of small kernels over [T, E]."""
    return 30.0 + 2e-3 * (problem.tokens or 1024) * problem.num_experts


def _on_a_gpu(problem: registry.Problem) -> str | None:
    return None if problem.device.startswith("cuda") else f"triton's kernel runs on CUDA devices, device is {problem.device}"


PROVIDER = registry.register(registry.Provider("torch", "route", {NAME: reference}, cost))
TRITON = registry.register(registry.Provider("triton", "route", {NAME: by_kernel}, lambda problem: cost(problem) / 5, _on_a_gpu))


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Full argument tuples: Mixtral, DeepSeek V2 and V3, GPT-OSS, sqrtsoftplus, no tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((5, 8), generator=generator, dtype=torch.float64).to(device, dtype)
    bias = torch.randn(8, generator=generator, dtype=torch.float64).to(device, dtype)
    yield logits, None, *Routing(2, normalize="sum")
    v2 = Routing(3, num_groups=4, top_groups=2, scale=16.0, sorted=False)
    yield logits, None, *v2
    yield logits, None, *v2._replace(weights_from="choice")
    yield logits, bias, *Routing(2, "sigmoid", "sum", weights_from="choice")
    v3 = Routing(2, "sigmoid", "sum", 1e-20, scale=2.5, num_groups=2, group_score="top2_sum", sorted=False)
    yield logits, bias, *v3
    yield logits, None, *Routing(4, "none", "softmax")
    yield logits, bias, *Routing(8, "sqrtsoftplus", "sum", 1e-3, "clamp", score_dtype=torch.promote_types(dtype, torch.float32))
    yield logits[:0], None, *Routing(2)
