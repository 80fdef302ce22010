"""The expert program: what parses, what it evaluates to, and that each function's derivative is autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_compile.ops.evaluate import Needs, Reads, evaluate, reverse_plan
from moe_compile.ops.experts import OP
from moe_compile.ops.functions import FUNCTIONS
from moe_compile.ops.infer import Inputs, Value, infer, product_dtypes
from moe_compile.ops.program import parse
from moe_compile.ops.quantize_dispatch import counting_sort

# A program of x for each function, and where its derivative exists: (text, lowest x).
SPELLED = {
    "add": "x + mm(0, x) + 1.5", "sub": "2.0 - x - mm(0, x)", "mul": "x * mm(0, x) * 3.0", "div": "1.0 / x + mm(0, x) / x",
    "neg": "-x", "pow": "pow(x, 3.0) + pow(x, 2)", "maximum": "maximum(x, mm(0, x))", "minimum": "minimum(x, mm(0, x))",
    "clamp": "clamp(x, 0.4, 0.9) + clamp(x, None, 0.8) + clamp(x, 0.5, None)",
    "where": "where(lt(x, 0.7), x * 2.0, mm(0, x)) + where(ge(mm(0, x), x), 1.0, x)",
    "lt": "where(lt(x, 0.7), x, -x)", "le": "where(le(x, 0.7), x, -x)", "gt": "where(gt(0.7, x), x, -x)",
    "ge": "where(ge(x, 0.7), x, -x)", "eq": "where(eq(x, 0.7), x, -x)", "ne": "where(ne(x, 0.7), x, -x)",
    "leaky_relu": "leaky_relu(x - 0.7, 0.2) + leaky_relu(x)", "elu": "elu(x - 0.7, 0.5) + elu(x - 0.7)",
    "softplus": "softplus(x) + softplus(x, 2.0, 1.5)",
}  # fmt: skip


def _text(name: str) -> str:
    return SPELLED.get(name, f"{name}(x)")


def _call(text: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    order, offsets = counting_sort(torch.zeros((x.shape[0], 1), dtype=torch.int64), 1)
    return OP.overload(x, order, offsets, None, [weight], [], text, "eio", "", 1, "reference")[:, 0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative_of_every_function_passes_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand((3, 4), generator=generator, dtype=torch.float64) + 0.2).requires_grad_()
    weight = torch.rand((1, 4, 4), generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: _call(_text(name), a, b), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n, f in FUNCTIONS.items() if len(f.partials) == 1])
def test_value_and_derivative_are_autograds_to_the_bit_at_every_edge(name: str, dtype: torch.dtype) -> None:
    function = FUNCTIONS[name]
    attrs = {"pow": (3.0,), "clamp": (-1.0, 1.0)}.get(name, function.attrs)
    edges = [0.0, -0.0, 1.0, -1.0, 0.3, -0.3, 3.0, -3.0, 6.0, 20.0, 21.0, -90.0, 88.0, float("inf"), float("-inf"), float("nan")]
    x = torch.tensor([edges], dtype=dtype, requires_grad=True)
    expected = function.forward(x, *attrs)
    (expected_grad,) = torch.autograd.grad(expected.sum(), [x])
    numbers = "".join(f", {value!r}" for value in attrs)
    y = _call(f"{name}(x{numbers})", x, torch.zeros((1, 1, 1), dtype=dtype))
    (grad,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0, equal_nan=True)


def _evaluate(text: str, x: Any, w: Any, bias: Any) -> list[Any]:
    return evaluate(parse(text), Reads(lambda: x, lambda: w, lambda index, rows: rows, lambda j: bias))


@pytest.mark.parametrize(
    "dtypes", [("float32",) * 3, ("bfloat16",) * 3, ("bfloat16", "float32", "float64"), ("float64", "float16", "bfloat16")]
)
@pytest.mark.parametrize(
    "text",
    [*(_text(name) for name in FUNCTIONS), "x * w", "x + b(0)", "lt(x, 1) * w", "lt(x, 1) + 2", "gt(x, 0.5) * 2.5",
     "cols(x, 1, 4, 2)", 'cast(x, "float16") * 2', "where(lt(x, 1), 1.0, 2.0)", "stop(x) + 1", "b(0) * 2"],
)  # fmt: skip
def test_inferred_types_are_those_of_evaluation(text: str, dtypes: tuple[str, str, str]) -> None:
    x_dtype, w_dtype, b_dtype = (getattr(torch, name) for name in dtypes)
    x, w, bias = torch.ones((2, 4), dtype=x_dtype), torch.ones((2, 1), dtype=w_dtype), torch.ones(4, dtype=b_dtype)
    inputs = Inputs(Value(4, x_dtype), Value(1, w_dtype), ((4, 4),), (Value(4, b_dtype),))
    for value, known in zip(_evaluate(text, x, w, bias), infer(parse(text), inputs), strict=True):
        if torch.is_tensor(value):
            assert (value.shape[-1], value.dtype) == (known.width, known.dtype)


def test_common_subexpressions_are_one_step() -> None:
    steps = parse("silu(mm(0, x)) * mm(0, x) + mm(0, x)").steps
    assert [step.op for step in steps] == ["x", "mm", "silu", "mul", "add"]


def test_constants_that_only_look_alike_stay_apart() -> None:
    constants = [step.attrs[0] for step in parse("x * 0.0 + x * -0.0 + x * 0").steps if step.op == "const"]
    assert [repr(value) for value in constants] == ["0.0", "-0.0", "0"]


def test_infinity_and_nan_have_names() -> None:
    y = _evaluate("clamp(x, -inf, inf) + nan", torch.ones(1, 1), None, None)[-1]
    assert y.isnan().all()


def test_parsing_is_cached() -> None:
    assert parse("x + 1") is parse("x + 1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x +", "not an expression"),
        ("y * 2", "'y' is not part of the language"),
        ("x if x else w", "not part of the language"),
        ("x.sum()", "not part of the language"),
        ("__import__('os')", "unknown function '__import__'"),
        ("sillu(x)", "unknown function 'sillu'; known are mm, b, cols"),
        ("silu(x, x)", "silu takes 1 arguments, got 2"),
        ("clamp(x, 1)", "clamp takes 3 arguments, got 2"),
        ("clamp(x, x, 1)", "'x' must be a number or None"),
        ("elu(x, 1.0, 2.0)", "elu takes 1 to 2 arguments, got 3"),
        ("maximum(x, 0)", "use clamp"),
        ("mm(x, 0)", "must be a number"),
        ("mm(0.5, x)", "non-negative integers"),
        ("mm(0, 1.0)", "mm of the number 1.0"),
        ("cols(x, 4, 2, 1)", "start < stop"),
        ("cols(x, 0, 2, 0)", "step >= 1"),
        ('cast(x, "bfloat61")', "name of a torch dtype"),
        ("cast(x, float)", "name of a torch dtype"),
        ("where(1, x, x)", "condition of where"),
        ("3.5", "is a number"),
        ("1 + 2", "add of numbers"),
        ("(" * 300 + "x" + ")" * 300, "not an expression"),
    ],
)
def test_bad_text_is_a_value_error_naming_it(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="expert program") as error:
        parse(text)
    assert text in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cols(x, 0, 9, 1)", "cols up to 9 of rows of width 4"),
        ("mm(0, cols(x, 0, 2, 1))", "takes rows of width 4, got 2"),
        ("x + cols(x, 0, 2, 1)", "add of rows of width 4 and 2"),
        ("x * w", "topk_weights is None"),
    ],
)
def test_widths_that_do_not_fit_are_a_value_error(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        infer(parse(text), Inputs(Value(4, torch.float32), None, ((4, 4),), ()))


def test_reverse_recomputes_only_what_it_reads() -> None:
    program = parse("mm(1, silu(cols(mm(0, x), 0, 4, 1)) * cols(mm(0, x), 4, 8, 1))")
    needs = Needs(True, False, (True, True))
    recomputed = [program.steps[i].op for i in sorted(reverse_plan(program, needs, keep=False).wanted)]
    assert recomputed == ["x", "mm", "cols", "silu", "cols", "mul"]  # not the second product
    kept = reverse_plan(program, needs, keep=True)
    assert [program.steps[i].op for i in kept.kept] == ["mm"]
    only_x = reverse_plan(program, Needs(True, False, (False, False)), keep=True)
    assert "x" not in [program.steps[i].op for i in only_x.wanted]


def test_dtypes_of_products_follow_casts() -> None:
    program = parse('mm(1, cast(silu(mm(0, cast(x, "bfloat16"))), "float32"))')
    assert product_dtypes(program, torch.float32) == (torch.bfloat16, torch.float32)
