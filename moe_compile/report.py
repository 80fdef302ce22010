"""What the compiler did to a model, and why: text, JSON, and the graphs before and after."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class RegionReport:
    """One MoE block of a graph: what was found, and what became of it.

    rewritten: whether stage ops stand there now; reason: why not, and None if they do.
    where: "file:line" of the routing decision in the user's source; module: the owning module's path.
    formula: the recovered formula; router: the recovered routing, None if it has a form that is not known.
    providers: each stage's provider ("route" only where the op stands for the user's router).
    losers: stage -> provider -> why it was not chosen.
    ranks: how experts and tokens lie over ranks, None on one rank.
    validation: what was executed to check the rewrite, with the largest error. seconds: spent on this region.
    quant: what `quant` made of the weights, or why nothing; quant_errors: relative errors (root mean square) of "weight 0", ... and, by
    the loop over experts on random rows, of their "output".
    """

    rewritten: bool
    reason: str | None = None
    where: str = ""
    module: str | None = None
    formula: str | None = None
    router: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    providers: dict[str, str] = dataclasses.field(default_factory=dict)
    losers: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    validation: str | None = None
    ranks: str | None = None
    quant: str | None = None
    quant_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        head = f"{'rewritten' if self.rewritten else 'left as it was'}  {self.where}"
        return "\n".join([head + (f"  ({self.module})" if self.module else ""), *self._details()])

    def _details(self) -> list[str]:
        rows = [
            ("reason", self.reason),
            ("experts", f"top {self.top_k} of {self.num_experts}" if self.num_experts else None),
            ("formula", self.formula),
            ("router", self.router),
            ("validation", self.validation),
            ("ranks", self.ranks),
            ("quant", self.quant),
            ("nodes", f"{self.nodes_before} -> {self.nodes_after}" if self.rewritten else None),
        ]
        lines = [f"  {name:10s} {text}" for name, text in rows if text]
        for stage, provider in self.providers.items():
            lost = "".join(f"; not {name}: {why}" for name, why in self.losers.get(stage, {}).items())
            lines.append(f"  {'provider':10s} {stage} = {provider}{lost}")
        return lines


@dataclasses.dataclass
class GraphReport:
    """One graph that Dynamo handed over.

    before, after: its normal form (passes/diff.py), empty where nobody asked. seconds: time in each pass.
    notes: what else there is to know.
    """

    index: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    regions: list[RegionReport] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    before: str = ""
    after: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    def diff(self, context: int = 2) -> str:
        """Unified diff of the graph's normal form before and after; empty where nothing changed."""
        from moe_compile.passes.diff import unified

        return unified(self.before, self.after, context, f"graph {self.index}")

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in self.seconds.items())
        head = f"graph {self.index}: {self.nodes_before} -> {self.nodes_after} nodes" + (f" ({spent})" if spent else "")
        parts = [head, *map(str, self.regions), *(f"note: {note}" for note in self.notes)]
        return "\n".join(parts).replace("\n", "\n  ")


@dataclasses.dataclass(eq=False)
class RewriteReport:
    """Everything about one model: its graphs and their regions, where Dynamo broke the graph, and what it cost.

    compile_seconds: time in the backend (passes and inner compiler) over all graphs.
    """

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    graph_breaks: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    def add(self, graph: GraphReport, seconds: float) -> None:
        """Append the report of a graph that took `seconds` to rewrite and compile, and number it."""
        graph.index = len(self.graphs)
        self.graphs.append(graph)
        self.compile_seconds += seconds

    def checkpoint(self) -> Callable[[], None]:
        """Remember what is known now; the result forgets what was added since (a compilation that was given up)."""
        graphs, breaks, seconds = len(self.graphs), len(self.graph_breaks), self.compile_seconds

        def undo() -> None:
            del self.graphs[graphs:], self.graph_breaks[breaks:]
            self.compile_seconds = seconds

        return undo

    @property
    def regions(self) -> list[RegionReport]:
        """The MoE blocks of all graphs, in the graphs' order."""
        return [region for graph in self.graphs for region in graph.regions]

    @property
    def rewritten(self) -> list[RegionReport]:
        """The regions in whose place stage ops stand now."""
        return [region for region in self.regions if region.rewritten]

    @property
    def refused(self) -> list[RegionReport]:
        """The regions that were left as they were; each has a reason."""
        return [region for region in self.regions if not region.rewritten]

    def diff(self, context: int = 2) -> str:
        """Unified diffs of all changed graphs, in normal form."""
        return "\n".join(filter(None, (graph.diff(context) for graph in self.graphs)))

    def to_json(self, indent: int | None = 2) -> str:
        """All fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=indent, default=str)

    @classmethod
    def from_json(cls, text: str) -> RewriteReport:
        """The report that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        graphs = [
            GraphReport(**{**graph, "regions": [RegionReport(**region) for region in graph["regions"]]}) for graph in fields.pop("graphs")
        ]
        return cls(graphs=graphs, **fields)

    def __str__(self) -> str:
        found, done = len(self.regions), len(self.rewritten)
        parts = [
            f"MoE blocks: {found} found, {done} rewritten, {found - done} left as they were",
            f"graphs: {len(self.graphs)}, graph breaks: {len(self.graph_breaks)}, compiled in {self.compile_seconds:.2f} s",
            *(f"note: {note}" for note in self.notes),
            *map(str, self.graphs),
            *(f"graph break: {text}" for text in self.graph_breaks),
        ]
        return "\n".join(parts)
