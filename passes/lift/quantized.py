"""Weights that the model dequantises itself: numbers times scales, in one of the forms that kernels take (ops/quantized.py).

A weight is a product of factors.  One reads every number of the weight; as a function of the byte it must be one of the known codes, which
is checked for all 256 bytes.  The others are scales, functions of blocks of outputs and inputs, which is checked for all indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .algebra import mul
from .algebra import replace as substitute
from .decode import evaluate
from .expr import Expr, Leaf, Refused, Var, is_const, raw
from .index import pairs
from .param import Digit, Format, Param, Scale
from .places import computed
from .sizes import Size

NUMBERS = {torch.int8, torch.uint8, torch.float8_e4m3fn}  # what weights are stored as
BLOCK, MX_BLOCK = 128, 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTES = torch.arange(256)


def dtype_of(leaf: Leaf) -> torch.dtype | None:
    found = {n.meta["val"].dtype for n in leaf.nodes}
    return found.pop() if len(found) == 1 else None


def is_numbers(load: Expr) -> bool:
    return load.op == "load" and load.args[0].constant is None and dtype_of(load.args[0]) in NUMBERS


def outer_loads(e: Expr) -> Iterator[Expr]:
    """Loads that are not part of another load's index; constants are looked through."""
    if e.op == "load" and e.args[0].constant is None:
        yield e
        return
    for a in e.args:
        if isinstance(a, Expr):
            yield from outer_loads(a)


def digits_of(a: Expr, size: Size) -> list[tuple[Expr, Size]]:
    return list(pairs(a.args)) if a.op == "mix" else [(a, size)]


@dataclass(frozen=True)
class Reading:
    """The variables that a weight is read by: the routing id, output features in order, input features."""

    ids: Expr
    feat: Sequence[Var]
    ins: Sequence[Var]


def own_factors(e: Expr, ids: Expr, strangers: set[Var]) -> bool:
    """Is e computed from the selected expert's parameters alone?  strangers: the row's variables."""
    found = list(outer_loads(e))
    if not found or not all(_by_id(x, ids) for x in found):
        return False
    names = {x: Var(None) for x in found}
    rest = substitute(e, names)
    return not rest.free & strangers and not any(d.free & strangers for x in found for d in _others(x, ids))


def _by_id(load: Expr, ids: Expr) -> bool:
    return any(d is ids for a in load.args[1:] for d, _ in digits_of(a, None))


def _others(load: Expr, ids: Expr) -> Iterator[Expr]:
    return (d for a in load.args[1:] for d, _ in digits_of(a, None) if d is not ids)


# ---------------------------------------------------------------- the weight as a product
def flat(e: Expr) -> list[Expr]:
    """Factors, whatever casts to floating dtypes stand between: the stage keeps more precision than they do."""
    if e.op == "cast" and e.args[1].is_floating_point and e.args[1].itemsize > 1:
        return flat(e.args[0])
    if e.op == "mul":
        return [f for a in e.args for f in flat(a)]
    if e.op == "div":
        return [*flat(e.args[0]), *[raw("reciprocal", f) for f in flat(e.args[1])]]
    return [e]


def recognised(own: Sequence[Expr], reading: Reading, param: Callable[[Expr, Sequence[Var]], Param]) -> tuple[Param, list[Var]]:
    """The weight that is the product of `own`: its parameter with a format, and the order of the inputs in it.

    param(load, ins): the parameter behind a load.  Raises Refused with the reason why it is in no known form.
    """
    with _disable_current_modes():  # numbers are computed here, while the graph is traced
        return _recognised([f for x in own for f in flat(x)], _dtype(own), reading, param)


def _recognised(
    factors: list[Expr], dtype: torch.dtype, reading: Reading, param: Callable[[Expr, Sequence[Var]], Param]
) -> tuple[Param, list[Var]]:
    inputs = set(reading.ins)
    numbers = [f for f in factors if inputs <= f.free and any(is_numbers(x) for x in outer_loads(f))]
    if len(numbers) != 1:
        raise Refused("quantised weights that are not one tensor of numbers times scales")
    codes = _Codes(numbers[0], reading)
    ins = [v for v in codes.order if v is not codes.half]
    values = param(codes.load, ins)
    grid = _Grid(values, codes, reading)
    scale = mul(*[f for f in factors if f is not numbers[0]])
    kind, expr, names, scales, blocks = _kind_and_scales(codes.kind, scale, grid)
    return replace(values, format=Format(kind, dtype, expr, names, scales, blocks)), codes.order


def _dtype(own: Sequence[Expr]) -> torch.dtype:
    """What the model computes the weight in."""
    found = [x.args[1] for e in own for x in ([e] if e.op == "cast" else e.args if e.op == "mul" else []) if _is_cast(x)]
    found += [d for e in own for x in outer_loads(e) if (d := dtype_of(x.args[0])) and d.is_floating_point and d.itemsize > 1]
    out = torch.bfloat16 if not found else found[0]
    for d in found[1:]:
        out = torch.promote_types(out, d)
    return own[0].args[1] if len(own) == 1 and _is_cast(own[0]) else out


def _is_cast(x: Any) -> bool:
    return isinstance(x, Expr) and x.op == "cast" and x.args[1].is_floating_point and x.args[1].itemsize > 1


# ---------------------------------------------------------------- numbers
class _Codes:
    """The factor that reads the numbers.  kind: their code ("fp8", "int4"); half: which of a byte's two numbers, None for one a byte."""

    def __init__(self, e: Expr, reading: Reading):
        loads = set(outer_loads(e))
        if len(loads) != 1:
            raise Refused("weights computed from several tensors of numbers (zero points are not supported)")
        (self.load,) = loads
        inputs = set(reading.ins)
        beside = substitute(e, {self.load: (byte := Var(None))}).free - {byte}
        packed = inputs - self.load.free
        if beside - inputs or beside != packed or len(packed) > 1 or any(v.size != 2 for v in packed):
            raise Refused("quantised weights whose code depends on more than which half of a byte it is")
        self.half = next(iter(packed), None)
        self.order = [d for a in self.load.args[1:] for d, _ in digits_of(a, None) if d in inputs]
        self.order += [self.half] if self.half is not None else []
        self.kind = self._known(e)

    def _known(self, e: Expr) -> str:
        dtype = dtype_of(self.load.args[0])
        if e is self.load and dtype == torch.float8_e4m3fn:
            return "fp8"
        if dtype == torch.float8_e4m3fn:
            raise Refused("numbers in e4m3 that are more than scaled")
        given = _BYTES if dtype == torch.uint8 else _BYTES.to(torch.int8)
        for kind, meant in _CODES[self.half is not None].items():
            if all(_same(evaluate(e, self._table(given, h)), meant[h]) for h in range(len(meant))):
                return kind
        raise Refused(f"quantised weights in a code that no kernel has: {computed(e)}")

    def _table(self, given: torch.Tensor, h: int) -> dict[Expr, torch.Tensor]:
        table: dict[Expr, torch.Tensor] = {self.load: given}
        if self.half is not None:
            table[self.half] = torch.tensor(h)
        return table


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    got = got.expand(want.shape) if got.dim() == 0 else got
    return bool(((got == want) | (got.isnan() & want.isnan())).all())


def _nibbles(codes: torch.Tensor) -> list[torch.Tensor]:
    return [codes[_BYTES & 15], codes[_BYTES >> 4]]


_SIGNED = torch.tensor([*E2M1, *[-x for x in E2M1]], dtype=torch.float64)
_CODES: tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]] = (
    {"int8": [_BYTES.to(torch.int8).double()], "fp8": [_BYTES.to(torch.uint8).view(torch.float8_e4m3fn).double()]},
    {"int4": _nibbles(torch.arange(16.0, dtype=torch.float64) - 8), "mxfp4": _nibbles(_SIGNED)},
)  # by whether a byte holds two numbers: the number of each byte, low half first
_EXPONENTS = torch.exp2(_BYTES[:255].double() - 127)


# ---------------------------------------------------------------- scales
class _Grid:
    """All outputs and all inputs of a weight, as values of the variables that it is read by."""

    def __init__(self, values: Param, codes: _Codes, reading: Reading):
        self.reading = reading
        self.fixed: list[tuple[int, int, torch.Tensor]] = []
        load = codes.load
        pieces = [(d, n) for a, s in zip(load.args[1:], load.args[0].shape) for d, n in digits_of(a, s)]
        outs = [(d, n) for d, n in pieces if d in set(reading.feat) or (is_const(d) and self._column(values, d, n))]
        ins = [piece for piece in pieces if piece[0] in set(reading.ins)] + ([(codes.half, 2)] if codes.half is not None else [])
        self.outs, self.num_outs = self._spread(outs, keep=True)
        self.ins, self.num_ins = self._spread(ins, keep=False)

    def _column(self, values: Param, d: Expr, n: Size) -> bool:
        return any(x.role == "c" and x.size == n and x.at == d.args[0] for x in values.digits)

    def _spread(self, digits: list[tuple[Expr, Size]], keep: bool) -> tuple[dict[Expr, torch.Tensor], int]:
        """Each variable's value for every index; fixed digits (columns of the weight that are not used here) run over all theirs."""
        total = 1
        for _, n in digits:
            if not isinstance(n, int):
                raise Refused("quantised weights of a size that is not fixed")
            total *= n
        index, stride, table = torch.arange(total), total, {}
        for d, n in digits:
            stride //= n
            if is_const(d) and keep:
                self.fixed.append((d.args[0], n, index // stride % n))
            else:
                table[d] = index // stride % n
        return table, total

    def column(self, at: int, n: int) -> torch.Tensor | None:
        return next((i for c, m, i in self.fixed if (c, m) == (at, n)), None)

    # ------------------------------------------------------------ one tensor of scales
    def scale(self, load: Expr) -> tuple[Param, dict[str, torch.Tensor]]:
        """The tensor's digits, and for each output and input the place along them."""
        leaf, idx = load.args[0], list(load.args[1:])
        shape = list(leaf.shape)
        if len(leaf.nodes) > 1:
            if idx[0] is not self.reading.ids:
                raise Refused("a list of scales that is not indexed by the routing id")
            idx, shape = idx[1:], shape[1:]
        place: dict[str, torch.Tensor] = {}
        dims = tuple(tuple(self._digit(d, n, place) for d, n in digits_of(a, s)) for a, s in zip(idx, shape))
        param = Param(leaf, dims)
        if param.letters.count("e") != (0 if param.listed else 1):
            raise Refused("scales that are indexed by the routing id twice")
        return param, place

    def _digit(self, d: Expr, n: Size, place: dict[str, torch.Tensor]) -> Digit:
        if d is self.reading.ids:
            return Digit("e", n)
        if is_const(d) and (at := self.column(d.args[0], n)) is not None:
            return self._placed("o", at, n, place)
        if is_const(d):
            return Digit("c", n, d.args[0])
        if d.free and d.free <= set(self.outs):
            return self._placed("o", evaluate(d, self.outs, self.column), n, place)
        if d.free and d.free <= set(self.ins):
            return self._placed("i", evaluate(d, self.ins), n, place)
        raise Refused(f"scales indexed by {computed(d)}")

    def _placed(self, role: str, at: torch.Tensor, n: Size, place: dict[str, torch.Tensor]) -> Digit:
        place[role] = place[role] * n + at.long() if role in place else at.long()
        return Digit(role, n)


def _blocks(at: torch.Tensor | None, total: int, block: int) -> tuple[int, ...] | None:
    """The place of each block of `block` indices, None where one has several."""
    if at is None:
        return ()
    starts = torch.arange(0, total, block)
    found = at[starts]
    return tuple(found.tolist()) if torch.equal(found.repeat_interleave(block)[:total], at) else None


def _kind_and_scales(code: str, scale: Expr, grid: _Grid) -> tuple[str, Expr, tuple[Var, ...], tuple[Scale, ...], tuple[int, int]]:
    """The form that these scales have for numbers in this code, and the scale of a block."""
    names = {x: Var(None) for x in dict.fromkeys(outer_loads(scale))}  # anything: nothing is simplified by a range
    expr = substitute(scale, names) if names else scale
    if not expr.free <= set(names.values()):
        raise Refused("scales computed from an index")
    placed = [grid.scale(x) for x in names]
    varied = any(at for _, at in placed)
    for kind, outs, ins in [f for f in _FORMS[code] if varied or f[2] == 0] or _FORMS[code]:
        rows, columns = outs or grid.num_outs, ins or grid.num_ins
        found = [(p, _blocks(at.get("o"), grid.num_outs, rows), _blocks(at.get("i"), grid.num_ins, columns)) for p, at in placed]
        if all(o is not None and i is not None for _, o, i in found):
            scales = tuple(Scale(p, o or (), i or ()) for p, o, i in found)
            if kind == "mxfp4" and grid.num_ins % MX_BLOCK:
                raise Refused(f"mxfp4 weights of {grid.num_ins} inputs, no multiple of {MX_BLOCK}")
            if kind == "mxfp4":
                expr = _exponent(expr, names)
            blocks = (-(-grid.num_outs // rows), -(-grid.num_ins // columns))
            return kind, expr, tuple(names.values()), scales, blocks
    raise Refused(f"scales of {code} weights for other blocks than {_WANTED[code]}")


_FORMS = {
    "fp8": (("fp8_block_w", BLOCK, BLOCK), ("fp8_channel_w", 1, 0)),
    "int8": (("int8", 1, 0), ("int8", 1, BLOCK)),
    "int4": (("int4", 1, 0), ("int4", 1, BLOCK)),
    "mxfp4": (("mxfp4", 1, MX_BLOCK),),
}  # outputs and inputs that share a scale, 0: all
_WANTED = {
    "fp8": "an output or 128 x 128", "int8": "an output or 128 inputs", "int4": "an output or 128 inputs", "mxfp4": "32 inputs",
}  # fmt: skip


def _exponent(expr: Expr, names: dict[Expr, Var]) -> Expr:
    """mxfp4 keeps exponents: the scale must be 2 ^ (byte - 127), or e8m0 itself; what is left is the byte."""
    if len(names) == 1:
        ((load, name),) = names.items()
        if expr is name and dtype_of(load.args[0]) == torch.float8_e8m0fnu:
            return name
        if dtype_of(load.args[0]) == torch.uint8 and _same(evaluate(expr, {name: _BYTES[:255]}), _EXPONENTS):
            return name
    raise Refused("scales of mxfp4 weights that are not powers of two given by their exponents")


__all__ = ["Reading", "is_numbers", "outer_loads", "own_factors", "recognised"]
