"""experts_implementation="moe_compile": transformers' models by our ops in eager mode, and where other compilers trace them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from blocks import Recorder
from corpus.hf_zoo import ZOO, first_tensor
from torch import nn

import moe_compile

pytest.importorskip("transformers")
import transformers.integrations.moe as library

from moe_compile.integrations import transformers as integration

FAMILIES = [
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "nemotron_h", "granitemoe", "deepseek_v4",
]  # fmt: skip
E, H, I, K, T = 4, 8, 6, 2, 9  # noqa: E741
STAGES = ["moe_compile.quantize_dispatch.default", "moe_compile.permute_experts_combine.default"]


class _Experts(nn.Module):
    """The plain kind of experts; `use_experts_implementation` gives it the rest."""

    def __init__(self, config, act=None) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.num_experts, self.limit, self.act_fn = E, 0.5, act or nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H, generator=g) * 0.4)
        self.down_proj = nn.Parameter(torch.randn(E, H, I, generator=g) * 0.4)

    def forward(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            h = self._apply_gate(nn.functional.linear(x[tok], self.gate_up_proj[e]))
            y = nn.functional.linear(h, self.down_proj[e]) * w[tok, slot, None]
            out.index_add_(0, tok, y.to(out.dtype))
        return out


class _Limited(_Experts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up


class _Mixing(_Experts):
    """Looks at other rows than the slot's own."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * up.cumsum(0)


def made(cls, implementation="moe_compile", **kwargs) -> nn.Module:
    wrapped = library.use_experts_implementation(type(cls.__name__, (cls,), {}))
    return wrapped(SimpleNamespace(_experts_implementation=implementation), **kwargs)


def inputs(seed=0, tokens=T):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(tokens)]) if tokens else torch.zeros(0, K, dtype=torch.int64)
    return torch.randn(tokens, H, generator=g), ids, torch.rand(tokens, K, generator=g)


def against_eager(module, *args, rtol=1e-4, atol=1e-5) -> None:
    """Outputs, and gradients of everything where they are on."""
    eager = copy.deepcopy(module)
    eager.config = SimpleNamespace(_experts_implementation="eager")
    found = []
    for each in (eager, module):
        each.zero_grad()
        own = [a.clone().requires_grad_(torch.is_grad_enabled() and a.is_floating_point()) for a in args]
        out = each(*own)
        if torch.is_grad_enabled():
            out.square().sum().backward()
        found.append([out.detach(), *(a.grad for a in own), *(p.grad for p in each.parameters())])
    for want, got in zip(*found, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_it_computes_eagerly(family):
    model, kwargs = ZOO[family]()
    found = []
    for implementation in ("eager", "moe_compile"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        out = first_tensor(model(**kwargs))
        out.square().mean().backward()
        found.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (want, want_grads), (got, got_grads) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert (got_grads[name] - grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-7, name


def test_layers_that_are_alike_share_one_form():
    integration._forms.clear()
    model, kwargs = ZOO["qwen3_moe"]()
    model.set_experts_implementation("moe_compile")
    with torch.no_grad():
        model(**kwargs)
        model(**kwargs)
    assert len(integration._forms) == 1


# ---------------------------------------------------------------- compilers
def test_other_compilers_get_the_ops(fresh_dynamo):
    model, kwargs = ZOO["qwen3_moe"]()
    model.set_experts_implementation("moe_compile")
    integration._forms.clear()
    seen = Recorder()
    with torch.no_grad():
        got = first_tensor(torch.compile(model, backend=seen, fullgraph=True)(**kwargs))
        want = first_tensor(model(**kwargs))
    torch.testing.assert_close(got, want)
    (graph,) = seen.graphs
    assert [name for n in graph.graph.nodes if (name := str(n.target)) in STAGES] == STAGES * 2


def test_our_backend_sees_the_formula(fresh_dynamo):
    model, kwargs = ZOO["qwen3_moe"]()
    model.set_experts_implementation("moe_compile")
    report = moe_compile.RewriteReport()
    with torch.no_grad():
        got = first_tensor(moe_compile.compile(model, inner="eager", report=report)(**kwargs))
        want = first_tensor(model(**kwargs))
    assert [len(report.rewritten), len(report.refused)] == [2, 0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compiled_modules_with_other_constants_are_other_code(fresh_dynamo):
    x = inputs()
    for limit in (0.5, 0.1):
        module = made(_Limited)
        module.limit = limit
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(*x), module(*x))
            against_eager(module, *x)


# ---------------------------------------------------------------- modules
@pytest.mark.parametrize("tokens", [T, 1, 0])
def test_any_number_of_tokens_with_gradients(tokens):
    against_eager(made(_Experts), *inputs(tokens=tokens))


def test_a_constant_that_is_changed_is_seen():
    module = made(_Limited)
    for module.limit in (0.5, 0.1):
        against_eager(module, *inputs())


def test_a_frozen_module_and_trained_inputs():
    module = made(_Experts)
    module.requires_grad_(False)
    against_eager(module, *inputs())


def test_a_form_of_which_only_a_part_is_found_is_refused():
    """The gate of all experts is scaled by one parameter; what stands around the first product alone could be an op."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return torch.sigmoid(x) * self.scale

    with pytest.raises(integration.UnknownExperts, match=r"_Experts: `.*` works on what the experts put out"):
        made(_Experts, act=Scaled())(*inputs())


def test_the_same_expert_twice_and_ids_beyond_the_experts():
    x, ids, w = inputs()
    ids[:, 1] = ids[:, 0]
    ids[3, 0] = E
    against_eager(made(_Experts), x, ids, w)


def test_under_autocast_and_in_inference_mode():
    module, x = made(_Experts), inputs()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        eager = copy.deepcopy(module)
        eager.config = SimpleNamespace(_experts_implementation="batched_mm")
        torch.testing.assert_close(module(*x), eager(*x), rtol=5e-2, atol=5e-2)


def test_in_bfloat16():
    module = made(_Experts).bfloat16()
    x, ids, w = inputs()
    with torch.no_grad():
        against_eager(module, x.bfloat16(), ids, w.bfloat16(), rtol=5e-2, atol=5e-2)


def test_what_is_not_understood_is_refused_with_the_way_out():
    with pytest.raises(integration.UnknownExperts, match=r'_Mixing: .*set_experts_implementation\("grouped_mm"\)'):
        made(_Mixing)(*inputs())


def test_inputs_of_another_shape_are_refused():
    x, ids, w = inputs()
    with pytest.raises(ValueError, match=r"hidden_states, top_k_index and top_k_weights are \(1, 9, 8\)"):
        made(_Experts)(x[None], ids, w)
