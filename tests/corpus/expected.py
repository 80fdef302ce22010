"""What is expected of each style and model: one graph and rewritten, but for what is written down here."""

from __future__ import annotations

import torch

# name -> graphs that Dynamo makes of it with the capture flags, or what it raises.  Not here: one graph.
# moe_compile.compile records these, and rewrites them, but for STYLE_LEFT.
STYLE_GRAPHS: dict[str, int | str] = {
    "hf_mixtral_457_hit": 3,
    "hf_qwen3next_457_shared_hit": 4,
    "hf_jamba_457": 2,
    "hf_mixtral_436_list": 2,
    "hf_dsv3_457_moe": 4,
    "ds_v3_repo_bincount": "GuardOnDataDependentSymNode",
    "hf_dsv2_457_argsort": 4,
    "ds_remote_moe_infer_numpy": 4,
    "hf_gptoss_457_loop": 3,
    "hf_gptoss_517_loop": 3,
    "gptfast_aoquant_disable": 2,
    "lucidrains_moe_top2": 6,
    "hf_switch_457": "GuardOnDataDependentSymNode",
    "makemoe_any_mask": 0,
    "makemoe_capacity": 0,
    "tf5_eager_hit": 5,
    "argsort_bincount_split": "GuardOnDataDependentSymNode",
    "offsets_by_comparison": 3,
    "lists_of_tokens": 3,
    "permuted_by_library": "GuardOnDataDependentSymNode",
    "low_rank_beside_a_layer": 5,
    "second_above_threshold": 3,
    "module_of_one_token": 3,
    "one_choice_a_sequence": 2,
    "sparse_dispatcher": 8,
    "sparse_dispatcher_log": 10,
    "unique_with_counts": "GuardOnDataDependentSymNode",
    "parameters_without_tokens": 3,
    "sequences_of_an_expert": 2,
    "sequences_one_by_one": 3,
}

# Not one graph, and the recording is no help: name -> what the report says.
STYLE_LEFT: dict[str, str] = {
    "offsets_by_comparison": "decides by a size that only the data tells",
}

# One graph, but not this formula or beyond the calculus: name -> what the reason says.
STYLE_REFUSED: dict[str, str] = {
    "expert_choice": "several sums over experts",
    "hf_doge_cdmoe": "product keys",
    "expert_norm_inside": "not a linear layer of the selected expert",
    "conv1x1_experts": "",  # channels stand before the pixels, and the output's rows are its last dimension
    "expert_int8_weights": "scales of quantised weights would be trained",
}

# Regions of one style, where it is not one.
STYLE_REGIONS: dict[str, int] = {
    "outside_two_layers": 2,
    "outside_two_routers_one_pool": 2,
    "gather_chunked_tokens": 2,
}

ZOO_SAMPLE = [
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "olmoe",
    "qwen2_moe",
    "deepseek_v2",
    "llama4_text",
    "granitemoe",
    "dbrx",
    "phimoe",
    "nemotron_h",
    *(["aria_text"] if torch.__version__ >= "2.13" else []),  # Dynamo of 2.11 breaks its graph
]

_BREAKS = "compiled without Dynamo's capture flags"

# model -> (MoE blocks that stay as they are, a part of the report that says why).
ZOO_REFUSED: dict[str, tuple[int, str]] = {
    "deepseek_v4": (1, ""),  # layer 0 takes its experts from a table of token ids
    "doge_cdmoe_block": (1, "product keys"),
    "ernie4_5_vl_moe_text": (1, ""),  # the vision block is never called
    "vitpose_backbone": (2, ""),  # the caller says which experts to take
}

# Rewritten in full although Dynamo breaks the graph elsewhere.
ZOO_SEVERAL_GRAPHS = frozenset({"ernie4_5_vl_moe_text_mm", "qwen4_exp_text", "switch_transformers"})
