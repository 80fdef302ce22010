"""The original against its replacement: a rewrite that is wrong in anything is dropped, and looking does no harm."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Compared, Dense, E, K, block, graph_of, rewrite, stages, tokens

from moe_compile.passes.lift.algebra import add, mul
from moe_compile.passes.lift.expr import const

RUN = sys.modules["moe_compile.passes.run"]


@pytest.fixture
def wrong(monkeypatch):
    """Make the lifter's formula wrong: wrong(change) with change(formula) -> formula."""
    find = RUN.find_region

    def install(change):
        def find_wrong(*args):
            region = find(*args)
            region.formula = change(region.formula)
            return region

        monkeypatch.setattr(RUN, "find_region", find_wrong)

    return install


def program(text):
    return lambda f: dataclasses.replace(f, program=text(f.program))


WRONG = {
    "another_activation": program(lambda p: p.replace("silu", "relu")),
    "a_constant_off_by_a_millionth": program(lambda p: f"{p} * 1.000001"),
    "no_activation": program(lambda p: p.replace("silu(mm(0, x))", "mm(0, x)")),
    "experts_reversed": lambda f: dataclasses.replace(f, ids=add(const(E - 1), mul(const(-1), f.ids))),
    "weights_squared": lambda f: dataclasses.replace(f, weight=mul(f.weight, f.weight)),
    "unweighted": lambda f: dataclasses.replace(f, weight=None),
    "a_residual_too_many": lambda f: dataclasses.replace(f, rest=[f.x]),
    "weights_of_the_layers_swapped": lambda f: dataclasses.replace(f, weights=f.weights[::-1]),
}


@pytest.mark.parametrize("what", WRONG)
def test_validation_rejects_a_wrong_program(what, wrong):
    wrong(WRONG[what])
    gm = graph_of(Block(), tokens())
    (region,) = rewrite(gm).regions
    assert not region.rewritten
    assert stages(gm) == 0
    assert region.reason


def test_the_reason_says_what_differs_by_how_much_and_for_which_routing(wrong):
    wrong(WRONG["another_activation"])
    (region,) = rewrite(graph_of(Block(), tokens())).regions
    assert "output differs by" in region.reason
    assert "for random, float64" in region.reason
    assert "limit 1e-07" in region.reason


def test_the_users_model_runs_as_it_is_after_a_rejection(wrong):
    wrong(WRONG["another_activation"])
    c = Compared(Block(), tokens())
    assert c.rewritten == 0


def test_switched_off_it_rejects_nothing(wrong):
    wrong(WRONG["another_activation"])
    (region,) = rewrite(graph_of(Block(), tokens()), validate="off").regions
    assert region.rewritten
    assert not region.validation


def test_a_wrong_gradient_with_right_values_is_rejected(wrong):
    """`stop` changes no value."""
    wrong(program(lambda p: f"stop({p})"))
    gm = graph_of(Block(), tokens(), grad=True)
    (region,) = rewrite(gm, grad=True).regions
    assert not region.rewritten
    assert "gradient of" in region.reason


def test_gradients_are_not_compared_where_none_flow(wrong):
    wrong(program(lambda p: f"stop({p})"))
    (region,) = rewrite(graph_of(Block(), tokens())).regions
    assert region.rewritten


def test_a_formula_that_holds_only_while_every_expert_has_tokens_is_rejected(monkeypatch, wrong):
    """Random tokens hit every expert; the degenerate routings do not."""
    wrong(lambda f: f)
    seen = []
    run = sys.modules["moe_compile.passes.validate"]._run

    def off_for_empty_experts(gm, args, *rest):
        out = run(gm, args, *rest)
        ids = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64]
        empty = len(set(ids[0].flatten().tolist())) < E
        seen.append(empty)
        if empty and "permute_experts_unpermute" in gm.code:
            out["output"] = out["output"] + 1
        return out

    monkeypatch.setattr(sys.modules["moe_compile.passes.validate"], "_run", off_for_empty_experts)
    (region,) = rewrite(graph_of(Block(), tokens(count=64))).regions
    assert not region.rewritten
    assert "an expert" in region.reason
    assert not seen[0]


def test_the_report_says_what_was_compared():
    (region,) = rewrite(graph_of(Block(), tokens(), grad=True), grad=True).regions
    assert "3 routings, outputs and gradients in float64 and the model's dtype" in region.validation


# ---------------------------------------------------------------- it looks, and changes nothing
def test_it_draws_no_numbers_from_the_users_generator():
    gm = graph_of(Block(), tokens())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rewrite(gm)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fails", [True, False])
def test_it_leaves_the_default_dtype_and_autocast_as_they_were(fails, monkeypatch):
    module = sys.modules["moe_compile.passes.validate"]
    if fails:
        monkeypatch.setattr(module, "_error", lambda *a: 1 / 0)
    rewrite(graph_of(Block(), tokens()))
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_parameters_and_buffers_keep_their_values():
    def forward(self, x):
        w, ids = self.route(x)
        self.load.add_(torch.bincount(ids.flatten(), minlength=E))
        return self.loop(x, w, ids)

    module = block(forward, load=torch.zeros(E))
    gm = graph_of(module, tokens())
    before = {n: t.clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    rewrite(gm)
    assert all(torch.equal(t, before[n]) for n, t in [*module.named_parameters(), *module.named_buffers()])


def test_an_original_that_fails_on_fresh_inputs_is_refused_not_raised(monkeypatch):
    """A gather by a user's own integers, of which nothing is known, may be out of range for those that are made up."""

    def forward(self, x, at):
        w, ids = self.route(x)
        rows = x[at]  # made up as zeros
        return self.loop(rows, w, ids)

    c = Compared(block(forward), tokens(), torch.arange(7).flip(0))
    assert c.report.regions


def test_rows_without_any_score_do_not_reject():
    """Random masks leave tokens whose scores are all -inf: NaN in the original says nothing."""

    def forward(self, x):
        w, ids = self.route(x)
        w = w.masked_fill(w < 0.4, float("-inf")).softmax(-1)
        return self.loop(x, w, ids)

    c = Compared(block(forward), tokens())
    assert c.rewritten == 1 or "nan" not in str(c.reasons)


@pytest.mark.parametrize("base", [Block, Dense])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_validated_in_its_own_precision(dtype, base):
    module, x = base().to(dtype), tokens().to(dtype)
    gm = graph_of(module, x)
    (region,) = rewrite(gm).regions
    assert region.rewritten, region.reason


def test_an_error_below_bfloat16s_rounding_shows_in_float64(wrong):
    wrong(WRONG["a_constant_off_by_a_millionth"])
    (region,) = rewrite(graph_of(Block().bfloat16(), tokens().bfloat16())).regions
    assert not region.rewritten


def test_ids_that_are_drawn_are_distinct_where_topk_makes_them_so():
    module = sys.modules["moe_compile.passes.validate"]
    g = torch.Generator().manual_seed(0)
    distinct = module.Decision(None, None, ((0, E), True))
    repeated = module.Decision(None, None, ((0, E), False))
    for routing in module.ROUTINGS:
        ids = module._ids([50, K], distinct, routing, g)
        assert all(len(set(row)) == K for row in ids.tolist())
        assert 0 <= ids.min() <= ids.max() < E
        free = module._ids([50, K], repeated, routing, g)
        assert free.shape == (50, K)
        assert 0 <= free.min() <= free.max() < E
    assert (module._ids([50, 1], distinct, "all tokens to one expert", g) == E // 2).all()
    assert (module._ids([50, K], distinct, "an expert without tokens", g) != 0).all()
    assert F.one_hot(module._ids([50, K], distinct, "random", g), E).sum((0, 1)).min() > 0
