"""Python lists of tokens, one an expert, are recorded as the rows where the ids are that expert's, and lifted like any other spelling."""

from __future__ import annotations

import pytest
import torch
from list_blocks import LIMIT, REWRITTEN, TRAPS, build
from probed_blocks import K
from recorded_blocks import expect_rewritten, tokens

import moe_compile
from moe_compile.probing.errors import NotProbed
from moe_compile.probing.probe import program_for


@pytest.mark.parametrize("name", REWRITTEN)
def test_block_is_rewritten_whole_and_keeps_values_and_gradients(name):
    expect_rewritten(build(REWRITTEN[name]), 1 if name == "OneChoice" else K)


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_no_list_of_an_experts_tokens_is_refused(name):
    cls, reason = TRAPS[name]
    with pytest.raises(NotProbed, match=reason):
        program_for(build(cls), (tokens(12, 0),), {})


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_refused_runs_as_it_was(name):
    torch._dynamo.reset()
    module = build(TRAPS[name][0])
    fast = moe_compile.compile(module, inner="eager")
    most = 24 if name == "GoneThrough" else LIMIT * 3  # Dynamo unrolls a loop over tokens, which takes it half a minute for 300
    for seed, n in enumerate((5, 6, most)):
        with torch.no_grad():
            torch.testing.assert_close(fast(tokens(n, seed)), module(tokens(n, seed)))
