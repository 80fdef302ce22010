"""Exchanges between real ranks over gloo: every provider that runs on a CPU against one process that has all experts."""

from __future__ import annotations

from collections.abc import Iterator

import exchange_cases as cases
import pytest
import torch
from ranks import Ranks

PROVIDERS = ("alltoall", "allgather")
FEWER = {2: {}, 4: {"sizes": ((2, 8), (3, 7))}}  # of K and E, for variants of what four ranks do with all: they take turns on two cores


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param) as found:
        yield found


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_layer_over_ranks_is_the_layer_of_one_process(ranks: Ranks, provider: str) -> None:
    assert ranks.run(cases.many_layers, provider, 1) == [96] * ranks.world


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_known_limit_of_tokens_changes_nothing(ranks: Ranks, provider: str) -> None:
    ranks.run(cases.many_layers, provider, 2, max_tokens=40, **FEWER[ranks.world])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_may_travel_in_fp8(ranks: Ranks, provider: str) -> None:
    ranks.run(cases.many_layers, provider, 3, quant="fp8", backward=False, **FEWER[ranks.world])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_of_bfloat16(ranks: Ranks, provider: str) -> None:
    ranks.run(cases.many_layers, provider, 4, dtype=torch.bfloat16, **FEWER[ranks.world])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_slots_without_an_expert_are_left_out_where_they_are_many(ranks: Ranks, provider: str) -> None:
    ranks.run(cases.exact_slots, provider, 5, **FEWER[ranks.world])


@pytest.mark.parametrize("most", [0, 40])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_stay_sorted_up_to_the_sum_over_slots(ranks: Ranks, provider: str, most: int) -> None:
    """By the experts of GPUs, which sum slots on the way back; torch's grouped_mm runs on a CPU too."""
    run = cases.exact_slots if most else cases.many_layers
    ranks.run(run, provider, 6, experts_provider="cuda_grouped_mm", backward=False, **FEWER[ranks.world])
