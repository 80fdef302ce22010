"""The demo's five transformers models, by the backend's name and by moe_compile.compile: logits and greedy tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import moe_compile
from moe_compile import RewriteReport

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

_PATH = Path(__file__).parent.parent / "examples" / "demo_models.py"
_SPEC = importlib.util.spec_from_file_location("demo_models", _PATH)
demo_models = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(demo_models)


def by_name(model, report):
    model.compile(backend="moe_compile", dynamic=True, options={"inner": "eager", "report": report})


def by_function(model, report):
    model._compiled_call_impl = moe_compile.compile(model._call_impl, inner="eager", dynamic=True, report=report)


@pytest.mark.parametrize("way", [by_name, by_function])
@pytest.mark.parametrize("name", demo_models.CONFIGS)
def test_model_is_rewritten_whole_and_gives_eagers_logits_and_tokens(name, way):
    eager, compiled, report = demo_models.build(name), demo_models.build(name), RewriteReport()
    way(compiled, report)
    ids = torch.randint(3, demo_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, eager(ids).logits, atol=1e-5, rtol=0)
    assert len(report.graphs) == 1
    assert len(report.rewritten) == demo_models.LAYERS
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(compiled.generate(ids, **kwargs), eager.generate(ids, **kwargs))
    assert not report.refused
    assert len(report.graphs) <= 3  # the call above, and what `generate` passes: prefill and decode
