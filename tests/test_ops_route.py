"""route: bitwise the torch spelling of each family's router, ties and NaN included, and its gradient autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compile.ops import route
from moe_compile.ops.route import Routing


def _mixtral(logits: Any, bias: Any) -> Any:
    weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), 2, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), ids


def _gpt_oss(logits: Any, bias: Any) -> Any:
    values, ids = torch.topk(logits, 4, dim=-1)
    return F.softmax(values, dim=1, dtype=values.dtype), ids


def _deepseek_v2(logits: Any, bias: Any) -> Any:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    tokens = scores.shape[0]
    groups = torch.topk(scores.view(tokens, 4, 2).max(dim=-1).values, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros(tokens, 4).scatter_(1, groups, 1).unsqueeze(-1).expand(tokens, 4, 2).reshape(tokens, 8)
    weights, ids = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=3, dim=-1, sorted=False)
    return weights * 16.0, ids


def _deepseek_v3(logits: Any, bias: Any) -> Any:
    scores = logits.float().sigmoid()
    choice = scores + bias.float()
    tokens = scores.shape[0]
    groups = torch.topk(choice.view(tokens, 2, 4).topk(2, dim=-1)[0].sum(dim=-1), k=1, dim=-1, sorted=False)[1]
    mask = torch.zeros(tokens, 2).scatter_(1, groups, 1).unsqueeze(-1).expand(tokens, 2, 4).reshape(tokens, 8)
    ids = torch.topk(choice.masked_fill(~mask.bool(), 0.0), k=3, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, ids


def _clamped_sqrtsoftplus(logits: Any, bias: Any) -> Any:
    scores = F.softplus(logits).sqrt()
    ids = torch.topk(scores + bias, 3, dim=-1).indices
    weights = scores.gather(-1, ids)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-3), ids


FAMILIES: dict[str, tuple[Callable[..., Any], bool, Routing]] = {
    "mixtral": (_mixtral, False, Routing(2, "softmax", "sum", score_dtype=torch.float32)),
    "gpt_oss": (_gpt_oss, False, Routing(4, "none", "softmax")),
    "deepseek_v2": (
        _deepseek_v2, False,
        Routing(3, "softmax", scale=16.0, num_groups=4, top_groups=2, score_dtype=torch.float32, sorted=False),
    ),
    "deepseek_v3": (
        _deepseek_v3, True,
        Routing(3, "sigmoid", "sum", 1e-20, "add", 2.5, 2, 1, "top2_sum", 0.0, torch.float32, None, False),
    ),
    "clamped_sqrtsoftplus": (_clamped_sqrtsoftplus, True, Routing(3, "sqrtsoftplus", "sum", 1e-3, "clamp")),
}  # fmt: skip


def _routing(name: str, dtype: torch.dtype) -> Routing:
    return FAMILIES[name][2]._replace(weight_dtype=dtype if name == "mixtral" else None)


def _bias(name: str, dtype: torch.dtype) -> torch.Tensor | None:
    return torch.linspace(-0.2, 0.2, 8, dtype=dtype) if FAMILIES[name][1] else None


def _same(name: str, logits: torch.Tensor) -> None:
    bias = _bias(name, logits.dtype)
    actual = route.OP.overload(logits, bias, *_routing(name, logits.dtype))
    expected = FAMILIES[name][0](logits, bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_ids_are_the_familys_to_the_bit(name: str, dtype: torch.dtype, tokens: int) -> None:
    _same(name, torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens)).to(dtype))


ODD = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf"), float("nan")])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ODD, min_size=8, max_size=8), max_size=9), st.sampled_from(sorted(FAMILIES)))
def test_ties_infinities_and_nan_choose_as_topk_does(rows: list[list[float]], name: str) -> None:
    _same(name, torch.tensor(rows).reshape(len(rows), 8))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_of_the_logits_is_autograds(name: str) -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    bias, upstream = _bias(name, logits.dtype), torch.randn(6, FAMILIES[name][2].top_k)
    mine, twin = (logits.clone().requires_grad_() for _ in range(2))
    (actual,) = torch.autograd.grad(route.OP.overload(mine, bias, *_routing(name, logits.dtype))[0], [mine], upstream)
    (expected,) = torch.autograd.grad(FAMILIES[name][0](twin, bias)[0], [twin], upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("args", list(route.sample_inputs(dtype=torch.float64))[:-1])
def test_gradient_passes_gradcheck(args: tuple[Any, ...]) -> None:
    logits = args[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: route.OP.overload(each, *args[1:])[0], [logits])


def test_bias_chooses_and_gets_no_gradient() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 9.0], requires_grad=True)
    weights, ids = route.OP.overload(logits, bias, *Routing(1, "sigmoid"))
    assert ids.tolist() == [[2]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[-1.0]])))
    weights.sum().backward()
    assert bias.grad is None
    assert logits.grad[0, :2].tolist() == [0.0, 0.0]


def test_the_smallest_sum_is_the_clamp_where_it_binds() -> None:
    logits = torch.full((1, 4), -30.0, requires_grad=True)
    weights, _ = route.OP.overload(logits, None, *Routing(2, "sigmoid", "sum", 1e-3, "clamp"))
    torch.testing.assert_close(weights, torch.sigmoid(logits.detach()[:, :2]) / 1e-3)
    weights.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        (Routing(2, score="softmux"), "score 'softmux' is unknown; known: softmax, sigmoid"),
        (Routing(2, normalize="l2"), "normalize 'l2' is unknown"),
        (Routing(9), "top_k 9 of logits"),
        (Routing(2, num_groups=3), "8 experts do not divide into 3 groups"),
        (Routing(2, num_groups=2, top_groups=3), "top_groups 3 of 2 groups"),
        (Routing(2, num_groups=8, group_score="top2_sum"), "8 experts in 8 groups are fewer"),
        (Routing(2, eps_mode="max"), "eps_mode 'max' is unknown"),
        (Routing(2, num_groups=2, group_score="mean"), "group_score 'mean' is unknown"),
    ],
)
def test_a_router_that_cannot_be_meant_is_a_value_error(routing: Routing, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        route.OP.overload(torch.zeros(2, 8), None, *routing)
