"""Dropout of rows whose number only the data tells: which number is drawn for which row depends on how the experts are gone through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_compile.probing.errors import NotProbed, code_of, users_frame, where
from moe_compile.probing.numbers import of_data

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def dropout(r: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """F.dropout(x, p, training) and torch.dropout(x, p, train)"""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    if training and p and any(isinstance(n, torch.SymInt) and of_data(n) for n in args[0].shape):
        frame = users_frame()
        told = f"dropout within the experts, in training: its random numbers would be others; with p = 0 (it is {p}) they are rewritten"
        raise NotProbed(f"{where(frame)}: {told}{code_of(frame)}")
    return r.call(func, getattr(func, "__name__", "dropout"), args, kwargs)
