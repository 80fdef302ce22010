"""`@moe_compile.moe`: a module that is compiled as an MoE region of its own wherever it is used.

The class' `forward` is replaced by one that calls the compiled forward. Nothing else changes: the class, its
parameters' names, its state dict, copies and pickles stay what they were. How the module is used decides what runs:

    called from Python                          the compiled forward
    inside moe_compile.compile                  the plain forward, inlined: the outer graph is rewritten as a whole
    inside torch.compile, whatever backend      the compiled forward, behind a graph break; with fullgraph=True, and in
                                                torch.export, where a break is an error, the plain forward
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_compile.capture import flags_active
from moe_compile.compiling import compile

_MARK = "_moe_compile_region"  # on a class or an instance: whether its forward is compiled
_SETTINGS = "_moe_compile_settings"  # on the replacing forward: the keywords that it compiles with


def moe(module: Any = None, /, **compile_kwargs: Any) -> Any:
    """Compile a module class (as a decorator) or one instance as its own MoE region.

    compile_kwargs: what moe_compile.compile takes; all marks on one class must have the same.
    Returns its argument. Raises TypeError for anything but a module, and ValueError for other keywords than before.
    """
    if module is None:
        return functools.partial(moe, **compile_kwargs)
    cls = module if isinstance(module, type) else type(module)
    if not issubclass(cls, nn.Module):
        raise TypeError(f"moe_compile.moe takes an nn.Module class or instance, not {module!r}")
    if cls.__module__.partition(".")[0] == "torch":
        raise TypeError(f"moe_compile.moe does not change torch's own {cls.__name__}; wrap it in a module class of yours")
    _replace_forward(cls, compile_kwargs)
    setattr(module, _MARK, True)
    return module


def _replace_forward(cls: Any, compile_kwargs: dict[str, Any]) -> None:
    settings = getattr(cls.__dict__.get("forward"), _SETTINGS, None)
    if settings is None:
        cls.forward = _region_forward(cls.forward, compile_kwargs)
    elif settings != compile_kwargs:
        raise ValueError(f"{cls.__name__} was already marked with {settings or 'no options'}, now with {compile_kwargs}")


def _region_forward(original: Callable[..., Any], compile_kwargs: dict[str, Any]) -> Callable[..., Any]:
    compiled = _Lazy(lambda: compile(original, **compile_kwargs))
    apart = torch.compiler.disable(compiled, reason="an MoE block compiled as a region of its own")

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, _MARK, False):
            return original(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            inline = _belongs_to_outer_graph()
            return original(self, *args, **kwargs) if inline else apart(self, *args, **kwargs)
        return original(self, *args, **kwargs) if _is_traced() else compiled(self, *args, **kwargs)

    setattr(forward, _SETTINGS, compile_kwargs)
    return forward


class _Lazy:
    """A function that is made by the first call."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make = functools.cache(make)
        self.__name__ = "moe_region"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._make()(*args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _belongs_to_outer_graph() -> bool:
    """Whether the graph that Dynamo is tracing now is captured as we need it, or must not be broken."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    return flags_active() or translator.one_graph or translator.export


def _is_traced() -> bool:
    """Whether another tracer than Dynamo is recording what is executed."""
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing() or torch.jit.is_tracing()
