"""Makes the Triton functions of a layer's epilogue and of its adjoint: source text, one function for each text in a process."""

from __future__ import annotations

import functools
import hashlib
import linecache
from typing import Any

import triton
import triton.language as tl

from . import adjoints, pointwise
from .layers import Layer, Op


def epilogue_of(layer: Layer) -> Any:
    """jit function (p0, p1, b0, b1, w) -> value, all float32: products [M, N], biases [1, N], routing weights [M, 1].

    What the layer does not read may be anything.
    """
    return _compiled("p0, p1, b0, b1, w", (*map(_line, layer.body), f"return {layer.result}"))


def adjoint_of(layer: Layer) -> Any:
    """jit function (p0, p1, b0, b1, w, g) -> (value, dp0, dp1, dw): g [M, N] times the value's derivatives, dw per column.

    A bias is added to or multiplied with products, so its adjoint is wanted only by layers that are not differentiated here.
    """
    return _compiled("p0, p1, b0, b1, w, g", (*map(_line, layer.body), *_reverse(layer)))


def _line(op: Op) -> str:
    return f"{op.name} = {op.function}({', '.join([*op.args, *op.attrs])})"


def _reverse(layer: Layer) -> list[str]:
    """Lines that carry g from the result to products and w; each name's adjoint is the sum of what its readers send."""
    lines, sent = [], {layer.result: ["g"]}
    known = {"p0", "p1", "w", *(op.name for op in layer.body)}
    for op in reversed(layer.body):
        if op.name not in sent:
            continue
        lines.append(f"d{op.name} = {' + '.join(sent[op.name])}")
        for i, arg in enumerate(op.args):
            if arg in known and hasattr(adjoints, f"{op.function}_{i}"):
                lines.append(f"d{op.name}_{i} = {op.function}_{i}({', '.join([f'd{op.name}', op.name, *op.args, *op.attrs])})")
                sent.setdefault(arg, []).append(f"d{op.name}_{i}")
    wanted = [" + ".join(sent.get(name, ["0.0 * g"])) for name in ("p0", "p1", "w")]
    return [*lines, f"return {layer.result}, {', '.join(wanted)}"]


@functools.lru_cache(maxsize=256)
def _compiled(arguments: str, lines: tuple[str, ...]) -> Any:
    source = "\n".join(["@triton.jit", f"def epilogue({arguments}):", *(f"    {line}" for line in lines), ""])
    name = f"<epilogue {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # Triton reads a function's source through inspect, which finds what linecache holds under the function's file name.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, **_functions(adjoints), **_functions(pointwise), "__name__": __name__}
    exec(compile(source, name, "exec"), space)
    return space["epilogue"]


def _functions(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in ("triton", "tl")}
