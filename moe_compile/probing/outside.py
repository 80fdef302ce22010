"""What a forward may leave behind outside of the modules: globals of files, cells of closures, attributes of classes.

Only what the code of the modules' classes names, and the functions that it names: plain values, and what lists, dicts, sets, tensors,
arrays and objects hold.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from moe_compile.probing.reads import filled, names_in, written_by_user
from moe_compile.probing.state import DEPTH, mark_of

_MISSING = object()
_LONG = 1000  # what longer containers hold is not looked into


class Place:
    """Where a value stands, by name: a global, a cell, an attribute of a class."""

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.name, self.get, self.put = name, get, put


def places_of(root: nn.Module) -> list[Place]:
    """Every place that the code of the modules may read or write."""
    classes = {base for m in root.modules() for base in type(m).__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")}
    functions = _reached([f for cls in classes for f in _functions_of(cls)])
    names = {n for f in functions for n in names_in(f.__code__)}
    found = {
        (id(f.__globals__), n): _global(f.__globals__, n) for f in functions for n in names_in(f.__code__) & set(_plain(f.__globals__))
    }
    found |= {(id(f.__globals__), n): _global(f.__globals__, n) for f in functions for n in _stored(f.__code__)}
    found |= {(id(c), n): _cell(c, n) for f in functions for c, n in zip(f.__closure__ or (), f.__code__.co_freevars)}
    found |= {(id(cls), n): _attribute(cls, n) for cls in classes for n in names & set(_plain(vars(cls)))}
    return list(found.values())


def marks(places: list[Place]) -> dict[str, Any]:
    """What stands there, to be compared with later."""
    return {p.name: mark_of(p.get(), DEPTH) for p in places if not _constant(p.get())}


@contextlib.contextmanager
def outside_put_back(root: nn.Module) -> Iterator[None]:
    """What the code of the modules may have changed is afterwards what it was."""
    before = [(p, v, _keeper(v, DEPTH)) for p in places_of(root) if not _constant(v := p.get())]
    try:
        yield
    finally:
        for place, value, put_back in before:
            if place.get() is not value:
                place.put(value)
            put_back()


# ---------------------------------------------------------------- places
def _global(names: dict[str, Any], n: str) -> Place:
    def put(value: Any) -> None:
        if value is _MISSING:
            names.pop(n, None)
        else:
            names[n] = value

    return Place(f"the global {n}", lambda: names.get(n, _MISSING), put)


def _cell(cell: Any, n: str) -> Place:
    def get() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # empty as yet
            return _MISSING

    def put(value: Any) -> None:
        if value is not _MISSING:
            cell.cell_contents = value

    return Place(f"the outer variable {n}", get, put)


def _attribute(cls: type, n: str) -> Place:
    return Place(f"{cls.__name__}.{n}", lambda: vars(cls).get(n, _MISSING), lambda value: setattr(cls, n, value))


def _plain(names: Any) -> dict[str, Any]:
    return {n: v for n, v in names.items() if not n.startswith("__") and not _constant(v)}


def _constant(v: Any) -> bool:
    """What code calls and imports, and loggers, which remember what they have told."""
    fixed = isinstance(v, ModuleType | type | nn.Module | property | staticmethod | classmethod | torch.dtype) or callable(v)
    return fixed or type(v).__module__ == "logging"


# ---------------------------------------------------------------- code
def _functions_of(cls: type) -> list[FunctionType]:
    found = [getattr(f, "__func__", getattr(f, "fget", f)) for f in vars(cls).values()]
    return [f for f in found if isinstance(f, FunctionType)]


def _reached(functions: list[FunctionType]) -> list[FunctionType]:
    """These, what they wrap, and what they name in their files, as far as it is the user's."""
    found: dict[CodeType, FunctionType] = {}
    while functions:
        f = functions.pop()
        if f.__code__ in found or not written_by_user(f.__code__):
            continue
        found[f.__code__] = f
        inner = inspect.unwrap(f)
        named = [f.__globals__.get(n) for n in names_in(f.__code__)] + [c.cell_contents for c in f.__closure__ or () if filled(c)]
        functions += [g for g in [inner, *named] if isinstance(g, FunctionType)]
    return list(found.values())


def _stored(code: CodeType) -> set[str]:
    """Globals that the code assigns to."""
    some = {dis.opmap[n] for n in _STORES} & set(code.co_code[::2])
    mine = {str(i.argval) for i in dis.get_instructions(code) if i.opname in _STORES} if some else set()
    return mine.union(*[_stored(c) for c in code.co_consts if isinstance(c, CodeType)])


_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL")


# ---------------------------------------------------------------- what they hold
def _keeper(v: Any, depth: int) -> Callable[[], None]:
    """A function that makes a value hold what it holds now."""
    if isinstance(v, torch.Tensor):
        return _tensor(v)
    if not depth:
        return _nothing
    if isinstance(v, list | set | dict):
        return _container(v, depth)
    if type(v).__module__ == "numpy" and hasattr(v, "copy") and hasattr(v, "__setitem__"):
        return _array(v)
    if hasattr(v, "__dict__") and not _constant(v):
        return _container(vars(v), depth)
    return _nothing


def _nothing() -> None:
    """It holds nothing that could change."""


def _tensor(t: torch.Tensor) -> Callable[[], None]:
    held, version = t.detach().clone(), t._version

    def back() -> None:
        if t._version != version:
            with torch.no_grad():
                t.copy_(held)

    return back


def _array(a: Any) -> Callable[[], None]:
    held = a.copy()

    def back() -> None:
        a[...] = held

    return back


def _container(v: Any, depth: int) -> Callable[[], None]:
    held = dict(dict.items(v)) if isinstance(v, dict) else v.copy()  # not by the class's own __getitem__, which may make things
    parts = list(held.values() if isinstance(held, dict) else held) if len(held) <= _LONG else []
    inner = [k for k in (_keeper(x, depth - 1) for x in parts) if k is not _nothing]

    def back() -> None:
        if isinstance(v, list):
            v[:] = held
        elif _other(v, held):
            v.clear()
            v.update(held.items() if isinstance(held, dict) else held)
        for each in inner:
            each()

    return back


def _other(v: Any, held: Any) -> bool:
    if isinstance(v, set):
        return v != held
    now = dict(dict.items(v))
    return now.keys() != held.keys() or any(now[n] is not x for n, x in held.items())
