"""Loops over tokens in Python are recorded once for all tokens, and lifted like any other spelling."""

from __future__ import annotations

import pytest
import torch
from probed_blocks import K
from recorded_blocks import expect_rewritten, tokens
from token_blocks import REWRITTEN, TRAPS, SequenceFirst, build

import moe_compile
from moe_compile.probing.errors import NotProbed
from moe_compile.probing.probe import program_for


@pytest.mark.parametrize("name", REWRITTEN)
def test_block_is_rewritten_whole_and_keeps_values_and_gradients(name):
    expect_rewritten(build(REWRITTEN[name]), 1 if name == "OneChoice" else K)


def test_module_of_one_token_says_in_the_report_what_is_recorded():
    module, report = build(REWRITTEN["ModuleOfOneToken"]), moe_compile.RewriteReport()
    moe_compile.compile(module, inner="eager", report=report)(tokens(5, 0))
    assert [n for n in report.notes if "stays as it is" in n] == []
    assert any(n.startswith("ModuleOfOneToken is captured from a recording") for n in report.notes)


def test_a_layout_that_no_op_gives_is_left_with_its_reason():
    torch._dynamo.reset()
    module, report = build(SequenceFirst), moe_compile.RewriteReport()
    fast = moe_compile.compile(module, inner="eager", report=report)
    x = torch.stack([tokens(6, s) for s in range(3)])
    torch.testing.assert_close(fast(x), module(x))
    assert [r.reason for r in report.refused] == ["the experts' output is not contiguous in the original"]


@pytest.mark.parametrize("name", TRAPS)
def test_what_looks_at_other_tokens_is_refused(name):
    cls, reason = TRAPS[name]
    with pytest.raises(NotProbed, match=reason):
        program_for(build(cls), (tokens(12, 0),), {})


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_refused_runs_as_it_was(name):
    torch._dynamo.reset()
    module = build(TRAPS[name][0])
    fast = moe_compile.compile(module, inner="eager")
    for seed, n in enumerate((5, 6)):
        torch.manual_seed(seed)
        want = module(tokens(n, seed))
        torch.manual_seed(seed)
        torch.testing.assert_close(fast(tokens(n, seed)), want)


def test_half_precision_and_another_number_of_tokens_without_another_recording():
    module = build(REWRITTEN["ItemOfEach"]).bfloat16()
    program = program_for(module, (tokens(12, 0).bfloat16(),), {})
    for n in (1, 3, 40):
        x = tokens(n, n).bfloat16()
        assert program.fits(module, (x,), {})
        torch.testing.assert_close(program.run(module, (x,), {}), module(x), rtol=2e-2, atol=2e-2)


def test_a_constant_number_of_tokens_is_a_condition():
    module = build(REWRITTEN["SomeTokens"])
    program = program_for(module, (tokens(12, 0),), {})
    assert program.fits(module, (tokens(6, 0),), {})
    assert not program.fits(module, (tokens(5, 0),), {})
