"""The suite of ranks (test_exchange, test_parallel_models, test_faults) on GPUs of one host, for the providers that are ours or torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import exchange_cases
import parallel_cases
import pytest
import torch
from ranks import Ranks

pytestmark = pytest.mark.gpus
STANDARD = ("alltoall", "allgather", "nvlink")
ROUTINGS = exchange_cases.ROUTINGS
EVEN = ((2, 8), (1, 4), (4, 4))  # top_k, experts
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep": {"ep": 0}, "ep x tp": {"ep": -1, "tp": 2}, "leader": {"ep": -1, "tp": 2, "tp_dispatch": "leader"}, "ep x dp": {"ep": -1, "dp": 2},
}  # fmt: skip


def world() -> int:
    return 4 if torch.cuda.device_count() >= 4 else 2


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(world(), "cuda") as found:
        yield found


def axes(layout: str, comm: str) -> dict[str, Any]:
    """With two GPUs, one rank an expert group where another axis takes both."""
    found = dict(LAYOUTS[layout])
    ep = {0: world(), -1: world() // 2}[found["ep"]]
    return {**found, "ep": ep, "comm": comm if ep > 1 else "auto", "max_tokens_per_rank": 256}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", STANDARD)
def test_layers_and_their_gradients(ranks: Ranks, provider: str, dtype: torch.dtype) -> None:
    ranks.run(exchange_cases.many_layers, provider, 1, dtype=dtype, max_tokens=40)


@pytest.mark.parametrize("hidden", [16, 20, 7])
@pytest.mark.parametrize("provider", [*STANDARD, "nvlink_batched"])
def test_layers_for_inference(ranks: Ranks, provider: str, hidden: int) -> None:
    fields = {"sizes": EVEN} if provider == "nvlink_batched" else {}
    dtype = torch.float32 if hidden == 7 else torch.bfloat16
    ranks.run(exchange_cases.many_layers, provider, 2, dtype=dtype, backward=False, hidden=hidden, max_tokens=40, **fields)


@pytest.mark.parametrize("provider", ["nvlink", "nvlink_batched"])
@pytest.mark.parametrize("fields", [{}, {"quant": "fp8", "hidden": 256}])
def test_layers_by_our_kernels(ranks: Ranks, provider: str, fields: dict[str, Any]) -> None:
    """Batched rows are computed where they arrived."""
    if provider == "nvlink_batched" and fields:
        return  # it carries rows as they are
    given = {"dtype": torch.bfloat16, "backward": False, "max_tokens": 40, "sizes": EVEN, "experts_provider": "triton", **fields}
    ranks.run(exchange_cases.many_layers, provider, 8, **given)


@pytest.mark.parametrize("provider", ["nvlink", "nvlink_batched"])
def test_the_first_exchange_of_a_workspace(ranks: Ranks, provider: str) -> None:
    ranks.run(exchange_cases.first_exchanges, provider, 7, 40, dtype=torch.bfloat16, max_tokens=40)


@pytest.mark.parametrize("provider", STANDARD)
def test_rows_in_fp8(ranks: Ranks, provider: str) -> None:
    fields = {"quant": "fp8", "dtype": torch.bfloat16, "backward": False}
    ranks.run(exchange_cases.many_layers, provider, 3, hidden=256, max_tokens=40, **fields)


@pytest.mark.parametrize("provider", ["allgather", "nvlink", "nvlink_batched"])
def test_a_replayed_cuda_graph_follows_its_routing(ranks: Ranks, provider: str) -> None:
    for experts in ("cuda_grouped_mm", "triton"):
        ranks.run(exchange_cases.replayed, provider, 4, torch.bfloat16, 64, experts_provider=experts, max_tokens=16)


@pytest.mark.parametrize("comm", STANDARD)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_model_gives_its_logits_and_gradients(ranks: Ranks, layout: str, comm: str) -> None:
    if axes(layout, comm)["ep"] == 1 and comm != "alltoall":
        return  # two GPUs and another axis: no exchange, which one of the three shows
    ranks.run(parallel_cases.real_model, "mixtral", axes(layout, comm), True, [2, 1, 3, 5])
    ranks.run(parallel_cases.one_step, "mixtral", axes(layout, comm))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_real_models(ranks: Ranks, name: str) -> None:
    ranks.run(parallel_cases.real_model, name, axes("ep", "auto"), True)


@pytest.mark.parametrize("comm", STANDARD)
def test_shared_experts_beside_an_exchange(ranks: Ranks, comm: str) -> None:
    ranks.run(parallel_cases.overlapped, "deepseek_v3", axes("ep", comm))


@pytest.mark.inductor
def test_inductor_with_shared_experts_beside_an_exchange(ranks: Ranks) -> None:
    ranks.run(parallel_cases.overlapped, "deepseek_v3", axes("ep", "nvlink"), "inductor", timeout=300)


@pytest.mark.inductor
@pytest.mark.parametrize("comm", ["nvlink", "allgather"])
def test_models_in_cuda_graphs(ranks: Ranks, comm: str) -> None:
    ranks.run(parallel_cases.graphed, "deepseek_v3", axes("ep", comm), timeout=300)


def test_rows_beyond_the_capacity_of_an_expert(ranks: Ranks) -> None:
    """An error at the next call, or left out of the sum where that was asked for."""
    ranks.run(exchange_cases.too_many_rows)


@pytest.mark.inductor
@pytest.mark.parametrize("comm", STANDARD)
def test_inductor(ranks: Ranks, comm: str) -> None:
    ranks.run(parallel_cases.real_model, "mixtral", axes("ep", comm), True, [2, 1, 3], "inductor", timeout=300)
    ranks.run(parallel_cases.one_step, "mixtral", axes("ep", comm), "inductor", timeout=300)


@pytest.mark.parametrize("how", ["dies", "stalls"])
@pytest.mark.parametrize("provider", ["alltoall", "nvlink"])
def test_a_rank_that_is_gone_is_named_within_the_timeout(provider: str, how: str) -> None:
    """Stage and group, by every rank that is left."""
    count = world()
    with Ranks(count, "cuda", timeout=60) as own:
        alive = list(range(count - 1)) if how == "dies" else list(range(count))
        found = own.run_some(alive, parallel_cases.dead_rank, provider, count - 1, how, timeout=60)
    for told in found[: count - 1]:
        assert f"ranks {list(range(count))}" in told, told
        assert 2.0 < float(told.split(" s:")[0]) < 15.0, told
