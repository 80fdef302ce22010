"""Why a module is left as it is."""

from __future__ import annotations

import linecache
import sys
from types import FrameType
from unittest import mock

import torch

_TORCH = torch.__path__[0]
_MOCK = mock.__file__
_OURS = __file__.rpartition("/")[0]


class NotProbed(Exception):
    """The module's forward is no straight-line program, as far as can be seen; the text says where and why."""


class Asked(NotProbed):
    """Python decides by what only the data tells."""


def users_frame(first: int = 1) -> FrameType | None:
    """The innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(first)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, _OURS)):
        frame = frame.f_back
    return frame


def of_user(frame: FrameType) -> bool:
    """Is it code of the user that runs in this frame?"""
    return of_user_file(frame.f_code.co_filename)


def of_user_file(name: str) -> bool:
    return not name.startswith((_TORCH, _OURS, "<frozen", _MOCK))


def where(frame: FrameType | None) -> str:
    """ "file:line" of a frame."""
    return "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def code_at(file: str, line: int) -> str:
    """ " (`if n > limit:`)", the line of code, where it is there to be read."""
    text = linecache.getline(file, line).strip()
    return f" (`{text if len(text) <= 60 else text[:57] + '...'}`)" if text else ""


def code_of(frame: FrameType | None) -> str:
    return "" if frame is None else code_at(frame.f_code.co_filename, frame.f_lineno)


def asked_by_user() -> bool:
    """Does Python code of the user, not torch's own, ask for the truth of a symbol?  To be called from within the question."""
    frame: FrameType | None = sys._getframe(1)
    inner = (f"{_TORCH}/__init__.py", f"{_TORCH}/fx/experimental/", f"{_TORCH}/utils/_sympy", f"{_OURS}/numbers.py", __file__)
    while frame is not None and frame.f_code.co_filename.startswith(inner):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith((_TORCH, _OURS))  # ours: a torch call that is written down
