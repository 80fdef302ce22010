"""What tensors hold that are computed from constants alone: computed along, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_unflatten

LARGEST = 4096  # elements
_CREATORS = {"arange", "zeros", "ones", "full", "tensor", "eye", "linspace"}
_RANDOM = {"rand", "randn", "randint", "randperm", "bernoulli", "dropout", "multinomial", "empty", "empty_like", "rand_like", "randn_like"}


class Constants:
    """Contents of fake tensors, as far as they are known."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id of a fake tensor -> the tensor, what it holds

    def __contains__(self, t: torch.Tensor) -> bool:
        return id(t) in self._known

    def __getitem__(self, t: torch.Tensor) -> torch.Tensor:
        return self._known[id(t)][1]

    def __setitem__(self, t: torch.Tensor, contents: torch.Tensor) -> None:
        self._known[id(t)] = t, contents

    def forget(self, t: torch.Tensor) -> None:
        """It was written to: its contents, and those of its views, are known no more."""
        memory = t.untyped_storage()._cdata
        for other in [other for other, _ in self._known.values() if other.untyped_storage()._cdata == memory]:
            del self._known[id(other)]

    def result(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """What the call's result holds, where that follows from constants."""
        parts, spec = tree_flatten((args, kwargs))
        if any(isinstance(p, torch.SymInt | torch.SymFloat) or (isinstance(p, torch.Tensor) and p not in self) for p in parts):
            return None
        tensors = [p for p in parts if isinstance(p, torch.Tensor)]
        if (not tensors and name not in _CREATORS) or (name.endswith("_") and not name.endswith("__")) or name in _RANDOM:
            return None
        real = [self[p] if isinstance(p, torch.Tensor) else ("cpu" if isinstance(p, torch.device) else p) for p in parts]
        with unset_fake_temporarily(), torch.no_grad():
            a, k = tree_unflatten(real, spec)
            if "device" in k:
                k["device"] = "cpu"
            out = func(*a, **k)
        return out if isinstance(out, torch.Tensor) and out.numel() <= LARGEST else None

    def one_index(self, index: Any) -> int | None:
        """The index that a tensor of one known index holds."""
        if not isinstance(index, torch.Tensor) or index.is_floating_point() or index not in self:
            return None
        known = self[index]
        return int(as_list(known)[0]) if tuple(known.shape) == (1,) and known.dtype is torch.int64 else None


def as_list(t: torch.Tensor) -> Any:
    """What a real tensor holds, asked while fake tensors are on."""
    with unset_fake_temporarily():
        return t.tolist()
