"""Five real transformers models from small configurations: random weights, nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

VOCABULARY, LAYERS = 512, 2
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    use_cache=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)

CONFIGS: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: transformers.MixtralConfig(
        **COMMON, num_hidden_layers=LAYERS, intermediate_size=256, num_local_experts=16, num_experts_per_tok=2
    ),
    "Qwen3-MoE": lambda: transformers.Qwen3MoeConfig(
        **COMMON,
        num_hidden_layers=LAYERS,
        head_dim=64,
        moe_intermediate_size=128,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "DeepSeek-V3": lambda: transformers.DeepseekV3Config(  # its first layer is dense
        **COMMON,
        num_hidden_layers=LAYERS + 1,
        first_k_dense_replace=1,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        kv_lora_rank=64,
        q_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
    ),
    "GPT-OSS": lambda: transformers.GptOssConfig(
        **COMMON,
        num_hidden_layers=LAYERS,
        head_dim=64,
        intermediate_size=128,
        num_local_experts=16,
        num_experts_per_tok=4,
        sliding_window=128,
    ),
    "OLMoE": lambda: transformers.OlmoeConfig(
        **COMMON, num_hidden_layers=LAYERS, intermediate_size=128, num_experts=32, num_experts_per_tok=4
    ),
}


def build(name: str, device: str = "cpu") -> Any:
    """The model of that name in eval mode, float32; every one has LAYERS MoE blocks."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(device)
