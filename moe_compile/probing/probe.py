"""Before the first call of a compiled model: what Dynamo could not capture in it is found, recorded, checked and installed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from moe_compile.probing.check import check, other_mode
from moe_compile.probing.errors import NotProbed
from moe_compile.probing.install import MARK, fitting, install, mark, marked, own_forward
from moe_compile.probing.program import Program, write_program
from moe_compile.probing.record import record
from moe_compile.probing.scout import Call, may_route, rehearse
from moe_compile.probing.state import hooked
from moe_compile.probing.trial import captured
from moe_compile.report import RewriteReport

log = logging.getLogger("moe_compile")


def probe_first_call(model: nn.Module, call: Callable[..., Any], report: RewriteReport | None) -> Callable[..., Any]:
    """`call`, the compiled model, which probes the model on the first arguments in each mode (training, autocast)."""
    done = set()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and (mode := mode_of(model)) not in done:
            done.add(mode)
            probe_model(model, args, kwargs, report)
        return call(*args, **kwargs)

    return forward


def mode_of(model: nn.Module) -> Any:
    """What may lead the same model through other code, or torch to other dtypes."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return model.training, *[(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@torch.compiler.disable
def probe_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], report: RewriteReport | None) -> None:
    """Find what Dynamo cannot capture in a call of the model, and install programs for it. Never raises."""
    if not may_route(model):
        return
    started = time.perf_counter()
    try:
        calls, long = rehearse(model, args, kwargs)
    except Exception as e:
        log.debug("rehearsing %s", type(model).__name__, exc_info=True)
        _note(report, f"{type(model).__name__} was not searched for blocks that Dynamo cannot capture: {type(e).__name__}: {_line(e)}")
        return
    tried = {id(m) for c in repeated(long) if probe(c, report, whole=True) for m in c.module.modules()}
    within: set[int] = set()
    for c in sorted(calls, key=lambda c: c.sizes):
        # what a module decides is recorded once, where it decides
        if not tried & {id(m) for m in c.module.modules()} and not (c.sizes and id(c.module) in within):
            done = _innermost(c, report)
            tried |= {id(d.module) for d in done}
            within |= {id(m) for d in done for m in d.module.modules()}
    log.debug("probing %s took %.1f s", type(model).__name__, time.perf_counter() - started)


def _innermost(c: Call, report: RewriteReport | None) -> list[Call]:
    """Calls that were tried: the given one, and where that fails those around it that make it again and again, for each token say."""
    first = told = RewriteReport()
    done = [c]
    while not probe(done[-1], told) and told.notes and (outer := done[-1].outer) is not None:
        done.append(Call(outer.module, outer.args, outer.kwargs, True, False, outer.steps, None, outer.outer))
        told = RewriteReport()
    for text in (told if any("is captured from" in text for text in told.notes) else first).notes:
        _note(report, text)
    return done


def repeated(calls: list[Call]) -> list[Call]:
    """Those of modules whose class comes again and again, so that Dynamo would trace much more than one recording takes."""
    saved = {cls: sum(c.steps for c in calls if type(c.module) is cls) for cls in {type(c.module) for c in calls}}
    for c in calls:
        saved[type(c.module)] -= c.steps if next(d for d in calls if type(d.module) is type(c.module)) is c else 0
    return [c for c in calls if saved[type(c.module)] >= WORTH]


WORTH = 1000  # torch calls that Dynamo need not trace


def probe(call: Call, report: RewriteReport | None, whole: bool = False) -> bool:
    """Record and install a program for the module of this call, unless one of its class fits already, or Dynamo does it alone.

    whole: one that stands in a graph as one call, however Dynamo does; if there can be none, nothing is told.
    """
    cls = type(call.module)
    call = _normal(call)
    if marked(call.module) and fitting(call.module, call.args, call.kwargs, whole) is not None:
        return True
    question = None if hooked(call.module) else (_question(call), whole)
    if (why := _REFUSED.get(question)) is None:
        try:
            if not _installed(call, report, whole):
                return False
        except NotProbed as e:
            why = str(e)
        except Exception as e:
            log.debug("probing %s", cls.__name__, exc_info=True)
            why = f"probing it failed with {type(e).__name__}: {_line(e)}"
    program = fitting(call.module, call.args, call.kwargs, whole) if why is None else None
    if program is None:
        why = why or "the program that was made for it does not fit it"
        if question is not None:
            _REFUSED[question] = why
        if whole:
            log.debug("%s is not recorded as a whole: %s", cls.__name__, why)
        else:
            _note(report, f"{cls.__name__} stays as it is: {why}")
        return False
    mark(call.module)
    _note(report, f"{cls.__name__} is captured from a recording, which assumes: {'; '.join(program.assumptions) or 'nothing'}")
    return True


_REFUSED: dict[Any, str] = {}  # why modules of a class were left as they are: not to be tried again for each layer


def _question(call: Call) -> Any:
    leaves = tree_leaves((call.args, call.kwargs))
    shapes = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else str(x)[:80] for x in leaves)
    own = mode_of(call.module), _settings(vars(call.module))
    return type(call.module), own, shapes, tuple((n, tuple(p.shape), p.dtype) for n, p in call.module.named_parameters())


def _settings(held: dict[Any, Any], depth: int = 3) -> tuple:
    """Plain values by name, those of a configuration too: code may go by any of them. But for what numbers the layers, and our mark."""
    found: list[tuple] = []
    for n, v in sorted(held.items(), key=lambda item: str(item[0])):
        if isinstance(v, bool | int | float | str | None):
            found += [(n, v)] if "idx" not in str(n) else []
        elif depth and isinstance(v, dict | list | tuple):
            found.append((n, _settings(v if isinstance(v, dict) else dict(enumerate(v)), depth - 1)))
        elif depth and n != MARK and hasattr(v, "__dict__") and not callable(v) and not isinstance(v, torch.Tensor):
            found.append((n, _settings(vars(v), depth - 1)))
    return tuple(found)


def _installed(call: Call, report: RewriteReport | None, whole: bool) -> bool:
    """False where nothing is needed."""
    if hooked(call.module):
        raise NotProbed("its submodules have hooks")
    with _undisturbed():
        if fitting(call.module, call.args, call.kwargs, whole) is None:
            if not whole and not call.sure and captured(call.module, call.args, call.kwargs):
                return False
            install(type(call.module), program_for(call.module, call.args, call.kwargs, whole))
            if (why := _other_mode(call, whole)) is not None and not whole:
                _note(report, why)
    return True


def _other_mode(call: Call, whole: bool) -> str | None:
    """A program for training too if this call was none, and the other way round; or why there is none, and that mode runs as it is."""
    mode = "inference" if call.module.training else "training"
    try:
        with other_mode(call.module):
            if fitting(call.module, call.args, call.kwargs, whole) is None:
                install(type(call.module), program_for(call.module, call.args, call.kwargs, whole))
    except NotProbed as e:
        return f"in {mode} {type(call.module).__name__} stays as it is: {e}"
    except Exception as e:
        log.debug("probing %s in its other mode", type(call.module).__name__, exc_info=True)
        return f"in {mode} {type(call.module).__name__} stays as it is: probing it failed with {type(e).__name__}: {_line(e)}"
    return None


def program_for(module: nn.Module, args: tuple, kwargs: dict[str, Any], flat: bool = False) -> Program:
    """A checked program for calls like this one; flat: such as becomes one call in a graph. Raises NotProbed."""
    if "forward" in vars(module):
        raise NotProbed("this module's forward was replaced by hand")
    forward = own_forward(type(module))
    recording = record(module, forward, args, kwargs, flat)
    program = write_program(module, recording, args, kwargs, flat)
    if flat and program.whole is None:
        raise NotProbed("it is no block of torch calls alone that could stand in a graph as one")
    if not program.fits(module, args, kwargs):
        raise NotProbed("the recorded conditions do not hold for the call that was recorded")
    check(module, forward, program, recording, args, kwargs)
    return program


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the caller's inference mode."""
    with torch.inference_mode(False):
        yield


def _normal(call: Call) -> Call:
    """The call with tensors that gradients can be recorded of, whatever mode it was made in."""
    with torch.inference_mode(False):
        args, kwargs = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) and t.is_inference() else t, (call.args, call.kwargs))
    return Call(call.module, args, kwargs, call.sure)


def _note(report: RewriteReport | None, text: str) -> None:
    log.info(text)
    if report is not None and text not in report.notes:
        report.notes.append(text)


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0][:200]
