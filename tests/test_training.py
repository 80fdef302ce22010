"""One optimiser step of the five demo models equals eager's: loss, gradients and updated parameters."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from corpus.harness import error
from corpus.hf_zoo import MOE_LAYERS, build
from torch import Tensor, nn

import moe_compile

# With router logits returned comes a load-balancing loss: half of the router's gradient.
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "qwen3_moe": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "deepseek_v3": {},
    "gpt_oss": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "olmoe": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
}


def model_and_batch(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, kwargs = build(name, **MODELS[name])
    return model.train(), {**kwargs, "labels": kwargs["input_ids"]}


def compiled_of(model: nn.Module) -> tuple[Any, moe_compile.RewriteReport]:
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    return moe_compile.compile(model, inner="eager", report=report), report


def step(fn: Any, model: nn.Module, batch: dict[str, Any], context: Any = None) -> dict[str, Tensor]:
    """Loss, gradients and parameters after one AdamW step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with context or contextlib.nullcontext():
        out = fn(**batch)
    out.loss.backward()
    seen = {"loss": out.loss.detach()}
    if getattr(out, "aux_loss", None) is not None:
        seen["aux_loss"] = out.aux_loss.detach()
    seen.update({f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    optimiser.step()
    seen.update({n: p.detach().clone() for n, p in model.named_parameters()})
    return seen


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    worst = max((error(got[n], want[n]), n) for n in want if not n.startswith("d "))
    assert worst[0] < tolerance, worst
    # Relative to the largest of all: AdamW's first step is sign(gradient), noise in tiny ones shows above.
    largest = max(float(t.abs().max()) for n, t in want.items() if n.startswith("d "))
    off = max((float((got[n] - want[n]).abs().max()) / largest, n) for n in want if n.startswith("d "))
    assert off[0] < tolerance, off


def assert_all_rewritten(name: str, report: moe_compile.RewriteReport) -> None:
    assert len(report.rewritten) == MOE_LAYERS[name], str(report)
    assert not report.refused, str(report)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_equals_eager(name):
    model, batch = model_and_batch(name)
    twin = copy.deepcopy(model)
    want = step(model, model, batch)
    compiled, report = compiled_of(twin)
    got = step(compiled, twin, batch)
    assert_all_rewritten(name, report)
    assert_same(got, want, 1e-4)
    if MODELS[name]:
        assert "aux_loss" in want
    assert all(want[f"d {n}"].abs().max() > 0 for n, _ in model.named_parameters() if "experts" in n or "router" in n)


def checkpointed_steps(name: str, **over: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], moe_compile.RewriteReport]:
    model, kwargs = build(name, **over)
    batch = {**kwargs, "labels": kwargs["input_ids"]}
    twin = copy.deepcopy(model.train())
    want = step(model, model, batch)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled, report = compiled_of(twin)
    return step(compiled, twin, batch), want, report


@pytest.mark.parametrize("name", MODELS)
def test_one_step_with_gradient_checkpointing(name):
    got, want, report = checkpointed_steps(name)
    assert_all_rewritten(name, report)
    assert_same(got, want, 1e-4)


def test_checkpointing_with_auxiliary_loss_keeps_its_meaning():
    """transformers collects router logits by side effects, which Dynamo cannot trace inside a checkpoint."""
    got, want, _ = checkpointed_steps("mixtral", **MODELS["mixtral"])
    assert_same(got, want, 1e-4)


def gradient_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Root mean square of gradient differences over that of the gradients, averaged over parameters."""
    ratios = []
    for n, exact in want.items():
        if n.startswith("d ") and exact.norm() > 0:
            ratios.append(float((got[n].double() - exact.double()).norm() / exact.double().norm()))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_under_autocast_is_as_exact_as_eager(name):
    """Against a float64 step, our error is at most twice eager's own under the same autocast."""
    model, batch = model_and_batch(name)
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    exact = step(model.double(), model, batch)
    eager = step(plain, plain, batch, torch.autocast("cpu", dtype=torch.bfloat16))
    compiled, report = compiled_of(twin)
    got = step(compiled, twin, batch, torch.autocast("cpu", dtype=torch.bfloat16))
    assert_all_rewritten(name, report)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in eager.items()}
    assert gradient_error(got, exact) < 2 * gradient_error(eager, exact)
    assert abs(float(got["loss"] - exact["loss"])) < 2 * abs(float(eager["loss"] - exact["loss"])) + 1e-2


@pytest.mark.parametrize("reentrant", [False])
def test_checkpointed_block(reentrant):
    from corpus.harness import observe, worst
    from corpus.variants import VARIANTS

    variant = VARIANTS["outside_checkpointed"]
    module = variant.build().train()
    compiled, report = compiled_of(module)
    x = variant.inputs()
    assert worst(observe(compiled, module, x, grad=True), observe(module, module, x, grad=True))[0] < 1e-4
    assert [region.rewritten for region in report.regions] == [True], str(report)


def test_two_steps_follow_eager():
    """The second step sees the updated parameters: nothing of them was baked in at compile time."""
    model, batch = model_and_batch("mixtral")
    twin = copy.deepcopy(model)
    compiled, _ = compiled_of(twin)
    for fn, m in ((model, model), (compiled, twin)):
        optimiser = torch.optim.SGD(m.parameters(), lr=0.05)
        for _ in range(2):
            optimiser.zero_grad()
            fn(**batch).loss.backward()
            optimiser.step()
    with torch.no_grad():
        assert error(compiled(**batch).loss, model(**batch).loss) < 1e-4


def test_frozen_experts_and_frozen_router():
    """requires_grad=False on some parameters: their gradient stays None, the others' are eager's."""
    for frozen in ("experts", "gate"):
        model, batch = model_and_batch("mixtral")
        for n, p in model.named_parameters():
            p.requires_grad_(frozen not in n)
        twin = copy.deepcopy(model)
        want = step(model, model, batch)
        compiled, _ = compiled_of(twin)
        assert_same(step(compiled, twin, batch), want, 1e-4)
