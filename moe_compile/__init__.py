"""moe_compile: a compiler for Mixture-of-Experts layers that people wrote the plain way.

    torch.compile(model, backend="moe_compile")     # the backend by its name
    moe_compile.compile(model)                      # the same, and captures data-dependent MoE loops too
    print(moe_compile.explain(model)(*inputs))      # what was found, what was rewritten, and why not the rest

Names are resolved on first use: importing this package imports neither torch nor anything of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compile import testing as testing
    from moe_compile.compiling import compile as compile
    from moe_compile.config import ParallelConfig as ParallelConfig
    from moe_compile.explaining import explain as explain
    from moe_compile.marking import moe as moe
    from moe_compile.report import RewriteReport as RewriteReport

__version__ = "0.1.0"

_HOMES = {
    "compile": "moe_compile.compiling",
    "explain": "moe_compile.explaining",
    "moe": "moe_compile.marking",
    "ParallelConfig": "moe_compile.config",
    "RewriteReport": "moe_compile.report",
}
_MODULES = ("testing",)

__all__ = ["ParallelConfig", "RewriteReport", "compile", "explain", "moe", "testing"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
