"""Sizes and numbers as symbols, and the answers to what Python asks about them while a module is recorded.

Two kinds of symbols. A size of the inputs has a value now: what Python decides by it holds for calls that decide alike, so the question
becomes a condition of the program. A number that only the data tells (rows of `nonzero`, `.item()`) has none: "is it empty?" is answered
with no, as code that runs over no rows adds nothing (check.py tries both), and any other question is a refusal.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import sympy
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv, SymT, symbol_is_type

from moe_compile.probing.errors import Asked, asked_by_user, code_of, users_frame, where

LARGEST_LIMIT = 32  # of a number of rows; the check has calls with up to 64


class Numbers(ShapeEnv):
    """A ShapeEnv that answers the user's Python, and notes what it answered."""

    def __init__(self) -> None:
        super().__init__(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        self.conditions: dict[sympy.Basic, bool] = {}  # on sizes of the inputs
        self.assumptions: dict[str, None] = {}
        self.countable: set[sympy.Symbol] = set()  # numbers of the data that are numbers of rows
        self.answering = False

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.answering or kwargs.get("fallback_value") is not None or not asked_by_user():
            return super().evaluate_expr(orig_expr, *args, **kwargs)
        if any(_of_data(s) for s in orig_expr.free_symbols):
            return sympy.true if self.not_empty(orig_expr) else sympy.false
        answer = super().evaluate_expr(orig_expr, *args, **kwargs)
        if orig_expr.free_symbols and (isinstance(orig_expr, sympy.logic.boolalg.Boolean) or orig_expr.is_Relational):
            self.conditions[orig_expr] = bool(answer)
        elif orig_expr.free_symbols:  # int(size): the program is for this size alone
            self.conditions[sympy.Eq(orig_expr, answer)] = True
        return answer

    def not_empty(self, question: sympy.Basic) -> bool:
        """The answer to "is it empty?", for which the number is taken to be at least one."""
        answer, place = emptiness(question), where(users_frame())
        told = "where no rows are left, what is skipped adds nothing"
        if answer is None:
            answer, told = many(question), "with fewer rows than the limit, the code for more of them does the same"
        if answer is None or not {s for s in question.free_symbols if _of_data(s)} <= self.countable | self._rows(question):
            code = code_of(users_frame())
            raise Asked(f"{place}: Python decides by a number that only the data tells, and not by whether it is zero{code}")
        self.assumptions[f"{place}: {told}"] = None
        return answer

    def _rows(self, question: sympy.Basic) -> set[sympy.Symbol]:
        """Symbols that torch made as the size of a result: numbers of rows."""
        return {s for s in question.free_symbols if s in self.size_like}


def _of_data(s: sympy.Symbol) -> bool:
    return symbol_is_type(s, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))


def of_data(n: torch.SymInt | torch.SymFloat) -> bool:
    """Is it a number that only the data tells, or computed from one?"""
    return any(_of_data(s) for s in n.node.expr.free_symbols)


def emptiness(question: sympy.Basic) -> bool | None:
    """What a question of the form "is it (not) empty?" says of a number above zero; None for other questions.

    `start == end` is one, where the end is the start and such a number.
    """
    if not isinstance(question, sympy.core.relational.Relational):
        return None
    more, counted = (question.lhs - question.rhs).as_coeff_Add()
    sign, symbol = counted.as_coeff_Mul()
    if not isinstance(symbol, sympy.Symbol) or sign not in (1, -1) or not more.is_Integer:
        return None
    kind, limit = question.rel_op, int(-sign * more)
    if sign < 0:
        kind = _TURNED.get(kind, kind)
    return {("==", 0): False, ("!=", 0): True, (">", 0): True, (">=", 1): True, ("<=", 0): False, ("<", 1): False}.get((kind, limit))


_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def many(question: sympy.Basic) -> bool | None:
    """What a question whether a number of rows exceeds a limit says where it does. The check tries numbers on both sides of it."""
    if not isinstance(question, sympy.core.relational.Relational):
        return None
    left, right, kind = question.lhs, question.rhs, question.rel_op
    if not isinstance(left, sympy.Symbol) or not _of_data(left):
        left, right, kind = right, left, _TURNED.get(kind, kind)
    if not isinstance(left, sympy.Symbol) or not _of_data(left) or any(_of_data(s) for s in right.free_symbols):
        return None
    if isinstance(right, sympy.Integer) and int(right) > LARGEST_LIMIT:
        return None
    return {">": True, ">=": True, "<": False, "<=": False}.get(kind)


# ---------------------------------------------------------------- Python's own functions of numbers
class _Type(type):
    """A type that also knows symbols: int(n / 2) stays a symbol."""

    real: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor | torch.SymInt | torch.SymFloat):
            return cls.real(*args, **kwargs)
        x = args[0].item() if isinstance(args[0], torch.Tensor) else args[0]
        if not isinstance(x, torch.SymInt | torch.SymFloat):
            return cls.real(x)
        return torch.sym_int(x) if cls.real is int else torch.sym_float(x)

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, (cls.real, torch.SymInt if cls.real is int else torch.SymFloat))

    def __subclasscheck__(cls, c: type) -> bool:
        return issubclass(c, cls.real)


def _type(real: type) -> Any:
    return _Type(real.__name__, (), {"real": real})


class _SetType(type):
    """set, which also knows lists of ids as long as the data tells."""

    def __call__(cls, *args: Any) -> Any:
        different = getattr(args[0], "different", None) if len(args) == 1 and isinstance(args[0], list) else None
        return set(*args) if different is None else different()

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, set)

    def __subclasscheck__(cls, c: type) -> bool:
        return issubclass(c, set)


def _extreme(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(*args: Any, **kwargs: Any) -> Any:
        numbers = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
        if len(numbers) > 1 and any(_whole(x) for x in numbers) and all(_whole(x) or isinstance(x, int | torch.SymInt) for x in numbers):
            numbers = [x.item() if _whole(x) else x for x in numbers]
        if kwargs or not any(isinstance(x, torch.SymInt | torch.SymFloat) for x in numbers):
            return plain(*args, **kwargs)
        if not all(isinstance(x, int | float | torch.SymInt | torch.SymFloat) for x in numbers):
            return plain(*args, **kwargs)
        return functools.reduce(symbolic, numbers)

    return extreme


def _whole(x: Any) -> bool:
    """A tensor that is one whole number, with which Python calculates as with a number."""
    return isinstance(x, torch.Tensor) and x.dim() == 0 and x.dtype is torch.int64


def length_of(x: Any) -> Any:
    """Tensors tell their length as a symbol."""
    return x.shape[0] if isinstance(x, torch.Tensor) and x.dim() and isinstance(x.shape[0], torch.SymInt) else len(x)


_SHIMS: dict[str, Any] = {
    "int": _type(int),
    "float": _type(float),
    "max": _extreme(max, torch.sym_max),
    "min": _extreme(min, torch.sym_min),
    "len": length_of,
    "set": _SetType("set", (), {}),
}


@contextlib.contextmanager
def whole_numbers(module: nn.Module, more: dict[str, Any]) -> Iterator[None]:
    """Within, `int(n)`, `max(n, 4)` and the like keep symbols in the files that the module's classes are written in.

    more: other such functions.
    """
    shims = {**_SHIMS, **more}
    homes = {base.__module__ for m in module.modules() for base in type(m).__mro__}
    with contextlib.ExitStack() as stack:
        for name in sorted(homes):
            home = sys.modules.get(name)
            if home is not None and name.partition(".")[0] not in ("torch", "builtins", "moe_compile"):
                stack.enter_context(mock.patch.dict(vars(home), {n: f for n, f in shims.items() if n not in vars(home)}))
        yield
