"""Formulas of sizes and counts, written down as nodes."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from moe_compile.probing.errors import NotProbed

_CALLS: dict[str, Callable[..., Any]] = {
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "TruncToInt": torch.sym_int,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "ToFloat": torch.sym_float,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "Add": operator.add,
    "Mul": operator.mul,
    "FloatPow": operator.pow,
    "PowByNatural": operator.pow,
}


def written(e: sympy.Basic, symbol: Callable[[sympy.Symbol], Any], call: Callable[[Callable[..., Any], tuple], Any]) -> Any:
    """The formula's value: what `symbol` gives for its symbols, `call(function, arguments)` for its steps; numbers as they are."""

    def value(x: sympy.Basic) -> Any:
        if isinstance(x, sympy.Symbol):
            return symbol(x)
        if isinstance(x, sympy.Integer):
            return int(x)
        if isinstance(x, sympy.Number):
            return float(x)
        name = type(x).__name__
        if name == "Pow" and x.args[1].is_Integer and int(x.args[1]) > 0:
            return functools.reduce(lambda a, b: call(operator.mul, (a, b)), [value(x.args[0])] * int(x.args[1]))
        if name not in _CALLS:
            raise NotProbed(f"a number is computed by {name}, which cannot be written down")
        parts = [value(a) for a in x.args]
        if len(parts) == 1:
            return call(_CALLS[name], tuple(parts))
        return functools.reduce(lambda a, b: call(_CALLS[name], (a, b)), parts)

    return value(e)
