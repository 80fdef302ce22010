"""What the recorded Python code has seen besides tensors: attributes of modules and objects, constants of files. A program holds for these.

self.scale, self.gate.out_features      compared with what they were
self.act (a function)                   must be that function
len(self.experts), self.weight.shape    must be what they were
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from moe_compile.probing.errors import of_user, of_user_file

SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, functools.partial, torch.jit.ScriptFunction)
_LIBRARY = (sysconfig.get_path("stdlib"), "<")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def _written_by_user(code: CodeType) -> bool:
    return _written_by_user_at(code.co_filename)


def _written_by_user_at(file: str) -> bool:
    return of_user_file(file) and not (file.startswith(_LIBRARY) and "site-packages" not in file)


def _names(code: CodeType) -> set[str]:
    """Global names and attributes that the code mentions, and the code in it."""
    return set(code.co_names).union(*[_names(c) for c in code.co_consts if isinstance(c, CodeType)])


class Reads:
    """attributes: (path of the module, name) -> value; codes: the user's code that ran, with its globals."""

    def __init__(self) -> None:
        self.attributes: dict[tuple[str, str], Any] = {}
        self.codes: dict[CodeType, dict[str, Any]] = {}
        self.grad_mode = False

    @contextlib.contextmanager
    def watching(self, forward: Callable[..., Any], path_of: Callable[[nn.Module], str | None]) -> Iterator[None]:
        """Note what the forward and what it calls reads. path_of: the path of a module while that is to be noted, else None."""
        self.run(forward)
        before = nn.Module.__getattribute__
        enabled = torch.is_grad_enabled

        def read(m: nn.Module, name: str) -> Any:
            if name[:2] != "__" and (path := path_of(m)) is not None and of_user(sys._getframe(1)):
                self._note(m, path, name)
            return before(m, name)

        def grad_enabled() -> bool:
            self.grad_mode |= of_user(sys._getframe(1))
            return enabled()

        with mock.patch.object(nn.Module, "__getattribute__", read), mock.patch.object(torch, "is_grad_enabled", grad_enabled):
            yield

    def run(self, function: Any) -> None:
        """The function is called, and with it may be the functions of files that its code names."""
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not isinstance(function, FunctionType) or function.__code__ in self.codes or not _written_by_user(function.__code__):
            return
        self.codes[function.__code__] = function.__globals__
        names = _names(function.__code__)
        for n in names & set(function.__globals__):
            value = function.__globals__[n]
            self.run(value)
            if isinstance(value, ModuleType) and _written_by_user_at(getattr(value, "__file__", None) or "<"):
                for inner in names & set(vars(value)):
                    self.run(vars(value)[inner])

    def _note(self, m: nn.Module, path: str, name: str) -> None:
        get = object.__getattribute__
        for table in (get(m, "__dict__"), get(m, "_parameters"), get(m, "_buffers"), get(m, "_modules")):
            if name in table:
                self.attributes.setdefault((path, name), table[name])
                return
        value = getattr(type(m), name, self)
        if isinstance(value, SCALARS):
            self.attributes.setdefault((path, name), value)
        elif isinstance(value, FunctionType):
            self.run(value)

    def tests(self, scope: dict[str, Any]) -> list[str]:
        """Python expressions of `self` that are true as long as the same would be read; `scope` gets the names they need."""
        found = []
        for (path, name), value in self.attributes.items():
            found += self._tests(f"{reach(path)}.{name}" if name.isidentifier() else f"getattr({reach(path)}, {name!r})", value, scope)
        for code, names in self.codes.items():
            found += _constants(code, names, scope)
        return [*found, "torch.is_grad_enabled()"] if self.grad_mode else found

    def _tests(self, at: str, value: Any, scope: dict[str, Any]) -> list[str]:
        if isinstance(value, SCALARS):
            return [equals(at, value, scope)]
        if isinstance(value, torch.Tensor):
            sizes = [f"{at}.shape[{d}] == {n}" for d, n in enumerate(value.shape)]
            return [f"{at} is not None", f"{at}.dim() == {value.dim()}", *sizes, f"{at}.dtype == {value.dtype}"]
        if isinstance(value, _CONTAINERS):
            return [f"len({at}) == {len(value)}"]
        if isinstance(value, list | tuple) and all(isinstance(v, SCALARS) for v in value):
            return [f"len({at}) == {len(value)}", *[equals(f"{at}[{i}]", v, scope) for i, v in enumerate(value)]]
        if isinstance(value, _FUNCTIONS) and not isinstance(value, functools.partial):
            return [f"{at} is {_named(value, scope)}"]
        if isinstance(value, nn.Module | dict | set) or not hasattr(value, "__dict__"):
            return []
        names = {n for code in self.codes for n in _names(code)}
        return [equals(f"{at}.{n}", v, scope) for n, v in vars(value).items() if n in names and isinstance(v, SCALARS) and n.isidentifier()]


def equals(at: str, value: Any, scope: dict[str, Any]) -> str:
    """An expression that compares what stands `at` with the value."""
    if value is None or isinstance(value, bool):
        return f"{at} is {value}"
    if isinstance(value, float):
        return f"{at} != {at}" if value != value else f"{at} == {_named(value, scope)}"
    return f"{at} == {value!r}" if type(value) in (int, str, bytes) else f"{at} == {_named(value, scope)}"


def _named(value: Any, scope: dict[str, Any]) -> str:
    name = next((n for n, v in scope.items() if v is value), f"seen{len(scope)}")
    scope[name] = value
    return name


def _constants(code: CodeType, names: dict[str, Any], scope: dict[str, Any]) -> list[str]:
    """Plain constants of the file that the code names."""
    home = sys.modules.get(str(names.get("__name__")))
    if not isinstance(home, ModuleType) or vars(home) is not names:
        return []
    wanted = [n for n in _names(code) if n in names and not n.startswith("__") and isinstance(names[n], SCALARS)]
    return [equals(f"{_named(home, scope)}.{n}", names[n], scope) for n in wanted]


def reach(path: str) -> str:
    """ "self.experts[3].up" as Python code, for experts.3.up."""
    text = "self"
    for part in path.split(".") if path else ():
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text
