"""Experts spread over ranks: each keeps its own, and the naive code stays as written.

After `shard_experts` a stacked parameter is this rank's part [E_local, ...] under its name; of a list the experts of other
ranks have lost their parameters. Code that reads such a parameter by attribute reads a property: under Dynamo an op of
moe_compile.ops.expert_shard, which tells the compiler what lies where; in eager code a tensor that cannot be computed with.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from moe_compile.finding import WAY_OUT, ExpertGroup, find_expert_parameters, full_names, own_parameters
from moe_compile.gradients import attach, gradient_of, with_replicas
from moe_compile.ops.expert_shard import ANCHOR, SHARDS, Place, reader


class Shard(NamedTuple):
    """What a module knows of one parameter: numbers and texts only, so that a model can be copied and pickled.

    kind: "stacked", or for an expert of a list "present" or "absent". shape: of the whole parameter. first: the first
    expert held, or the number of the list's expert. scale, replicas: see gradients.gradient_of. dtensor: it is one.
    where: the same for the compiler (Place.text).
    """

    kind: str
    shape: tuple[int, ...]
    num_experts: int
    first: int
    ep: int
    scale: float
    replicas: str
    dtensor: bool = False
    where: str = ""


def expert_range(num_experts: int, ep: int, rank: int) -> tuple[int, int]:
    """The experts [first, last) of a rank: as torch.chunk and DTensor's Shard(0) cut."""
    chunk = -(-num_experts // ep)
    return min(rank * chunk, num_experts), min((rank + 1) * chunk, num_experts)


def expert_owner(expert: int, num_experts: int, ep: int) -> int:
    """The rank that holds an expert."""
    return expert // -(-num_experts // ep)


def shard_experts(model: nn.Module, parallel: Any, experts: Iterable[str] | None = None, gradients: str = "mean") -> nn.Module:
    """Keeps this rank's experts of `model`, in place, and returns it. Call it before the optimizer, DDP and fully_shard are made.

    parallel: a ParallelConfig; with ep = 1 nothing is done. experts: names or patterns instead of what is found by structure
    (moe_compile/finding.py). gradients: "mean" makes the experts' gradients those of the mean of all ranks' losses,
    as DDP and FSDP2 do with the others; "sum" those of their sum.

    Nothing is sent: every rank must come with the same model, or on the meta device. DTensor parameters that are Shard(0)
    over the ep ranks stay as they are. Raises ValueError if there are no experts, too few for ep ranks, or if one is tied to
    anything else; RuntimeError on a second call.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f'gradients is {gradients!r}; allowed: "mean", "sum"')
    if parallel.ep == 1:
        return model
    if is_sharded(model):
        raise RuntimeError(f"the experts of this {type(model).__name__} are sharded already; shard a model once, or start from a new one")
    groups = find_expert_parameters(model, experts)
    if not groups:
        raise ValueError(f"no experts found in this {type(model).__name__}, so nothing to spread over ep={parallel.ep} ranks; {WAY_OUT}")
    modules = dict(model.named_modules())
    _check_sizes(groups, parallel.ep)
    _check_ties(modules, groups)
    plan = _plan(modules, groups, parallel, gradient_of(with_replicas(parallel), gradients))
    memo: dict[int, nn.Parameter] = {}
    for path, held in plan.items():
        _replace(modules[path], held, dist.get_rank(parallel.ep_group), memo)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_experts` changed it, or a module in it."""
    return any(SHARDS in vars(module) for module in model.modules())


def shards(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Shard]]:
    """(path of the module, module, name, shard) of every sharded parameter, absent ones too, under all its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, shard in vars(module).get(SHARDS, {}).items():
            yield path, module, name, shard


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parts of the sharded parameters, under all their names."""
    held = ((path, module._parameters.get(name), name) for path, module, name, _ in shards(model))
    return {f"{path}.{name}" if path else name: p for path, p, name in held if p is not None}


def _check_sizes(groups: list[ExpertGroup], ep: int) -> None:
    for group in groups:
        first, last = expert_range(group.num_experts, ep, ep - 1)
        if first == last:
            fits = [n for n in range(2, ep) if len({*expert_range(group.num_experts, n, n - 1)}) == 2]
            what = f"{group.module or 'the model'} has {group.num_experts} experts, in parts of {-(-group.num_experts // ep)}"
            raise ValueError(f"{what}: of ep={ep} ranks the last would get none; ep could be {' or '.join(map(str, fits[-3:])) or '1'}")


def _check_ties(modules: dict[str, nn.Module], groups: list[ExpertGroup]) -> None:
    """Names of one tensor must belong to the same expert: on another rank only some of them would stay."""
    owner = {name: (group.num_experts, e) for group in groups for name, e in full_names(modules, group).items()}
    names: dict[int, list[str]] = {}
    for path, module in modules.items():
        for name, p in own_parameters(module).items():
            names.setdefault(id(p), []).append(f"{path}.{name}" if path else name)
    for tied in names.values():
        if len({owner.get(name) for name in tied}) > 1:
            why = "are one tensor, but not all of the same expert, so it cannot be spread over ranks"
            raise ValueError(f"{' and '.join(tied)} {why}; give each expert its own, or leave these experts out with experts=[...]")


def _plan(
    modules: dict[str, nn.Module], groups: list[ExpertGroup], parallel: Any, gradient: tuple[float, str]
) -> dict[str, dict[str, Shard]]:
    """For each module that holds experts, the shard of each of its parameters."""
    plan: dict[str, dict[str, Shard]] = {}
    rank = dist.get_rank(parallel.ep_group)
    for group in groups:
        first, last = expert_range(group.num_experts, parallel.ep, rank)
        for full, expert in full_names(modules, group).items():
            path, _, name = full.rpartition(".")
            p = modules[path]._parameters[name]
            kind = "stacked" if expert is None else "present" if first <= expert < last else "absent"
            dtensor = _check_dtensor(full, p, kind, parallel)
            place = first if expert is None else expert
            where = Place(group.num_experts, place, parallel.ep, tuple(p.shape)).text  # type: ignore[union-attr]
            shard = Shard(kind, tuple(p.shape), group.num_experts, place, parallel.ep, *gradient, dtensor, where)  # type: ignore[union-attr]
            plan.setdefault(path, {})[name] = shard
    return plan


def _check_dtensor(name: str, p: Any, kind: str, parallel: Any) -> bool:
    """Whether p is a DTensor cut over the ep ranks. Raises ValueError for any other DTensor."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(p, DTensor):
        return False
    mesh, cut = p.device_mesh, [i for i, placement in enumerate(p.placements) if type(placement) is Shard and placement.dim == 0]
    rest = [placement for i, placement in enumerate(p.placements) if i not in cut]
    same = len(cut) == 1 and dist.get_process_group_ranks(mesh.get_group(cut[0])) == dist.get_process_group_ranks(parallel.ep_group)
    if kind != "stacked" or not same or not all(isinstance(placement, Replicate) for placement in rest):
        raise ValueError(
            f"{name} is a DTensor {tuple(p.placements)} over {mesh}; experts may be DTensors [E, ...] with Shard(0) over the ranks of "
            "ep_group and Replicate() else. Call shard_experts first, then fully_shard(..., ignored_params=ignored_parameters(model))"
        )
    return True


def _replace(module: nn.Module, shards: dict[str, Shard], rank: int, memo: dict[int, nn.Parameter]) -> None:
    """Puts this rank's part under each name, and properties above them."""
    for name, shard in shards.items():
        p = own_parameters(module)[name]
        if shard.kind == "absent":
            del module._parameters[name]
            module.register_buffer(ANCHOR + name, torch.empty(0, dtype=p.dtype, device=p.device), persistent=False)
        elif shard.kind == "stacked" and not shard.dtensor:
            if id(p) not in memo:
                memo[id(p)] = _part(p, *expert_range(shard.num_experts, shard.ep, rank))
            module._parameters[name] = memo[id(p)]
    vars(module)[SHARDS] = shards
    cls: Any = type(module)
    module.__class__ = _sharded_class(cls, tuple((name, shard.kind) for name, shard in shards.items()))
    module.register_load_state_dict_pre_hook(_take_part)
    attach(module, shards)


def _part(p: nn.Parameter, first: int, last: int) -> nn.Parameter:
    """A copy, so that the whole can be freed."""
    part = nn.Parameter(p.detach()[first:last].clone(), requires_grad=p.requires_grad)
    vars(part).update(vars(p))
    return part


class Sharded:
    """Above the class of a module with sharded parameters."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's refuses names that are attributes already, as the properties are."""
        found: Any = vars(self)
        shard = found[SHARDS].get(name)
        if shard is None:
            super().register_parameter(name, param)  # type: ignore[misc]
        elif shard.kind == "absent":
            raise KeyError(f"{name} belongs to expert {shard.first}, which another of the {shard.ep} ranks holds; set it there")
        else:
            found["_parameters"][name] = param
            attach(self, found[SHARDS])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moving may make new Parameters, without hooks."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        attach(self, vars(self)[SHARDS])
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made here and has no name to import: copies and pickles make it again."""
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or "_moe_compile_made_of" not in vars(type(self)):  # type: ignore[attr-defined]
            raise TypeError(f"a sharded {type(self).__name__} has its own way of being pickled; copy its state_dict() instead")
        return (_remake, type(self)._moe_compile_made_of, *reduced[2:])  # type: ignore[attr-defined]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        attach(self, vars(self)[SHARDS])


@functools.cache
def _sharded_class(base: Any, kinds: tuple[tuple[str, str], ...]) -> type:
    members: dict[str, Any] = {name: property(reader(name, kind)) for name, kind in kinds}
    members |= {"_moe_compile_made_of": (base, kinds), "__doc__": base.__doc__, "__module__": __name__}
    return type(f"Sharded{base.__name__}", (Sharded, base), members)


def _remake(base: Any, kinds: tuple[tuple[str, str], ...]) -> Any:
    made: Any = _sharded_class(base, kinds)
    return made.__new__(made)


def _take_part(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
    """Before load_state_dict: this rank's part of whole parameters; other ranks' experts are dropped."""
    from torch.distributed.tensor import DTensor

    for name, shard in vars(module)[SHARDS].items():
        value, own = state_dict.get(prefix + name), module._parameters.get(name)
        if value is None:
            continue
        if shard.kind == "absent":
            del state_dict[prefix + name]
        elif shard.kind == "stacked" and tuple(value.shape) == shard.shape and not isinstance(value, DTensor):
            count = (own.to_local() if shard.dtensor else own).shape[0]  # type: ignore[union-attr]
            part = value[shard.first : shard.first + count]
            part = part.clone() if metadata.get("assign_to_params_buffers") else part
            state_dict[prefix + name] = like(own, part, shard) if shard.dtensor else part


def like(own: Any, part: Any, shard: Shard) -> Any:
    """A DTensor as `own` with this rank's `part`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride())
