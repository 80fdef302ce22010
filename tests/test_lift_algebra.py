"""Every lemma of the lifter's algebra: what a smart constructor returns means the same as what it was given.

Expressions are grown at random, once without simplification and once through the constructors (`expressions.py`), and both are evaluated
element by element (`evaluator.py`).  The single lemmas below are those that random growth reaches rarely.
"""

from __future__ import annotations

import pytest
from evaluator import Undefined, close
from expressions import FEW, Grower, Pair, worlds
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_compile.passes.lift.algebra import mul, sum_
from moe_compile.passes.lift.expr import Refused, Var, fresh_table, raw, show


def check(pair, world):
    """Both sides agree wherever the plain side is defined."""
    for at in world.evaluator.assignments([v for v in world.free if v in pair.plain.free | pair.simple.free]):
        try:
            want = world.evaluator(pair.plain, at)
        except Undefined:
            continue
        got = world.evaluator(pair.simple, at)
        assert close(got, want), f"{show(pair.plain)}  ->  {show(pair.simple)}: {want} became {got}"


def grown(data, symbolic, grow):
    """Grow a pair in a world of its own and compare its sides."""
    with fresh_table():
        world = data.draw(worlds(symbolic))
        try:
            pair = grow(Grower(data.draw, world), world)
        except Refused:
            assume(False)
        check(pair, world)


SYMBOLIC = pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbolic_tokens"])


@SYMBOLIC
@pytest.mark.parametrize("kind", ["scalar", "condition"])
@FEW
@given(data=st.data())
def test_random_expressions(data, kind, symbolic):
    grown(data, symbolic, lambda g, w: getattr(g, kind)(data.draw(st.integers(1, 3)), w.free))


@SYMBOLIC
@FEW
@given(data=st.data())
def test_expressions_of_what_is_scattered_to_one_expert(data, symbolic):
    """sum_k [id_k = e] a_k and its like: products, quotients, functions, tests and selections of them."""

    def grow(g, w):
        t, e = g.index(w.T, 0, w.free), g.index(w.E, 0, w.free)
        return g.slots(data.draw(st.integers(1, 3)), t, e, w.free)

    grown(data, symbolic, grow)


@SYMBOLIC
@FEW
@given(data=st.data())
def test_sums_with_an_equation_in_their_variable(data, symbolic):
    """sum_v [a(v) = b] f(v) for v itself, its digits, mixed indices, sorted rows and sorted keys."""

    def grow(g, w):
        v = Var(g.one_of([*w.sizes, w.T * w.K]))
        tests = [g.equation_in(v, 1, w.free) for _ in range(data.draw(st.integers(1, 2)))]
        f = g.scalar(data.draw(st.integers(0, 2)), [*w.free, v])
        plain = raw("mul", *[c.plain for c in tests], f.plain)
        return Pair(raw("sum", v, plain), sum_(v, mul(*[c.simple for c in tests], f.simple)))

    grown(data, symbolic, grow)


@SYMBOLIC
@FEW
@given(data=st.data())
def test_sums_over_sorted_rows(data, symbolic):
    """The sum over sorted rows is the sum over unsorted ones only if it runs over all of them and reads nothing else of the position."""
    grown(data, symbolic, lambda g, w: g.sorted_sum(data.draw(st.integers(0, 1)), w.free))


@SYMBOLIC
@FEW
@given(data=st.data())
def test_sums_over_data_dependent_rows(data, symbolic):
    """Over the rows of a nonzero, and over one expert's segment of the sorted rows."""

    def grow(g, w):
        r = g.rows(2) if data.draw(st.booleans()) else g.segment()
        f = g.scalar(data.draw(st.integers(0, 3)), [*w.free, r])
        return Pair(raw("sum", r, f.plain), sum_(r, f.simple))

    grown(data, symbolic, grow)
