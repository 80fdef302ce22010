"""Index arithmetic: mixed radix, permutations, ranges.  Every fact that is claimed (a range, an integer, a truth value) holds."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from evaluator import Evaluator, Undefined, close
from expressions import FEW, OTHER, SYMBOL, Grower, leaf, worlds
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_compile.passes.lift.algebra import add, eq
from moe_compile.passes.lift.expr import ONE, ZERO, Enum, Refused, Var, const, fresh_table, make_order, raw, show
from moe_compile.passes.lift.index import below, bounds, digits, idiv, inside, inv, is_bool, is_int, mix, mod, perm, sel
from moe_compile.passes.lift.sizes import at_most, prod, quotient

SYMBOLIC = pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbolic_tokens"])


def values(world, e):
    """All defined values of an expression over the world's free variables."""
    for at in world.evaluator.assignments([v for v in world.free if v in e.free]):
        try:
            yield world.evaluator(e, at)
        except Undefined:
            continue


def an_index(data, world, depth=3):
    """An integer expression, in a known range or not, unsimplified or not."""
    g = Grower(data.draw, world)
    try:
        pair = g.number(g.one_of(world.sizes), data.draw(st.integers(0, depth)), world.free)
    except Refused:
        assume(False)
    return pair


@SYMBOLIC
@FEW
@given(data=st.data())
def test_simplified_indices(data, symbolic):
    with fresh_table():
        world = data.draw(worlds(symbolic))
        pair = an_index(data, world)
        for at in world.evaluator.assignments([v for v in world.free if v in pair.plain.free | pair.simple.free]):
            try:
                want = world.evaluator(pair.plain, at)
            except Undefined:
                continue
            assert world.evaluator(pair.simple, at) == want, f"{show(pair.plain)}  ->  {show(pair.simple)}"


@SYMBOLIC
@pytest.mark.parametrize("kind", ["number", "scalar", "condition"])
@FEW
@given(data=st.data())
def test_facts_about_a_value_hold(data, kind, symbolic):
    """bounds: every value is inside; is_int: every value is whole; is_bool: every value is 0 or 1."""
    with fresh_table():
        world = data.draw(worlds(symbolic))
        try:
            grow = getattr(Grower(data.draw, world), kind)
            e = an_index(data, world) if kind == "number" else grow(data.draw(st.integers(0, 3)), world.free)
        except Refused:
            assume(False)
        for x in e:
            found, size = bounds(x), world.evaluator.size
            for v in values(world, x):
                assert found is None or (found[0] <= v and (found[1] is None or v < size(found[1]))), f"{show(x)} = {v} outside {found}"
                assert not is_int(x) or v == int(v), f"{show(x)} = {v}"
                assert not is_bool(x) or v in (0, 1), f"{show(x)} = {v}"


@SYMBOLIC
@FEW
@given(data=st.data())
def test_digits_of_an_index_make_it_up_again(data, symbolic):
    with fresh_table():
        world = data.draw(worlds(symbolic))
        sizes = data.draw(st.permutations([world.T, world.K, world.E]))[: data.draw(st.integers(1, 3))]
        g = Grower(data.draw, world)
        try:
            e = g.index(prod(sizes), 2, world.free).simple
            parts = digits(e, sizes)
            again = mix(*[x for d, n in zip(parts, sizes) for x in (d, n)])
        except Refused:
            assume(False)
        assume(inside(e, prod(sizes)))
        for at in world.evaluator.assignments([v for v in world.free if v in e.free]):
            try:
                want = world.evaluator(e, at)
            except Undefined:
                continue
            assert world.evaluator(again, at) == want, f"{show(e)} in {sizes}: {[show(d) for d in parts]}"
            for d, n in zip(parts, sizes):
                assert 0 <= world.evaluator(d, at) < world.evaluator.size(n), show(d)


# ---------------------------------------------------------------- what is not known to be in range
def unknown(name="anything", values=(-1, 5, 2)):
    """An integer of unknown range, over a variable of its own."""
    source = leaf(name, torch.tensor(values))
    v = Var(len(values))
    return raw("load", source, v), v, Evaluator({source.nodes[0]: torch.tensor(values)})


@pytest.mark.parametrize("simplify", [idiv, mod])
def test_a_mixed_number_is_not_split_where_a_digit_may_exceed_its_radix(simplify):
    with fresh_table():
        d, v, ev = unknown()
        i = Var(4)
        whole = mix(i, 4, d, 3)
        got = simplify(whole, 3)
        for at in ev.assignments([i, v]):
            total = at[i] * 3 + ev(d, at)
            assert ev(got, at) == (total // 3 if simplify is idiv else total % 3)


def test_an_equation_with_a_number_is_not_split_where_a_digit_may_exceed_its_radix():
    with fresh_table():
        d, v, ev = unknown()
        i = Var(4)
        test = eq(mix(i, 4, d, 3), const(5))
        assert [ev(test, at) for at in ev.assignments([i, v])] == [int(at[i] * 3 + ev(d, at) == 5) for at in ev.assignments([i, v])]


def test_an_index_of_unknown_range_keeps_its_quotient_and_remainder():
    with fresh_table():
        d, _, _ = unknown()
        assert (idiv(d, 7).op, mod(d, 7).op, bounds(d)) == ("idiv", "mod", None)
        assert not inside(d, 100)


def test_a_negative_digit_reaches_below_zero():
    with fresh_table():
        i = Var(3)
        shifted = add(i, const(-1))
        assert bounds(shifted) == (-1, 2)
        assert not inside(shifted, 3)
        assert bounds(idiv(shifted, 2)) == (-1, 1)
        assert mod(shifted, 3).op == "mod"


def test_permutation_and_inverse_cancel_only_for_the_same_sort():
    with fresh_table():
        t = Var(4)
        a = make_order([t], raw("load", leaf("a", torch.arange(4)), t))
        b = make_order([t], raw("load", leaf("b", torch.arange(4)), t))
        r = Var(4)
        assert perm(a, inv(a, r)) is r
        assert inv(a, perm(a, r)) is r
        assert perm(a, inv(b, r)).op == "perm"
        assert inv(b, perm(a, r)).op == "inv"


def test_a_sort_of_the_same_key_is_the_same_permutation_and_of_another_is_not():
    with fresh_table():
        source = leaf("ids", torch.zeros(3, 2, dtype=torch.int64), (0, 4))
        t, k, s, j = Var(3), Var(2), Var(3), Var(2)
        first = make_order([t, k], raw("load", source, t, k))
        assert make_order([s, j], raw("load", source, s, j)) is first
        assert make_order([j, s], raw("load", source, s, j)) is not first  # slot-major
        assert make_order([s], raw("load", source, s, ZERO)) is not first


def test_a_selection_needs_an_index_in_range_or_parts_that_are_equal():
    with fresh_table():
        i, x = Var(2), Var(5)
        assert sel(const(1), ZERO, x) is x
        assert sel(i, x, x) is x
        assert sel(i, ZERO, x).op == "sel"


def test_nothing_is_below_the_smallest_key_only_where_that_is_known():
    with fresh_table():
        t = Var(3)
        known = make_order([t], raw("load", leaf("ids", torch.zeros(3, dtype=torch.int64), (0, 4)), t))
        other = make_order([t], raw("load", leaf("keys", torch.zeros(3, dtype=torch.int64)), t))
        assert below(known, ZERO) is ZERO
        assert below(known, const(-1)) is ZERO
        assert below(known, ONE).op == "below"
        assert below(other, ZERO).op == "below"  # keys may be negative: slots of no expert


def test_the_range_of_an_enumerated_coordinate_is_its_dimension():
    with fresh_table():
        t, k = Var(SYMBOL), Var(2)
        r = Var(None, Enum(((t, k), (Var(3),)), eq(t, const(1))))
        assert bounds(raw("coord", r, 0)) == (0, 2 * SYMBOL)
        assert bounds(raw("coord", r, 1)) == (0, 3)
        assert bounds(r) is None


# ---------------------------------------------------------------- extents
EXTENTS = [1, 2, 3, 6, SYMBOL, OTHER, 2 * SYMBOL, 6 * SYMBOL, SYMBOL * OTHER, SYMBOL + 1, SYMBOL * (SYMBOL + 1), SYMBOL // 2]


def at(size, s0, s1):
    return size if isinstance(size, int) else sympy.sympify(size).subs({SYMBOL: s0, OTHER: s1})


@pytest.mark.parametrize("a", EXTENTS, ids=str)
def test_proofs_about_extents_hold_for_every_number(a):
    for b in EXTENTS:
        q, product, less = quotient(a, b), prod([a, b]), at_most(a, b)
        for s0, s1 in itertools.product(range(1, 7), (1, 2, 3)):
            x, y = at(a, s0, s1), at(b, s0, s1)
            assert at(product, s0, s1) == x * y
            assert q is None or (at(q, s0, s1) * y == x and at(q, s0, s1) % 1 == 0), f"{a} / {b} is not {q} for {s0}"
            assert not less or x <= y


def test_extents_that_are_not_known_prove_nothing():
    assert prod([2, None]) is None
    assert (quotient(None, 2), quotient(4, None), at_most(None, 4), at_most(2, None)) == (None, None, False, False)


def test_different_symbols_are_different_extents():
    assert quotient(SYMBOL, OTHER) is None
    assert not at_most(SYMBOL, OTHER)
    assert not at_most(SYMBOL, 0)
    assert not at_most(3, SYMBOL)  # there may be fewer tokens
    assert at_most(SYMBOL, 2 * SYMBOL)


def test_values_compare_close_in_the_tests_own_evaluator():
    assert close(float("nan"), float("nan"))
    assert not close(1.0, 1.001)
