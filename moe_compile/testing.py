"""Assertions for tests of models and of this compiler, on what was rewritten and on graphs in normal form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule

from moe_compile.explaining import explain
from moe_compile.report import RewriteReport

__all__ = ["assert_graph_diff", "assert_rewritten", "op_count"]


def assert_rewritten(model: Any, inputs: Any, n: int | None = None, **explain_kwargs: Any) -> RewriteReport:
    """Assert that all MoE blocks of `model` are rewritten: `n` of them, or at least one.

    inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Returns the report, and puts it into the
    AssertionError.
    """
    report = _explain(model, inputs, explain_kwargs)
    wanted = "at least one" if n is None else str(n)
    enough = bool(report.rewritten) if n is None else len(report.rewritten) == n
    if not enough or report.refused:
        raise AssertionError(
            f"{wanted} MoE block(s) should be rewritten and none left; {len(report.rewritten)} rewritten, "
            f"{len(report.refused)} left\n{report}"
        )
    return report


def assert_graph_diff(model: Any, inputs: Any, expected: str, *, context: int = 0, **explain_kwargs: Any) -> None:
    """Assert that the rewrite changes the model's graphs as `expected` says, a diff of normal forms.

    With the package `expecttest` installed, EXPECTTEST_ACCEPT=1 writes the present diff into the calling test's source.
    context: how many unchanged lines stand around each change.
    """
    actual = _explain(model, inputs, explain_kwargs).diff(context)
    actual = "\n" + re.sub(r"^@@ .* @@$", "@@", actual, flags=re.MULTILINE) + "\n"
    try:
        import expecttest
    except ImportError:
        if actual != expected:
            raise AssertionError(f"the graphs' difference is not the expected one; it is\n{actual}") from None
        return
    expecttest.assert_expected_inline(actual, expected, skip=1)


def op_count(where: Any, op: str) -> int:
    """How often `op` ("moe_compile.route", "linear", ...) stands in a graph module, or after a rewrite in a report."""
    from moe_compile.passes.diff import normal_form

    graphs = [normal_form(where)] if isinstance(where, GraphModule) else [graph.after for graph in where.graphs]
    call = re.compile(rf"^\s*\S+ = (?:\S+\.)?{re.escape(op)}\(", re.MULTILINE)
    return sum(len(call.findall(graph)) for graph in graphs)


def _explain(model: Any, inputs: Any, explain_kwargs: dict[str, Any]) -> RewriteReport:
    run = explain(model, **explain_kwargs)
    if isinstance(inputs, Mapping):
        return run(**inputs)
    return run(*inputs) if isinstance(inputs, (tuple, list)) else run(inputs)
