"""A module's forward on fake tensors, written down torch call by torch call.

The user's Python runs as it is; sizes are symbols (numbers.py), parameters and inputs are fake, submodules are called as wholes. What
Python wants to know of a tensor's contents is answered where it is known (constants, the experts that a loop over the hit ones visits),
given out as a symbol (`.item()`, `.tolist()`, numpy), or answered with "not empty".
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from moe_compile.probing import formulas
from moe_compile.probing.emptiness import counts, name_of, tested_count
from moe_compile.probing.errors import NotProbed, of_user, users_frame, where
from moe_compile.probing.numbers import Numbers, whole_numbers
from moe_compile.probing.reads import SCALARS, Reads
from moe_compile.probing.state import left_behind, state_of

LARGEST_KNOWN = 4096  # elements of a constant that is computed along
_ELEMENT_INDEX = {"__getitem__", "__setitem__", "getitem", "setitem"}
_SAME_LIST = {"__getitem__", "getitem", "squeeze", "view", "reshape", "flatten", "tolist", "cpu", "to", "long", "unsqueeze", "detach", "t"}


_SAME_NUMBERS = {"cpu", "to", "long", "int", "detach", "contiguous", "clone"}


class _Decided:
    """In place of the result of a submodule whose Python decides by data: it is recorded from within."""


@dataclass
class Recording:
    """graph: placeholders are the tensors among the arguments; `get_attr` and `call_module` name what the module holds."""

    graph: Graph
    output: Any  # the result with nodes for tensors
    lines: dict[Node, int]
    file: str
    numbers: Numbers
    inputs: list[Any]  # the fake arguments, flattened
    sources: dict[sympy.Symbol, tuple[int, int]]  # (argument, dim) of each size
    paths: list[str] = field(default_factory=list)  # how to reach each of `inputs` from `args` and `kwargs`
    assumptions: dict[str, None] = field(default_factory=dict)
    rebound: dict[str, Node] = field(default_factory=dict)
    entered: list[str] = field(default_factory=list)  # submodules that were recorded from within
    reads: Reads = field(default_factory=Reads)
    classes: list[int] = field(default_factory=list)  # among how many ids the code counts


class Recorder(TorchFunctionMode):
    def __init__(self, numbers: Numbers, fake: FakeTensorMode) -> None:
        super().__init__()
        self.graph, self.numbers, self.fake = Graph(), numbers, fake
        self.nodes: dict[int, Node] = {}  # id of a fake tensor -> node
        self.value: dict[Node, Any] = {}
        self.known: dict[int, torch.Tensor] = {}  # id of a fake tensor -> its contents
        self.bound: dict[sympy.Symbol, Node | Callable[[], Node]] = {}
        self.names: dict[int, str] = {}  # id of a parameter, buffer or module of the shadow -> its name
        self.lines: dict[Node, int] = {}
        self.assumptions: dict[str, None] = {}
        self.keep: list[Any] = []
        self.ranges: dict[int, int] = {}  # id of a tensor of ids -> they are below
        self.entered: list[str] = []
        self.entering: Callable[[nn.Module], None] = lambda m: None  # to be told of those modules
        self.classes: list[int] = []
        self.formulas: dict[sympy.Basic, Any] = {}
        self.steps: dict[Any, Node] = {}
        self.cuts: dict[tuple[Node, str], Any] = {}  # (mask, limit) -> the first rows where it holds
        self.items: dict[Node, list[Any]] = {}  # counts -> them as numbers
        self.padded: dict[Node, tuple[int, torch.Tensor]] = {}  # counts with so many zeros before them -> them
        self.on = False
        self.file = ""
        self.root: nn.Module | None = None

    # ------------------------------------------------------------ nodes
    def add(self, op: str, target: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Node:
        n = self.graph.create_node(op, target, args, kwargs or {})
        frame = users_frame(2)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        if frame is not None:
            self.lines[n] = frame.f_lineno
        return n

    def hold(self, n: Node, value: Any) -> Any:
        """The node holds the value, and every part of it."""
        self.value[n] = value
        if isinstance(value, torch.Tensor):
            if id(value) not in self.nodes:
                self.nodes[id(value)] = n
                self.keep.append(value)
                self._bind(n, value)
        elif isinstance(value, dict):
            for key, v in value.items():
                self._part(n, key, v)
        elif isinstance(value, tuple | list):
            for i, v in enumerate(value):
                self._part(n, i, v)
        return value

    def _part(self, n: Node, key: Any, v: Any) -> None:
        if isinstance(v, torch.Tensor | tuple | list | dict):
            self.hold(self.add("call_function", operator.getitem, (n, key)), v)

    def _bind(self, n: Node, t: torch.Tensor) -> None:
        for i, s in enumerate(t.shape):
            if isinstance(s, torch.SymInt) and isinstance(e := s.node.expr, sympy.Symbol) and e not in self.bound:
                self.bound[e] = functools.partial(self.add, "call_method", "size", (n, i))

    def node(self, t: torch.Tensor) -> Node:
        if id(t) not in self.nodes:
            name = self.names.get(id(t))
            if name is None:
                raise NotProbed(f"{where(users_frame())}: a tensor comes from outside of the module")
            self.hold(self.add("get_attr", name), t)
        return self.nodes[id(t)]

    def number(self, s: Any) -> Any:
        """A symbolic number as nodes."""
        e = s.node.expr
        if e.is_number:
            return int(e) if isinstance(s, torch.SymInt) else float(e)
        if e not in self.formulas:
            self.formulas[e] = formulas.written(e, self._symbol, lambda f, args: self._folded(f, args))
        return self.formulas[e]

    def _symbol(self, x: sympy.Symbol) -> Node:
        if x not in self.bound:
            raise NotProbed(f"{where(users_frame())}: the number {x} has no origin that can be written down")
        b = self.bound[x]
        if not isinstance(b, Node):
            self.bound[x] = b = b()
        return b

    def _folded(self, f: Callable[..., Any], args: tuple) -> Any:
        """The step as a node; sums that begin alike share it."""
        if (f, args) not in self.steps:
            self.steps[f, args] = self.add("call_function", f, args)
        return self.steps[f, args]

    def written(self, x: Any) -> Any:
        """An argument with nodes for tensors and symbols."""
        if isinstance(x, torch.Tensor):
            return self.node(x)
        if isinstance(x, torch.SymInt | torch.SymFloat):
            return self.number(x)
        if isinstance(x, torch.SymBool):
            raise NotProbed(f"{where(users_frame())}: a truth value that only the data tells is an argument")
        if isinstance(x, slice):
            return slice(self.written(x.start), self.written(x.stop), self.written(x.step))
        if isinstance(x, torch.Size | tuple):
            return tuple(map(self.written, x))
        if isinstance(x, list):
            return list(map(self.written, x))
        if isinstance(x, dict):
            return {k: self.written(v) for k, v in x.items()}
        return x

    # ------------------------------------------------------------ torch calls
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        out = self._called(func, name, args, kwargs)
        self._range(name, args, kwargs, out)
        return out

    def _called(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.on:
            return func(*args, **kwargs)
        special = _SPECIAL.get(name)
        if special is not None:
            return special(self, func, args, kwargs)
        if name == "__get__":
            return self._property(func, args)
        if name in ("__getitem__", "getitem") and (e := self._one_known(args[1])) is not None:
            with self:  # the same numbers as with a tensor of one index, in a form that is easier to follow
                return args[0][e : e + 1].clone()
        if name in ("__getitem__", "getitem") and (cut := self._first_rows(args[0], args[1])) is not None:
            return cut
        if name in _ELEMENT_INDEX and _is_mask(args[1]) and (flat := self._flat(args[0], args[1], name)) is not None:
            args = (*flat, *args[2:])
        elif name in _ELEMENT_INDEX:
            args = (args[0], self._index(args[1]), *args[2:])
        if name == "one_hot" and isinstance(n := kwargs.get("num_classes", args[1] if len(args) > 1 else None), int):
            self.classes.append(n)
        return self._call(func, name, args, kwargs)

    def _range(self, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Note the range of ids, where a decision is made, inside of submodules too."""
        if name in ("topk", "max", "min", "sort") and isinstance(out, tuple) and len(out) == 2:
            out, n = out[1], choices(name, args, kwargs)
        elif name in ("argmax", "argmin", "argsort"):
            n = choices(name, args, kwargs)
        elif name in _ARRANGED and args and isinstance(args[0], torch.Tensor):
            n = self.ranges.get(id(args[0]))
        else:
            return
        if n is not None and isinstance(out, torch.Tensor):
            self.ranges[id(out)] = n
            self.keep.append(out)

    def _property(self, func: Any, args: tuple) -> Any:
        name = func.__self__.__name__
        if name in _OF_GRADIENTS and of_user(sys._getframe(3)):
            raise NotProbed(f"{where(users_frame())}: Python asks for {name}, which a program cannot know")
        out = func(*args)
        if isinstance(out, torch.Tensor) and id(out) not in self.nodes:
            self.hold(self.add("call_function", getattr, (self.node(args[0]), func.__self__.__name__)), out)
        return out

    def _call(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if name in ("__setitem__", "setitem"):
            self._forget(args[0])
            self.add("call_function", operator.setitem, self.written(args))
            return out
        if not any(isinstance(t, torch.Tensor) for t in tree_leaves(out)):
            return out
        known = self._known(func, name, args, kwargs)
        written = self.written(args), self.written(kwargs)
        if type(func).__name__ in ("method_descriptor", "wrapper_descriptor") or getattr(torch.Tensor, name, None) is func:
            n = self._method(name, *written)
        else:
            n = self.add("call_function", func, *written)
        self._effects(name, args, kwargs)
        if isinstance(out, torch.Tensor):
            self.hold(n, out)
            if known is not None:
                self.known[id(out)] = known
            return out
        return self.hold(n, out)

    def _method(self, name: str, args: Any, kwargs: dict[str, Any]) -> Node:
        if name in _OPERATORS:
            return self.add("call_function", _OPERATORS[name], args, kwargs)
        if name.startswith("__r") and f"__{name[3:]}" in _OPERATORS and len(args) == 2:
            return self.add("call_function", _OPERATORS[f"__{name[3:]}"], (args[1], args[0]), kwargs)
        return self.add("call_method", name, args, kwargs)

    def _effects(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        written = name.endswith("_") and not name.endswith("__")
        if written or (name.startswith("__i") and name in _OPERATORS and name not in ("__invert__",)):
            self._forget(args[0])
        if "out" in kwargs:
            raise NotProbed(f"{where(users_frame())}: out= is not written down")

    def _forget(self, t: torch.Tensor) -> None:
        """Its contents, and those of its views, are known no more."""
        memory = t.untyped_storage()._cdata
        for other in [x for x in self.keep if id(x) in self.known and x.untyped_storage()._cdata == memory]:
            del self.known[id(other)]

    def _known(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The result's contents, where they follow from constants."""
        parts, spec = tree_flatten((args, kwargs))
        if any(isinstance(p, torch.SymInt | torch.SymFloat) or (isinstance(p, torch.Tensor) and id(p) not in self.known) for p in parts):
            return None
        tensors = [p for p in parts if isinstance(p, torch.Tensor)]
        if (not tensors and name not in _CREATORS) or (name.endswith("_") and not name.endswith("__")) or name in _RANDOM:
            return None
        real = [self.known[id(p)] if isinstance(p, torch.Tensor) else ("cpu" if isinstance(p, torch.device) else p) for p in parts]
        with unset_fake_temporarily(), torch.no_grad():
            a, k = tree_unflatten(real, spec)
            if "device" in k:
                k["device"] = "cpu"
            out = func(*a, **k)
        return out if isinstance(out, torch.Tensor) and out.numel() <= LARGEST_KNOWN else None

    # ------------------------------------------------------------ indices
    def _first_rows(self, t: torch.Tensor, index: Any) -> torch.Tensor | None:
        """rows[:n], of the rows where a mask holds: the rows where it holds for the n-th time at most."""
        if (
            not isinstance(index, slice)
            or index.step is not None
            or not (index.start is None or (type(index.start), index.start) == (int, 0))
        ):
            return None
        if t.dim() != 1 or not isinstance(t.shape[0], torch.SymInt) or not isinstance(index.stop, int | torch.SymInt):
            return None
        if isinstance(index.stop, int) and index.stop < 0:
            return None
        found = self._rows_of(self.node(t))
        mask = self.value.get(found[0]) if found is not None else None
        if found is None or not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
            return None
        key = found[0], str(index.stop)
        if key not in self.cuts:
            with self:
                self.cuts[key] = torch.where(mask & (mask.reshape(-1).cumsum(0).view(mask.shape) <= index.stop))
        return self.cuts[key][found[1]]

    def _rows_of(self, n: Node) -> tuple[Node, int] | None:
        """(mask, dimension), if the node holds the indices along that dimension of where the mask holds."""
        if (
            name_of(n) == "getitem"
            and isinstance(n.args[0], Node)
            and name_of(n.args[0]) in ("where", "nonzero")
            and type(n.args[1]) is int
        ):
            source = n.args[0]
            whole = len(source.args) == 1 and (name_of(source) == "where" or source.kwargs.get("as_tuple"))
            return (source.args[0], n.args[1]) if whole else None
        source = n
        while name_of(source) in ("squeeze", "view", "reshape", "flatten") and isinstance(source.args[0], Node):
            source = source.args[0]
        if name_of(source) != "nonzero" or source is n or len(source.args) != 1 or source.kwargs.get("as_tuple"):
            return None
        mask = self.value.get(source.args[0])
        return (source.args[0], 0) if isinstance(mask, torch.Tensor) and mask.dim() == 1 else None

    def _flat(self, t: torch.Tensor, mask: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A mask of several dimensions picks the same rows, in the same order, as one of one dimension."""
        rest = t.shape[mask.dim() :]
        with self.off():
            contiguous = t.is_contiguous()
        if "set" in name and not contiguous:
            return None
        with self:
            rows = t.view(-1, *rest) if contiguous else t.reshape(-1, *rest)
            return rows, mask.reshape(-1)

    def _index(self, index: Any) -> Any:
        if isinstance(index, Rows):
            return index.tensor
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        if isinstance(index, slice):
            return slice(*[self._bound(x) for x in (index.start, index.stop, index.step)])
        if isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32) and id(index) in self.known:
            known = self.known[id(index)]
            with unset_fake_temporarily():
                if known.dim() == 0:
                    return int(known)
                if known.dim() == 1 and known.numel() == 1:
                    return [int(known)]
        if isinstance(index, list) and index and all(isinstance(i, torch.SymInt) for i in index):
            return self._list(index)
        return index

    def _one_known(self, index: Any) -> int | None:
        known = self.known.get(id(index)) if isinstance(index, torch.Tensor) and not index.is_floating_point() else None
        return int(_list(known)[0]) if known is not None and tuple(known.shape) == (1,) and known.dtype is torch.int64 else None

    def _bound(self, x: Any) -> Any:
        return self._item(x) if isinstance(x, torch.Tensor) else x

    def _list(self, numbers: list) -> Any:
        raise NotProbed(f"{where(users_frame())}: a list of numbers of the data is an index")

    # ------------------------------------------------------------ what Python asks of tensors
    def _item(self, t: torch.Tensor) -> Any:
        if id(t) in self.known:
            with unset_fake_temporarily():
                return self.known[id(t)].item()
        n = self.node(t)
        if (parts := self._sum_of(n)) is not None:
            return sum(parts)
        out = t.item()
        s = out.node.expr if isinstance(out, torch.SymInt | torch.SymFloat) else None
        if isinstance(s, sympy.Symbol) and s not in self.bound:
            self.bound[s] = self.add("call_method", "item", (n,))
            if counts(n, self.value.get):
                self.numbers.countable.add(s)
        return out

    def _sum_of(self, n: Node) -> list[Any] | None:
        """An element of a running sum of counts, as the counts that it adds up."""
        n = _plain(n)
        if name_of(n) not in ("getitem", "__getitem__") or type(n.args[1]) is not int or not isinstance(n.args[0], Node):
            return None
        parts = self._summed(n.args[0])
        return None if parts is None else parts[: n.args[1] % len(parts) + 1]

    def histc(self, func: Any, args: tuple, kwargs: Any) -> Any:
        """histc of ids with bins as wide as one id: the same counts, by one_hot. Bins before the first id count nothing."""
        bins, low, high = [*args[1:], *[None] * 3][:3]
        bins, low, high = kwargs.get("bins", bins), kwargs.get("min", low), kwargs.get("max", high)
        below = self.ranges.get(id(args[0]))
        if not all(isinstance(x, int) for x in (bins, low, high, below)) or not isinstance(low, int) or low >= 0 or bins != high - low:
            return self._call(func, "histc", args, kwargs)
        if below > high:
            return self._call(func, "histc", args, kwargs)
        with self:
            counts_E = torch.nn.functional.one_hot(args[0].long().reshape(-1), high).sum(0)
            padded = torch.cat([torch.zeros(-low, dtype=torch.long, device=counts_E.device), counts_E])
            self.padded[self.node(padded)] = -low, counts_E
            return padded.to(args[0].dtype)

    def _contents(self, t: torch.Tensor) -> Any:
        return _list(self.known[id(t)])

    def truth(self, func: Any, args: tuple, kwargs: Any) -> bool:
        t = args[0]
        if id(t) in self.known:
            return bool(self._item(t))
        place = where(users_frame())
        found = tested_count(self.node(t), self.value.get)
        if found is None:
            raise NotProbed(f"{place}: Python decides by a tensor's contents, and not by whether a count of ids is zero")
        self.assumptions[f"{place}: where no rows are left, what is skipped adds nothing"] = None
        return found[1]

    def item(self, func: Any, args: tuple, kwargs: Any) -> Any:
        return self._item(args[0])

    def tolist(self, func: Any, args: tuple, kwargs: Any) -> Any:
        t = args[0]
        if id(t) not in self.known and (hit := self.hit(t)) is not None:
            return _list(hit)
        if id(t) in self.known:
            return self._contents(t)
        if t.dim() == 1 and self._counted_rows(t):
            return Rows(t)
        if any(not isinstance(s, int) for s in t.shape):
            raise NotProbed(f"{where(users_frame())}: a list as long as the data tells")
        if (parts := self._summed(self.node(t))) is not None:
            return list(itertools.accumulate(parts))
        return self._nested(t)

    def _summed(self, n: Node) -> list[Any] | None:
        """The counts that a running sum of them adds up: "is it empty?" is a question about those."""
        n = _plain(n)
        source = _plain(n.args[0]) if name_of(n) == "cumsum" and n.args and isinstance(n.args[0], Node) else None
        if source is None:
            return None
        if source not in self.items:
            pad, counted = self.padded.get(source, (0, self.value.get(source)))
            if not isinstance(counted, torch.Tensor) or counted.dim() != 1 or not counts(self.node(counted), self.value.get):
                return None
            self.items[source] = [0] * pad + self._nested(counted)
        return self.items[source]

    def _counted_rows(self, t: torch.Tensor) -> bool:
        return isinstance(t.shape[0], torch.SymInt)

    def _nested(self, t: torch.Tensor) -> Any:
        return self._item(t) if t.dim() == 0 else [self._nested(part) for part in self._with_recording(t)]

    def _with_recording(self, t: torch.Tensor) -> list[torch.Tensor]:
        with self:
            return [t[i] for i in range(t.shape[0])]

    def numpy(self, func: Any, args: tuple, kwargs: Any) -> Any:
        import numpy as np

        values = self.tolist(func, args, kwargs)
        return np.array(values, dtype=object if any(isinstance(v, torch.SymInt) for v in tree_leaves(values)) else None)

    def unbind(self, func: Any, args: tuple, kwargs: Any) -> Any:
        """What a loop over a tensor's rows goes through."""
        if (len(args) > 1 and args[1] != 0) or kwargs.get("dim", 0) != 0:
            return self._call(func, "unbind", args, kwargs)
        return tuple(self.iterate(func, args, kwargs))

    def bincount(self, func: Any, args: tuple, kwargs: Any) -> Any:
        """bincount(ids, minlength=E) is as long as E says, as ids are below E."""
        experts, below = args[2] if len(args) > 2 else kwargs.get("minlength", 0), self.ranges.get(id(args[0]))
        if len(args) + len(kwargs) > 2 or kwargs.get("weights", args[1] if len(args) == 3 else None) is not None:
            raise NotProbed(f"{where(users_frame())}: a weighted bincount")
        if experts == 0 and below is not None:  # as long as the last id that is there: those behind it count nothing
            self.assumptions[f"{where(users_frame())}: experts beyond the last that is hit add nothing"] = None
            experts = below
        if below is None or below > experts:
            raise NotProbed(f"{where(users_frame())}: bincount of numbers that are not known to be below {experts}")
        with self:
            return torch.nn.functional.one_hot(args[0].long(), experts).sum(0)

    def iterate(self, func: Any, args: tuple, kwargs: Any) -> Iterator[torch.Tensor]:
        t = args[0]
        if id(t) not in self.known and isinstance(t.shape[0], torch.SymInt):
            hit = self.hit(t)
            if hit is None:
                raise NotProbed(f"{where(users_frame())}: a loop over rows whose number only the data tells")
            with unset_fake_temporarily():
                rows = list(hit.unbind(0))
            return iter([self._constant(row, t) for row in rows])
        with self:
            return iter([t[i] for i in range(t.shape[0])])

    def length(self, func: Any, args: tuple, kwargs: Any) -> int:
        return int(args[0].shape[0])

    def _constant(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A known tensor of one element, written down as a constant."""
        if value.numel() != 1:
            raise NotProbed(f"{where(users_frame())}: a loop over the rows of a table of the experts that are hit")
        with unset_fake_temporarily():
            shape, number = tuple(value.shape), int(value)
        with self:
            t = torch.full(shape, number, dtype=value.dtype, device=like.device)
        self.known[id(t)] = value
        return t

    def hit(self, t: torch.Tensor) -> torch.Tensor | None:
        """The experts that a list of the hit ones visits: all of them, as those without rows add nothing."""
        out = self._hit(self.node(t))
        if out is not None:
            self.assumptions[f"{where(users_frame())}: the loop over the experts that are hit visits all of them"] = None
        return out

    def _hit(self, n: Node) -> torch.Tensor | None:
        name, value = name_of(n), self.value.get(n)
        if isinstance(value, torch.Tensor) and id(value) in self.known:
            return self.known[id(value)]
        if name in ("nonzero", "where") and len(n.args) == 1 and isinstance(n.args[0], Node):
            return self._all_of(n.args[0], one_column=name == "nonzero" and not n.kwargs.get("as_tuple"))
        if name == "unique" and len(n.args) == 1 and not n.kwargs.get("return_inverse") and isinstance(n.args[0], Node):
            experts = self.ranges.get(id(self.value.get(n.args[0])))
            with unset_fake_temporarily():
                return None if experts is None else torch.arange(experts)
        if name in _SAME_LIST and n.args and isinstance(n.args[0], Node):
            if name == "getitem" and name_of(n.args[0]) in ("nonzero", "where"):
                return self._hit(n.args[0])
            source = self._hit(n.args[0])
            return None if source is None else self._viewed(n, name, source)
        return None

    def _viewed(self, n: Node, name: str, source: torch.Tensor) -> torch.Tensor | None:
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

    def _all_of(self, mask: Node, one_column: bool) -> torch.Tensor | None:
        value = self.value.get(mask)
        found = tested_count(mask, self.value.get)
        if found is None or not found[1] or not isinstance(value, torch.Tensor) or value.dim() != 1 or not isinstance(value.shape[0], int):
            return None
        with unset_fake_temporarily():
            every = torch.arange(value.shape[0])
            return every.unsqueeze(1) if one_column else every

    def grad_mode(self, func: Any, args: tuple, kwargs: Any) -> None:
        """`with torch.no_grad()` and the like; what a call of `set_grad_enabled` would leave behind is seen at the end."""
        caller = sys._getframe(2).f_code.co_name
        if caller == "__enter__":
            self.add("call_function", opened, ("grad", *args))
        elif caller == "__exit__":
            self.add("call_function", closed)
        func(*args)

    # ------------------------------------------------------------ modules
    def call_module(self, call: Callable[..., Any], m: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A submodule as a whole; from within, where its Python decides by data."""
        name = self.names.get(id(m))
        if not self.on or m is self.root or name is None:
            return call(m, *args, **kwargs)
        written, state, out = (self.written(args), self.written(kwargs)), state_of(m, (args, kwargs)), _Decided
        with self.off(), contextlib.suppress(Exception):
            out = call(m, *args, **kwargs)
        if (
            out is _Decided
            or left_behind(state, state_of(m, (args, kwargs)))
            or not all(isinstance(x, torch.Tensor) or x is None for x in _leaves(out))
        ):
            self.entered.append(name)
            self.entering(m)
            return call(m, *args, **kwargs)
        return self.hold(self.add("call_module", name, *written), out)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        before = self.on, self.numbers.answering
        self.on = self.numbers.answering = False
        try:
            yield
        finally:
            self.on, self.numbers.answering = before


def opened(kind: str, *args: Any) -> None:
    """Marks where a `with` block begins: autocast, or gradients on or off."""


def closed() -> None:
    """Marks where the innermost `with` block ends."""


class Rows(list):
    """A list of row numbers, as long as the data tells: good for an index only."""

    def __init__(self, t: torch.Tensor) -> None:
        super().__init__()
        self.tensor = t

    def _no(self, *_: Any) -> Any:
        raise NotProbed(f"{where(users_frame())}: a list as long as the data tells is used for more than an index")

    __len__ = __iter__ = __getitem__ = __contains__ = __bool__ = _no  # type: ignore[assignment]


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool and index.dim() > 1


def _plain(n: Node) -> Node:
    """Before casts and copies."""
    while name_of(n) in _SAME_NUMBERS and n.args and isinstance(n.args[0], Node):
        n = n.args[0]
    return n


def _list(t: torch.Tensor) -> Any:
    with unset_fake_temporarily():
        return t.tolist()


def choices(name: str, args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Among how many a routing decision chooses, where that is a plain number."""
    at = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[at] if len(args) > at else (None if name in ("max", "min", "argmax", "argmin") else -1))
    scores = args[0]
    if not isinstance(dim, int) or not scores.is_floating_point() or not scores.dim():
        return None
    size = scores.shape[dim]
    return size if isinstance(size, int) else None


def _leaves(out: Any) -> list[Any]:
    if isinstance(out, tuple | list):
        return [x for part in out for x in _leaves(part)]
    return [x for part in out.values() for x in _leaves(part)] if type(out) is dict else [out]


_OPERATORS = {
    f"__{n}__": getattr(operator, f"__{n}__")
    for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
              "getitem", "neg", "invert", "iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "lshift", "rshift")
}  # fmt: skip
_ARRANGED = {"view", "reshape", "flatten", "t", "transpose", "contiguous", "squeeze", "unsqueeze", "detach", "cpu", "permute", "clone",
             "float", "long", "int", "to", "double"}  # fmt: skip
_OF_GRADIENTS = {"requires_grad", "grad_fn", "is_leaf", "grad", "_version"}
_CREATORS = {"arange", "zeros", "ones", "full", "tensor", "eye", "linspace"}
_RANDOM = {"rand", "randn", "randint", "randperm", "bernoulli", "dropout", "multinomial", "empty", "empty_like", "rand_like", "randn_like"}
_SPECIAL: dict[str, Callable[..., Any]] = {
    "__bool__": Recorder.truth, "is_nonzero": Recorder.truth, "item": Recorder.item, "__int__": Recorder.item, "__index__": Recorder.item,
    "__float__": Recorder.item, "tolist": Recorder.tolist, "numpy": Recorder.numpy, "__array__": Recorder.numpy,
    "__iter__": Recorder.iterate, "unbind": Recorder.unbind, "bincount": Recorder.bincount, "histc": Recorder.histc,
    "__len__": Recorder.length, "_set_grad_enabled": Recorder.grad_mode,
    "__format__": lambda self, f, a, k: format(self._item(a[0]), *a[1:]),
}  # fmt: skip


# ---------------------------------------------------------------- recording a module
def record(module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Recording:
    """Run `forward` on a shadow of the module and of its arguments. Raises NotProbed."""
    numbers = Numbers()
    fake = FakeTensorMode(shape_env=numbers, allow_non_fake_inputs=False, static_shapes=False)
    shadow, names = shadow_of(module, fake)
    inputs, spec = tree_flatten((args, kwargs))
    recorder = Recorder(numbers, fake)
    recorder.names, recorder.root, recorder.file = names, shadow, forward.__code__.co_filename
    recorder.classes = []
    mine: list[Any] = []
    sources: dict[sympy.Symbol, tuple[int, int]] = {}
    for i, (x, shape) in enumerate(zip(inputs, example_shapes(inputs))):
        if isinstance(x, torch.Tensor):
            x = _faked(x, shape, fake)
            recorder.hold(recorder.graph.placeholder(f"p{i}"), x)
            for d, s in enumerate(x.shape):
                if isinstance(s, torch.SymInt) and isinstance(s.node.expr, sympy.Symbol):
                    sources.setdefault(s.node.expr, (i, d))
        elif not isinstance(x, SCALARS):
            raise NotProbed(f"an argument is a {type(x).__name__}")
        mine.append(x)
    a, k = tree_unflatten(list(mine), spec)
    versions = {n: p._version for n, p in shadow.named_parameters()}
    before, state, reads = {name: id(v) for name, v in _attributes(shadow).items()}, state_of(shadow, (a, k)), Reads()
    recorder.entering = lambda m: reads.run(type(m).forward)
    noted = reads.watching(forward, lambda m: names.get(id(m)) if recorder.on else None)
    with torch.enable_grad(), fake, _patched(recorder), whole_numbers(module), noted, recorder:
        recorder.on = numbers.answering = True
        try:
            out = forward(shadow, *a, **k)
        except NotProbed:
            raise
        except Exception as e:
            raise NotProbed(_why(e)) from e
        finally:
            recorder.on = numbers.answering = False
        grad = torch.is_grad_enabled()
    done = Recording(recorder.graph, None, recorder.lines, recorder.file, numbers, mine, sources)
    done.paths = [_path(p) for p, _ in tree_flatten_with_path((args, kwargs))[0]]
    done.rebound = _rebound(recorder, shadow, before)
    if changed := [n for n in left_behind(state, state_of(shadow, (a, k))) if n not in done.rebound]:
        raise NotProbed(f"the forward leaves something behind in {', '.join(changed[:3])}")
    if written := [n for n, p in shadow.named_parameters() if versions.get(n) != p._version]:
        raise NotProbed(f"the forward writes to its parameter {written[0]}")
    if not grad:
        raise NotProbed("the forward leaves gradients switched off")
    done.output = _output(recorder, out)
    done.entered = list(dict.fromkeys(recorder.entered))
    done.assumptions = {**recorder.assumptions, **numbers.assumptions}
    done.reads, done.classes = reads, recorder.classes
    return done


def _path(keys: Any) -> str:
    """ "kwargs['mask']" of a key path through (args, kwargs)."""
    first, *rest = keys
    text = ("args", "kwargs")[first.idx]
    for k in rest:
        text += f"[{k.idx if hasattr(k, 'idx') else k.key!r}]"
    return text


def _why(e: Exception) -> str:
    cause: BaseException = e
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, NotProbed):
        return str(cause)
    tb, place = e.__traceback__, "?"
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if not file.startswith((torch.__path__[0], __file__.rpartition("/")[0])):
            place = f"{file}:{tb.tb_lineno}"
        tb = tb.tb_next
    return f"{place}: {type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:200]}"


def example_shapes(inputs: list[Any]) -> list[list[int]]:
    """The shapes to record with: numbers of rows that tell from each other, and from one, which means "any" to torch."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 1]
    one_row = bool(tensors) and all(x.shape[0] <= 1 for x in tensors)
    shapes = []
    for x in inputs:
        shape = list(x.shape) if isinstance(x, torch.Tensor) else []
        if one_row and len(shape) > 1:
            shape[0] = 3
        if len(tensors) == 1 and len(shape) > 1:
            for d in range(len(shape) - 1):
                shape[d] = next(n for n in (shape[d], 5, 7, 11, 13, 17) if n > 1 and n not in shape[:d])
        shapes.append(shape)
    return shapes


def _faked(x: torch.Tensor, shape: list[int], fake: FakeTensorMode) -> FakeTensor:
    """Sizes that may vary are symbols: all but the last."""
    free = [d < x.dim() - 1 and n > 1 for d, n in enumerate(shape)]
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK if f else DimDynamic.STATIC for f in free])
    x = x.detach() if list(x.shape) == shape else x.new_empty(shape)
    return fake.from_tensor(x, symbolic_context=context)


def shadow_of(module: nn.Module, fake: FakeTensorMode) -> tuple[nn.Module, dict[int, str]]:
    """A copy of the module on fake parameters, and the names of its modules, parameters and buffers."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        for t in [*m._parameters.values(), *m._buffers.values(), *[v for v in vars(m).values() if isinstance(v, torch.Tensor)]]:
            if t is not None and id(t) not in memo:
                memo[id(t)] = fake.from_tensor(t, static_shapes=True)
    shadow = copy.deepcopy(module, memo)
    names: dict[int, str] = {}
    for path, m in shadow.named_modules(remove_duplicate=True):
        names[id(m)] = path
        for n, t in _attributes(m).items():
            names.setdefault(id(t), f"{path}.{n}".lstrip("."))
    return shadow, names


def _attributes(m: nn.Module) -> dict[str, torch.Tensor]:
    every = {**vars(m), **m._parameters, **m._buffers}
    return {n: t for n, t in every.items() if isinstance(t, torch.Tensor)}


def _rebound(recorder: Recorder, shadow: nn.Module, before: dict[str, int]) -> dict[str, Node]:
    """Tensors that the forward has put in place of its buffers."""
    now = _attributes(shadow)
    if set(before) - set(now):
        raise NotProbed("the forward takes an attribute of the module away")
    return {n: recorder.node(t) for n, t in now.items() if before.get(n) != id(t)}


def _output(recorder: Recorder, out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return recorder.node(out)
    if isinstance(out, torch.SymInt | torch.SymFloat):
        return recorder.number(out)
    if type(out) in (tuple, list):
        return type(out)(_output(recorder, x) for x in out)
    if type(out) is dict:
        return {k: _output(recorder, v) for k, v in out.items()}
    if out is None or isinstance(out, bool | int | float | str):
        return out
    raise NotProbed(f"the forward returns a {type(out).__name__}")


@contextlib.contextmanager
def _patched(recorder: Recorder) -> Iterator[None]:
    """Submodules, autocast and gradient regions are told to the recorder."""
    call = nn.Module.__call__
    autocast = torch.amp.autocast_mode.autocast
    enter, leave = autocast.__enter__, autocast.__exit__

    def module_call(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(call, m, args, kwargs)

    def autocast_enter(self: Any) -> Any:
        if recorder.on:
            settings = self.device, self.fast_dtype, self._enabled, self._cache_enabled
            recorder.add("call_function", opened, ("autocast", *settings))
        return enter(self)

    def autocast_exit(self: Any, *args: Any) -> Any:
        if recorder.on:
            recorder.add("call_function", closed)
        return leave(self, *args)

    tolist = FakeTensor.tolist

    def recorded_list(self: FakeTensor) -> Any:
        if not recorder.on:
            return tolist(self)
        with _pop_mode_temporarily():  # as in a torch call that the mode sees
            return recorder.tolist(None, (self,), {})

    def no_function(*_: Any, **__: Any) -> Any:
        raise NotProbed(f"{where(users_frame())}: an autograd.Function of its own")

    with (
        mock.patch.object(nn.Module, "__call__", module_call),
        mock.patch.object(autocast, "__enter__", autocast_enter),
        mock.patch.object(autocast, "__exit__", autocast_exit),
        mock.patch.object(FakeTensor, "tolist", recorded_list),
        mock.patch.object(torch.autograd.Function, "apply", no_function),
    ):
        yield
