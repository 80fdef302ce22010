"""Drives the passes: every routing decision of a graph, one after the other, all or nothing each."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

import moe_compile.ops  # noqa: F401  (registers the stage ops)
from moe_compile.options import Options
from moe_compile.report import GraphReport, RegionReport

from . import blocks, repeated
from .decisions import Decision, among_pairs, callee, chosen_by_caller, decisions, feeds, leaves_graph, tensor_of, window_end, written
from .hashed import hashed
from .lift import Refused, fresh_table
from .lift.places import tensor, where
from .liveness import Remap
from .quantize import drop_unread, left_dequantised, rows_as_they_are
from .quantize_blocks import Block, quantize_blocks
from .region import NO_EXPERTS, MoERegion, find_region
from .reuse import Recorded, first_match
from .rewrite import splice, weight_layouts
from .routing import Routings
from .select import Choice, choose_for
from .shard import Spread, check_all_gone, hoist_marks, spread_of
from .size_range import keep_to_sizes
from .standalone import extract
from .validate import Mismatch, validate
from .window import Ambient, ambients, is_size

log = logging.getLogger("moe_compile")

PRODUCT_KEYS = "product keys: experts are numbered by pairs of choices, and are rows of tables, without linear layers of their own"


class _Clock:
    """Seconds spent in each pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run(gm: GraphModule, options: Options, inputs: Sequence[Any] = ()) -> GraphReport:
    """Rewrite the MoE blocks of a graph from Dynamo in place; what is not understood stays as it was, with the reason in the report.

    inputs: what the graph is compiled with; `quant` reads the weights among them.
    """
    clock = _Clock()
    report = GraphReport(nodes_before=_count(gm))
    training = torch.is_grad_enabled() and _any_grad(gm)
    options = _with_fp8_rows(options, training)
    with fresh_table():
        recorded = _Recorded(options, training, clock)
        for part in _parts(gm):
            recorded.rewrite(part)
            hoist_marks(part)
            work = _Part(part, options, training, clock, inputs)
            report.regions += work.run()
            report.notes += work.notes
            report.regions[:0] = recorded.put(part)
    for part in _parts(gm):
        check_all_gone(part, [region.reason or "" for region in report.regions], options.parallel)
    gm.recompile()
    report.nodes_after, report.seconds = _count(gm), clock.seconds
    return report


def _with_fp8_rows(options: Options, training: bool) -> Options:
    """With quant="fp8" rows travel in e4m3 too, but for training."""
    parallel = options.parallel
    if parallel is None or parallel.ep == 1 or options.quant != "fp8" or training:
        return options
    return dataclasses.replace(options, parallel=dataclasses.replace(parallel, quant="fp8"))


def _parts(gm: GraphModule) -> list[GraphModule]:
    """The graph and the bodies of its higher-order ops (activation checkpointing)."""
    return [m for m in gm.modules() if isinstance(m, GraphModule)]


def _count(gm: GraphModule) -> int:
    return sum(1 for part in _parts(gm) for n in part.graph.nodes if n.op not in ("placeholder", "output"))


def _any_grad(gm: GraphModule) -> bool:
    found = (tensor_of(n) for part in _parts(gm) for n in part.graph.nodes if n.op in ("placeholder", "get_attr"))
    return any(t is not None and t.requires_grad for t in found)


def without_blocks(gm: GraphModule) -> None:
    """Recorded blocks are spelled out: nothing is rewritten."""
    if found := blocks.calls(gm.graph):
        blocks.spell_out(gm, found, ambients(gm.graph, torch.is_grad_enabled()))


class _Recorded:
    """Recorded blocks (blocks.py): each kind is rewritten once, apart from the graph, and put in place of all calls like it."""

    def __init__(self, options: Options, training: bool, clock: _Clock) -> None:
        self.options, self.training, self.clock = options, training, clock
        self.kinds: list[_Kind] = []

    def rewrite(self, gm: GraphModule) -> None:
        """Calls in which something is refused are spelled out in the graph."""
        found = blocks.calls(gm.graph)
        ambient = ambients(gm.graph, torch.is_grad_enabled()) if found else {}
        for n in found:
            if not blocks.in_the_open(n, ambient) or not self._kind(gm, n, ambient[n]).entries:
                with self.clock("spell out"):
                    blocks.spell_out(gm, [n], ambient)

    def _kind(self, gm: GraphModule, n: Node, ambient: Ambient) -> _Kind:
        call = blocks.Call.of(n)
        kind = next((k for k in self.kinds if k.call.like(call)), None)
        if kind is None:
            with self.clock("spell out"):
                part = blocks.spelled(gm, n, ambient)
            entries = _Part(part, self.options, self.training, self.clock).run()
            kind = _Kind(call, part, entries if all(entry.rewritten for entry in entries) else [])
            self.kinds.append(kind)
        return kind

    def put(self, gm: GraphModule) -> list[RegionReport]:
        """What was rewritten, in place of the calls; what is to be told of it."""
        entries = []
        with self.clock("rewrite"):
            for n in blocks.calls(gm.graph):
                call = blocks.Call.of(n)
                kind = next(k for k in self.kinds if k.call.like(call))
                entries += kind.tell(_module(n))
                blocks.put(gm, n, kind.part)
            if entries:
                gm.graph.lint()
                gm.recompile()
        return entries


@dataclass
class _Kind:
    """Calls of a recorded block that are alike: the first of them, what stands for it now, and what is told of its regions, if any."""

    call: blocks.Call
    part: GraphModule
    entries: list[RegionReport]
    module: str | None = None  # of the first, once it has been told

    def tell(self, module: str | None) -> list[RegionReport]:
        told = [dataclasses.replace(entry, module=module) for entry in self.entries]
        if self.module is not None:
            for entry in told:
                entry.seconds, entry.validation = 0.0, f"the same code as {self.module}" if entry.validation else None
        self.module = self.module or module or told[0].where
        return told


class _Part:
    """One graph: its decisions, the state in force at each, and the regions lifted so far."""

    def __init__(self, gm: GraphModule, options: Options, training: bool, clock: _Clock, inputs: Sequence[Any] = ()):
        self.gm, self.options, self.training, self.clock, self.inputs = gm, options, training, clock, inputs
        with clock("decisions"):
            self.repeated = repeated.merge(gm.graph)
            self.decisions = decisions(gm.graph) or hashed(gm.graph)
            self.table = {d.ids: d for d in self.decisions if not written(d, gm.graph)}
            self.ambient = ambients(gm.graph, torch.is_grad_enabled()) if self.decisions else {}
        self.known: list[_Lifted] = []
        self.taken: set[Node] = set()  # ids of decisions that a rewritten block takes beside its own
        self.paired = False  # was a block rewritten from two choices that share its buffers: then the next may be one, too
        self.notes: list[str] = []
        self.spliced: list[Block] = []

    def run(self) -> list[RegionReport]:
        entries = []
        fed: Decision | None = None  # a refused decision that is a step of the next one
        for i, d in enumerate(self.decisions):
            if d.ids in self.taken:
                continue
            nxt = self.decisions[i + 1] if i + 1 < len(self.decisions) else None
            start = time.perf_counter()
            entry = self._both(fed, d, self.decisions[i + 1 :])
            entry.seconds = time.perf_counter() - start
            fed = d if not entry.rewritten and nxt is not None and feeds(d, nxt) else None
            if entry.rewritten or not (fed is not None or self._other(d, entry)):
                entries.append(entry)
        if not self.decisions and (given := chosen_by_caller(self.gm.graph)) is not None:
            self.notes.append(f"the caller chooses, by {tensor(given)} (0, 1, ...)")
        if not self.spliced:
            self.repeated.undo()
        else:
            self._route()
            self.repeated.forget()
            drop_unread(self.gm.graph)
            self.notes += left_dequantised(self.gm.graph) if self.training else []
            if self.options.quant == "fp8":
                with self.clock("quantize"):
                    quantize_blocks(self.gm, self.spliced, self.inputs, self.training)
            _drop_sizes(self.gm)
            self.gm.graph.lint()
            self.gm.recompile()
        return entries

    def _both(self, before: Decision | None, d: Decision, later: list[Decision]) -> RegionReport:
        """What follows d; or what follows the choice before it, where two choices one after the other share the experts' buffers."""
        until = window_end(d, later)
        pair = before is not None and before.ids in self.table and d.ids in self.table
        if pair and self.paired and (both := self._one(before, until)).rewritten:  # type: ignore[arg-type]
            return both
        entry = self._one(d, until)
        if entry.rewritten or not pair or self.paired:
            return entry
        both = self._one(before, until)  # type: ignore[arg-type]
        self.paired = both.rewritten
        return both if both.rewritten or both.formula or NO_EXPERTS in (entry.reason or "") else entry

    def _facts(self, d: Decision) -> dict[Node, Decision]:
        """What is known of the ids that d's window reads: d's own, and those of other decisions that nothing writes to."""
        return {**self.table, d.ids: d}

    def _other(self, d: Decision, entry: RegionReport) -> bool:
        """A top-k that has nothing to do with experts (tokens for sparse attention, a sampled token) is no block left behind."""
        other = (entry.reason or "").startswith(NO_EXPERTS) and not leaves_graph(d)
        if other and among_pairs(d, self.decisions[: self.decisions.index(d)]):
            entry.reason, other = PRODUCT_KEYS, False
        if other:
            self.notes.append(f"the {callee(d.source)} at {entry.where} chooses no experts")
        return other

    def _one(self, d: Decision, until: Node | None) -> RegionReport:
        entry = RegionReport(rewritten=False, where=where(d.ids), module=_module(d.ids))
        try:
            with self.clock("lift"):
                again = first_match([k.recorded for k in self.known], d, self.ambient[d.ids], self._facts(d))
            if again is not None:
                self._repeat(entry, *again)
            else:
                self._lift(entry, d, until)
        except (Refused, Mismatch, LookupError) as e:
            entry.reason = str(e)
        except Exception as e:  # the user's model must run whatever we trip over; the reason is reported, and the graph is untouched
            log.debug("internal error at %s", entry.where, exc_info=True)
            entry.reason = f"internal error ({type(e).__name__}: {e}); please report it"
        return entry

    def _lift(self, entry: RegionReport, d: Decision, until: Node | None) -> None:
        with self.clock("lift"):
            region = find_region(self.gm, d, self._facts(d), until, self.ambient[d.ids], self.training)
        _describe(entry, region)
        with self.clock("select"):
            choice = choose_for(region, weight_layouts(region), self.options, self.training)
            spread = spread_of(region, self.options.parallel, choice)
            keep_to_sizes(region, choice)
        entry.providers, entry.losers = choice.providers, choice.losers
        entry.ranks = str(spread) if spread is not None else None
        if self.options.validate != "off":
            with self.clock("validate"):
                entry.validation = self._validate(region, choice)
        lifted = _Lifted(Recorded(region, self.ambient[d.ids], self._facts(d)), choice, entry, spread)
        self._splice(entry, lifted, lambda n: n)
        self.known.append(lifted)

    def _repeat(self, entry: RegionReport, recorded: Recorded, nodes: dict[Node, Node]) -> None:
        """The same code again: what was found and checked for it holds here."""
        lifted = next(k for k in self.known if k.recorded is recorded)
        first = lifted.entry
        _describe(entry, recorded.region)
        entry.providers, entry.losers, entry.ranks = first.providers, first.losers, first.ranks
        entry.validation = f"the same code as {first.module or first.where}" if first.validation else None
        self._splice(entry, lifted, lambda n: n if is_size(n) else nodes[n])

    def _validate(self, region: MoERegion, choice: Choice) -> str:
        old, _ = extract(self.gm, region)
        new, copy = extract(self.gm, region)
        splice(new.graph, region, {**choice.providers, "comm": "local"}, lambda n: copy[n])
        rows_as_they_are(new.graph)
        new.graph.lint()
        new.recompile()
        try:
            return validate(region, old, new, self._facts(region.decision), self.training)
        except torch.OutOfMemoryError as e:
            if self.options.validate == "always":
                raise Mismatch(f"the rewrite could not be executed for validation: {str(e).splitlines()[0]}") from e
            return "not executed, as memory for a copy of the block's inputs is lacking; the formula's proof stands alone"

    def _splice(self, entry: RegionReport, lifted: _Lifted, at: Remap) -> None:
        with self.clock("rewrite"):
            done = splice(self.gm.graph, lifted.recorded.region, lifted.choice.providers, at, lifted.spread)
        self.taken.update(at(n) for n in lifted.recorded.region.chosen_beside(self.table))
        entry.rewritten, entry.nodes_before, entry.nodes_after = True, done.removed, len(done.added)
        self.spliced.append(Block(entry, done.added, lifted.choice))

    def _route(self) -> None:
        """The routers in front of the blocks, once all blocks are rewritten."""
        with self.clock("router"):
            routings = Routings(self.gm, self.training, self.options.validate != "off")
            for entry, added, _ in self.spliced:
                done = routings.run(added)
                entry.router = done.text
                if done.added:
                    entry.nodes_before, entry.nodes_after = entry.nodes_before + done.removed, entry.nodes_after + done.added
                    entry.providers = {"route": done.provider, **entry.providers}
                    entry.validation = "; ".join(filter(None, (entry.validation, done.check)))


def _drop_sizes(gm: GraphModule) -> None:
    """Sizes that only removed code has used."""
    for n in reversed(list(gm.graph.nodes)):
        if n.op in ("call_function", "call_method") and not n.users and is_size(n):
            gm.graph.erase_node(n)


@dataclass(frozen=True)
class _Lifted:
    """A region that was rewritten once, for the layers that are the same."""

    recorded: Recorded
    choice: Choice
    entry: RegionReport
    spread: Spread | None


def _describe(entry: RegionReport, region: MoERegion) -> None:
    f = region.formula
    weight = "" if f.weight is None else "w[t,k] * "
    rest = " + what stood in the accumulator" if f.rest else ""
    entry.formula = f"out[t] = sum_k {weight}f(x[t]; ids[t,k]){rest},  f(x) = {f.program}"
    entry.num_experts, entry.top_k = f.num_experts, f.top_k


def _module(n: Node) -> str | None:
    stack = n.meta.get("nn_module_stack")
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    return str(path).removeprefix("L['self'].").removeprefix("L['self']") or None
