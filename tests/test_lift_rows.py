"""Rules in concert: each function of row_cases.py is traced to functional ATen, lifted, and compared with what it computes."""

from __future__ import annotations

import pytest
import row_cases as cases
import torch
from lifting import traced
from row_cases import NEAR, OPENED, numbers, routed

from moe_compile.passes.lift.expr import Refused, fresh_table, subexprs


def lifted(fn, *inputs) -> tuple[bool, str | None]:
    """(is the result a formula of the inputs, how it is wrong)"""
    with fresh_table():
        p, out = traced(fn, *inputs)
        try:
            return p.opened(out), p.error(out)
        except Refused:  # data-dependent rows cannot be a leaf
            return False, None


def run(fn, ids):
    if "grouped" in fn.__name__:  # small whole numbers: products are exact in bfloat16
        return lifted(fn, ids, *[(numbers(*s) * 2).round().bfloat16() for s in ((cases.T, 8), (cases.E, 8, 8))])
    x, w = numbers(cases.T, cases.H), numbers(cases.T, cases.K, seed=2)
    return lifted(fn, ids, x, w) if fn.__code__.co_argcount == 3 else lifted(fn, ids, x)


NEEDS_DISTINCT = {
    "masked_assignment",
    "dense_weights",
    "dense_softmax",
    "gathered_again",
    "dense_weights_renormalised",
    "rows_of_a_mask_summed",
    "rows_replaced_in_a_masked_copy",
    "rows_sorted_by_expert",
    "rows_sorted_by_expert_from_the_sorted_table",
    "rows_sorted_by_their_column",
}


@pytest.mark.parametrize("name", OPENED)
def test_is_opened_and_right(name):
    assert run(OPENED[name], routed()) == (True, None)


@pytest.mark.parametrize("name", OPENED)
def test_is_right_where_ids_may_repeat(name):
    """A fact of topk that does not hold here: what needs it stays closed."""
    is_open, error = run(OPENED[name], routed(distinct=False, seed=3))
    assert error is None
    assert is_open or name in NEEDS_DISTINCT


@pytest.mark.parametrize("sizes", [(1, 2), (3, 1)], ids=["one_token", "one_slot"])
@pytest.mark.parametrize("name", OPENED)
def test_is_right_for_one_token_and_for_one_slot(name, sizes, monkeypatch):
    for size, n in zip("TKN", (*sizes, sizes[0] * sizes[1])):
        monkeypatch.setattr(cases, size, n)
    assert run(OPENED[name], routed())[1] is None


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("distinct", [True, False])
def test_near_miss_has_its_own_meaning_or_none(name, distinct):
    assert run(NEAR[name], routed(distinct, seed=5))[1] is None


# ---------------------------------------------------------------- integers without a range
def test_running_counts_of_ids_that_may_be_negative_are_not_offsets():
    """Slots of no expert sort first, and no counted expert holds them."""
    keys = torch.tensor([-1, 0, 2, 1, -1, 0])

    def fn(ids, keys):
        return (keys[:, None] == torch.arange(3)).sum(0).cumsum(0)

    assert lifted(fn, routed(), keys)[1] is None

    def starts(ids, keys):
        return torch.searchsorted(keys.sort(stable=True).values, torch.arange(3))[0]

    assert lifted(starts, routed(), keys)[1] is None


def test_rows_chosen_by_integers_of_unknown_range_stay_closed():
    is_open, error = lifted(lambda ids, x, at: x[at], routed(), numbers(cases.T, cases.H), torch.tensor([-1, 0, 3]))
    assert not is_open
    assert error is None


def test_the_sum_of_two_sorts_of_the_same_ids_is_not_one_permutation():
    """An unstable sort may break ties otherwise than a stable one."""

    def fn(ids, x):
        a, b = ids.flatten().argsort(stable=True), ids.flatten().sort().indices
        return x[a // cases.K] + x[b // cases.K]

    is_open, error = lifted(fn, routed(), numbers(cases.T, cases.H))
    assert not is_open
    assert error is None


@pytest.mark.parametrize("training", [True, False])
def test_no_grad_is_part_of_the_meaning_in_training(training):
    with fresh_table():
        p, out = traced(lambda ids, x: (x.detach() * 2).sum(), routed(), numbers(cases.T, cases.H), training=training)
        ops = {e.op for e in subexprs(p.interp.value(out).expr)}
    assert ("stop" in ops) == training
