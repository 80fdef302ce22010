"""permute_experts_combine_inline, grouped_mm and the inline router and dispatch: values and gradients against the loop over slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import CASES, IDS, E, arguments, ids_of, slot_loop, value_and_grads, with_grad

from moe_compile.ops import experts_cpu, grouped, inline, quantize_dispatch, route
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.registry import Problem


def inlined_op(ids: torch.Tensor, *args: Any) -> Any:
    experts = args[2].shape[0]
    in_range = bool(((ids >= 0) & (ids < experts)).all())
    order, offsets, tokens, places = quantize_dispatch.SORT_OP.overload(ids, experts, in_range)
    assert torch.equal(order, args[1])
    return inline.OP.overload(args[0], order, offsets, *args[3:], tokens, places, in_range)


def _twice(case: str, ids: torch.Tensor, weighted: bool, seed: int = 0) -> tuple[Any, Any]:
    found = []
    for inlined in (True, False):
        args = arguments(CASES[case], ids, seed=seed)
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) if weighted else None
        *own, weights = with_grad([*args, weights])
        if inlined:
            out = inlined_op(ids, *own, weights, None)
        else:
            y = slot_loop(CASES[case], own, ids)
            out = (y if weights is None else y * weights.unsqueeze(-1)).sum(1)
        found.append(value_and_grads(out, [*own, weights]))
    return found[0], found[1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_loop(case: str, ids: str, weighted: bool) -> None:
    torch.testing.assert_close(*_twice(case, ids_of(ids), weighted), rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(CASES)), st.integers(0, 3), st.booleans())
def test_any_routing_gives_the_values_and_gradients_of_the_loop(data: st.DataObject, case: str, seed: int, weighted: bool) -> None:
    top_k = data.draw(st.integers(1, E))
    rows = data.draw(st.lists(st.lists(st.integers(-2, E + 1), min_size=top_k, max_size=top_k), max_size=33))
    ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), top_k)
    torch.testing.assert_close(*_twice(case, ids, weighted, seed), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layouts", ["eoi,eoi", "eio,eio", "oi*4,oi*4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_within_its_rounding_of_float64(dtype: Any, layouts: str) -> None:
    """bfloat16 takes torch's grouped_mm, whose rows without an expert are undefined, where the weights are stacked."""
    ids = torch.tensor([[0, 3], [3, 1], [-1, 3], [9, 0]])
    order, offsets = counting_sort(ids, 4)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(shape, generator=generator) * 0.3).to(dtype)  # noqa: E731
    x, up, down, weights = draw(4, 16), draw(4, 16, 16), draw(4, 8, 16), draw(4, 2)
    program = "mm(1, silu(cols(mm(0, x), 0, 8, 1)) * cols(mm(0, x), 8, 16, 1))"

    def run(*leaves: Any) -> Any:
        x, up, down, weights = (leaf.detach().requires_grad_() for leaf in leaves)
        first, second = (up.mT, down.mT) if "oi" in layouts else (up, down)
        params = [first.contiguous(), second.contiguous()]
        params = [each for one in params for each in one.unbind(0)] if "*" in layouts else params
        out = inlined_op(ids, x, order, offsets, None, params, [], program, layouts, "", 2, weights, x.dtype)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, up, down, weights))]

    for actual, expected in zip(run(x, up, down, weights), run(*(each.double() for each in (x, up, down, weights))), strict=True):
        assert not actual.isnan().any()
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]


# ---------------------------------------------------------------- grouped_mm
@pytest.mark.parametrize("args", grouped.sample_inputs())
def test_opcheck_passes_for_grouped_products(args: tuple[Any, ...]) -> None:
    torch.library.opcheck(grouped.OP.overload, args)
    rows, offsets, weights, layout, transposed = args
    if not transposed:
        grad = torch.ones_like(grouped.OP.overload(*args))
        torch.library.opcheck(grouped.WEIGHTS_OP.overload, (rows, grad, offsets, weights, layout))


@pytest.mark.parametrize("args", [args[:-1] for args in grouped.sample_inputs(dtype=torch.float64) if not args[-1]])
def test_gradcheck_of_grouped_products(args: tuple[Any, ...]) -> None:
    rows, offsets, weights, layout = args
    leaves = [each.requires_grad_() for each in (rows, *weights)]
    assert torch.autograd.gradcheck(lambda rows, *weights: grouped.differentiable(rows, offsets, weights, layout), leaves)


def test_grouped_products_cast_weights_of_another_dtype_and_their_gradient_back() -> None:
    rows, offsets = torch.ones(3, 8, dtype=torch.bfloat16), torch.tensor([1, 3], dtype=torch.int32)
    weight = torch.randn(2, 8, 8, requires_grad=True)
    out = grouped.differentiable(rows, offsets, [weight], "eio")
    (grad,) = torch.autograd.grad(out.sum(), [weight])
    assert (out.dtype, grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(grad, torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 8, 8))


def test_differentiating_twice_is_refused() -> None:
    weight = torch.randn(1, 4, 4, requires_grad=True)
    out = grouped.differentiable(torch.ones(2, 4, requires_grad=True), torch.tensor([2], dtype=torch.int32), [weight], "eio")
    (grad,) = torch.autograd.grad(out.square().sum(), [weight], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


# ---------------------------------------------------------------- router and dispatch
@pytest.mark.parametrize("args", route.sample_inputs(dtype=torch.float64))
def test_inline_router_is_the_op(args: tuple[Any, ...]) -> None:
    found = []
    for op in (route.OP, route.INLINE_OP):
        logits = args[0].detach().requires_grad_()
        weights, ids = op.overload(logits, *args[1:])
        found.append((weights.detach(), ids, *torch.autograd.grad((weights * torch.arange(weights.shape[1])).sum(), [logits])))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("args", quantize_dispatch.sample_inputs())
def test_sorted_slots_are_those_of_the_dispatch(args: tuple[Any, ...]) -> None:
    _, ids, experts, _ = args
    torch.library.opcheck(quantize_dispatch.SORT_OP.overload, (ids, experts, False))
    order, offsets, tokens, places = quantize_dispatch.SORT_OP.overload(ids, experts, False)
    torch.testing.assert_close(quantize_dispatch.INLINE_SORT_OP.overload(ids, experts, False), (order, offsets, tokens, places))
    torch.testing.assert_close((order, offsets), quantize_dispatch.OP.overload(*args, "local")[2:4])
    assert torch.equal(tokens, order // ids.shape[1])
    assert torch.equal(order[places], torch.arange(len(order)))


# ---------------------------------------------------------------- what the provider says
def _problem(**known: Any) -> Problem:
    glu = "mm(1, silu(mm(0, x)) * mm(2, x))"
    usual = {"hidden": 64, "intermediate": 32, "num_experts": 4, "top_k": 2, "tokens": 64, "program": glu, "compiler": "inductor"}
    return Problem("experts", **{**usual, **known})


def test_provider_wants_inductor_and_on_a_cpu_few_enough_rows() -> None:
    assert inline.supports(_problem()) is None
    assert "the inner compiler is eager" in str(inline.supports(_problem(compiler="eager")))
    assert "need 64" in str(inline.supports(_problem(tokens=1 << 17)))
    assert inline.supports(_problem(tokens=1 << 17, device="cuda")) is None
    assert "0 tokens" in str(inline.supports(_problem(tokens=0)))
    biased = "mm(0, x) + b(0)"
    assert inline.supports(_problem(program=biased)) is None
    assert "biases" in str(inline.supports(_problem(program=biased, training=True)))
    assert inline.cost(_problem()) < experts_cpu.cost(_problem())
