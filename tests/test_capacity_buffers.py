"""Buffers' rows by number, a spare row, tokens that keep their own row: rewritten, and near misses keep their meaning.

The styles are in `buffer_blocks.py`.
"""

from __future__ import annotations

import buffer_blocks as blocks
import pytest
import torch
from test_capacity_top2 import rewritten

import moe_compile
from moe_compile.passes.lift.algebra import add, compare, eq, mul
from moe_compile.passes.lift.expr import Leaf, Rank, Var, const, fresh_table, is_const, raw
from moe_compile.passes.lift.index import mix
from moe_compile.passes.lift.positions import decided, split, within
from moe_compile.passes.lift.ranks import collapse

H, E, C = blocks.H, blocks.E, blocks.C


def inputs() -> list[torch.Tensor]:
    """Tokens as they come, and all of them alike, so that one expert is asked for by all."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(2, 9, H, generator=draw), torch.randn(1, 1, H, generator=draw).expand(2, 9, H).contiguous()]


SPELLINGS = [("Spare", None), ("Spare", "padded"), ("Spare", "scattered"), ("Kept", "passed_on"), ("Pairs", None), ("Clamped", None),
             ("Passing", None), ("Passing", "gradient_only"), ("Cut", None), ("Choices", None)]  # fmt: skip


@pytest.mark.parametrize(("name", "mutation"), SPELLINGS)
def test_spellings_are_rewritten(name, mutation):
    assert rewritten(getattr(blocks, name)(mutation), inputs()) == 1


@pytest.mark.parametrize("name", ["Spare", "Kept"])
def test_any_number_of_tokens(name):
    """One, fewer than there are rows, more; none."""
    draw, module = torch.Generator().manual_seed(3), getattr(blocks, name)()
    assert rewritten(module, [torch.randn(1, n, H, generator=draw) for n in (18, 1, 5, 31)]) > 1
    nothing = moe_compile.compile(module, inner="eager")(torch.zeros(1, 0, H, dtype=torch.float64))
    assert nothing.shape == (1, 0, H)


NEAR = [
    *[("Spare", m, m in ("counts_from_one", "one_less")) for m in blocks.SPARE],
    *[("Kept", m, m in ("added_twice", "writes_next_token", "passed_on_and_added")) for m in blocks.KEPT],
    *[("Clamped", m, False) for m in blocks.CLAMPED],
    *[("Passing", m, m in ("counts_next_expert", "doubled", "next_token", "added")) for m in blocks.PASSING],
    *[("Cut", m, m == "rest_mixed") for m in blocks.CUT],
    *[("Choices", m, False) for m in blocks.CHOICES],
]


@pytest.mark.parametrize(("name", "mutation", "known"), NEAR)
def test_near_misses_keep_their_meaning(name, mutation, known):
    """known: it is another formula of the same kind."""
    assert rewritten(getattr(blocks, name)(mutation), inputs()) == known


# ---------------------------------------------------------------- the lemmas, by themselves
class Places:
    """Expert and position of tokens s and t, counted in a mask of the ids."""

    def __init__(self) -> None:
        self.s, self.t = Var(6), Var(6)
        self.ids = Leaf([object()], (6,), range=(0, E), integer=True)
        self.counts = Leaf([object()], (6, E), integer=True, limits=(0, 7))
        n, g = Var(6), Var(E)
        self.counts.rank = Rank(((n,), (g,)), eq(raw("load", self.ids, n), g), 0)

    def id(self, at):
        return raw("load", self.ids, at)

    def place(self, at):
        return add(raw("load", self.counts, at, self.id(at)), const(-1))

    def room(self, at, op="lt", limit=C):
        return compare(op, self.place(at), const(limit))

    def row(self, at, width=C):
        return add(mul(const(width), self.id(at)), self.place(at))


def test_a_row_is_an_expert_and_a_position_where_that_fits():
    with fresh_table():
        p = Places()
        facts = frozenset([p.room(p.t)])
        assert split(p.row(p.t), C, facts) == (p.id(p.t), p.place(p.t))
        assert split(p.row(p.t), C, frozenset()) is None
        assert split(p.row(p.t, C - 1), C - 1, facts) is None
        assert within(p.row(p.t), E * C, facts)
        assert not within(p.row(p.t), E * C - 1, facts)
        assert not within(p.row(p.t), E * C, frozenset())


@pytest.mark.parametrize(("width", "limit", "same"), [(C, C, True), (C, C - 1, True), (C - 1, C, False), (C, C + 1, False)])
def test_two_tokens_are_never_in_one_row(width, limit, same):
    with fresh_table():
        p = Places()
        both = mul(p.room(p.s, "lt", limit), p.room(p.t, "lt", limit))
        found = collapse(raw("sum", p.s, mul(both, eq(p.row(p.s, width), p.row(p.t, width)))))
        assert (found is p.room(p.t, "lt", limit)) == same, found


@pytest.mark.parametrize(("op", "limit", "test", "bound", "holds"), [
    ("lt", 3, "lt", 3, True), ("lt", 3, "le", 2, True), ("lt", 3, "lt", 2, None), ("lt", 3, "ge", 3, False), ("lt", 3, "gt", 2, False),
    ("le", 2.5, "lt", 3, True), ("lt", 2.5, "le", 2, True), ("lt", 3, "lt", 2.5, True), ("le", 3, "le", 2.5, None),
    ("le", 3, "lt", 3.5, True),
])  # fmt: skip
def test_comparisons_that_others_decide(op, limit, test, bound, holds):
    with fresh_table():
        p = Places()
        facts = frozenset([raw(op, p.place(p.t), const(limit))])
        assert decided(raw(test, p.place(p.t), const(bound)), facts) is holds


def test_a_test_of_a_choice_is_a_test_of_what_is_chosen():
    with fresh_table():
        p = Places()
        spare = raw("where", p.room(p.t), p.row(p.t), const(E * C))
        e, c = Var(E), Var(C)
        row = mix(e, E, c, C)
        assert eq(spare, row) is mul(p.room(p.t), eq(p.row(p.t), row))
        assert compare("lt", spare, const(E * C)) is mul(p.room(p.t), compare("lt", p.row(p.t), const(E * C)))
        assert not is_const(eq(spare, Var(E * C + 1)), 0)
