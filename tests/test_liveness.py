"""Which nodes go when a block's value is computed otherwise: all that only led there, and nothing that anybody else can see."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, E, K, ReadBeforeWrite, T, block, graph_of, node, tokens
from torch.fx import Graph

from moe_compile.passes.decisions import callee, decisions
from moe_compile.passes.lift import fresh_table
from moe_compile.passes.liveness import is_assertion, same_storage
from moe_compile.passes.region import find_region
from moe_compile.passes.window import ambients, is_size


@contextlib.contextmanager
def region_of(module, *args, grad=False):
    """(graph, region) of the last decision of a module's graph."""
    gm = graph_of(module, *args, grad=grad)
    found = decisions(gm.graph)
    with fresh_table():
        yield gm, find_region(gm, found[-1], {d.ids: d for d in found}, None, ambients(gm.graph, grad)[found[-1].ids], grad)


def removed(region, *needed):
    return region.liveness.removable({region.target, *needed} - {None}, lambda n: n)


def names(nodes):
    return [callee(n) for n in nodes]


def with_masks(change=None, result=lambda out, masks: out):
    """A loop over one-hot masks made first; `change(self, masks, w, ids)` afterwards; `result` is returned."""

    def forward(self, x):
        w, ids = self.route(x)
        masks = F.one_hot(ids, E).bool()
        if change is not None:
            change(self, masks, w, ids)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(masks[..., e])
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return result(out, masks)

    return block(forward, load=torch.zeros(E))


def test_all_of_a_plain_loop_goes():
    with region_of(Block(), tokens()) as (gm, region):
        gone = set(removed(region))
        inside = [n for n in region.nodes if n not in gone and n is not region.root and n is not region.target]
        assert names(inside) == []
        assert not any(is_size(n) for n in gone)
        assert node(gm, "softmax") not in gone


def test_what_goes_can_be_erased_last_first():
    """No node that stays uses one that goes."""
    with region_of(with_masks(result=lambda out, masks: (out, masks.float().mean())), tokens()) as (_, region):
        gone = set(removed(region))
        assert all(u in gone or u is region.root for n in gone for u in n.users)


def test_what_the_new_code_reads_stays_with_all_it_needs():
    with region_of(with_masks(), tokens()) as (gm, region):
        hot = node(gm, "one_hot")
        assert hot in removed(region)
        assert hot not in removed(region, node(gm, "bool"))
        assert node(gm, "bool") not in removed(region, node(gm, "bool"))


def test_what_is_used_outside_stays_with_all_it_needs():
    with region_of(with_masks(result=lambda out, masks: (out, masks.float().mean((0, 1)))), tokens()) as (gm, region):
        gone = removed(region)
        assert node(gm, "one_hot") not in gone
        assert node(gm, "bool") not in gone
        assert node(gm, "silu") in gone


def test_writes_to_buffers_stay_with_all_they_need():
    count = lambda self, masks, w, ids: self.load.add_(torch.bincount(ids.flatten(), minlength=E))  # noqa: E731
    with region_of(with_masks(count), tokens()) as (gm, region):
        gone = removed(region)
        for name in ("add_", "bincount", "flatten"):
            assert node(gm, name) not in gone, name


def test_random_numbers_are_still_drawn():
    with region_of(with_masks(lambda self, masks, w, ids: torch.rand_like(w).mul_(2)), tokens()) as (gm, region):
        gone = removed(region)
        assert node(gm, "rand_like") not in gone
        assert node(gm, "mul_") in gone


def test_dropout_is_still_drawn():
    with region_of(with_masks(lambda self, masks, w, ids: F.dropout(w, 0.5, training=True)), tokens(), grad=True) as (gm, region):
        assert node(gm, "dropout") not in removed(region)


def test_a_write_to_something_that_nobody_sees_goes():
    with region_of(with_masks(lambda self, masks, w, ids: w.clone().zero_()), tokens()) as (gm, region):
        gone = removed(region)
        assert node(gm, "zero_") in gone
        assert node(gm, "clone") in gone


@pytest.mark.parametrize("read", [False, True])
def test_a_write_to_something_seen_outside_stays(read):
    """Also if the new code reads the value from before."""
    with region_of(ReadBeforeWrite(), tokens()) as (gm, region):
        h = node(gm, "cumprod")
        gone = removed(region, *([h] if read else []))
        assert h not in gone
        assert node(gm, "add_") not in gone
        assert region.liveness.changed_before_root(h, set(gone), lambda n: n)


def test_a_value_that_is_only_changed_by_what_goes_is_not_changed():
    with region_of(Block(), tokens()) as (_, region):
        gone = set(removed(region))
        assert not any(region.liveness.changed_before_root(n, gone, lambda n: n) for n in region.inputs)


def test_a_write_through_a_view_is_a_change():
    def forward(self, x):
        w, ids = self.route(x)
        h = x.cumprod(-1)
        masks = F.one_hot(ids, E).bool()
        h.view(-1)[:3].zero_()
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(masks[..., e])
            out.index_add_(0, tok, self.expert(h[tok], e) * w[tok, slot, None])
        return out, h

    with region_of(block(forward), tokens()) as (gm, region):
        assert region.liveness.changed_before_root(node(gm, "cumprod"), set(removed(region)), lambda n: n)


def test_switching_gradients_or_autocast_stays():
    def forward(self, x):
        w, ids = self.route(x)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            gates = torch.zeros(T, E).scatter(1, ids, w)
        return sum(gates[:, e, None] * self.expert(x, e) for e in range(E))

    with region_of(block(forward), tokens(), grad=True) as (_, region):
        gone = names(removed(region))
        assert "scatter" in gone
        assert not {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"} & set(gone)


def test_assertions_about_what_goes_go_with_it():
    with region_of(Block(), tokens()) as (_, region):
        about = [n for n in region.nodes if is_assertion(n)]
        gone = set(removed(region))
        assert all(n in gone for n in about)


def test_assertions_about_what_stays_stay():
    def forward(self, x):
        w, ids = self.route(x)
        hits = torch.nonzero(ids == 0)
        torch._check(hits.shape[0] <= T * K)
        return self.loop(x, w, ids), hits

    with region_of(block(forward), tokens()) as (_, region):
        gone = set(removed(region))
        for n in region.nodes:
            if is_assertion(n) and n in gone:
                assert any(a in gone for a in n.all_input_nodes)


# ---------------------------------------------------------------- memory
def placed(t):
    n = Graph().placeholder("x")
    n.meta["example_value"] = t
    return n


def test_views_share_memory_and_copies_do_not():
    x = torch.randn(4, 4)
    assert same_storage(placed(x), placed(x[1:].t()))
    assert not same_storage(placed(x), placed(x.clone()))


def test_what_is_not_known_is_assumed_to_share_memory():
    assert same_storage(Graph().placeholder("x"), placed(torch.randn(2)))
    assert same_storage(placed(torch.randn(2)), None)
