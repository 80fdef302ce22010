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
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from moe_compile.probing.errors import NotProbed, of_user, of_user_file

SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, functools.partial, torch.jit.ScriptFunction)
_LIBRARY = (sysconfig.get_path("stdlib"), "<")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def written_by_user(code: CodeType) -> bool:
    return written_by_user_at(code.co_filename)


def written_by_user_at(file: str) -> bool:
    return of_user_file(file) and not (file.startswith(_LIBRARY) and "site-packages" not in file)


def names_in(code: CodeType) -> set[str]:
    """Global names and attributes that the code mentions, and the code in it."""
    return set(code.co_names).union(*[names_in(c) for c in code.co_consts if isinstance(c, CodeType)])


def opens(m: nn.Module) -> bool:
    """Is all that its code reads of it seen where it is recorded from within?  So it is for the user's code and torch's simple classes."""
    return {c.__module__ for c in _bases(m)} <= _SIMPLE and not isinstance(m, nn.MultiheadAttention)


def own_settings(m: nn.Module) -> list[tuple[str, Any]]:
    """Attributes with plain values that the code of torch's own classes names: nobody notes when it reads them."""
    functions = [f for c in _bases(m) for n, f in vars(c).items() if isinstance(f, FunctionType) and n not in _NOT_CALLED]
    names = set().union(*[names_in(f.__code__) for f in functions])
    return [(n, v) for n, v in sorted(vars(m).items()) if n in names and n.isidentifier() and _plain(v)]


def _bases(m: nn.Module) -> list[type]:
    """Those of its classes that are torch's, but for Module itself."""
    return [c for c in type(m).__mro__ if c.__module__.partition(".")[0] == "torch" and c is not nn.Module]


def _plain(v: Any) -> bool:
    return isinstance(v, SCALARS) or (type(v) is tuple and all(isinstance(x, SCALARS) for x in v))


_SIMPLE = {f"torch.nn.modules.{n}" for n in ("linear", "activation", "dropout", "normalization", "sparse", "container")}
_NOT_CALLED = {"__init__", "__setstate__", "extra_repr", "reset_parameters", "_reset_parameters"}


class Reads:
    """attributes: (path of the module, name) -> value; codes: the user's code that ran, with its globals; cells: its outer variables.

    written: attributes that the code has written before it read them. absent: such as were asked for, and are not there.
    """

    def __init__(self) -> None:
        self.cells: list[CellType] = []
        self.attributes: dict[tuple[str, str], Any] = {}
        self.written: set[tuple[str, str]] = set()
        self.absent: set[tuple[str, str]] = set()
        self.found: set[tuple[str, str]] = set()  # such as stand neither in the module nor in its class as a plain value
        self.opened: set[str] = set()  # modules whose __dict__ was read
        self.codes: dict[CodeType, dict[str, Any]] = {}
        self.grad_mode = False

    @contextlib.contextmanager
    def watching(self, forward: Callable[..., Any], path_of: Callable[[nn.Module], str | None]) -> Iterator[None]:
        """Note what the forward and what it calls reads. path_of: the path of a module while that is to be noted, else None."""
        self.run(forward)
        before = nn.Module.__getattribute__
        enabled = torch.is_grad_enabled

        def read(m: nn.Module, name: str) -> Any:
            if (name[:2] != "__" or name == "__dict__") and (path := path_of(m)) is not None and of_user(sys._getframe(1)):
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
        if not isinstance(function, FunctionType) or function.__code__ in self.codes or not written_by_user(function.__code__):
            return
        self.codes[function.__code__] = function.__globals__
        _refuse_outer(function)
        self._outer(function)
        names = names_in(function.__code__)
        for n in names & set(function.__globals__):
            value = function.__globals__[n]
            self.run(value)
            if isinstance(value, ModuleType) and written_by_user_at(getattr(value, "__file__", None) or "<"):
                for inner in names & set(vars(value)):
                    self.run(vars(value)[inner])

    def _outer(self, function: FunctionType) -> None:
        """Variables of outer functions, and the functions that they hold."""
        for cell in filter(filled, function.__closure__ or ()):
            if isinstance(cell.cell_contents, (*SCALARS, tuple, *_FUNCTIONS)) and not any(cell is each for each in self.cells):
                self.cells.append(cell)
                self.run(cell.cell_contents)

    def seen(self, path: str, name: str) -> bool:
        """Has the code read the attribute, or asked for it, before it wrote it?"""
        at = path, name
        return path in self.opened or any(at in table for table in (self.attributes, self.absent, self.found))

    def _note(self, m: nn.Module, path: str, name: str) -> None:
        if name == "__dict__":
            self.opened.add(path)
        if name[:2] == "__" or (path, name) in self.written:
            return
        get = object.__getattribute__
        for table in (get(m, "__dict__"), get(m, "_parameters"), get(m, "_buffers"), get(m, "_modules")):
            if name in table:
                self.attributes.setdefault((path, name), table[name])
                return
        value = getattr(type(m), name, self)
        if isinstance(value, (*SCALARS, *_PLAIN)):
            self.attributes.setdefault((path, name), value)
        elif isinstance(value, FunctionType):
            self.run(value)
        elif value is self and type(m).__getattr__ is nn.Module.__getattr__:  # another one may find it elsewhere
            self.absent.add((path, name))
        else:
            self.found.add((path, name))

    def tests(self, scope: dict[str, Any]) -> list[str]:
        """Python expressions of `self` that are true as long as the same would be read; `scope` gets the names they need."""
        found = []
        for (path, name), value in self.attributes.items():
            found += self._tests(f"{reach(path)}.{name}" if name.isidentifier() else f"getattr({reach(path)}, {name!r})", value, scope)
        found += [f"not hasattr({reach(path)}, {name!r})" for path, name in sorted(self.absent)]
        for code, names in self.codes.items():
            found += self._constants(code, names, scope)
        for cell in self.cells:
            found += self._tests(f"{_named(_reader(cell), scope)}()", cell.cell_contents, scope)
        return [*found, "torch.is_grad_enabled()"] if self.grad_mode else found

    def _tests(self, at: str, value: Any, scope: dict[str, Any]) -> list[str]:
        if isinstance(value, SCALARS):
            return [equals(at, value, scope)]
        if isinstance(value, torch.Tensor):
            sizes = [f"{at}.shape[{d}] == {n}" for d, n in enumerate(value.shape)]
            return [f"{at} is not None", f"{at}.dim() == {value.dim()}", *sizes, f"{at}.dtype == {value.dtype}"]
        if isinstance(value, _CONTAINERS):
            return [f"len({at}) == {len(value)}"]
        if isinstance(value, _FUNCTIONS) and not isinstance(value, functools.partial):
            return [f"{at} is {_named(value, scope)}"]
        if isinstance(value, _PLAIN):
            return self._parts(at, value, scope)
        if isinstance(value, nn.Module | set | ModuleType | type) or not hasattr(value, "__dict__") or type(value).__module__ == "logging":
            return []
        names = {n for code in self.codes for n in names_in(code)}
        inner = {n: v for n, v in vars(value).items() if n in names and n.isidentifier() and isinstance(v, (*SCALARS, *_PLAIN))}
        return [test for n, v in inner.items() for test in self._tests(f"{at}.{n}", v, scope)]

    def _parts(self, at: str, value: Any, scope: dict[str, Any]) -> list[str]:
        """What a list, tuple or dict holds."""
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        if len(value) > _MOST:
            raise NotProbed(f"the code reads {at.rpartition('.')[2]}, which holds {len(value)} things: more than can be watched ({_MOST})")
        if not all(isinstance(key, int | str) for key, _ in items):
            raise NotProbed(f"the code reads {at.rpartition('.')[2]}, a dict whose keys are no names and no numbers")
        return [f"len({at}) == {len(value)}", *[test for key, v in items for test in self._tests(f"{at}[{key!r}]", v, scope)]]

    def _constants(self, code: CodeType, names: dict[str, Any], scope: dict[str, Any]) -> list[str]:
        """Constants of the file that the code names, and settings in lists, dicts and objects."""
        home = sys.modules.get(str(names.get("__name__")))
        if not isinstance(home, ModuleType) or vars(home) is not names:
            return []
        wanted = [n for n in names_in(code) if n in names and not n.startswith("__") and not callable(names[n])]
        return [test for n in wanted for test in self._tests(f"{_named(home, scope)}.{n}", names[n], scope)]


def _reader(cell: CellType) -> FunctionType:
    """A function that returns what the cell holds, which Dynamo looks into."""
    content = None

    def read() -> Any:
        return content

    return FunctionType(read.__code__, globals(), "read", None, (cell,))


def filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  raises where the outer function has not come so far
    except ValueError:
        return False
    return True


def _refuse_outer(function: FunctionType) -> None:
    """Variables of an outer function that hold what may change: nothing tells when they do."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # empty as yet
            if isinstance(cell.cell_contents, list | dict | set):
                raise NotProbed(f"{function.__name__} reads {name}, a variable of an outer function that holds what may change")


_PLAIN = (list, tuple, dict)
_MOST = 100  # parts of a list or dict that a program watches


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


def reach(path: str) -> str:
    """ "self.experts[3].up" as Python code, for experts.3.up."""
    text = "self"
    for part in path.split(".") if path else ():
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text
