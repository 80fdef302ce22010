"""Programs in place of a class' forward, for marked modules, while moe_compile's Dynamo captures, and only then.

    called from Python                          the class' own forward
    captured by moe_compile.compile             the first program that fits the call; its conditions become Dynamo's guards
    captured so, and nothing was rewritten      the class' own forward (the frame is captured again without programs)
    any other tracer                            the class' own forward

Only the class gets another `forward` and the marked modules one plain attribute: parameters, state dict, hooks, copies and pickles stay
what they were, and a pickle opened elsewhere runs its own forward.
"""

from __future__ import annotations

import functools
import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from moe_compile.probing.errors import NotProbed
from moe_compile.probing.program import Program, structure_of
from moe_compile.probing.state import hooked

MARK = "_moe_compile_probed"
REGION = "_moe_compile_inner"  # on the forward that moe_compile.moe puts into a class: [the forward that it compiles]
_ORIGINAL = "_moe_compile_original"
_PROGRAMS: dict[type, tuple[Program, ...]] = {}
_CLASSES: dict[str, type] = {}
_MARKED: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


class Mark:
    """On a module that may run programs of its class. Copies and pickles of the module come without: they may be changed."""

    def __init__(self, module: nn.Module) -> None:
        self.token = uuid.uuid4().hex
        _MARKED[self.token] = module

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def marked(module: nn.Module) -> bool:
    mark = vars(module).get(MARK)
    return mark is not None and _MARKED.get(mark.token) is module


def own_forward(cls: type) -> Callable[..., Any]:
    """The forward that the class was written with."""
    forward = cls.forward  # type: ignore[attr-defined]
    forward = region_of(forward)[0] if region_of(forward) else forward
    return getattr(forward, _ORIGINAL, forward)


def region_of(forward: Any) -> list[Callable[..., Any]]:
    """Where a forward that `moe_compile.moe` has put there keeps the one that it compiles."""
    return getattr(forward, REGION, [])


def programs(cls: type) -> tuple[Program, ...]:
    return _PROGRAMS.get(cls, ())


def install(cls: Any, program: Program) -> None:
    """One more program for the class."""
    if region_of(cls.forward) and "forward" not in vars(cls):
        raise NotProbed("its class inherits a forward that moe_compile.moe has put there")
    original = own_forward(cls)
    _PROGRAMS[cls] = (*programs(cls), program) if program.whole is None else (program, *programs(cls))
    _put(cls, _forward(cls, original, _PROGRAMS[cls]))


def _put(cls: Any, forward: Callable[..., Any]) -> None:
    if region := region_of(cls.forward):
        region[0] = forward
    else:
        cls.forward = forward


def fitting(module: nn.Module, args: tuple, kwargs: dict[str, Any], whole: bool = False) -> Program | None:
    """The program for such a call of a module like this; whole: only such as stands in a graph as one call."""
    structure = structure_of(module)
    wanted = (p for p in programs(type(module)) if p.whole is not None or not whole)
    return next((p for p in wanted if p.is_for(module, structure) and p.fits(module, args, kwargs)), None)


def mark(module: nn.Module) -> None:
    """From now on the module runs those programs of its class that were recorded from modules like it."""
    if not marked(module):
        setattr(module, MARK, Mark(module))


def restore(model: nn.Module) -> None:
    """Undo what probing has put into the model: its modules run their own forward again, compiled as torch would."""
    unmark(getattr(model, "_orig_mod", model).modules())


def unmark(modules: Iterable[nn.Module]) -> None:
    """The modules run no programs; classes none of whose modules do are what they were."""
    modules = list(modules)
    for module in modules:
        found = vars(module).pop(MARK, None)
        if found is not None:
            _MARKED.pop(found.token, None)
    for cls in {type(m) for m in modules} & set(_PROGRAMS):
        if not any(type(m) is cls for m in _MARKED.values()):
            _PROGRAMS.pop(cls)
            _remove(cls)


def _remove(cls: Any) -> None:
    """The class runs the forward that it was written with; one that it inherits, it inherits again."""
    original = own_forward(cls)
    if region_of(cls.forward):
        _put(cls, original)
    elif "forward" in vars(cls):
        del cls.forward
        if own_forward(cls) is not original:
            cls.forward = original


def _forward(cls: type, original: Callable[..., Any], these: tuple[Program, ...]) -> Callable[..., Any]:
    """The class' forward with programs beside it, in code that Dynamo traces."""
    key = f"{cls.__qualname__} {id(cls)}"
    _CLASSES[key] = cls
    scope: dict[str, Any] = {"original": original, "compiling": torch.compiler.is_dynamo_compiling, "which": _which, "once": _once}
    lines = ["def forward(self, *args, **kwargs):", f"    if compiling() and getattr(self, {MARK!r}, None) is not None:"]
    lines.append(f"        mine = which(self.{MARK}.token, {key!r})")
    for i, p in enumerate(these):
        scope[f"fits{i}"], scope[f"run{i}"] = p.fits, p.run
        lines += [f"        if {i} in mine and fits{i}(self, args, kwargs):"]
        if p.whole is not None:
            scope[f"whole{i}"] = p.whole
            lines += ["            if once():", f"                return whole{i}(self, args, kwargs)"]
        lines += [f"            return run{i}(self, args, kwargs)"]
    lines.append("    return original(self, *args, **kwargs)")
    exec(compile("\n".join(lines), "<moe_compile: a forward beside its programs>", "exec"), scope)
    forward = functools.wraps(original)(scope["forward"])
    setattr(forward, _ORIGINAL, original)
    return forward


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _which(token: str, key: str) -> tuple[int, ...]:
    """The programs of the class for the module with this mark, as it is now, if Dynamo is capturing for us with its flags on.

    The forward of a base class, called by `super().forward`, has none for it.
    """
    module = _MARKED.get(token)
    if module is None or type(module) is not _CLASSES[key] or hooked(module) or not _captures_for_us():
        return ()
    structure = structure_of(module)
    return tuple(i for i, p in enumerate(programs(type(module))) if p.is_for(module, structure))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _once() -> bool:
    """Whether the passes may rewrite a block apart from the graph that it stands in: on one rank, and with the weights that it has."""
    from moe_compile.backend import Backend

    backend = _backend()
    if not isinstance(backend, Backend):
        return False
    return backend.options.quant == "none" and (backend.options.parallel is None or backend.options.parallel.ep == 1)


def _captures_for_us() -> bool:
    """With the flags, or one graph for our backend and nothing else."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    from moe_compile.backend import Backend
    from moe_compile.capture import flags_active

    return flags_active() or (InstructionTranslator.current_tx().one_graph and isinstance(_backend(), Backend))


def _backend() -> Any:
    """For which Dynamo is tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend = InstructionTranslator.current_tx().output.compiler_fn
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend
