"""Two choices that share the experts' buffers, loops with a limit for each expert: rewritten, and near misses keep their meaning.

The styles are in `top2_blocks.py`, more mutants in `mutations/capacity.py` ("capacity_choices", "capacity_rows").
"""

from __future__ import annotations

import pytest
import top2_blocks as blocks
import torch
from corpus import styles
from corpus.harness import observe, worst
from mutations.judge import judge
from torch import Tensor, nn

import moe_compile
from moe_compile.passes.lift.algebra import add, compare, eq, mul
from moe_compile.passes.lift.expr import Leaf, Rank, Total, Var, const, fresh_table, raw
from moe_compile.passes.lift.ranks import collapse

H, E, C = blocks.H, blocks.E, 3


def inputs() -> list[Tensor]:
    """Tokens as they come, fewer, and all of them alike, so that one expert is asked for by all."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(2, 9, H, generator=draw), torch.randn(1, 1, H, generator=draw).expand(2, 9, H).contiguous()]


def rewritten(module: nn.Module, calls: list[Tensor]) -> int:
    """Blocks rewritten, where outputs and gradients are those of the module."""
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    module = module.double()  # a sum of gradients that cancels is not to be told from a wrong one in float32
    compiled = moe_compile.compile(module, inner="eager", report=report)
    for x in calls:
        want, got = observe(module, module, x.double(), grad=True), observe(compiled, module, x.double(), grad=True)
        floor = max(float(t.abs().max()) for t in want.items().values() if t is not None)
        off = {n: abs_error(got.items()[n], t) / floor for n, t in want.items().items()}
        assert max(off.values()) < 1e-9, (off, str(report))
    return len(report.rewritten)


def abs_error(a: Tensor | None, b: Tensor | None) -> float:
    zero = torch.zeros(())
    return float(((zero if a is None else a) - (zero if b is None else b)).abs().max())


@pytest.mark.parametrize("name", ["Sharded", "Sequences", "SequencesAtRandom", "Masked", "Overwritten"])
def test_two_choices_are_rewritten(name):
    assert rewritten(getattr(blocks, name)(), inputs()) == 1


@pytest.mark.parametrize(("name", "mutation", "known"), [
    ("Sharded", "behind_kept", True),
    ("Sharded", "behind_fewer", False),
    ("Sequences", "renorm_after", True),
    ("Sequences", "second_never_dropped", False),
    ("Masked", "second_by_first", False),
    ("Overwritten", "rows_kept", False),
    ("Overwritten", "one_expert_less", True),
    ("Overwritten", "rows_of_next", False),
    ("Overwritten", "reads_tokens", True),
    ("Overwritten", "added", False),
    ("Overwritten", "largest", False),
])  # fmt: skip
def test_near_misses_keep_their_meaning(name, mutation, known):
    """known: it is another formula of the same kind."""
    assert rewritten(getattr(blocks, name)(mutation), inputs()) == known


@pytest.mark.parametrize(("family", "mutation"), [("capacity_rows", "counts_other_expert"), ("capacity_choices", "behind_one_less")])
def test_mutants_mean_themselves(family, mutation):
    verdict = judge(family, mutation)
    assert verdict.status in ("rewritten", "refused"), verdict


def test_each_expert_takes_its_first_rows():
    """The style's own spelling: indices cut off by Python, if there are more than fit."""
    case = styles.CASES["makemoe_capacity"]
    module, x = case.factory(), case.inputs()[0]
    report = moe_compile.RewriteReport()
    torch._dynamo.reset()
    compiled = moe_compile.compile(module, inner="eager", report=report)
    assert worst(observe(compiled, module, x, grad=True), observe(module, module, x, grad=True))[0] < 1e-5
    assert len(report.rewritten) == 1, str(report)


# ---------------------------------------------------------------- the lemma, by itself
class Behind:
    """A second choice's row is its position among second choices, behind `total` rows of first ones."""

    def __init__(self, kept_below: int | None = None, other_mask: bool = False) -> None:
        self.s, self.t = Var(9), Var(9)
        self.first, self.second, third = (Leaf([object()], (9,), range=(0, E), integer=True) for _ in range(3))
        self.counts = [self.count(leaf) for leaf in (self.first, self.second)]
        n, g = Var(9), Var(E)
        mask = eq(raw("load", third if other_mask else self.first, n), g)
        if kept_below is not None:
            mask = mul(mask, compare("lt", add(raw("load", self.counts[0], n, g), const(-1)), const(kept_below)))
        self.total = Leaf([object()], (E,), integer=True)
        self.total.total = Total(((g,),), [n], mask)

    def count(self, ids: Leaf) -> Leaf:
        n, g = Var(9), Var(E)
        out = Leaf([object()], (9, E), integer=True, limits=(0, 10))
        out.rank = Rank(((n,), (g,)), eq(raw("load", ids, n), g), 0)
        return out

    def meeting(self, more: int = 0):
        """[first(s) = second(t)] [row of s, a first choice that is kept] = [row of t, a second one]"""
        e, first = raw("load", self.second, self.t), raw("load", self.first, self.s)
        mine = add(raw("load", self.counts[0], self.s, first), const(-1))
        theirs = add(raw("load", self.counts[1], self.t, e), const(-1 + more), raw("load", self.total, e))
        return mul(eq(first, e), compare("lt", mine, const(C)), raw("eq", mine, theirs))


@pytest.mark.parametrize(("kept_below", "more", "apart"), [(None, 0, True), (C, 0, True), (C + 1, 2, True), (C - 1, 0, False),
                                                           (None, -1, False)])  # fmt: skip
def test_second_choices_never_meet_first_ones(kept_below, more, apart):
    with fresh_table():
        found = collapse(Behind(kept_below).meeting(more))
        assert (found is const(0)) == apart, found


def test_a_count_of_something_else_says_nothing():
    with fresh_table():
        assert collapse(Behind(other_mask=True).meeting()) is not const(0)
