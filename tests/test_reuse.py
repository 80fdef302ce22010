"""Identical layers are lifted and validated once; what differs in anything that the analysis looks at is not identical."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Compared, E, H, K, ReadBeforeWrite, block, tokens
from torch import nn

RUN = sys.modules["moe_compile.passes.run"]


class Layers(nn.Module):
    """Blocks one after the other, with a tanh between."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@pytest.fixture
def lifts(monkeypatch):
    """The decisions that `find_region` was called for."""
    seen, find = [], RUN.find_region
    monkeypatch.setattr(RUN, "find_region", lambda gm, d, *args: (seen.append(d), find(gm, d, *args))[1])
    return seen


def other(forward=Block.forward, seed=7, **members) -> Block:
    """A block with weights of its own."""
    made, g = block(forward, **members), torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.4
    return made


def test_identical_layers_are_lifted_once(lifts):
    c = Compared(Layers(Block(), other(), other(seed=8)), tokens())
    assert (len(lifts), c.rewritten) == (1, 3)
    assert [bool(r.validation and r.validation.startswith("the same code")) for r in c.report.regions] == [False, True, True]


def test_identical_layers_are_lifted_once_in_training(lifts):
    c = Compared(Layers(Block(), other()), tokens(), grad=True)
    assert (len(lifts), c.rewritten) == (1, 2)


def test_identical_layers_are_lifted_once_with_symbolic_token_counts(lifts):
    c = Compared(Layers(Block(), other()), tokens(), dynamic=True)
    assert (len(lifts), c.rewritten) == (1, 2)
    c(tokens(5, count=4))


def scaled(by):
    def expert(self, x, e):
        return Block.expert(self, x, e) * by

    return expert


def clamped(hi):
    def expert(self, x, e):
        return F.linear(F.linear(x, self.up[e]).clamp(max=hi), self.down[e])

    return expert


def activated(f):
    def expert(self, x, e):
        return F.linear(f(F.linear(x, self.up[e])), self.down[e])

    return expert


DIFFERENT = {
    "a_factor": (scaled(2.0), scaled(3.0)),
    "an_integer_and_a_float": (scaled(2), scaled(2.5)),
    "a_limit": (clamped(0.5), clamped(0.25)),
    "an_activation": (activated(F.silu), activated(F.relu)),
    "an_argument_of_the_activation": (activated(F.gelu), activated(lambda y: F.gelu(y, approximate="tanh"))),
    "the_order_of_experts": (Block.expert, lambda self, x, e: Block.expert(self, x, E - 1 - e)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_layers_that_differ_in_one_constant_are_not_shared(what, lifts):
    a, b = DIFFERENT[what]
    Compared(Layers(block(Block.forward, expert=a), other(expert=b)), tokens())
    assert len(lifts) == 2


def flipped(self, x):
    w, ids = self.route(x)
    return self.loop(x, w.flip(-1), ids)


def fewer_slots(self, x):
    w, ids = F.linear(x, self.gate).softmax(-1).topk(1, dim=-1)
    return self.loop(x, w, ids)


def half(self, x):
    return Block.forward(self, x.bfloat16().float())


@pytest.mark.parametrize("forward", [flipped, fewer_slots], ids=lambda f: f.__name__)
def test_layers_that_differ_in_their_routing_are_not_shared(forward, lifts):
    Compared(Layers(Block(), other(forward)), tokens())
    assert len(lifts) == 2


def test_what_stands_before_the_routing_does_not_matter(lifts):
    c = Compared(Layers(Block(), other(half)), tokens())
    assert (len(lifts), c.rewritten) == (1, 2)


def test_layers_of_another_size_are_not_shared(lifts):
    wide = other()
    wide.up, wide.down = nn.Parameter(torch.randn(E, 10, H) * 0.3), nn.Parameter(torch.randn(E, H, 10) * 0.3)
    c = Compared(Layers(Block(), wide), tokens())
    assert (len(lifts), c.rewritten) == (2, 2)


def test_layers_of_another_stride_are_not_shared(lifts):
    turned = other()
    turned.up = nn.Parameter(turned.up.detach().transpose(1, 2).contiguous().transpose(1, 2))
    c = Compared(Layers(Block(), turned), tokens())
    assert (len(lifts), c.rewritten) == (2, 2)


def test_frozen_layers_are_not_shared_with_trained_ones(lifts):
    frozen = other()
    frozen.up.requires_grad_(False)
    Compared(Layers(Block(), frozen), tokens(), grad=True)
    assert len(lifts) == 2


def test_layers_that_tie_two_weights_are_not_shared(lifts):
    """The first layer reads two tensors where the second reads one twice."""

    def expert(self, x, e):
        return F.linear(F.silu(F.linear(x, self.up[e])), self.second[e])

    square = torch.randn(E, H, H) * 0.3
    free = block(Block.forward, expert=expert)
    free.up, free.second = nn.Parameter(square.clone()), nn.Parameter(square * 2)
    tied = block(Block.forward, expert=expert)
    tied.up = tied.second = nn.Parameter(square * 0.5)
    Compared(Layers(free, tied), tokens())
    Compared(Layers(tied, free), tokens())
    assert len(lifts) == 4


@pytest.mark.parametrize("region", ["no_grad", "autocast"])
def test_a_layer_in_another_region_is_not_shared(region, lifts):
    class InRegion(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = other()

        def forward(self, x):
            with {"no_grad": torch.no_grad(), "autocast": torch.autocast("cpu", dtype=torch.bfloat16)}.get(region, nullcontext()):
                w, ids = self.inner.route(x)
                return self.inner.loop(x, w.to(x.dtype), ids) if region == "no_grad" else self.dense(x, w, ids)

        def dense(self, x, w, ids):
            gates = torch.zeros(x.shape[0], E).scatter(1, ids, w.float())
            return sum(gates[:, e, None] * self.inner.expert(x, e).float() for e in range(E))

    module = Layers(InRegion(), Block())
    if region == "no_grad":
        Compared(module, tokens(), grad=True)
    else:
        torch.compile(module, backend="moe_compile", options={"inner": "eager"})(tokens())
    assert len(lifts) >= 2


# ---------------------------------------------------------------- memory
def test_a_layer_whose_accumulator_is_a_view_of_its_rows_is_not_shared(lifts):
    """The same code in the second layer writes what its experts still have to read."""

    def forward(self, x):
        y = self.loop(x, *self.route(x), out=x * 2).tanh()
        return self.loop(y, *self.route(y), out=y.view(-1, H))

    c = Compared(block(forward), tokens())
    assert (len(lifts), c.rewritten) == (2, 1)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_whose_rows_are_read_later_is_taken_out_by_its_own_needs(first):
    """The same code; in one layer what it wrote in place is looked at outside."""

    def forward(self, x):
        y, g = ReadBeforeWrite.forward(self, x)
        z, h = ReadBeforeWrite.forward(self, y.tanh())
        return z, g if first else h

    Compared(block(forward), tokens())


def test_a_value_of_one_layer_that_is_used_outside_stays_there(lifts):
    def inner(self, x):
        w, ids = self.route(x)
        hits = F.one_hot(ids, E).bool()
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(hits[..., e])
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out, hits

    def forward(self, x):
        y, _ = inner(self, x)
        z, hits = inner(self, y.tanh())
        return z, hits.float().sum(0)

    c = Compared(block(forward), tokens())
    assert (len(lifts), c.rewritten) == (1, 2)


def test_a_layer_that_reuses_the_first_layers_ids_is_its_own(lifts):
    def forward(self, x):
        w, ids = self.route(x)
        y = self.loop(x, w, ids).tanh()
        return self.loop(y, w, ids)

    Compared(block(forward), tokens())


def test_layers_that_differ_in_what_comes_after_share_what_they_have_in_common(lifts):
    """Slots K of both are alike; the last layer's output is only summed."""

    def total(self, x):
        return Block.forward(self, x).sum(-1, keepdim=True).expand(-1, H) / K

    c = Compared(Layers(Block(), other(total)), tokens())
    assert c.rewritten == 2
