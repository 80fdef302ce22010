"""Code that looks like MoE and means something else: it compiles to its own meaning, rewritten or not."""

from __future__ import annotations

import copy

import pytest
import torch
from corpus.harness import error, missing_grads, observe, worst
from corpus.hazards import HAZARDS
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


# Hazards that are this formula in spite of what stands around it: those must not merely survive but be rewritten.
HARMLESS = (
    "rows_changed_after_the_loop", "weights_changed_after_the_loop", "in_place_residual", "remembers_output",
    "changes_its_input", "noise_on_logits", "frozen_experts", "frozen_router", "no_grad_router", "no_grad_block",
    "straight_through", "added_to_the_first", "gradient_scaled_inside", "router_sees_detached_input", "tied_matrices",
)  # fmt: skip


@pytest.mark.parametrize("name", HAZARDS)
def test_hazard_keeps_values_gradients_buffers_and_inputs(name):
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    eager = HAZARDS[name].build()
    module = copy.deepcopy(eager)
    compiled = moe_compile.compile(module, inner="eager", report=report)
    for seed in (1, 2, 3):
        x, given = HAZARDS[name].inputs(seed), HAZARDS[name].inputs(seed)
        want = observe(eager, eager, x, grad=eager.differentiable)
        got = observe(compiled, module, given, grad=eager.differentiable)
        assert worst(got, want)[0] < 1e-4, (worst(got, want), str(report))
        assert missing_grads(got, want) == [], str(report)
        assert error(given, x) == 0, "the caller's tensor"
        for (n, b), (_, wanted) in zip(module.named_buffers(), eager.named_buffers(), strict=True):
            assert error(b, wanted) < 1e-5, n
    if name in HARMLESS:
        assert report.rewritten, str(report)


def test_grad_mode_and_autocast_are_guarded():
    """One module, compiled once, called with and without gradients and autocast: each call as eager."""
    torch._dynamo.reset()
    module = HAZARDS["straight_through"].build()
    compiled = moe_compile.compile(module, inner="eager")
    x = HAZARDS["straight_through"].inputs(4)
    for grad in (False, True, False, True):
        assert worst(observe(compiled, module, x, grad), observe(module, module, x, grad))[0] < 1e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert worst(observe(compiled, module, x, True), observe(module, module, x, True))[0] < 2e-2
    with torch.inference_mode():
        assert error(compiled(x), module(x)) < 1e-4
