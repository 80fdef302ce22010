"""A region's window as a graph of its own, so that it can be executed and rewritten away from the user's graph."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from .decisions import callee
from .region import MoERegion


def extract(gm: GraphModule, region: MoERegion) -> tuple[GraphModule, dict[Node, Node]]:
    """(module: inputs of the region -> its output, copy of each of the region's nodes).  Autocast in force at its start is entered."""
    graph, copy = Graph(), {}
    for n in region.inputs:
        if callee(n) != "_enter_autocast":
            copy[n] = graph.placeholder(n.name)
            copy[n].meta = dict(n.meta)
    opened = list(region.trace.ambient.autocast)
    for n in [*opened, *region.code]:
        copy[n] = graph.node_copy(n, lambda a: copy[a])
    for n in _still_open(region):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (copy[n],))
    graph.output(copy[region.root if region.target is None else region.target])
    return GraphModule(gm, graph), copy


def _still_open(region: MoERegion) -> list[Node]:
    opened = [n for n in [*region.trace.ambient.autocast, *region.code] if callee(n) == "_enter_autocast"]
    closed = {n.args[0] for n in region.code if callee(n) == "_exit_autocast"}
    return [n for n in reversed(opened) if n not in closed]
