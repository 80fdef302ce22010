"""Tensors on the abstract side: splitting dimensions, indexing, broadcasting; nothing is assumed of extents that are not proved."""

from __future__ import annotations

import math

import pytest
import torch
from evaluator import Evaluator
from expressions import FEW, OTHER, SYMBOL, leaf
from hypothesis import given
from hypothesis import strategies as st

from moe_compile.passes.lift.algebra import add, eq, mul
from moe_compile.passes.lift.expr import ONE, Enum, Refused, Var, const, fresh_table, raw
from moe_compile.passes.lift.index import mix
from moe_compile.passes.lift.value import Value, broadcast, common, index_of


@pytest.fixture(autouse=True)
def _own_table():
    with fresh_table():
        yield


def tensor_value(t, factors):
    """Value of a tensor whose dimensions are products of the given factors, and its evaluator."""
    source = leaf("x", t)
    dims = [tuple(Var(n) for n in d) for d in factors]
    return Value(dims, raw("load", source, *[index_of(d) for d in dims])), Evaluator({source.nodes[0]: t})


FACTORS = st.lists(st.lists(st.sampled_from([2, 3]), max_size=2), min_size=1, max_size=2)


@FEW
@given(factors=FACTORS)
def test_a_tensor_is_its_elements(factors):
    t = torch.randn([math.prod(d) for d in factors])
    with fresh_table():
        v, ev = tensor_value(t, factors)
        assert torch.equal(ev.tensor(v).float(), t)
        assert torch.equal(ev.tensor(v.renamed()).float(), t)
        assert not set(v.renamed().vars()) & set(v.vars())


@FEW
@given(factors=FACTORS, data=st.data())
def test_splitting_a_dimension_changes_nothing(factors, data):
    t = torch.randn([math.prod(d) * 4 for d in factors])
    i = data.draw(st.integers(0, len(factors) - 1))
    with fresh_table():
        v, ev = tensor_value(t, [[*d, 4] for d in factors])
        finer = tuple(n for m in v.sizes(i) for n in ((2, 2) if m == 4 else (m,)))
        w = v.refine(i, finer)
        assert w.sizes(i) == finer
        assert torch.equal(ev.tensor(w).float(), t)


@FEW
@given(data=st.data())
def test_reading_at_an_index(data):
    factors = data.draw(st.sampled_from([[2, 3], [6], [3, 2]]))
    t, at = torch.randn(6, 2), data.draw(st.integers(0, 5))
    with fresh_table():
        v, ev = tensor_value(t, [factors, [2]])
        row = Value(v.dims[1:], v.at(0, const(at)))
        assert torch.equal(ev.tensor(row).float(), t[at])
        i = Var(3)
        step = Value([(i,), *v.dims[1:]], v.at(0, mix(i, 3, const(at % 2), 2)))
        assert torch.equal(ev.tensor(step).float(), t[at % 2 :: 2])


SHAPES = [((3, 4), (4,)), ((3, 1), (1, 4)), ((1,), (2, 3)), ((), (2, 3)), ((2, 1, 3), (4, 1)), ((6, 2), (6, 1)), ((1, 1), (1,))]


@pytest.mark.parametrize(("a", "b"), SHAPES, ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_broadcasting_is_torchs(a, b, swap):
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((b, a) if swap else (a, b))]
    parts = [tensor_value(t, [[n] if n != 1 else [] for n in t.shape]) for t in tensors]
    dims, (x, y) = broadcast(*[v for v, _ in parts])
    ev = Evaluator({k: t for _, e in parts for k, t in e.tensors.items()})
    torch.testing.assert_close(ev.tensor(Value(dims, add(x, y))), tensors[0] + tensors[1])


def test_broadcasting_splits_to_common_factors():
    s, t = torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    (a, ea), (b, eb) = tensor_value(s, [[2, 6]]), tensor_value(t, [[4, 3]])
    dims, (x, y) = broadcast(a, b)
    assert tuple(v.size for v in dims[0]) == (2, 2, 3)
    torch.testing.assert_close(Evaluator({**ea.tensors, **eb.tensors}).tensor(Value(dims, mul(x, y))), s * t)


def test_a_vector_against_itself_is_an_outer_product():
    """One variable lent to two dimensions must not become the diagonal."""
    t = torch.randn(3, dtype=torch.float64)
    v, ev = tensor_value(t, [[3]])
    dims, (x, y) = broadcast(Value((*v.dims, ()), v.expr), Value(((), *v.dims), v.expr))
    torch.testing.assert_close(ev.tensor(Value(dims, mul(x, y))), t[:, None] * t[None])


def test_numbers_broadcast_to_anything():
    t = torch.randn(2, 3, dtype=torch.float64)
    v, ev = tensor_value(t, [[2], [3]])
    dims, (x, y) = broadcast(2.5, v)
    torch.testing.assert_close(ev.tensor(Value(dims, mul(x, y))), t * 2.5)


# ---------------------------------------------------------------- extents
SIZES = [
    (2, 3), (6,), (3, 2), (SYMBOL,), (SYMBOL, 2), (2, SYMBOL), (2 * SYMBOL,), (OTHER,), (SYMBOL * OTHER,), (SYMBOL, OTHER), (SYMBOL + 1,),
]  # fmt: skip


def extents(sizes, s0, s1):
    return [n if isinstance(n, int) else int(n.subs({SYMBOL: s0, OTHER: s1})) for n in sizes]


@pytest.mark.parametrize("a", SIZES, ids=str)
def test_common_factors_refine_both_sides_for_every_number_of_tokens(a):
    for b in SIZES:
        try:
            found = common(a, b)
        except Refused:
            continue
        for s0, s1 in ((2, 3), (3, 2), (5, 7), (4, 4)):
            mine = extents(found, s0, s1)
            assert math.prod(mine) == math.prod(extents(a, s0, s1)) == math.prod(extents(b, s0, s1))
            for side in (a, b):
                assert _strides(extents(side, s0, s1)) <= _strides(mine), f"{side} is not made of {found}"


def _strides(sizes):
    return {math.prod(sizes[i:]) for i in range(len(sizes))}


@pytest.mark.parametrize(
    ("a", "b"),
    [((SYMBOL,), (OTHER,)), ((6,), (4,)), ((2, 3), (3, 2)), ((SYMBOL, 2), (2, SYMBOL)), ((SYMBOL + 1,), (2, SYMBOL)), ((SYMBOL,), (4,))],
    ids=str,
)
def test_extents_that_are_not_proved_equal_are_refused(a, b):
    """(2, 3) and (3, 2) have the same product and other digits; different symbols may be equal today and not tomorrow."""
    with pytest.raises(Refused):
        common(a, b)


def test_a_dimension_of_symbolic_extent_splits_by_a_number_that_divides_it():
    v, _ = tensor_value(torch.zeros(1), [[1]])
    t = Value([(Var(2 * SYMBOL),)], v.expr)
    assert t.refine(0, (SYMBOL, 2)).sizes(0) == (SYMBOL, 2)
    with pytest.raises(Refused):
        Value([(Var(SYMBOL),)], v.expr).refine(0, (SYMBOL, 2))


# ---------------------------------------------------------------- rows that depend on data
def rows_of(source, value):
    t = Var(4)
    return Var(None, Enum(((t,),), eq(raw("load", source, t), const(value))))


def test_rows_of_one_mask_are_the_rows_of_the_same_mask():
    ids = leaf("ids", torch.tensor([0, 1, 1, 0]), (0, 2))
    a, b = (Value([(r := rows_of(ids, 1),)], raw("coord", r, 0)) for _ in range(2))
    dims, (x, y) = broadcast(a, b)
    assert x is y
    assert torch.equal(Evaluator({ids.nodes[0]: torch.tensor([0, 1, 1, 0])}).tensor(Value(dims, x)), torch.tensor([1.0, 2.0]).double())


def test_rows_of_different_masks_are_not_added_even_if_there_are_as_many():
    ids = leaf("ids", torch.tensor([0, 1, 1, 0]), (0, 2))
    a, b = (Value([(r := rows_of(ids, e),)], raw("coord", r, 0)) for e in (0, 1))
    with pytest.raises(Refused, match="same rows"):
        broadcast(a, b)


def test_data_dependent_rows_are_not_merged_with_another_dimension():
    with pytest.raises(Refused, match="data-dependent"):
        common((None, 2), (None, 3))
    r = rows_of(leaf("ids", torch.zeros(4, dtype=torch.int64), (0, 2)), 1)
    with pytest.raises(Refused, match="data-dependent"):
        Value([(r, Var(2))], ONE).at(0, const(0))
