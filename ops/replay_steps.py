"""What a recorded call is made of (replay.py): allocations, ops of torch, kernels; and what it gives. Each is told where tensors stand.

A place is the number of an input, or behind the inputs that of what is made; a view of it begins some bytes from its first element on.
"""

from __future__ import annotations

import abc
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

MOST_BOXES = 1024  # descriptors of one form that are kept, one for each address
NOWHERE = -1  # the place of what has no elements


class Recipe:
    """Steps, each of which is given addresses and tensors by place: those of the inputs, then of what is made."""

    def __init__(self, steps: list[Any], result: Result, inputs: int, made: int) -> None:
        self.steps, self.result, self.room = steps, result, [None] * made
        self.compiled = any(isinstance(step, Compiled) for step in steps)
        last = {at: step for step in steps for at in step.reads()}
        for at, step in last.items():
            if at >= inputs and at not in result.places:
                step.frees.append(at)

    def run(self, tensors: list[Any], addresses: list[int]) -> Any:
        if not self.compiled:
            return self._go(tensors + self.room, addresses + self.room, None)
        from triton.runtime import driver

        index = tensors[0].device.index
        if index == driver.active.get_current_device():
            return self._go(tensors + self.room, addresses + self.room, driver.active.get_current_stream(index))
        with torch.cuda.device(index):
            return self._go(tensors + self.room, addresses + self.room, driver.active.get_current_stream(index))

    def _go(self, live: list[Any], at: list[Any], stream: Any) -> Any:
        for step in self.steps:
            step.go(live, at, stream)
            for each in step.frees:
                live[each] = None
        return self.result.of(live)


class Step(abc.ABC):
    """frees: places that nothing reads after it."""

    def __init__(self) -> None:
        self.frees: list[int] = []

    def reads(self) -> set[int]:
        return set()

    @abc.abstractmethod
    def go(self, live: list[Any], at: list[Any], stream: Any) -> None:
        """Does it again. live: tensors by place, at: their addresses, into both of which what is made goes. stream: of kernels."""


class Allocate(Step):
    """A tensor like the one that was allocated."""

    def __init__(self, to: int, like: Any) -> None:
        super().__init__()
        self.to, self.shape, self.stride, self.dtype, self.device = to, like.shape, like.stride(), like.dtype, like.device
        self.dense = like.is_contiguous()

    def go(self, live: list[Any], at: list[Any], stream: Any) -> None:
        if self.dense:
            made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        else:
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        live[self.to], at[self.to] = made, made.data_ptr()


class Given:
    """Arguments in their order. template: what is no tensor; tensors: (which argument, where in a list or None, place, bytes, form)."""

    def __init__(self, args: Sequence[Any], place: Callable[[Any], tuple[int, int] | None]) -> None:
        self.template = [list(arg) if isinstance(arg, (list, tuple)) else arg for arg in args]
        self.lists = [type(arg) for arg in args]
        self.tensors: list[tuple[int, int | None, int, Any, Any]] = []
        for which, arg in enumerate(args):
            for inside, each in enumerate(arg) if isinstance(arg, (list, tuple)) else [(None, arg)]:
                if isinstance(each, torch.Tensor):
                    found = place(each) or (NOWHERE, each.device)
                    self.tensors.append((which, inside, *found, _form(each)))
                    self._put(self.template, which, inside, None)

    @staticmethod
    def _put(args: list[Any], which: int, inside: int | None, value: Any) -> None:
        if inside is None:
            args[which] = value
        else:
            args[which][inside] = value

    def places(self) -> set[int]:
        return {place for _, _, place, *_ in self.tensors}

    def of(self, live: list[Any]) -> list[Any]:
        args = [list(arg) if isinstance(arg, list) else arg for arg in self.template]
        for which, inside, place, offset, form in self.tensors:
            self._put(args, which, inside, _nothing(offset, form) if place == NOWHERE else _within(live[place], offset, form))
        return [tuple(arg) if kind is tuple else arg for arg, kind in zip(args, self.lists)]


class Torch(Step):
    """An op of torch. to: the places of what it gives, None for an argument that it gives again."""

    def __init__(self, func: Any, args: Given, named: Given, names: tuple[str, ...], to: list[int | None]) -> None:
        super().__init__()
        self.func, self.args, self.named, self.names, self.to = func, args, named, names, to

    def reads(self) -> set[int]:
        return self.args.places() | self.named.places()

    def go(self, live: list[Any], at: list[Any], stream: Any) -> None:
        result = self.func(*self.args.of(live), **dict(zip(self.names, self.named.of(live))))
        for to, each in zip(self.to, result if isinstance(result, (tuple, list)) else [result]):
            if to is not None:
                live[to], at[to] = each, each.data_ptr()


class Interpreted(Step):
    """A kernel by Triton's interpreter, with tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], compiled: Any, place: Any) -> None:
        super().__init__()
        self.kernel, self.grid, self.meta = kernel, grid, meta
        self.boxes = {which: _with_base(arg, None) for which, arg in enumerate(args) if is_box(arg)}
        self.addresses = [which for which, arg in enumerate(args) if are_tensors(arg)]
        self.given = Given([arg.base if which in self.boxes else arg for which, arg in enumerate(args)], place)

    def reads(self) -> set[int]:
        return self.given.places()

    def go(self, live: list[Any], at: list[Any], stream: Any) -> None:
        args = self.given.of(live)
        for which, box in self.boxes.items():
            args[which] = _with_base(box, args[which])
        for which in self.addresses:
            args[which] = tuple([each.data_ptr() for each in args[which]])
        self.kernel[self.grid](*args, **self.meta)


class Compiled(Step):
    """A compiled kernel, which takes all parameters in their order, constants too; addresses as numbers."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], compiled: Any, place: Any) -> None:
        super().__init__()
        self.start = compiled[(*grid, 1, 1)[:3]]
        self.pointers: list[tuple[int, int, int]] = []  # which argument, place, bytes from its first element on
        self.tuples: list[tuple[int, list[tuple[int, int] | None]]] = []  # None: without elements
        self.boxes: list[tuple[int, int, int, Any, Known]] = []  # and the descriptor, and those at addresses so far
        self.template = [None if isinstance(arg, torch.Tensor) or are_tensors(arg) or is_box(arg) else arg for arg in args]
        for which, arg in enumerate(args):
            self._take(which, arg, place)
        for parameter in list(inspect.signature(kernel.fn).parameters.values())[len(args) :]:
            self.template.append(meta.get(parameter.name, parameter.default))

    def _take(self, which: int, arg: Any, place: Any) -> None:
        if isinstance(arg, torch.Tensor):
            found = place(arg)
            if found is None:
                self.template[which] = 0  # without elements
            else:
                self.pointers.append((which, *found))
        elif are_tensors(arg):
            self.tuples.append((which, [place(each) for each in arg]))
        elif is_box(arg):
            self.boxes.append((which, *(place(arg.base) or (0, 0)), _with_base(arg, None), _known_like(arg)))

    def reads(self) -> set[int]:
        inside = {found[0] for _, places in self.tuples for found in places if found is not None}
        return inside | {place for _, place, _ in self.pointers} | {place for _, place, *_ in self.boxes}

    def go(self, live: list[Any], at: list[Any], stream: Any) -> None:
        args = self.template.copy()
        for which, place, offset in self.pointers:
            args[which] = at[place] + offset
        for which, places in self.tuples:
            args[which] = tuple([0 if found is None else at[found[0]] + found[1] for found in places])
        for which, place, offset, box, known in self.boxes:
            address = at[place] + offset
            args[which] = known.get(address) or _box_at(address, box, known)
        self.start(*args, stream=stream)


class Result:
    """What a call gives: what was made or views of it, as one tensor, or several in tuples or lists. wrong: something else is in it."""

    def __init__(self, result: Any, place: Any, inputs: int) -> None:
        self.part: Any = None  # of one tensor: (place, bytes, form)
        self.parts: list[Result] = []
        self.kind: Any = type(result)
        if isinstance(result, torch.Tensor):
            found = place(result) if result.numel() else (NOWHERE, result.device)
            self.wrong = found is None or NOWHERE < found[0] < inputs
            self.part = None if found is None else (*found, _form(result))
        else:
            self.wrong = self.kind not in (tuple, list)
            self.parts = [] if self.wrong else [Result(each, place, inputs) for each in result]
            self.wrong = self.wrong or any(part.wrong for part in self.parts)

    @functools.cached_property
    def places(self) -> set[int]:
        own = set() if self.part is None else {self.part[0]}
        return own.union(*(part.places for part in self.parts))

    def of(self, live: list[Any]) -> Any:
        if self.part is None:
            return self.kind([part.of(live) for part in self.parts])
        place, offset, form = self.part
        return _nothing(offset, form) if place == NOWHERE else _within(live[place], offset, form)


def _nothing(device: Any, form: tuple[Any, ...]) -> Any:
    shape, stride, dtype = form
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _form(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _within(base: Any, offset: int, form: tuple[Any, ...]) -> Any:
    """The tensor of that form, so many bytes behind the first element of another."""
    shape, stride, dtype = form
    if not offset and base.shape == shape and base.dtype == dtype and base.stride() == stride:
        return base
    begin = (base.storage_offset() * base.element_size() + offset) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=base.device).set_(base.untyped_storage(), begin, shape, stride)


class _Address:
    """Stands for the tensor of a descriptor, of which only the address is asked."""

    def __init__(self, at: int) -> None:
        self._at = at

    def data_ptr(self) -> int:
        return self._at


class Known(dict[int, Any]):
    """Descriptors of one form by address: those of weights, and of the allocator's few places, come again."""


_known: weakref.WeakValueDictionary[Any, Known] = weakref.WeakValueDictionary()  # by form: one for all recipes that have it


def _known_like(box: Any) -> Known:
    form = repr((type(box), [(name, value) for name, value in vars(box).items() if name != "base"]))
    return _known.setdefault(form, Known())


def _box_at(address: int, like: Any, made: Known) -> Any:
    """The descriptor at another address."""
    if len(made) >= MOST_BOXES:
        made.clear()
    found = made[address] = _with_base(like, _Address(address))
    return found


def is_box(arg: Any) -> bool:
    """Is it a Triton descriptor?"""
    return isinstance(getattr(arg, "base", None), torch.Tensor)


def _with_base(box: Any, base: Any) -> Any:
    """The same descriptor of something else, without its checks."""
    found = object.__new__(type(box))
    vars(found).update(vars(box), base=base)
    return found


def are_tensors(arg: Any) -> bool:
    return type(arg) is tuple and bool(arg) and isinstance(arg[0], torch.Tensor)
