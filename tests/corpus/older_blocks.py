"""MoE blocks of transformers 4.57 by themselves, of models that the zoo cannot build there: their configurations have other names.

Each builder gives a small block in eval mode and its arguments. Without that version the imports fail.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

SIZES = {"hidden_size": 32, "moe_intermediate_size": 48, "num_experts_per_tok": 2}


def _made(family: str, block: str, config: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    module = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), block)(config)
    for parameter in module.parameters():  # some are made empty
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval(), {"hidden_states": torch.randn(2, 7, SIZES["hidden_size"])}


def _config(family: str, name: str) -> Any:
    return getattr(import_module(f"transformers.models.{family}.configuration_{family}"), name)


def dbrx() -> tuple[torch.nn.Module, dict[str, Any]]:
    experts = _config("dbrx", "DbrxFFNConfig")(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)
    module, given = _made("dbrx", "DbrxFFN", _config("dbrx", "DbrxConfig")(d_model=32, n_heads=2, n_layers=1, ffn_config=experts))
    return module, {"x": given["hidden_states"]}


def glm4v_moe_text() -> tuple[torch.nn.Module, dict[str, Any]]:
    groups = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return _made("glm4v_moe", "Glm4vMoeTextMoE", _config("glm4v_moe", "Glm4vMoeTextConfig")(**SIZES, **groups))


def qwen3_vl_moe_text() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = _config("qwen3_vl_moe", "Qwen3VLMoeTextConfig")(**SIZES, num_experts=4)
    return _made("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", config)


def qwen3_omni_moe_thinker_text() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = _config("qwen3_omni_moe", "Qwen3OmniMoeTextConfig")(**SIZES, num_experts=4)
    return _made("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock", config)


def qwen3_omni_moe_talker() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = _config("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextConfig")(**SIZES, num_experts=4, shared_expert_intermediate_size=40)
    return _made("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextSparseMoeBlock", config)


Builder = Callable[[], tuple[torch.nn.Module, dict[str, Any]]]
BLOCKS: dict[str, Builder] = {
    each.__name__: each for each in (dbrx, glm4v_moe_text, qwen3_vl_moe_text, qwen3_omni_moe_thinker_text, qwen3_omni_moe_talker)
}
