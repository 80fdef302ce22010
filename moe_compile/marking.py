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
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_compile.capture import flags_active
from moe_compile.compiling import compile
from moe_compile.probing.install import REGION
from moe_compile.probing.probe import mode_of, probe_model
from moe_compile.probing.scout import rehearsing

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
    inner = [original]  # what is compiled: probing puts another one there
    compiled = _Compiled(inner, compile_kwargs)
    apart = torch.compiler.disable(compiled, reason="an MoE block compiled as a region of its own")

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, _MARK, False):
            return inner[0](self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            inline = _belongs_to_outer_graph()
            return inner[0](self, *args, **kwargs) if inline else apart(self, *args, **kwargs)
        return inner[0](self, *args, **kwargs) if _is_traced() else compiled(self, *args, **kwargs)

    setattr(forward, _SETTINGS, compile_kwargs)
    setattr(forward, REGION, inner)
    return forward


class _Compiled:
    """The function that stands in `inner`, compiled by its first call; each module is probed by its own first call in each mode."""

    def __init__(self, inner: list[Callable[..., Any]], compile_kwargs: dict[str, Any]) -> None:
        settings = {k: v for k, v in compile_kwargs.items() if k != "probe"}
        probe = compile_kwargs.get("probe")
        self._inner = inner
        self._make = functools.cache(lambda function: compile(function, **settings))
        self._probes = probe or (probe is None and compile_kwargs.get("parallel") is None and not compile_kwargs.get("disable"))
        self._report = compile_kwargs.get("report")
        self._seen: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
        self.__name__ = "moe_region"

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if rehearsing():
            return self._inner[0](module, *args, **kwargs)
        if self._probes and (mode := mode_of(module)) not in (seen := self._seen.setdefault(module, set())):
            seen.add(mode)
            probe_model(module, args, kwargs, self._report)
        return self._make(self._inner[0])(module, *args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _belongs_to_outer_graph() -> bool:
    """Whether the graph that Dynamo is tracing now is captured as we need it, or must not be broken."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    return flags_active() or translator.one_graph or translator.export


def _is_traced() -> bool:
    """Whether another tracer than Dynamo is recording what is executed."""
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing() or torch.jit.is_tracing()
