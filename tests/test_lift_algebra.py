"""Every lemma of the lifter's algebra: what a smart constructor returns means the same as what it was given.

Expressions are grown at random, once without simplification and once through the constructors (`expressions.py`), and both are evaluated
element by element (`evaluator.py`).  The single lemmas below are those that random growth reaches rarely.
"""

from __future__ import annotations

import pytest
import torch
from evaluator import Evaluator, Undefined, close
from expressions import FEW, Grower, Pair, leaf, worlds
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_compile.passes.lift.algebra import ZERO_AT_ZERO, compare, eq, mul, negate, refresh, subst, sum_, unary, where
from moe_compile.passes.lift.expr import Enum, Refused, Var, alpha, const, fresh_table, is_const, raw, show


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


@FEW
@given(data=st.data())
def test_a_test_for_nonzero_beside_what_it_tests(data):
    """[g != 0] g h = g h, where g and h are scattered sums, and only where they are scattered by the same slots."""

    def grow(g, w):
        t, es = g.index(w.T, 0, w.free), [g.index(w.E, 0, w.free) for _ in range(2)]
        a, b = g.slots(0, t, es[0], w.free), g.slots(1, t, g.one_of(es), w.free)
        test = Pair(raw("not", raw("eq", a.plain, const(0))), negate(eq(a.simple, const(0))))
        both = Pair(raw("mul", a.plain, b.plain), mul(a.simple, b.simple))
        rest = g.one_of([a, b, both])
        return Pair(raw("mul", test.plain, rest.plain), mul(test.simple, rest.simple))

    grown(data, False, grow)


@pytest.mark.parametrize("op", ["gt", "ne"])
@pytest.mark.parametrize("distinct", [True, False])
def test_a_count_of_slots_is_a_truth_value_only_where_ids_are_distinct(op, distinct):
    with fresh_table():
        ids = torch.tensor([[0, 1], [2, 2]])
        source, t, e, k = leaf("ids", ids, (0, 3), distinct), Var(2), Var(3), Var(2)
        hits = sum_(k, eq(raw("load", source, t, k), e))
        assert (compare(op, hits, const(0)) is hits) == distinct


def test_functions_that_pass_through_brackets_are_zero_at_zero():
    extra = {"gelu": ["none"], "leaky_relu": [const(0.1)], "elu": [const(2.0)], "cast": [torch.bfloat16]}
    for op in ZERO_AT_ZERO:
        assert Evaluator({})(raw(op, const(0.0), *extra.get(op, [])), {}) == 0, op


@pytest.mark.parametrize("op", ["sigmoid", "exp", "softplus", "cos", "rsqrt", "log", "reciprocal", "hardsigmoid"])
def test_functions_that_are_not_zero_at_zero_stay_outside_of_brackets(op):
    with fresh_table():
        i = Var(3)
        e = unary(op, mul(eq(i, const(1)), raw("load", leaf("x", torch.ones(3)), i)))
        assert e.op == op, show(e)


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


@FEW
@given(data=st.data())
def test_sums_with_an_arm_for_each_value(data):
    """sum_v where([v=2], a, where([v=0], b, c)), tests in any order, some twice, some missing."""

    def grow(g, w):
        v = Var(3)
        pair = g.scalar(1, [*w.free, v])
        for i in data.draw(st.lists(st.integers(0, 3), max_size=4)):
            arm, test = g.scalar(1, [*w.free, v]), raw("eq", v, const(i))
            pair = Pair(raw("where", test, arm.plain, pair.plain), where(eq(v, const(i)), arm.simple, pair.simple))
        return Pair(raw("sum", v, pair.plain), sum_(v, pair.simple))

    grown(data, False, grow)


@FEW
@given(data=st.data())
def test_what_is_masked_by_the_test_that_does_not_hold(data):
    """where(c, a, c b) and where(c, a, d b)."""

    def grow(g, w):
        c, d, e = (g.condition(1, w.free) for _ in range(3))
        a, b = (g.scalar(1, w.free) for _ in range(2))
        test = g.one_of([c, Pair(raw("mul", c.plain, e.plain), mul(c.simple, e.simple))])
        masks = g.one_of([[c], [d], [c, e], [e, d]])
        other = Pair(raw("mul", *[m.plain for m in masks], b.plain), mul(*[m.simple for m in masks], b.simple))
        return Pair(raw("where", test.plain, a.plain, other.plain), where(test.simple, a.simple, other.simple))

    grown(data, False, grow)


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


# ---------------------------------------------------------------- substitution
@SYMBOLIC
@FEW
@given(data=st.data())
def test_substitution_is_evaluation_at_another_index(data, symbolic):
    """Two variables at once: what replaces one may contain the other, and nothing is captured by a sum inside."""
    with fresh_table():
        world = data.draw(worlds(symbolic))
        g = Grower(data.draw, world)
        try:
            e = g.scalar(data.draw(st.integers(1, 3)), world.free).simple
            a, b = data.draw(st.permutations(world.free))[:2]
            table = {v: g.index(v.size, 1, world.free).simple for v in (a, b)}
            got = subst(e, table)
        except Refused:
            assume(False)
        for at in world.evaluator.assignments(world.free):
            try:
                want = world.evaluator(e, {**at, **{v: world.evaluator(x, at) for v, x in table.items()}})
            except Undefined:
                continue
            assert close(world.evaluator(got, at), want), f"{show(e)} at {[(v.id, show(x)) for v, x in table.items()]}: {show(got)}"


@FEW
@given(data=st.data())
def test_an_opened_sum_is_the_same_sum_under_another_name(data):
    with fresh_table():
        world = data.draw(worlds())
        try:
            e = Grower(data.draw, world).slot_sum(1, world.free).simple
        except Refused:
            assume(False)
        assume(e.op == "sum")
        v, body = refresh(e)
        assert v is not e.args[0]
        assert alpha(raw("sum", v, body)) == alpha(e)
        check(Pair(e, raw("sum", v, body)), world)


def test_a_variable_is_not_captured_by_the_sum_it_is_put_into():
    """sum_k x[k, t] at t = k', where k' is the sum's own variable met free elsewhere."""
    with fresh_table():
        x, k, t = leaf("x", torch.tensor([[1.0, 2.0], [4.0, 8.0]])), Var(2), Var(2)
        inner = sum_(k, raw("load", x, k, t))
        v, body = refresh(inner)
        outer = sum_(v, mul(body, subst(inner, {t: v})))
        ev = Evaluator({x.nodes[0]: torch.tensor([[1.0, 2.0], [4.0, 8.0]])})
        assert ev(outer, {t: 0}) == 1 * (1 + 4) + 4 * (2 + 8)


def test_data_dependent_rows_must_not_be_read_by_their_number():
    with fresh_table():
        k = Var(2)
        r = Var(None, Enum(((k,),), eq(k, const(1))))
        with pytest.raises(Refused, match="row number"):
            sum_(r, raw("load", leaf("x", torch.ones(2)), r))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cast_of_a_number_rounds_it(dtype):
    with fresh_table():
        for c in (0.1, 1 / 3, 1000.5, 16_777_217, 2.0, 1):
            want = torch.tensor(c, dtype=torch.float64).to(dtype).item()
            assert Evaluator({})(unary("cast", const(c), dtype), {}) == want, c


def test_equality_of_a_float_with_itself_is_the_test_for_nan():
    with fresh_table():
        i = Var(2)
        x = raw("load", leaf("x", torch.tensor([1.0, torch.nan])), i)
        assert not is_const(eq(x, x))
        assert is_const(eq(i, i), 1)
