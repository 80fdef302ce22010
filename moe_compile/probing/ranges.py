"""Which tensors hold ids below which number: what a decision has chosen, and arrangements of it."""

from __future__ import annotations

from typing import Any

import torch

from moe_compile.probing.calls import writes

_ARRANGED = {"view", "reshape", "flatten", "t", "transpose", "contiguous", "squeeze", "unsqueeze", "detach", "cpu", "permute", "clone",
             "float", "long", "int", "to", "double", "getitem", "__getitem__", "select", "narrow", "gather", "index_select", "flip", "roll",
             "expand", "repeat"}  # fmt: skip
_JOINED = {"stack", "cat", "concat", "concatenate"}


class Ranges:
    def __init__(self) -> None:
        self._below: dict[int, tuple[torch.Tensor, int]] = {}  # id of a tensor of ids -> the tensor, they are below

    def below(self, t: Any) -> int | None:
        return self._below[id(t)][1] if id(t) in self._below else None

    def note(self, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """A torch call has been made: is its result such a tensor?  What is written into is none any more, nor what shares its memory."""
        if writes(name) and args and isinstance(args[0], torch.Tensor):
            memory = _memory(args[0])
            self._below = {key: found for key, found in self._below.items() if _memory(found[0]) != memory}
        if name in ("where", "nonzero") and isinstance(out, tuple):
            self._note_places(args[0] if args else None, out)
            return
        if name == "sort" and isinstance(out, tuple) and (n := self.below(args[0])) is not None:
            out = out[0]
        elif name in ("topk", "max", "min", "sort") and isinstance(out, tuple) and len(out) == 2:
            out, n = out[1], choices(name, args, kwargs)
        elif name in ("argmax", "argmin", "argsort"):
            n = choices(name, args, kwargs)
        elif name in _ARRANGED and args and isinstance(args[0], torch.Tensor):
            n = self.below(args[0])
        elif name in _JOINED and args and isinstance(args[0], tuple | list):
            each = [self.below(t) for t in args[0]]
            n = max(filter(None, each), default=None) if all(each) else None
        else:
            return
        if n is not None and isinstance(out, torch.Tensor):
            self._below[id(out)] = out, n

    def _note_places(self, mask: Any, out: tuple) -> None:
        """Where a mask holds: along each dimension, numbers below its size."""
        for places, size in zip(out, mask.shape if isinstance(mask, torch.Tensor) else ()):
            if isinstance(size, int) and isinstance(places, torch.Tensor):
                self._below[id(places)] = places, size


def _memory(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def choices(name: str, args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Among how many a routing decision chooses, where that is a plain number."""
    at = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[at] if len(args) > at else (None if name in ("max", "min", "argmax", "argmin") else -1))
    scores = args[0]
    if not isinstance(dim, int) or not scores.is_floating_point() or not scores.dim():
        return None
    size = scores.shape[dim]
    return size if isinstance(size, int) else None
