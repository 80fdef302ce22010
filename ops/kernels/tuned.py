"""Measured choices of block rows and tiles, which configs.py takes before its own rules.

Two tables: the user's file (tuned_file.py, written by `moe-compile tune`), then the one that is shipped (tuned_shipped.py). A choice holds
for a device, a Triton version and a layer's widths, experts and element size, up to twice or half as many slots as it was measured with;
the nearest is taken. What was chosen once is one dict access the next time: files are read by the first call alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from moe_compile.ops import replay

from .tiles import Shape, Strip, Tiles

ROWS, FIRST, NEXT = "rows", "first", "next"  # rows of a call's blocks; tiles of the layer that reads x through slots, and of others
FEW = ("few", "few last", "few across", "few last across")  # strips of single slots
SCALED_ROWS, SCALED, SCALED_INNER = "scaled rows", "scaled", "scaled inner"  # with quantised weights; of rows that are quantised again
ROLES = (ROWS, FIRST, NEXT, *FEW, SCALED_ROWS, SCALED, SCALED_INNER)
REACH = 2.0  # times more or fewer slots than measured
MOST_KNOWN = 4096  # choices that are remembered


def few_role(along: bool, last: bool) -> str:
    return FEW[2 * (not along) + last]


class Machine(NamedTuple):
    """What a measured time depends on beside the layer: the device's name without its maker, Triton's "major.minor"."""

    device: str
    triton: str


class Key(NamedTuple):
    """A question that configs.py asks: for blocks of so many rows (0: not asked about), a layer's experts and widths."""

    role: str
    rows: int
    experts: int
    inner: int
    width: int
    products: int
    itemsize: int


class Entry(NamedTuple):
    """One answer: block rows (roles "rows"), Tiles, or a Strip (few). layout: as in Shape; "" holds for any."""

    key: Key
    layout: str
    slots: int
    value: Any


def key_of(role: str, shape: Shape, rows: int) -> Key:
    return Key(role, rows, shape.experts, shape.inner, shape.width, shape.products, shape.itemsize)


def entry(role: str, shape: Shape, rows: int, value: int | Tiles | Strip) -> Entry:
    """The answer to what configs.py asks about a shape."""
    return Entry(key_of(role, shape, rows), shape.layout, shape.slots, value)


class Table:
    """Entries by key; of those for one key, the first of two that are equally near is taken."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_key: dict[Key, list[Entry]] = {}
        for each in entries:
            self._by_key.setdefault(each.key, []).append(each)

    def nearest(self, key: Key, layout: str, slots: int) -> Entry | None:
        fitting = [each for each in self._by_key.get(key, ()) if not each.layout or not layout or each.layout == layout]
        near = [(max(each.slots, slots) / max(1, min(each.slots, slots)), each) for each in fitting]
        reached = [pair for pair in near if pair[0] <= REACH]
        return min(reached, key=lambda pair: pair[0])[1] if reached else None


_chosen: dict[tuple[str, int, Shape], Any] = {}
_only: list[tuple[Table, set[Entry]]] = []  # of `only`, the innermost last


def chosen(role: str, shape: Shape, rows: int, rule: Callable[[], Any]) -> Any:
    """What was measured for the shape, else what the rule says."""
    key = role, rows, shape
    found = _chosen.get(key)
    if found is None:
        measured = _measured(role, shape, rows)
        if len(_chosen) >= MOST_KNOWN:
            _chosen.clear()
        found = _chosen[key] = rule() if measured is None else measured.value
    return found


def _measured(role: str, shape: Shape, rows: int) -> Entry | None:
    key = key_of(role, shape, rows)
    if _only:
        table, used = _only[-1]
        found = table.nearest(key, shape.layout, shape.slots)
        used.update(() if found is None else (found,))
        return found
    machine = machine_of(shape.device)
    for table in () if machine is None else tables_of(machine):
        found = table.nearest(key, shape.layout, shape.slots)
        if found is not None:
            return found
    return None


@contextlib.contextmanager
def only(entries: Iterable[Entry]) -> Iterator[set[Entry]]:
    """Inside, these are all that is known, on any device. Gives the entries that were taken so far."""
    used: set[Entry] = set()
    _only.append((Table(entries), used))
    _forget_choices()
    try:
        yield used
    finally:
        _only.pop()
        _forget_choices()


def forget() -> None:
    """Tables are read again by the next call."""
    _forget_choices()
    tables_of.cache_clear()


def _forget_choices() -> None:
    _chosen.clear()
    replay.forget()  # what was recorded has its tiles


@functools.lru_cache(maxsize=16)
def tables_of(machine: Machine) -> tuple[Table, ...]:
    """The user's, then the shipped one."""
    from . import tuned_file, tuned_shipped

    return Table(tuned_file.entries_for(machine)), Table(tuned_shipped.TABLE.get(machine, ()))


@functools.lru_cache(maxsize=64)
def machine_of(device: Any = None) -> Machine | None:
    """Of a CUDA device (None: the current one); None elsewhere."""
    import torch

    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    import triton

    name = torch.cuda.get_device_name(device)
    return Machine(name.removeprefix("NVIDIA ").strip(), ".".join(triton.__version__.split(".")[:2]))
