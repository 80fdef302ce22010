"""Models that transformers quantised: FP8Experts and mxfp4 GPT-OSS blocks, whose kernels no graph shows, against dequantised float32."""

from __future__ import annotations

import copy
from types import MethodType, SimpleNamespace

import pytest
import torch
from blocks import Recorder, calls
from torch import Tensor, nn

import moe_compile
from moe_compile import integrations
from moe_compile.ops.quantized import Quantized, dequantize
from moe_compile.report import RewriteReport

transformers = pytest.importorskip("transformers")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
E, K, H, I = 4, 2, 256, 128  # noqa: E741


@pytest.fixture(autouse=True)
def as_it_was():
    torch._dynamo.reset()
    yield
    integrations.remove()


# ---------------------------------------------------------------- fine-grained fp8
class Router(nn.Module):
    """A block with a router and the experts that it is given."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Parameter(torch.randn(E, H) * H**-0.5, requires_grad=False), experts

    def forward(self, x: Tensor) -> Tensor:
        w, ids = torch.nn.functional.linear(x, self.gate).softmax(-1).topk(K, dim=-1)
        return self.experts(x, ids, w)


def fp8_block(implementation: str = "grouped_mm", **settings) -> Router:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    for name in ("expert_dtype", "swiglu_limit"):
        if name in settings:
            setattr(config, name, settings.pop(name))
    config._experts_implementation = implementation
    made = transformers.integrations.moe.use_experts_implementation(
        experts_class=type("Experts", (fp8.FP8Experts,), {}), experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    experts = made(config=config, **{"block_size": (128, 128), **settings})
    for name, p in experts.named_parameters():
        p.requires_grad_(False)
        p.copy_(_random(p, "scale" in name))
    return Router(experts)


def _random(p: Tensor, scale: bool) -> Tensor:
    if p.dtype in (torch.float8_e8m0fnu, torch.int8):
        low, high = (119, 123) if scale else (0, 256)
        return torch.randint(low, high, p.shape, dtype=torch.uint8).view(p.dtype)
    return torch.rand(p.shape) * 0.03 + 0.01 if scale else torch.randn(p.shape).to(p.dtype)


def exact(block: Router, x: Tensor) -> Tensor:
    """Weights in float32, rows as they are."""
    m, out = block.experts, torch.zeros_like(x)
    up, down = (_dequantised(getattr(m, n), getattr(m, f"{n}_scale_inv")) for n in ("gate_up_proj", "down_proj"))
    w, ids = torch.nn.functional.linear(x, block.gate).softmax(-1).topk(K, dim=-1)
    for t in range(x.shape[0]):
        for k in range(K):
            e = int(ids[t, k])
            out[t] += w[t, k] * (down[e] @ m._apply_gate((up[e] @ x[t])[None])[0])
    return out


def _dequantised(values: Tensor, scales: Tensor) -> Tensor:
    if values.dtype == torch.int8:
        blocks = values.view(torch.uint8).unflatten(2, (-1, 16))
        return dequantize(Quantized(blocks, scales.view(torch.uint8), "mxfp4"))
    out, inner = values.shape[1:]
    wide = scales.float().repeat_interleave(-(-out // scales.shape[1]), 1).repeat_interleave(-(-inner // scales.shape[2]), 2)
    return values.float() * wide[:, :out, :inner]


def compiled(block: nn.Module, x: Tensor, way: str = "moe_compile.compile") -> tuple[Tensor, RewriteReport, Recorder]:
    report, inner = RewriteReport(), Recorder()
    if way == "moe_compile.compile":
        fn = moe_compile.compile(block, inner=inner, report=report, fullgraph=True)
    else:
        fn = torch.compile(block, backend="moe_compile", options={"inner": inner, "report": report}, fullgraph=True)
    with torch.no_grad():
        out = fn(x)
        fn(x + 1)
    assert len(inner.graphs) == 1, "compiled once"
    return out, report, inner


def close(got: Tensor, want: Tensor, limit: float) -> None:
    assert got.shape == want.shape
    off = float((got - want).norm() / want.norm())
    assert off < limit, off


def layouts(inner: Recorder) -> list[str]:
    return [n.args[7] for gm in inner.graphs for n in gm.graph.nodes if "permute_experts_unpermute" in str(n.target)]


@pytest.mark.parametrize("way", ["moe_compile.compile", "torch.compile"])
def test_fine_grained_fp8_experts_are_recognised(way):
    block, x = fp8_block(), torch.randn(9, H)
    if way == "torch.compile":
        integrations.install()  # the backend's module may be older than the model's
    out, report, inner = compiled(block, x, way)
    assert len(report.rewritten) == 1
    assert layouts(inner) == ["eoi:fp8_block,eoi:fp8_block"]
    assert not calls(inner.graphs[0], "dequantize_experts")
    close(out, exact(block, x), 0.06)  # the rows are rounded to e4m3


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "deepgemm"])
def test_whichever_function_the_model_had_chosen(implementation):
    block, x = fp8_block(implementation), torch.randn(5, H)
    assert layouts(compiled(block, x)[2]) == ["eoi:fp8_block,eoi:fp8_block"]


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"scale_fmt": "ue8m0"}, "eoi:fp8_block,eoi:fp8_block"),
        ({"block_size": None}, "eoi:fp8_channel,eoi:fp8_channel"),
        ({"expert_dtype": "fp4", "scale_fmt": "ue8m0"}, "eoi:mxfp4,eoi:mxfp4"),
        ({"swiglu_limit": 0.5}, "eoi:fp8_block,eoi:fp8_block"),
    ],
)
def test_other_forms_of_fp8_experts(settings, kinds):
    block, x = fp8_block(**settings), torch.randn(7, H)
    out, _, inner = compiled(block, x)
    assert layouts(inner) == [kinds]
    close(out, exact(block, x), 0.06)


@pytest.mark.parametrize(
    "settings", [{"activation_scheme": "static"}, {"block_size": (64, 64)}, {"expert_dtype": "fp4"}], ids=["static", "block of 64", "fp4"]
)
def test_a_form_that_no_kernel_has_keeps_the_models_own_function(settings, monkeypatch):
    block = fp8_block("grouped_mm", **settings)
    monkeypatch.setitem(fp8.ALL_FP8_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", lambda self, x, ids, w: x * 2)
    x = torch.randn(5, H)
    fn = moe_compile.compile(block, inner="eager")
    with torch.no_grad():
        assert torch.equal(fn(x), x * 2)


def test_eager_calls_and_other_compilers_keep_the_kernels(monkeypatch):
    monkeypatch.setitem(fp8.ALL_FP8_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", lambda self, x, ids, w: x * 2)
    block, x = fp8_block(), torch.randn(5, H)
    out, _, _ = compiled(block, x)
    assert torch.equal(block(x), x * 2)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), x * 2)
    assert not torch.equal(out, x * 2)


def test_the_registry_is_as_it_was_after_remove():
    before = dict(fp8.ALL_FP8_EXPERTS_FUNCTIONS)
    integrations.install()
    assert dict(fp8.ALL_FP8_EXPERTS_FUNCTIONS) != before
    integrations.install()
    integrations.remove()
    assert dict(fp8.ALL_FP8_EXPERTS_FUNCTIONS) == before


def test_a_whole_model_with_quantised_experts():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=H, intermediate_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    settings = transformers.FineGrainedFP8Config()
    model = fp8.replace_with_fp8_linear(model, modules_to_not_convert=linears, quantization_config=settings)
    for mine, theirs in zip(model.model.layers, plain.model.layers):
        experts = mine.mlp.experts.to_empty(device="cpu")
        for name, p in experts.named_parameters():
            p.requires_grad_(False)
            p.copy_(_random(p, "scale" in name))
        for name in ("gate_up_proj", "down_proj"):
            getattr(theirs.mlp.experts, name).data = _dequantised(getattr(experts, name), getattr(experts, f"{name}_scale_inv"))
    tokens, report = torch.randint(0, 64, (2, 9)), RewriteReport()
    with torch.no_grad():
        out = moe_compile.compile(model, inner="eager", report=report)(tokens).logits
        want = plain(tokens).logits
    assert len(report.rewritten) == 2
    close(out, want, 0.06)


# ---------------------------------------------------------------- mxfp4
class Rearranged:
    """A tensor as the hub's library wraps it: [E, in, out], turned around and padded here."""

    def __init__(self, data: Tensor) -> None:
        turned = torch.nn.functional.pad(data.transpose(1, 2), (0, 8)).flip(1).contiguous()
        self.storage = SimpleNamespace(data=turned, layout=SimpleNamespace(unswizzle_data=lambda t: t.flip(1)))


def gpt_oss_block(wrap=Rearranged) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    block = transformers.models.gpt_oss.modeling_gpt_oss.GptOssMLP(config)
    nn.init.normal_(block.router.weight, std=H**-0.5)
    block.experts = experts = mxfp4.Mxfp4GptOssExperts(config)
    block.forward = MethodType(mxfp4.mlp_forward, block)
    block.plain = {}
    for name, out, inner in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        blocks = torch.randint(0, 256, (E, out, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 123, (E, out, inner // 32), dtype=torch.uint8)
        nn.init.normal_(getattr(experts, f"{name}_bias"))
        del experts._parameters[name]
        setattr(experts, name, wrap(blocks.flatten(2)))
        setattr(experts, f"{name}_precision_config", SimpleNamespace(weight_scale=wrap(scales)))
        block.plain[name] = dequantize(Quantized(blocks, scales, "mxfp4"))
    return block.requires_grad_(False)


def dequantised_gpt_oss(block: nn.Module) -> nn.Module:
    config = transformers.GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    plain = transformers.models.gpt_oss.modeling_gpt_oss.GptOssMLP(config)
    plain.router.load_state_dict(block.router.state_dict())
    for name, w in block.plain.items():
        getattr(plain.experts, name).data = w.transpose(1, 2).contiguous()
        getattr(plain.experts, f"{name}_bias").data = getattr(block.experts, f"{name}_bias").data
    return plain


@pytest.mark.parametrize("wrap", [Rearranged, lambda t: t], ids=["rearranged", "plain"])
def test_mxfp4_blocks_are_recognised(wrap):
    block, x = gpt_oss_block(wrap), torch.randn(2, 5, H)
    report, inner = RewriteReport(), Recorder()
    with torch.no_grad():
        out, _ = moe_compile.compile(block, inner=inner, report=report, fullgraph=True)(x)
        want = dequantised_gpt_oss(block)(x)
    assert len(report.rewritten) == 1, str(report)
    assert layouts(inner) == ["eoi:mxfp4,eoi:mxfp4"]
    close(out, want[0] if isinstance(want, tuple) else want, 1e-5)


def test_restored_mxfp4_blocks_are_as_they_were():
    block = gpt_oss_block()
    before, buffers = block.forward, len(list(block.buffers()))
    assert integrations.prepare(block) == []
    assert block.forward is not before
    assert integrations.prepare(block) == []
    integrations.restore(block)
    assert block.forward is before
    assert len(list(block.buffers())) == buffers


def test_a_layout_without_a_way_back_is_told():
    block = gpt_oss_block(lambda t: SimpleNamespace(storage=SimpleNamespace(data=t, layout=SimpleNamespace())))
    report, before = RewriteReport(), block.forward
    moe_compile.compile(block, report=report)
    assert any("dequantize=True" in note for note in report.notes)
    assert block.forward is before
