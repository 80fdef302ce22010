"""Real transformers models, tiny, on a GPU: the experts are the Triton kernels', through Inductor, in CUDA graphs, and in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from corpus.hf_zoo import MOE_LAYERS, ZOO, first_tensor

import moe_compile

pytestmark = [pytest.mark.gpu, pytest.mark.replays, pytest.mark.usefixtures("fresh_dynamo")]
NAMES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"]


def made(name: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """A model and a copy of it on the GPU, and its arguments."""
    model, kwargs = ZOO[name]()
    model = model.to("cuda", dtype)
    return model, copy.deepcopy(model), {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def other_tokens(kwargs: dict[str, Any], seed: int) -> dict[str, Any]:
    ids = kwargs["input_ids"]
    return {**kwargs, "input_ids": torch.randint(3, 90, ids.shape, generator=torch.Generator().manual_seed(seed)).cuda()}


def share_off(got: Any, wanted: Any, limit: float) -> float:
    """The share of tokens whose row is off by more than the limit: rounding may lead one near a tie to another expert."""
    off = (got.double() - wanted.double()).abs().amax(-1) / wanted.double().abs().amax(-1).clamp(min=1e-3)
    return float((off > limit).double().mean())


@pytest.mark.parametrize("options", [{"inner": "eager"}, {}, {"mode": "reduce-overhead"}], ids=["eager", "inductor", "cuda graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_outputs(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, plain, kwargs = made(name, dtype)
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(model, report=report, **options)
    for call in range(4):
        inputs = other_tokens(kwargs, call)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            got, wanted = first_tensor(compiled(**inputs)).clone(), first_tensor(plain(**inputs))
        assert share_off(got, wanted, 1e-3 if dtype == torch.float32 else 6e-2) <= 0.2, str(report)
    assert len(report.rewritten) == MOE_LAYERS[name], str(report)
    assert {region.providers["experts"] for region in report.rewritten} == {"triton"}, str(report)


@pytest.mark.parametrize("options", [{"inner": "aot_eager"}, {}], ids=["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_gradients_in_float32(name: str, options: dict[str, Any]) -> None:
    """cuda_grouped_mm does not take float32, so training is the Triton kernels' too."""
    model, plain, kwargs = made(name, torch.float32)
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(model, report=report, **options)
    for each in (compiled, plain):
        first_tensor(each(**kwargs)).float().square().mean().backward()
    assert {region.providers["experts"] for region in report.rewritten} == {"triton"}, str(report)
    for (key, got), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if wanted.grad is not None:
            off = float((got.grad - wanted.grad).norm() / wanted.grad.norm().clamp(min=1e-6))
            assert off < 2e-3, (key, off)


@pytest.mark.gpus
def test_a_model_on_another_device_than_the_current_one() -> None:
    model, plain, kwargs = made("mixtral", torch.float32)
    for each in (model, plain):
        each.to("cuda:1")
    inputs = {k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert torch.cuda.current_device() == 0
    compiled = moe_compile.compile(model, inner="eager")
    with torch.no_grad():
        assert share_off(first_tensor(compiled(**inputs)), first_tensor(plain(**inputs)), 1e-3) <= 0.2
