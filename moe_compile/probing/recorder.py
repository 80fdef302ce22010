"""Every torch call of a running forward, and every call of a submodule, goes through here and onto the tape."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any
from unittest import mock

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from moe_compile.probing import contents, counting, drawn, hit, lists, tokens, unique
from moe_compile.probing.chosen import choosing
from moe_compile.probing.constants import Constants
from moe_compile.probing.errors import NotProbed, of_user, users_frame, where
from moe_compile.probing.fakes import called
from moe_compile.probing.indices import chosen_element, cut_to, first_rows, flat, is_mask, plain_index
from moe_compile.probing.numbers import Numbers
from moe_compile.probing.paths import Cell
from moe_compile.probing.ranges import Ranges
from moe_compile.probing.reads import opens
from moe_compile.probing.regions import autocast_marked, grad_mode
from moe_compile.probing.state import left_behind, state_of
from moe_compile.probing.tape import Tape

_ELEMENT_INDEX = {"__getitem__", "__setitem__", "getitem", "setitem"}
_OPERATORS = {
    f"__{n}__": getattr(operator, f"__{n}__")
    for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
              "getitem", "neg", "invert", "iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "lshift", "rshift")
}  # fmt: skip
_OF_GRADIENTS = {"requires_grad", "grad_fn", "is_leaf", "grad", "_version"}
_SPECIAL: dict[str, Callable[..., Any]] = {
    "__bool__": contents.truth, "is_nonzero": contents.truth, "item": contents.item, "__int__": contents.item, "__index__": contents.item,
    "__float__": contents.item, "tolist": contents.tolist, "numpy": contents.numpy, "__array__": contents.numpy,
    "__len__": contents.length, "__format__": contents.formatted, "__iter__": hit.iterate, "unbind": hit.unbind,
    "bincount": counting.bincount, "histc": counting.histc, "one_hot": counting.one_hot, "_set_grad_enabled": grad_mode,
    "unique": unique.unique, "unique_consecutive": unique.unique,
    "dropout": drawn.dropout, "dropout_": drawn.dropout, "alpha_dropout": drawn.dropout,
}  # fmt: skip


def _is_method(func: Any, name: str) -> bool:
    """Of tensors; `x ** 2` calls a function of no name in torch's file of tensors that is `pow` by its own account."""
    if type(func).__name__ in ("method_descriptor", "wrapper_descriptor") or getattr(torch.Tensor, name, None) is func:
        return True
    return getattr(func, "__module__", "") == "torch._tensor" and hasattr(torch.Tensor, name)


class _Decided:
    """In place of the result of a submodule whose Python decides by data: it is recorded from within."""


class Recorder(TorchFunctionMode):
    """on: whether calls are written down. entering: to be told of submodules that are recorded from within; `flat`: all that can be."""

    def __init__(
        self, numbers: Numbers, tape: Tape, root: nn.Module, entering: Callable[[nn.Module], None], flat: bool = False, loops: str = "sizes"
    ) -> None:
        super().__init__()
        # Which loops are ones over tokens: over "sizes" of inputs, "any" that no other stands around, "none"; "lists": they fill lists.
        self.over_tokens = loops
        self.flat = flat
        self.numbers, self.tape, self.root, self.entering = numbers, tape, root, entering
        self.constants, self.ranges = Constants(), Ranges()
        self.on = False
        self.assumptions: dict[str, None] = {}
        self.entered: list[str] = []
        self.classes: list[int] = []
        self.cuts: dict[tuple[Node, str], Any] = {}  # (mask, limit) -> the first rows where it holds
        self.items: dict[Node, list[Any]] = {}  # counts -> them as numbers
        self.padded: dict[Node, tuple[int, torch.Tensor]] = {}  # counts with so many zeros before them -> them
        self.stacked: dict[tuple, tuple[torch.Tensor, tuple]] = {}  # experts and what they read -> what they all give; kept with both
        self.loops: list[tokens.Loop] = []  # over tokens, that are open
        self.waiting: tokens.Loop | None = None  # that has not begun
        self.members: dict[sympy.Symbol, tokens.Loop | Cell] = {}  # numbers of tokens that are put into lists
        self.called: set[CodeType] = set()  # the user's code that loops have called which fill lists
        self.later: set[CodeType] = set()  # and that was called behind them
        self.stop_listening: Callable[[], None] | None = None
        self.beyond = False  # is something compared in them
        self.cells: dict[int, tuple[torch.Tensor, Cell]] = {}  # id of one token's part of a tensor -> it
        self.looped = self.unrolled = False  # were there any; was an expert chosen by data without one
        self.listing = False  # do tokens go into lists

    # ------------------------------------------------------------ torch calls
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        out = self._called(func, name, args, kwargs)
        self.ranges.note(name, args, kwargs, out)  # inside of submodules too
        return out

    def _called(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.on:
            return func(*args, **kwargs)
        special = _SPECIAL.get(name)
        if special is not None:
            return special(self, func, args, kwargs)
        if name == "__get__":
            return self._property(func, args)
        if name in ("__getitem__", "getitem") and (e := self.constants.one_index(args[1])) is not None:
            with self:  # the same numbers as with a tensor of one index, in a form that is easier to follow
                return args[0][e : e + 1].clone()
        if name in ("__getitem__", "getitem") and (cut := first_rows(self, args[0], args[1])) is not None:
            return cut
        if self.loops and name in _ELEMENT_INDEX and (at := tokens.place(self, args[1])) is not None:
            return tokens.write(self, args[0], at, args[2]) if "set" in name else tokens.read(self, args[0], at)
        if self.members and (every := lists.tensor(self, name, args, kwargs)) is not None:
            return every
        if self.members and name in ("__getitem__", "getitem") and (element := lists.element(self, args[0], args[1])) is not None:
            return element
        if self.looped and (every := tokens.stacked(self, name, args, kwargs)) is not None:
            return every
        if name in ("__getitem__", "getitem") and (element := chosen_element(self, args[0], args[1])) is not None:
            return element
        if name in _ELEMENT_INDEX and is_mask(args[1]) and (both := flat(self, args[0], args[1], name)) is not None:
            args = (*both, *args[2:])
        elif name in _ELEMENT_INDEX:
            args = (args[0], plain_index(self, args[1]), *args[2:])
        return self.call(func, name, args, kwargs)

    def _property(self, func: Any, args: tuple) -> Any:
        name = func.__self__.__name__
        if name in _OF_GRADIENTS and of_user(sys._getframe(3)):
            raise NotProbed(f"{where(users_frame())}: Python asks for {name}, which a program cannot know")
        out = func(*args)
        if isinstance(out, torch.Tensor) and not self.tape.holds(out):
            self.tape.hold(self.tape.add("call_function", getattr, (self.tape.node(args[0]), name)), out)
        return out

    def call(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Make the call, and write it down."""
        out = called(func, name, args, kwargs)
        if name in ("__getitem__", "getitem"):
            cut_to(self, args[0], args[1], out)
        if name in ("__setitem__", "setitem"):
            self.constants.forget(args[0])
            self.tape.add("call_function", operator.setitem, self.tape.written(args))
            return out
        if not any(isinstance(t, torch.Tensor) for t in tree_leaves(out)):
            return out
        known = self.constants.result(func, name, args, kwargs)
        written = self.tape.written(args), self.tape.written(kwargs)
        if written[1].get("requires_grad") is True and any(p.requires_grad for p in self.root.parameters()):
            del written[1]["requires_grad"]  # of a tensor made here, whose gradient nobody reads; Dynamo breaks there
        n = self._method(name, *written) if _is_method(func, name) else self.tape.add("call_function", func, *written)
        self._effects(name, args, kwargs)
        self.tape.hold(n, out)
        if isinstance(out, torch.Tensor) and known is not None:
            self.constants[out] = known
        return out

    def _method(self, name: str, args: Any, kwargs: dict[str, Any]) -> Node:
        if name in _OPERATORS:
            return self.tape.add("call_function", _OPERATORS[name], args, kwargs)
        if name.startswith("__r") and f"__{name[3:]}" in _OPERATORS and len(args) == 2:
            return self.tape.add("call_function", _OPERATORS[f"__{name[3:]}"], (args[1], args[0]), kwargs)
        return self.tape.add("call_method", name, args, kwargs)

    def _effects(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        written = name.endswith("_") and not name.endswith("__")
        if written or (name.startswith("__i") and name in _OPERATORS and name not in ("__invert__",)):
            self.constants.forget(args[0])
        if "out" in kwargs:
            raise NotProbed(f"{where(users_frame())}: out= is not written down")

    # ------------------------------------------------------------ modules
    def call_module(self, call: Callable[..., Any], m: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A submodule as a whole; from within, where its Python decides by data."""
        name = self.tape.names.get(id(m))
        if not self.on or m is self.root or name is None:
            return call(m, *args, **kwargs)
        if self.flat and opens(m):
            self.entered.append(name)
            self.entering(m)
            return call(m, *args, **kwargs)
        written, state, out = (self.tape.written(args), self.tape.written(kwargs)), state_of(m, (args, kwargs)), _Decided
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
        return self.tape.hold(self.tape.add("call_module", name, *written), out)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        before = self.on, self.numbers.answering
        self.on = self.numbers.answering = False
        try:
            yield
        finally:
            self.on, self.numbers.answering = before


def _leaves(out: Any) -> list[Any]:
    if isinstance(out, tuple | list):
        return [x for part in out for x in _leaves(part)]
    return [x for part in out.values() for x in _leaves(part)] if type(out) is dict else [out]


@contextlib.contextmanager
def listening(r: Recorder) -> Iterator[None]:
    """Within, the recorder also hears of what does not pass through torch functions."""
    call, tolist, to = nn.Module.__call__, FakeTensor.tolist, nn.Module.to

    def module_call(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return r.call_module(call, m, args, kwargs)

    def recorded_list(self: FakeTensor) -> Any:
        if not r.on:
            return tolist(self)
        with _pop_mode_temporarily():  # as in a torch call that the mode sees
            return contents.tolist(r, None, (self,), {})

    def cast(m: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """A cast to the dtype that the module has already (Switch's router) changes nothing."""
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        every = [*m.parameters(), *m.buffers()]
        same = all((t.device == device or not device) and (t.dtype == dtype or not dtype or not t.is_floating_point()) for t in every)
        if not any(id(t) in r.tape.names for t in every):
            return to(m, *args, **kwargs)
        if layout is not None or not same:
            raise NotProbed(f"{where(users_frame())}: the forward casts a module")
        return m

    def no_function(*_: Any, **__: Any) -> Any:
        raise NotProbed(f"{where(users_frame())}: an autograd.Function of its own")

    with (
        mock.patch.object(nn.Module, "__call__", module_call),
        mock.patch.object(nn.Module, "to", cast),
        mock.patch.object(FakeTensor, "tolist", recorded_list),
        mock.patch.object(torch.autograd.Function, "apply", no_function),
        autocast_marked(r),
        choosing(r),
    ):
        yield
