"""Opens what a rewritten graph will exchange through, when it is compiled: a workspace that does not fit is said then, not in a capture."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_compile.errors import ParallelError
from moe_compile.ops.comm.exchange import exchange_of


def open_exchanges(gm: GraphModule) -> None:
    """Every exchange of the graph, on GPUs. Collective: all ranks compile the same blocks. Raises ParallelError."""
    for provider, parallel, device in dict.fromkeys(_asked_for(gm)):
        try:
            exchange_of(provider, parallel, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ParallelError(
                f"{provider}: no room for its workspace ({error}). Give a smaller ParallelConfig.max_tokens_per_rank or capacity, or "
                'comm="alltoall", which needs none'
            ) from error


def _asked_for(gm: GraphModule) -> list[tuple[str, str, Any]]:
    ops = torch.ops.moe_compile
    found = []
    for n in gm.graph.nodes:
        if n.op == "call_function" and n.target is ops.quantize_dispatch.default and len(n.args) > 6 and n.args[6]:
            device = _device(gm, n)
            if device is not None and device.type == "cuda":
                found.append((str(n.args[4]), str(n.args[6]), device))
    return found


def _device(gm: GraphModule, n: Node) -> Any:
    """Of the nearest tensor before the dispatch that says its own."""
    seen, todo = set(), list(n.all_input_nodes)
    while todo:
        each = todo.pop(0)
        value = each.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            return value.device
        if each not in seen:
            seen.add(each)
            todo.extend(each.all_input_nodes)
    return None
