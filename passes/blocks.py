"""Recorded blocks, each of which stands in Dynamo's graph as one call: spelled out and rewritten once, for all calls alike.

    parts = recorded_block([x_TH, router, gate0, up0, ...], key)          Dynamo has traced one node a layer

    spelled()      the block's torch calls as a graph of its own, on the fake tensors of a call
    Call.like()    do two calls differ in nothing that the passes look at?  Then what they made of one stands for the other
    put()          such a graph in place of a call

Who records them: moe_compile/probing/whole.py. A block in which something is refused is spelled out where it stands, as if Dynamo had
traced it there.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.fx.node import map_arg

from moe_compile.ops._register import register_op

from . import reuse
from .aten import copy_into, substitute
from .decisions import tensor_of
from .window import Ambient, autocast_restored, fake_mode_of, uncached

Size = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """What a module computes, once for all modules like it.

    graph: its placeholders are the block's tensors, its output a tuple of tensors; `opened` and `closed` mark regions (probing/regions.py).
    places: (shape, strides) of each output, computed from the tensors given; kinds: (dtype, device) of each.
    """

    graph: Graph
    places: Callable[[list[torch.Tensor]], list[tuple[Size, Size]]]
    kinds: tuple[tuple[torch.dtype, torch.device], ...]


_BLOCKS: weakref.WeakValueDictionary[str, Block] = weakref.WeakValueDictionary()


_numbers = itertools.count(1)


def known(block: Block, name: str) -> str:
    """The key by which a graph names the block, made of the name; it is known for as long as somebody holds the block."""
    key = f"{name} {next(_numbers)}"
    _BLOCKS[key] = block
    return key


# ---------------------------------------------------------------- the op
def _block(key: str) -> Block:
    if (found := _BLOCKS.get(key)) is None:
        raise RuntimeError(f"recorded_block: no block is known by the key {key!r} any more; compile the model again")
    return found


def _kernel(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    raise RuntimeError("recorded_block is spelled out by moe_compile's passes before anything runs; it cannot be called by itself")


def _fake(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    block = _block(key)
    places = block.places(list(tensors))
    return [torch.empty_strided(size, stride, dtype=t, device=d) for (size, stride), (t, d) in zip(places, block.kinds)]


RECORDED_BLOCK = register_op("recorded_block(Tensor[] tensors, str key) -> Tensor[]", _kernel, _fake)


# ---------------------------------------------------------------- calls
def calls(graph: Graph) -> list[Node]:
    """The calls of recorded blocks in a graph, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is RECORDED_BLOCK.overload]


@dataclass(frozen=True)
class Call:
    """What the passes look at in a call of a block: the block, what is known of the tensors, and which of them share memory."""

    key: str
    tensors: tuple[torch.Tensor | None, ...]
    same: tuple[int, ...]
    memory: tuple[int, ...]

    @classmethod
    def of(cls, n: Node) -> Call:
        given = _tensors(n)
        first: dict[Node, int] = {}
        same = tuple(first.setdefault(x, i) for i, x in enumerate(given))
        return cls(str(n.args[1]), tuple(map(tensor_of, given)), same, tuple(reuse.groups(given)))

    def like(self, other: Call) -> bool:
        return (self.key, self.same, self.memory) == (other.key, other.same, other.memory) and reuse.alike(self.tensors, other.tensors)


def in_the_open(n: Node, ambient: dict[Node, Ambient]) -> bool:
    """Does no autocast region of the graph, and no other gradient mode than at its start, hold where n stands?"""
    return not ambient[n].autocast and ambient[n].grad == torch.is_grad_enabled()


def _tensors(n: Node) -> list[Node]:
    return list(n.args[0])  # type: ignore[arg-type]


# ---------------------------------------------------------------- spelling out
def spelled(gm: GraphModule, call: Node, ambient: Ambient) -> GraphModule:
    """The block of a call as a graph of its own, whose nodes carry fake tensors as if Dynamo had traced it there."""
    given = _tensors(call)
    graph, block = Graph(), _block(str(call.args[1]))
    table: dict[Node, Any] = {}
    mode = fake_mode_of(given)
    with (
        mode,
        uncached(mode, block.graph.nodes),
        autocast_restored(),
        torch.set_grad_enabled(ambient.grad),
        mode.shape_env.suppress_guards(),
        enable_python_dispatcher(),
    ):  # type: ignore[union-attr]
        entered = [n.target(*n.args, **n.kwargs) for n in ambient.autocast]  # type: ignore[operator]
        try:
            _spell(block.graph, graph, table, given, ambient.grad)
        finally:
            for region in reversed(entered):
                torch.amp.autocast_mode._exit_autocast(region)
    return GraphModule(torch.nn.Module(), graph)


def _spell(source: Graph, graph: Graph, table: dict[Node, Any], given: list[Node], grad: bool) -> None:
    """Copies the nodes of `source` and runs each; sizes that are plain numbers are written into the code that reads them."""
    values: dict[Node, Any] = {}
    regions: list[tuple[str, Any, Any]] = []
    placeholders = iter(given)
    for n in source.nodes:
        if n.op == "placeholder":
            outer = next(placeholders)
            table[n] = graph.placeholder(n.name)
            table[n].meta.update(example_value=tensor_of(outer))
            values[table[n]] = tensor_of(outer)
        elif n.op == "output":
            graph.output(map_arg(n.args[0], table.__getitem__))
        elif getattr(n.target, "__name__", "") in ("opened", "closed"):
            _region(n, graph, regions, grad)
        else:
            _step(n, graph, table, values)


def _step(n: Node, graph: Graph, table: dict[Node, Any], values: dict[Node, Any]) -> None:
    new = graph.node_copy(n, table.__getitem__)
    args, kwargs = map_arg((new.args, new.kwargs), values.__getitem__)
    func: Any = getattr(type(args[0]), str(n.target)) if n.op == "call_method" else n.target
    value = func(*args, **kwargs)
    if isinstance(value, bool | int | float):
        graph.erase_node(new)
        table[n] = value
        return
    table[n] = new
    values[new] = new.meta["example_value"] = value
    if found := compute_unbacked_bindings(_environment(value), value):
        new.meta["unbacked_bindings"] = found


def _environment(value: Any) -> Any:
    for v in value if isinstance(value, tuple | list) else (value,):
        if isinstance(v, torch._subclasses.FakeTensor):
            return v.fake_mode.shape_env
        if isinstance(v, torch.SymInt | torch.SymFloat):
            return v.node.shape_env
    return None


def _region(n: Node, graph: Graph, regions: list[tuple[str, Any, Any]], grad: bool) -> None:
    """Marks of regions as what Dynamo writes where they begin and end."""
    if n.target.__name__ == "closed":  # type: ignore[union-attr]
        kind, before, opened = regions.pop()
        if kind == "grad":
            torch._C._set_grad_enabled(before)
            graph.call_function(torch._C._set_grad_enabled, (before,))
        else:
            torch.amp.autocast_mode._exit_autocast(opened[1])
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (opened[0],))
        return
    kind, *rest = n.args
    if kind == "grad":
        regions.append(("grad", torch.is_grad_enabled(), None))
        torch._C._set_grad_enabled(bool(rest[0]))
        graph.call_function(torch._C._set_grad_enabled, tuple(rest))
    else:
        new = graph.call_function(torch.amp.autocast_mode._enter_autocast, tuple(rest))
        regions.append(("autocast", None, (new, torch.amp.autocast_mode._enter_autocast(*rest))))


# ---------------------------------------------------------------- in place of calls
def put(gm: GraphModule, call: Node, part: GraphModule) -> None:
    """The nodes of `part` in place of the call."""
    table: dict[Node, Any] = dict(zip([n for n in part.graph.nodes if n.op == "placeholder"], _tensors(call)))
    before = set(table.values())
    with gm.graph.inserting_before(call):
        results = copy_into(gm.graph, part.graph, table)
    for n in table.values():
        if isinstance(n, Node) and n not in before:
            n.meta = {**n.meta, "nn_module_stack": call.meta.get("nn_module_stack")}
            n.meta.setdefault("stack_trace", call.meta.get("stack_trace"))
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise RuntimeError(f"{user.name} reads all results of a recorded block at once")
        substitute(user, results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def spell_out(gm: GraphModule, nodes: Iterable[Node], ambient: dict[Node, Ambient]) -> None:
    """These calls as the code that they stand for."""
    for n in list(nodes):
        put(gm, n, spelled(gm, n, ambient[n]))


__all__ = ["Block", "Call", "calls", "in_the_open", "known", "put", "spell_out", "spelled"]
