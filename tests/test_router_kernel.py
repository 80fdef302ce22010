"""The router's kernel against torch's functions: in Triton's interpreter on CPU tensors, and on a GPU where there is one."""

from __future__ import annotations

import itertools
import os
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases

from moe_compile.ops import route
from moe_compile.ops.route import Routing

CASES = Cases(__file__)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUTERS: dict[str, tuple[int, bool, Routing]] = {  # experts, with a bias
    "mixtral": (8, False, Routing(2, normalize="sum", score_dtype=F32)),
    "plain": (13, False, Routing(3)),
    "one": (1, False, Routing(1)),
    "all": (6, False, Routing(6, "sigmoid", "sum", 1e-9)),
    "gpt_oss": (32, False, Routing(4, "none", "softmax")),
    "deepseek_v2": (12, False, Routing(3, num_groups=3, top_groups=2, scale=16.0, score_dtype=F32)),
    "deepseek_v2_choice": (12, False, Routing(5, num_groups=4, top_groups=2, weights_from="choice", group_fill=float("-inf"))),
    "deepseek_v3": (16, True, Routing(4, "sigmoid", "sum", 1e-20, "add", 2.5, 4, 2, "top2_sum", 0.0, F32)),
    "deepseek_v3_inf": (24, True, Routing(8, "sigmoid", "sum", 1e-20, "add", 2.5, 3, 1, "top2_sum", float("-inf"), F32)),
    "clamped": (16, True, Routing(3, "sqrtsoftplus", "sum", 1e-3, "clamp")),
    "weighs_choice": (10, True, Routing(2, "sigmoid", "softmax", weights_from="choice", scale=0.5)),
    "scaled": (40, False, Routing(8, "none", "none", scale=1.75, weight_dtype=F32)),
}


def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def kernel(logits: Any, bias: Any, routing: Routing) -> tuple[Any, Any]:
    assert route.unfit(logits, bias, routing) is None
    return route.by_kernel(logits, bias, routing)


def draw(name: str, tokens: int, dtype: torch.dtype, kind: str = "any") -> tuple[Any, Any, Routing]:
    experts, biased, routing = ROUTERS[name]
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn((tokens, experts), generator=generator) * 3
    if kind == "ties":
        logits = logits.round()
    if kind == "same":
        logits = torch.full_like(logits, 0.5)
    if kind == "nan":
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = float("nan")
    if kind == "inf":
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = float("-inf")
        logits[torch.rand(logits.shape, generator=generator) < 0.05] = float("inf")
    bias = torch.randn(experts, generator=generator).to(device()) if biased else None
    return logits.to(device(), dtype), bias, routing


def first_ones(values: Any, k: int, dim: int = -1, **_: Any) -> Any:
    """torch.topk that takes the first of equal ones, NaN before all: what the kernel promises."""
    return torch.return_types.topk(tuple(t[..., :k] for t in torch.sort(values, dim=dim, descending=True, stable=True)))


def compare(logits: Any, bias: Any, routing: Routing) -> None:
    """The ids of torch's functions, as far as these say which ones, and their weights."""
    weights, ids = kernel(logits, bias, routing)
    with mock.patch("torch.topk", first_ones):
        want_weights, want_ids = route.reference(logits, bias, routing)
    assert (weights.dtype, ids.dtype) == (want_weights.dtype, torch.int64)
    if (routing.score_dtype or logits.dtype) == F32:
        assert (ids == want_ids).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    choice, _ = route._choice(route._scores(logits, routing), bias, routing)
    tight = 2e-6 if (routing.score_dtype or logits.dtype) == F32 else 2e-2
    torch.testing.assert_close(choice.gather(1, ids).float(), choice.gather(1, want_ids).float(), rtol=tight, atol=tight, equal_nan=True)
    torch.testing.assert_close(weights.float(), want_weights.float(), rtol=tight, atol=tight, equal_nan=True)


@CASES.add(*itertools.product(ROUTERS, [1, 7], [F32, BF16]))
def routers(name: str, tokens: int, dtype: torch.dtype) -> None:
    compare(*draw(name, tokens, dtype))


@CASES.add(*itertools.product(ROUTERS, ["nan", "inf"]))
def odd_numbers(name: str, kind: str) -> None:
    compare(*draw(name, 9, F32, kind))


@CASES.add(("ties",), ("same",))
def first_of_equal_ones(kind: str) -> None:
    logits, _, routing = draw("plain", 40, F32, kind)
    _, ids = kernel(logits, None, routing._replace(score="none"))
    assert (ids == first_ones(logits, routing.top_k)[1]).all()


@CASES.add()
def strided_logits_and_biases_of_any_dtype() -> None:
    logits, _, routing = draw("plain", 8, F16)
    bias = torch.linspace(-1, 1, 26, device=device(), dtype=BF16)[::2]
    compare(logits.t().contiguous().t(), bias, routing)
    compare(torch.cat([logits, logits], 1)[:, ::2], None, routing)


@CASES.add()
def no_tokens() -> None:
    weights, ids = kernel(*draw("mixtral", 0, BF16))
    assert weights.shape == ids.shape == (0, 2)


test_in_interpreter = CASES.test()


def test_what_it_does_not_take_is_said() -> None:
    logits = torch.zeros(1, 2048)
    assert "1024 experts" in str(route.unfit(logits, None, Routing(2)))
    assert "top_k up to 64" in str(route.unfit(logits[:, :100], None, Routing(65)))
    assert "32 groups" in str(route.unfit(logits[:, :128], None, Routing(2, num_groups=64, top_groups=2)))
    assert "float64" in str(route.unfit(logits[:, :100].double(), None, Routing(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES.functions)
def test_on_a_gpu(name: str) -> None:
    CASES.functions[name]()


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (256, 8), (384, 6), (512, 10), (1024, 4), (60, 4), (8, 2)])
@pytest.mark.parametrize("tokens", [1, 3, 1000, 5000])
def test_the_experts_that_torch_takes(tokens: int, experts: int, top_k: int) -> None:
    """Bfloat16 logits, of which many are equal: the sets are torch.topk's own."""
    logits = torch.randn(tokens, experts, device="cuda", dtype=BF16)
    routing = Routing(top_k, "none")
    got, want = kernel(logits, None, routing)[1], route.reference(logits, None, routing)[1]
    assert (got.sort(1).values == want.sort(1).values).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [33, 1500])
@pytest.mark.parametrize("name", ROUTERS)
def test_op_and_gradient_on_a_gpu(name: str, tokens: int) -> None:
    logits, bias, routing = draw(name, tokens, F32)
    logits.requires_grad_()
    other = logits.detach().clone().requires_grad_()
    weights, ids = route.OP.overload(logits, bias, *routing)
    want, want_ids = route.reference(other, bias, routing)
    assert (ids.sort(1).values == want_ids.sort(1).values).all()
    at = torch.arange(logits.shape[1], device="cuda", dtype=F32).cos()
    (weights * at[ids]).sum().backward()
    (want * at[want_ids]).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    CASES.main()
