"""Adapters of communication libraries, over stand-ins for the libraries (library_fakes.py) and real ranks; and each reason of theirs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import exchange_cases as cases
import library_fakes as fakes
import pytest
import torch
from ranks import Ranks

from moe_compile.ops.comm import deepep_ht, deepep_ll, libraries, library_rows, pplx
from moe_compile.ops.comm.setup import Setup
from moe_compile.ops.registry import Problem

VALID = ("random",)  # the other routings name an expert twice, or none
PROVIDERS = tuple(fakes.MODULES)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param) as found:
        yield found


# ---------------------------------------------------------------- layers
def test_deepep_ht(ranks: Ranks) -> None:
    assert ranks.run(fakes.layers, "deepep_ht", 1, cases.ROUTINGS, True) == [1] * ranks.world


def test_deepep_ht_without_reading_counts(ranks: Ranks) -> None:
    ranks.run(fakes.layers, "deepep_ht", 2, ("random", "ids of no expert"), True, cuda_graphs=True, max_tokens=20)


def test_deepep_v2(ranks: Ranks) -> None:
    assert ranks.run(fakes.layers, "deepep_v2", 3, cases.ROUTINGS, True, max_tokens=20) == [1] * ranks.world


def test_deepep_v2_with_valid_ids(ranks: Ranks) -> None:
    ranks.run(fakes.layers, "deepep_v2", 4, VALID, True, ids_valid=True, max_tokens=20)


@pytest.mark.parametrize("provider", ["deepep_ht", "deepep_v2"])
def test_dispatch_experts_and_combine_as_one_op(ranks: Ranks, provider: str) -> None:
    ranks.run(fakes.layers, provider, 8, ("random", "duplicates"), False, max_tokens=20)


def test_deepep_ll(ranks: Ranks) -> None:
    """An object for each number of experts."""
    assert ranks.run(fakes.layers, "deepep_ll", 5, cases.ROUTINGS, False, max_tokens=17) == [2] * ranks.world


def test_deepep_ll_with_valid_ids(ranks: Ranks) -> None:
    ranks.run(fakes.layers, "deepep_ll", 7, VALID, False, ids_valid=True, max_tokens=17)


def test_pplx(ranks: Ranks) -> None:
    """An object for each number of experts and slots."""
    assert ranks.run(fakes.layers, "pplx", 6, VALID, False, ids_valid=True, max_tokens=17) == [3] * ranks.world


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_quantised_to_fp8(ranks: Ranks, provider: str) -> None:
    ranks.run(fakes.quantised, provider)


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize("provider", fakes.BATCHED)
def test_batched_rows_are_computed_where_they_lie(ranks: Ranks, provider: str, quant: str) -> None:
    ranks.run(fakes.rows_in_place, provider, quant)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_fakes_of_the_ops_have_the_shapes_of_what_comes(ranks: Ranks, provider: str) -> None:
    for fields in ({}, {"cuda_graphs": True}, {"ids_valid": True}):
        if fields == {"ids_valid": True} or provider != "pplx":
            ranks.run(fakes.handles_like_fakes, provider, **fields)


def test_deepep_v2_adds_up_rows_as_wide_as_a_token_has_slots(ranks: Ranks) -> None:
    ranks.run(fakes.as_wide_as_slots)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_layers_share_an_object_and_the_last_gives_it_back(ranks: Ranks, provider: str) -> None:
    made, alive, left = ranks.run(fakes.an_object_is_shared, provider)[0]
    assert (made, alive, left) == ((3, 2, 0) if provider == "pplx" else (2, 2, 0))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_goes_wrong_is_told(ranks: Ranks, provider: str) -> None:
    if ranks.world == 4:
        return
    told = ranks.run(fakes.what_goes_wrong, provider)[1]
    assert "is not installed; build it from https://github.com" in told["no library"]
    assert "rows of bfloat16" in told["float32 sum"]
    assert "was destroyed" in told["destroyed"]
    if provider != "deepep_ht":
        assert "rank 1 has 9 tokens, ParallelConfig.max_tokens_per_rank is 4" in told["tokens"]
    if provider in fakes.BATCHED:
        assert "has no backward" in told["send"]
    if provider == "pplx":
        assert "has had no combine" in told["twice"]
        assert "no dispatch before it" in told["collect twice"]
    if provider == "deepep_v2":
        assert "rank 1 of its expert-parallel group (ranks [0, 1]) was refused by deep_ep" in told["refused"]
    assert ("columns; got" if provider in fakes.BATCHED else "was refused by deep_ep") in told["wide"]
    timeout, stopped = (told[text] for text in ("DeepEP error: CPU recv timeout", "CUDA error: unspecified launch failure"))
    assert f"{provider} dispatch: rank 1 got no answer from its expert-parallel group (ranks [0, 1]) after 0.0 s" in timeout
    assert "found its device stopped" in stopped
    assert all(text.startswith("ExchangeError") for text in (timeout, stopped))
    for stage in ("dispatch", "combine", "check"):
        assert f"{provider} {stage}: rank 1 of" in told[f"device {stage}"]
        assert "found its device stopped" in told[f"device {stage}"]


# ---------------------------------------------------------------- reasons
BASE: dict[str, Any] = dict(
    stage="comm", device="cuda", dtype=torch.bfloat16, hidden=7168, num_experts=64, top_k=8, world=8, max_tokens=128, ids_valid=True
)  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A host where everything is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(libraries, "nccl_version", lambda: (2, 30, 4))
    monkeypatch.setattr(libraries, "cuda_tool", lambda name: f"/cuda/bin/{name}")
    monkeypatch.setattr(libraries, "has_rdma", lambda: False)
    for name in (deepep_ll.DEPTH, deepep_ll.WITHOUT_RDMA, pplx.SYNCHRONIZED):
        monkeypatch.delenv(name, raising=False)
    with fakes.installed(fakes.deep_ep(), fakes.pplx_kernels()):
        yield monkeypatch


def why(provider: str, **changed: Any) -> str | None:
    return fakes.MODULES[provider].PROVIDER.supports(Problem(**{**BASE, **changed}))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_problem_that_is_supported_has_a_cost(machine: pytest.MonkeyPatch, provider: str) -> None:
    assert why(provider) is None
    cost = fakes.MODULES[provider].PROVIDER.cost
    few, many = (cost(Problem(**{**BASE, "tokens": n, "max_tokens": n})) for n in (128, 8192))
    assert 50 < few < many < 1e5


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(world=1), "world is 1"),
        (dict(device="cpu"), "device is 'cpu'"),
        (dict(same_host=False), "several hosts"),
        (dict(world=16), "up to 8 ranks of one host, world is 16"),
        (dict(dtype=torch.float32), "in bfloat16, dtype is torch.float32"),
        (dict(num_experts=63), "num_experts is 63, world 8"),
        (dict(quant="int8"), "none or fp8, quant is 'int8'"),
        (dict(hidden=7), "hidden"),
    ],
)
def test_what_none_takes(machine: pytest.MonkeyPatch, provider: str, changed: dict[str, Any], reason: str) -> None:
    assert reason in (why(provider, **changed) or "")


@pytest.mark.parametrize(
    ("provider", "changed", "reason"),
    [
        ("deepep_ht", dict(training=True, quant="fp8"), "for inference only"),
        ("deepep_ht", dict(world=3, num_experts=63), "kernels for 2, 4, 8 ranks of a host, world is 3"),
        ("deepep_ht", dict(hidden=8192), "up to 16352 bytes and multiples of 32; hidden 8192 makes 16384 bytes"),
        ("deepep_ht", dict(hidden=1000, quant="fp8"), "hidden 1000 makes 1000 bytes"),
        ("deepep_ht", dict(top_k=33), "top_k 33"),
        ("deepep_ht", dict(num_experts=2048), "256 experts a rank"),
        ("deepep_ht", dict(cuda_graphs=True, max_tokens=0), "CUDA graphs cannot hold it"),
        ("deepep_v2", dict(training=True, quant="fp8"), "for inference only"),
        ("deepep_v2", dict(max_tokens=0), "max_tokens_per_rank"),
        ("deepep_v2", dict(hidden=7200), "multiple of 256 columns, hidden is 7200"),
        ("deepep_v2", dict(top_k=33), "top_k 33"),
        ("deepep_v2", dict(num_experts=4096), "4096 experts"),
        ("deepep_ll", dict(training=True), "no backward"),
        ("deepep_ll", dict(max_tokens=0), "max_tokens_per_rank"),
        ("deepep_ll", dict(hidden=7424), "2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, hidden is 7424"),
        ("deepep_ll", dict(top_k=12), "top_k 12"),
        ("deepep_ll", dict(num_experts=2048), "2048 experts"),
        ("pplx", dict(training=True), "no backward"),
        ("pplx", dict(max_tokens=0), "max_tokens_per_rank"),
        ("pplx", dict(hidden=7172), "multiple of 8 columns as quant 'none', hidden is 7172"),
        ("pplx", dict(hidden=7296, quant="fp8"), "multiple of 512 columns as quant 'fp8', hidden is 7296"),
    ],
)
def test_limits(machine: pytest.MonkeyPatch, provider: str, changed: dict[str, Any], reason: str) -> None:
    assert reason in (why(provider, **changed) or "")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_devices_that_do_not_do(machine: pytest.MonkeyPatch, provider: str) -> None:
    machine.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    assert "NVLink" in (why(provider) or "")
    machine.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "the device has 8.0" in (why(provider) or "")
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch.cuda.is_available() is False" in (why(provider) or "")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_library_that_is_missing_or_another_one_of_that_name(machine: pytest.MonkeyPatch, provider: str) -> None:
    name = "pplx_kernels" if provider == "pplx" else "deep_ep"
    with fakes.installed(fakes.module(name)):
        assert f"the module {name} at /fake/{name}.py has no " in (why(provider) or "")
    machine.delitem(sys.modules, name)
    libraries.forget()
    assert f"the module {name} is not installed; build it from https://github.com/" in (why(provider) or "")


def test_a_library_that_does_not_import(machine: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "deep_ep.py").write_text("assert False, 'Duplicate NCCL runtime found'")
    machine.delitem(sys.modules, "deep_ep")
    machine.syspath_prepend(str(tmp_path))
    libraries.forget()
    assert "does not import (AssertionError: Duplicate NCCL runtime found)" in (why("deepep_v2") or "")


def test_nothing_is_imported_for_a_problem_that_is_refused_anyway(machine: pytest.MonkeyPatch) -> None:
    with machine.context() as patch:
        patch.setattr(libraries, "find", lambda module: pytest.fail("asked for the library"))
        assert all(why(provider, world=1) for provider in PROVIDERS)


def test_v2_needs_a_new_nccl_and_a_compiler_and_its_own_version(machine: pytest.MonkeyPatch) -> None:
    with fakes.installed(fakes.deep_ep(elastic=False)):
        assert "has no ElasticBuffer" in (why("deepep_v2") or "")
    other = fakes.deep_ep()
    other.EPHandle = Setup  # type: ignore[attr-defined]
    with fakes.installed(other):
        assert "does not know 'topk_idx'; install version 2.1" in (why("deepep_v2") or "")
    machine.setattr(libraries, "cuda_tool", lambda name: None)
    assert "found no nvcc; set CUDA_HOME" in (why("deepep_v2") or "")
    machine.setattr(libraries, "nccl_version", lambda: (2, 28, 9))
    assert "NCCL >= 2.30.4, this process has loaded 2.28.9" in (why("deepep_v2") or "")
    machine.setattr(libraries, "nccl_version", lambda: None)
    assert "has loaded none" in (why("deepep_v2") or "")


def test_low_latency_needs_queue_pairs_where_it_insists_on_them(machine: pytest.MonkeyPatch) -> None:
    assert why("deepep_ll") is None  # V2 does not
    with fakes.installed(fakes.deep_ep(elastic=False)):
        assert "need an RDMA device" in (why("deepep_ll") or "")
        machine.setenv(deepep_ll.WITHOUT_RDMA, "1")
        assert why("deepep_ll") is None
    machine.setenv(deepep_ll.DEPTH, "8")
    assert "NVSHMEM_QP_DEPTH of at least 10, it is 8" in (why("deepep_ll") or "")


def test_pplx_needs_valid_ids_and_a_group_with_a_backend_for_the_cpu(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.distributed, "is_initialized", lambda: True)
    machine.setattr(torch.distributed, "get_backend_config", lambda group: "nccl")
    assert "use init_process_group('cpu:gloo,cuda:nccl')" in (why("pplx") or "")
    machine.setattr(torch.distributed, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    assert why("pplx") is None
    assert "these ids are not known to have none" in (why("pplx", ids_valid=False) or "")


# ---------------------------------------------------------------- parts
def test_more_tokens_than_a_call_takes_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("0", 7168, 8, 64, max_tokens=4096)
    monkeypatch.delenv(deepep_ll.DEPTH, raising=False)
    monkeypatch.delenv(pplx.SYNCHRONIZED, raising=False)
    assert deepep_ll.cap(setup) == 508
    assert pplx.cap(setup) in range(1, pplx.PROCESSORS + 1)
    monkeypatch.setenv(pplx.SYNCHRONIZED, "1")
    assert pplx.cap(setup) == 0
    assert [deepep_ll.room_of(Setup("0", 7168, 8, 64, max_tokens=n), w) for n, w in ((5, 2), (5, 4), (5, 8), (5, 3), (8, 1))] == [
        6,
        5,
        5,
        8,
        8,
    ]


def test_repeated_ids() -> None:
    ids = torch.tensor([[3, 3, 1, 3], [0, 1, 2, 3], [-1, 5, -1, 5]])
    last = library_rows.last_slots(ids)
    assert last.tolist() == [[3, 3, 2, 3], [0, 1, 2, 3], [2, 3, 2, 3]]
    assert library_rows.without_repeats(ids, last).tolist() == [[-1, -1, 1, 3], [0, 1, 2, 3], [-1, -1, -1, 5]]
    assert library_rows.clean_ids(ids, 3, torch.int64).tolist() == [[-1, -1, 1, -1], [0, 1, 2, -1], [-1, -1, -1, -1]]
    assert library_rows.clean_ids(ids[:, :1].expand(-1, 4).t(), 3, torch.int64).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (2, 16), (1, 1)])
def test_rows_survive_as_bytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows = (torch.randn(shape) * 100).to(dtype)
    packed = library_rows.pack(rows, 32)
    assert packed.dtype == torch.bfloat16
    assert packed.shape[1] * 2 % 32 == 0
    assert library_rows.unpack(packed, shape[1], dtype).view(torch.uint8).equal(rows.view(torch.uint8))


def test_the_tools_of_a_toolkit_are_found(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert libraries.cuda_tool("nvcc") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    assert libraries.cuda_tool("nvcc") == str(tmp_path / "bin" / "nvcc")


def test_an_environment_variable_is_set_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EP_SOMETHING", raising=False)
    with libraries.environment("EP_SOMETHING", "1"):
        assert os.environ["EP_SOMETHING"] == "1"
    assert "EP_SOMETHING" not in os.environ
    monkeypatch.setenv("EP_SOMETHING", "0")
    with libraries.environment("EP_SOMETHING", "1"):
        assert os.environ["EP_SOMETHING"] == "0"
    assert os.environ["EP_SOMETHING"] == "0"


def test_workspaces_have_the_exact_size_where_counts_are_read() -> None:
    setup = Setup("0", 16, 2, 8, max_tokens=4)
    assert deepep_ht.received(3, setup) is None
    assert deepep_ht.received(3, dataclasses.replace(setup, max_tokens=0, cuda_graphs=True)) is None


IMPORTS = """
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("deep_ep", "deep_ep_cpp", "pplx_kernels"), name
sys.meta_path.insert(0, Watch())
from moe_compile.ops import registry
from moe_compile.ops.comm import deepep_ht, deepep_ll, deepep_v2, pplx
assert all(each.supports(registry.Problem("comm", world=2)) for each in (deepep_ht, deepep_ll, deepep_v2, pplx))
"""


def test_importing_the_providers_imports_no_library() -> None:
    found = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
