"""How a model is parallel: the one configuration object a user writes."""

from __future__ import annotations

import dataclasses
from typing import Any

AXES = ("ep", "tp", "dp")
TP_DISPATCH = ("slice", "leader")
QUANT = ("none", "fp8")
OVERFLOW = ("error", "drop")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes and groups of the parallel axes, and how tokens travel between experts.

    `from_torchrun` and `from_device_mesh` make one with its groups; docs/parallel.md has pictures.

    ep: ranks that share the experts; expert e is on rank e // ceil(E / ep) of its ep_group, as DTensor's Shard(0) cuts.
    tp: ranks that hold the same tokens. They lie in one ep_group, or in tp groups that hold the same experts.
    dp: ranks beside these axes that hold other tokens (with tp inside ep: all ranks that hold other tokens).
    ep_group, tp_group, dp_group: torch.distributed process group of each axis; None only where the size is 1.
    replica_group: the ranks that hold the same experts as this one; None if there is no other.
    comm: name of a communication provider, or "auto" to choose by what the hardware supports and by measured cost.
    max_tokens_per_rank: the most tokens that a rank dispatches at once (None: no limit is known).
    equal_tokens: every rank of ep_group always brings the same number of tokens; then decode and prefill may take different providers.
    quant: quantisation of the dispatched rows, "none" or "fp8" (e4m3 with a float32 scale for 128 columns; inference only).
    tp_dispatch: with tokens replicated over tensor-parallel ranks, "slice" dispatches each rank's share of them and
        gathers after the combine; "leader" dispatches from the first rank only.
    timeout: seconds after which a rank that waits for another one in an exchange raises instead.
    overflow: what a provider with a fixed capacity an expert does with more tokens: raise, or leave them out of the sum.
    capacity: rows an expert takes from all ranks in such a provider (None: as many as can come).
    same_host: whether all ranks of ep_group run on one machine; found when the ranks compare their configurations.

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
    replica_group: Any = None
    equal_tokens: bool = False
    timeout: float = 300.0
    overflow: str = "error"
    capacity: int | None = None
    same_host: bool = True

    def __post_init__(self) -> None:
        for axis in AXES:
            _check_axis(axis, getattr(self, axis), getattr(self, f"{axis}_group"))
        if not isinstance(self.comm, str) or not self.comm:
            raise TypeError(f'ParallelConfig.comm is {self.comm!r}; give a provider\'s name, or "auto"')
        for field in ("max_tokens_per_rank", "capacity"):
            if getattr(self, field) is not None:
                _check_count(field, getattr(self, field), "or None for no limit")
        _check_choice("quant", self.quant, QUANT)
        _check_choice("tp_dispatch", self.tp_dispatch, TP_DISPATCH)
        _check_choice("overflow", self.overflow, OVERFLOW)
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float):
            raise TypeError(f"ParallelConfig.timeout is {self.timeout!r}; give seconds as a number above 0")
        if not self.timeout > 0:
            raise ValueError(f"ParallelConfig.timeout is {self.timeout}; give seconds, more than 0")

    @classmethod
    def from_torchrun(cls, ep: int = 1, tp: int = 1, dp: int = 1, **fields: Any) -> ParallelConfig:
        """The configuration of processes that torchrun started, one call on every rank; see moe_compile/groups.py for the layouts.

        fields: this class' other fields. Raises ValueError on all ranks where they disagree, or where the sizes do not fit the world.
        """
        from moe_compile.groups import from_torchrun

        return from_torchrun(ep, tp, dp, fields)

    @classmethod
    def from_device_mesh(
        cls, mesh: Any, ep: str | None = "ep", tp: str | None = "tp", dp: str | None = "dp", **fields: Any
    ) -> ParallelConfig:
        """The configuration of a torch DeviceMesh: ep, tp, dp are the names of its dimensions, a missing one has size 1.

        fields: this class' other fields. Raises ValueError on all ranks where they disagree.
        """
        from moe_compile.groups import from_device_mesh

        return from_device_mesh(mesh, {"ep": ep, "tp": tp, "dp": dp}, fields)

    @property
    def single_process(self) -> bool:
        """Whether every axis has one rank, so that nothing has to be exchanged."""
        return all(getattr(self, axis) == 1 for axis in AXES)

    @property
    def replicas(self) -> int:
        """How many ranks hold the same experts."""
        return 1 if self.replica_group is None else int(self.replica_group.size())

    @property
    def data_ranks(self) -> int:
        """How many ranks hold different tokens: what a data-parallel mean of gradients divides by."""
        return self.ep * self.replicas // self.tp


def _check_axis(axis: str, size: Any, group: Any) -> None:
    _check_count(axis, size, "the number of ranks on that axis")
    if size > 1 and group is None:
        raise ValueError(
            f"ParallelConfig.{axis} is {size} but {axis}_group is None; use ParallelConfig.from_torchrun({axis}={size}), or pass "
            f'the axis\' process group, for example mesh.get_group("{axis}") of a torch.distributed device mesh'
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
