"""Which tests run where, and a clean compiler for each."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

NEEDS = {
    "gpu": lambda: __import__("torch").cuda.is_available(),
    "gpus": lambda: __import__("torch").cuda.device_count() > 1,
    "inductor": lambda: _has_cpp_compiler(),
    "slow": lambda: os.environ.get("MOE_COMPILE_SLOW") == "1",
    "style": lambda: all(importlib.util.find_spec(tool) for tool in ("ruff", "mypy")),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this machine cannot run (it is counted as deselected, not as skipped)."""
    kept, dropped = [], []
    for item in items:
        missing = [mark for mark in NEEDS if item.get_closest_marker(mark) and not _has(mark)]
        (dropped if missing else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@functools.cache
def _has(mark: str) -> bool:
    return NEEDS[mark]()


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


@pytest.fixture(autouse=True)
def replays(request: pytest.FixtureRequest):
    """Calls are computed anew, as tests change what kernels are chosen by; with the mark `replays` they are as users have them."""
    from moe_compile.ops import replay

    replay.forget()
    if request.node.get_closest_marker("replays"):
        yield
        return
    with replay.paused():
        yield


@pytest.fixture
def fresh_dynamo():
    """Dynamo without compiled code from earlier tests, and a compiler that tells everything again."""
    import torch

    from moe_compile import logs

    torch._dynamo.reset()
    logs.forget()
    yield
    torch._dynamo.reset()


@pytest.fixture
def rank_of():
    """rank_of(rank, ep): this process as one rank of ep, its collectives doing nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from moe_compile.config import ParallelConfig

    def start(rank: int, ep: int) -> ParallelConfig:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=ep, store=FakeStore())
        return ParallelConfig(ep=ep, ep_group=dist.group.WORLD) if ep > 1 else ParallelConfig()

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()
