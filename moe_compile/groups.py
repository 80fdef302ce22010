"""Process groups of a ParallelConfig: made from torchrun's world or a device mesh, and compared across ranks before anything can hang.

Two layouts. Ranks count with tp fastest, then ep, then dp.
    world = dp * ep * tp    experts are cut over ep alone: ranks that differ in tp or dp only hold the same experts
    world = dp * tp         ep is a multiple of tp and divides the world: an ep group spans whole tp groups, and holds the experts once
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from types import FunctionType
from typing import Any

import torch.distributed as dist

from moe_compile.config import AXES, ParallelConfig

_validated: set[int] = set()  # id of configurations that all ranks have compared; they live as long as the process
_kept: list[ParallelConfig] = []


def from_torchrun(ep: int, tp: int, dp: int, fields: dict[str, Any]) -> ParallelConfig:
    """See ParallelConfig.from_torchrun. Initialises torch.distributed if that was not done."""
    plain = ParallelConfig(**{**fields, "ep": 1, "tp": 1, "dp": 1})
    for axis, size in (("ep", ep), ("tp", tp), ("dp", dp)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"ParallelConfig.from_torchrun: {axis} is {size!r}; give a whole number of at least 1")
    _init()
    _compare({"ep": ep, "tp": tp, "dp": dp, **_plain_fields(plain)}, None, "ParallelConfig.from_torchrun")
    axes = _axes(ep, tp, dp, dist.get_world_size())
    timeout = timedelta(seconds=plain.timeout)
    groups = {name: _own_group(ranks, timeout) for name, ranks in axes.items()}
    config = dataclasses.replace(plain, ep=ep, tp=tp, dp=dp, **{f"{name}_group": group for name, group in groups.items()})
    return _remember(_with_hosts(config))


def _init() -> None:
    if dist.is_initialized():
        return
    import os

    import torch

    if "RANK" not in os.environ:
        raise ValueError(
            "ParallelConfig.from_torchrun: neither is torch.distributed initialised nor does the environment hold RANK; start the "
            "program with `torchrun --nproc-per-node=N program.py`, or call torch.distributed.init_process_group first"
        )
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo")


def _axes(ep: int, tp: int, dp: int, world: int) -> dict[str, list[list[int]]]:
    """For each axis, and for the replicas of the experts, the ranks of all its groups."""
    if ep * tp * dp == world:
        strides = {"tp": 1, "ep": tp, "dp": tp * ep}
        sizes = {"tp": tp, "ep": ep, "dp": dp}
        groups = {axis: _along(world, sizes[axis], strides[axis]) for axis in AXES}
    elif tp * dp == world and world % ep == 0 and ep % tp == 0:
        groups = {"tp": _along(world, tp, 1), "ep": _along(world, ep, 1), "dp": _along(world, dp, tp)}
    else:
        raise ValueError(
            f"ParallelConfig.from_torchrun(ep={ep}, tp={tp}, dp={dp}) does not fit a world of {world} ranks: either ep * tp * dp is "
            f"{world} (experts are cut over ep alone), or tp * dp is {world} and ep is a multiple of tp that divides it (ep spans tp)"
        )
    return {**groups, "replica": _replicas(groups["ep"], world)}


def _along(world: int, size: int, stride: int) -> list[list[int]]:
    starts = [r for r in range(world) if (r // stride) % size == 0]
    return [[start + i * stride for i in range(size)] for start in starts]


def _replicas(ep_groups: list[list[int]], world: int) -> list[list[int]]:
    """Ranks with the same place in their ep group hold the same experts."""
    return [sorted(places) for places in zip(*ep_groups)] if ep_groups else [[r] for r in range(world)]


def _own_group(groups: list[list[int]], timeout: timedelta) -> Any:
    """The group with this rank in it, None for a group of one. Every rank makes all of them in the same order."""
    own = None
    if len(groups[0]) == 1:
        return None
    for ranks in groups:
        made = dist.new_group(ranks, timeout=timeout)
        own = made if dist.get_rank() in ranks else own
    return own


def from_device_mesh(mesh: Any, names: dict[str, str | None], fields: dict[str, Any]) -> ParallelConfig:
    """See ParallelConfig.from_device_mesh."""
    known = tuple(mesh.mesh_dim_names or ())
    if not known:
        raise ValueError('the mesh has no dimension names; make it with init_device_mesh(..., mesh_dim_names=("dp", "ep"))')
    defaults = {axis: axis for axis in AXES}
    for axis, name in names.items():
        if name is not None and name not in known and name != defaults[axis]:
            raise ValueError(f"the mesh has no dimension {name!r} for {axis}; it has {', '.join(map(repr, known))}")
    chosen = {axis: name for axis, name in names.items() if name in known}
    sizes = {axis: mesh.size(known.index(name)) for axis, name in chosen.items()}
    groups = {f"{axis}_group": mesh.get_group(name) for axis, name in chosen.items() if sizes[axis] > 1}
    replica = _mesh_replicas(mesh, known, chosen)
    return validate(ParallelConfig(**{**fields, **sizes, **groups, "replica_group": replica}))


def _mesh_replicas(mesh: Any, known: tuple[str, ...], chosen: dict[str, str | None]) -> Any:
    """The group over all dimensions but ep's."""
    rest = [name for name in known if name != chosen.get("ep")]
    sizes = [mesh.size(known.index(name)) for name in rest]
    rest = [name for name, size in zip(rest, sizes) if size > 1]
    if not rest:
        return None
    if len(rest) == 1:
        return mesh.get_group(rest[0])
    return mesh[tuple(rest)]._flatten().get_group()


def validate(config: ParallelConfig) -> ParallelConfig:
    """Compares the configuration over the ranks of each of its groups, once; a collective call.

    Raises ValueError on all ranks of a group where fields differ, and fills in replica_group where explicit groups left it out.
    """
    if config.single_process or id(config) in _validated:
        return config
    for axis in AXES:
        group = getattr(config, f"{axis}_group")
        if group is not None and getattr(config, axis) > 1:
            _compare(
                {"ep": config.ep, "tp": config.tp, "dp": config.dp, **_plain_fields(config)}, group, f"ParallelConfig over {axis}_group"
            )
    return _remember(_with_hosts(_with_replicas(config)))


def _with_hosts(config: ParallelConfig) -> ParallelConfig:
    if config.ep == 1:
        return config
    hosts: list[Any] = [None] * config.ep
    dist.all_gather_object(hosts, socket.gethostname(), group=config.ep_group)
    return dataclasses.replace(config, same_host=len(set(hosts)) == 1)


def _with_replicas(config: ParallelConfig) -> ParallelConfig:
    """Explicit groups: the axes that leave the ep group lead to ranks with the same experts."""
    if config.replica_group is not None or config.ep == 1:
        return config
    own = set(dist.get_process_group_ranks(config.ep_group))
    leaving = []
    for axis in ("tp", "dp"):
        ranks = set(dist.get_process_group_ranks(getattr(config, f"{axis}_group"))) if getattr(config, axis) > 1 else set()
        if ranks - own:
            leaving.append(axis)
            if len(ranks & own) > 1:
                leaving.append(axis)  # partly inside: the group itself is not the answer
    if len(leaving) > 1:
        raise ValueError(
            f"ParallelConfig: {' and '.join(dict.fromkeys(leaving))}_group leaves ep_group, so several ranks hold the same experts; pass "
            "them as replica_group, or use ParallelConfig.from_device_mesh, which finds them"
        )
    return dataclasses.replace(config, replica_group=getattr(config, f"{leaving[0]}_group")) if leaving else config


def _remember(config: ParallelConfig) -> ParallelConfig:
    if config.ep > 1:
        from moe_compile.calibration import use_kept

        use_kept(config.ep_group)
    _validated.add(id(config))
    _kept.append(config)
    return config


@atexit.register
def _let_groups_go() -> None:
    """Ends the threads of destroyed process groups that only configurations in Dynamo's caches, or torch itself, still hold.

    Gloo's threads free the tensors of the last collectives. One that is late asks for the lock of an interpreter that is no more, and
    the process dies of SIGABRT ("terminate called without an active exception"). A group that nobody holds waits for its threads.
    """
    if not _kept:
        return
    for config in _kept:
        for axis in (*AXES, "replica"):
            object.__setattr__(config, f"{axis}_group", None)
    _kept.clear()
    _validated.clear()
    for function in _functions_of_torch_distributed():
        if any(isinstance(each, dist.ProcessGroup) for each in function.__defaults__ or ()):
            function.__defaults__ = tuple(None if isinstance(each, dist.ProcessGroup) else each for each in function.__defaults__)
    gc.collect()  # DDP's and FSDP2's models are cycles that hold groups


def _functions_of_torch_distributed() -> Iterator[Any]:
    """Some have the default group as a default argument: the one of the time when their module was imported, by Dynamo for example."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("torch.distributed.")]
    for value in [value for module in modules for value in getattr(module, "__dict__", {}).values()]:
        parts = vars(value).values() if issubclass(type(value), type) else (value,)
        yield from (part for part in parts if type(part) is FunctionType)  # isinstance makes torch's deprecated objects warn


def _plain_fields(config: ParallelConfig) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(config) if f.name not in (*AXES, "same_host") and not f.name.endswith("_group")]
    return {name: getattr(config, name) for name in names}


def _compare(mine: dict[str, Any], group: Any, what: str) -> None:
    """Raises ValueError on every rank if one of them has other values."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    differing = [key for key in mine if any(each.get(key) != mine[key] for each in everyone)]
    if differing:
        key = differing[0]
        values = ", ".join(f"rank {dist.get_global_rank(group, i) if group else i}: {each.get(key)!r}" for i, each in enumerate(everyone))
        raise ValueError(f"{what}: ranks disagree on {key} ({values}); every rank must pass the same configuration")
