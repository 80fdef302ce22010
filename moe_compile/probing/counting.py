"""bincount and histc of ids: the same counts by one_hot, whose shape the data does not tell; a one_hot whose shape it does tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import SymT, symbol_is_type
from torch.utils._sympy.functions import Max

from moe_compile.probing.emptiness import name_of
from moe_compile.probing.errors import NotProbed, users_frame, where

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def bincount(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    """bincount(ids, minlength=E) is as long as E says, as ids are below E."""
    experts, below = args[2] if len(args) > 2 else kwargs.get("minlength", 0), r.ranges.below(args[0])
    if len(args) + len(kwargs) > 2 or kwargs.get("weights", args[1] if len(args) == 3 else None) is not None:
        raise NotProbed(f"{where(users_frame())}: a weighted bincount")
    if experts == 0 and below is not None:  # as long as the last id that is there: those behind it count nothing
        r.assumptions[f"{where(users_frame())}: experts beyond the last that is hit add nothing"] = None
        experts = below
    if below is None or below > experts:
        raise NotProbed(f"{where(users_frame())}: bincount of numbers that are not known to be below {experts}")
    with r:
        return torch.nn.functional.one_hot(args[0].long(), experts).sum(0)


class Wide:
    """A one_hot with as many classes as the data tells: good for its first ones only."""

    def __init__(self, r: Recorder, ids: torch.Tensor, classes: torch.SymInt) -> None:
        self._r, self._ids, self._classes = r, ids, classes

    def __getitem__(self, index: Any) -> torch.Tensor:
        """[..., :n], where max(ids.max() + 1, n) classes hold all ids and the n that are asked for."""
        last = index[-1] if isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis else None
        if not isinstance(last, slice) or last.start not in (None, 0) or last.step is not None:
            raise NotProbed(f"{where(users_frame())}: a one_hot as wide as the data tells is used for more than its first classes")
        if not _holds_all(self._r, self._ids, self._classes, last.stop):
            raise NotProbed(f"{where(users_frame())}: a one_hot that is not known to be as wide as its ids and what is read of it ask for")
        with self._r:
            return (self._ids.unsqueeze(-1) == torch.arange(last.stop, device=self._ids.device)).long()

    def __getattr__(self, name: str) -> Any:
        raise NotProbed(f"{where(users_frame())}: {name} of a one_hot as wide as the data tells")


def one_hot(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    classes = kwargs.get("num_classes", args[1] if len(args) > 1 else None)
    if isinstance(classes, torch.SymInt) and any(symbol_is_type(s, SymT.UNBACKED_INT) for s in classes.node.expr.free_symbols):
        return Wide(r, args[0], classes)
    if isinstance(classes, int):
        r.classes.append(classes)
    return r.call(func, "one_hot", args, kwargs)


def _holds_all(r: Recorder, ids: torch.Tensor, classes: torch.SymInt, n: Any) -> bool:
    """Is it max(ids.max() + 1 or more, n)?"""
    wanted = n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(n) if isinstance(n, int) and n >= 0 else None
    limits = set(_limits(classes.node.expr))
    return wanted is not None and set(_limits(wanted)) <= limits and any(_beyond(r, ids, e) for e in limits)


def _limits(e: sympy.Basic) -> tuple[sympy.Basic, ...]:
    """The numbers of which e is the largest."""
    return e.args if isinstance(e, Max) else (e,)


def _beyond(r: Recorder, ids: torch.Tensor, limit: sympy.Basic) -> bool:
    """Is it the largest of the ids, and one or more?"""
    more, number = limit.as_coeff_Add()
    source = r.tape.origin(number) if isinstance(number, sympy.Symbol) else None
    if source is None or name_of(source) != "item" or not isinstance(source.args[0], Node):
        return False
    largest = source.args[0]
    while name_of(largest) in ("add", "__add__") and isinstance(largest.args[0], Node) and (n := _plus(largest)) >= 0:
        more, largest = more + n, largest.args[0]
    return more >= 1 and name_of(largest) in ("max", "amax") and largest.args == (r.tape.node(ids),) and not largest.kwargs


def _plus(n: Node) -> int:
    """The whole number that the node adds to its first argument, -1 for none."""
    more = n.args[1] if len(n.args) == 2 else None
    return more if isinstance(more, int) and not n.kwargs else -1


def histc(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    """histc of ids with bins as wide as one id. Bins before the first id count nothing."""
    bins, low, high = [*args[1:], *[None] * 3][:3]
    bins, low, high = kwargs.get("bins", bins), kwargs.get("min", low), kwargs.get("max", high)
    below = r.ranges.below(args[0])
    if not all(isinstance(x, int) for x in (bins, low, high, below)) or not isinstance(low, int) or low >= 0 or bins != high - low:
        return r.call(func, "histc", args, kwargs)
    if below > high:
        return r.call(func, "histc", args, kwargs)
    with r:
        counts_E = torch.nn.functional.one_hot(args[0].long().reshape(-1), high).sum(0)
        padded = torch.cat([torch.zeros(-low, dtype=torch.long, device=counts_E.device), counts_E])
        r.padded[r.tape.node(padded)] = -low, counts_E
        return padded.to(args[0].dtype)
