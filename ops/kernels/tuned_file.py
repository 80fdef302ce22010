"""The user's file of measured choices: JSON beside the other things that are kept of this machine, written whole under a lock.

    {"format": 1, "sections": [{"device": "H200", "triton": "3.6", "kernels": hash, "points": [a layer and a number of tokens each]}]}

A section belongs to a device, a Triton version and these kernels' sources, so that several of each share the file. Reading never fails:
a file that is broken, or has nothing for this machine, is told once through the logger and left alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .tiles import Strip, Tiles
from .tuned import FEW, ROLES, ROWS, SCALED_ROWS, Entry, Key, Machine, forget

FORMAT = 1
SOURCES = (
    "grouped_gemm.py", "gemv.py", "rows.py", "epilogue.py", "pointwise.py", "launch.py", "launch_few.py", "layers.py", "scaled_gemm.py",
    "scaled_rows.py", "scaled_hopper.py", "unpack.py", "launch_scaled.py", "launch_hopper.py",
)  # fmt: skip
WAY_OUT = "`moe-compile tune` measures anew, `moe-compile tune --forget` deletes what is there"


@dataclass(frozen=True)
class Point:
    """What was found for a layer (as the command was given it) and a number of tokens. rules: microseconds of the rules' choice.

    finished: the search was not stopped before its end.
    """

    layer: dict[str, Any]
    tokens: int
    entries: tuple[Entry, ...]
    microseconds: float
    rules: float
    date: str
    finished: bool = True


@dataclass
class Section:
    machine: Machine
    kernels: str
    points: list[Point] = field(default_factory=list)

    def fits(self, machine: Machine) -> bool:
        return self.machine == machine and self.kernels == kernels_hash()


def path() -> Path:
    from moe_compile.calibration import cache_file

    return cache_file().with_name("tiles.json")


@functools.lru_cache(maxsize=1)
def kernels_hash() -> str:
    """Of the sources whose speed was measured."""
    here = Path(__file__).parent
    return hashlib.sha256(b"\0".join((here / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


# ---------------------------------------------------------------- reading
def entries_for(machine: Machine) -> list[Entry]:
    """Those that hold on this machine."""
    sections = _sections()
    _tell_unused(sections, machine)
    return [entry for each in sections if each.fits(machine) for point in each.points for entry in point.entries]


def points_for(machine: Machine) -> list[Point]:
    return [point for each in _sections() if each.fits(machine) for point in each.points]


def _sections() -> list[Section]:
    """What the file holds; nothing, with a warning, if that cannot be read."""
    from moe_compile.logs import warn_once

    file = "the file of measured tiles"
    try:
        file = str(path())
        text = Path(file).read_text()
        return _parsed(json.loads(text))
    except FileNotFoundError:
        return []
    except (OSError, ImportError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn_once(f"{file} is ignored ({type(error).__name__}: {error}), tiles follow the rules. {WAY_OUT}.", details=error)
        return []


def _tell_unused(sections: list[Section], machine: Machine) -> None:
    from moe_compile.logs import warn_once

    if not sections or any(each.fits(machine) for each in sections):
        return
    own = [each for each in sections if each.machine.device == machine.device]
    if own:
        had = ", ".join(sorted({f"Triton {each.machine.triton}" for each in own if each.machine.triton != machine.triton}))
        reason = f"was measured with {had or 'other kernels'}; this is Triton {machine.triton}" + (
            "" if had else " and newer or older kernels"
        )
    else:
        reason = f"has tiles for {', '.join(sorted({each.machine.device for each in sections}))}, none for {machine.device}"
    warn_once(f"{path()} {reason}: it is ignored, tiles follow the rules. {WAY_OUT}.")


def _parsed(data: Any) -> list[Section]:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"its format is {found!r}, this version reads {FORMAT}")
    return [
        Section(Machine(str(each["device"]), str(each["triton"])), str(each["kernels"]), [_point(point) for point in each["points"]])
        for each in data["sections"]
    ]


def _point(data: dict[str, Any]) -> Point:
    entries = tuple(entry_from(each) for each in data["entries"])
    numbers = float(data["microseconds"]), float(data["rules"])
    return Point(dict(data["layer"]), int(data["tokens"]), entries, *numbers, str(data["date"]), bool(data["finished"]))


def entry_from(data: dict[str, Any]) -> Entry:
    key = Key(*(data[name] for name in Key._fields))
    if key.role not in ROLES or not all(type(number) is int and number >= 0 for number in (*key[1:], data["slots"])):
        raise ValueError(f"no such choice: {data}")
    value = data["value"] if key.role in (ROWS, SCALED_ROWS) else value_from(data["value"], Strip if key.role in FEW else Tiles)
    if key.role in (ROWS, SCALED_ROWS) and not _power(value, 16):
        raise ValueError(f"blocks of {value!r} rows, they have a power of two from 16 on")
    if isinstance(value, Tiles) and value.rows != key.rows:
        raise ValueError(f"tiles of {value.rows} rows for blocks of {key.rows}")
    return Entry(key, str(data["layout"]), data["slots"], value)


def value_from(data: dict[str, Any], kind: type) -> Any:
    """Tiles or a Strip. Raises ValueError for sizes that no kernel takes."""
    value = kind(**data)
    least = {"rows": 16, "cols": 16, "depth": 16} if kind is Tiles else {"depth": 16}
    for name, each in data.items():
        flag = isinstance(getattr(kind, name, None), bool)
        whole = name in ("stages", "group")
        if not (isinstance(each, bool) if flag else type(each) is int and each > 0 if whole else _power(each, least.get(name, 1))):
            raise ValueError(f"{kind.__name__} with {name} {each!r}")
    return value


def _power(value: Any, least: int) -> bool:
    return type(value) is int and value >= least and value & (value - 1) == 0


# ---------------------------------------------------------------- writing
def keep(machine: Machine, point: Point) -> None:
    """Puts a point in the place of an earlier one for the same layer and tokens. The calls of this process use it from now on."""
    with locked():
        sections = _sections()
        own = next((each for each in sections if each.fits(machine)), None)
        if own is None:
            own = Section(machine, kernels_hash())
            sections.append(own)
        own.points = [each for each in own.points if (each.layer, each.tokens) != (point.layer, point.tokens)] + [point]
        _write(sections)
    forget()


def remove(device: str) -> int:
    """Deletes all that is kept of a device, of any version, and a file that cannot be read. How many points there were."""
    with locked():
        sections = _sections()
        _write([each for each in sections if each.machine.device != device])
    forget()
    return sum(len(each.points) for each in sections if each.machine.device == device)


@contextlib.contextmanager
def locked() -> Iterator[Path]:
    from filelock import FileLock

    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        yield file


def _write(sections: list[Section]) -> None:
    replace(path(), json.dumps({"format": FORMAT, "sections": [_section_json(each) for each in sections if each.points]}, indent=1))


def replace(file: Path, text: str) -> None:
    """A file's text at once: who reads sees the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _section_json(section: Section) -> dict[str, Any]:
    points = [
        {"layer": p.layer, "tokens": p.tokens, "microseconds": p.microseconds, "rules": p.rules, "date": p.date, "finished": p.finished,
         "entries": [entry_json(each) for each in p.entries]}
        for p in section.points
    ]  # fmt: skip
    return {**section.machine._asdict(), "kernels": section.kernels, "points": points}


def entry_json(entry: Entry) -> dict[str, Any]:
    value = entry.value if isinstance(entry.value, int) else asdict(entry.value)
    return {**entry.key._asdict(), "layout": entry.layout, "slots": entry.slots, "value": value}
