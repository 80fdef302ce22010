"""Whole models over real ranks (gloo): real transformers models and 35 styles, sharded and not, against the whole model on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import parallel_cases as cases
import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as found:
        yield found


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as found:
        yield found


# Of corpus/styles.py, those that Dynamo captures and that are rewritten on one rank.
CAPTURED = [
    "hf_mixtral_440_range", "hf_qwen2moe_440_shared", "hf_olmoe_457", "mistral_inference", "ds_moe_train_repeat", "openai_gptoss_gather",
    "hf_llama4_dense", "vllm_ref_dense_einsum", "tutorial_dense_loop_masked", "gptfast_gather_einsum", "hf_granitemoe_457_split",
    "torchtitan_for_loop", "tf5_batched_mm", "tf5_grouped_mm",
]  # fmt: skip
LAYOUTS = {
    "ep": {"ep": 4},
    "ep x tp": {"ep": 2, "tp": 2},
    "ep x tp, leader": {"ep": 2, "tp": 2, "tp_dispatch": "leader"},
    "ep spans tp": {"ep": 4, "tp": 2, "dp": 2},
    "ep x dp": {"ep": 2, "dp": 2},
}


@pytest.mark.parametrize("comm", ["alltoall", "allgather"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_model_over_four_ranks_gives_its_logits(four: Ranks, layout: str, comm: str) -> None:
    four.run(cases.real_model, "mixtral", {**LAYOUTS[layout], "comm": comm}, True)


def test_ranks_may_have_unequal_numbers_of_tokens(four: Ranks) -> None:
    four.run(cases.real_model, "mixtral", {"ep": 4}, True, [2, 1, 3, 5])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_with_no_tokens_or_fewer_than_tensor_parallel_ranks(four: Ranks, layout: str) -> None:
    four.run(cases.few_tokens, LAYOUTS[layout], [0, 1, 3, 9])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "jamba", "granitemoe"])
def test_real_models_over_two_ranks(two: Ranks, name: str) -> None:
    two.run(cases.real_model, name, {"ep": 2}, True)


def test_a_model_that_nobody_sharded_uses_its_part_of_each_parameter(two: Ranks) -> None:
    two.run(cases.real_model, "mixtral", {"ep": 2}, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_step_over_four_ranks_is_that_of_one_process(four: Ranks, layout: str) -> None:
    four.run(cases.one_step, "mixtral", LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["ep", "ep x dp"])
def test_a_training_step_under_fsdp2_is_that_of_one_process(four: Ranks, layout: str) -> None:
    four.run(cases.one_step, "mixtral", LAYOUTS[layout], reduced=cases.by_fsdp2)


def test_layers_of_other_sizes_under_fsdp2(two: Ranks) -> None:
    two.run(cases.layers_of_other_sizes)


def test_styles_over_two_ranks(two: Ranks) -> None:
    """The same styles as on one rank are rewritten, and no rank goes another way than the other."""
    for sharded in (False, True):
        found, other = two.run(cases.styles, CAPTURED, {"ep": 2}, sharded)
        assert found == other == dict.fromkeys(CAPTURED, "")


def test_a_sharded_block_that_is_not_rewritten_is_an_error_on_every_rank(two: Ranks) -> None:
    for found in two.run(cases.styles, ["tf5_eager_hit", "expert_choice"], {"ep": 2}, True):
        for why in found.values():
            assert "holds only this rank's experts, and the block that reads it was not rewritten" in why


@pytest.mark.parametrize("axes", [{"comm": "alltoall"}, {"comm": "allgather", "max_tokens_per_rank": 64}])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_stages_fused_for_inference_give_the_same(two: Ranks, name: str, axes: dict[str, Any]) -> None:
    two.run(cases.fused, name, {"ep": 2, **axes})


@pytest.mark.parametrize(("name", "sharded"), [("mixtral", True), ("gpt_oss", True), ("mixtral", False)])
def test_weights_and_rows_in_fp8(two: Ranks, name: str, sharded: bool) -> None:
    for found in two.run(cases.in_fp8, name, {"ep": 2}, sharded):
        assert 1e-4 < found["logits"] < 0.2
        assert all(0.01 < found[each] < 0.2 for each in ("weight 0", "weight 1", "output"))


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_with_weights_and_rows_in_fp8(two: Ranks) -> None:
    """Dispatch, experts and combine are one op there."""
    for found in two.run(cases.in_fp8, "mixtral", {"ep": 2}, True, "inductor", timeout=300):
        assert 1e-4 < found["logits"] < 0.1


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_shared_experts_beside_an_exchange(two: Ranks, name: str) -> None:
    two.run(cases.overlapped, name, {"ep": 2})


@pytest.mark.inductor
def test_inductor_keeps_the_two_halves_of_an_exchange_apart(two: Ranks) -> None:
    two.run(cases.overlapped, "deepseek_v3", {"ep": 2}, "inductor", timeout=300)


@pytest.mark.inductor
def test_inductor_where_a_rank_has_no_tokens(two: Ranks) -> None:
    two.run(cases.few_tokens, {"ep": 2}, [0, 3], "inductor", timeout=300)


@pytest.mark.inductor
@pytest.mark.parametrize("comm", ["alltoall", pytest.param("allgather", marks=pytest.mark.slow)])
def test_inductor_compiles_what_ranks_receive(two: Ranks, comm: str) -> None:
    """The numbers of received rows are sizes that only the data tells."""
    two.run(cases.real_model, "mixtral", {"ep": 2, "comm": comm}, True, [2, 1, 3], "inductor", timeout=300)
    two.run(cases.one_step, "mixtral", {"ep": 2, "comm": comm}, "inductor", timeout=300)
