"""Loops over a tensor's rows. One over the experts that are hit visits all of them: those without rows add nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from moe_compile.probing import lists
from moe_compile.probing.emptiness import counts, name_of, tested_count
from moe_compile.probing.errors import NotProbed, users_frame, where
from moe_compile.probing.tokens import is_size, over_rows

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder

_SAME_LIST = {"__getitem__", "getitem", "squeeze", "view", "reshape", "flatten", "tolist", "cpu", "to", "long", "unsqueeze", "detach", "t"}


# ---------------------------------------------------------------- loops
def iterate(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Iterator[torch.Tensor]:
    t = args[0]
    if id(t) in r.cells and lists.open_path(r) is not None:
        return over_rows(r, t)
    if t in r.constants or not (isinstance(t.shape[0], torch.SymInt) or _ordered(r, r.tape.node(t))):
        return iter(rows(r, t))
    if is_size(r, t.shape[0]):
        return over_rows(r, t)
    experts = hit(r, t)
    if experts is None:
        raise NotProbed(f"{where(users_frame())}: a loop over rows whose number only the data tells")
    with unset_fake_temporarily():
        each = list(experts.unbind(0))
    return iter([_constant(r, row, t) for row in each])


def unbind(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    """What a loop over a tensor's rows goes through."""
    if (len(args) > 1 and args[1] != 0) or kwargs.get("dim", 0) != 0:
        return r.call(func, "unbind", args, kwargs)
    if is_size(r, args[0].shape[0]) or (id(args[0]) in r.cells and lists.open_path(r) is not None):
        return over_rows(r, args[0])
    return tuple(iterate(r, func, args, kwargs))


def rows(r: Recorder, t: torch.Tensor) -> list[torch.Tensor]:
    with r:
        return [t[i] for i in range(t.shape[0])]


def _constant(r: Recorder, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A known tensor of one element, written down as a constant."""
    if value.numel() != 1:
        raise NotProbed(f"{where(users_frame())}: a loop over the rows of a table of the experts that are hit")
    with unset_fake_temporarily():
        shape, number = tuple(value.shape), int(value)
    with r:
        t = torch.full(shape, number, dtype=value.dtype, device=like.device)
    r.constants[t] = value
    return t


# ---------------------------------------------------------------- the experts that are hit
def hit(r: Recorder, t: torch.Tensor) -> torch.Tensor | None:
    """The experts that a list of the hit ones visits, if the tensor is such a list."""
    out = _hit(r, r.tape.node(t))
    if out is not None:
        r.assumptions[f"{where(users_frame())}: the loop over the experts that are hit visits all of them"] = None
    return out


def _hit(r: Recorder, n: Node) -> torch.Tensor | None:
    name, value = name_of(n), r.tape.value.get(n)
    if isinstance(value, torch.Tensor) and value in r.constants:
        return r.constants[value]
    if name in ("nonzero", "where") and len(n.args) == 1 and isinstance(n.args[0], Node):
        return _all_of(r, n.args[0], one_column=name == "nonzero" and not n.kwargs.get("as_tuple"))
    if name == "unique" and len(n.args) == 1 and not n.kwargs.get("return_inverse") and isinstance(n.args[0], Node):
        experts = r.ranges.below(r.tape.value.get(n.args[0]))
        with unset_fake_temporarily():
            return None if experts is None else torch.arange(experts)
    if _ordered(r, n):
        with unset_fake_temporarily():
            return None if value is None else torch.arange(value.shape[0])
    if name in _SAME_LIST and n.args and isinstance(n.args[0], Node):
        if name == "getitem" and name_of(n.args[0]) in ("nonzero", "where"):
            return _hit(r, n.args[0])
        source = _hit(r, n.args[0])
        return None if source is None else _viewed(n, name, source)
    return None


def _all_of(r: Recorder, mask: Node, one_column: bool) -> torch.Tensor | None:
    """Every index of a mask that tells which experts have tokens."""
    value = r.tape.value.get(mask)
    found = tested_count(mask, r.tape.value.get)
    if found is None or not found[1] or not isinstance(value, torch.Tensor) or value.dim() != 1 or not isinstance(value.shape[0], int):
        return None
    with unset_fake_temporarily():
        every = torch.arange(value.shape[0])
        return every.unsqueeze(1) if one_column else every


def _ordered(r: Recorder, n: Node) -> bool:
    """All experts in an order of their counts: each comes once, and sums do not tell in which order."""
    if name_of(n) == "getitem" and n.args[1] == 1 and isinstance(n.args[0], Node) and name_of(n.args[0]) == "sort":
        n = n.args[0]
    elif name_of(n) != "argsort":
        return False
    counted = n.args[0] if n.args else None
    value = r.tape.value.get(counted) if isinstance(counted, Node) else None
    whole = isinstance(value, torch.Tensor) and value.dim() == 1 and isinstance(value.shape[0], int)
    return whole and counts(counted, r.tape.value.get)  # type: ignore[arg-type]


def _viewed(n: Node, name: str, source: torch.Tensor) -> torch.Tensor | None:
    """The source as the node arranges it."""
    rest, kwargs = n.args[1:], n.kwargs
    if any(isinstance(a, Node) for a in tree_leaves((rest, kwargs))):
        return None
    with unset_fake_temporarily():
        if name in ("__getitem__", "getitem"):
            return source[rest[0]]
        if name in ("cpu", "to", "long", "detach"):
            return source
        out: torch.Tensor = getattr(source, name)(*rest, **kwargs)
        return out
