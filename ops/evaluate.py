"""Runs a program forward and in reverse. Where rows, weights and their gradients live is the caller's business."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .functions import FUNCTIONS
from .infer import Value
from .program import Program, Step


class Reads(NamedTuple):
    """What a forward evaluation reads.

    x() -> [R, H]; w() -> [R, 1]; mm(step, rows) -> rows, where rows is None if the step is kept from the forward;
    bias(j) -> [out] or rows.
    """

    x: Callable[[], Any]
    w: Callable[[], Any]
    mm: Callable[[int, Any], Any]
    bias: Callable[[int], Any]


class Adjoints(NamedTuple):
    """What a reverse evaluation writes.

    mm(j, rows, grad, wanted) adds to weight j's gradient if it needs one (rows is None if not) and returns the
    gradient of rows if wanted; bias(j, grad) adds to bias j's gradient.
    """

    mm: Callable[[int, Any, Any, bool], Any]
    bias: Callable[[int, Any], None]


class Needs(NamedTuple):
    """Which inputs want a gradient: x, w, each weight and bias, and the scale of the result (see reverse)."""

    x: bool
    w: bool
    weights: tuple[bool, ...] = ()
    biases: tuple[bool, ...] = ()
    scale: bool = False


class Gradients(NamedTuple):
    """Of x [R, H], w [R, 1] and scale [R, 1]; None where not needed or zero."""

    x: Any
    w: Any
    scale: Any


class Plan(NamedTuple):
    """What a reverse evaluation touches.

    active: steps that a needed gradient flows through; wanted: steps whose value it reads; kept: products among them
    that come from the forward; scale: whether the scale of the result wants its gradient.
    """

    active: tuple[bool, ...]
    wanted: frozenset[int]
    kept: tuple[int, ...]
    scale: bool


@functools.lru_cache(maxsize=1024)
def reverse_plan(program: Program, needs: Needs, keep: bool) -> Plan:
    """The plan of a program's reverse; with keep, the values of its products come from the forward (kept)."""
    active = _active_steps(program, needs)
    direct = _read_in_reverse(program, needs, active)
    kept = {index for index in _with_arguments(program, direct, set()) if program.steps[index].op == "mm"}
    wanted = _with_arguments(program, direct, kept if keep else set())
    return Plan(tuple(active), frozenset(wanted), tuple(sorted(kept & wanted)) if keep else (), needs.scale)


def evaluate(program: Program, reads: Reads, plan: Plan | None = None) -> list[Any]:
    """The value of each step in order, the last one is the result.

    With a plan: only of those it wants, None for the others. Without: values that a later step overwrote are gone.
    """
    values: list[Any] = []
    overwriting = overwriting_steps(program)
    for index, step in enumerate(program.steps):
        args = [values[arg] for arg in step.args]
        if plan is not None and index not in plan.wanted:
            values.append(None)
        elif plan is None and index in overwriting and _fits(*args):
            values.append(_IN_PLACE[step.op](*args, out=args[0]))
        else:
            values.append(step_value(index, step, args, reads))
    return values


_IN_PLACE = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


@functools.lru_cache(maxsize=1024)
def overwriting_steps(program: Program) -> frozenset[int]:
    """Arithmetic on a function's result that nothing else reads, so that it may take that result's memory."""
    found = set()
    for index, step in enumerate(program.steps):
        if step.op in _IN_PLACE and program.steps[step.args[0]].op in FUNCTIONS and _reads_of(program, step.args[0]) == 1:
            found.add(index)
    return frozenset(found)


def _fits(a: Any, b: Any) -> bool:
    if not isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.is_floating_point()
    return isinstance(a, torch.Tensor) and a.dtype == b.dtype and a.dim() == 2 and a.numel() >= b.numel()


def reverse(
    program: Program,
    types: tuple[Value, ...],
    values: Sequence[Any],
    grad: Any,
    plan: Plan,
    adjoints: Adjoints,
    scale: Any = None,
) -> Gradients:
    """Gradients from that of the result, or of scale * result with scale [R, 1], which is [R, O].

    Each adjoint has its value's dtype and shape, as in autograd.
    """
    sums = _Sums(program, types, values, grad.shape[0])
    last = len(values) - 1
    scale_grad = None
    if scale is None:
        sums.add(last, grad)
    elif program.steps[last].op == "mm":
        scale_grad = _scaled_product(program.steps[last], values, grad, scale, plan, sums, adjoints)
    else:
        sums.add(last, grad * scale)
        scale_grad = (grad * values[last]).sum(1, keepdim=True) if plan.scale else None
    found = _propagate(program, values, plan, sums, adjoints)
    return Gradients(found["x"], found["w"], scale_grad)


def _scaled_product(step: Step, values: Sequence[Any], grad: Any, scale: Any, plan: Plan, sums: _Sums, adjoints: Adjoints) -> Any:
    """The last step y = e @ W, scaled: both e's gradient and the scale's come from grad @ W.T, so y itself is not needed.

    d scale = sum(grad * y) = sum((grad @ W.T) * e)
    """
    operand = step.args[0]
    rows = values[operand]
    scaled = None if rows is None else (rows * scale).to(rows.dtype)
    back = adjoints.mm(step.attrs[0], scaled, grad.to(sums.types[operand].dtype), plan.active[operand] or plan.scale)
    if plan.active[operand]:
        sums.add(operand, back * scale)
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (back.to(wide) * rows.to(wide)).sum(1, keepdim=True) if plan.scale else None


def _propagate(program: Program, values: Sequence[Any], plan: Plan, sums: _Sums, adjoints: Adjoints) -> dict[str, Any]:
    """Carries adjoints from the last step to the first; returns those of x and w."""
    found: dict[str, Any] = {"x": None, "w": None}
    for index in reversed(range(len(values))):
        step, total = program.steps[index], sums.take(index)
        if total is None or not plan.active[index]:
            continue
        if step.op in found:
            found[step.op] = total
        elif step.op == "b":
            adjoints.bias(step.attrs[0], total)
        elif step.op == "mm":
            operand = step.args[0]
            sums.add(operand, adjoints.mm(step.attrs[0], values[operand], total, plan.active[operand]))
        elif step.op == "cols":
            sums.add_columns(index, total)
        else:
            _spread(step, index, total, values, sums, plan.active)
    return found


class _Sums:
    """The adjoint of each step while it is being summed."""

    def __init__(self, program: Program, types: tuple[Value, ...], values: Sequence[Any], rows: int) -> None:
        self.program, self.types, self.values, self.rows = program, types, values, rows
        self.sums: list[Any] = [None] * len(types)
        self.owned: set[int] = set()  # sums that nothing else refers to, so they may be added to in place
        self.tilings = tilings(program, types)
        self.unwritten: dict[int, set[int]] = {}  # of a sum written slice by slice: the slices still undefined

    def take(self, index: int) -> Any:
        for tile in self.unwritten.get(index, ()):
            _columns(self.sums[index], self.program.steps[tile]).zero_()
        total, self.sums[index] = self.sums[index], None
        return total

    def shape(self, index: int) -> Any:
        value = self.values[index]
        return (self.rows, self.types[index].width) if value is None else value.shape

    def add(self, index: int, term: Any) -> None:
        if term is None:
            return
        # Sum over broadcast dimensions and cast, as autograd does between an output's and an input's gradient.
        term = term if term.shape == self.shape(index) else term.sum_to_size(self.shape(index))
        term = term.to(self.types[index].dtype)
        if self.sums[index] is None:
            self.sums[index] = term
        elif index in self.owned:
            self.sums[index].add_(term)
        else:
            self.sums[index] = self.sums[index] + term
            self.owned.add(index)

    def tile(self, index: int, like: Any) -> Any:
        """Where the only term of a column slice's adjoint may be written at once; None where there is no such place."""
        step = self.program.steps[index]
        if step.op != "cols" or step.args[0] not in self.tilings or self.tilings[step.args[0]][index] > 1:
            return None
        if like.dtype != self.types[index].dtype or like.shape != self.shape(index):
            return None
        return self._tile(index, like)

    def _tile(self, index: int, like: Any) -> Any:
        step = self.program.steps[index]
        whole = step.args[0]
        if self.sums[whole] is None:
            self.sums[whole] = like.new_empty(self.shape(whole))
            self.unwritten[whole] = set(self.tilings[whole])
        self.unwritten[whole].discard(index)
        return _columns(self.sums[whole], step)

    def add_columns(self, slice_index: int, term: Any) -> None:
        """Adds the adjoint of a column slice to that of its operand."""
        step = self.program.steps[slice_index]
        index = step.args[0]
        if index in self.tilings:
            self._tile(slice_index, term).copy_(term)
            return
        if index not in self.owned:
            whole = term.new_zeros(self.shape(index))
            self.sums[index] = whole if self.sums[index] is None else whole.add_(self.sums[index])
            self.owned.add(index)
        _columns(self.sums[index], step).add_(term)


@functools.lru_cache(maxsize=1024)
def tilings(program: Program, types: tuple[Value, ...]) -> dict[int, dict[int, int]]:
    """Steps that are only read through disjoint column slices that cover them; how many steps read each of the slices.

    Their adjoint is written slice by slice: one pass where zeros and a sum for each slice take five.
    """
    found = {}
    for index, value in enumerate(types[:-1]):
        readers = [(at, step) for at, step in enumerate(program.steps) if index in step.args]
        if readers and all(step.op == "cols" for _, step in readers):
            columns = [column for _, step in readers for column in range(*step.attrs)]
            if sorted(columns) == list(range(value.width)):
                found[index] = {at: _reads_of(program, at) for at, _ in readers}
    return found


def _reads_of(program: Program, index: int) -> int:
    """How often other steps read this one; the program's result counts as one."""
    return sum(step.args.count(index) for step in program.steps) + (index == len(program.steps) - 1)


def _spread(step: Step, index: int, total: Any, values: Sequence[Any], sums: _Sums, active: tuple[bool, ...]) -> None:
    """Adds a pointwise step's adjoint to those of its operands."""
    if step.op == "cast":
        sums.add(step.args[0], total)
        return
    operands = [values[arg] for arg in step.args]
    for arg, partial in zip(step.args, FUNCTIONS[step.op].partials, strict=True):
        if not active[arg] or partial is None:
            continue
        if partial.write is not None and (out := sums.tile(arg, total)) is not None:
            partial.write(out, total, values[index], *operands, *step.attrs)
        else:
            sums.add(arg, partial.adjoint(total, values[index], *operands, *step.attrs))


def step_value(index: int, step: Step, args: list[Any], reads: Reads) -> Any:
    """The value of one step from those of its arguments."""
    if step.op == "x":
        return reads.x()
    if step.op == "w":
        return reads.w()
    if step.op == "const":
        return step.attrs[0]
    if step.op == "mm":
        return reads.mm(index, args[0])
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


def _active_steps(program: Program, needs: Needs) -> list[bool]:
    """For each step, whether an input that needs a gradient reaches it."""
    active: list[bool] = []
    for step in program.steps:
        own = {"x": needs.x, "w": needs.w}.get(step.op, False)
        if step.op in ("mm", "b"):
            own = (needs.weights if step.op == "mm" else needs.biases)[step.attrs[0]]
        active.append(own or (step.op != "stop" and any(active[arg] for arg in step.args)))
    return active


def _read_in_reverse(program: Program, needs: Needs, active: list[bool]) -> set[int]:
    """Steps whose value an adjoint reads, and those whose shape is only known by evaluating them (biases)."""
    last = len(program.steps) - 1
    read: set[int] = set()
    if needs.scale:
        read.add(program.steps[last].args[0] if program.steps[last].op == "mm" else last)
    for index, step in enumerate(program.steps):
        if step.op == "mm" and needs.weights[step.attrs[0]]:
            read.add(step.args[0])
        if active[index] and not _has_rows(program, index):
            read.add(index)
        if active[index] and step.op in FUNCTIONS:
            names = dict(zip("yabc", (index, *step.args), strict=False))
            for arg, partial in zip(step.args, FUNCTIONS[step.op].partials, strict=True):
                if active[arg] and partial is not None:
                    read.update(names[name] for name in partial.reads)
    return read


def _has_rows(program: Program, index: int) -> bool:
    step = program.steps[index]
    return step.op in ("x", "w", "mm") or any(_has_rows(program, arg) for arg in step.args)


def _with_arguments(program: Program, steps: set[int], given: set[int]) -> set[int]:
    """The steps and everything they are computed from; given ones need nothing."""
    found, todo = set(), list(steps)
    while todo:
        index = todo.pop()
        if index not in found:
            found.add(index)
            todo.extend(() if index in given else program.steps[index].args)
    return found
