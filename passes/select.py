"""The only file with policy: which provider computes which stage.

For each stage every registered provider says whether it supports the problem; of those that do, the cheapest by its own estimate is taken,
and every other gets its reason into the report.

Ranks that exchange tokens must choose alike, so over ranks the choice rests on what they have in common: the configuration. The number
of tokens counts where the configuration says that it is the same on all of them, or gives the most that it can be.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from moe_compile.config import ParallelConfig
from moe_compile.ops.comm.setup import chunk_size
from moe_compile.ops.registry import Problem, providers
from moe_compile.options import Options

from .decisions import tensor_of
from .emit import holder
from .lift.sizes import prod
from .region import MoERegion

TOKENS = 1024  # assumed where ranks have no number of tokens in common


@dataclass(frozen=True)
class Choice:
    """The provider of each stage, and for the others of a stage why they were not taken."""

    providers: dict[str, str] = field(default_factory=dict)
    losers: dict[str, dict[str, str]] = field(default_factory=dict)


def choose_for(region: MoERegion, weight_layout: str, options: Options, training: bool) -> Choice:
    """The providers of a region. Raises LookupError naming every provider's reason where none supports a stage."""
    problem, parallel = problem_of(region, weight_layout, options, training), options.parallel
    if parallel is None or parallel.ep == 1:
        return choose(problem)
    comm = choose(over_ranks(problem, parallel, options), ("comm",), parallel.comm)
    experts = choose(of_one_rank(problem, parallel), ("experts",))
    return Choice({**comm.providers, **experts.providers}, {**comm.losers, **experts.losers})


def choose(problem: Problem, stages: tuple[str, ...] = ("comm", "experts"), wanted: str = "auto") -> Choice:
    """wanted: the only provider that may be taken, or "auto". Raises LookupError naming every provider's reason where none supports it."""
    chosen, losers = {}, {}
    for stage in stages:
        asked = dataclasses.replace(problem, stage=stage)
        refusals = {p.name: p.supports(asked) or _not_wanted(p.name, wanted) for p in providers(stage)}
        able = sorted((p for p in providers(stage) if refusals[p.name] is None), key=lambda p: p.cost(asked))
        if not able:
            known = "" if wanted == "auto" or wanted in refusals else f" (no provider is called {wanted!r})"
            raise LookupError(f"no provider for {stage}{known}: " + "; ".join(f"{n}: {r}" for n, r in refusals.items()))
        best = able[0].cost(asked)
        slower = {p.name: f"slower ({p.cost(asked):.0f} us estimated, {able[0].name} {best:.0f})" for p in able[1:]}
        chosen[stage] = able[0].name
        losers[stage] = {**{n: r for n, r in refusals.items() if r is not None}, **slower}
    return Choice(chosen, losers)


def _not_wanted(name: str, wanted: str) -> str | None:
    return None if wanted in ("auto", name) else f"ParallelConfig.comm asks for {wanted!r}"


def problem_of(region: MoERegion, weight_layout: str, options: Options, training: bool) -> Problem:
    """What the region asks of a provider on one rank, as far as it is known at compile time."""
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
        cuda_graphs=_cuda_graphs(options),
    )


def over_ranks(problem: Problem, parallel: ParallelConfig, options: Options) -> Problem:
    """What the exchange is asked: nothing in it may differ from rank to rank."""
    most = parallel.max_tokens_per_rank or 0
    tokens = problem.tokens if parallel.equal_tokens else most or TOKENS
    if parallel.tp > 1 and parallel.tp_dispatch == "slice":
        tokens, most = -(-(tokens or TOKENS) // parallel.tp), -(-most // parallel.tp)
    return dataclasses.replace(
        problem, world=parallel.ep, quant=parallel.quant, tokens=tokens, max_tokens=most, same_host=parallel.same_host, compiler=""
    )


def of_one_rank(problem: Problem, parallel: ParallelConfig) -> Problem:
    """What the experts of one rank are asked: its share of the experts, and all ranks' slots shared alike."""
    local = chunk_size(problem.num_experts, parallel.ep)
    return dataclasses.replace(problem, num_experts=local, quant="none", world=parallel.ep)


def _cuda_graphs(options: Options) -> bool:
    """Does Inductor's configuration ask for CUDA graphs?"""
    return options.mode in ("reduce-overhead", "max-autotune") or bool(options.inner_options.get("triton.cudagraphs"))


def _tokens(region: MoERegion) -> int | None:
    """T of the call that is being compiled; later calls may have others, which any choice must get right and only this one fast."""
    ids = tensor_of(region.decision.ids)
    slots = ids.numel() if ids is not None else None
    if isinstance(slots, torch.SymInt):
        slots = slots.node.hint if slots.node.has_hint() else None
    return slots // region.formula.top_k if slots is not None else None
