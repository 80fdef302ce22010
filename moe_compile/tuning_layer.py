"""What `moe-compile tune` tunes: a layer and a number of tokens, the questions that its kernels ask configs.py, and answers to try."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moe_compile import tuning_scaled
from moe_compile.ops.infer import Inputs, Value, infer
from moe_compile.ops.kernels import configs, tuned
from moe_compile.ops.kernels.layers import Layer, Unfit, layers_of
from moe_compile.ops.kernels.tiles import Shape, Strip, Tiles
from moe_compile.ops.kernels.tuned import Entry
from moe_compile.ops.kernels.tuned_file import value_from
from moe_compile.ops.layout import parse_layout
from moe_compile.ops.program import Program, parse

LAYOUTS = ("eoi", "eio", "oi*", "io*")
DTYPES = ("bfloat16", "float16", "float32")
BLOCK_ROWS = (16, 32, 64, 128)
MOST_ACCUMULATED = 128  # float32 numbers of a thread; more spill
MOST_HELD = 256  # weights of a thread in single slots


@dataclass(frozen=True)
class Work:
    """A layer. layout: of each weight, one of LAYOUTS. program: what an expert computes of a row (ops/program.py). quant: a kind of
    ops/quantized.py that weights have, "" for plain ones."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str
    layout: str
    program: str
    quant: str = ""

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, there are {self.experts} experts: give at most that many")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; give one of {', '.join(DTYPES)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; give one of {', '.join(LAYOUTS)}")
        if self.quant:
            tuning_scaled.check(self.quant, self.dtype, self.layout)

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def layouts(self) -> str:
        """Of all weights, as the ops take it."""
        one = self.layout.replace("*", f"*{self.experts}") + (f":{self.quant}" if self.quant else "")
        return ",".join([one] * parse(self.program).num_weights)


def gated(gate: str, intermediate: int) -> str:
    """The usual expert: gate and up in one weight, gate first."""
    return f"mm(1, {gate}(cols(mm(0, x), 0, {intermediate}, 1)) * cols(mm(0, x), {intermediate}, {2 * intermediate}, 1))"


@dataclass(frozen=True)
class Point:
    work: Work
    tokens: int

    def __str__(self) -> str:
        return f"{self.tokens} token{'s' if self.tokens > 1 else ''}"

    @property
    def slots(self) -> int:
        return self.tokens * self.work.top_k


@dataclass(frozen=True)
class Choice:
    """Block rows (0: single slots, without blocks), and the Tiles or Strip of each layer that has a product."""

    rows: int
    layers: tuple[Any, ...]

    def __str__(self) -> str:
        return " | ".join(_short(each) for each in self.layers)


def _short(value: Tiles | Strip) -> str:
    numbers = [f"{name} {each}" for name, each in asdict(value).items() if not isinstance(each, bool)]
    return " ".join(numbers + [name for name, each in asdict(value).items() if each is True])


def choice_json(choice: Choice) -> dict[str, Any]:
    return {"rows": choice.rows, "layers": [asdict(each) for each in choice.layers]}


def choice_from(data: dict[str, Any]) -> Choice:
    kind = Tiles if data["rows"] else Strip
    return Choice(int(data["rows"]), tuple(value_from(each, kind) for each in data["layers"]))


# ---------------------------------------------------------------- the layer
def fans(work: Work) -> list[tuple[int, int]]:
    """(in, out) of each weight. A product's width is what columns are taken of it, else the intermediate size; the last one's is hidden."""
    return _sizes(work)[0]


def bias_widths(work: Work) -> list[int]:
    return _sizes(work)[1]


@functools.lru_cache(maxsize=64)
def _sizes(work: Work) -> tuple[list[tuple[int, int]], list[int]]:
    program = parse(work.program)
    outs = {step.attrs[0]: work.intermediate for step in program.steps if step.op == "mm"}
    for step in program.steps:
        if step.op == "cols":
            for j in _made_of(program, step.args[0], "mm"):
                outs[j] = max(outs[j] if outs[j] != work.intermediate else 0, step.attrs[1])
    for j in _made_of(program, len(program.steps) - 1, "mm"):
        outs[j] = work.hidden
    widths: list[int] = []
    weights: dict[int, tuple[int, int]] = {}
    biases: dict[int, int] = {}
    for step in program.steps:
        inside = [widths[arg] for arg in step.args]
        if step.op == "mm":
            weights[step.attrs[0]] = inside[0], outs[step.attrs[0]]
        widths.append(_width(step.op, step.attrs, inside, work, outs))
    for at, step in enumerate(program.steps):
        if step.op != "b":
            continue
        beside = [arg for other in program.steps if at in other.args for arg in other.args if arg != at]
        biases[step.attrs[0]] = max((widths[arg] for arg in beside), default=work.hidden)
    return [weights[j] for j in sorted(weights)], [biases[j] for j in sorted(biases)]


def _width(op: str, attrs: tuple[Any, ...], inside: list[int], work: Work, outs: dict[int, int]) -> int:
    if op == "cols":
        start, stop, step = attrs
        return -(-(stop - start) // step)
    known = {"x": work.hidden, "mm": outs[attrs[0]] if op == "mm" else 0}
    return known.get(op, max(inside, default=1))


def _made_of(program: Program, at: int, op: str) -> set[int]:
    """Numbers of the products that a step is computed of, up to the next product."""
    step = program.steps[at]
    if step.op == op:
        return {step.attrs[0]}
    return set().union(*(_made_of(program, arg, op) for arg in step.args))


@functools.lru_cache(maxsize=64)
def layers(work: Work) -> tuple[Layer, ...]:
    """The kernels' layers. Raises ValueError with the reason where they do not compute the program."""
    program = parse(work.program)
    w = Value(1, torch.float32) if program.uses_w else None
    x = Value(work.hidden, work.torch_dtype)
    biases = tuple(Value(width, work.torch_dtype) for width in bias_widths(work))
    if work.quant:
        tuning_scaled.check_inputs(work.quant, fans(work))
    try:
        return layers_of(program, infer(program, Inputs(x, w, tuple(fans(work)), biases)))
    except Unfit as reason:
        raise ValueError(f"there is nothing to tune: {reason}") from None


# ---------------------------------------------------------------- questions and answers
def is_few(point: Point) -> bool:
    """Are slots computed one by one?"""
    work = point.work
    each = configs.few(point.tokens, work.top_k) and bool(layers(work)[0].products)
    return each and (not work.quant or tuning_scaled.singly(work.quant, fans(work)))


def untunable(point: Point) -> str | None:
    """Why there is nothing to try."""
    if point.work.quant and is_few(point):
        return f"{point}: a token's slots with {point.work.quant} weights are computed one by one, by kernels that have nothing to tune"
    return None


def questions(point: Point) -> list[tuple[str, Shape]]:
    """(role, shape) of each layer with a product, as launch.py and launch_few.py ask."""
    work, few, own = point.work, is_few(point), layers(point.work)
    if work.quant:
        return tuning_scaled.questions(work.quant, work.layout, own, fans(work), point.slots, work.experts, work.hidden)
    axes = [slot.axes + ("" if slot.stacked else "*") for slot in parse_layout(work.layouts)]
    inner, found = work.hidden, []
    for index, layer in enumerate(own):
        if layer.products:
            layout = axes[layer.products[0].of]
            shape = Shape(point.slots, work.experts, inner, layer.width, len(layer.products), layer.operand.itemsize, layout)
            few_role = tuned.few_role(layout.startswith("oi"), index == len(own) - 1)
            found.append((few_role if few else tuned.NEXT if index else tuned.FIRST, shape))
        inner = layer.width
    return found


def rules(point: Point, rows: int = 0) -> Choice:
    """What is chosen where nothing was measured; rows: for blocks of so many."""
    asked = questions(point)
    with tuned.only(()):
        if point.work.quant:
            quant = point.work.quant
            rows = rows or tuning_scaled.block_rows(quant, asked, tuning_scaled.has_roles(quant, layers(point.work)))
            return Choice(rows, tuple(tuning_scaled.tiles(quant, role, shape, rows) for role, shape in asked))
        if is_few(point):
            along, plain = asked[0][1].layout.startswith("oi"), not layers(point.work)[-1].body
            return Choice(0, tuple(configs.strip(shape, along, "last" in role, plain=plain) for role, shape in asked))
        rows = rows or configs.block_rows(_rows_shape(point))
        return Choice(rows, tuple(configs.tiles(shape, rows, role == tuned.FIRST) for role, shape in asked))


def _rows_entry(point: Point, rows: int) -> Entry:
    asked, quant = questions(point), point.work.quant
    if quant:
        shape = tuning_scaled.rows_shape(asked, tuning_scaled.has_roles(quant, layers(point.work)))
        return tuned.entry(tuned.SCALED_ROWS, shape, 0, rows)
    return tuned.entry(tuned.ROWS, _rows_shape(point), 0, rows)


def _rows_shape(point: Point) -> Shape:
    return replace(questions(point)[0][1], inner=point.work.hidden)


def entries(point: Point, choice: Choice) -> tuple[Entry, ...]:
    """A choice as answers to what the kernels will ask."""
    found = [tuned.entry(role, shape, choice.rows, value) for (role, shape), value in zip(questions(point), choice.layers, strict=True)]
    return (_rows_entry(point, choice.rows), *found) if choice.rows else tuple(found)


def starts(point: Point) -> list[Choice]:
    """The rules' choice first, then theirs for other numbers of block rows."""
    own = rules(point)
    return [own] if is_few(point) else list(dict.fromkeys([own, *(rules(point, rows) for rows in BLOCK_ROWS)]))


def neighbours(point: Point, choice: Choice) -> list[Choice]:
    """All that differ from a choice by one change of one layer."""
    found = []
    roles = bool(point.work.quant) and tuning_scaled.has_roles(point.work.quant, layers(point.work))
    for index, (value, (role, shape)) in enumerate(zip(choice.layers, questions(point), strict=True)):
        near: Iterator[Any]
        if role in tuning_scaled.ROLES:
            near = tuning_scaled.near_tiles(value, role, shape, roles)
        else:
            near = _near_strip(value, shape) if isinstance(value, Strip) else _near_tiles(value, shape, role == tuned.FIRST)
        found += [Choice(choice.rows, (*choice.layers[:index], each, *choice.layers[index + 1 :])) for each in near]
    return [each for each in dict.fromkeys(found) if each != choice]


PAIRS = (  # factors of two of cols, depth, warps, and steps of stages, that go together
    (1, -1, 0, 0), (-1, 1, 0, 0), (1, 0, 1, 0), (-1, 0, -1, 0), (0, 1, 0, -1), (0, -1, 0, 2), (1, 0, 0, -1), (-1, 0, 0, 1), (1, -1, 0, 1),
)  # fmt: skip
ALONE = ((1, 0, 0, 0), (-1, 0, 0, 0), (0, 1, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0), (0, 0, -1, 0), (0, 0, 0, 1), (0, 0, 0, -1), (0, 0, 0, 2))
GROUPS = (1, 4, 8, 16)


def _near_tiles(t: Tiles, shape: Shape, first: bool) -> Iterator[Tiles]:
    for cols, depth, warps, stages in (*ALONE, *PAIRS):
        wide, deep = _scaled(t.cols, cols), _scaled(t.depth, depth)
        yield from _fit(t, shape, cols=wide, depth=deep, warps=_scaled(t.warps, warps), stages=t.stages + stages)
    for group in GROUPS:
        yield from _fit(t, shape, group=group)
    for name in ("swap", "persistent", "half", "described", "early", *(("spread", "skip") if first else ())):
        yield from _fit(t, shape, **{name: not getattr(t, name)})
    yield from _fit(t, shape, persistent=not t.persistent, half=not t.half)


def _fit(t: Tiles, shape: Shape, **changes: Any) -> Iterator[Tiles]:
    """The changed tiles, made to fit, if a kernel could do well with them."""
    wanted = replace(t, **changes)
    sane = 16 <= wanted.cols <= 256 and 16 <= wanted.depth <= 512 and 2 <= wanted.warps <= 16 and 1 <= wanted.stages <= 8
    accumulated = wanted.rows * wanted.cols * shape.products / (32 * wanted.warps)
    swapped = not wanted.swap or wanted.rows <= 64
    if sane and swapped and accumulated <= MOST_ACCUMULATED:
        yield configs.changed(t, shape, **changes)


def _near_strip(s: Strip, shape: Shape) -> Iterator[Strip]:
    for cols, depth, warps, stages in (*ALONE, *PAIRS):
        near = Strip(_scaled(s.cols, cols), _scaled(s.depth, depth), _scaled(s.warps, warps))
        held = near.cols * near.depth * shape.products / (32 * max(1, near.warps))
        sane = 1 <= near.cols <= 256 and 16 <= near.depth <= 2 * shape.inner and 1 <= near.warps <= 8
        if not stages and sane and 1 <= held <= MOST_HELD:
            yield near


def _scaled(value: int, power: int) -> int:
    return value << power if power >= 0 else value >> -power
