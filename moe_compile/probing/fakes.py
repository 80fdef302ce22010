"""Fake results of calls that take long where a size is what only the data tells: of the same shape, dtype and device, by a shorter way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def called(func: Callable[..., Any], name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the call of this short name gives for fake tensors."""
    if name == "where" and len(args) == 1 and not kwargs and args[0].dim():
        found = torch.nonzero(args[0])
        return tuple(found.select(1, i) for i in range(args[0].dim()))
    if name in ("__getitem__", "getitem") and isinstance(args[0], torch.Tensor) and (shape := _picked(*args)) is not None:
        return args[0].new_empty(shape)
    return func(*args, **kwargs)


def _picked(x: torch.Tensor, index: Any) -> list[Any] | None:
    """The shape of x[rows], x[rows, columns], x[rows, None] for lists of indices as long as the data tells; None for other indices."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [p for p in parts if p is not None]
    if not lists or any(p is None for p in parts[: len(lists)]) or not all(map(_is_list, lists)) or len(lists) > x.dim():
        return None
    if len({p.shape[0].node.expr for p in lists}) > 1 or x.requires_grad or not x.is_contiguous():
        return None
    return [lists[0].shape[0], *[1] * (len(parts) - len(lists)), *x.shape[len(lists) :]]


def _is_list(p: Any) -> bool:
    return isinstance(p, torch.Tensor) and p.dtype is torch.int64 and p.dim() == 1 and isinstance(p.shape[0], torch.SymInt)
