"""Indices in forms that are easier to follow: known numbers for tensors, flat masks, the first rows of a mask as a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from moe_compile.probing import lists
from moe_compile.probing.contents import Rows, number
from moe_compile.probing.emptiness import name_of
from moe_compile.probing.errors import NotProbed, users_frame, where
from moe_compile.probing.numbers import of_data

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def plain_index(r: Recorder, index: Any) -> Any:
    """The same index, with numbers where they are known."""
    if isinstance(index, Rows):
        return index.tensor
    if isinstance(index, tuple):
        return tuple(plain_index(r, i) for i in index)
    if isinstance(index, slice):
        return slice(*[number(r, x) if isinstance(x, torch.Tensor) else x for x in (index.start, index.stop, index.step)])
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32) and index in r.constants:
        known = r.constants[index]
        with unset_fake_temporarily():
            if known.dim() == 0:
                return int(known)
            if known.dim() == 1 and known.numel() == 1:
                return [int(known)]
    if isinstance(index, list) and index and all(isinstance(i, torch.SymInt) for i in index):
        if r.members:
            return lists.values(r, index)
        raise NotProbed(f"{where(users_frame())}: a list of numbers of the data is an index")
    return index


def chosen_element(r: Recorder, t: torch.Tensor, index: Any) -> torch.Tensor | None:
    """t[i] for a number i that the data tells, by a tensor of one number, which nobody asks for."""
    parts = index if isinstance(index, tuple) else (index,)
    found = [number_of_data(r, p) if r.loops or isinstance(p, torch.SymInt) else None for p in parts]
    if all(f is None for f in found):
        return None
    if any(f is None and type(p) is not int and not isinstance(p, slice) for f, p in zip(found, parts)):
        raise NotProbed(f"{where(users_frame())}: an index of several kinds, one of them a number that only the data tells")
    with r:
        for d, (i, p) in reversed(list(enumerate(zip(found, parts)))):
            front = (slice(None),) * d
            if i is not None:
                at = (*front, i.reshape(1))
                t = t[at].squeeze(d)
            elif p != slice(None):
                at = (*front, p)
                t = t[at]
    return t


def number_of_data(r: Recorder, p: Any) -> torch.Tensor | None:
    """The tensor of one number whose value is an index, where only the data tells it."""
    if isinstance(p, torch.Tensor) and not p.dim() and p.dtype is torch.int64 and p not in r.constants:
        return p
    if not isinstance(p, torch.SymInt) or not of_data(p):
        return None
    found = r.tape.source(p.node.expr)
    if found is None:
        raise NotProbed(f"{where(users_frame())}: an index computed from the token's number, or from what the data tells")
    return found


# ---------------------------------------------------------------- masks
def is_mask(index: Any) -> bool:
    """A mask of several dimensions."""
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool and index.dim() > 1


def flat(r: Recorder, t: torch.Tensor, mask: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A mask of several dimensions picks the same rows, in the same order, as one of one dimension."""
    rest = t.shape[mask.dim() :]
    with r.off():
        contiguous = t.is_contiguous()
    if "set" in name and not contiguous:
        return None
    with r:
        rows = t.view(-1, *rest) if contiguous else t.reshape(-1, *rest)
        return rows, mask.reshape(-1)


# ---------------------------------------------------------------- the first rows
def first_rows(r: Recorder, t: torch.Tensor, index: Any) -> torch.Tensor | None:
    """rows[:n], of the rows where a mask holds: the rows where it holds for the n-th time at most."""
    if not _from_the_first(index) or t.dim() != 1 or not isinstance(t.shape[0], torch.SymInt):
        return None
    if not isinstance(index.stop, int | torch.SymInt) or (isinstance(index.stop, int) and index.stop < 0):
        return None
    found = _rows_of(r, r.tape.node(t))
    mask = r.tape.value.get(found[0]) if found is not None else None
    if found is None or not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
        return None
    key = found[0], str(index.stop)
    if key not in r.cuts:
        with r:
            r.cuts[key] = torch.where(mask & (mask.reshape(-1).cumsum(0).view(mask.shape) <= index.stop))
    return r.cuts[key][found[1]]


def cut_to(r: Recorder, t: torch.Tensor, index: Any, out: torch.Tensor) -> None:
    """t[:6] has 6 rows where there are as many: then that is a condition of the program."""
    for d, p in enumerate(index if isinstance(index, tuple) else (index,)):
        if not isinstance(p, slice) or d >= min(t.dim(), out.dim()):
            return
        if type(p.stop) is int and p.stop > 0 and isinstance(t.shape[d], torch.SymInt) and type(out.shape[d]) is int:
            r.numbers.conditions[sympy.Ge(t.shape[d].node.expr, p.stop)] = True


def _from_the_first(index: Any) -> bool:
    """[:n]"""
    return isinstance(index, slice) and index.step is None and (index.start is None or (type(index.start), index.start) == (int, 0))


def _rows_of(r: Recorder, n: Node) -> tuple[Node, int] | None:
    """(mask, dimension), if the node holds the indices along that dimension of where the mask holds."""
    if name_of(n) == "getitem" and isinstance(n.args[0], Node) and name_of(n.args[0]) in ("where", "nonzero") and type(n.args[1]) is int:
        source = n.args[0]
        whole = len(source.args) == 1 and (name_of(source) == "where" or source.kwargs.get("as_tuple"))
        return (source.args[0], n.args[1]) if whole else None
    source = n
    while name_of(source) in ("squeeze", "view", "reshape", "flatten") and isinstance(source.args[0], Node):
        source = source.args[0]
    if name_of(source) != "nonzero" or source is n or len(source.args) != 1 or source.kwargs.get("as_tuple"):
        return None
    mask = r.tape.value.get(source.args[0])
    return (source.args[0], 0) if isinstance(mask, torch.Tensor) and mask.dim() == 1 else None
