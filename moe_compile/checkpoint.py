"""Checkpoints of sharded models, in safetensors: each rank reads and writes its own experts only.

load_sharded(model, "folder", parallel)      one file, several, a folder with an index, or what save_sharded wrote
save_sharded(model, "folder", parallel)      readable by load_sharded with another ep, or none
gather_state_dict(model, parallel)           the whole state dict on one rank, as the unsharded model would give it
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from moe_compile.checkpoint_files import INDEX, REST, Slot, catalog, expert_file, expert_places, opened, read, safetensors, slots
from moe_compile.gradients import attach_hooks, with_replicas
from moe_compile.ops.expert_shard import ANCHOR
from moe_compile.sharding import expert_owner, expert_range, like, shards


class Loaded(NamedTuple):
    """What load_sharded did: names without a value, names without a place, and how many bytes it took from the files."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    bytes_read: int


def load_sharded(model: nn.Module, paths: Any, parallel: Any, strict: bool = True, device: Any = None) -> Loaded:
    """Reads a checkpoint into `model`, which shard_experts may have sharded; of the experts only this rank's bytes.

    paths: a .safetensors file, several, an index (.json), or a folder with any of these. parallel: as for shard_experts.
    device: where tensors of a model on the meta device are made (default: torch's default device); dtypes stay the model's.

    Raises RuntimeError, before anything is read, if strict and names are missing or unexpected, or buffers that no state dict
    holds are on the meta device; ValueError for shapes or an ep that do not fit; FileNotFoundError; ImportError without safetensors.
    """
    _check(model, parallel)
    found = catalog([paths] if isinstance(paths, str | os.PathLike) else list(paths))
    targets = slots(model)
    elsewhere = {_join(path, name) for path, _, name, shard in shards(model) if shard.kind == "absent"}
    missing = tuple(slot.names[0] for slot in targets if not any(name in found for name in slot.names))
    unexpected = tuple(sorted(set(found) - {name for slot in targets for name in slot.names} - elsewhere))
    if strict:
        _refuse(model, missing, unexpected)
    home, total = _home(device), 0
    with contextlib.ExitStack() as stack:
        file_of = functools.cache(lambda path: stack.enter_context(opened(path)))
        for slot in targets:
            name = next((name for name in slot.names if name in found), None)
            if name is not None:
                value = read(slot, name, found[name], file_of)
                total += value.numel() * value.element_size()
                _assign(slot, value, home)
    for _, module, name, shard in shards(model):
        if shard.kind == "absent" and module._buffers[ANCHOR + name].is_meta:  # type: ignore[union-attr]
            module._buffers[ANCHOR + name] = torch.empty_like(module._buffers[ANCHOR + name], device=home)
    attach_hooks(model)
    return Loaded(missing, unexpected, total)


def _check(model: nn.Module, parallel: Any) -> None:
    spread = {shard.ep for *_, shard in shards(model)} or {1}
    if spread != {parallel.ep}:
        raise ValueError(
            f"the experts of this {type(model).__name__} are spread over {max(spread)} ranks and parallel.ep is {parallel.ep}; pass the "
            "ParallelConfig that shard_experts was given, or call it first"
        )


def _home(device: Any) -> Any:
    given = torch.get_default_device() if device is None else torch.device(device)
    return torch.device("cpu") if given.type == "meta" else given


def _refuse(model: nn.Module, missing: tuple[str, ...], unexpected: tuple[str, ...]) -> None:
    if missing or unexpected:
        raise RuntimeError(
            f"the checkpoint does not fit this {type(model).__name__}: {len(missing)} names missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)}); pass strict=False to load what fits"
        )
    held = {id(slot.tensor) for slot in slots(model)}
    lost = [name for name, b in model.named_buffers() if b.is_meta and id(b) not in held and ANCHOR not in name]
    if lost:
        raise RuntimeError(
            f"{len(lost)} buffers are on the meta device, and no checkpoint holds them ({_some(lost)}); build the modules that own them on "
            "a real device, or pass strict=False and set them afterwards"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") if listed else "none"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _assign(slot: Slot, value: Any, home: Any) -> None:
    """Into the tensor, or for one on the meta device in its place. Never a view of the file, which may be written again."""
    own, dtensor = slot.tensor, hasattr(slot.tensor, "to_local")
    with torch.no_grad():
        if slot.shard is not None and slot.shard.dtensor:
            value = like(own, value.to(own.device_mesh.device_type, own.dtype, copy=True), slot.shard)
        elif dtensor:
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(own.device_mesh.device_type), own.device_mesh, own.placements, src_data_rank=None)
        if not own.is_meta:
            own.copy_(value)
            return
        made = value.to(own.dtype) if dtensor else value.to(home, own.dtype, copy=True)
    if isinstance(own, nn.Parameter):
        made = nn.Parameter(made, requires_grad=own.requires_grad)
        vars(made).update(vars(own))
    for holder, name in slot.places:
        holder[name] = made


def save_sharded(model: nn.Module, directory: Any, parallel: Any) -> None:
    """Writes the model to a folder that all ranks see: one file a rank with its experts, one with the rest, and an index.

    Every rank must call it; of ranks with the same experts the first writes. Load it with load_sharded. Raises ImportError
    without safetensors.
    """
    _check(model, parallel)
    save, folder = safetensors("safetensors.torch").save_file, Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    parallel = with_replicas(parallel)
    rank, first_replica = _ranks(parallel)
    experts: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for slot in slots(model):
        sharded = slot.shard is not None
        whole = _whole(slot.tensor, sharded, keep=first_replica and (sharded or rank == 0))
        if whole is not None:
            (experts if sharded else rest)[slot.names[0]] = whole
    places = expert_places(model, parallel.ep)
    if first_replica and experts:
        own = expert_file(rank, parallel.ep)
        ranges = {n: (a, b) for n in experts for file, a, b in places[n] if file == own and b is not None}
        save(experts, str(folder / own), metadata={"format": "pt", "moe_compile": json.dumps(ranges)})
    if first_replica and rank == 0:
        save(rest, str(folder / REST), metadata={"format": "pt"})
    _wait(parallel)
    if first_replica and rank == 0:
        _write_index(folder, parallel.ep, list(rest), places)
    _wait(parallel)


def _write_index(folder: Path, ep: int, rest: list[str], places: dict[str, list[tuple[str, int, int | None]]]) -> None:
    """Last, and at once: a folder with an index is complete."""
    lists = {name: parts[0][0] for name, parts in places.items() if parts[0][2] is None}
    stacks = {name: parts for name, parts in places.items() if name not in lists}
    index = {"metadata": {"ep": ep}, "weight_map": {**dict.fromkeys(rest, REST), **lists}, "experts": stacks}
    (folder / f"{INDEX}.part").write_text(json.dumps(index, indent=1))
    os.replace(folder / f"{INDEX}.part", folder / INDEX)


def _whole(tensor: Any, sharded: bool, keep: bool) -> Any:
    """On the CPU, contiguous, of its own memory; None where not kept. Collective for a DTensor that is not a sharded expert."""
    value = tensor.detach()
    if hasattr(value, "to_local"):
        value = value.to_local() if sharded else value.full_tensor()
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format) if keep else None


def _ranks(parallel: Any) -> tuple[int, bool]:
    """(place in the ep group, whether this is the first of the ranks with the same experts)."""
    replicas = getattr(parallel, "replica_group", None)
    return dist.get_rank(parallel.ep_group) if parallel.ep > 1 else 0, replicas is None or dist.get_rank(replicas) == 0


def _wait(parallel: Any) -> None:
    for group in (parallel.ep_group if parallel.ep > 1 else None, getattr(parallel, "replica_group", None)):
        if group is not None:
            dist.barrier(group)


def gather_state_dict(model: nn.Module, parallel: Any, dst: int = 0) -> dict[str, Any] | None:
    """The unsharded model's state dict, on the CPU of global rank `dst`; None on the others.

    Every rank must call it. Experts come tensor by tensor, so that beside the result one tensor is held at a time.
    """
    _check(model, parallel)
    group = parallel.ep_group if parallel.ep > 1 else None
    ranks = dist.get_process_group_ranks(group) if group is not None else [dst]
    mine = not dist.is_initialized() or dist.get_rank() == dst
    found: dict[str, Any] = {}
    for slot in slots(model):
        if slot.shard is None:
            value = _whole(slot.tensor, sharded=False, keep=mine)
            found.update(dict.fromkeys(slot.names, value))
    if dst in ranks:
        gathered: dict[tuple[int, str], Any] = {}
        for path, module, name, shard in shards(model):
            key = (id(module), name)
            if key not in gathered:
                gathered[key] = _gather(module, name, shard, ranks, group, dst)
            found[_join(path, name)] = gathered[key]
    return _in_order(model, {**model.state_dict(), **found}) if mine else None


def _in_order(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """By module, as state_dict does: absent experts stand where they would."""
    place = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    absent = {_join(path, name): i for i, (path, _, name, _) in enumerate(shards(model))}
    inside = {name: absent.get(name, i) for i, name in enumerate(state)}
    return {name: state[name] for name in sorted(state, key=lambda name: (place.get(name.rpartition(".")[0], len(place)), inside[name]))}


def _gather(module: nn.Module, name: str, shard: Any, ranks: list[int], group: Any, dst: int) -> Any:
    """The whole parameter on rank dst, None elsewhere."""
    own = module._buffers[ANCHOR + name] if shard.kind == "absent" else module._parameters[name]
    own = own.detach().to_local() if shard.dtensor else own.detach()  # type: ignore[union-attr]
    if shard.kind == "stacked":
        spans = [expert_range(shard.num_experts, shard.ep, r) for r in range(shard.ep)]
    else:
        owner = expert_owner(shard.first, shard.num_experts, shard.ep)
        spans = [(0, int(r == owner)) for r in range(shard.ep)]
    me = dist.get_rank()
    whole = torch.empty(shard.shape if shard.kind == "stacked" else (1, *shard.shape), dtype=own.dtype) if me == dst else None
    for r, (first, last) in zip(ranks, spans):
        if first == last:
            continue
        if whole is None:
            if r == me:
                dist.send(own.contiguous(), dst, group=group)
            continue
        part = own if r == me else torch.empty((last - first, *whole.shape[1:]), dtype=own.dtype, device=own.device)
        if r != me:
            dist.recv(part, r, group=group)
        whole[first:last].copy_(part)
    return whole if whole is None or shard.kind == "stacked" else whole[0]
