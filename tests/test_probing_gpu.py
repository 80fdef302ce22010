"""Blocks and models that Dynamo cannot capture, on a GPU: recorded, computed by the Triton kernels, also in CUDA graphs and training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from corpus.hf_zoo import MOE_LAYERS, ZOO, first_tensor
from probed_blocks import REWRITTEN, H, Model, build
from test_models_gpu import other_tokens, share_off
from torch import nn

import moe_compile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]
WAYS = {"eager": {"inner": "eager"}, "inductor": {}, "cuda graphs": {"mode": "reduce-overhead"}}


def twice(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    module = module.to("cuda")
    return module, copy.deepcopy(module)


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REWRITTEN)
def test_block(name: str, way: str) -> None:
    module, plain = twice(build(name))
    report = moe_compile.RewriteReport()
    fast = moe_compile.compile(module, report=report, **WAYS[way])
    for seed, count in enumerate((12, 12, 12, 7, 1, 65)):
        torch.compiler.cudagraph_mark_step_begin()
        x = tokens(count, seed)
        with torch.no_grad():
            torch.testing.assert_close(fast(x).clone(), plain(x), rtol=1e-3, atol=1e-4)
    assert report.rewritten, str(report)
    assert {region.providers["experts"] for region in report.rewritten} == {"triton"}, str(report)


@pytest.mark.parametrize("name", REWRITTEN)
def test_gradients_of_a_block(name: str) -> None:
    module, plain = twice(build(name).train().requires_grad_())
    fast = moe_compile.compile(module)
    for seed in range(2):
        for each in (fast, plain):
            x = tokens(20, seed).requires_grad_()
            each(x).square().sum().backward()
    for (key, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        want = torch.zeros_like(q) if q.grad is None else q.grad
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_layers_share_a_recording() -> None:
    model, plain = twice(Model([build("hit_loop", seed) for seed in range(6)]))
    report = moe_compile.RewriteReport()
    fast = moe_compile.compile(model, report=report, mode="reduce-overhead")
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            torch.testing.assert_close(fast(tokens(9, seed)).clone(), plain(tokens(9, seed)), rtol=1e-3, atol=1e-3)
    assert len(report.rewritten) == 6, str(report)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"])
def test_model_with_naive_experts(name: str, dtype: torch.dtype, way: str) -> None:
    """transformers' loop over the experts that are hit."""
    model, kwargs = ZOO[name]()
    model.set_experts_implementation("eager")
    model, plain = twice(model.to(dtype))
    inputs: dict[str, Any] = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    report = moe_compile.RewriteReport()
    fast = moe_compile.compile(model, report=report, **WAYS[way])
    for call in range(4):
        given = other_tokens(inputs, call)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            got, wanted = first_tensor(fast(**given)).clone(), first_tensor(plain(**given))
        assert share_off(got, wanted, 1e-3 if dtype == torch.float32 else 6e-2) <= 0.2, str(report)
    assert len(report.rewritten) == MOE_LAYERS[name], str(report)
