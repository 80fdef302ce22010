"""Frames whose code was captured as a part of a larger one, in which nothing was to be rewritten: not to be searched again.

A frame that is given up with the capture flags breaks into its rest behind each break, and into the frames of what it calls. Each of them
would be captured with the flags once more, to the end, and lifted again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

from torch import nn
from torch._dynamo import resume_execution


class Refused:
    """Each frame is held back once: when it is captured again, something has changed, its shapes say."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()  # refused from the first line to the last
        self._inside: list[_Inside] = []
        self._held: set[tuple[CodeType, int]] = set()

    def add(self, frame: Any, codes: frozenset[CodeType]) -> None:
        """codes: what was captured, the frame's own among it; none where it was not all of the frame."""
        if codes:
            self._codes.add(frame.f_code)
            mine = next(_modules(frame), None)
            if mine is not None:
                self._inside.append(_Inside(codes, weakref.WeakSet(mine.modules()), (frame.f_code, id(mine))))

    def holds(self, frame: Any) -> bool:
        modules = list(_modules(frame))
        key = frame.f_code, id(modules[0]) if modules else 0
        inside = any(frame.f_code in i.codes and any(m in i.modules for m in modules) and key != i.outermost for i in self._inside)
        if key in self._held or not (inside or _resumed(frame.f_code) in self._codes):
            return False
        self._held.add(key)
        return True


class _Inside(NamedTuple):
    """codes: what was captured with a frame. modules: whose it may have been. outermost: the frame itself, its code and module's id."""

    codes: frozenset[CodeType]
    modules: weakref.WeakSet[nn.Module]
    outermost: tuple[CodeType, int]


def _modules(frame: Any) -> Iterator[nn.Module]:
    return (v for v in frame.f_locals.values() if isinstance(v, nn.Module))


def _resumed(code: CodeType) -> CodeType | None:
    """The code that this is the rest of, behind a break of the graph."""
    cache = getattr(resume_execution, "ContinueExecutionCache", None)
    meta = getattr(cache, "generated_code_metadata", {}).get(code)
    return getattr(meta, "code", None)
