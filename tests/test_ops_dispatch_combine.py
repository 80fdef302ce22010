"""quantize_dispatch and combine with the local provider: the sort, its odd ids, the weighted sum and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compile.ops import combine, quantize_dispatch


def _dispatch(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, scales, order, offsets, handle, _ = quantize_dispatch.OP.overload(torch.zeros(len(ids), 4), ids, experts, "none", "local")
    assert (rows.shape, scales.shape, handle) == ((0, 4), (0,), [])
    assert (order.dtype, offsets.dtype) == (torch.int64, torch.int32)
    return order, offsets


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 9), min_size=3, max_size=3), max_size=20), st.integers(1, 7), st.booleans())
def test_order_sorts_slots_stably_and_offsets_end_each_expert(rows: list[list[int]], experts: int, small: bool) -> None:
    ids = torch.tensor(rows, dtype=torch.int32 if small else torch.int64).reshape(len(rows), 3)
    order, offsets = _dispatch(ids, experts)
    flat = ids.reshape(-1).tolist()
    wanted = [[slot for slot, e in enumerate(flat) if e == expert] for expert in range(experts)]
    ends = offsets.tolist()
    assert [order[a:b].tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)] == wanted
    assert sorted(order.tolist()) == list(range(len(flat)))


def test_slots_of_no_expert_come_last() -> None:
    order, offsets = _dispatch(torch.tensor([[-1, 1], [7, 0], [2, -5]]), 2)
    assert offsets.tolist() == [1, 2]
    assert order[:2].tolist() == [3, 1]


def test_no_token_is_an_empty_order() -> None:
    order, offsets = _dispatch(torch.empty((0, 2), dtype=torch.int64), 3)
    assert order.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]


def test_dispatch_has_no_gradient_and_passes_one_through_nothing() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    outputs = quantize_dispatch.OP.overload(x, torch.tensor([[0], [1]]), 2, "none", "local")
    assert not any(each.requires_grad for each in outputs[:4])


@pytest.mark.parametrize(
    ("ids", "quant", "provider", "words"),
    [
        (torch.zeros(2, 1), "none", "local", "ids must be int32 or int64 .* got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), "none", "local", "got torch.int64 \\(2,\\)"),
        (torch.zeros(2, 1, dtype=torch.int64), "int4", "local", "quant 'int4' is not supported; supported: none, fp8"),
        (torch.zeros(2, 1, dtype=torch.int64), "fp8", "local", "'local' moves no rows and quantises none, quant is 'fp8'"),
        (torch.zeros(2, 1, dtype=torch.int64), "none", "pigeon", "no provider 'pigeon' .* registered: .*local"),
    ],
)
def test_what_dispatch_cannot_do_is_a_value_error(ids: torch.Tensor, quant: str, provider: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_dispatch.OP.overload(torch.zeros(2, 4), ids, 2, quant, provider)


def _exact(y: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    terms = y.double() if w is None else y.double() * w.double().unsqueeze(-1)
    return terms.sum(1)


@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 1, 1), (3, 4, 7), (300, 3, 700)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float64", "float64")])
def test_combine_is_the_weighted_sum_over_slots(shape: tuple[int, ...], weighted: bool, dtypes: tuple[str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(shape, generator=generator).to(getattr(torch, dtypes[0]))
    w = torch.rand(shape[:2], generator=generator).to(getattr(torch, dtypes[1])) if weighted else None
    for out_dtype in (None, torch.float32, torch.bfloat16):
        out = combine.OP.overload(y, w, [], out_dtype, "local")
        promoted = y.dtype if w is None else torch.promote_types(y.dtype, w.dtype)
        assert out.dtype == (out_dtype or promoted)
        rtol, atol = combine.TOLERANCE[out.dtype]
        torch.testing.assert_close(out, _exact(y, w).to(out.dtype), rtol=rtol, atol=atol)


def test_combine_accumulates_half_precision_in_float32() -> None:
    y = torch.full((1, 257, 1), 2.0**-8, dtype=torch.bfloat16)
    y[0, 0] = 1.0
    out = combine.OP.overload(y, torch.ones(1, 257, dtype=torch.bfloat16), [], torch.float32, "local")
    assert out.item() == 2.0


@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_combine_gradients_are_autograds(dtypes: tuple[str, str], wanted: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    y0 = torch.randn(4, 3, 5, generator=generator).to(getattr(torch, dtypes[0]))
    w0 = torch.rand(4, 3, generator=generator).to(getattr(torch, dtypes[1]))
    both = [[t.clone().requires_grad_(need) for t, need in zip((y0, w0), wanted, strict=True)] for _ in range(2)]
    outs = [combine.OP.overload(*both[0], [], None, "local"), (both[1][0] * both[1][1].unsqueeze(-1)).sum(1)]
    grads = []
    for out, tensors in zip(outs, both, strict=True):
        grads.append(torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.ones_like(out)))
    for actual, expected in zip(*grads, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("args", [args for args in combine.sample_inputs(dtype=torch.float64) if args[3] is None and len(args[0])])
def test_combine_gradients_pass_gradcheck(args: tuple[torch.Tensor, ...]) -> None:
    leaves = [t.clone().requires_grad_() for t in args[:2] if t is not None]
    rest = [None] * (2 - len(leaves))
    assert torch.autograd.gradcheck(lambda *own: combine.OP.overload(*own, *rest, [], None, "local"), leaves)


def test_combine_of_other_shapes_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"y must be \[T, K, O\] and topk_weights \[T, K\]"):
        combine.OP.overload(torch.zeros(2, 3, 4), torch.zeros(2, 2), [], None, "local")
