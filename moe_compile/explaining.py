"""`moe_compile.explain`: compile a model afresh, run it once, and say what was found and what became of it."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from moe_compile.backend import Backend
from moe_compile.compiling import optimize
from moe_compile.options import Options
from moe_compile.report import RewriteReport

_BREAK_LOGS = ("torch._dynamo.symbolic_convert.__graph_breaks", "torch._dynamo.convert_frame.__graph_breaks")
_FRAME_LOG = "torch._dynamo.convert_frame"


def explain(
    model: Any,
    *,
    inner: Any = "inductor",
    parallel: Any = None,
    validate: str = "auto",
    capture_flags: bool = True,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Callable[..., RewriteReport]:
    """`explain(model)(*args, **kwargs)` runs the model once on these inputs and returns the report.

    inner: the compiler that providers are chosen for; the rewritten graphs run eagerly. capture_flags=False shows what
    `torch.compile(model, backend="moe_compile")` makes of the model, True (the default) what moe_compile.compile does.
    Like torch._dynamo.explain it resets Dynamo before and after, so compiled models of this process compile again.
    Raises what the model raises.
    """

    def run(*args: Any, **kwargs: Any) -> RewriteReport:
        report = RewriteReport()
        options = Options(inner=inner, parallel=parallel, validate=validate)
        torch._dynamo.reset()
        compiled = optimize(
            model,
            _Uncompiled(options, report, patient=True),
            capture_flags=capture_flags,
            dynamic=dynamic,
            fullgraph=fullgraph,
        )
        probed = _probed(model, args, kwargs, report) if capture_flags and parallel is None else contextlib.nullcontext()
        with probed, _graph_breaks(report), _skipped_frames() as skipped:
            compiled(*args, **kwargs)
        _add_notes(report, skipped)
        torch._dynamo.reset()
        return report

    return run


@contextlib.contextmanager
def _probed(model: Any, args: tuple, kwargs: dict[str, Any], report: RewriteReport) -> Iterator[None]:
    """Within, blocks that Dynamo cannot capture are captured from recordings, as moe_compile.compile does; then they are what they were."""
    from moe_compile.probing import install, probe_model

    if not isinstance(model, torch.nn.Module):
        yield
        return
    before = {m for m in model.modules() if install.marked(m)}
    probe_model(model, args, kwargs, report)
    try:
        yield
    finally:
        install.unmark(m for m in model.modules() if m not in before)


class _Uncompiled(Backend):
    """Everything but the inner compiler."""

    def _compile(self, gm: GraphModule, *_: Any) -> Callable[..., Any]:
        return gm.forward


def _add_notes(report: RewriteReport, skipped: list[str]) -> None:
    if not report.graphs:
        because = "; ".join(report.graph_breaks or skipped) or "it found no tensor operation, or Dynamo is disabled"
        report.notes.append(
            f"Dynamo handed over no graph, so nothing could be rewritten: {because}. "
            "Compile the module or function that holds the tensor operations, outside of torch.compiler.disable."
        )
    elif not report.regions:
        seen = dict.fromkeys(note for graph in report.graphs for note in graph.notes)
        found = "no routing decision (top-k, argmax or max over experts) was found in the captured graphs"
        report.notes.append("; ".join([found, *seen]))
    if report.graph_breaks and report.refused:
        report.notes.append("a graph break inside an MoE block keeps it from being seen whole; see `graph_breaks`")


@contextlib.contextmanager
def _graph_breaks(report: RewriteReport) -> Iterator[None]:
    """Collect graph breaks from Dynamo's log of them: its counters miss those that depend on data."""

    def take(record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "raph break" in message:
            report.graph_breaks.append(_shorten(message))

    with contextlib.ExitStack() as stack:
        for name in _BREAK_LOGS:
            stack.enter_context(_listening(name, take))
        yield


@contextlib.contextmanager
def _skipped_frames() -> Iterator[list[str]]:
    """Collect why Dynamo skipped frames, and its warnings, from the log of its frame converter."""
    skipped: list[str] = []

    def take(record: logging.LogRecord) -> None:
        message = record.getMessage().splitlines()[0]
        of_torch = str(Path(torch.__file__).parent) in message  # torch's own frames are always skipped
        if (message.startswith("skipping") and not of_torch) or record.levelno >= logging.WARNING:
            skipped.append(message)

    with _listening(_FRAME_LOG, take):
        yield skipped


@contextlib.contextmanager
def _listening(name: str, take: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Give all records of a logger to `take`; those that were not logged before go nowhere else."""
    logger = logging.getLogger(name)
    level, propagate, heard = logger.level, logger.propagate, logger.getEffectiveLevel()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            take(record)
            if propagate and record.levelno >= heard and logger.parent is not None:
                logger.parent.handle(record)

    listener = Listener(logging.DEBUG)
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate


def _shorten(message: str) -> str:
    """`file:line: reason` of a graph break's log message; its first line where it has no such parts."""
    place = re.search(r"in user code at (\S+:\d+)", message)
    _, found, rest = message.partition("Graph Break Reason:")
    if place is None or not found:
        return message.strip().splitlines()[0]
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    reason = next((line for line in lines if not line.endswith(":")), lines[0])  # "... encountered:" introduces it
    explained = re.search(r"^\s*Explanation: (.*)", rest, flags=re.MULTILINE)
    return f"{place[1]}: {reason}" + (f" ({explained[1].rstrip('.')})" if explained else "")
