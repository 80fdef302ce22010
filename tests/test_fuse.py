"""Experts and combine become one op on the way to Inductor, and only where nobody sees the difference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, E, K, block, calls, graph_of, node, rewrite, tokens

import moe_compile
from moe_compile.passes.fuse import fuse

FUSED = "permute_experts_combine"
STAGES = ["route", "quantize_dispatch", "permute_experts_unpermute", "combine"]


def rewritten():
    gm = graph_of(Block(), tokens())
    rewrite(gm)
    return gm


def fused(gm):
    fuse(gm)
    gm.graph.lint()
    return calls(gm, *STAGES, "sort_slots", "route_inline", f"{FUSED}_inline", FUSED)


def test_stages_become_what_inductor_can_fuse_with_the_same_result():
    gm = rewritten()
    inputs = [torch.randn(n.meta["example_value"].shape) for n in gm.graph.nodes if n.op == "placeholder"]
    expected = gm(*inputs)
    assert fused(gm) == ["route_inline", "quantize_dispatch", FUSED]
    torch.testing.assert_close(gm(*inputs), expected)


def test_a_provider_that_is_torch_code_is_traced_through():
    gm = rewritten()
    provided_by(gm, "inline")
    assert fused(gm) == ["route_inline", "sort_slots", f"{FUSED}_inline"]
    assert node(gm, "sort_slots").args[-1] is True  # ids of a top-k over all experts are in range


@pytest.mark.parametrize("gradients", [False, True])
def test_a_provider_that_sorts_for_itself_gets_the_ids_in_inference(gradients):
    gm = rewritten()
    inputs = [torch.randn(n.meta["example_value"].shape) for n in gm.graph.nodes if n.op == "placeholder"]
    expected = gm(*inputs)
    provided_by(gm, "triton")
    with torch.set_grad_enabled(gradients):
        fuse(gm)
    gm.graph.lint()
    name = FUSED if gradients else "local_experts"
    assert calls(gm, *STAGES, FUSED, "local_experts") == (["quantize_dispatch", FUSED] if gradients else ["local_experts"])
    fused = node(gm, name)
    assert "blocks.py" in fused.meta["stack_trace"]
    fused.args = (*fused.args[:-1], "reference")
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), expected)


def test_ids_that_may_be_no_experts_are_said_to_be():
    gm = rewritten()
    provided_by(gm, "inline")
    del node(gm, "quantize_dispatch").meta["ids_in_range"]
    fused(gm)
    assert node(gm, "sort_slots").args[-1] is False


def provided_by(gm, name):
    experts = node(gm, "permute_experts_unpermute")
    experts.args = (*experts.args[:-1], name)


def test_the_new_op_carries_the_users_source_line():
    gm = rewritten()
    fuse(gm)
    assert "blocks.py" in node(gm, FUSED).meta["stack_trace"]


def test_rows_that_somebody_else_reads_stay():
    gm = rewritten()
    experts = node(gm, "permute_experts_unpermute")
    with gm.graph.inserting_after(experts):
        gm.graph.call_function(torch.sum, (experts,))
    assert fused(gm)[-2:] == ["permute_experts_unpermute", "combine"]


def test_a_write_between_the_stages_keeps_their_order():
    gm = rewritten()
    experts = node(gm, "permute_experts_unpermute")
    with gm.graph.inserting_after(experts):
        gm.graph.call_method("zero_", (experts.args[0],))
    assert fused(gm)[-2:] == ["permute_experts_unpermute", "combine"]


def test_a_provider_without_the_kernel_keeps_two_stages():
    gm = rewritten()
    provided_by(gm, "reference")
    assert fused(gm)[-2:] == ["permute_experts_unpermute", "combine"]


def test_a_router_whose_weights_are_gathered_stays_an_op_on_a_cpu():
    def route(self, x):
        scores = F.linear(x, self.gate).sigmoid()
        ids = (scores + self.bias).topk(K, dim=-1)[1]
        return scores.gather(1, ids), ids

    gm = graph_of(block(Block.forward, route=route, bias=torch.randn(E)), tokens())
    rewrite(gm)
    assert fused(gm)[0] == "route"


@pytest.mark.inductor
@pytest.mark.parametrize("training", [False, True])
def test_inductor_gets_products_and_the_report_the_stages(fresh_dynamo, training):
    seen = []
    model, x = Block(), tokens()
    compiled = moe_compile.compile(model, options={"post_grad_custom_post_pass": lambda graph: seen.append(str(graph))})
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert "grouped_mm" in seen[0]
    assert "moe_compile.combine" not in seen[0]
    report = moe_compile.explain(Block(), inner="inductor")(tokens())
    assert "combine(" in report.graphs[0].after
    assert FUSED not in report.graphs[0].after
    assert report.regions[0].providers["experts"] == "inline"
