"""The calculus itself: interning, bound variables, structural keys."""

from __future__ import annotations

import pytest
import torch
from expressions import leaf

from moe_compile.passes.lift.algebra import eq
from moe_compile.passes.lift.expr import ONE, ZERO, Enum, Segment, Var, alpha, const, fresh_table, make_order, raw, show, subexprs


@pytest.fixture(autouse=True)
def _own_table():
    with fresh_table():
        yield


X = leaf("x", torch.zeros(4, 4))


def test_equal_terms_are_one_object():
    i = Var(4)
    assert raw("load", X, i, ZERO) is raw("load", X, i, const(0))
    assert raw("load", X, i, ZERO) is not raw("load", X, Var(4), ZERO)


def test_numbers_of_different_type_are_different_terms():
    """True, 1 and 1.0 are equal in Python; a truth value is no integer, and an integer no float."""
    assert len({const(1), const(1.0), const(True)}) == 3


def test_terms_of_one_lift_are_forgotten_and_constants_are_not():
    i = Var(4)
    mine = raw("neg", i)
    with fresh_table():
        assert raw("neg", i) is not mine
        assert const(0) is ZERO
        assert const(1) is ONE
        with fresh_table():
            assert const(1) is ONE
    assert raw("neg", i) is mine


def test_a_sum_binds_its_variable():
    i, j = Var(4), Var(4)
    e = raw("sum", i, raw("load", X, i, j))
    assert e.free == {j}
    assert raw("mul", e, i).free == {i, j}  # the same variable, free beside the sum


def test_a_scatter_without_a_variable_binds_nothing():
    i = Var(4)
    assert raw("scat", None, eq(i, ONE), ONE, ZERO).free == {i}


def test_the_name_of_a_bound_variable_does_not_matter():
    i, j, t = Var(4), Var(4), Var(4)
    assert alpha(raw("sum", i, raw("load", X, t, i)), [t]) == alpha(raw("sum", j, raw("load", X, t, j)), [t])


def test_the_extent_of_a_bound_variable_matters():
    two, three, t = Var(2), Var(3), Var(4)
    assert alpha(raw("sum", two, raw("load", X, t, two)), [t]) != alpha(raw("sum", three, raw("load", X, t, three)), [t])


def test_the_domain_of_a_bound_variable_matters():
    t = Var(4)
    rows = [Var(None, Enum(((t,),), eq(t, const(c)))) for c in (0, 1, 1)]
    a, b, c = (alpha(raw("sum", r, raw("load", X, raw("coord", r, 0), ZERO))) for r in rows)
    assert a != b
    assert b == c


def test_which_variable_is_which_matters():
    i, j = Var(4), Var(4)
    assert alpha(raw("load", X, i, j), [i, j]) != alpha(raw("load", X, j, i), [i, j])
    assert alpha(raw("load", X, i, j), [i, j]) == alpha(raw("load", X, j, i), [j, i])
    assert alpha(raw("load", X, i, j)) != alpha(raw("load", X, Var(4), j))


def test_nested_sums_over_swapped_indices_differ():
    i, j = Var(4), Var(4)
    straight, swapped = raw("load", X, i, j), raw("load", X, j, i)
    assert alpha(raw("sum", i, raw("sum", j, straight))) != alpha(raw("sum", i, raw("sum", j, swapped)))


def test_segments_of_different_experts_or_sorts_differ():
    t, ids, other = Var(4), leaf("ids", torch.zeros(4, dtype=torch.int64), (0, 3)), leaf("other", torch.zeros(4, dtype=torch.int64), (0, 3))
    a, b = (make_order([t], raw("load", source, t)) for source in (ids, other))
    assert len({Segment(a, 0).key, Segment(a, 1).key, Segment(b, 0).key}) == 3
    assert Segment(a, 1).key == Segment(make_order([v := Var(4)], raw("load", ids, v)), 1).key


def test_subexpressions_come_once_parents_first():
    i = Var(4)
    e = raw("mul", raw("neg", i), raw("neg", i))
    assert list(subexprs(e)) == [e, raw("neg", i), i]


def test_terms_are_shown_as_formulas():
    i = Var(4)
    text = show(raw("sum", i, raw("mul", eq(i, const(2)), raw("load", X, i, ZERO), const(0.5))))
    assert text == f"sum_i{i.id}:4 ([i{i.id}=2] * x[i{i.id}, 0] * 0.5)"
