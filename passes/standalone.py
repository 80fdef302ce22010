"""A window of the user's graph as a graph of its own, so that it can be executed and rewritten away from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from .decisions import callee
from .region import MoERegion


def extract(gm: GraphModule, region: MoERegion) -> tuple[GraphModule, dict[Node, Node]]:
    """(module: inputs of the region -> its output, copy of each of the region's nodes).  Autocast in force at its start is entered."""
    root = region.root if region.target is None else region.target
    return window_module(gm, region.inputs, region.code, region.trace.ambient.autocast, root)


def window_module(
    gm: GraphModule, inputs: Iterable[Node], code: Sequence[Node], opened: Sequence[Node], output: Node | Sequence[Node]
) -> tuple[GraphModule, dict[Node, Node]]:
    """(module: inputs -> output or outputs, copy of each node).  `opened`: the `_enter_autocast` nodes in force at its start."""
    graph = Graph()
    copy: dict[Node, Node] = {}
    for n in inputs:
        if callee(n) != "_enter_autocast":
            copy[n] = graph.placeholder(n.name)
            copy[n].meta = dict(n.meta)
    for n in [*opened, *code]:
        copy[n] = graph.node_copy(n, lambda a: copy[a])
    for n in _still_open([*opened, *code]):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (copy[n],))
    graph.output(copy[output] if isinstance(output, Node) else tuple(copy[n] for n in output))
    return GraphModule(gm, graph), copy


def _still_open(code: Sequence[Node]) -> list[Node]:
    closed = {n.args[0] for n in code if callee(n) == "_exit_autocast"}
    return [n for n in reversed(code) if callee(n) == "_enter_autocast" and n not in closed]
