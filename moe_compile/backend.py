"""The Dynamo backend: rewrite the MoE blocks of a graph, hand it to the inner compiler, report what was done."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from torch._dynamo.exc import RestartAnalysis
from torch.fx import Graph, GraphModule

from moe_compile import inner
from moe_compile.capture import NothingRewritten, data_dependent, flags_active
from moe_compile.errors import ParallelError
from moe_compile.logs import artifact, log, tlparse_listens, warn_once
from moe_compile.opening import open_exchanges
from moe_compile.options import Options
from moe_compile.quantising import META, kept_fresh
from moe_compile.report import GraphReport, RewriteReport


class Backend:
    """One configured backend. Two of the same options and report are equal, so Dynamo shares what they compiled.

    report: gets a GraphReport for each graph.
    patient: keep a graph captured with the capture flags also where nothing was rewritten (see `_reconsider_flags`).
    """

    compiler_name = "moe_compile"

    def __init__(
        self,
        options: Options,
        report: RewriteReport | None = None,
        *,
        patient: bool = False,
        name: str | None = None,
    ) -> None:
        self.options = _checked_over_ranks(options)
        self.report = report
        self.patient = patient
        self.name = name
        self._whole: dict[str, str] = {}  # place of a routing decision -> why it was left in the graph that the flags made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Backend) or self.report is not other.report:
            return False
        return (self.options, self.patient, self.name) == (other.options, other.patient, other.name)

    def __hash__(self) -> int:
        return hash((self.options, self.patient, self.name))

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's call. Raises what the inner compiler raises for the graph as it was, and NothingRewritten."""
        started = time.perf_counter()
        original = _Snapshot(gm)
        graph_report = self._rewrite(gm, original, example_inputs)
        self._reconsider_flags(gm, graph_report)
        open_exchanges(gm)
        compiled = kept_fresh(self._compile(gm, example_inputs, original, graph_report), gm)
        _tell(graph_report)
        if self.report is not None:
            self.report.add(graph_report, time.perf_counter() - started)
        return compiled

    def _rewrite(self, gm: GraphModule, original: _Snapshot, inputs: Sequence[Any]) -> GraphReport:
        """Run the passes over `gm` in place; whatever goes wrong in them, `gm` then is what it was."""
        from moe_compile import passes

        drawing = _Drawing(gm, wanted=self.report is not None or tlparse_listens())
        try:
            report = passes.run(gm, self.options, inputs)
        except (RestartAnalysis, ParallelError):  # the first: how AOTAutograd and fake tensors ask Dynamo to trace the frame once more
            raise
        except Exception as error:  # noqa: BLE001  a defect of ours must never cost the user the model
            original.restore()
            report = GraphReport(notes=[f"the passes failed with {_text(error)}; the graph was left as it was"])
            warn_once(f"rewriting failed with {_text(error)}. {_PLEASE_REPORT}", details=error)
        report.seconds["snapshot"] = original.seconds
        drawing.finish(report)
        return report

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any], original: _Snapshot, report: GraphReport) -> Callable[..., Any]:
        """Hand over to the inner compiler; if it fails on what we wrote, hand over the graph as it was."""
        try:
            return inner.compile_graph(gm, example_inputs, self.options, self.name)
        except RestartAnalysis:
            raise
        except Exception as error:
            if not any(region.rewritten for region in report.regions):
                raise
            if any(region.ranks for region in report.regions):
                raise ParallelError(
                    f"compiling the rewritten graph failed with {_text(error)}, and the graph as it was cannot run beside ranks that "
                    "exchange tokens"
                ) from error
            warn_once(f"compiling the rewritten graph failed with {_text(error)}. {_PLEASE_REPORT}", details=error)
            for region in report.regions:
                region.rewritten, region.reason = False, f"the inner compiler failed on the rewrite with {_text(error)}"
        original.restore()
        report.after, report.nodes_after = report.before, report.nodes_before
        return inner.compile_graph(gm, example_inputs, self.options, self.name)

    def _reconsider_flags(self, gm: GraphModule, report: GraphReport) -> None:
        """Give up a graph that only the capture flags made possible and in which nothing was rewritten.

        Sizes that only the data tells are slow at best in such a graph, and some compilers fail on them, in the backward
        pass even after the forward pass has compiled. Raises NothingRewritten, which brings the frame back without flags;
        if `patient`, only notes that this would happen.
        """
        if not flags_active() or not data_dependent(gm) or any(region.rewritten for region in report.regions):
            for region in report.regions:  # the pieces of a broken graph tell less than the whole did
                if not region.rewritten and region.where in self._whole:
                    region.reason = self._whole[region.where]
            return
        reasons = "; ".join(dict.fromkeys(region.reason for region in report.regions if region.reason))
        why = f"no MoE block was rewritten ({reasons or '; '.join(report.notes) or 'none was found'})"
        if not self.patient:
            self._whole.update({region.where: region.reason for region in report.regions if region.where and region.reason})
            raise NothingRewritten(why, _codes_of_whole_frame() if _settled(gm, report) else ())
        report.notes.append(f"moe_compile.compile captures this frame again without Dynamo's capture flags: {why}")

    def reset(self) -> None:
        """Called by torch._dynamo.reset()."""
        inner.reset(self.options)

    def get_compiler_config(self) -> Any:
        """The inner compiler's configuration; torch.compile's wrappers expose it under this name."""
        return inner.compiler_config(self.options)


def _settled(gm: GraphModule, report: GraphReport) -> bool:
    """Would the code find no formula either where it is captured apart? It might, outside of a `with torch.no_grad()` or an autocast."""
    from moe_compile.passes.decisions import callee
    from moe_compile.passes.window import CONTEXT

    return not any(region.formula for region in report.regions) and not any(callee(n) in CONTEXT for n in gm.graph.nodes)


def _codes_of_whole_frame() -> tuple[CodeType, ...]:
    """The code that Dynamo has captured, if the graph that it hands over is all of the frame that it converts."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        graph = InstructionTranslator.current_tx().output
        reason, codes = graph.compile_subgraph_reason, graph.traced_code
    except (AttributeError, LookupError):
        return ()
    return () if reason is None or reason.graph_break else tuple(codes)


def _checked_over_ranks(options: Options) -> Options:
    """The options with a ParallelConfig that all ranks have compared (the first time: a collective call)."""
    if options.parallel is None or options.parallel.single_process:
        return options
    from moe_compile.groups import validate

    return dataclasses.replace(options, parallel=validate(options.parallel))


_PLEASE_REPORT = 'The model runs as it was; please report this, with the traceback that TORCH_LOGS="+moe_compile" shows'


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class _Snapshot:
    """The graphs of a module and of the modules nested in it, to put back."""

    def __init__(self, gm: GraphModule) -> None:
        started, self._root = time.perf_counter(), gm
        self._graphs: list[tuple[GraphModule, Graph]] = [
            (module, _copy(module.graph)) for module in gm.modules() if isinstance(module, GraphModule)
        ]
        self.seconds = time.perf_counter() - started

    def restore(self) -> None:
        self._root.meta.pop(META, None)
        from moe_compile.passes.run import without_blocks

        for module, graph in self._graphs:
            module.graph = graph
            without_blocks(module)
            module.recompile()


def _copy(graph: Graph) -> Graph:
    new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        for key, value in vars(old_node).items():  # Dynamo's own, like _dynamo_source, which AOTAutograd asks for
            vars(new_node).setdefault(key, value)
    return new


class _Drawing:
    """The graph's normal form before and after, made only where somebody will see it."""

    def __init__(self, gm: GraphModule, wanted: bool) -> None:
        self._gm, self._wanted = gm, wanted
        self._nodes = len(gm.graph.nodes)
        self._seconds = 0.0
        if wanted:
            from moe_compile.passes.diff import Names

            self._names = Names()
            self._before = self._draw()

    def _draw(self) -> str:
        from moe_compile.passes.diff import normal_form

        started = time.perf_counter()
        text = normal_form(self._gm, self._names)
        self._seconds += time.perf_counter() - started
        return text

    def finish(self, report: GraphReport) -> None:
        report.nodes_before = report.nodes_before or self._nodes
        report.nodes_after = report.nodes_after or len(self._gm.graph.nodes)
        if not self._wanted:
            return
        report.before, report.after = self._before, self._draw()
        report.seconds["drawing"] = self._seconds
        artifact("moe_compile_before", lambda: report.before)
        artifact("moe_compile_after", lambda: report.after)
        artifact("moe_compile_report", lambda: str(report))


def _tell(report: GraphReport) -> None:
    for region in report.regions:
        if region.rewritten:
            log.info("%s: MoE block rewritten: %s", region.where, region.formula)
        else:
            reason = (region.reason or "no reason was given").splitlines()[0].rstrip(".")
            warn_once(f"{region.where}: MoE block left as it was: {reason}. moe_compile.explain(model)(*inputs) shows the whole picture.")
    if not report.regions:
        log.info("a graph of %d nodes holds no routing decision; it was left as it was", report.nodes_before)


def _formulas_for_kernels() -> None:
    """This module is imported when Dynamo resolves our name, before it traces: quantised experts of libraries then show their formulas."""
    if "transformers" in sys.modules:
        from moe_compile import integrations

        integrations.install()


_formulas_for_kernels()
