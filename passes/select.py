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
from moe_compile.ops.comm import costs, exchange
from moe_compile.ops.comm.setup import Setup, chunk_size
from moe_compile.ops.registry import Problem, Provider, providers
from moe_compile.options import Options

from .decisions import tensor_of
from .lift.index import in_range
from .lift.sizes import prod
from .region import MoERegion, dtype_of

OVERLAPPED = (
    8 << 20
)  # bytes of rows; with fewer, eager launches on a second stream cost more than they gain (measured: benchmarks/notes.md)
MOST_TOKENS = 1 << 24  # beyond it nothing is asked
ENDLESS = 1 << 62


@dataclass(frozen=True)
class Choice:
    """The provider of each stage, and for the others of a stage why they were not taken; sizes: tokens between which it holds;
    asked: what the exchange was asked for; experts: what the experts' providers were asked for."""

    providers: dict[str, str] = field(default_factory=dict)
    losers: dict[str, dict[str, str]] = field(default_factory=dict)
    sizes: tuple[int, int] | None = None
    asked: Problem | None = None
    experts: Problem | None = None


def choose_for(region: MoERegion, weight_layout: str, options: Options, training: bool) -> Choice:
    """The providers of a region. Raises LookupError naming every provider's reason where none supports a stage."""
    problem, parallel = problem_of(region, weight_layout, options, training), options.parallel
    if parallel is None or parallel.ep == 1:
        return dataclasses.replace(choose(problem), experts=problem)
    asked = over_ranks(problem, parallel, region)
    inside = region.formula.inner is not None
    comm = choose(asked, ("comm",), parallel.comm, weights_inside=inside)
    local = of_one_rank(problem, parallel)
    experts = choose(local, ("experts",))
    sizes = _sizes_of_choice(asked, parallel, comm.providers["comm"], problem.tokens, inside)
    return Choice({**comm.providers, **experts.providers}, {**comm.losers, **experts.losers}, sizes, asked, local)


def _sizes_of_choice(asked: Problem, parallel: ParallelConfig, taken: str, tokens: int | None, inside: bool) -> tuple[int, int] | None:
    """The exchange is chosen alike for more tokens than the first number and fewer than the second; None if tokens decide nothing.

    A graph for any number of tokens is kept to these, so that decode and prefill each get their own.
    """
    if not parallel.equal_tokens or parallel.comm != "auto" or not tokens:
        return None

    def same(count: int) -> bool:
        there = dataclasses.replace(asked, tokens=_dispatched(count, parallel))
        return choose(there, ("comm",), weights_inside=inside).providers["comm"] == taken

    least = most = tokens
    while least > 1 and same(least // 2):
        least //= 2
    while most < MOST_TOKENS and same(most * 2):
        most *= 2
    return (-1 if least == 1 else least // 2), (ENDLESS if most >= MOST_TOKENS else 2 * most)


def _dispatched(tokens: int, parallel: ParallelConfig) -> int:
    """Of a rank's tokens, those that it dispatches."""
    return -(-tokens // parallel.tp) if parallel.tp > 1 and parallel.tp_dispatch == "slice" else tokens


def choose(problem: Problem, stages: tuple[str, ...] = ("comm", "experts"), wanted: str = "auto", weights_inside: bool = False) -> Choice:
    """wanted: the only provider that may be taken, or "auto". weights_inside: the experts read routing weights.

    Raises LookupError naming every provider's reason where none supports it.
    """
    chosen, losers = {}, {}
    for stage in stages:
        asked = dataclasses.replace(problem, stage=stage)
        refusals = {p.name: p.supports(asked) or _not_brought(p, weights_inside) or _not_wanted(p.name, wanted) for p in providers(stage)}
        able = [p for p in providers(stage) if refusals[p.name] is None]
        if not able:
            known = "" if wanted == "auto" or wanted in refusals else f" (no provider is called {wanted!r})"
            raise LookupError(f"no provider for {stage}{known}: " + "; ".join(f"{n}: {r}" for n, r in refusals.items()))
        prices = {p.name: costs.cost(p, asked) for p in able}
        able.sort(key=lambda p: prices[p.name][0])
        best, how = prices[able[0].name]
        slower = {p.name: _slower(*prices[p.name], able[0].name, best, how) for p in able[1:]}
        chosen[stage] = able[0].name
        losers[stage] = {**{n: r for n, r in refusals.items() if r is not None}, **slower}
    return Choice(chosen, losers)


def _slower(cost: float, how: str, best: str, least: float, how_best: str) -> str:
    return f"slower ({cost:.0f} us {how}, {best} {least:.0f}{'' if how == how_best else f' {how_best}'})"


def _not_brought(provider: Provider, weights_inside: bool) -> str | None:
    batched = weights_inside and exchange.SLOTS in provider.kernels
    return f"{provider.name} does not bring routing weights to the experts, which read them" if batched else None


def _not_wanted(name: str, wanted: str) -> str | None:
    return None if wanted in ("auto", name) else f"ParallelConfig.comm asks for {wanted!r}"


def problem_of(region: MoERegion, weight_layout: str, options: Options, training: bool) -> Problem:
    """What the region asks of a provider on one rank, as far as it is known at compile time."""
    f = region.formula
    x = tensor_of(region.decision.source.args[0])
    return Problem(
        stage="experts",
        device=x.device.type if x is not None else "cpu",
        dtype=dtype_of(f.x),
        hidden=int(prod(v.size for v in f.x_feat)),
        intermediate=int(f.weights[-1].extent("i")),
        num_experts=f.num_experts,
        top_k=f.top_k,
        tokens=_tokens(region),
        program=f.program,
        weight_layout=weight_layout,
        training=training,
        compiler=options.inner if isinstance(options.inner, str) else "",
        cuda_graphs=wants_cuda_graphs(options),
    )


def over_ranks(problem: Problem, parallel: ParallelConfig, region: MoERegion) -> Problem:
    """What the exchange is asked: nothing in it may differ from rank to rank."""
    most = parallel.max_tokens_per_rank or 0
    tokens = problem.tokens if parallel.equal_tokens else most
    return dataclasses.replace(
        problem,
        world=parallel.ep,
        quant=parallel.quant,
        tokens=_dispatched(tokens or costs.TOKENS, parallel),
        max_tokens=_dispatched(most, parallel),
        same_host=parallel.same_host,
        compiler="",
        ids_valid=ids_valid(region, parallel),
    )


def ids_valid(region: MoERegion, parallel: ParallelConfig) -> bool:
    """Is each of a token's ids known to name an expert, and no expert twice? Tokens parted among ranks are padded with none."""
    f = region.formula
    return parallel.tp == 1 and f.ids.op == "load" and in_range(f.ids, f.num_experts) and (region.decision.facts[1] or f.top_k == 1)


def of_one_rank(problem: Problem, parallel: ParallelConfig) -> Problem:
    """What the experts of one rank are asked: its share of the experts, and all ranks' slots shared alike."""
    local = chunk_size(problem.num_experts, parallel.ep)
    return dataclasses.replace(problem, num_experts=local, world=parallel.ep)


def wants_cuda_graphs(options: Options) -> bool:
    """Does Inductor's configuration ask for CUDA graphs?"""
    return options.mode in ("reduce-overhead", "max-autotune") or bool(options.inner_options.get("triton.cudagraphs"))


def overlaps(out: torch.Tensor, setup: Setup) -> bool:
    """Does an exchange with the result [T, O] pay for a stream of its own, beside a shared expert? On a GPU, in CUDA graphs or if large."""
    return out.is_cuda and (setup.cuda_graphs or (_hint(out.numel()) or 0) * out.dtype.itemsize >= OVERLAPPED)


def _hint(size: int | torch.SymInt) -> int | None:
    """The size in the call that is being compiled, if anybody knows."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else None
    return size


def _tokens(region: MoERegion) -> int | None:
    """T of the call that is being compiled; later calls may have others, which any choice must get right and only this one fast."""
    ids = tensor_of(region.decision.ids)
    slots = _hint(ids.numel()) if ids is not None else None
    return slots // region.formula.top_k if slots is not None else None
