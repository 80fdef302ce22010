"""What Python asks of a tensor's contents: known ones as they are, others as symbols, and a count's truth as "not empty"."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from moe_compile.probing import lists
from moe_compile.probing.constants import as_list
from moe_compile.probing.emptiness import counts, name_of, tested_count
from moe_compile.probing.errors import Asked, NotProbed, code_of, users_frame, where
from moe_compile.probing.hit import hit, rows
from moe_compile.probing.tokens import is_size, of_token, over_rows, place, read

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder

_SAME_NUMBERS = {"cpu", "to", "long", "int", "detach", "contiguous", "clone"}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}


class Rows(list):
    """A list of numbers, as long as the data tells: good for an index, or as the set of the experts that are hit, only."""

    def __init__(self, r: Recorder, t: torch.Tensor) -> None:
        super().__init__()
        self.recorder, self.tensor = r, t

    def different(self) -> set[int]:
        """What `set(ids)` is taken for: all experts, as those that are not hit add nothing."""
        below = self.recorder.ranges.below(self.tensor)
        if below is None:
            raise self._why()
        self.recorder.assumptions[f"{where(users_frame())}: the loop over the experts that are hit visits all of them"] = None
        return set(range(below))

    def _no(self, *_: Any) -> Any:
        raise self._why()

    def _why(self) -> NotProbed:
        return NotProbed(f"{where(users_frame())}: a list as long as the data tells is used for more than an index")

    __len__ = __iter__ = __getitem__ = __contains__ = __bool__ = _no  # type: ignore[assignment]


class Table(Rows):
    """`ids.tolist()`, with an entry for each token: good for a loop over tokens, too."""

    def __iter__(self) -> Iterator[Any]:
        return over_rows(self.recorder, self.tensor, lambda row: _listed(self.recorder, row))

    def __getitem__(self, index: Any) -> Any:
        at = place(self.recorder, index)
        return self._no() if at is None else _listed(self.recorder, read(self.recorder, self.tensor, at))

    __len__ = __contains__ = __bool__ = Rows._no  # type: ignore[assignment]


class Slots(Table):
    """`ids[t].tolist()`, where tokens are put into lists: good for a loop over the token's slots, too."""

    def __getitem__(self, index: Any) -> Any:
        return _listed(self.recorder, self.tensor[index]) if type(index) is int else super().__getitem__(index)

    def __len__(self) -> int:
        return int(self.tensor.shape[0])


def _listed(r: Recorder, row: torch.Tensor) -> Any:
    return tolist(r, None, (row,), {}) if row.dim() else number(r, row)


# ---------------------------------------------------------------- as Python calls them
def truth(r: Recorder, func: Any, args: tuple, kwargs: Any) -> bool:
    t = args[0]
    if t in r.constants:
        return bool(number(r, t))
    if (chosen := lists.asked_truth(r, t)) is not None:
        return chosen
    place = where(users_frame())
    n = r.tape.node(t)
    if r.loops and of_token(r, n):
        raise Asked(f"{place}: a loop over tokens decides by the contents of one token's row{code_of(users_frame())}")
    found = tested_count(n, r.tape.value.get)
    if found is None and (numbers := _compared_sums(r, n)) is not None:
        return numbers if isinstance(numbers, bool) else r.numbers.not_empty(numbers.node.expr)
    if found is None:
        code = code_of(users_frame())
        raise NotProbed(f"{place}: Python decides by a tensor's contents, and not by whether a count of ids is zero{code}")
    r.assumptions[f"{place}: where no rows are left, what is skipped adds nothing"] = None
    return found[1]


def item(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    return number(r, args[0])


def formatted(r: Recorder, func: Any, args: tuple, kwargs: Any) -> str:
    return format(number(r, args[0]), *args[1:])


def length(r: Recorder, func: Any, args: tuple, kwargs: Any) -> int:
    return int(args[0].shape[0])


def tolist(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    t = args[0]
    if t not in r.constants and (experts := hit(r, t)) is not None:
        return as_list(experts)
    if t in r.constants:
        return as_list(r.constants[t])
    if t.dim() and is_size(r, t.shape[0]) and r.on:
        return Table(r, t)
    if t.dim() and id(t) in r.cells and lists.open_path(r) is not None:
        return Slots(r, t)
    if t.dim() == 1 and isinstance(t.shape[0], torch.SymInt):
        return Rows(r, t)
    if any(not isinstance(s, int) for s in t.shape):
        raise NotProbed(f"{where(users_frame())}: a list as long as the data tells")
    if (parts := _summed(r, r.tape.node(t))) is not None:
        return list(itertools.accumulate(parts))
    return _nested(r, t)


def numpy(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    import numpy as np

    values = tolist(r, func, args, kwargs)
    return np.array(values, dtype=object if any(isinstance(v, torch.SymInt) for v in tree_leaves(values)) else None)


# ---------------------------------------------------------------- numbers
def number(r: Recorder, t: torch.Tensor) -> Any:
    """The number that a tensor of one element holds."""
    if t in r.constants:
        with unset_fake_temporarily():
            return r.constants[t].item()
    if (chosen := lists.asked(r, t)) is not None:
        return chosen
    n = r.tape.node(t)
    if (parts := _sum_of(r, n)) is not None:
        return sum(parts)
    out = t.item()
    s = out.node.expr if isinstance(out, torch.SymInt | torch.SymFloat) else None
    if isinstance(s, sympy.Symbol) and r.tape.item(s, n) and counts(n, r.tape.value.get):
        r.numbers.countable.add(s)
    if isinstance(s, sympy.Symbol):
        lists.note_number(r, s, t)
    return out


def _nested(r: Recorder, t: torch.Tensor) -> Any:
    return number(r, t) if t.dim() == 0 else [_nested(r, part) for part in rows(r, t)]


# ---------------------------------------------------------------- running sums of counts
def _sum_of(r: Recorder, n: Node) -> list[Any] | None:
    """An element of a running sum of counts, as the counts that it adds up."""
    n = _plain(n)
    if name_of(n) not in ("getitem", "__getitem__") or type(n.args[1]) is not int or not isinstance(n.args[0], Node):
        return None
    parts = _summed(r, n.args[0])
    return None if parts is None else parts[: n.args[1] % len(parts) + 1]


def _summed(r: Recorder, n: Node) -> list[Any] | None:
    """The counts that a running sum of them adds up: "is it empty?" is a question about those."""
    n = _plain(n)
    source = _plain(n.args[0]) if name_of(n) == "cumsum" and n.args and isinstance(n.args[0], Node) else None
    if source is None:
        return None
    if source not in r.items:
        pad, counted = r.padded.get(source, (0, r.tape.value.get(source)))
        if not isinstance(counted, torch.Tensor) or counted.dim() != 1 or not counts(r.tape.node(counted), r.tape.value.get):
            return None
        r.items[source] = [0] * pad + _nested(r, counted)
    return r.items[source]


def _compared_sums(r: Recorder, n: Node) -> Any:
    """`start == end` of elements of a running sum, as what Python says of their numbers."""
    compare = getattr(operator, name_of(n).strip("_"), None) if name_of(n).strip("_") in _COMPARISONS else None
    if compare is None or len(n.args) != 2:
        return None
    sides = [_sum_of(r, a) if isinstance(a, Node) else [a] if type(a) is int else None for a in n.args]
    return compare(sum(sides[0]), sum(sides[1])) if None not in sides else None  # type: ignore[arg-type]


def _plain(n: Node) -> Node:
    """Before casts and copies."""
    while name_of(n) in _SAME_NUMBERS and n.args and isinstance(n.args[0], Node):
        n = n.args[0]
    return n
