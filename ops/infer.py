"""Widths and dtypes of a program's values, without running it: what fakes and buffer plans need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .functions import FUNCTIONS
from .program import Program, Step


class Value(NamedTuple):
    """Type of one value: width of its rows (an int or SymInt; 0 for a number) and dtype (None for a number)."""

    width: Any
    dtype: Any
    number: Any = None


class Inputs(NamedTuple):
    """Types of what a program reads: the row, the routing weight (None: not given), weights (in, out), biases."""

    x: Value
    w: Value | None
    weights: tuple[tuple[Any, Any], ...]
    biases: tuple[Value, ...]


def infer(program: Program, inputs: Inputs) -> tuple[Value, ...]:
    """The type of each step. Raises ValueError naming the program and the step that does not fit its operands."""
    widths = [inputs.x.width, *(width for pair in inputs.weights for width in pair)]
    if all(type(width) is int for width in widths):
        return _infer_cached(program, inputs, torch.get_default_dtype())
    return _infer(program, inputs)  # SymInts have no hash


@functools.lru_cache(maxsize=1024)
def _infer_cached(program: Program, inputs: Inputs, default_dtype: Any) -> tuple[Value, ...]:
    return _infer(program, inputs)


def _infer(program: Program, inputs: Inputs) -> tuple[Value, ...]:
    values: list[Value] = []
    for step in program.steps:
        try:
            values.append(_infer_step(step, [values[arg] for arg in step.args], inputs))
        except _Misfit as error:
            raise ValueError(f"expert program {program.text!r}: {error}") from None
    return tuple(values)


def product_dtypes(program: Program, x: Any, w: Any = torch.float32, bias: Any = torch.float32) -> tuple[Any, ...]:
    """The dtype of the rows of each product, from the dtypes of what the program reads; widths play no part."""
    values: list[Value] = []
    for step in program.steps:
        args = [values[arg] for arg in step.args]
        known = {"x": x, "w": w, "b": bias, "cast": step.attrs[0] if step.op == "cast" else None}
        if step.op in known:
            values.append(Value(1, known[step.op]))
        elif step.op in ("mm", "cols", "stop"):
            values.append(args[0])
        else:
            values.append(Value(0, None, step.attrs[0]) if step.op == "const" else Value(1, _result_dtype(step, args)))
    return tuple(values[step.args[0]].dtype for step in program.steps if step.op == "mm")


class _Misfit(Exception):
    pass


def _infer_step(step: Step, args: list[Value], inputs: Inputs) -> Value:
    if step.op in _SPECIAL:
        return _SPECIAL[step.op](step, args, inputs)
    return Value(_broadcast(step, args), _result_dtype(step, args))


def _const(step: Step, args: list[Value], inputs: Inputs) -> Value:
    return Value(0, None, step.attrs[0])


def _w(step: Step, args: list[Value], inputs: Inputs) -> Value:
    if inputs.w is None:
        raise _Misfit("reads w, but topk_weights is None")
    return inputs.w


def _mm(step: Step, args: list[Value], inputs: Inputs) -> Value:
    fan_in, fan_out = inputs.weights[step.attrs[0]]
    if args[0].width != fan_in:
        raise _Misfit(f"mm({step.attrs[0]}, ...) takes rows of width {fan_in}, got {args[0].width}")
    return Value(fan_out, args[0].dtype)


def _cols(step: Step, args: list[Value], inputs: Inputs) -> Value:
    start, stop, stride = step.attrs
    if stop > args[0].width:
        raise _Misfit(f"cols up to {stop} of rows of width {args[0].width}")
    return Value(-(-(stop - start) // stride), args[0].dtype)


def _cast(step: Step, args: list[Value], inputs: Inputs) -> Value:
    return Value(args[0].width, step.attrs[0])


_SPECIAL: dict[str, Callable[[Step, list[Value], Inputs], Value]] = {
    "x": lambda step, args, inputs: inputs.x,
    "w": _w,
    "const": _const,
    "mm": _mm,
    "b": lambda step, args, inputs: inputs.biases[step.attrs[0]],
    "cols": _cols,
    "cast": _cast,
    "stop": lambda step, args, inputs: args[0],
}


def _broadcast(step: Step, args: list[Value]) -> Any:
    width: Any = 1
    for arg in args:
        if arg.dtype is None or arg.width == 1 or arg.width == width:
            continue
        if width != 1:
            raise _Misfit(f"{step.op} of rows of width {width} and {arg.width}")
        width = arg.width
    return width


def _result_dtype(step: Step, args: list[Value]) -> Any:
    kind = FUNCTIONS[step.op].result
    if kind == "bool":
        return torch.bool
    operands = args[1:] if kind == "where" else args
    numbers = [arg.number for arg in operands if arg.dtype is None]
    if step.op in ("clamp", "pow"):
        numbers += [attr for attr in step.attrs if attr is not None]
    dtype = _promote([arg.dtype for arg in operands if arg.dtype is not None], numbers)
    return torch.get_default_dtype() if kind == "float" and not dtype.is_floating_point else dtype


def _promote(dtypes: list[Any], numbers: list[Any]) -> Any:
    """torch's rule: tensors promote among themselves, a number only lifts to its category's default type."""
    dtype = dtypes[0] if dtypes else (torch.get_default_dtype() if _has_float(numbers) else torch.int64)
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    if dtype.is_floating_point:
        return dtype
    if _has_float(numbers):
        return torch.get_default_dtype()
    return torch.int64 if dtype == torch.bool and any(type(number) is int for number in numbers) else dtype


def _has_float(numbers: list[Any]) -> bool:
    return any(isinstance(number, float) for number in numbers)
