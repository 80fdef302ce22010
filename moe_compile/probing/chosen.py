"""experts[i] for a number that the data tells, in a loop over tokens: each expert runs, and the chosen one's results are taken."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

from moe_compile.probing.errors import NotProbed, users_frame, where
from moe_compile.probing.indices import number_of_data

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


class Chosen:
    """One of several modules, or of their methods: what is asked of it is asked of each."""

    def __init__(self, r: Recorder, parts: Sequence[Any], ids: torch.Tensor) -> None:
        self._r, self._parts, self._ids = r, parts, ids

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        used = (*self._parts, *args, *kwargs, *kwargs.values())
        key = tuple((id(x), x._version if isinstance(x, torch.Tensor) else 0) for x in used)
        if key not in self._r.stacked:  # else it is another slot of the same token
            self._r.stacked[key] = self._every([part(*args, **kwargs) for part in self._parts]), used
        return self._picked(self._r.stacked[key][0])

    def __getattr__(self, name: str) -> Any:
        found = [getattr(part, name) for part in self._parts]
        if all(isinstance(f, torch.Tensor) for f in found):
            return self._picked(self._every(found))
        if all(callable(f) for f in found):
            return Chosen(self._r, found, self._ids)
        if all(type(f) is type(found[0]) and f == found[0] for f in found):
            return found[0]
        raise NotProbed(f"{where(users_frame())}: {name} of the expert that the data chooses")

    def _every(self, each: list[Any]) -> torch.Tensor:
        """[E, ...] what each expert gives."""
        if any(not isinstance(y, torch.Tensor) or y.shape != each[0].shape or not y.is_floating_point() for y in each):
            raise NotProbed(f"{where(users_frame())}: experts that do not all give one tensor of numbers of the same shape")
        return torch.stack(each)

    def _picked(self, every: torch.Tensor) -> torch.Tensor:
        """The chosen one's, of [E, ...]."""
        chosen = torch.arange(every.shape[0], device=every.device) == self._ids
        return torch.where(chosen.view(-1, *(1,) * (every.dim() - 1)), every, 0.0).sum(0)


@contextlib.contextmanager
def choosing(r: Recorder) -> Iterator[None]:
    """Within, lists and dicts of modules and lists of parameters can be indexed by such numbers."""
    with contextlib.ExitStack() as stack:
        for cls in (nn.ModuleList, nn.Sequential, nn.ModuleDict, nn.ParameterList):
            stack.enter_context(mock.patch.object(cls, "__getitem__", _indexing(r, cls.__getitem__)))
        yield


def _indexing(r: Recorder, original: Callable[..., Any]) -> Callable[..., Any]:
    def item(self: Any, index: Any) -> Any:
        ids = number_of_data(r, index) if r.on and not isinstance(self, nn.ModuleDict) else None
        if isinstance(self, nn.ModuleDict) and r.on and index not in self and (found := _named(r, str(index))) is not None:
            return _chosen(r, [self[key] for e in range(len(self)) if (key := found[1].format(e)) in self], found[0])
        return original(self, index) if ids is None else _chosen(r, list(self), ids)

    return item


def _chosen(r: Recorder, parts: list[Any], ids: torch.Tensor) -> Any:
    below = r.ranges.below(ids)
    if below is None or below > len(parts):
        raise NotProbed(f"{where(users_frame())}: one of {len(parts)} experts is taken by a number that is not known to be below")
    if not r.loops:
        r.unrolled = True
        raise NotProbed(f"{where(users_frame())}: which expert runs is decided by the data, and not for each token in a loop over tokens")
    if all(isinstance(p, torch.Tensor) for p in parts):
        return torch.stack(parts[:below])[ids.reshape(1)].squeeze(0)
    return Chosen(r, parts[:below], ids)


def _named(r: Recorder, key: str) -> tuple[torch.Tensor, str] | None:
    """(ids, "expert_{}") of a key "expert_u3", into which the symbol of a number has been formatted."""
    for name in re.findall(r"u\d+", key):
        for s in r.tape.symbols(name):
            if (ids := r.tape.source(s)) is not None:
                return ids, key.replace(name, "{}", 1)
    return None
