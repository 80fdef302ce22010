"""Blocks that come again and again are recorded once, stand in Dynamo's graph as one call each, and are lifted once."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from corpus.harness import error
from probed_blocks import Block as Base
from probed_blocks import E, Expert, H, HitLoop, K, Model
from torch import nn

import moe_compile
from moe_compile.probing import probe, scout
from moe_compile.probing.install import marked, programs

RUN = sys.modules["moe_compile.passes.run"]


class Dense(Base):
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * ((ids == e) * w).sum(-1, keepdim=True)
        return out


class Loop(Base):
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            self.add(out, x, w, ids, e)
        return out


class Numbered(Loop):
    """Each layer reads its own number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x):
        return super().forward(x) * (1 + self.number)


class TopK(Base):
    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.k = k

    def forward(self, x):
        w, ids = torch.topk(self.gate(x).softmax(-1), self.k, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * ((ids == e) * w).sum(-1, keepdim=True)
        return out


class Strange(Dense):
    """No product of a weight: what the experts compute is not understood."""

    def route(self, x):
        w, ids = super().route(x)
        return w.cumsum(0), ids

    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x).cumsum(0) * ((ids == e) * w).sum(-1, keepdim=True)
        return out


class Doubled(Dense):
    def forward(self, x):
        return super().forward(x) * 2


class Restored(Base):
    """For one test: no other model holds its programs."""

    def forward(self, x):
        w, ids = self.route(x)
        return sum(expert(x) * ((ids == e) * w).sum(-1, keepdim=True) for e, expert in enumerate(self.experts))


class Routed(Base):
    """Returns a tuple; an extra argument by name; an attribute of each expert that its forward reads."""

    def forward(self, x, *, scale=1.0):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * ((ids == e) * w).sum(-1, keepdim=True) * scale
        return out, {"logits": self.gate(x), "aux": None}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two layers of a few experts are enough to be recorded once."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(probe, "WORTH", 1)
    monkeypatch.setattr(scout, "LONG", 8)


@pytest.fixture
def lifts(monkeypatch):
    seen, find = [], RUN.find_region
    monkeypatch.setattr(RUN, "find_region", lambda gm, d, *args: (seen.append(d), find(gm, d, *args))[1])
    return seen


def tokens(n: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(seed))


def compiled(module: nn.Module, inner="eager", **kwargs):
    report = moe_compile.RewriteReport()
    return moe_compile.compile(module, inner=inner, report=report, **kwargs), report


def same(fast, module, x, grad=False):
    """Outputs, and gradients of the argument and of all parameters, are the module's own."""
    if not grad:
        with torch.no_grad():
            assert error(fast(x), module(x)) < 1e-5
        return
    found = []
    for f in (fast, module):
        module.zero_grad()
        y = x.clone().requires_grad_()
        f(y).square().sum().backward()
        found.append([y.grad, *[torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]])
    for got, want in zip(*found, strict=True):
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max().clamp(min=1e-3))


def whole(cls: type) -> int:
    return sum(p.whole is not None for p in programs(cls))


def calls(report) -> int:
    return sum(g.before.count("moe_compile.recorded_block(") for g in report.graphs)


@pytest.mark.parametrize("cls", [Dense, Loop, HitLoop])
def test_layers_are_recorded_and_lifted_once(cls, lifts):
    model = Model([cls() for _ in range(4)]).eval()
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert (len(lifts), len(report.rewritten), report.refused) == (1, 4, [])
    assert [r.module for r in report.rewritten] == [f"layers.{i}" for i in range(4)]
    assert [(r.validation or "").startswith("the same code as layers.0") for r in report.rewritten] == [False, True, True, True]
    assert len(report.graphs) == 1
    assert "recorded_block" not in report.graphs[0].after
    assert "combine" in report.graphs[0].after
    assert calls(report) == 4


@pytest.mark.parametrize("cls", [Dense, Loop])
def test_gradients(cls, lifts):
    model = Model([cls() for _ in range(3)])
    fast, report = compiled(model, inner="aot_eager")
    same(fast, model, tokens(), grad=True)
    same(fast, model, tokens(9, seed=1), grad=True)
    assert report.rewritten
    assert not report.refused
    assert calls(report)


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor():
    model = Model([Dense(), Dense()]).eval()
    fast, report = compiled(model, inner="inductor")
    same(fast, model, tokens())
    assert len(report.rewritten) == 2
    assert calls(report) == 2


def test_other_numbers_of_tokens_and_one_token():
    model = Model([Loop(), Loop()]).eval()
    fast, report = compiled(model)
    for n in (12, 7, 33, 1, 2):
        same(fast, model, tokens(n, seed=n))
    assert not report.refused


def test_a_constant_that_differs_from_layer_to_layer(lifts):
    model = Model([TopK(2), TopK(1), TopK(2), TopK(3)]).eval()
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert [r.top_k for r in report.rewritten] == [2, 1, 2, 3]
    assert len(lifts) == 3


def test_the_layers_number_is_read():
    model = Model([Numbered(i) for i in range(3)]).eval()
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert len(report.rewritten) == 3


def test_a_constant_that_changes_later():
    model = Model([TopK(2), TopK(2)]).eval()
    fast, _ = compiled(model)
    same(fast, model, tokens())
    model.layers[1].k = 1
    same(fast, model, tokens())
    model.layers[0].experts[2].up.bias = None
    same(fast, model, tokens())
    model.layers[0].experts[1].down = nn.Sequential(nn.Linear(H, H), nn.Tanh())
    same(fast, model, tokens())
    model.layers[1].experts[0] = nn.Tanh()
    same(fast, model, tokens())


def test_what_an_expert_reads_may_change_later():
    class Scaled(Expert):
        by = 1.0

        def forward(self, x):
            return super().forward(x) * self.by

    model = Model([Dense(), Dense()]).eval()
    for layer in model.layers:
        layer.experts = nn.ModuleList(Scaled() for _ in range(E))
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert calls(report) == 2
    model.layers[1].experts[3].by = 2.0
    same(fast, model, tokens())


def test_torchs_own_modules_settings_may_change_later():
    model = Model([Dense(), Dense()])
    for layer in model.layers:
        for expert in layer.experts:
            expert.up = nn.Sequential(nn.Linear(H, H), nn.LeakyReLU(0.1), nn.Dropout(0.0))
    fast, report = compiled(model.eval())
    same(fast, model, tokens())
    assert calls(report) == 2
    model.layers[0].experts[1].up[1].negative_slope = 0.7
    same(fast, model, tokens())
    model.train()
    same(fast, model, tokens())
    model.layers[1].experts[0].up[2].p = 1.0
    same(fast, model, tokens())


def test_weights_change_and_are_replaced():
    model = Model([Dense(), Dense()]).eval()
    fast, _ = compiled(model)
    same(fast, model, tokens())
    with torch.no_grad():
        model.layers[0].experts[1].up.weight.mul_(3)
    same(fast, model, tokens())
    model.layers[1].experts[0].down.weight = nn.Parameter(torch.randn(H, H))
    same(fast, model, tokens())
    model.load_state_dict({n: p * 2 for n, p in model.state_dict().items()})
    same(fast, model, tokens())
    model.double()
    with torch.no_grad():
        assert error(fast(tokens().double()), model(tokens().double())) < 1e-9


def test_one_block_in_two_places_and_shared_experts():
    block, other = Dense(), Dense()
    other.experts = block.experts
    model = Model([block, other, block])
    fast, report = compiled(model, inner="aot_eager")
    same(fast, model, tokens(), grad=True)
    assert len(report.rewritten) == 3


def test_tied_weights_of_one_layer_are_not_those_of_another():
    tied, free = Dense(), Dense()
    tied.experts[1].up.weight = tied.experts[0].up.weight
    model = Model([tied, free]).eval()
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert len(report.rewritten) == 2
    free.experts[2].down.weight = free.experts[0].down.weight
    same(fast, model, tokens())


def test_subclasses_run_their_own_forward():
    model = Model([Dense(), Doubled(), Dense(), Doubled()]).eval()
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert len(report.rewritten) == 4


def test_a_forward_put_on_one_layer_by_hand():
    model = Model([Dense(), Dense(), Dense()]).eval()
    model.layers[1].forward = lambda x: x * 0.5
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert len(report.rewritten) == 2


def test_what_is_refused_runs_as_it_is():
    model = Model([Strange(), Strange()])
    fast, report = compiled(model, inner="aot_eager")
    same(fast, model, tokens(), grad=True)
    assert calls(report) == 2
    assert not report.rewritten
    assert report.refused
    assert all(r.reason and r.where.split(":")[0] == __file__ for r in report.refused)


def test_a_compiler_that_fails_on_the_rewrite():
    def picky(gm, inputs):
        if any("permute_experts" in str(n.target) for n in gm.graph.nodes):
            raise RuntimeError("not this")
        return gm.forward

    model = Model([Loop(), Loop()]).eval()
    fast, report = compiled(model, inner=picky)
    same(fast, model, tokens())
    assert all("not this" in r.reason for r in report.refused)
    assert len(report.refused) == 2


def test_arguments_and_results():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Routed() for _ in range(3))

        def forward(self, x):
            logits = []
            for i, layer in enumerate(self.layers):
                y, more = layer(x, scale=0.5 if i else 2.0)
                x, logits = x + y, [*logits, more["logits"]]
                assert more["aux"] is None
            return x, logits

    model = Outer().eval()
    fast, report = compiled(model)
    with torch.no_grad():
        (got, logits), (want, expected) = fast(tokens()), model(tokens())
    assert error(got, want) < 1e-5
    assert all(error(a, b) < 1e-5 for a, b in zip(logits, expected, strict=True))
    assert len(report.rewritten) == 3
    assert calls(report) == 3


def test_regions_of_the_model_around():
    class Outer(Model):
        def forward(self, x):
            x = self.layers[0](x)
            with torch.autocast("cpu", torch.bfloat16):
                x = self.layers[1](x)
            with torch.no_grad():
                y = self.layers[2](x.float())
            return x.float() + y

    model = Outer([Dense(), Dense(), Dense()])
    fast, _report = compiled(model, inner="aot_eager")
    assert error(fast(tokens()), model(tokens())) < 2e-2
    same_but_for_rounding = [p.grad for p in model.parameters()]
    assert all(g is None for g in same_but_for_rounding)
    fast(tokens()).sum().backward()
    assert model.layers[0].gate.weight.grad is not None
    assert model.layers[2].gate.weight.grad is None


def test_checkpointed_layers():
    class Outer(Model):
        def forward(self, x):
            for layer in self.layers:
                x = x + torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    model = Outer([Dense(), Dense(), Dense()])
    fast, report = compiled(model, inner="aot_eager")
    same(fast, model, tokens(), grad=True)
    assert report.rewritten
    assert not report.refused


def test_an_argument_that_is_not_contiguous():
    class Outer(Model):
        def forward(self, x):
            return self.layers[1](self.layers[0](x.t().contiguous().t()))

    model = Outer([Dense(), Dense()]).eval()
    fast, _ = compiled(model)
    same(fast, model, tokens())


def test_restore_copies_and_pickles():
    model = Model([Restored(), Restored()]).eval()
    own, names = Restored.forward, list(model.state_dict())
    fast, _report = compiled(model)
    same(fast, model, tokens())
    assert whole(Restored)
    assert marked(model.layers[0])
    assert list(model.state_dict()) == names
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not marked(twin.layers[0])
    assert not marked(again.layers[0])
    assert torch.equal(twin(tokens()), model(tokens()))
    assert torch.equal(again(tokens()), model(tokens()))
    moe_compile.restore(model)
    assert Restored.forward is own
    assert not whole(Restored)
    torch._dynamo.reset()
    same(fast, model, tokens())


def test_hooks_added_later_are_heard():
    model = Model([Dense(), Dense()]).eval()
    fast, _ = compiled(model)
    same(fast, model, tokens())
    torch._dynamo.reset()
    heard = []
    model.layers[0].experts[0].register_forward_hook(lambda *a: heard.append(1))
    same(fast, model, tokens())
    assert heard


def test_few_steps_are_left_to_dynamo(monkeypatch):
    monkeypatch.setattr(probe, "WORTH", 10_000)
    model = Model([Dense(), Dense()]).eval()
    fast, report = compiled(model)
    same(fast, model, tokens())
    assert calls(report) == 0
    assert len(report.rewritten) == 2


def test_one_full_graph():
    model = Model([Loop(), Loop()]).eval()
    fast, report = compiled(model, fullgraph=True)
    same(fast, model, tokens())
    assert calls(report) == 2
    assert len(report.rewritten) == 2


def test_the_plain_backend_sees_the_models_own_code():
    model = Model([Dense(), Dense()]).eval()
    fast, _ = compiled(model)
    same(fast, model, tokens())
    seen = []

    def look(gm, inputs):
        seen.append(str(gm.graph))
        return gm.forward

    torch._dynamo.reset()
    same(torch.compile(model, backend=look), model, tokens())
    assert seen
    assert not any("recorded_block" in text for text in seen)


def test_explain():
    model = Model([HitLoop(), HitLoop()]).eval()
    report = moe_compile.explain(model)(tokens())
    assert len(report.rewritten) == 2
    assert calls(report) == 2
    assert not marked(model.layers[0])


def test_half_precision_and_quantised_weights_of_ours():
    model = Model([Dense(), Dense()]).eval().bfloat16()
    fast, report = compiled(model)
    with torch.no_grad():
        assert error(fast(tokens().bfloat16()), model(tokens().bfloat16())) < 5e-2
    assert calls(report) == 2
    torch._dynamo.reset()
    fast, report = compiled(model, quant="fp8")
    with torch.no_grad():
        assert error(fast(tokens().bfloat16()), model(tokens().bfloat16())) < 2e-1
    assert calls(report) == 0
    assert len(report.rewritten) == 2


def test_autocast_and_inference_mode_of_the_caller():
    model = Model([Loop(), Loop()]).eval()
    fast, report = compiled(model)
    with torch.inference_mode():
        assert error(fast(tokens()), model(tokens())) < 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert error(fast(tokens()), model(tokens())) < 2e-2
    assert len(report.rewritten) == 4
    assert not report.refused


def test_dynamic_sizes():
    model = Model([Dense(), Loop(), Dense(), Loop()]).eval()
    fast, report = compiled(model, dynamic=True)
    for n in (12, 5, 30):
        same(fast, model, tokens(n))
    assert calls(report) == 4


def test_gradients_in_other_modes():
    model = Model([Loop(), Loop()])
    fast, _ = compiled(model, inner="aot_eager")
    same(fast, model.eval(), tokens())
    same(fast, model.train(), tokens(), grad=True)
    same(fast, model.eval(), tokens(5))
