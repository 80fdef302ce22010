"""Routers in front of rewritten blocks: which are read, which become `route`, and which must stay as they are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import blocks
import pytest
import torch
import torch.nn.functional as F
from corpus.harness import error
from torch import Tensor, nn

import moe_compile
from moe_compile import passes
from moe_compile.ops.route import Routing
from moe_compile.options import Options
from moe_compile.passes import routing
from moe_compile.passes.validate import Mismatch

T, H, E, K = 12, 8, 6, 2
Routed = tuple[Tensor, Tensor]  # weights, ids


class Block(nn.Module):
    """Gathered expert matrices behind a router; `route(block, logits)` may return more, which the block returns as well."""

    def __init__(self, route: Callable[..., Any], dtype: torch.dtype = torch.float32, learned_bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.route, self.gate = route, nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, H, H)), nn.Parameter(torch.randn(E, H, H))
        self.scale, bias = nn.Parameter(torch.rand(E)), torch.linspace(-0.2, 0.3, E)
        if learned_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)
        self.to(dtype)

    def forward(self, x: Tensor) -> Any:
        w, ids, *more = self.route(self, self.gate(x))
        return (self.experts(x.view(-1, H), w.reshape(-1, K).to(x.dtype), ids.reshape(-1, K)).view_as(x), *more)

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        h = F.silu(torch.einsum("th,tkih->tki", x, self.up[ids]))
        return torch.einsum("tko,tk->to", torch.einsum("tki,tkoi->tko", h, self.down[ids]), w)


class Compiled:
    """A module compiled with the passes alone; calls compare with eager, gradients included."""

    def __init__(self, module: nn.Module, training: bool = False, dynamic: bool | None = None, **options: Any) -> None:
        torch._dynamo.reset()
        self.module, self.training, self.graphs, self.options = module, training, [], Options(**options)
        self.fn = torch.compile(module, backend=self._backend, dynamic=dynamic)

    def _backend(self, gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        self.report = passes.run(gm, self.options)
        self.graphs.append(gm)
        return gm

    def check(self, x: Tensor | None = None) -> Compiled:
        x = example() if x is None else x
        with torch.set_grad_enabled(self.training):
            for got, want in zip(self._observe(self.fn, x), self._observe(self.module, x), strict=True):
                assert error(got, want) < 1e-5
        return self

    def _observe(self, fn: Callable[..., Any], x: Tensor) -> list[Tensor]:
        self.module.zero_grad(set_to_none=True)
        out = [t for t in fn(x) if t is not None]
        if self.training:
            sum((t.double() * torch.arange(t.numel()).sin().view_as(t)).sum() for t in out if t.requires_grad).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.module.parameters()]
        return [*(t.detach() for t in out), *grads]

    @property
    def router(self) -> str | None:
        (region,) = {r.router for r in self.report.regions}
        return region

    @property
    def routes(self) -> list[Any]:
        """The constants of each `route` in the graphs."""
        ops = [n for gm in self.graphs for n in gm.graph.nodes if n.target is torch.ops.moe_compile.route.default]
        return [Routing(*n.args[2:]) for n in ops]


def example(seed: int = 1, tokens: int = T, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------- kinds
def softmax(m: Block, logits: Tensor) -> Routed:
    return F.softmax(logits, dim=-1).topk(K, dim=-1)


def renormalised(m: Block, logits: Tensor) -> Routed:
    w, ids = torch.topk(logits.softmax(-1, dtype=torch.float), K, dim=-1)
    return w / w.sum(-1, keepdim=True), ids


def renormalised_in_place(m: Block, logits: Tensor) -> Routed:
    w, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), K)
    w.div_(w.sum(dim=-1)[:, None])
    return w.to(logits.dtype), ids


def softmax_of_chosen(m: Block, logits: Tensor) -> Routed:
    w, ids = logits.topk(K, dim=1)
    return torch.softmax(w, dim=1), ids


def sigmoid(m: Block, logits: Tensor) -> Routed:
    return logits.sigmoid().topk(K, dim=-1, sorted=False)


def sqrtsoftplus(m: Block, logits: Tensor) -> Routed:
    scores = F.softplus(logits).sqrt()
    ids = (scores + m.bias).topk(K).indices
    w = torch.take_along_dim(scores, ids, -1)
    return w / w.sum(-1, keepdim=True).clamp(min=1e-6), ids


def biased_choice(m: Block, logits: Tensor) -> Routed:
    scores = logits.sigmoid()
    ids = torch.topk(m.bias + scores, K, dim=-1, sorted=False)[1]
    w = scores.gather(1, ids)
    return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def biased_weights(m: Block, logits: Tensor) -> Routed:
    w, ids = torch.topk(logits.sigmoid() + m.bias, K)
    return w / w.sum(-1, keepdim=True), ids


def scale_on_top(m: Block, logits: Tensor) -> Routed:
    w, ids = renormalised(m, logits)
    return w * m.scale[ids], ids


def _marks(choice: Tensor, groups: int, top: int, score: str) -> Tensor:
    split = choice.view(-1, groups, E // groups)
    of_groups = split.max(-1).values if score == "max" else split.topk(2, dim=-1)[0].sum(-1)
    best = torch.topk(of_groups, top, dim=-1, sorted=False)[1]
    return torch.zeros_like(of_groups).scatter_(1, best, 1)


def deepseek_v2(m: Block, logits: Tensor) -> Routed:
    scores = logits.softmax(-1, dtype=torch.float32)
    mask = _marks(scores, 3, 2, "max").unsqueeze(-1).expand(-1, 3, E // 3).reshape(-1, E)
    w, ids = torch.topk(scores.masked_fill(~mask.bool(), 0.0), K, dim=-1, sorted=False)
    return w * 16.0, ids


def deepseek_v3(m: Block, logits: Tensor) -> Routed:
    scores = logits.sigmoid()
    choice = scores.view(-1, E) + m.bias.unsqueeze(0)[0]
    mask = _marks(choice, 2, 1, "top2").unsqueeze(-1).expand(-1, 2, E // 2).reshape(-1, E)
    ids = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), K, dim=-1, sorted=False)[1]
    w = scores.gather(1, ids)
    return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def deepseek_repo(m: Block, logits: Tensor) -> Routed:
    scores = logits.sigmoid()
    choice = (scores + m.bias).view(-1, 3, E // 3)
    best = choice.amax(dim=-1).topk(2, dim=-1)[1]
    mask = choice.new_ones(choice.size(0), 3, dtype=torch.bool).scatter_(1, best, False)
    ids = choice.masked_fill_(mask.unsqueeze(-1), float("-inf")).flatten(1).topk(K, dim=-1)[1]
    return scores.gather(1, ids) * 2.0, ids


def groups_by_where(m: Block, logits: Tensor) -> Routed:
    scores = logits.softmax(-1)
    keep = _marks(scores, 3, 2, "max").repeat_interleave(2, dim=-1) > 0
    ids = torch.where(keep, scores, float("-inf")).topk(K)[1]
    return scores.gather(-1, ids), ids


def all_groups(m: Block, logits: Tensor) -> Routed:
    scores = logits.sigmoid()
    choice = scores + m.bias
    mask = _marks(choice, 1, 1, "top2").unsqueeze(-1).expand(-1, 1, E).reshape(-1, E)
    ids = torch.topk(choice.masked_fill(mask == 0, 0.0), K)[1]
    return scores.gather(1, ids), ids


V3 = "ids = topk_2(sigmoid(logits) + bias, 1 of 2 groups by top2 sum); w = sigmoid(logits)[ids] / (sum + 1e-20) * 2.5"
REPO = "ids = topk_2(sigmoid(logits) + bias, 2 of 3 groups by max); w = sigmoid(logits)[ids] * 2"
KINDS = {
    softmax: "w = topk_2(softmax(logits))",
    renormalised: "w = renorm(topk_2(softmax(logits)))",
    renormalised_in_place: "w = renorm(topk_2(softmax(logits)))",
    softmax_of_chosen: "w = softmax(topk_2(logits))",
    sigmoid: "w = topk_2(sigmoid(logits))",
    sqrtsoftplus: "ids = topk_2(sqrtsoftplus(logits) + bias); w = sqrtsoftplus(logits)[ids] / (sum, at least 1e-06)",
    biased_choice: "ids = topk_2(sigmoid(logits) + bias); w = sigmoid(logits)[ids] / (sum + 1e-20) * 2.5",
    biased_weights: "w = renorm(topk_2(sigmoid(logits) + bias))",
    scale_on_top: "w = renorm(topk_2(softmax(logits))) * scale[ids]",
    deepseek_v2: "w = topk_2(softmax(logits), 2 of 3 groups by max, 0 elsewhere) * 16",
    deepseek_v3: V3,
    deepseek_repo: REPO,
    groups_by_where: "ids = topk_2(softmax(logits), 2 of 3 groups by max); w = softmax(logits)[ids]",
    all_groups: "ids = topk_2(sigmoid(logits) + bias); w = sigmoid(logits)[ids]",
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
def test_is_read_and_becomes_route(kind, training):
    compiled = Compiled(Block(kind), training).check()
    assert compiled.router == KINDS[kind]
    assert len(compiled.routes) == 1
    left = [n.name for n in compiled.graphs[0].graph.nodes if "topk" in str(n.target) or "scatter" in str(n.target)]
    assert not left
    compiled.check(example(2))


@pytest.mark.parametrize("kind", [renormalised_in_place, biased_choice, deepseek_v3, deepseek_v2], ids=lambda f: f.__name__)
def test_ties_and_nan_route_as_before(kind):
    compiled = Compiled(Block(kind)).check()
    ties = torch.ones(T, H)
    ties[1] = float("nan")
    compiled.check(ties)
    compiled.check(example(3) * 1e4)  # scores that are 0 and 1 to the bit: with groups, experts outside are chosen for weights of 0
    assert compiled.routes


def test_tokens_may_vary():
    compiled = Compiled(Block(deepseek_v3), training=True, dynamic=True).check()
    for tokens in (5, 31):
        compiled.check(example(4, tokens))
    assert len(compiled.routes) == len(compiled.graphs) == 1


def test_batches_of_sequences_are_flattened():
    def route(m: Block, logits: Tensor) -> tuple[Tensor, ...]:
        w, ids = torch.topk(logits.softmax(-1), K)
        w /= w.sum(-1, keepdim=True)
        return w, ids, logits

    compiled = Compiled(Block(route), training=True).check(example().view(3, 4, H))
    assert compiled.routes
    assert compiled.router == KINDS[renormalised]


def test_dtypes_are_part_of_the_routing():
    def route(m: Block, logits: Tensor) -> Routed:
        w, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float), K)
        return (w / w.sum(-1, keepdim=True)).to(logits.dtype), ids

    compiled = Compiled(Block(route, torch.bfloat16))
    with torch.no_grad():
        assert error(compiled.fn(example(dtype=torch.bfloat16))[0], compiled.module(example(dtype=torch.bfloat16))[0]) < 2e-2
    assert compiled.router == "w = bfloat16(renorm(topk_2(softmax(float32(logits)))))"
    assert (compiled.routes[0].score_dtype, compiled.routes[0].weight_dtype) == (torch.float32, torch.bfloat16)


def test_under_autocast_the_casts_are_written_out():
    block = Block(softmax_of_chosen)
    compiled = Compiled(block)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, want = compiled.fn(example())[0], block(example())[0]
    assert error(got, want) < 5e-2
    assert "logits" in (compiled.router or "")


# ---------------------------------------------------------------- what else reads the router
def test_logits_and_ids_that_are_returned_stay_available():
    compiled = Compiled(Block(lambda m, logits: (*renormalised(m, logits), logits, logits.logsumexp(-1))), training=True).check()
    assert len(compiled.routes) == 1


def test_scores_that_something_else_reads_stay_and_are_routed():
    def route(m: Block, logits: Tensor) -> tuple[Tensor, ...]:
        scores = logits.softmax(-1)
        w, ids = scores.topk(K)
        return w / w.sum(-1, keepdim=True), ids, scores.mean(0), F.one_hot(ids, E).sum((0, 1))

    compiled = Compiled(Block(route), training=True).check()
    assert compiled.routes[0].score == "none"
    assert compiled.router == KINDS[renormalised]


def test_weights_that_are_scaled_in_place_afterwards():
    def route(m: Block, logits: Tensor) -> Routed:
        w, ids = renormalised(m, logits)
        w *= m.scale[ids]
        return w, ids

    assert Compiled(Block(route)).check().router == KINDS[scale_on_top]


def test_values_read_before_they_are_changed_in_place_keep_their_meaning():
    def route(m: Block, logits: Tensor) -> tuple[Tensor, ...]:
        w, ids = logits.softmax(-1).topk(K)
        before = w + 1.0
        w /= w.sum(-1, keepdim=True)
        return w, ids, before, w.t()

    Compiled(Block(route)).check()


@pytest.mark.parametrize("when", ["before", "after"])
def test_logits_changed_in_place(when):
    def route(m: Block, logits: Tensor) -> Routed:
        if when == "before":
            logits[:, 2] = float("-inf")
        scores = logits.softmax(-1)
        if when == "after":
            logits[:, 2] = 0.0
        w, ids = scores.topk(K)
        return w / w.sum(-1, keepdim=True), ids

    compiled = Compiled(Block(route)).check()
    assert [r.score for r in compiled.routes] == (["softmax"] if when == "before" else ["none"])


def test_scores_made_in_the_logits_memory():
    def route(m: Block, logits: Tensor) -> Routed:
        w, ids = logits.sigmoid_().topk(K)
        return w / w.sum(-1, keepdim=True), ids

    assert [r.score for r in Compiled(Block(route)).check().routes] == ["none"]


@pytest.mark.parametrize("shape", [(T, H), (3, 4, H)], ids=["tokens", "batch"])
def test_no_grad_around_the_choice_is_no_obstacle(shape):
    def route(m: Block, logits: Tensor) -> Routed:
        scores = logits.sigmoid()
        with torch.no_grad():
            ids = torch.topk(scores.detach() + m.bias, K)[1]
        w = scores.gather(-1, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20), ids

    assert Compiled(Block(route), training=True).check(example().view(shape)).routes


# ---------------------------------------------------------------- near misses
def _over_tokens(m: Block, logits: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return w / w.sum(0, keepdim=True), ids


def _over_all_scores(m: Block, logits: Tensor) -> Routed:
    scores = logits.sigmoid()
    w, ids = scores.topk(K)
    return w / scores.sum(-1, keepdim=True), ids


def _smallest(m: Block, logits: Tensor) -> Routed:
    return logits.softmax(-1).topk(K, largest=False)


def _weights_of_logits(m: Block, logits: Tensor) -> Routed:
    ids = logits.softmax(-1).topk(K)[1]
    return logits.gather(-1, ids), ids


def _by_sort(m: Block, logits: Tensor) -> Routed:
    w, ids = logits.softmax(-1).sort(-1, descending=True)
    return w[:, :K], ids[:, :K]


@pytest.mark.parametrize("route", [_over_tokens, _over_all_scores, _smallest, _weights_of_logits, _by_sort], ids=lambda f: f.__name__[1:])
def test_near_miss_stays(route):
    compiled = Compiled(Block(route), training=True).check()
    assert compiled.report.regions[0].rewritten
    assert all(r.normalize == "none" for r in compiled.routes)
    if route in (_smallest, _by_sort, _weights_of_logits):
        assert not compiled.routes


def test_near_miss_softmax_over_tokens_stays_outside():
    def route(m: Block, logits: Tensor) -> Routed:
        w, ids = logits.softmax(0).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), ids

    compiled = Compiled(Block(route)).check()
    assert [r.score for r in compiled.routes] == ["none"]


@pytest.mark.parametrize("eps", [1e-20, 1e-6, 0.5])
def test_eps_is_part_of_the_routing(eps):
    def route(m: Block, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w / (w.sum(-1, keepdim=True) + eps), ids

    compiled = Compiled(Block(route)).check()
    assert [(r.eps, r.eps_mode) for r in compiled.routes] == [(eps, "add")]


def test_near_miss_groups_scored_without_the_bias():
    def route(m: Block, logits: Tensor) -> Routed:
        scores = logits.sigmoid()
        mask = _marks(scores, 2, 1, "top2").unsqueeze(-1).expand(-1, 2, E // 2).reshape(-1, E)
        ids = torch.topk((scores + m.bias).masked_fill(mask == 0, float("-inf")), K)[1]
        return scores.gather(1, ids), ids

    assert not Compiled(Block(route)).check().routes


def test_near_miss_interleaved_groups():
    def route(m: Block, logits: Tensor) -> Routed:
        scores = logits.sigmoid()
        mask = _marks(scores, 2, 1, "max").repeat(1, E // 2)  # experts e, e + 2, e + 4 instead of three in a row
        w, ids = scores.masked_fill(mask == 0, float("-inf")).topk(K)
        return w, ids

    assert all(r.num_groups == 1 for r in Compiled(Block(route)).check().routes)


def test_near_miss_integer_mask_that_negation_leaves_true():
    def route(m: Block, logits: Tensor) -> Routed:
        scores = logits.sigmoid()
        mask = ~_marks(scores, 3, 1, "max").int().unsqueeze(-1).expand(-1, 3, 2).reshape(-1, E)  # -1 and -2: all true
        w, ids = scores.masked_fill(mask.bool(), 0.0).topk(K)
        return w + 1.0, ids

    assert all(r.num_groups == 1 for r in Compiled(Block(route)).check().routes)


def test_near_miss_the_worst_groups():
    def route(m: Block, logits: Tensor) -> Routed:
        scores = logits.sigmoid()
        mask = _marks(scores, 3, 1, "max").unsqueeze(-1).expand(-1, 3, 2).reshape(-1, E)
        w, ids = scores.masked_fill(mask.bool(), float("-inf")).topk(K)
        return w, ids

    assert all(r.num_groups == 1 for r in Compiled(Block(route)).check().routes)


def test_a_bias_that_learns_through_the_weights_stays():
    block = Block(biased_weights, learned_bias=True)
    assert not any(r.weights_from == "choice" for r in Compiled(block, training=True).check().routes)
    assert block.bias.grad is not None
    assert Compiled(block).check().routes[0].weights_from == "choice"


@pytest.mark.parametrize("where", ["scores", "weights", "all"])
def test_a_router_without_gradients_keeps_them_away(where):
    def route(m: Block, logits: Tensor) -> Routed:
        with torch.no_grad() if where == "all" else contextlib.nullcontext():
            scores = logits.softmax(-1)
            w, ids = (scores.detach() if where == "scores" else scores).topk(K)
            w = w / w.sum(-1, keepdim=True)
            return w.detach() if where == "weights" else w, ids

    block = Block(route)
    Compiled(block, training=True).check()
    assert block.gate.weight.grad is None or not block.gate.weight.grad.any()


# ---------------------------------------------------------------- the pass
class Layers(nn.Module):
    def __init__(self, n: int, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(kind) for _ in range(n))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = x + layer(x)[0]
        return (x,)


def test_identical_layers_are_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(routing, "read_router", lambda *a, f=routing.read_router: reads.append(a) or f(*a))
    compiled = Compiled(Layers(4, deepseek_v3), training=True).check()
    assert (len(reads), len(compiled.routes), compiled.router) == (1, 4, V3)


def test_what_does_not_validate_stays(monkeypatch):
    def refuse(*_: Any) -> str:
        raise Mismatch("the router differs on ties")

    monkeypatch.setattr(routing, "check", refuse)
    compiled = Compiled(Block(renormalised)).check()
    assert not compiled.routes
    assert compiled.router == KINDS[renormalised]
    assert Compiled(Block(renormalised), validate="off").check().routes


def test_a_wrong_constant_does_not_validate(monkeypatch):
    plan_of = routing.plan_of

    def off(*a: Any) -> Any:
        plan = plan_of(*a)
        return dataclasses.replace(plan, routing=plan.routing._replace(eps=1e-3))

    monkeypatch.setattr(routing, "plan_of", off)
    assert not Compiled(Block(biased_choice)).check().routes


def test_it_is_reported_with_the_nodes_it_saves():
    compiled = Compiled(Block(deepseek_v3)).check()
    region = compiled.report.regions[0]
    assert region.providers["route"] == "torch"
    assert "router on random logits, ties, a row of NaN" in region.validation
    assert region.nodes_before - region.nodes_after > 20


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (lambda s: s.softmax(0).topk(2, dim=-1), "softmax(logits, dim=0)"),
        (lambda s: s.softmax(-1).topk(2, dim=-1, largest=False), "smallest_2(softmax(logits))"),
        (lambda s: ((t := s.softmax(-1).topk(2, dim=-1))[0] / t[0].sum(), t[1]), "all axes"),
        (lambda s: ((t := s.softmax(-1).topk(2, dim=-1))[0] / t[0].sum(0, keepdim=True), t[1]), "dim=[0]"),
        (lambda s: (F.softplus(s, beta=2.0).gather(1, ids := s.topk(2, dim=-1)[1]), ids), "softplus(logits, beta=2)"),
        (lambda s: ((t := s.softmax(-1).topk(2, dim=-1))[0], (t[1] + 1) % 3), "other=3"),
    ],
)
def test_what_is_unusual_in_a_router_is_said(route, said):
    model = blocks.block(blocks.Block.forward, route=lambda self, x: route(F.linear(x, self.gate)))
    (region,) = moe_compile.explain(model)(blocks.tokens()).regions
    assert region.rewritten
    assert said in region.router
