"""Code that looks like MoE and means something else: it compiles to its own meaning, rewritten or not."""

from __future__ import annotations

import pytest
import torch
from corpus.harness import error, observe
from corpus.traps import CASES

import moe_compile

# Those that are this formula after all, with other weights, ids or rows; every other one must stay as it is.
MAY_BE_REWRITTEN = frozenset(CASES) - {
    "d_put_overwrites",
    "d_view_mutated",
    "d_dup_put",
}


@pytest.mark.parametrize("name", CASES)
def test_keeps_its_meaning(name):
    torch._dynamo.reset()
    case, report = CASES[name], moe_compile.RewriteReport()
    module = case.factory()
    compiled = moe_compile.compile(module, inner="eager", report=report)
    for seed in (1, 2):
        x = torch.randn(case.inputs()[0].shape, generator=torch.Generator().manual_seed(seed))
        want, got = observe(module, module, x, grad=False), observe(compiled, module, x, grad=False)
        tolerance = 2e-2 if name.startswith("g_") else 1e-5  # g_: grouped_mm in bfloat16
        assert error(got.outputs[0], want.outputs[0]) < tolerance, str(report)
    if name not in MAY_BE_REWRITTEN:
        assert not report.rewritten, str(report)
