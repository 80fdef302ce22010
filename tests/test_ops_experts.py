"""permute_experts_unpermute and its backward: every provider against a loop over the slots, values and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import CASES, IDS, E, arguments, ids_of, leaves, run, slot_loop, value_and_grads, with_grad

from moe_compile.ops import combine, experts, experts_combine, experts_cpu, experts_cuda, products_cpu, registry
from moe_compile.ops.blocks import cut
from moe_compile.ops.quantize_dispatch import counting_sort

PROVIDERS = ("reference", "cpu_grouped")


def _compare(case_name: str, ids: torch.Tensor, provider: str, seed: int = 0) -> None:
    case = CASES[case_name]
    args, twin = (with_grad(arguments(case, ids, seed=seed)) for _ in range(2))
    actual = value_and_grads(run(args, provider), args)
    expected = value_and_grads(slot_loop(case, twin, ids), twin)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_loop_over_slots(case: str, ids: str, provider: str) -> None:
    _compare(case, ids_of(ids), provider)


def _combined_twice(case: str, ids: torch.Tensor, weighted: bool, provider: str) -> tuple[Any, Any]:
    """Value and gradients of the op in one, and of the loop over slots followed by a sum."""
    found = []
    for in_one in (True, False):
        args = arguments(CASES[case], ids)
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) if weighted else None
        *own, weights = with_grad([*args, weights])
        if in_one:
            out = experts_combine.OP.overload(*own, weights, None, provider)
        else:
            y = slot_loop(CASES[case], own, ids)
            out = (y if weights is None else y * weights.unsqueeze(-1)).sum(1)
        found.append(value_and_grads(out, [*own, weights]))
    return found[0], found[1]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("case", CASES)
def test_experts_and_combine_in_one_are_the_loop_and_a_sum(case: str, ids: str, weighted: bool, provider: str) -> None:
    actual, expected = _combined_twice(case, ids_of(ids), weighted, provider)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_experts_and_combine_in_one_without_gradients_are_the_two_ops(case: str) -> None:
    args = arguments(CASES[case], ids_of("mixed"))
    weights = torch.rand(4, 2, dtype=torch.float64)
    for provider in PROVIDERS:
        expected = combine.OP.overload(run(args, provider), weights, [], torch.float32, "local")
        torch.testing.assert_close(experts_combine.OP.overload(*args, weights, torch.float32, provider), expected)


@pytest.mark.parametrize("wanted", ["x", "weights", "combine_weights"])
def test_experts_and_combine_in_one_compute_only_the_wanted_gradient(wanted: str) -> None:
    args, weights = arguments(CASES["swiglu"], ids_of("mixed")), torch.rand(4, 2, dtype=torch.float64)
    leaf = {"x": args[0], "weights": args[4][0], "combine_weights": weights}[wanted].requires_grad_()
    found = []
    for provider in PROVIDERS:
        out = experts_combine.OP.overload(*args, weights, None, provider)
        found += torch.autograd.grad(out.square().sum(), [leaf])
    torch.testing.assert_close(found[0], found[1])


def test_experts_and_combine_in_one_sum_half_precision_in_float32() -> None:
    order, offsets = counting_sort(torch.zeros((1, 257), dtype=torch.int64), 1)
    weight = torch.eye(8, dtype=torch.bfloat16).unsqueeze(0)
    args: tuple[Any, ...] = (torch.ones((1, 8), dtype=torch.bfloat16), order, offsets, None, [weight], [], "mm(0, x)", "eio", "", 257)
    weights = torch.full((1, 257), 2.0**-8, dtype=torch.bfloat16)
    weights[0, 0] = 1.0
    for provider in PROVIDERS:
        out = experts_combine.OP.overload(*args, weights, torch.float32, provider)
        assert (out == 2.0).all()


@st.composite
def routings(draw: st.DrawFn) -> torch.Tensor:
    top_k = draw(st.integers(1, E))
    row = st.lists(st.integers(-2, E + 1), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(row, max_size=33))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), top_k)


@settings(max_examples=40, deadline=None)
@given(routings(), st.sampled_from(sorted(CASES)), st.integers(0, 3))
def test_any_routing_gives_the_values_and_gradients_of_the_loop(ids: torch.Tensor, case: str, seed: int) -> None:
    _compare(case, ids, "cpu_grouped", seed)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_experts_split_over_blocks_sum_their_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_cpu, "rows_per_block", lambda call: rows)
    for case in CASES:
        _compare(case, ids_of("all_to_one"), "cpu_grouped")
        _compare(case, ids_of("mixed"), "cpu_grouped")


@pytest.mark.parametrize("case", CASES)
def test_products_feature_by_feature_and_copied_operands_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_cpu, "TRANSPOSED_ROWS", {torch.float64: range(1, 100)})
    monkeypatch.setattr(products_cpu, "COPIED_WIDTH", 1)
    for copied in (0, 100):
        monkeypatch.setattr(products_cpu, "COPIED_ROWS", {torch.float64: copied})
        _compare(case, ids_of("mixed"), "cpu_grouped")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", ["cpu_grouped", "cuda_grouped_mm"])
def test_provider_is_within_tolerance_of_float64(provider: str, dtype: torch.dtype) -> None:
    """cuda_grouped_mm too: torch's grouped_mm also runs on a CPU, on sizes of a multiple of 16 bytes."""
    ids = torch.tensor([[0, 3], [3, 1], [-1, 3]])
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(shape, generator=generator) * 0.3).to(dtype)  # noqa: E731
    glu = "(mm(1, silu(cols(mm(0, x), 0, 8, 1)) * cols(mm(0, x), 8, 16, 1)) + b(0)) * w"
    order, offsets = counting_sort(ids, 4)
    args = [draw(3, 16), order, offsets, draw(3, 2), [draw(4, 16, 16), draw(4, 16, 8)], [draw(4, 16)], glu, "eoi,eoi", "eo", 2]
    mine = with_grad(args)
    exact = with_grad([[t.double() for t in a] if isinstance(a, list) else a for a in args])
    exact[0], exact[3] = (exact[i].detach().double().requires_grad_() for i in (0, 3))
    rtol, atol = experts.TOLERANCE[dtype]
    actual, expected = (value_and_grads(run(a, p), a) for a, p in ((mine, provider), (exact, "reference")))
    for got, want in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(got, want.to(dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("provider", [*PROVIDERS, "cuda_grouped_mm"])
def test_an_expert_without_tokens_is_never_read_and_gets_zero_gradients(provider: str) -> None:
    """Its weights are NaN, and fresh memory is NaN: neither may reach a result."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((4, 8, 16), (4, 8, 4))]
    for weight in weights:
        weight[1] = float("nan")
    order, offsets = counting_sort(torch.tensor([[0, -1], [3, 0], [2, 9]]), 4)
    x = torch.randn(3, 16, generator=generator)
    program = "mm(1, cols(silu(mm(0, x)), 0, 4, 1))"
    args = with_grad([x, order, offsets, None, weights, [], program, "eoi,eoi", "", 2])
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        y, grads = value_and_grads(run(args, provider), args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    assert (y[0, 1] == 0).all()
    assert (y[2, 1] == 0).all()
    for grad in grads:
        assert grad.isfinite().all()
    assert all((grad[1] == 0).all() for grad in grads[1:])


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("provider", ["reference", "cpu_grouped", "cuda_grouped_mm"])
def test_experts_and_combine_in_one_with_slots_of_no_expert_last_or_left_out(provider: str, cut: bool) -> None:
    """Fresh memory is NaN; gradients of x, both weights and parameters."""
    ids, g = torch.tensor([[0, 3], [3, -1], [-1, 9], [2, 3], [-1, 0]]), torch.Generator().manual_seed(0)
    order, offsets = counting_sort(ids, 4)
    order = order[: int(offsets[-1])].clone() if cut else order
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).float()  # noqa: E731
    x, inner, outer, up, down = draw(5, 16), draw(5, 2), draw(5, 2), draw(4, 16, 8), draw(4, 8, 16)
    mine = [t.clone().requires_grad_() for t in (x, inner, outer, up, down)]
    exact = [t.double().requires_grad_() for t in (x, inner, outer, up, down)]

    def combined(args: list[torch.Tensor], name: str) -> torch.Tensor:
        tensors = (args[0], order, offsets, args[1], args[3:], [], "mm(1, silu(mm(0, x)) * w)", "eio,eio", "", 2, args[2])
        return torch.ops.moe_compile.permute_experts_combine(*tensors, args[0].dtype, name)

    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        results = [combined(mine, provider), combined(exact, "reference")]
        for out in results:
            out.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for got, want in zip([results[0], *(t.grad for t in mine)], [results[1], *(t.grad for t in exact)], strict=True):
        torch.testing.assert_close(got, want.float(), rtol=2e-5, atol=2e-5)


def test_slot_of_no_expert_gives_a_zero_row_even_for_a_nan_weight() -> None:
    case = CASES["weighted_output"]
    ids = ids_of("no_expert")
    args = arguments(case, ids)
    args[3][0, 0] = float("nan")
    for provider in PROVIDERS:
        y = run(args, provider)
        assert y.isfinite().all()
        assert (y[0, 0] == 0).all()


def test_nan_and_infinity_of_a_row_stay_in_its_slots() -> None:
    args = arguments(CASES["swiglu"], ids_of("mixed"))
    args[0][1, 0] = float("nan")
    for provider in PROVIDERS:
        y = run(args, provider)
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()


def test_parameters_may_be_any_strided_view_and_gradients_keep_their_strides() -> None:
    case = CASES["swiglu"]
    ids = ids_of("mixed")
    args = with_grad(arguments(case, ids))
    expected = value_and_grads(run(args, "reference"), args)
    strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in args[4]]
    sliced = torch.cat([args[0].detach(), args[0].detach()], 1)[:, : args[0].shape[1]].requires_grad_()
    other = [sliced, *args[1:4], strided, *args[5:]]
    y, grads = value_and_grads(run(other, "cpu_grouped"), other)
    torch.testing.assert_close((y, grads), expected)
    assert grads[1].stride() == strided[0].stride()


def test_only_the_wanted_gradients_are_computed() -> None:
    case = CASES["swiglu"]
    args = arguments(case, ids_of("mixed"))
    args[4][1].requires_grad_()
    for provider in PROVIDERS:
        (grad,) = torch.autograd.grad(run(args, provider).sum(), leaves(args))
        assert grad.shape == args[4][1].shape
    needs = [False, False, False, True]
    found = experts.BACKWARD_OP.overload(torch.ones(4, 2, 6, dtype=torch.float64), [], *args, "cpu_grouped", needs)
    assert [each.numel() for each in found] == [0, 0, 0, args[4][1].numel()]


def test_one_frozen_expert_of_a_list_gets_no_gradient() -> None:
    args = arguments(CASES["three_lists"], ids_of("mixed"))
    for weight in args[4][1:]:
        weight.requires_grad_()
    for provider in PROVIDERS:
        run(args, provider).sum().backward()
        assert args[4][0].grad is None
        assert args[4][3].grad is not None


def test_gradients_of_a_whole_call_pass_gradcheck() -> None:
    for case in CASES.values():
        if "stop" in case.program:
            continue
        args = with_grad(arguments(case, torch.tensor([[0, 3], [-1, 0]])))
        for provider in PROVIDERS:
            assert torch.autograd.gradcheck(lambda *_, a=args, p=provider: run(a, p), leaves(args))


def test_double_backward_is_an_error_not_a_wrong_gradient() -> None:
    args = with_grad(arguments(CASES["swiglu"], ids_of("mixed")))
    for out in (run(args, "reference"), experts_combine.OP.overload(*args, None, None, "cpu_grouped")):
        (grad,) = torch.autograd.grad(out.sum(), [args[0]], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_half_precision_sums_slots_in_float32() -> None:
    """A token whose slots all go to one expert: 1 + 2**-8 + ... is lost in bfloat16, kept in float32."""
    top_k, hidden = 128, 8
    order, offsets = counting_sort(torch.zeros((1, top_k), dtype=torch.int64), 1)
    x = torch.ones((1, hidden), dtype=torch.bfloat16).requires_grad_()
    weight = torch.eye(hidden, dtype=torch.bfloat16).unsqueeze(0)
    grad = torch.full((1, top_k, hidden), 2.0**-7, dtype=torch.bfloat16)
    grad[0, 0] = 1.0
    for provider in PROVIDERS:
        y = run([x, order, offsets, None, [weight], [], "mm(0, x)", "eio", "", top_k], provider)
        (dx,) = torch.autograd.grad(y, [x], grad)
        torch.testing.assert_close(dx, torch.full_like(dx, 1.0 + 127 * 2.0**-7))


def test_a_weight_of_another_dtype_is_cast_to_the_rows() -> None:
    """How autocast is expressed: bfloat16 rows, float32 parameters, float32 gradients."""
    args = arguments(CASES["swiglu"], ids_of("mixed"), torch.float32)
    args[6] = args[6].replace("mm(0, x)", 'mm(0, cast(x, "bfloat16"))')
    low = [args[0].bfloat16(), *args[1:4], [w.bfloat16() for w in args[4]], [], args[6], *args[7:]]
    for provider in PROVIDERS:
        torch.testing.assert_close(run(args, provider), run(low, provider), rtol=0, atol=0)
        mine = with_grad(args)
        assert {g.dtype for g in value_and_grads(run(mine, provider), mine)[1]} == {torch.float32}


def test_blocks_cover_every_row_once_and_split_only_large_experts() -> None:
    blocks = cut([3, 3, 4, 14, 14, 15], 5)
    assert [(block.start, block.stop, block.experts, block.sizes) for block in blocks] == [
        (0, 4, [0, 2], [3, 1]),
        (4, 9, [3], [5]),
        (9, 14, [3], [5]),
        (14, 15, [5], [1]),
    ]
    assert [block.sizes for block in cut([11], 5)] == [[4], [4], [3]]
    assert [block.sizes for block in cut([11, 12], 5)] == [[4], [4], [3, 1]]
    assert cut([], 5) == []
    assert cut([0, 0], 5) == []


@given(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 9))
def test_blocks_are_never_larger_than_asked_and_keep_the_order(sizes: list[int], limit: int) -> None:
    ends = list(itertools.accumulate(sizes))
    blocks = cut(ends, limit)
    assert all(0 < sum(block.sizes) == block.stop - block.start <= limit for block in blocks)
    assert [0, *(block.stop for block in blocks)] == [*(block.start for block in blocks), ends[-1] if ends else 0]
    rows = [expert for block in blocks for expert, size in zip(block.experts, block.sizes, strict=True) for _ in range(size)]
    assert rows == [expert for expert, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({9: 1}, "T\\*K"),
        ({7: "eoi"}, "describes 1 tensors, got 2"),
        ({7: "eoi,xyz"}, "none of eio"),
        ({7: "oi*2"}, "does not fit"),
        ({6: "mm(2, x)"}, "reads weight 2"),
        ({6: "mm(1, x)"}, "takes rows of width 4, got 6"),
        ({6: "mm(0, x) * w"}, "topk_weights is None"),
    ],
)
def test_arguments_that_do_not_fit_are_named_in_the_error(change: dict[int, object], words: str) -> None:
    args = arguments(CASES["swiglu"], ids_of("mixed"))
    for at, value in change.items():
        args[at] = value
    with pytest.raises(ValueError, match=words):
        run(args, "reference")


def test_unknown_provider_is_an_error_naming_the_registered_ones() -> None:
    with pytest.raises(ValueError, match=r"no provider .fast. .* registered: cpu_grouped, .*reference"):
        run(arguments(CASES["swiglu"], ids_of("mixed")), "fast")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cpu"}, "device is cpu"),
        ({"format": "batched"}, "format is 'batched'"),
        ({"dtype": torch.float16, "program": "mm(0, x)"}, "multiplies torch.float16"),
        ({"hidden": 12}, "hidden size 12"),
        ({"intermediate": 4}, "intermediate size 4"),
    ],
)
def test_cuda_grouped_mm_says_why_it_cannot(change: dict[str, object], words: str) -> None:
    fields = {"stage": "experts", "device": "cuda", "dtype": torch.bfloat16, "hidden": 64, "intermediate": 32, **change}
    assert words in (experts_cuda.supports(registry.Problem(**fields)) or "")
