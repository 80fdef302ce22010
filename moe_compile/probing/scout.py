"""Which modules decide in Python on what tensors hold: seen in a call of a copy of the model, on copies of the arguments.

The copy shares the parameters and has its own buffers, attributes and random numbers, and no hooks: the call leaves nothing behind.
"""

from __future__ import annotations

import collections
import copy
import random
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from moe_compile.probing.calls import writes
from moe_compile.probing.errors import NotProbed
from moe_compile.probing.outside import outside_put_back
from moe_compile.probing.state import HOOKS

# Dynamo breaks the graph there, capture flags or not.
_ASKS = {"__bool__", "is_nonzero", "__int__", "__float__", "numpy", "__array__"}
# Dynamo may capture these: it is tried.
_MAY_ASK = {"item", "tolist", "__index__"}
_ROWS = {"nonzero", "unique", "masked_select", "argwhere", "unique_consecutive", "bincount"}
_SIZES = {"size", "numel", "__len__", "__get__", "nelement"}
_DECIDES = {"topk", "argmax", "max", "sort", "argsort", "multinomial"}
LONG = 64  # torch calls behind a routing decision: a loop over experts
_ROUTES = {"topk", "argmax", "max", "sort", "argsort", "one_hot", "bincount", "nonzero", "where", "unique", "multinomial", "scatter_"}


_state = threading.local()


def rehearsing() -> bool:
    """Is the call one of a copy of the model, to be watched and not compiled?"""
    return getattr(_state, "rehearsing", False)


@dataclass
class Call:
    """A module, and the arguments of a call in which its own code asked a tensor for its contents.

    sure: whether Dynamo is known to break there; otherwise it may capture the module. sizes: it only asked for a size of what it had
    computed of rows that it had chosen, which Dynamo mostly captures.
    steps: torch calls behind the one routing decision in it, where they are many; then it need not have asked.
    around: the call in which it was made. outer: that, where the module is called more than once in it, token by token say, and what it
    decides by was chosen outside of it.
    """

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    sure: bool = False
    sizes: bool = False
    steps: int = 0
    around: Call | None = None
    outer: Call | None = None


def may_route(model: nn.Module) -> bool:
    """Does the code of any of its classes choose among experts and ask what is hit, as far as the names in it tell?"""
    classes = {type(m) for m in model.modules() if type(m).__module__.partition(".")[0] != "torch"}
    return any(_names(c) & _ROUTES for c in classes)


def _names(cls: type) -> set[str]:
    names: set[str] = set()
    todo = [f.__code__ for base in cls.__mro__ if base.__module__.partition(".")[0] != "torch" for f in _functions(base)]
    while todo:
        code = todo.pop()
        names.update(code.co_names)
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    return names


def _functions(cls: type) -> list[FunctionType]:
    found = [getattr(f, "__func__", f) for f in vars(cls).values()]
    unwrapped = [getattr(f, "__wrapped__", f) for f in found]
    return [f for f in [*found, *unwrapped] if isinstance(f, FunctionType)]


class _Scout(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared = {p.untyped_storage()._cdata for p in model.parameters() if type(p) is nn.Parameter}
        self.stack: list[Call] = []
        self.found: dict[int, Call] = {}
        self.rows: dict[int, torch.Tensor] = {}  # tensors with as many rows as the data tells
        self.made: dict[int, tuple[weakref.ref[torch.Tensor], Call]] = {}  # these, and what has been computed of them; in whose code
        self.long: dict[int, Call] = {}  # modules of one routing decision and many calls behind it, with none such inside
        self.steps = 0
        self.decisions: list[tuple[Call, int]] = []  # in whose code, at which step

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        self.steps += name != "__get__"
        if self.stack and args:
            if name in _DECIDES and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                self.decisions.append((self.stack[-1], self.steps))
            if (
                name in _ASKS
                or (name in _SIZES and id(args[0]) in self.rows)
                or (name in ("__iter__", "unbind") and id(args[0]) in self.rows)
                or (name == "__getitem__" and id(args[0]) in self.rows and _cuts(args[1]))
            ):
                self._note(sure=True)
            elif name in _MAY_ASK or (name == "__getitem__" and _by_tensors(args[1])):
                self._note(sure=False)
            elif name in _SIZES and _is_size(func) and self._maker(args[0]) is self.stack[-1]:
                self._note(sure=False, sizes=True)
        if args and writes(name) and isinstance(args[0], torch.Tensor) and self._is_shared(args[0]):
            raise NotProbed("its forward writes to its parameters")
        out = func(*args, **(kwargs or {}))
        if self.stack and (name in _ROWS or (name == "where" and len(args) == 1) or self._selects(name, args)):
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.rows[id(t)] = t
                    self.made[id(t)] = weakref.ref(t), self.stack[-1]
        elif isinstance(out, torch.Tensor) and out.dim() and (maker := self._maker_of_all(out, args)) is not None:
            self.made[id(out)] = weakref.ref(out), maker
        return out

    def _maker(self, t: Any) -> Call | None:
        """The call whose code has chosen the tensor's rows."""
        found = self.made.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def _maker_of_all(self, out: torch.Tensor, args: tuple) -> Call | None:
        rows = (a for a in args if isinstance(a, torch.Tensor) and a.dim() and a.shape[0] == out.shape[0])
        return next((maker for a in rows if (maker := self._maker(a)) is not None), None)

    def _is_shared(self, t: torch.Tensor) -> bool:
        return isinstance(t, nn.Parameter) or (type(t) is torch.Tensor and t.untyped_storage()._cdata in self.shared)

    def _selects(self, name: str, args: tuple) -> bool:
        """x[mask], or an arrangement of rows that the data tells."""
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            return (
                any(isinstance(p, torch.Tensor) and (p.dtype is torch.bool or id(p) in self.rows) for p in parts)
                or id(args[0]) in self.rows
            )
        return (
            bool(args)
            and id(args[0]) in self.rows
            and name in ("squeeze", "view", "reshape", "flatten", "t", "tolist", "cpu", "sort", "split")
        )

    @contextmanager
    def entered(self, call: Call) -> Iterator[None]:
        """Within, the call's module runs."""
        decided, long = len(self.decisions), len(self.long)
        before = self.found.get(id(call.module))
        if self.stack:
            call.around = self.stack[-1]
            if before is not None and before.around is call.around and self.decisions and not self._decides(before):
                before.outer = before.around
        self.stack.append(call)
        try:
            yield
        finally:
            self.stack.pop()
        mine = self.decisions[decided:]
        if len(self.long) == long and len({id(owner) for owner, _ in mine}) == 1 and _is_users(call.module):
            call.steps = self.steps - mine[0][1]
            if call.steps >= LONG:
                self.long.setdefault(id(call.module), call)

    def _decides(self, call: Call) -> bool:
        """Does the module choose experts itself?"""
        inside = set(map(id, call.module.modules()))
        return any(id(owner.module) in inside for owner, _ in self.decisions)

    def _note(self, sure: bool, sizes: bool = False) -> None:
        call = self.stack[-1]
        if id(call.module) not in self.found:
            self.found[id(call.module)], call.sizes = call, sizes
        found = self.found[id(call.module)]
        found.sure, found.sizes = found.sure or sure, found.sizes and sizes


def _is_size(func: Any) -> bool:
    """Of the attributes, the shape."""
    return func.__name__ != "__get__" or getattr(func.__self__, "__name__", "") == "shape"


def _is_users(m: nn.Module) -> bool:
    return type(m).__module__.partition(".")[0] != "torch"


def _cuts(index: Any) -> bool:
    """[:n] or [n:] of rows: Dynamo captures it, as a size that says nothing of which rows these are; a recording says that."""
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, slice) and (first.start not in (None, 0) or first.stop is not None)


def _by_tensors(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, torch.Tensor) for p in parts if isinstance(p, slice) for x in (p.start, p.stop, p.step))


def rehearse(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Call], list[Call]]:
    """Calls of the model's modules that asked, innermost modules first, and those with long loops.

    Raises what copying or calling the model raises.
    """
    if any(is_lazy(t) for t in [*model.parameters(), *model.buffers()]):
        raise NotProbed("its parameters are not there yet")
    shadow = shadow_of(model)
    a, k = _copied((args, kwargs))
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    _state.rehearsing = True
    try:
        with _alone(model, devices), torch.no_grad(), _eager(), scouting(shadow) as scout:
            shadow(*a, **k)
    finally:
        _state.rehearsing = False
    real = dict(zip(map(id, shadow.modules()), model.modules()))
    asked, long = (
        [_real(c, real) for c in found.values() if any(True for _ in c.module.parameters())] for found in (scout.found, scout.long)
    )
    return sorted(asked, key=lambda c: sum(1 for _ in c.module.modules())), long


def _real(c: Call, modules: dict[int, nn.Module]) -> Call:
    """The same call of the model's own module."""
    outer = None if c.outer is None else _real(c.outer, modules)
    return Call(modules[id(c.module)], c.args, c.kwargs, c.sure, c.sizes, c.steps, None, outer)


@contextmanager
def _alone(model: nn.Module, devices: set[int | None]) -> Iterator[None]:
    """What stands outside of the copy, random numbers and globals of the user's files, is afterwards what it was."""
    python = random.getstate()
    with torch.random.fork_rng([d for d in devices if d is not None]), outside_put_back(model):
        try:
            yield
        finally:
            random.setstate(python)


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy that shares parameters."""
    memo: dict[int, Any] = {}
    for m in model.modules():
        memo.update({id(p): p for p in m._parameters.values() if p is not None})
        memo.update({id(b): b.detach().clone() for b in m._buffers.values() if b is not None})
        memo.update({id(v): v for v in vars(m).values() if isinstance(v, torch.Tensor) and not v.is_leaf})
        memo.update({id(vars(m)[h]): collections.OrderedDict() for h in HOOKS if vars(m).get(h)})
    return copy.deepcopy(model, memo)


def _copied(x: Any) -> Any:
    memo: dict[int, Any] = {}

    def clone(t: Any) -> Any:
        return memo.setdefault(id(t), t.detach().clone()) if isinstance(t, torch.Tensor) else copy.deepcopy(t, memo)

    return tree_map(clone, x)


@contextmanager
def _eager() -> Iterator[None]:
    """Nothing within is compiled."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def scouting(model: nn.Module) -> Iterator[_Scout]:
    """Within, calls of the model's modules are watched."""
    scout = _Scout(model)
    call = nn.Module.__call__
    mine = {id(m) for m in model.modules()}

    def watched(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if id(m) not in mine:
            return call(m, *args, **kwargs)
        with scout.entered(Call(m, *_kept((args, kwargs)))):
            return call(m, *args, **kwargs)

    with mock.patch.object(nn.Module, "__call__", watched), scout:
        yield scout


def _kept(x: Any) -> Any:
    return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, x)
