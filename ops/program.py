"""The expert program: the text of the function that an expert applies to one row, and its parsed form.

    "mm(1, silu(cols(mm(0, x), 0, 48, 1)) * cols(mm(0, x), 48, 96, 1))"        # SwiGLU on a fused [E, 2I, H]

Python expression syntax with
    x                         the rows [R, H]
    w                         the rows' routing weight [R, 1] (only where the op gets topk_weights)
    mm(j, e)                  e times weight j of the row's expert, [R, in] @ [in, out]; a weight of another dtype is cast
                              to that of e
    b(j)                      bias j of the row's expert, [out]
    cols(e, start, stop, step)  column slice
    cast(e, "bfloat16")       change of dtype
    stop(e)                   e without a gradient
    numbers, + - * /, unary minus, and the functions of functions.py
Values have the types that torch gives them in eager mode.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from .functions import FUNCTIONS

_OPERATORS: dict[type[ast.AST], str] = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
# For these torch takes rows only, a number would need a dtype of its own.
_ROWS_ONLY = ("maximum", "minimum")


@dataclasses.dataclass(frozen=True)
class Step:
    """One value of a program: op is "x", "w", "const", "mm", "b", "cols", "cast", "stop" or a function's name.

    args: indices of earlier steps. attrs: const (value,), mm and b (j,), cols (start, stop, step), cast (dtype,), or a
    function's attributes.
    """

    op: str
    args: tuple[int, ...] = ()
    attrs: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program: steps in order of evaluation, each value once, the last one is the result."""

    text: str
    steps: tuple[Step, ...]

    @functools.cached_property
    def uses_w(self) -> bool:
        return any(step.op == "w" for step in self.steps)

    @functools.cached_property
    def num_weights(self) -> int:
        return _count(self.steps, "mm")

    @functools.cached_property
    def num_biases(self) -> int:
        return _count(self.steps, "b")


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Program:
    """The program of a text. Raises ValueError naming the text and what is wrong with it."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"expert program {text!r} is not an expression: {error}") from error
    builder = _Builder(text)
    result = builder.visit(tree.body)
    if builder.steps[result].op == "const":
        raise ValueError(f"expert program {text!r} is a number; the result must be rows")
    return Program(text, tuple(builder.steps[: result + 1]))


def _count(steps: tuple[Step, ...], op: str) -> int:
    return 1 + max((step.attrs[0] for step in steps if step.op == op), default=-1)


class _Builder:
    """Walks the syntax tree and appends each new value once (value numbering)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps: list[Step] = []
        self.seen: dict[tuple[str, tuple[int, ...], str], int] = {}

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"expert program {self.text!r}: {problem}")

    def step(self, op: str, args: tuple[int, ...] = (), attrs: tuple[Any, ...] = ()) -> int:
        key = (op, args, repr(attrs))  # repr: 0, 0.0, -0.0 and False are different constants
        if key not in self.seen:
            self.seen[key] = len(self.steps)
            self.steps.append(Step(op, args, attrs))
        return self.seen[key]

    def visit(self, node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self.function(_OPERATORS[type(node.op)], [node.left, node.right])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not _is_number(node.operand):
            return self.function("neg", [node.operand])
        if _is_number(node):
            return self.step("const", (), (_number(node),))
        if isinstance(node, ast.Name) and node.id in ("x", "w"):
            return self.step(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self.call(node.func.id, node.args)
        raise self.fail(f"{ast.unparse(node)!r} is not part of the language")

    def call(self, name: str, args: list[ast.expr]) -> int:
        special: dict[str, Callable[[list[ast.expr]], int]] = {
            "mm": self.mm,
            "b": self.bias,
            "cols": self.cols,
            "cast": self.cast,
            "stop": self.stop,
        }
        return special[name](args) if name in special else self.function(name, args)

    def function(self, name: str, args: list[ast.expr]) -> int:
        function = FUNCTIONS.get(name)
        if function is None:
            raise self.fail(f"unknown function {name!r}; known are mm, b, cols, cast, stop, {', '.join(FUNCTIONS)}")
        operands = len(function.partials)
        required = operands + sum(default is ... for default in function.attrs)
        self.expect(name, args, required, operands + len(function.attrs))
        indices = tuple(self.visit(arg) for arg in args[:operands])
        given = tuple(self.constant(arg) for arg in args[operands:])
        self.check_operands(name, indices)
        return self.step(name, indices, given + function.attrs[len(given) :])

    def check_operands(self, name: str, indices: tuple[int, ...]) -> None:
        numbers = [self.steps[index].op == "const" for index in indices]
        if all(numbers) or (any(numbers) and name in _ROWS_ONLY):
            raise self.fail(f"{name} of numbers; its operands must be rows (use clamp for a constant bound)")
        if name == "where" and numbers[0]:
            raise self.fail("the condition of where is a number; it must be rows")

    def mm(self, args: list[ast.expr]) -> int:
        self.expect("mm", args, 2)
        j = self.index(args[0], "mm")
        return self.step("mm", (self.rows(args[1], "mm"),), (j,))

    def bias(self, args: list[ast.expr]) -> int:
        self.expect("b", args, 1)
        return self.step("b", (), (self.index(args[0], "b"),))

    def cols(self, args: list[ast.expr]) -> int:
        self.expect("cols", args, 4)
        start, stop, step = (self.index(arg, "cols") for arg in args[1:])
        if step < 1 or stop <= start:
            raise self.fail(f"cols needs start < stop and step >= 1, got {start}, {stop}, {step}")
        return self.step("cols", (self.rows(args[0], "cols"),), (start, stop, step))

    def cast(self, args: list[ast.expr]) -> int:
        self.expect("cast", args, 2)
        name = args[1].value if isinstance(args[1], ast.Constant) else None
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if not isinstance(dtype, torch.dtype):
            raise self.fail(f"cast needs the name of a torch dtype in quotes, got {ast.unparse(args[1])}")
        return self.step("cast", (self.rows(args[0], "cast"),), (dtype,))

    def stop(self, args: list[ast.expr]) -> int:
        self.expect("stop", args, 1)
        return self.step("stop", (self.rows(args[0], "stop"),))

    def rows(self, node: ast.expr, name: str) -> int:
        index = self.visit(node)
        if self.steps[index].op == "const":
            raise self.fail(f"{name} of the number {ast.unparse(node)}; it takes rows")
        return index

    def index(self, node: ast.expr, name: str) -> int:
        value = self.constant(node)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.fail(f"{name} takes non-negative integers, got {ast.unparse(node)}")
        return value

    def constant(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and node.value is None:
            return None
        if not _is_number(node):
            raise self.fail(f"{ast.unparse(node)!r} must be a number or None")
        return _number(node)

    def expect(self, name: str, args: list[ast.expr], least: int, most: int | None = None) -> None:
        if not least <= len(args) <= (most or least):
            wanted = f"{least}" if most in (None, least) else f"{least} to {most}"
            raise self.fail(f"{name} takes {wanted} arguments, got {len(args)}")


def _is_number(node: ast.AST) -> bool:
    """A literal, a signed literal, or inf / nan, which have no literal."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _is_number(node.operand)
    if isinstance(node, ast.Name):
        return node.id in ("inf", "nan")
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def _number(node: ast.AST) -> float | int:
    if isinstance(node, ast.UnaryOp):
        return -_number(node.operand)
    if isinstance(node, ast.Name):
        return float(node.id)
    value: float | int = node.value  # type: ignore[attr-defined]
    return value
