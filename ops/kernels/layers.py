"""An expert program as layers: each some products of the same rows, and what is computed from them where they stand in registers.

    mm(1, silu(cols(mm(0, x), 0, I, 1)) * cols(mm(0, x), I, 2*I, 1))
    = layer 0: h[:, j] = silu(p0) * p1,  p0 = (x @ W0)[:, j], p1 = (x @ W0)[:, I + j]
      layer 1: y[:, j] = p0,             p0 = (h @ W1)[:, j]

A layer without products comes first where rows are changed before their product: "mm(0, x * w)" is x * w, then a product of that.
A column slice is pushed down to what it is taken of, so a product or a bias is read at columns start + step * j. What is computed from
them becomes the source of a Triton function, which the kernels get as their EPILOGUE. Values are float32 between two products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from moe_compile.ops.functions import FUNCTIONS
from moe_compile.ops.infer import Value
from moe_compile.ops.layout import Slot
from moe_compile.ops.program import Program, Step

MOST_PRODUCTS = 2
MOST_BIASES = 2
UNKNOWN = 2  # a typical width: more than a number for each row


class Unfit(Exception):
    """Why the kernels do not compute a program."""


class Columns(NamedTuple):
    """Columns start + step * j of weight or bias number `of`."""

    of: int
    start: int
    step: int


class Op(NamedTuple):
    """name = function(args, attrs) of an epilogue. args: p0, p1 products, b0, b1 biases, w, names of ops before, numbers as text."""

    name: str
    function: str
    args: tuple[str, ...]
    attrs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One grouped product: out[:, j] = epilogue(products' columns, biases' columns, w), j < width. Without products: of x and w.

    operand: dtype that rows and weights are multiplied in; dtype: of out; body: the epilogue, whose value is called `result`.
    """

    operand: torch.dtype
    products: tuple[Columns, ...]
    biases: tuple[Columns, ...]
    reads_w: bool
    width: int
    dtype: torch.dtype
    body: tuple[Op, ...]
    result: str

    @property
    def plain(self) -> bool:
        """Is the result the product?"""
        return self.result == "p0" and len(self.products) == 1


@functools.lru_cache(maxsize=256)
def layers_of(program: Program, values: tuple[Value, ...]) -> tuple[Layer, ...]:
    """The program's layers, first one first. Raises Unfit with the reason where it has no such form."""
    found: list[Layer] = []
    at: int | None = len(program.steps) - 1
    while at is not None:
        builder = _Builder(program, values)
        found.append(builder.layer(at))
        at = _rows(program, builder.operand) if found[-1].products else None
    if not any(layer.products for layer in found):
        raise Unfit(f"{program.text!r} has no product")
    return tuple(reversed(found))


def unfit(program: Program, dtype: torch.dtype, layouts: Sequence[Slot] = ()) -> str | None:
    """Why the kernels do not compute a program of rows of a dtype, as far as that shows without widths. layouts: of the weights."""
    try:
        layers = typical_layers(program, dtype)
    except Unfit as reason:
        return str(reason)
    for layer in layers if layouts else ():
        if len({(layouts[each.of].stacked, layouts[each.of].axes) for each in layer.products}) > 1:
            return f"the products of a layer of {program.text!r} read weights that lie differently"
    return None


def typical_layers(program: Program, dtype: torch.dtype) -> tuple[Layer, ...]:
    """The layers where nothing is known of widths: right in all but widths that no column slice tells. Raises Unfit."""
    values: list[Value] = []
    for step in program.steps:
        values.append(_typical(step, dtype, values))
    return layers_of(program, tuple(values))


def _typical(step: Step, dtype: torch.dtype, before: Sequence[Value]) -> Value:
    """A step's type where nothing is known of widths."""
    if step.op == "const":
        return Value(0, None, step.attrs[0])
    if step.op == "cols":
        start, stop, stride = step.attrs
        return Value(len(range(start, stop, stride)), before[step.args[0]].dtype)
    if step.op in ("x", "mm", "b", "w"):
        return Value(1 if step.op == "w" else UNKNOWN, dtype)
    width = max(before[arg].width for arg in step.args)
    return Value(width, torch.bool if step.op in FUNCTIONS and FUNCTIONS[step.op].result == "bool" else dtype)


def _rows(program: Program, operand: int) -> int | None:
    """The step that makes a product's rows; None if they are x, maybe cast."""
    at = operand
    while program.steps[at].op in ("cast", "stop"):
        at = program.steps[at].args[0]
    return None if program.steps[at].op == "x" else operand


@dataclass
class _Builder:
    """Walks from a layer's result to its products."""

    program: Program
    values: tuple[Value, ...]
    products: list[Columns] = field(default_factory=list)
    biases: list[Columns] = field(default_factory=list)
    body: list[Op] = field(default_factory=list)
    names: dict[tuple[int, int, int], str] = field(default_factory=dict)
    reads_w: bool = False
    reads_x: bool = False
    operand: int = -1

    def layer(self, at: int) -> Layer:
        result = self.value(at, 0, 1)
        if self.reads_x and (self.products or self.biases):
            raise Unfit(f"{self.program.text!r} reads x beside a product or a bias")
        if len(self.products) > MOST_PRODUCTS or len(self.biases) > MOST_BIASES:
            raise Unfit(
                f"{self.program.text!r} computes with {len(self.products)} products and {len(self.biases)} biases at a time, the kernels "
                f"take up to {MOST_PRODUCTS} and {MOST_BIASES}"
            )
        dtype, width = self.values[at].dtype, self.values[at].width
        operand = self.values[self.operand if self.products else at].dtype
        if dtype not in FLOATS or operand not in FLOATS:
            raise Unfit(f"{self.program.text!r} multiplies {operand} and gives {dtype}; the kernels take float32, bfloat16 and float16")
        ordered, names = self.in_order()
        body = tuple(op._replace(args=tuple(names.get(arg, arg) for arg in op.args)) for op in self.body)
        return Layer(operand, ordered, tuple(self.biases), self.reads_w, int(width), dtype, body, names.get(result, result))

    def in_order(self) -> tuple[tuple[Columns, ...], dict[str, str]]:
        """The products as they lie in memory, and their names then."""
        ordered = tuple(sorted(self.products))
        return ordered, {f"p{i}": f"p{ordered.index(each)}" for i, each in enumerate(self.products)}

    def value(self, at: int, start: int, step: int) -> str:
        """The name of a step's value at columns start + step * j."""
        if self.values[at].dtype is not None and self.values[at].width == 1:
            start, step = 0, 0  # the same for all j
        key = at, start, step
        if key not in self.names:
            self.names[key] = self._value(at, start, step)
        return self.names[key]

    def _value(self, at: int, start: int, step: int) -> str:
        s = self.program.steps[at]
        if s.op == "const":
            return _literal(s.attrs[0])
        if s.op in ("cast", "stop"):
            return self.value(s.args[0], start, step)
        if s.op == "cols":
            first, _, stride = s.attrs
            return self.value(s.args[0], first + stride * start, stride * step)
        if s.op == "mm":
            return self.product(at, start, step)
        if s.op == "b":
            return _leaf(self.biases, "b", Columns(s.attrs[0], start, step))
        if s.op == "w":
            self.reads_w = True
            return "w"
        if s.op == "x":
            if (start, step) != (0, 1):
                raise Unfit(f"{self.program.text!r} reads single columns of x")
            self.reads_x = True
            return "p0"
        return self.call(at, start, step)

    def product(self, at: int, start: int, step: int) -> str:
        (operand,) = self.program.steps[at].args
        if self.operand not in (-1, operand):
            raise Unfit(f"{self.program.text!r} computes with products of different rows at a time")
        self.operand = operand
        return _leaf(self.products, "p", Columns(self.program.steps[at].attrs[0], start, step))

    def call(self, at: int, start: int, step: int) -> str:
        s = self.program.steps[at]
        args = tuple(self.number(arg, start, step, keep_bool=s.op == "where" and i == 0) for i, arg in enumerate(s.args))
        return self.add(s.op, args, tuple(map(_literal, s.attrs)))

    def number(self, at: int, start: int, step: int, keep_bool: bool) -> str:
        name = self.value(at, start, step)
        return self.add("number", (name,)) if self.values[at].dtype == torch.bool and not keep_bool else name

    def add(self, function: str, args: tuple[str, ...], attrs: tuple[str, ...] = ()) -> str:
        name = f"v{len(self.body)}"
        self.body.append(Op(name, function, args, attrs))
        return name


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _leaf(known: list[Columns], prefix: str, columns: Columns) -> str:
    if columns not in known:
        known.append(columns)
    return f"{prefix}{known.index(columns)}"


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return repr(value) if value is None else repr(float(value))
    return f'float("{float(value)!r}")' if value != value or value in (float("inf"), float("-inf")) else repr(float(value))
