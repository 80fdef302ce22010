"""Which parameters of a model are experts, by structure: no name is special.

list      a ModuleList or ModuleDict of n equal children made of matrices
stacked   at least two tensors [E, ., .] in one module, or one each in sibling modules, and their biases [E, .]

Both only beside evidence of a router: in the same block, that is, in the nearest module around the experts that holds
anything else, a matrix between an extent E (n) and an extent of the experts. A block is evidence for its own experts only.
In doubt nothing is found: what stays whole on every rank still computes the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

LISTS = (nn.ModuleList, nn.ModuleDict)  # no Sequential: n equal layers before a classifier of n classes look like experts
CONTAINERS = (*LISTS, nn.Sequential)
NOT_STACKED = (nn.modules.conv._ConvNd, nn.Embedding)
WAY_OUT = 'name the parameters [E, ...] or the lists of experts, for example experts=["*.mlp.experts.*_proj", "*.moe.experts"]'


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The parameters of one set of experts.

    module: path of the list, or of the module around the stacked parameters ("" is the model). names: parameters below
    `module`, for a list below each of its children. kind: "list" or "stacked". router: the evidence, "" where the user told.
    """

    module: str
    names: tuple[str, ...]
    kind: str
    num_experts: int
    router: str = ""


def find_expert_parameters(model: nn.Module, experts: Iterable[str] | None = None) -> list[ExpertGroup]:
    """The groups of `model` in the order of its modules; with `experts` (names or fnmatch patterns of stacked parameters
    and of lists) exactly those.

    Raises ValueError for a pattern that matches nothing, or something else.
    """
    modules = dict(model.named_modules())
    if experts is not None:
        return _told(modules, [experts] if isinstance(experts, str) else list(experts))
    tries = [(zone, group) for group in (*_lists(modules), *_stacks(modules)) for zone in _zones(modules, group)]
    found: dict[ExpertGroup, str] = {}
    done: set[ExpertGroup] = set()
    for zone, group in sorted(tries, key=lambda each: -len(each[0].split(".")) if each[0] else 0):  # inner blocks come first
        router = _router(modules, group, zone, set(found.values()) - {zone}) or _own_router(modules, group)
        if group not in done and (whole := _complete(modules, group, router)):
            found[whole] = zone
            done.add(group)
    deepest = [g for g in found if g.kind != "list" or not any(_inside(o.module, g.module) for o in found if o != g)]
    return sorted(deepest, key=lambda group: list(modules).index(group.module))


def full_names(modules: dict[str, nn.Module], group: ExpertGroup) -> dict[str, int | None]:
    """Full name of each parameter of the group, and the expert that it belongs to: None for all of them."""
    if group.kind == "stacked":
        return {_join(group.module, name): None for name in group.names}
    keys = experts_of(modules[group.module])
    return {_join(group.module, key, name): e for e, key in enumerate(keys) for name in group.names}


def experts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The children of a list that have parameters, by key."""
    return {key: m for key, m in module._modules.items() if m is not None and next(m.parameters(), None) is not None}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters registered on the module itself, by name."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def _lists(modules: dict[str, nn.Module]) -> Iterator[ExpertGroup]:
    for path, module in modules.items():
        if isinstance(module, LISTS) and not _why_no_list(module) and _maps_rows(next(iter(experts_of(module).values()))):
            yield _list_group(path, module)


def _list_group(path: str, module: nn.Module) -> ExpertGroup:
    children = experts_of(module)
    names = next(iter(children.values())).named_parameters(remove_duplicate=False)
    return ExpertGroup(path, tuple(name for name, _ in names), "list", len(children))


def _why_no_list(module: nn.Module) -> str:
    """Why its children cannot be experts, "" if they can."""
    children = experts_of(module)
    if len(children) < 2 or len(set(map(id, children.values()))) < len(children):
        return "it has not two or more children with parameters that are all different modules"
    if list(children) != list(module._modules)[: len(children)]:
        return "children without parameters stand between those with parameters"
    if len({_signature(child) for child in children.values()}) > 1:
        return "its children differ in class, or in names, shapes or dtypes of parameters"
    return ""


def _maps_rows(child: nn.Module) -> bool:
    """Whether it is made of matrices only, with biases, from rows to rows of the same width: no norms, no convolutions, no heads."""
    holders = [own for m in child.modules() if (own := own_parameters(m))]
    if not all(max(p.dim() for p in own.values()) == 2 for own in holders):
        return False
    sizes = [extent for own in holders for p in own.values() if p.dim() == 2 for extent in p.shape]
    return all(sizes.count(size) > 1 or {2 * size, size / 2} & set(sizes) for size in sizes)  # a gate may be fused: 2I and I


def _signature(module: nn.Module) -> tuple[Any, ...]:
    return (type(module), *((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(remove_duplicate=False)))


def _stacks(modules: dict[str, nn.Module]) -> Iterator[ExpertGroup]:
    for path, module in modules.items():
        children = [] if isinstance(module, CONTAINERS) else module.named_children()
        single = [(f"{name}.", m) for name, m in children if len(_stacked(m)) == 1]
        every = [(prefix, m, name, p) for prefix, m in (("", module), *single) for name, p in _stacked(m).items()]
        for extent in dict.fromkeys(int(p.shape[0]) for *_, p in every):
            same = [(prefix + name, m) for prefix, m, name, p in every if p.shape[0] == extent]
            matrices = [p for *_, p in every if p.shape[0] == extent and min(p.shape[1:]) > 1]
            buffers = [b for _, m in same for b in m._buffers.values() if b is not None and b.dim() == 3 and b.shape[0] == extent]
            if len(same) > 1 and matrices and not buffers:  # quantised weights are buffers: their scales alone cannot be spread
                yield ExpertGroup(path, tuple(name for name, _ in same), "stacked", extent)


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    if isinstance(module, NOT_STACKED):
        return {}
    return {name: p for name, p in own_parameters(module).items() if p.dim() == 3 and p.shape[0] > 1}


def _companions(modules: dict[str, nn.Module], group: ExpertGroup) -> list[str]:
    """Names of matrices [E, X] beside a stack whose rows X fit it: biases, or a router."""
    found: list[str] = []
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in group.names if group.kind == "stacked"):
        own = own_parameters(modules[_join(group.module, prefix)])
        widths = {extent for p in own.values() if p.dim() == 3 for extent in p.shape[1:]}
        found += [_join(prefix, n) for n, p in own.items() if p.dim() == 2 and p.shape[0] == group.num_experts and p.shape[1] in widths]
    return found


def _own_router(modules: dict[str, nn.Module], group: ExpertGroup) -> str:
    """The one companion that is the router: registered before the weights, and not named after one, as biases are."""
    companions = _companions(modules, group)
    stems = [name.rpartition("_")[0] or name for name in group.names]
    order = [name for name, _ in modules[group.module].named_parameters(remove_duplicate=False)] if companions else []
    loose = [name for name in companions if not any(name.startswith(stem) for stem in stems)]
    chosen = [name for name in loose if order.index(name) < min(map(order.index, group.names))]
    return _join(group.module, chosen[0]) if len(chosen) == 1 else ""


def _complete(modules: dict[str, nn.Module], group: ExpertGroup, router: str) -> ExpertGroup | None:
    """With its router and its biases; None without a router, or with more biases than weights."""
    biases = [name for name in _companions(modules, group) if _join(group.module, name) != router]
    if not router or len(biases) > len(group.names):
        return None
    order = [n for n, _ in modules[group.module].named_parameters(remove_duplicate=False)] if biases else []
    names = tuple(sorted((*group.names, *biases), key=order.index)) if biases else group.names
    return dataclasses.replace(group, names=names, router=router)


def _zones(modules: dict[str, nn.Module], group: ExpertGroup) -> list[str]:
    """Where to look for the router: outwards, up to the block."""
    own, path, zones = _own(modules, group), group.module, [group.module]
    while path and {_join(path, name) for name, _ in modules[path].named_parameters(remove_duplicate=False)} <= own:
        path = path.rpartition(".")[0]
        zones.append(path)
    return zones


def _own(modules: dict[str, nn.Module], group: ExpertGroup) -> set[str]:
    return {*full_names(modules, group), *(_join(group.module, name) for name in _companions(modules, group))}


def _router(modules: dict[str, nn.Module], group: ExpertGroup, zone: str, blocks: set[str]) -> str:
    """Full name of a tensor in the zone that a router of E experts has, and no other block; "" without one."""
    own, other = _own(modules, group), [block for block in blocks if _inside(block, zone)]
    widths = _widths(modules, group)
    for path, module in modules.items():
        if (path != zone and not _inside(path, zone)) or any(path == block or _inside(path, block) for block in other):
            continue
        beside = modules[path.rpartition(".")[0]].children() if path else []  # the router may be a few layers itself
        hidden = {p.shape[0] for m in beside for p in own_parameters(m).values() if p.dim() == 2 and p.shape[1] in widths}
        for name in _routing(module, group.num_experts, widths | hidden, vectors=group.kind == "stacked"):
            if _join(path, name) not in own:
                return _join(path, name)
    return ""


def _widths(modules: dict[str, nn.Module], group: ExpertGroup) -> set[int]:
    """Extents of one expert's matrices."""
    found = [modules[path]._parameters[name] for path, _, name in (full.rpartition(".") for full in full_names(modules, group))]
    return {int(extent) for p in found if p is not None for extent in p.shape[-2:]}


def _routing(module: nn.Module, experts: int, widths: set[int], vectors: bool) -> Iterator[str]:
    """Matrices [E, width] and [width, E], of a Linear [E, width]; beside a longer matrix (experts that are always on) a vector [E]."""
    if isinstance(module, NOT_STACKED):
        return
    own = own_parameters(module)
    matrices = {name: tuple(p.shape) for name, p in own.items() if p.dim() == 2}
    for name, (rows, columns) in matrices.items():
        if (rows == experts and columns in widths) or (columns == experts and rows in widths and not isinstance(module, nn.Linear)):
            yield name
    if vectors and any(rows > experts for rows, _ in matrices.values()):
        named = {**own, **{n: b for n, b in module._buffers.items() if b is not None}}
        yield from (n for n, t in named.items() if tuple(t.shape) == (experts,))


def _told(modules: dict[str, nn.Module], patterns: list[str]) -> list[ExpertGroup]:
    """The groups that a user named."""
    lists: dict[str, ExpertGroup] = {}
    stacks: dict[str, list[str]] = {}
    for pattern in patterns:
        containers = {path: m for path, m in modules.items() if isinstance(m, CONTAINERS) and fnmatchcase(path, pattern)}
        fitting = {path: _list_group(path, m) for path, m in containers.items() if not _why_no_list(m)}
        lists.update({path: g for path, g in fitting.items() if not any(_inside(path, outer) for outer in fitting)})
        matched = [(path, n) for path, m in modules.items() for n in own_parameters(m) if fnmatchcase(_join(path, n), pattern)]
        for path, name in matched:
            if not any(_inside(path, outer) for outer in lists) and name not in stacks.setdefault(path, []):
                stacks[path].append(name)
        if not fitting and not matched:
            reasons = "".join(f"; {path} is no list of experts: {_why_no_list(m)}" for path, m in containers.items())
            raise ValueError(f"experts: {pattern!r} matches no parameter and no list of experts{reasons}; {WAY_OUT}")
    groups = [*lists.values(), *(_told_stack(modules[path], path, names) for path, names in stacks.items() if names)]
    return sorted(groups, key=lambda group: list(modules).index(group.module))


def _told_stack(module: nn.Module, path: str, names: list[str]) -> ExpertGroup:
    shapes = {name: tuple(module._parameters[name].shape) for name in names}  # type: ignore[union-attr]
    extents = {shape[0] if len(shape) > 1 else 0 for shape in shapes.values()}
    if len(extents) > 1 or min(extents) < 2 or (max(map(len, shapes.values())) < 3):
        raise ValueError(
            f"experts: {path or 'the model'} has {shapes}; parameters of experts are [E, ...] with one E of at least 2, one of them with "
            f"three dimensions. {WAY_OUT}"
        )
    return ExpertGroup(path, tuple(names), "stacked", extents.pop())


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(outer + "."))
