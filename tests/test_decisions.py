"""Where a graph chooses experts: every spelling of a top-k, and what it makes sure of."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from blocks import CAPTURE, graph_of, node
from torch import Tensor, nn
from torch.fx import Graph

from moe_compile.capture import FLAGS
from moe_compile.passes.decisions import (
    among_pairs,
    callee,
    chosen_by_caller,
    decisions,
    feeds,
    returns_itself,
    tensor_of,
    window_end,
    writes_in_place,
    writes_to,
    written,
)

TOKENS, EXPERTS = 5, 6


def found(fn, *args, dynamic=False):
    """(range, distinct) of each decision of a function of the scores [T, E]."""
    args = args or (torch.randn(TOKENS, EXPERTS),)
    return [d.facts for d in decisions(graph_of(fn, *args, dynamic=dynamic).graph)]


SPELLINGS = {
    "topk": lambda s: torch.topk(s, 2).indices,
    "topk_method": lambda s: s.topk(2)[1],
    "topk_last_dim": lambda s: s.topk(2, dim=-1)[1],
    "topk_keyword": lambda s: torch.topk(input=s, k=2, dim=1).indices,
    "topk_smallest": lambda s: s.topk(2, largest=False)[1],
    "sort": lambda s: s.sort(dim=-1, descending=True).indices[:, :2],
    "sort_function": lambda s: torch.sort(s, descending=True)[1],
    "stable_sort": lambda s: torch.sort(s, stable=True, dim=-1)[1],
    "argsort": lambda s: torch.argsort(s, dim=-1, descending=True),
    "argsort_method": lambda s: s.argsort(1),
}
SINGLE = {
    "max": lambda s: torch.max(s, dim=-1).indices,
    "max_method": lambda s: s.max(-1)[1],
    "max_keepdim": lambda s: s.max(1, keepdim=True)[1],
    "min": lambda s: s.min(dim=1)[1],
    "argmax": lambda s: s.argmax(-1),
    "argmax_function": lambda s: torch.argmax(s, dim=-1, keepdim=True),
    "argmin": lambda s: torch.argmin(s, 1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_chosen_slots_are_in_range_and_distinct(name):
    assert found(SPELLINGS[name]) == [((0, EXPERTS), True)]


@pytest.mark.parametrize("name", SINGLE)
def test_one_choice_a_token_is_in_range_and_nothing_more(name):
    """Two of them side by side may be the same expert."""
    assert found(SINGLE[name]) == [((0, EXPERTS), False)]


def test_a_choice_of_tokens_is_not_distinct_along_the_slots():
    assert found(lambda s: s.topk(2, dim=0)[1]) == [((0, TOKENS), False)]


def test_a_choice_of_tokens_out_of_an_unknown_number_is_none():
    x, gate = torch.randn(TOKENS, EXPERTS), nn.Linear(EXPERTS, EXPERTS)
    assert found(lambda x: gate(x).topk(2, dim=0)[1], x, dynamic=True) == []
    assert found(lambda x: gate(x).topk(2, dim=1)[1], x, dynamic=True) == [((0, EXPERTS), True)]


NONE = {
    "values_only": lambda s: s.topk(2).values,
    "larger_of_two_tensors": lambda s: torch.max(s, s.flip(0))[1],
    "larger_of_two_tensors_method": lambda s: s.max(s * 2)[1],
    "sorted_integers": lambda s: (s > 0).long().sort(dim=-1)[1],
    "argmax_of_everything": lambda s: s.argmax() + 0 * s.sum(),
    "unused": lambda s: (s.topk(2), s)[1],
    "split": lambda s: s.split(2, dim=1)[1],
    "median": lambda s: s.median(dim=-1)[1],
}


@pytest.mark.parametrize("name", NONE)
def test_is_no_decision(name):
    assert found(NONE[name]) == []


def test_decisions_come_in_program_order():
    both = found(lambda s: (s.argmax(-1), s.topk(3)[1]))
    assert both == [((0, EXPERTS), False), ((0, EXPERTS), True)]


# ---------------------------------------------------------------- steps of one router
def grouped(s: Tensor) -> Tensor:
    """The choice of groups masks the scores of the choice of experts."""
    groups = s.view(-1, 3, 2).amax(-1).topk(2)[1]
    mask = torch.zeros(s.shape[0], 3).scatter_(1, groups, 1.0)
    return s.masked_fill(mask.repeat_interleave(2, 1) == 0, float("-inf")).topk(2)[1]


def masked_in_place(s: Tensor) -> Tensor:
    first = s.argmax(-1, keepdim=True)
    rest = s.clone()
    rest.scatter_(1, first, float("-inf"))
    return torch.cat([first, rest.argmax(-1, keepdim=True)], -1)


@pytest.mark.parametrize("fn", [grouped, masked_in_place], ids=lambda f: f.__name__)
def test_a_step_of_a_router_feeds_the_next(fn):
    a, b = decisions(graph_of(fn, torch.randn(TOKENS, EXPERTS)).graph)
    assert feeds(a, b)
    assert not feeds(b, a)


def product_keys(s: Tensor, table: Tensor) -> Tensor:
    (a, b), (i, j) = s.view(2, -1, EXPERTS).topk(3, -1)
    best = (a.unsqueeze(-1) + b.unsqueeze(-2)).flatten(-2).topk(2, -1)[1]
    return table[(i.unsqueeze(-1) * 3 + j.unsqueeze(-2)).flatten(-2).gather(-1, best)]


def groups(s: Tensor, table: Tensor) -> Tensor:
    """The numbers are the experts' own; groups only leave some out."""
    kept = torch.zeros(TOKENS * 2, 2).scatter(1, s.view(-1, 2, EXPERTS // 2).amax(-1).topk(1)[1], 1.0)
    return table[(s * kept.repeat_interleave(EXPERTS // 2, 1)).topk(2)[1]]


def rows_of_what_is_computed(s: Tensor, table: Tensor) -> Tensor:
    """As where a sparse attention chooses tokens among those of chosen blocks: no table."""
    blocks = s.topk(3, -1)[1]
    return (table * 2)[blocks.gather(-1, s[:, :3].topk(2)[1])]


@pytest.mark.parametrize(("fn", "pairs"), [(product_keys, True), (groups, False), (rows_of_what_is_computed, False)])
def test_product_keys_are_known_by_what_their_numbers_are_made_of(fn, pairs):
    first, second = decisions(graph_of(fn, torch.randn(TOKENS * 2, EXPERTS), torch.randn(24, 4)).graph)
    assert among_pairs(second, [first]) == pairs


@pytest.mark.parametrize(("numbers", "caller"), [((0, 1, 2), True), ((0,), False), ((5, 7), False)])
def test_experts_that_the_caller_chooses(numbers, caller):
    """A tensor of integers that is given is compared with 0, 1, ...: not so token ids, that are compared with those of some tokens."""

    def fn(x: Tensor, which: Tensor) -> Tensor:
        return sum(x * (which.view(-1, 1) == i) for i in numbers)

    found = chosen_by_caller(graph_of(fn, torch.randn(4, 3), torch.arange(4)).graph)
    assert (found is not None) == caller


def test_a_layer_between_two_decisions_separates_them():
    def fn(s, w):
        hot = F.one_hot(s.topk(2)[1], EXPERTS).sum(1).float()
        return F.linear(hot, w).topk(2)[1]

    a, b = decisions(graph_of(fn, torch.randn(TOKENS, EXPERTS), torch.randn(EXPERTS, EXPERTS)).graph)
    assert not feeds(a, b)


def test_a_window_ends_where_the_next_decision_is_made_after_the_first_use():
    def fn(s):
        a = s.topk(2)[1]
        b = (s * 2).argmax(-1)  # before a is used: side by side
        y = s.gather(1, a).sum(-1) + b
        return y + (y[:, None] * s).argmax(-1)

    a, b, c = decisions(graph_of(fn, torch.randn(TOKENS, EXPERTS)).graph)
    assert window_end(a, [b, c]) is c.source
    assert window_end(b, [c]) is c.source
    assert window_end(c, []) is None


# ---------------------------------------------------------------- writes
@torch.library.custom_op("moe_compile_tests::overwrite", mutates_args={"target", "others"})
def overwrite(x: Tensor, target: Tensor, others: list[Tensor]) -> None:
    target.copy_(x)


overwrite.register_fake(lambda x, target, others: None)


def ids_then(change):
    """A choice of experts, changed or not by `change(ids, scores)`."""

    def fn(s):
        ids = s.topk(2)[1]
        change(ids, s)
        return ids + 0

    gm = graph_of(fn, torch.randn(TOKENS, EXPERTS))
    return decisions(gm.graph)[0], gm.graph


CHANGES = {
    "method": lambda ids, s: ids.add_(1),
    "setitem": lambda ids, s: ids.__setitem__((slice(None), 1), 0),
    "view": lambda ids, s: ids.view(-1)[::2].zero_(),
    "augmented": lambda ids, s: operator.iadd(ids, 1),
    "dunder": lambda ids, s: ids.__iadd__(1),
    "foreach": lambda ids, s: torch._foreach_minimum_([ids], 1),
    "inplace_argument": lambda ids, s: F.relu(ids, inplace=True),
    "inplace_position": lambda ids, s: F.threshold(ids, 1, 0, True),
    "out": lambda ids, s: torch.add(ids, 1, out=ids),
    "custom_op": lambda ids, s: overwrite(ids + 1, ids, []),
    "custom_op_list": lambda ids, s: overwrite(s, s.clone(), [ids]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_ids_that_somebody_writes_to_are_known_as_written(name):
    assert written(*ids_then(CHANGES[name]))


@pytest.mark.parametrize("name", ["read", "copy_written"])
def test_ids_that_are_only_read_are_not(name):
    change = {"read": lambda ids, s: s.gather(1, ids), "copy_written": lambda ids, s: ids.clone().add_(1)}[name]
    assert not written(*ids_then(change))


@pytest.mark.parametrize("name", ["add", "__add__", "view", "__getitem__", "index_add"])
def test_names_that_do_not_write(name):
    g = Graph()
    x = g.placeholder("x")
    n = g.call_method(name, (x, 1))
    assert not writes_in_place(n)
    assert writes_to(n) == []


@pytest.mark.parametrize("name", ["add_", "index_add_", "copy_", "zero_", "masked_fill_"])
def test_names_that_write_and_return_what_they_wrote(name):
    g = Graph()
    x = g.placeholder("x")
    n = g.call_method(name, (x,))
    assert returns_itself(n)
    assert writes_to(n) == [x]


def test_an_op_is_called_by_one_name_however_it_is_spelled():
    g = Graph()
    x = g.placeholder("x")
    spellings = [g.call_method("topk", (x, 2)), g.call_function(torch.topk, (x, 2)), g.call_function(torch.ops.aten.topk.default, (x, 2))]
    assert {callee(n) for n in spellings} == {"topk"}
    assert callee(x) == ""
    assert tensor_of(x) is None
    assert tensor_of(3) is None


def test_capture_flags_are_those_of_the_front_door():
    """The helpers of these tests trace as moe_compile.compile does."""
    assert set(CAPTURE) == set(FLAGS)


def test_the_node_of_a_decision_is_the_indices():
    gm = graph_of(lambda s: s.topk(2)[1] + 1, torch.randn(TOKENS, EXPERTS))
    (d,) = decisions(gm.graph)
    assert d.source is node(gm, "topk")
    assert tensor_of(d.ids).dtype == torch.int64
