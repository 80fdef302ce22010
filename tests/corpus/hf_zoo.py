# ruff: noqa: E501, E731, B007, BLE001
# fmt: off
"""Zoo of real transformers (5.17) Mixture-of-Experts models at tiny sizes, random weights, no downloads.

    from corpus.hf_zoo import ZOO, MOE_LAYERS, count_moe_blocks, first_tensor
    model, kwargs = ZOO["mixtral"]();  out = model(**kwargs)

ZOO[name]() -> (eval-mode nn.Module on CPU float32, dict of example kwargs).  Seeded: equal on every call.
MOE_LAYERS[name]   = expected number of MoE blocks (blocks that own routed experts) in that model.
MOE_BLOCKS[name]   = class name(s) of those blocks;  EXPERTS[name] = class name(s) of the module holding the expert weights.
DECORATED          = names whose experts class uses transformers' @use_experts_implementation.
FEATURES[name]     = short remark on what is unusual about the family's MoE.
"""
from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import re
import zlib

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

H, HEADS, INTER, MOE_INTER, E, TOPK, VOCAB, B, S = 64, 4, 96, 32, 8, 2, 128, 2, 16
INIT_STD = 0.15

# Applied to every config that has a field of that name (family overrides win).
COMMON = dict(
    vocab_size=VOCAB, hidden_size=H, intermediate_size=INTER, num_hidden_layers=2, num_attention_heads=HEADS,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=INIT_STD, use_cache=False,
    attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    # experts
    moe_intermediate_size=MOE_INTER, num_experts=E, num_local_experts=E, n_routed_experts=E, moe_num_experts=E,
    num_experts_per_tok=TOPK, moe_topk=TOPK, moe_k=TOPK, top_k_experts=TOPK, n_shared_experts=1, num_shared_experts=1,
    moe_num_shared_experts=1, shared_expert_intermediate_size=MOE_INTER, shared_intermediate_size=MOE_INTER,
    first_k_dense_replace=0, num_dense_layers=0, mlp_layer_types=["sparse", "sparse"], mlp_only_layers=[],
    decoder_sparse_step=1, output_router_logits=False, router_jitter_noise=0.0, input_jitter_noise=0.0,
    # MLA
    kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    # linear attention / mamba
    linear_conv_kernel_dim=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_head_dim=16, linear_num_heads=4, mamba_d_state=16, mamba_n_heads=8, mamba_d_conv=4,
    # sparse-attention indexers
    index_topk=8, index_head_dim=16, index_n_heads=4, num_mtp_layers=0, num_nextn_predict_layers=0,
)


@dataclasses.dataclass
class Spec:
    mod: str                 # transformers.models.<mod>; "x.y" = modeling module y in package x
    cfg: str
    cls: str
    n_moe: int
    blocks: tuple            # class names of the MoE blocks
    experts: tuple           # class names of the modules with expert weights
    over: dict = dataclasses.field(default_factory=dict)
    inputs: str = "lm"       # lm | encdec | pixels | embeds
    note: str = ""


def _cfg_fields(cls):
    if dataclasses.is_dataclass(cls):
        return {f.name for f in dataclasses.fields(cls)}
    return set(inspect.signature(cls.__init__).parameters)              # before transformers 5


def _module(spec, kind):
    pkg = spec.mod
    return importlib.import_module(f"transformers.models.{pkg}.{kind}_{pkg}")


def _ids(seed, shape=(B, S)):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, shape, generator=g)


def _reinit(model, seed):
    """HF init with a big initializer_range has already run; break the remaining constants / ties, seeded."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in sorted(model.named_parameters()):
            if not p.is_floating_point() or p.numel() == 0:
                continue
            if not torch.isfinite(p).all():
                p.copy_(torch.randn(p.shape, generator=g) * INIT_STD)
            if p.ndim >= 2 and not re.search(r"A_log|dt_|conv", n):
                # deterministic whatever HF's own init did (torch.empty + no rule, zeros, normal ...)
                fresh = torch.randn(p.shape, generator=g) * INIT_STD
                p.copy_(fresh if p.std() < 1e-4 or not torch.isfinite(p).all() or p.abs().max() > 1e3 else p)
            elif p.numel() > 1 and (p == p.flatten()[0]).all():        # norm weights, biases, gates
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        for n, m in model.named_modules():
            if type(m).__name__ == "ZayaRouterMLP":                     # deep router MLP: keep its logits apart
                for x in m.modules():
                    if isinstance(x, nn.Linear):
                        x.weight.sub_(x.weight.mean(1, keepdim=True)).mul_(3.0)
        for n, b in sorted(model.named_buffers()):
            if b.is_floating_point() and torch.isnan(b).any():
                raise RuntimeError(f"uninitialised buffer {n}")
            if re.search(r"correction_bias|expert_bias|moe_statics", n) and b.is_floating_point():
                b.add_(torch.randn(b.shape, generator=g) * 0.1)
            elif n.endswith("balancing_biases"):                        # zaya: added to probabilities ~ 1/9
                b.add_(torch.randn(b.shape, generator=g) * 0.01)
            elif n.endswith("tid2eid"):                                 # deepseek_v4 hash routing: k distinct experts
                rows = [torch.randperm(E, generator=g)[: b.shape[1]] for _ in range(b.shape[0])]
                b.copy_(torch.stack(rows))
    return model


def make_config(name, **extra):
    s = SPECS[name]
    ccls = getattr(_module(s, "configuration"), s.cfg)
    fields = _cfg_fields(ccls)
    kw = {k: v for k, v in COMMON.items() if k in fields}
    kw.update(s.over)
    kw.update(extra)
    kw = {k: v for k, v in kw.items() if v is not ...}   # `...` in overrides = leave the config's own default
    return ccls(**{k: (v(kw) if callable(v) and not isinstance(v, type) else v) for k, v in kw.items()})


def build(name, **extra):
    s = SPECS[name]
    seed = zlib.crc32(name.encode()) % 100003
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cfg = make_config(name, **extra)
        mcls = getattr(_module(s, "modeling"), s.cls)
        was = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)      # torch.empty is NaN-filled: weights HF has no init rule for are
        try:                                          # found and filled by _reinit, whatever the memory held
            model = mcls._from_config(cfg) if hasattr(mcls, "_from_config") else mcls(cfg)
        finally:
            torch.use_deterministic_algorithms(was)
        model = _reinit(model.float(), seed).eval()
    if s.inputs == "lm":
        kw = dict(input_ids=_ids(seed), use_cache=False)
    elif s.inputs == "encdec":
        kw = dict(input_ids=_ids(seed), decoder_input_ids=_ids(seed + 1), use_cache=False)
    elif s.inputs == "enc":
        kw = dict(input_ids=_ids(seed))
    elif s.inputs == "pixels":
        g = torch.Generator().manual_seed(seed)
        kw = dict(pixel_values=torch.randn(B, 3, 32, 32, generator=g), dataset_index=torch.tensor([1, 5]))
    elif s.inputs == "embeds":
        g = torch.Generator().manual_seed(seed)
        kw = dict(inputs_embeds=torch.randn(B, S, H, generator=g), use_cache=False)
    elif s.inputs == "hidden":
        g = torch.Generator().manual_seed(seed)
        kw = dict(hidden_states=torch.randn(B, S, H, generator=g))
    elif s.inputs == "lm_mm":                                           # a few "image" tokens
        mm = torch.zeros(B, S, dtype=torch.int32)
        mm[:, 4:9] = 1
        kw = dict(input_ids=_ids(seed), moe_mm_token_type_ids=mm, use_cache=False)
    return model, kw


def first_tensor(out):
    """The comparable output tensor (logits / last hidden state / first feature map)."""
    for a in ("logits", "last_hidden_state"):
        if getattr(out, a, None) is not None:
            return getattr(out, a)
    if getattr(out, "feature_maps", None):
        return out.feature_maps[-1]
    while not torch.is_tensor(out):
        out = out[0]
    return out


def count_moe_blocks(model, name):
    return sum(type(m).__name__ in SPECS[name].blocks for m in model.modules())


def count_experts_modules(model, name):
    return sum(type(m).__name__ in SPECS[name].experts for m in model.modules())


def S_(mod, p, n_moe, blocks, experts, cls=None, cfg=None, inputs="lm", note="", **over):
    t = lambda x: tuple(p + y if not y.startswith("=") else y[1:] for y in x.split())
    return Spec(mod, cfg or p + "Config", cls or p + "ForCausalLM", n_moe, t(blocks), t(experts), over, inputs, note)


_SPARSE = ["sparse", "sparse"]
SPECS: dict[str, Spec] = {
    "afmoe": S_("afmoe", "Afmoe", 2, "SparseMoeBlock", "Experts", layer_types=["sliding_attention", "full_attention"], sliding_window=8),
    "aria_text": S_("aria", "AriaText", 2, "MoELayer", "=AriaExperts", note="own sequential grouped GEMM", intermediate_size=MOE_INTER),
    "axk1": S_("axk1", "AXK1", 1, "MoE", "Experts", first_k_dense_replace=1, n_group=2, topk_group=1, num_key_value_heads=4),
    "axk2": S_("axk2", "AXK2", 2, "MoE", "Experts", n_group=1, topk_group=1, num_key_value_heads=4, head_dim=8),
    "cohere2_moe": S_("cohere2_moe", "Cohere2Moe", 2, "SparseMoeBlock", "Experts", logit_scale=1.0, sliding_window=8, intermediate_size=MOE_INTER,
                      layer_types=["sliding_attention", "full_attention"]),
    "dbrx": S_("dbrx", "Dbrx", 2, "FFN", "Experts", note="DbrxExperts: own loop over a DbrxExpertGLU with flat weights",
               d_model=H, n_heads=HEADS, n_layers=2, max_seq_len=128,
               attn_config=dict(kv_n_heads=2, attn_pdrop=0.0, clip_qkv=8.0, rope_theta=10000.0),
               ffn_config=dict(hidden_size=H, ffn_hidden_size=MOE_INTER, moe_num_experts=E, moe_top_k=TOPK, moe_jitter_eps=None)),
    "deepseek_ocr2_text": S_("deepseek_ocr2", "DeepseekOcr2Text", 1, "Moe", "Experts", cls="DeepseekOcr2TextModel",
                             mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1, head_dim=16),
    "deepseek_v2": S_("deepseek_v2", "DeepseekV2", 1, "Moe", "Experts", first_k_dense_replace=1, num_key_value_heads=4, head_dim=8,
                      topk_method="group_limited_greedy", n_group=2, topk_group=1, n_shared_experts=2),
    "deepseek_v3": S_("deepseek_v3", "DeepseekV3", 1, "MoE", "Experts", first_k_dense_replace=1, n_group=2, topk_group=1, num_key_value_heads=4),
    "deepseek_v32": S_("deepseek_v32", "DeepseekV32", 2, "MoE", "Experts", n_group=2, topk_group=1, num_key_value_heads=4, head_dim=8,
                       first_k_dense_replace=...),
    "deepseek_v4": S_("deepseek_v4", "DeepseekV4", 2, "SparseMoeBlock", "Experts", note="layer 0 hash-routed by input_ids, swiglu clamp, hyper-connections",
                      num_key_value_heads=1, head_dim=16, mlp_layer_types=["hash_moe", "moe"], sliding_window=8, o_groups=2, o_lora_rank=16,
                      layer_types=["sliding_attention", "compressed_sparse_attention"], hc_mult=2, hc_sinkhorn_iters=3,
                      compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, partial_rotary_factor=0.5),
    "diffusion_gemma_text": S_("diffusion_gemma", "DiffusionGemmaText", 2, "Experts", "Experts", cls="DiffusionGemmaEncoderTextModel",
                               note="no block module: the decoder layer calls router + experts itself", sliding_window=8,
                               layer_types=["sliding_attention", "full_attention"], global_head_dim=16),
    "doge_cdmoe_block": S_("doge", "Doge", 1, "CDMoE", "CDMoE", cls="DogeCDMoE", inputs="hidden", note="bare DogeCDMoE block: DogeForCausalLM(is_moe=True) is broken in 5.17 "
                           "(decoder layer does not unpack the mlp tuple); product-key experts in nn.Embedding", is_moe=True, num_experts=16, keep_window_size=16),
    "dots1": S_("dots1", "Dots1", 1, "MoE", "Experts", first_k_dense_replace=1, n_group=1, topk_group=1),
    "ernie4_5_moe": S_("ernie4_5_moe", "Ernie4_5_Moe", 1, "SparseMoeBlock", "Experts", moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1),
    "ernie4_5_vl_moe_text": S_("ernie4_5_vl_moe", "Ernie4_5_VLMoe", 2, "SparseMoeBlock", "MoeExperts", cls="Ernie4_5_VLMoeTextModel", cfg="Ernie4_5_VLMoeTextConfig",
                               note="1 sparse layer = text + vision SparseMoeBlock; only text one runs", mlp_layer_types=["dense", "sparse"], moe_intermediate_size=[32, 16],
                               rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])),
    "ernie4_5_vl_moe_text_mm": S_("ernie4_5_vl_moe", "Ernie4_5_VLMoe", 2, "SparseMoeBlock", "MoeExperts", cls="Ernie4_5_VLMoeTextModel", cfg="Ernie4_5_VLMoeTextConfig",
                               inputs="lm_mm", note="same with moe_mm_token_type_ids: boolean-mask split between text and vision experts", mlp_layer_types=["dense", "sparse"],
                               moe_intermediate_size=[32, 16], rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])),
    "exaone_moe": S_("exaone_moe", "ExaoneMoe", 1, "SparseMoEBlock", "Experts", mlp_layer_types=["dense", "sparse"], sliding_window=8, n_group=1, topk_group=1,
                     layer_types=["sliding_attention", "full_attention"], first_k_dense_replace=...),
    "flex_olmo": S_("flex_olmo", "FlexOlmo", 2, "SparseMoeBlock", "Experts", intermediate_size=MOE_INTER),
    "gemma4_text": S_("gemma4", "Gemma4Text", 2, "Experts", "Experts", cls="Gemma4ForCausalLM", enable_moe_block=True, sliding_window=8,
                      note="no block module: decoder layer calls router + experts itself, next to a dense MLP",
                      layer_types=["sliding_attention", "full_attention"], global_head_dim=16, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8),
    "glm4_moe": S_("glm4_moe", "Glm4Moe", 1, "MoE", "Experts", first_k_dense_replace=1, n_group=1, topk_group=1),
    "glm4_moe_lite": S_("glm4_moe_lite", "Glm4MoeLite", 2, "MoE", "Experts", n_group=1, topk_group=1, num_key_value_heads=4),
    "glm4v_moe_text": S_("glm4v_moe", "Glm4vMoeText", 1, "MoE", "Experts", cls="Glm4vMoeTextModel", first_k_dense_replace=1, n_group=1, topk_group=1,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2], partial_rotary_factor=1.0)),
    "glm5_next_text": S_("glm5_next", "Glm5NextText", 2, "MoE", "Experts", cls="Glm5NextTextModel", n_group=1, topk_group=1, num_key_value_heads=4,
                         qk_rope_head_dim=0, head_dim=0, layer_types=["linear_attention", "deepseek_sparse_attention"], hc_mult=2, hc_sinkhorn_iters=3,
                         index_kpool=4, index_topk=8, indexer_types=["full", "full"]),
    "glm5_next_text_linear": S_("glm5_next", "Glm5NextText", 2, "MoE", "Experts", cls="Glm5NextTextModel", n_group=1, topk_group=1, num_key_value_heads=4,
                                qk_rope_head_dim=0, head_dim=0, layer_types=["linear_attention"] * 2, hc_mult=2, hc_sinkhorn_iters=3,
                                note="without the sparse-attention indexer (nonzero breaks the default graph)", index_kpool=4, index_topk=8, indexer_types=["full", "full"]),
    "glm_moe_dsa": S_("glm_moe_dsa", "GlmMoeDsa", 2, "MoE", "Experts", n_group=1, topk_group=1, num_key_value_heads=4, head_dim=8, first_k_dense_replace=...),
    "gpt_oss": S_("gpt_oss", "GptOss", 2, "MLP", "Experts", note="interleaved gate/up, transposed, biases, clamped swiglu; sinks", sliding_window=8, intermediate_size=MOE_INTER,
                  layer_types=["sliding_attention", "full_attention"]),
    "granitemoe": S_("granitemoe", "GraniteMoe", 2, "MoE", "Experts", intermediate_size=MOE_INTER),
    "granitemoe_swa": S_("granitemoe_swa", "GraniteMoeSWA", 2, "MoE", "Experts", intermediate_size=MOE_INTER, sliding_window=8,
                         layer_types=["sliding_attention", "full_attention"]),
    "granitemoehybrid": S_("granitemoehybrid", "GraniteMoeHybrid", 2, "MoE", "Experts", intermediate_size=MOE_INTER, layer_types=["mamba", "attention"],
                           mamba_d_head=16, mamba_n_heads=8, mamba_expand=2, mamba_chunk_size=8),
    "granitemoeshared": S_("granitemoeshared", "GraniteMoeShared", 2, "MoE", "Experts", intermediate_size=MOE_INTER),
    "hunyuan_v1_moe": S_("hunyuan_v1_moe", "HunYuanMoEV1", 2, "Moe", "Experts", intermediate_size=MOE_INTER),
    "hy_v3": S_("hy_v3", "HYV3", 2, "MoE", "Experts"),
    "hy_v4": S_("hy_v4", "HYV4", 2, "MoE", "Experts", n_group=1, topk_group=1, num_key_value_heads=4, hc_mult=2, head_dim=8, indexer_types=["full", "full"]),
    "inkling_text": S_("inkling", "InklingText", 2, "=InklingMoE", "=InklingExperts =InklingSharedExperts", cls="InklingForCausalLM", cfg="InklingTextConfig",
                       swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, sliding_window_size=8, d_rel=8, rel_extent=32,
                       layer_types=["hybrid_sliding", "hybrid"], logits_mup_width_multiplier=1.0, note="shared-expert sink joins the router softmax"),
    "jamba": S_("jamba", "Jamba", 1, "SparseMoeBlock", "Experts", intermediate_size=MOE_INTER, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2,
                attn_layer_offset=1, use_mamba_kernels=False, mamba_dt_rank=4),
    "jetmoe": S_("jetmoe", "JetMoe", 4, "MoE MoA", "ParallelExperts", note="2 layers x (mixture of attention heads + MoE MLP); 4 ParallelExperts per layer; sizes via tolist",
                 kv_channels=16, num_key_value_heads=2, intermediate_size=MOE_INTER),
    "kimi_linear": S_("kimi_linear", "KimiLinear", 2, "MoE", "Experts", n_group=1, topk_group=1, num_key_value_heads=4,
                      layer_types=["linear_attention", "full_attention"], q_lora_rank=None),
    "laguna": S_("laguna", "Laguna", 2, "SparseMoeBlock", "Experts", sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "lfm2_moe": S_("lfm2_moe", "Lfm2Moe", 2, "SparseMoeBlock", "Experts", layer_types=["conv", "full_attention"]),
    "llama4_text": S_("llama4", "Llama4Text", 2, "Moe", "Experts", cls="Llama4ForCausalLM", note="dense bmm over all experts, sigmoid scores on the input",
                      intermediate_size=MOE_INTER, intermediate_size_mlp=INTER, attention_chunk_size=32, interleave_moe_layer_step=1),
    "longcat_flash": S_("longcat_flash", "LongcatFlash", 2, "MoE", "Experts", note="ModuleList of experts + zero (identity) experts", num_layers=2, num_hidden_layers=4,
                        ffn_hidden_size=INTER, expert_ffn_hidden_size=MOE_INTER, zero_expert_num=2, head_dim=8, num_key_value_heads=4),
    "mellum": S_("mellum", "Mellum", 2, "SparseMoeBlock", "Experts", sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "mimo_v2_flash": S_("mimo_v2_flash", "MiMoV2Flash", 2, "MoE", "Experts", n_group=1, topk_group=1, sliding_window=8,
                        layer_types=["full_attention", "sliding_attention"]),
    "minimax": S_("minimax", "MiniMax", 2, "SparseMoeBlock", "Experts", intermediate_size=MOE_INTER, block_size=8, layer_types=["linear_attention", "full_attention"]),
    "minimax_m2": S_("minimax_m2", "MiniMaxM2", 2, "SparseMoeBlock", "Experts", intermediate_size=MOE_INTER,
                     rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
    "minimax_m3_vl_text": S_("minimax_m3_vl", "MiniMaxM3VL", 2, "SparseMoeBlock", "Experts", cls="MiniMaxM3VLForCausalLM", cfg="MiniMaxM3VLTextConfig",
                             intermediate_size=MOE_INTER, dense_intermediate_size=INTER, rotary_dim=8, index_n_heads=2, index_block_size=4, index_topk_blocks=2),
    "mistral4": S_("mistral4", "Mistral4", 2, "MoE", "Experts", n_group=1, topk_group=1, num_key_value_heads=4),
    "mixtral": S_("mixtral", "Mixtral", 2, "SparseMoeBlock", "Experts", intermediate_size=MOE_INTER),
    "nemotron_h": S_("nemotron_h", "NemotronH", 1, "MoE", "Experts", note="has_gate=False (relu2), up/down only; blocks are separate layers",
                     num_hidden_layers=..., layers_block_type=["mamba", "moe", "attention"], use_mamba_kernels=False, ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=16,
                     n_groups=2, chunk_size=8, moe_shared_expert_intermediate_size=MOE_INTER, n_group=1, topk_group=1, num_nextn_predict_layers=...),
    "nllb_moe": S_("nllb_moe", "NllbMoe", 2, "SparseMLP", "Experts", cls="NllbMoeForConditionalGeneration", inputs="encdec", note="top-2, capacity; ModuleDict experts; enc+dec; 5.17 one-hots a 0/1 router mask, so only expert_0 and expert_1 are ever called",
                   encoder_layers=2, decoder_layers=2, encoder_ffn_dim=INTER, decoder_ffn_dim=INTER, encoder_attention_heads=4, decoder_attention_heads=4,
                   encoder_layerdrop=0.0, decoder_layerdrop=0.0, d_model=H, dropout=0.0, encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=64,
                   moe_token_dropout=0.0, init_std=INIT_STD, pad_token_id=1, bos_token_id=0),
    "olmoe": S_("olmoe", "Olmoe", 2, "SparseMoeBlock", "Experts", intermediate_size=MOE_INTER),
    "openai_privacy_filter": S_("openai_privacy_filter", "OpenAIPrivacyFilter", 2, "MLP", "Experts", cls="OpenAIPrivacyFilterForTokenClassification", inputs="enc",
                                note="bidirectional token classifier; transposed + bias experts", sliding_window=8, intermediate_size=MOE_INTER),
    "phimoe": S_("phimoe", "Phimoe", 2, "SparseMoeBlock", "Experts", intermediate_size=MOE_INTER, note="sparsemixer router"),
    "qwen2_moe": S_("qwen2_moe", "Qwen2Moe", 2, "SparseMoeBlock", "Experts"),
    "qwen3_5_moe_text": S_("qwen3_5_moe", "Qwen3_5Moe", 2, "SparseMoeBlock", "Experts", cfg="Qwen3_5MoeTextConfig", layer_types=["linear_attention", "full_attention"],
                           rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0, mrope_section=[3, 3, 2], mrope_interleaved=True)),
    "qwen3_moe": S_("qwen3_moe", "Qwen3Moe", 2, "SparseMoeBlock", "Experts"),
    "qwen3_next": S_("qwen3_next", "Qwen3Next", 2, "SparseMoeBlock", "Experts", layer_types=["linear_attention", "full_attention"]),
    "qwen3_omni_moe_thinker_text": S_("qwen3_omni_moe", "Qwen3OmniMoeThinkerText", 2, "SparseMoeBlock", "Experts", cls="Qwen3OmniMoeThinkerTextModel",
                                      cfg="Qwen3OmniMoeTextConfig", rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])),
    "qwen3_omni_moe_talker": S_("qwen3_omni_moe", "Qwen3OmniMoeTalkerText", 2, "SparseMoeBlock", "Experts", cls="Qwen3OmniMoeTalkerModel",
                                cfg="Qwen3OmniMoeTalkerTextConfig", inputs="embeds", shared_expert_intermediate_size=MOE_INTER, note="config class lacks shared_expert_intermediate_size; passed as extra", rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])),
    "qwen3_vl_moe_text": S_("qwen3_vl_moe", "Qwen3VLMoeText", 2, "SparseMoeBlock", "Experts", cls="Qwen3VLMoeTextModel",
                            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])),
    "qwen4_exp_text": S_("qwen4_exp", "Qwen4ExpText", 2, "SparseMoeBlock", "Experts", cls="Qwen4ExpForCausalLM", layer_types=["linear_attention", "qwen_sparse_attention"],
                         hc_count=2, hc_lowrank=16, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0, mrope_section=[3, 3, 2], mrope_interleaved=True)),
    "qwen4_exp_text_linear": S_("qwen4_exp", "Qwen4ExpText", 2, "SparseMoeBlock", "Experts", cls="Qwen4ExpForCausalLM", layer_types=["linear_attention"] * 2,
                                note="without the sparse-attention indexer, whose own data-dependent code breaks the graph", hc_count=2, hc_lowrank=16,
                                rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0, mrope_section=[3, 3, 2], mrope_interleaved=True)),
    "solar_open": S_("solar_open", "SolarOpen", 2, "MoE", "Experts", n_group=1, topk_group=1),
    "step3p7_text": S_("step3p7", "Step3p7", 2, "SparseMoeBlock", "Experts", cls="Step3p7TextModel", cfg="Step3p7TextConfig", share_expert_dim=MOE_INTER,
                       layer_types=["sliding_attention", "full_attention"], sliding_window=8, note="own loop (not decorated), swiglu clamp"),
    "switch_transformers": S_("switch_transformers", "SwitchTransformers", 2, "SparseMLP", "Experts", cls="SwitchTransformersForConditionalGeneration", inputs="encdec",
                              note="top-1, capacity; ModuleDict experts; enc+dec", d_model=H, d_kv=16, d_ff=INTER, num_layers=2, num_sparse_encoder_layers=1,
                              num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=4, dropout_rate=0.0, eos_token_id=1, bos_token_id=None),
    "vitpose_backbone": S_("vitpose_backbone", "VitPoseBackbone", 2, "MoeMLP", "=VitPoseNaiveMoe", cls="VitPoseBackbone", inputs="pixels",
                           note="vision; expert per image chosen by dataset_index, computed densely", image_size=[32, 32], patch_size=[8, 8], num_experts=8, part_features=16,
                           mlp_ratio=2),
    "zaya": S_("zaya", "Zaya", 2, "SparseMoeBlock", "Experts", note="top-1 only; skip expert; router state carried across layers", num_experts_per_tok=1, router_hidden_size=32, layer_types=["hybrid", "hybrid"]),
}

ZOO = {n: functools.partial(build, n) for n in SPECS}
MOE_LAYERS = {n: s.n_moe for n, s in SPECS.items()}
MOE_BLOCKS = {n: s.blocks for n, s in SPECS.items()}
EXPERTS = {n: s.experts for n, s in SPECS.items()}
FEATURES = {n: s.note for n, s in SPECS.items()}
OWN_LOOP = ("aria_text", "dbrx", "doge_cdmoe_block", "jetmoe", "llama4_text", "longcat_flash", "nllb_moe", "step3p7_text",
            "switch_transformers", "vitpose_backbone")
DECORATED = tuple(n for n in SPECS if n not in OWN_LOOP)


def uses_experts_interface(model):
    """True where transformers lets one choose the experts implementation (model.set_experts_implementation)."""
    return bool(getattr(model, "_can_set_experts_implementation", lambda: False)())


if __name__ == "__main__":
    import sys

    for n in sys.argv[1:] or ZOO:
        try:
            m, kw = ZOO[n]()
            with torch.no_grad():
                y = first_tensor(m(**kw))
            print(f"{n:28s} ok params={sum(p.numel() for p in m.parameters()):8d} out={tuple(y.shape)} finite={bool(torch.isfinite(y).all())} "
                  f"std={y.std().item():.3g} blocks={count_moe_blocks(m, n)}/{MOE_LAYERS[n]} experts_mods={count_experts_modules(m, n)} "
                  f"impl={getattr(getattr(m, 'config', None), '_experts_implementation', None)} settable={uses_experts_interface(m)}", flush=True)
        except Exception as e:
            print(f"{n:28s} FAIL {type(e).__name__}: {str(e)[:300]}", flush=True)
