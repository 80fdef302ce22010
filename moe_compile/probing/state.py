"""What a forward may leave behind: in the modules, in its arguments, in Python's random numbers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DEPTH = 3


def state_of(root: nn.Module, arguments: Any) -> dict[str, Any]:
    """What modules and arguments hold, by name, but for what tensors hold: to be compared with later."""
    found: dict[str, Any] = {}
    for path, m in root.named_modules():
        for n, v in [*vars(m).items(), *m._parameters.items(), *m._buffers.items()]:
            if n not in _TABLES:
                found[f"{path}.{n}".lstrip(".")] = mark_of(v, DEPTH)
    found["the arguments"] = mark_of(arguments, DEPTH + 1)
    found["Python's random numbers"] = random.getstate()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        found["numpy's random numbers"] = (name, keys.tobytes(), *rest)
    return found


def hooked(root: nn.Module) -> bool:
    """Do submodules have hooks?  They may change what the code sees, and must not hear of calls that are not the user's."""
    return any(m is not root and any(vars(m).get(h) for h in HOOKS) for m in root.modules())


@contextlib.contextmanager
def put_back(root: nn.Module) -> Iterator[None]:
    """Attributes and buffers of the modules are afterwards the objects that they were, buffers with what they held."""
    plain = {m: {n: v for n, v in vars(m).items() if n not in _TABLES} for m in root.modules()}
    buffers = {m: dict(m._buffers) for m in root.modules()}
    contents = {b: b.detach().clone() for table in buffers.values() for b in table.values() if b is not None}
    try:
        yield
    finally:
        for m, before in plain.items():
            for n in [n for n in vars(m) if n not in _TABLES and n not in before]:
                del vars(m)[n]
            vars(m).update(before)
            m._buffers.clear()
            m._buffers.update(buffers[m])
        with torch.no_grad():
            for b, was in contents.items():
                b.copy_(was)


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what has changed."""
    return [n for n in {**before, **after} if before.get(n, ()) != after.get(n, ())]


def mark_of(v: Any, depth: int) -> Any:
    """Equal as long as the value is the same and holds the same."""
    if isinstance(v, bool | int | float | str | bytes | type(None)):
        return type(v), v
    if depth and isinstance(v, list | tuple):
        return id(v) if isinstance(v, list) else 0, [mark_of(x, depth - 1) for x in v]
    if depth and isinstance(v, dict):
        return id(v), [(k if isinstance(k, str | int) else id(k), mark_of(x, depth - 1)) for k, x in v.items()]
    if isinstance(v, set | frozenset):
        return id(v), len(v)
    if depth and not isinstance(v, torch.Tensor | nn.Module | type) and hasattr(v, "__dict__") and not callable(v):
        return id(v), [(k, mark_of(x, depth - 1)) for k, x in vars(v).items()]
    return id(v)
