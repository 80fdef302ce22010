"""Makes the Triton function of a layer's epilogue: source text, one function for each text in a process."""

from __future__ import annotations

import functools
import hashlib
import linecache
from typing import Any

import triton
import triton.language as tl

from . import pointwise
from .layers import Layer


def epilogue_of(layer: Layer) -> Any:
    """jit function (p0, p1, b0, b1, w) -> value, all float32: products [M, N], biases [1, N], routing weights [M, 1].

    What the layer does not read may be anything.
    """
    return _compiled(layer.body, layer.result)


@functools.lru_cache(maxsize=256)
def _compiled(body: tuple[str, ...], result: str) -> Any:
    lines = ["@triton.jit", "def epilogue(p0, p1, b0, b1, w):", *(f"    {line}" for line in body), f"    return {result}", ""]
    source = "\n".join(lines)
    name = f"<epilogue {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # Triton reads a function's source through inspect, which finds what linecache holds under the function's file name.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, **_functions(), "__name__": __name__}
    exec(compile(source, name, "exec"), space)
    return space["epilogue"]


def _functions() -> dict[str, Any]:
    return {name: value for name, value in vars(pointwise).items() if not name.startswith("_") and name not in ("triton", "tl")}
