"""Every lemma of the lifter's algebra: what a smart constructor returns means the same as what it was given.

Expressions are grown at random, once without simplification and once through the constructors, and both are evaluated element by element
(`evaluator.py`).  The single lemmas below are those that random growth reaches rarely.
"""

from __future__ import annotations

import pytest
from evaluator import Undefined, close
from expressions import FEW, Grower, worlds
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_compile.passes.lift.expr import Refused, fresh_table, show


def check(pair, world, what=""):
    """Both sides agree wherever the plain side is defined."""
    for at in world.evaluator.assignments([v for v in world.free if v in pair.plain.free | pair.simple.free]):
        try:
            want = world.evaluator(pair.plain, at)
        except Undefined:
            continue
        got = world.evaluator(pair.simple, at)
        assert close(got, want), f"{show(pair.plain)}  ->  {show(pair.simple)}: {want} became {got}"


@pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbolic_tokens"])
@pytest.mark.parametrize("kind", ["scalar", "condition"])
@FEW
@given(data=st.data())
def test_random_expressions_keep_their_meaning(data, kind, symbolic):
    with fresh_table():
        world = data.draw(worlds(symbolic))
        try:
            pair = getattr(Grower(data.draw, world), kind)(data.draw(st.integers(1, 3)), world.free)
        except Refused:
            assume(False)
        check(pair, world)
