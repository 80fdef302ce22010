"""Tells the users of the plain backend name of MoE blocks that never reach it, because Dynamo breaks the graph inside them.

Such a break is nothing that a backend sees: Dynamo hands over pieces without the block's experts, or no graph at all. What it did with
each function stands in its compilation metrics, which are looked at when the next compilation ends. A function that it could not trace is
told of, once, if it is a method of a module that holds experts.

The backend does not put another forward into such a module by itself: it would change a user's model in the middle of a call, behind
guards that Dynamo has on the old one. `moe_compile.compile` and `@moe_compile.moe` are asked to.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_compile.logs import log, warn_once

_known: set[tuple[Any, ...]] = set()  # metrics that were looked at
_heard = [False]  # whether anyone has listened: what was compiled before is nobody's news


def listen() -> None:
    """Be called when compilations end. torch._dynamo.reset() ends that, so each use of the backend asks again."""
    from torch._dynamo.callback import callback_handler

    if not _heard[0]:
        _heard[0] = True
        _news()
    if _compilation_ended not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(_compilation_ended)


def _compilation_ended(*_: Any) -> None:
    try:
        tell()
    except Exception as error:  # noqa: BLE001  a message that cannot be made must not cost the user the call
        log.debug("looking for graph breaks inside MoE blocks failed", exc_info=error)


def tell() -> None:
    """Warn of each function that Dynamo could not trace since the last time, and that is a module's with experts."""
    for metrics in _news():
        for file, line, reason in _breaks(metrics):
            cls = _module_with_experts(file, line)
            if cls is not None:
                warn_once(
                    f"Dynamo cannot trace {cls.__qualname__} as one graph ({file}:{line}: {reason}), so its experts stay as they are. "
                    f"moe_compile.compile(model), or @moe_compile.moe on {cls.__qualname__}, tries to do without Dynamo there.",
                    about=f"graph breaks in {cls.__module__}.{cls.__qualname__}",
                )


def _news() -> list[Any]:
    """Metrics of compilations that were not looked at before."""
    from torch._dynamo.utils import get_compilation_metrics

    found = []
    for metrics in get_compilation_metrics():
        key = (str(metrics.compile_id), metrics.start_time_us, metrics.co_filename, metrics.co_firstlineno)
        if key not in _known:
            _known.add(key)
            found.append(metrics)
    return found


def _breaks(metrics: Any) -> Iterator[tuple[str, int, str]]:
    """(file, line, reason) of what stopped a compilation, and of a part that it was cut down to."""
    if metrics.fail_type == "Unsupported" and metrics.fail_user_frame_filename:
        yield metrics.fail_user_frame_filename, metrics.fail_user_frame_lineno, _first_line(metrics.fail_reason)
    elif metrics.restart_reasons and metrics.co_filename:
        yield metrics.co_filename, metrics.co_firstlineno, _first_line(min(metrics.restart_reasons))


def _first_line(reason: Any) -> str:
    return str(reason or "no reason given").strip().splitlines()[0]


@functools.lru_cache(maxsize=256)
def _module_with_experts(file: str, line: int) -> type[nn.Module] | None:
    """The class of a living module with experts, one of whose methods has the line."""
    for each in gc.get_objects():
        if issubclass(type(each), nn.Module) and _has_line(type(each), file, line) and _holds_experts(each):
            return type(each)
    return None


def _has_line(cls: type, file: str, line: int) -> bool:
    return any(_within(value, file, line) for base in cls.__mro__ if base is not nn.Module for value in vars(base).values())


def _within(function: Any, file: str, line: int) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None or code.co_filename != file:
        return False
    return bool(code.co_firstlineno <= line <= max((at for *_, at in code.co_lines() if at), default=code.co_firstlineno))


def _holds_experts(module: nn.Module) -> bool:
    """Has it, or a child of its, a list of several modules of one class, or parameters with an axis for experts?"""
    for part in (module, *module.children()):
        alike = isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(each) for each in part}) == 1
        if alike or any(p.dim() >= 3 and p.shape[0] > 1 for p in part.parameters(recurse=False)):
            return True
    return False
