"""Routing decisions as a check wants them: each expert without tokens, each one with some, all tokens to a few."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# first, last, middle: all tokens to these experts. spread: each is hit in turn. not first, not last: that one is not hit.
STEERINGS = ("first", "last", "middle", "spread", "not first", "not last")
_DECISIONS = {"topk": 2, "sort": 1, "argsort": 1, "argmax": 1, "max": 1, "argmin": 1, "min": 1}  # where `dim` stands


def steered(scores: torch.Tensor, dim: int, k: int, steering: str) -> torch.Tensor:
    """The scores of each row in another order, the largest where they are to be chosen; elsewhere the least, and less."""
    moved = scores.movedim(dim, -1)
    n, rows = moved.shape[-1], moved.shape[:-1]
    column = torch.arange(n, device=scores.device).expand(*rows, n)
    start = {"first": 0, "last": n - k, "middle": (n - k) // 2}.get(steering)
    if start is not None:
        wanted = (column >= start) & (column < start + k)
    elif steering == "spread":
        row = torch.arange(rows.numel(), device=scores.device).reshape(*rows, 1)
        wanted = (column - row * k) % n < k
    else:
        wanted = column != (0 if steering == "not first" else n - 1)
    least = moved.detach().amin(-1, keepdim=True) - (column + 1).to(moved.dtype)
    lowered = torch.where(wanted, moved, least.to(moved.dtype))
    place = lowered.detach().argsort(-1, descending=True).argsort(-1)
    largest = moved.gather(-1, moved.detach().argsort(-1, descending=True)).gather(-1, place)
    return torch.where(wanted, largest, lowered).movedim(-1, dim)


class Steered(TorchFunctionMode):
    """Within, what code decides by (top-k, argmax, sort, max of floats) is steered."""

    def __init__(self, steering: str) -> None:
        super().__init__()
        self.steering = steering

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _DECISIONS and args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and args[0].dim():
            args = (self._scores(name, args, kwargs), *args[1:])
        return func(*args, **kwargs)

    def _scores(self, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        at = _DECISIONS[name]
        dim = kwargs.get("dim", args[at] if len(args) > at else (-1 if name in ("topk", "sort", "argsort") else None))
        k = kwargs.get("k", args[1] if len(args) > 1 else 1) if name == "topk" else 1
        scores: torch.Tensor = args[0]
        if type(dim) is not int or type(k) is not int or not 0 < k < scores.shape[dim]:
            return scores
        if name in ("min", "argmin"):
            return -steered(-scores, dim, k, self.steering)
        return steered(scores, dim, k, self.steering)
