"""Experts and tokens over ranks: which experts are here, which tokens this rank sends, and where sharded parameters stand in a graph.

A sharded parameter (moe_compile.shard_experts) enters the graph through an op that stands for all experts:

    expert_shard(local, where)      [E, ...] of which this rank has some
    present_expert(param, where)    one expert's parameter that is here
    absent_expert(anchor, where)    one that is on another rank

The formula is lifted over all of them; rewrite.py then reads what is behind those that are here. None may be left (`check_all_gone`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.fx import GraphModule, Node

from moe_compile.config import ParallelConfig
from moe_compile.errors import ParallelError
from moe_compile.ops import registry
from moe_compile.ops.comm import exchange
from moe_compile.ops.comm.setup import Setup, local_range
from moe_compile.ops.expert_shard import Place

from .lift import Refused
from .lift.sizes import prod
from .region import MoERegion, dtype_of
from .select import Choice

MARKS = ("expert_shard", "present_expert", "absent_expert")


@dataclass(frozen=True)
class TokenSharing:
    """Tokens that `world` tensor-parallel ranks hold alike: how this one, `rank`, takes its part (ops/comm/tokens.py)."""

    mode: str
    world: int
    rank: int
    setup: Setup


@dataclass(frozen=True)
class Spread:
    """How a region is spread: this rank has experts first..end; setup: what is exchanged; chunk: the most tokens at once, 0: all."""

    first: int
    end: int
    setup: Setup
    batched: bool = False
    sharing: TokenSharing | None = None
    chunks: int = 1
    chunk: int = 0
    dtype: Any = None

    def __str__(self) -> str:
        text = f"experts {self.first}..{self.end - 1} of {self.setup.num_experts} on this rank, {self.setup.world} ranks"
        if self.sharing is not None:
            text += f"; tokens over {self.sharing.world} tensor-parallel ranks: {self.sharing.mode}"
        return text + (f"; in {self.chunks} chunks of {self.chunk} tokens" if self.chunks > 1 else "")


def spread_of(region: MoERegion, parallel: ParallelConfig | None, choice: Choice) -> Spread | None:
    """None where all experts are on every rank. Raises Refused for a formula that cannot be spread."""
    if parallel is None or parallel.ep == 1:
        return None
    f, rank = region.formula, dist.get_rank(parallel.ep_group)
    if any(p.num_experts != f.num_experts for p in f.weights + f.biases):
        raise Refused(f"weights of more experts than the {f.num_experts} that there are, over ranks")
    first, end = local_range(f.num_experts, parallel.ep, rank)
    if local_range(f.num_experts, parallel.ep, parallel.ep - 1)[0] >= f.num_experts:
        raise Refused(f"{f.num_experts} experts over ep = {parallel.ep} ranks leave a rank without any; choose a smaller ep")
    setup = _setup(region, parallel, choice)
    kernels = registry.get("comm", choice.providers["comm"]).kernels
    cap = kernels[exchange.CAP](setup) if exchange.CAP in kernels else 0
    chunks = -(-setup.max_tokens // cap) if cap and setup.max_tokens > cap else 1
    if chunks > 1:
        setup = dataclasses.replace(setup, max_tokens=cap)
    batched = exchange.SLOTS in kernels
    sharing = sharing_of(region, parallel)
    return Spread(first, end, setup, batched, sharing, chunks, cap if chunks > 1 else 0, dtype_of(f.x))


def _setup(region: MoERegion, parallel: ParallelConfig, choice: Choice) -> Setup:
    f, dtype = region.formula, dtype_of(region.formula.x)
    tokens = parallel.max_tokens_per_rank or 0
    if parallel.tp > 1 and parallel.tp_dispatch == "slice":
        tokens = -(-tokens // parallel.tp)
    slots = 1 if not f.summed else 0
    return Setup(
        group=parallel.ep_group.group_name,
        hidden=int(max(prod(v.size for v in f.x_feat), prod(v.size for v in f.feat))),
        top_k=slots or int(f.top_k),
        num_experts=f.num_experts,
        dtype=str(dtype).removeprefix("torch."),
        quant=parallel.quant,
        max_tokens=tokens * (f.top_k if slots else 1),
        timeout=float(parallel.timeout),
        capacity=parallel.capacity or 0,
        overflow=parallel.overflow,
        cuda_graphs=choice.asked is not None and choice.asked.cuda_graphs,
        ids_valid=choice.asked is not None and choice.asked.ids_valid,
    )


# ---------------------------------------------------------------- tokens over tensor-parallel ranks
def sharing_of(region: MoERegion, parallel: ParallelConfig) -> TokenSharing | None:
    """How tensor-parallel ranks part the region's tokens among them; None if each has its own already."""
    if parallel.tp == 1 or is_sharded_over(region.decision.ids, parallel.tp_group.group_name):
        return None
    setup = Setup(parallel.tp_group.group_name, 0, 1, 1, timeout=float(parallel.timeout))
    return TokenSharing(parallel.tp_dispatch, parallel.tp, dist.get_rank(parallel.tp_group), setup)


def is_sharded_over(n: Node, group_name: str) -> bool:
    """Does the value come from a reduce-scatter or all-to-all over that group, not gathered again? What enters the graph is replicated."""
    seen: set[Node] = set()
    todo = [n]
    while todo:
        a = todo.pop()
        if a in seen:
            continue
        seen.add(a)
        kind = _collective(a, group_name)
        if kind == "scatters":
            return True
        if kind is None:
            todo.extend(a.all_input_nodes)
    return False


_SCATTERS = ("reduce_scatter_tensor", "all_to_all_single")
_GATHERS = ("all_gather_into_tensor", "all_reduce", "broadcast")


def _collective(n: Node, group_name: str) -> str | None:
    """ "scatters" or "gathers" over the group, None for every other node."""
    name = getattr(n.target, "__name__", str(n.target)).split(".")[0]
    if "c10d" not in str(getattr(n.target, "namespace", "")) or group_name not in n.args:
        return None
    return "scatters" if name.startswith(_SCATTERS) else "gathers" if name.startswith(_GATHERS) else None


# ---------------------------------------------------------------- parameters that stand for all experts
def is_mark(n: Node) -> bool:
    return n.op == "call_function" and getattr(n.target, "namespace", "") == "moe_compile" and n.target.__name__.split(".")[0] in MARKS


def hoist_marks(gm: GraphModule) -> None:
    """Marks right behind the parameters that they read, one for each: a loop reads a property once an expert."""
    made: dict[Any, Node] = {}
    for n in list(gm.graph.nodes):
        if not is_mark(n):
            continue
        key = (n.target, *map(_hashable, n.args))
        if key in made:
            n.replace_all_uses_with(made[key])
            gm.graph.erase_node(n)
            continue
        made[key] = n
        _place_behind_inputs(gm, n)


def _hashable(a: Any) -> Any:
    return tuple(a) if isinstance(a, list | tuple) else a


def _place_behind_inputs(gm: GraphModule, n: Node) -> None:
    """Only where all that it reads is an input of the graph; else it stays."""
    if any(a.op not in ("placeholder", "get_attr") for a in n.all_input_nodes):
        return
    last = [a for a in gm.graph.nodes if a.op == "placeholder"][-1]
    for a in n.all_input_nodes:
        if a.op == "get_attr":
            last.append(a)
            last = a
    last.append(n)


def local_of(n: Node, spread: Spread) -> Node | None:
    """The tensor of this rank behind a mark; None for an absent expert. Raises Refused for a mark that was cut otherwise."""
    kind = n.target.__name__.split(".")[0]  # type: ignore[union-attr]
    num_experts, _, ep, _ = Place.parse(str(n.args[1]))
    if (num_experts, ep) != (spread.setup.num_experts, spread.setup.world):
        raise Refused(
            f"a parameter was sharded as {num_experts} experts over ep = {ep}, this block has {spread.setup.num_experts} experts over "
            f"ep = {spread.setup.world}"
        )
    return None if kind == "absent_expert" else n.args[0]  # type: ignore[return-value]


def check_all_gone(gm: GraphModule, reasons: list[str], parallel: ParallelConfig | None) -> None:
    """Erases marks that nobody reads. Raises ParallelError for one that somebody does: its other experts are on other ranks."""
    for n in reversed(list(gm.graph.nodes)):
        if is_mark(n) and not n.users:
            gm.graph.erase_node(n)
    left = [n for n in gm.graph.nodes if is_mark(n)]
    if not left:
        return
    name = next((a.name for n in left for a in n.all_input_nodes), left[0].name)
    if parallel is None or parallel.ep == 1:
        why = "the model's experts are sharded; pass the ParallelConfig given to shard_experts, as compile(model, parallel=...)"
    else:
        why = "the block that reads it was not rewritten: " + (
            "; ".join(dict.fromkeys(filter(None, reasons))) or "no routing decision found"
        )
        why += ". Compile the model unsharded, or exclude these parameters with shard_experts(..., experts=...)"
    raise ParallelError(f"{name} holds only this rank's experts, and {why}")
