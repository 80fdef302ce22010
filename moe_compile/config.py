"""How a model is parallel: the one configuration object a user writes."""

from __future__ import annotations

import dataclasses
from typing import Any

AXES = ("ep", "tp", "dp")
TP_DISPATCH = ("slice", "leader")
QUANT = ("none",)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes and groups of the parallel axes, and how tokens travel between experts.

    ep, tp, dp: sizes of the expert-, tensor- and data-parallel axes.
    ep_group, tp_group, dp_group: torch.distributed process group of each axis; None only where the size is 1.
    comm: name of a communication provider, or "auto" to choose by what the hardware supports and by measured cost.
    max_tokens_per_rank: the most tokens that a rank dispatches at once (None: no limit is known).
    quant: quantisation of the dispatched rows.
    tp_dispatch: with tokens replicated over tensor-parallel ranks, "slice" dispatches each rank's share of them and
        gathers after the combine; "leader" dispatches from the first rank only.

    Raises ValueError or TypeError naming the field, its value, what is allowed, and the way out.
    """

    ep: int = 1
    tp: int = 1
    dp: int = 1
    ep_group: Any = None
    tp_group: Any = None
    dp_group: Any = None
    comm: str = "auto"
    max_tokens_per_rank: int | None = None
    quant: str = "none"
    tp_dispatch: str = "slice"

    def __post_init__(self) -> None:
        for axis in AXES:
            _check_axis(axis, getattr(self, axis), getattr(self, f"{axis}_group"))
        if not isinstance(self.comm, str) or not self.comm:
            raise TypeError(f'ParallelConfig.comm is {self.comm!r}; give a provider\'s name, or "auto"')
        if self.max_tokens_per_rank is not None:
            _check_count("max_tokens_per_rank", self.max_tokens_per_rank, "or None for no limit")
        _check_choice("quant", self.quant, QUANT)
        _check_choice("tp_dispatch", self.tp_dispatch, TP_DISPATCH)

    @property
    def single_process(self) -> bool:
        """Whether every axis has one rank, so that nothing has to be exchanged."""
        return all(getattr(self, axis) == 1 for axis in AXES)


def _check_axis(axis: str, size: Any, group: Any) -> None:
    _check_count(axis, size, "the number of ranks on that axis")
    if size > 1 and group is None:
        raise ValueError(
            f"ParallelConfig.{axis} is {size} but {axis}_group is None; pass the axis' process group, for example "
            f'mesh.get_group("{axis}") of a torch.distributed device mesh'
        )
    ranks = group.size() if callable(getattr(group, "size", None)) else size
    if ranks != size:
        raise ValueError(f"ParallelConfig.{axis} is {size} but {axis}_group has {ranks} ranks; they must be equal")


def _check_count(field: str, value: Any, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ParallelConfig.{field} is {value!r}; give a whole number of at least 1 ({meaning})")
    if value < 1:
        raise ValueError(f"ParallelConfig.{field} is {value}; give at least 1 ({meaning})")


def _check_choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"ParallelConfig.{field} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
