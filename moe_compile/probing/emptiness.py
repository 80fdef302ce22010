"""Which tests of tensors ask "is it empty?": a comparison with zero of something that counts routing ids.

ids      integers that a decision chose (or that came as integers from elsewhere), in any arrangement
counts   numbers that are zero where no id is counted and above zero elsewhere: masks `ids == e`, one-hot rows, sums of them

`(counts == 0).any()` or `counts.all()` are neither: there "nothing" and "something" stand the other way round, or mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from moe_compile.probing.calls import writes

Values = Callable[[Node], Any]

ARRANGED = frozenset({
    "getitem", "__getitem__", "select", "permute", "transpose", "view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "t", "T",
    "mT", "contiguous", "cpu", "clone", "detach", "view_as", "reshape_as", "unbind", "chunk", "split", "item", "tolist", "narrow",
    "movedim", "swapaxes", "ravel", "expand_as", "broadcast_to", "flip", "cuda", "numpy",
})  # fmt: skip
_CAST = frozenset({"to", "long", "int", "float", "bool", "type", "half", "bfloat16", "double", "type_as"})
_JOINED = frozenset({"cat", "stack", "concat", "hstack", "vstack"})
_SUMMED = frozenset({"sum", "any", "amax", "cumsum", "count_nonzero"})
_CHOICES = frozenset({"topk", "max", "argmax", "sort", "argsort", "min", "argmin", "multinomial"})
_BOTH = frozenset({"mul", "__mul__", "and_", "__and__", "logical_and", "bitwise_and", "multiply"})
_EITHER = frozenset({"add", "__add__", "or_", "__or__", "logical_or", "bitwise_or"})
_EMPTY = frozenset({"zeros", "zeros_like", "new_zeros"})
_SCATTERED = frozenset({"scatter", "scatter_", "scatter_add", "scatter_add_"})

_ZERO = {"eq": False, "__eq__": False, "ne": True, "__ne__": True, "gt": True, "__gt__": True, "greater": True, "not_equal": True}
_ONE = {"ge": True, "__ge__": True, "lt": False, "__lt__": False, "greater_equal": True, "less": False}
_EQUAL = {"eq", "__eq__"}
_NOT = {"logical_not", "logical_not_", "__invert__", "bitwise_not", "invert"}


def name_of(n: Node) -> str:
    """The plain name of what a node calls."""
    if n.op == "call_method":
        return str(n.target)
    name = getattr(n.target, "__name__", str(n.target)) if n.op == "call_function" else n.op
    return str(n.args[1]) if name == "getattr" else name


def tested_count(n: Node, value: Values) -> tuple[Node, bool] | None:
    """(what is counted, the test's result where there is something), if node n tests for emptiness."""
    name = name_of(n)
    if name in _NOT:
        inner = tested_count(n.args[0], value) if isinstance(n.args[0], Node) else None
        return None if inner is None else (inner[0], not inner[1])
    if (found := _compared(n)) is not None and counts(found[0], value):
        return found
    return (n, True) if counts(n, value) else None


def _compared(n: Node) -> tuple[Node, bool] | None:
    """(what, the result where it is above zero) of a comparison with zero, or with one where that means the same."""
    for table, number in ((_ZERO, 0), (_ONE, 1)):
        if name_of(n) in table and len(n.args) == 2 and isinstance(n.args[0], Node) and _is_number(n.args[1], number):
            return n.args[0], table[name_of(n)]
    return None


def _is_number(x: Any, number: int) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x == number


def counts(n: Node, value: Values) -> bool:
    """Is the node's value zero exactly where no id is counted?"""
    return _Kinds(value).counts(n)


def _writers(n: Node) -> Iterator[Node]:
    """Nodes that write into the node's memory, its views' too."""
    for u in n.users:
        name = name_of(u)
        if not u.args or u.args[0] is not n:
            continue
        if writes(name):
            yield u
        elif name in ARRANGED and name not in ("clone", "tolist", "item"):
            yield from _writers(u)


def _given(n: Node) -> bool:
    """An argument, or what a module returns: it tells by its shape what it may be."""
    if n.op == "call_function" and name_of(n) == "getitem" and isinstance(n.args[0], Node):
        return n.args[0].op == "call_module"
    return n.op in ("placeholder", "call_module")


def _is_mask(t: Any) -> bool:
    """[B, T, E], one-hot, where ids would be [T, K]."""
    return isinstance(t, torch.Tensor) and not t.is_floating_point() and not t.is_complex() and t.dim() > 2


class _Kinds:
    """What nodes hold, remembered."""

    def __init__(self, value: Values) -> None:
        self.value = value
        self.known: dict[tuple[str, Node], bool] = {}

    def counts(self, n: Any) -> bool:
        return isinstance(n, Node) and self._once("counts", n, self._counts)

    def ids(self, n: Any) -> bool:
        return isinstance(n, Node) and self._once("ids", n, self._ids)

    def _once(self, kind: str, n: Node, ask: Callable[[Node], bool]) -> bool:
        if (kind, n) not in self.known:
            writers = list(_writers(n))
            if writers and not all(name_of(w) in _SCATTERED and self._scattered(w) for w in writers):
                self.known[kind, n] = False
            else:
                self.known[kind, n] = (kind == "counts" and bool(writers) and name_of(n) in _EMPTY) or ask(n)
        return self.known[kind, n]

    def _counts(self, n: Node) -> bool:
        name = name_of(n)
        if _given(n):
            return _is_mask(self.value(n))
        if n.op not in ("call_function", "call_method") or not n.args:
            return False
        first = n.args[0]
        if name in _EQUAL and len(n.args) == 2 and (self.ids(first) or self.ids(n.args[1])):
            return True
        if name in ("one_hot", "bincount", "histc"):
            return self.ids(first)
        if name in _SCATTERED:
            return self._scattered(n)
        if (test := _compared(n)) is not None:
            return test[1] and self.counts(test[0])
        if name in _BOTH and len(n.args) == 2:
            return any(self.counts(a) and self._whole(b) for a, b in (n.args, n.args[::-1]))
        if name in _EITHER and len(n.args) == 2:
            return all(map(self.counts, n.args))
        if name in _JOINED:
            return isinstance(first, list | tuple) and all(map(self.counts, first))
        return name in ARRANGED | _CAST | _SUMMED and self.counts(first)

    def _scattered(self, n: Node) -> bool:
        """zeros.scatter(dim, ids, 1)"""
        base, _, index, src = [*n.args, None, None, None][:4]
        src = n.kwargs.get("src", n.kwargs.get("value", src))
        ones = (isinstance(src, int | float) and src > 0) or (isinstance(src, Node) and name_of(src) in ("ones", "ones_like", "new_ones"))
        empty = isinstance(base, Node) and (name_of(base) in _EMPTY or (name_of(n).endswith("_") is False and self.counts(base)))
        return empty and ones and self.ids(index)

    def _whole(self, n: Any) -> bool:
        """Integers or truth values, whatever they say: they leave some out of a count."""
        t = self.value(n) if isinstance(n, Node) else None
        return isinstance(t, torch.Tensor) and not t.is_floating_point() and not t.is_complex()

    def _ids(self, n: Node) -> bool:
        t, name = self.value(n), name_of(n)
        if not isinstance(t, torch.Tensor) or t.dtype is torch.bool:
            return False
        if t.is_floating_point():  # ids as floats, for histc
            return name in _CAST and n.op.startswith("call") and self.ids(n.args[0])
        if _given(n):
            return n.op == "call_module" or not _is_mask(t)
        if n.op == "get_attr" or not n.args:
            return False
        first = n.args[0]
        if name in _CHOICES:
            return True
        if name == "getitem" and isinstance(first, Node) and isinstance(self.value(first), tuple | list):
            return name_of(first) in _CHOICES
        if name in ("gather", "take_along_dim", "index_select"):
            return self.ids(first)
        if name in _JOINED:
            return isinstance(first, list | tuple) and all(map(self.ids, first))
        return name in ARRANGED | _CAST and self.ids(first)
