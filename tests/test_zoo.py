"""Real transformers models, tiny: outputs equal eager's, MoE blocks rewritten as `corpus/expected.py` says.

A sample by default; MOE_COMPILE_ZOO=all runs every model, as docs/coverage.py does.
"""

from __future__ import annotations

import os

import pytest
import torch
from corpus.expected import ZOO_REFUSED, ZOO_SAMPLE, ZOO_SEVERAL_GRAPHS
from corpus.harness import error, left_over
from corpus.hf_zoo import MOE_LAYERS, ZOO, first_tensor

import moe_compile

NAMES = list(ZOO) if os.environ.get("MOE_COMPILE_ZOO") == "all" else ZOO_SAMPLE


@pytest.mark.parametrize("name", NAMES)
def test_model_keeps_its_output_and_is_rewritten(name):
    torch._dynamo.reset()
    model, kwargs = ZOO[name]()
    report, left = moe_compile.RewriteReport(), list[str]()

    def inner(gm, _):
        left.extend(left_over(gm))
        return gm.forward

    compiled = moe_compile.compile(model, inner=inner, report=report)
    with torch.no_grad():
        assert error(first_tensor(compiled(**kwargs)), first_tensor(model(**kwargs))) < 1e-5
    assert not left, left
    missing, reason = ZOO_REFUSED.get(name, (0, ""))
    assert len(report.rewritten) == MOE_LAYERS[name] - missing, str(report)
    if not missing and name not in ZOO_SEVERAL_GRAPHS:
        assert len(report.graphs) == 1, str(report)
    assert reason in str(report)


def test_other_inputs_through_the_same_compilation():
    torch._dynamo.reset()
    model, kwargs = ZOO["deepseek_v3"]()
    compiled = moe_compile.compile(model, inner="eager")
    for seed in range(4):
        kwargs["input_ids"] = torch.randint(3, 100, kwargs["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert error(compiled(**kwargs).logits, model(**kwargs).logits) < 1e-5


def test_generate_gives_eager_tokens():
    torch._dynamo.reset()
    model, kwargs = ZOO["mixtral"]()
    kwargs.pop("use_cache")
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    want = model.generate(**kwargs, **settings)
    model.forward = moe_compile.compile(model.forward, inner="eager")
    assert torch.equal(model.generate(**kwargs, **settings), want)
