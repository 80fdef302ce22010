"""One compile serves every token count: 2..4096 share a graph; one token may cost a second (torch
specialises on 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from corpus.harness import error
from corpus.hf_zoo import build as build_zoo
from corpus.variants import VARIANTS
from torch._dynamo.backends.common import aot_autograd

import moe_compile

COUNTS = (2, 3, 7, 16, 33, 64, 257, 1024, 4096)
NAMES = (
    "pairs_flat_select",
    "slot_then_expert",
    "one_hot_gates_loop",
    "stack_gather",
    "one_hot_einsum_2",
    "index_select_weights",
    "sort_weighted_scatter_reduce",
    "functional_grouped_mm",
    "outside_shared_gated",
)


class Counter:
    """An inner compiler that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, _example_inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


def tokens(name: str, count: int) -> torch.Tensor:
    """`count` random tokens in the shape that the variant takes."""
    example = VARIANTS[name].inputs()
    shape = (1, count, example.shape[-1]) if example.dim() == 3 else (count, example.shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(count)).to(example.dtype)


def check(name: str, module: torch.nn.Module, compiled: Any, count: int) -> None:
    x = tokens(name, count)
    with torch.no_grad():
        assert error(compiled(x), module(x)) < (2e-2 if x.dtype is torch.bfloat16 else 1e-5), count


def compiled_variant(name: str, **kwargs: Any) -> tuple[torch.nn.Module, Any, Counter, moe_compile.RewriteReport]:
    torch._dynamo.reset()
    module, counter, report = VARIANTS[name].build(), Counter(), moe_compile.RewriteReport()
    return module, moe_compile.compile(module, inner=counter, report=report, **kwargs), counter, report


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_compiles_once(name):
    module, compiled, counter, report = compiled_variant(name, dynamic=True)
    for count in COUNTS:
        check(name, module, compiled, count)
    assert counter.graphs == 1
    assert [region.rewritten for region in report.regions] == [True], str(report)
    check(name, module, compiled, 1)
    assert counter.graphs <= 2  # torch specialises sizes 0 and 1
    assert all(region.rewritten for region in report.regions), str(report)


@pytest.mark.parametrize("name", NAMES)
def test_second_token_count_makes_it_dynamic(name):
    module, compiled, counter, report = compiled_variant(name)
    check(name, module, compiled, 12)
    assert counter.graphs == 1
    for count in COUNTS:
        check(name, module, compiled, count)
    assert counter.graphs == 2
    assert all(region.rewritten for region in report.regions), str(report)


def test_no_tokens():
    name = "pairs_flat_select"
    module, compiled, _, _ = compiled_variant(name, dynamic=True)
    for count in (5, 0, 9):
        check(name, module, compiled, count)


def test_transformers_model_compiles_once_for_all_sequence_lengths():
    model, kwargs = build_zoo("mixtral", num_hidden_layers=1, max_position_embeddings=4096)
    report, counter = moe_compile.RewriteReport(), Counter()
    torch._dynamo.reset()
    compiled = moe_compile.compile(model, inner=counter, report=report, dynamic=True)
    generator = torch.Generator().manual_seed(5)
    for batch, length in ((2, 16), (2, 5), (3, 33), (2, 256)):
        kwargs["input_ids"] = torch.randint(3, 100, (batch, length), generator=generator)
        with torch.no_grad():
            assert error(compiled(**kwargs).logits, model(**kwargs).logits) < 1e-5
    assert counter.graphs == 1
    assert len(report.rewritten) == 1
    assert not report.refused


@pytest.mark.inductor
@pytest.mark.parametrize(("name", "training"), [("stack_gather", True), ("functional_grouped_mm", False)])
def test_one_compile_through_inductor(name: str, training: bool) -> None:
    torch._dynamo.reset()
    module, report = VARIANTS[name].build(), moe_compile.RewriteReport()
    compiled = moe_compile.compile(module, report=report, dynamic=True)
    for count in COUNTS:
        x = tokens(name, count).requires_grad_(training)
        out = compiled(x)
        assert error(out.detach(), module(x).detach()) < (2e-2 if x.dtype is torch.bfloat16 else 1e-5), count
        if training:
            out.sum().backward()
    assert [r.providers["experts"] for r in report.regions] == ["inline"]


def test_what_inductor_traces_through_keeps_the_token_count_open() -> None:
    """On a GPU the dispatch is traced through as well, which no CPU run sees."""
    ops, graphs = torch.ops.moe_compile, Counter()

    def layer(x: torch.Tensor, logits: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, ids = ops.route_inline(logits, None, 2, "softmax", "sum", 0.0, "add", 1.0, 1, 1, "max", 0.0, None, None, True, "scores")
        order, offsets, *places = ops.sort_slots_inline(ids, 4, False)
        program = ("mm(1, silu(mm(0, x)))", "eio,eio", "", 2)
        return ops.permute_experts_combine_inline(x, order, offsets, None, [up, down], [], *program, weights, None, *places, False)

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=graphs), dynamic=True, fullgraph=True)
    up, down = torch.randn(4, 8, 6), torch.randn(4, 6, 8)
    for count in COUNTS:
        x, logits = torch.randn(count, 8, requires_grad=True), torch.randn(count, 4)
        torch.testing.assert_close(compiled(x, logits, up, down), layer(x, logits, up, down))
    assert graphs.graphs == 2  # forward and backward
