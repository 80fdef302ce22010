"""Runs a program forward and in reverse. Where rows, weights and their gradients live is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .functions import FUNCTIONS
from .program import Program, Step


class Reads(NamedTuple):
    """What a forward evaluation reads: x [R, H], w [R, 1] or None, mm(j, rows) -> rows, bias(j) -> [out] or rows."""

    x: Any
    w: Any
    mm: Callable[[int, Any], Any]
    bias: Callable[[int], Any]


class Adjoints(NamedTuple):
    """What a reverse evaluation writes.

    mm(j, rows, grad, wanted) adds to weight j's gradient and returns the gradient of rows (None if not wanted);
    bias(j, grad) adds to bias j's gradient.
    """

    mm: Callable[[int, Any, Any, bool], Any]
    bias: Callable[[int, Any], None]


class Needs(NamedTuple):
    """Which inputs want a gradient: x, w, weight j, bias j."""

    x: bool
    w: bool
    weight: Callable[[int], bool]
    bias: Callable[[int], bool]


def evaluate(program: Program, reads: Reads) -> list[Any]:
    """The value of every step, in order; the last one is the result [R, O] (or something that broadcasts to it)."""
    values: list[Any] = []
    for step in program.steps:
        values.append(_value(step, [values[arg] for arg in step.args], reads))
    return values


def reverse(program: Program, values: list[Any], grad: Any, needs: Needs, adjoints: Adjoints) -> tuple[Any, Any]:
    """Gradients of x [R, H] and w [R, 1] (None where not needed or zero), from evaluate's values and the result's grad.

    Each adjoint has its value's dtype and shape, as in autograd. Recomputes nothing.
    """
    active = active_steps(program, needs)
    sums: list[Any] = [None] * len(values)
    sums[-1] = _fit(grad, values[-1])
    found: dict[str, Any] = {"x": None, "w": None}
    for index in reversed(range(len(values))):
        step, total = program.steps[index], sums[index]
        sums[index] = None
        if total is None or not active[index]:
            continue
        if step.op in found:
            found[step.op] = total
        elif step.op == "b":
            adjoints.bias(step.attrs[0], total)
        elif step.op == "mm":
            operand = step.args[0]
            _add(sums, operand, adjoints.mm(step.attrs[0], values[operand], total, active[operand]))
        else:
            _spread(step, index, total, values, sums, active)
    return found["x"], found["w"]


def active_steps(program: Program, needs: Needs) -> list[bool]:
    """For each step, whether an input that needs a gradient reaches it."""
    active: list[bool] = []
    for step in program.steps:
        own = {
            "x": lambda step: needs.x,
            "w": lambda step: needs.w,
            "b": lambda step: needs.bias(step.attrs[0]),
            "mm": lambda step: needs.weight(step.attrs[0]),
        }.get(step.op)
        reached = step.op != "stop" and any(active[arg] for arg in step.args)
        active.append(reached or (own is not None and own(step)))
    return active


def _value(step: Step, args: list[Any], reads: Reads) -> Any:
    if step.op == "x":
        return reads.x
    if step.op == "w":
        return reads.w
    if step.op == "const":
        return step.attrs[0]
    if step.op == "mm":
        return reads.mm(step.attrs[0], args[0])
    if step.op == "b":
        return reads.bias(step.attrs[0])
    if step.op == "cols":
        return _columns(args[0], step)
    if step.op == "cast":
        return args[0].to(step.attrs[0])
    if step.op == "stop":
        return args[0]
    return FUNCTIONS[step.op].forward(*args, *step.attrs)


def _columns(rows: Any, step: Step) -> Any:
    start, stop, stride = step.attrs
    return rows[..., start:stop:stride]


def _spread(step: Step, index: int, total: Any, values: list[Any], sums: list[Any], active: list[bool]) -> None:
    """Adds a pointwise step's adjoint to those of its operands."""
    operands = [values[arg] for arg in step.args]
    if step.op == "cols":
        _add_columns(sums, step, operands[0], total)
        return
    partials = (lambda g, y, a, *_: g,) if step.op == "cast" else FUNCTIONS[step.op].partials
    for arg, operand, partial in zip(step.args, operands, partials, strict=True):
        if active[arg] and partial is not None:
            _add(sums, arg, _fit(partial(total, values[index], *operands, *step.attrs), operand))


def _add(sums: list[Any], arg: int, term: Any) -> None:
    if term is not None:
        sums[arg] = term if sums[arg] is None else sums[arg] + term


def _add_columns(sums: list[Any], step: Step, operand: Any, term: Any) -> None:
    whole = operand.new_zeros(operand.shape)
    _columns(whole, step).copy_(term)
    _add(sums, step.args[0], whole)


def _fit(grad: Any, value: Any) -> Any:
    """Sums over broadcast dimensions and casts, as autograd does between an output's and an input's gradient."""
    if grad.shape != value.shape:
        grad = grad.sum_to_size(value.shape)
    return grad if grad.dtype == value.dtype else grad.to(value.dtype)
