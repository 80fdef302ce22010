"""Autocast and gradients on or off: marked where such a region begins and ends; program.py makes `with` blocks of the marks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def opened(kind: str, *args: Any) -> None:
    """Marks where a `with` block begins: autocast, or gradients on or off."""


def closed() -> None:
    """Marks where the innermost `with` block ends."""


def grad_mode(r: Recorder, func: Any, args: tuple, kwargs: Any) -> None:
    """`with torch.no_grad()` and the like; what a call of `set_grad_enabled` would leave behind is seen at the end."""
    caller = _method_of_grad_mode(sys._getframe(3))
    if caller == "__enter__":
        r.tape.add("call_function", opened, ("grad", *args))
    elif caller == "__exit__":
        r.tape.add("call_function", closed)
    func(*args)


def _method_of_grad_mode(frame: FrameType | None) -> str:
    """Which method of torch.no_grad or its like was called by the user: no_grad itself makes a set_grad_enabled."""
    name = ""
    while frame is not None and frame.f_code.co_filename == torch.autograd.grad_mode.__file__:
        name = frame.f_code.co_name
        frame = frame.f_back
    return name


@contextlib.contextmanager
def autocast_marked(r: Recorder) -> Iterator[None]:
    """Autocast does not pass through torch functions: within, its own methods tell the recorder."""
    autocast = torch.amp.autocast_mode.autocast
    enter, leave = autocast.__enter__, autocast.__exit__

    def marked_enter(self: Any) -> Any:
        if r.on:
            settings = self.device, self.fast_dtype, self._enabled, self._cache_enabled
            r.tape.add("call_function", opened, ("autocast", *settings))
        return enter(self)

    def marked_exit(self: Any, *args: Any) -> Any:
        if r.on:
            r.tape.add("call_function", closed)
        return leave(self, *args)

    with mock.patch.object(autocast, "__enter__", marked_enter), mock.patch.object(autocast, "__exit__", marked_exit):
        yield
