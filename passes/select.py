"""The only file with policy: which provider computes which stage.

For each stage every registered provider says whether it supports the problem; of those that do, the cheapest by its own estimate is taken,
and every other gets its reason into the report.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from moe_compile.ops.registry import Problem, providers
from moe_compile.options import Options

from .decisions import tensor_of
from .emit import holder
from .lift.sizes import prod
from .region import MoERegion


@dataclass(frozen=True)
class Choice:
    """The provider of each stage, and for the others of a stage why they were not taken."""

    providers: dict[str, str] = field(default_factory=dict)
    losers: dict[str, dict[str, str]] = field(default_factory=dict)


def choose(problem: Problem, stages: tuple[str, ...] = ("comm", "experts")) -> Choice:
    """Raises LookupError naming every provider's reason where none supports the problem."""
    chosen, losers = {}, {}
    for stage in stages:
        asked = dataclasses.replace(problem, stage=stage)
        refusals = {p.name: p.supports(asked) for p in providers(stage)}
        able = sorted((p for p in providers(stage) if refusals[p.name] is None), key=lambda p: p.cost(asked))
        if not able:
            raise LookupError(f"no provider for {stage}: " + "; ".join(f"{n}: {r}" for n, r in refusals.items()))
        best = able[0].cost(asked)
        slower = {p.name: f"slower ({p.cost(asked):.0f} us estimated, {able[0].name} {best:.0f})" for p in able[1:]}
        chosen[stage] = able[0].name
        losers[stage] = {**{n: r for n, r in refusals.items() if r is not None}, **slower}
    return Choice(chosen, losers)


def problem_of(region: MoERegion, weight_layout: str, options: Options, training: bool) -> Problem:
    """What the region asks of a provider, as far as it is known at compile time."""
    f = region.formula
    x = tensor_of(region.decision.source.args[0])
    weight = tensor_of(holder(region, f.weights[0].leaf.nodes[0]))
    return Problem(
        stage="experts",
        device=x.device.type if x is not None else "cpu",
        dtype=f.dtype if isinstance(f.dtype, torch.dtype) else weight.dtype if weight is not None else torch.float32,
        hidden=int(prod(v.size for v in f.x_feat)),
        intermediate=int(f.weights[-1].extent("i")),
        num_experts=f.num_experts,
        top_k=f.top_k,
        tokens=_tokens(region),
        program=f.program,
        weight_layout=weight_layout,
        quant=options.quant,
        training=training,
        compiler=options.inner if isinstance(options.inner, str) else "",
    )


def _tokens(region: MoERegion) -> int | None:
    """T of the call that is being compiled; later calls may have others, which any choice must get right and only this one fast."""
    ids = tensor_of(region.decision.ids)
    slots = ids.numel() if ids is not None else None
    if isinstance(slots, torch.SymInt):
        slots = slots.node.hint if slots.node.has_hint() else None
    return slots // region.formula.top_k if slots is not None else None
