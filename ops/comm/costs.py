"""What an exchange costs: calibrated on this machine, else the shipped table of such a device, else the provider's own formula.

A table holds microseconds of dispatch + collect at some tokens a rank of REFERENCE, for one device, number of ranks and payload. Another
layer is read at the tokens whose rows have as many bytes; between two sizes it is interpolated, outside extended by the next slope.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch

from .. import registry

TOKENS = 1024  # assumed where the number is unknown
Points = Mapping[int, float]  # tokens a rank -> microseconds of dispatch + collect, maximum over ranks


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the layer that a table was measured with. nbytes: of an element."""

    hidden: int = 7168
    top_k: int = 8
    nbytes: int = 2


REFERENCE = Shape()
# what a token costs a provider: a row for each rank with one of its experts, for each rank, or for each slot
GROWTH = {
    "nvlink": "ranks", "alltoall": "ranks", "deepep_ht": "ranks", "deepep_v2": "ranks", "allgather": "all", "nvlink_batched": "slots",
    "deepep_ll": "slots", "pplx": "slots",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Key:
    """What a table holds for. device: its family, as in "H200" (device_family)."""

    device: str
    world: int
    quant: str


@dataclasses.dataclass(frozen=True)
class Table:
    """shape: measured with; origin: for reports; points: of each provider."""

    shape: Shape
    origin: str
    points: Mapping[str, Points]


_calibrated: dict[Key, Table] = {}


def use(key: Key, table: Table) -> None:
    """Puts a calibrated table before all others. Ranks of a group must give the same."""
    _calibrated[key] = table


def forget() -> None:
    """Leaves the shipped tables alone."""
    _calibrated.clear()


def device_family(name: str) -> str:
    """The word of a device's name that tells its kind: "NVIDIA H200" -> "H200"; "cpu" for none."""
    words = [w for w in name.replace("-", " ").split() if any(c.isdigit() for c in w)]
    return words[0] if words else name.lower() or "cpu"


def key_of(problem: registry.Problem) -> Key:
    on_gpu = problem.device.startswith("cuda") and torch.cuda.is_available()
    return Key(device_family(torch.cuda.get_device_name() if on_gpu else "cpu"), problem.world, problem.quant)


def cost(provider: registry.Provider, problem: registry.Problem) -> tuple[float, str]:
    """(microseconds, where the number is from: "measured" or "estimated")."""
    if problem.stage == "comm" and problem.world > 1:
        found = measured(provider.name, problem)
        if found is not None:
            return found, "measured"
    return provider.cost(problem), "estimated"


def measured(name: str, problem: registry.Problem) -> float | None:
    """Microseconds from the table of this device and group; None if the provider was not measured there."""
    from .measured import SHIPPED

    key = key_of(problem)
    for table in (_calibrated.get(key), SHIPPED.get(key)):
        points = table.points.get(name) if table is not None else None
        if table is not None and points:
            return interpolated(points, tokens_in(table.shape, name, problem))
    return None


def tokens_in(shape: Shape, name: str, problem: registry.Problem) -> float:
    """The tokens of a table's layer that move as many bytes as the problem's."""
    there = _rows(GROWTH.get(name, "ranks"), problem.world, shape.top_k) * shape.hidden * shape.nbytes
    here = _rows(GROWTH.get(name, "ranks"), problem.world, problem.top_k) * problem.hidden * problem.dtype.itemsize
    return (problem.tokens or TOKENS) * here / there


def _rows(growth: str, world: int, top_k: int) -> float:
    """Rows that a token sends."""
    return {"ranks": ranks_of_token(world, top_k), "all": float(world), "slots": float(top_k)}[growth]


def ranks_of_token(world: int, top_k: int) -> float:
    """Ranks that have one of a token's experts, if these are chosen evenly."""
    return world * (1 - (1 - 1 / world) ** top_k)


def bytes_sent(problem: registry.Problem) -> float:
    """Of one rank's rows to other ranks, each token once a rank."""
    rows = (problem.tokens or TOKENS) * ranks_of_token(problem.world, problem.top_k) * (problem.world - 1) / problem.world
    return rows * problem.hidden * problem.dtype.itemsize


def interpolated(points: Points, tokens: float) -> float:
    """Linear between the two sizes around it; never below the smallest measured size's time."""
    sizes = sorted(points)
    if len(sizes) == 1 or tokens <= sizes[0]:
        return points[sizes[0]] * (max(1.0, tokens / sizes[0]) if len(sizes) == 1 else 1.0)
    low, high = next(((a, b) for a, b in itertools.pairwise(sizes) if tokens <= b), (sizes[-2], sizes[-1]))
    slope = (points[high] - points[low]) / (high - low)
    return points[low] + slope * (tokens - low)


def to_json(key: Key, table: Table) -> dict[str, Any]:
    points = {name: {str(t): us for t, us in each.items()} for name, each in table.points.items()}
    return {"key": dataclasses.asdict(key), "shape": dataclasses.asdict(table.shape), "origin": table.origin, "points": points}


def from_json(found: Mapping[str, Any]) -> tuple[Key, Table]:
    """Raises KeyError, TypeError or ValueError for what to_json has not written."""
    points = {str(name): {int(t): float(us) for t, us in each.items()} for name, each in found["points"].items()}
    return Key(**found["key"]), Table(Shape(**found["shape"]), str(found["origin"]), points)
