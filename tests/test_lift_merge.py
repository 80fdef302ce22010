"""E unrolled experts become one expression of the id: only what is alike but for the expert, and every expert exactly once."""

from __future__ import annotations

import pytest
import torch
from evaluator import Evaluator, Undefined, close
from expressions import FEW, Grower, Stub, leaf, worlds
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_compile.passes.lift.algebra import add, eq, mul, negate, sum_, unary, where
from moe_compile.passes.lift.expr import ONE, ZERO, Expr, Leaf, Refused, Var, const, fresh_table, raw, show
from moe_compile.passes.lift.index import mix
from moe_compile.passes.lift.merge import Merger, select
from moe_compile.passes.lift.normal import fold_where, gather_experts, merge_selects, resolve


@pytest.fixture(autouse=True)
def _own_table():
    with fresh_table():
        yield


class Layer:
    """E = 3 experts on x [T=2, H=2], ids [T, K=2] and weights [T, K]; `w[e]` [H, H] a tensor each, `slab` [E, H, H] all in one."""

    def __init__(self, ids=((0, 2), (1, 0)), distinct=True, experts=3):
        g = torch.Generator().manual_seed(1)
        self.E, self.tensors = experts, {}
        self.ids = self.leaf("ids", torch.tensor(ids), (0, experts), distinct)
        self.gate = self.leaf("gate", torch.rand(2, 2, generator=g, dtype=torch.float64))
        self.x = self.leaf("x", torch.randn(2, 2, generator=g, dtype=torch.float64))
        self.w = [self.leaf(f"w{e}", torch.randn(2, 2, generator=g, dtype=torch.float64)) for e in range(experts)]
        self.slab = self.leaf("slab", torch.randn(experts, 2, 2, generator=g, dtype=torch.float64))
        self.t, self.o = Var(2), Var(2)

    def leaf(self, name, tensor, range=None, distinct=False):
        found = leaf(name, tensor, range, distinct)
        self.tensors[found.nodes[0]] = tensor
        return found

    def linear(self, e, x=None):
        i = Var(2)
        row = raw("load", self.x, self.t, i) if x is None else x(i)
        weight = self.w[e] if isinstance(e, int) else self.slab
        at = (self.o, i) if isinstance(e, int) else (e, self.o, i)
        return sum_(i, mul(row, raw("load", weight, *at)))

    def arm(self, e, f=None):
        """sum_k [ids[t, k] = e] gate[t, k] f_e(x[t])"""
        k = Var(2)
        test = eq(raw("load", self.ids, self.t, k), const(e))
        return sum_(k, mul(test, raw("load", self.gate, self.t, k), unary("silu", self.linear(e) if f is None else f(e))))

    def same(self, a: Expr, b: Expr, free=()):
        """Equal at every token and output feature; stacked leaves are the experts' tensors in order."""
        ev = Evaluator(self.tensors)
        for at in ev.assignments([self.t, self.o, *free]):
            assert close(ev(a, at), ev(b, at)), f"{show(a)}  ->  {show(b)}"
        return True


# ---------------------------------------------------------------- anti-unification
def test_alike_experts_are_one_expression_of_the_index():
    m, which = Layer(), Var(3)
    parts = tuple(unary("silu", m.linear(e)) for e in range(3))
    one = Merger(which).merge(parts)
    ev = Evaluator(m.tensors)
    for at in ev.assignments([which, m.t, m.o]):
        assert close(ev(one, at), ev(parts[at[which]], at))


def test_slices_of_one_tensor_are_indexed():
    m = Layer()
    i = Var(3)
    one = select(i, *[raw("load", m.slab, const(e), m.o, m.t) for e in range(3)])
    assert one is raw("load", m.slab, i, m.o, m.t)


@pytest.mark.parametrize("numbers", [(0, 1, 3), (1, 2, 3), (0, 2, 1), (0.0, 1.0, 2.0), (0.5, 0.5, 0.25)], ids=str)
def test_experts_that_differ_in_a_constant_are_not_merged(numbers):
    m = Layer()
    with pytest.raises(Refused, match="constant"):
        Merger(Var(3)).merge(tuple(raw("mul", const(c), raw("load", m.x, m.t, m.o)) for c in numbers))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.linear(2, lambda i: raw("load", m.x, i, m.t)),  # rows and features swapped
        lambda m: unary("relu", m.linear(2)),
        lambda m: raw("load", m.w[2], m.o, m.t),
        lambda m: sum_(k := Var(3), mul(raw("load", m.w[2], m.o, ZERO), eq(k, m.t), raw("load", m.x, m.t, ZERO))),
        lambda m: raw("sum", k := Var(3), mul(raw("load", m.x, m.t, k), raw("load", m.w[2], m.o, k))),
        lambda m: raw("cast", m.linear(2), torch.bfloat16),
    ],
    ids=["transposed", "activation", "no_sum", "other_sum", "extent", "cast"],
)
def test_an_expert_of_another_form_is_not_merged(change):
    m = Layer()
    with pytest.raises(Refused):
        Merger(Var(3)).merge((m.linear(0), m.linear(1), change(m)))


def test_weights_of_different_shape_are_not_stacked():
    m = Layer()
    odd = m.leaf("odd", torch.zeros(2, 4))
    with pytest.raises(Refused, match="size"):
        Merger(Var(2)).merge((raw("load", m.w[0], m.t, m.o), raw("load", odd, m.t, m.o)))


@FEW
@given(data=st.data())
def test_a_selection_of_anything_keeps_its_meaning(data):
    """`select` merges what it can; parts that share structure by accident must not be confused."""
    with fresh_table():
        world = data.draw(worlds())
        g = Grower(data.draw, world)
        try:
            base = g.scalar(2, world.free).simple
            n = data.draw(st.integers(2, 3))
            parts = [_vary(g, base, c) if data.draw(st.booleans()) else g.scalar(1, world.free).simple for c in range(n)]
            i = g.index(n, 1, world.free).simple
            got = select(i, *parts)
        except Refused:
            assume(False)
        for at in world.evaluator.assignments(world.free):
            try:
                want = world.evaluator(raw("sel", i, *parts), at)
            except Undefined:
                continue
            assert close(world.evaluator(got, at), want), f"{[show(p) for p in parts]} [{show(i)}]: {show(got)}"


def _vary(g, base, c):
    """The same expression but for a number, or for the tensor that it reads."""
    number = const(g.one_of([c, 0, 1, 0.5]))
    return g.one_of([lambda: add(base, number), lambda: mul(base, number), lambda: raw("mul", number, base)])()


# ---------------------------------------------------------------- the sum over experts
def test_a_sum_over_all_experts_is_a_selection_by_the_id():
    m = Layer()
    total = add(*[m.arm(e) for e in (2, 0, 1)])
    found, rest = gather_experts(total)
    assert rest == []
    merged = merge_selects(found)
    assert not any(x.op == "sel" for x in _walk(merged))
    assert m.same(total, found)
    assert m.same(total, merged)


def _walk(e):
    yield e
    for a in e.args:
        if isinstance(a, Expr):
            yield from _walk(a)


def test_terms_beside_the_experts_are_left_over():
    m = Layer()
    residual = raw("load", m.x, m.t, m.o)
    found, rest = gather_experts(add(residual, *[m.arm(e) for e in range(3)]))
    assert rest == [residual]
    assert m.same(found, add(*[m.arm(e) for e in range(3)]))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ((0, 1), "expert 2 is missing"),
        ((0, 2), "expert 1 is missing"),
        ((0, 1, 1, 2), "expert 1 counts twice"),
        ((0, 1, 1), "missing; expert 1 counts twice"),
    ],
    ids=str,
)
def test_every_expert_counts_exactly_once(experts, message):
    m = Layer()
    with pytest.raises(Refused, match=message):
        gather_experts(add(*[m.arm(e) for e in experts]))


def test_experts_selected_by_ids_of_two_decisions_are_not_one_sum():
    m, other = Layer(), Layer()
    with pytest.raises(Refused):
        gather_experts(add(m.arm(0), m.arm(1), other.arm(2)))


def test_a_list_of_ids_that_are_not_a_decision_selects_nothing():
    m = Layer()
    k = Var(2)
    plain = m.leaf("numbers", torch.tensor([[0, 1], [1, 2]]))
    terms = [sum_(k, mul(eq(raw("load", plain, m.t, k), const(e)), m.linear(e))) for e in range(3)]
    assert gather_experts(add(*terms))[0] is None


def test_experts_that_differ_in_one_activation_are_refused():
    m = Layer()
    total = add(m.arm(0), m.arm(1), m.arm(2, lambda e: unary("relu", m.linear(e))))
    found, _ = gather_experts(total)
    assert m.same(total, found)
    with pytest.raises(Refused):
        merge_selects(found)


# ---------------------------------------------------------------- chains of where
def chain(m, tests, last=None):
    """where([id = a], f_a, where([id = b], f_b, ... last))"""
    ids = raw("load", m.ids, m.t, ZERO)
    e = const(7.0) if last is None else last
    for c in reversed(tests):
        e = where(eq(ids, const(c)), m.linear(c), e)
    return e


@pytest.mark.parametrize("tests", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 1, 2)], ids=str)
@pytest.mark.parametrize("last", [None, ZERO], ids=["number", "zeros"])
def test_a_chain_that_covers_every_id_is_a_selection(tests, last):
    m = Layer()
    e = chain(m, tests, last)
    assert m.same(e, fold_where(e))
    assert m.same(e, merge_selects(e))


@pytest.mark.parametrize("tests", [(0, 1), (0, 0, 1), (2,)], ids=str)
def test_a_chain_that_leaves_an_id_out_is_none(tests):
    m = Layer()
    assert fold_where(chain(m, tests)) is None


def test_a_chain_over_different_ids_is_none():
    m = Layer()
    first, second = raw("load", m.ids, m.t, ZERO), raw("load", m.ids, m.t, ONE)
    e = where(eq(first, ZERO), m.linear(0), where(eq(second, ONE), m.linear(1), where(eq(first, const(2)), m.linear(2), ONE)))
    assert fold_where(e) is None


# ---------------------------------------------------------------- inside one arm
def scattered(m, e, slots=2):
    """sum_k [ids[t, k] = e] gate[t, k] over the first `slots` slots: column e of the scattered weights"""
    k = Var(slots)
    return sum_(k, mul(eq(raw("load", m.ids, m.t, k), const(e)), raw("load", m.gate, m.t, k)))


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_inside_an_arm_the_scattered_weight_is_the_slots_own(slots, column):
    """In the arm where ids[t, k] = 1; over fewer slots than there are it may be nothing."""
    m = Layer(ids=((0, 1), (1, 2)))
    k = Var(2)
    part = mul(scattered(m, column, slots), m.linear(1))
    got, ev = resolve(part, raw("load", m.ids, m.t, k), 1), Evaluator(m.tensors)
    for at in ev.assignments([m.t, m.o, k]):
        if ev(raw("load", m.ids, m.t, k), at) == 1:
            assert close(ev(part, at), ev(got, at)), show(got)


def test_inside_an_arm_ids_that_may_repeat_are_all_summed():
    m = Layer(ids=((1, 1), (0, 1)), distinct=False)
    k = Var(2)
    part = scattered(m, 1)
    assert resolve(part, raw("load", m.ids, m.t, k), 1) is part


def test_inside_an_arm_the_column_of_another_token_is_not_the_slots_own():
    m = Layer()
    k, j, other = Var(2), Var(2), Var(2)
    part = sum_(j, mul(eq(raw("load", m.ids, other, j), ONE), raw("load", m.gate, other, j)))
    assert resolve(part, raw("load", m.ids, m.t, k), 1) is part


def test_dense_weights_times_dense_outputs_is_the_weighted_sum_over_slots():
    """sum_e gates[t, e] y_e with gates scattered: one sum over slots."""
    m = Layer()
    total = add(*[mul(scattered(m, e), m.linear(e)) for e in range(3)])
    found, rest = gather_experts(total)
    assert rest == []
    assert m.same(total, merge_selects(found))


def test_ids_in_a_merged_dimension_select_rows_of_the_flat_tensor():
    """[id * 2 + o] over a slab viewed as [E * 2, H]."""
    m = Layer()
    flat = m.leaf("flat", torch.randn(6, 2, dtype=torch.float64))
    k = Var(2)
    arms = [sum_(k, mul(eq(raw("load", m.ids, m.t, k), const(e)), raw("load", flat, mix(const(e), 3, m.o, 2), m.t))) for e in range(3)]
    found, _ = gather_experts(add(*arms))
    assert m.same(add(*arms), merge_selects(found))


def test_a_negated_test_is_no_arm():
    m = Layer()
    k = Var(2)
    others = sum_(k, mul(negate(eq(raw("load", m.ids, m.t, k), ZERO)), m.linear(1)))
    assert gather_experts(others)[0] is None


def test_a_leaf_of_several_nodes_reads_them_in_order():
    m, which = Layer(), Var(3)
    stacked = Leaf([m.w[e].nodes[0] for e in range(3)], (3, 2, 2))
    one = Merger(which).merge(tuple(raw("load", w, m.o, m.t) for w in m.w))
    assert one.args[0].nodes == stacked.nodes
    assert isinstance(one.args[0].nodes[0], Stub)
