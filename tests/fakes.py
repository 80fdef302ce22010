"""Stand-ins for the passes, so that the front door is tested without them: `relu` plays the MoE block."""

from __future__ import annotations

import torch
from torch import nn

from moe_compile.report import GraphReport, RegionReport


class Model(nn.Module):
    """Two "MoE blocks" (relu) between linears. x [T, 8] -> [T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


def rewrite_relu(gm, options, inputs=()):
    """Replace each relu by clamp_min and report it as a rewritten region."""
    report = GraphReport(nodes_before=len(gm.graph.nodes))
    for node in list(gm.graph.nodes):
        if getattr(node.target, "__name__", node.target) != "relu":
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(torch.clamp_min, (node.args[0], 0))
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        report.regions.append(RegionReport(True, where="model.py:1", formula="max(x, 0)", providers={"experts": "clamp"}))
    gm.recompile()
    report.nodes_after = len(gm.graph.nodes)
    return report


def refuse_all(gm, options, inputs=()):
    """Find each relu and leave it."""
    found = [node for node in gm.graph.nodes if getattr(node.target, "__name__", node.target) == "relu"]
    regions = [RegionReport(False, "the gate is not a gate", where="model.py:1") for _ in found]
    return GraphReport(regions=regions)


def break_after_editing(gm, options, inputs=()):
    """Damage the graph, then fail."""
    rewrite_relu(gm, options)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "call_function" and not node.users:
            gm.graph.erase_node(node)
    output = next(iter(reversed(gm.graph.nodes)))
    output.args = ((gm.graph.find_nodes(op="placeholder")[0],),)
    gm.recompile()
    raise RuntimeError("a defect of ours")
