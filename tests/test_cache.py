"""Inductor's caches on disk: another process hits them, and an edit to an op's source misses them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_compile import ParallelConfig
from moe_compile.inductor import BelowAutograd, SourcesInCacheKey
from moe_compile.options import Options

ROOT = Path(__file__).parent.parent

# Matrix products only: Inductor calls a library for those, and compiles no C++ here.
PROGRAM = """
import fakes, torch, moe_compile
from moe_compile import passes
passes.run = fakes.refuse_all
from torch._dynamo.utils import counters
with torch.no_grad():
    moe_compile.compile(torch.nn.Linear(8, 8))(torch.ones(5, 8))
found = counters["inductor"]
print("hit" if found["fxgraph_cache_hit"] else "miss" if found["fxgraph_cache_miss"] else "bypass")
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package as it installs, to edit."""
    for part in ("moe_compile", "passes", "ops"):
        target = tmp_path / "moe_compile" / ("" if part == "moe_compile" else part)
        shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.inductor
def test_second_process_hits_and_an_edited_op_misses(package, tmp_path):
    def run():
        paths = os.pathsep.join([str(package), str(ROOT / "tests")])
        env = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[-1]

    assert run() == "miss"
    assert run() == "hit"
    op = package / "moe_compile" / "ops" / "combine.py"
    op.write_text(op.read_text() + "\n# another way to add the slots up\n")
    assert run() == "miss"


class Keyed(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __init__(self, key):
        self.key, self.graphs = key, []

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        return self.key


def key(options=None, user=None):
    return SourcesInCacheKey(options or Options(), user).uuid()


def test_key_is_the_same_for_the_same_sources_and_options():
    assert key() == key() == key(Options(validate="off"))
    assert key(Options(parallel=ParallelConfig())) != key()


def test_key_follows_the_sources(monkeypatch):
    before = key()
    monkeypatch.setattr("moe_compile.ops.source_hash", lambda: "edited")
    assert key() != before


def test_users_own_pass_runs_and_keys_the_cache():
    mine, graph = Keyed("mine"), torch.fx.Graph()
    SourcesInCacheKey(Options(), mine)(graph)
    assert mine.graphs == [graph]
    assert key(user=mine) == key(user=[Keyed("mine")]) != key(user=Keyed("other")) != key()


def test_ops_with_gradients_are_called_below_autograd():
    from moe_compile.ops import grouped, route

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for target in (route.OP.overload, torch.ops.aten.neg.default, grouped.OP.overload):
        x = graph.call_function(target, (x,))
    BelowAutograd()(graph)
    targets = [str(node.target) for node in graph.nodes][1:]
    assert targets == ["moe_compile.route_below_autograd.default", "aten.neg.default", str(grouped.OP.overload)]


def test_users_pass_without_a_key_means_no_caching():
    assert key(user=lambda graph: None) is None


def test_users_pass_that_asks_for_inference_hears_of_it():
    base = getattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    if base is None:
        return  # this torch has no such passes

    class Aware(base):
        def __call__(self, graph, is_inference):
            self.heard = is_inference

        def uuid(self):
            return "aware"

    aware = Aware()
    SourcesInCacheKey(Options(), aware)(torch.fx.Graph(), is_inference=True)
    assert aware.heard is True


@pytest.mark.inductor
def test_users_pass_in_inductors_configuration_still_runs(fresh_dynamo, monkeypatch):
    import fakes
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    import moe_compile
    from moe_compile import passes

    monkeypatch.setattr(passes, "run", fakes.refuse_all)
    globally, by_option = Keyed("globally"), Keyed("by option")
    with fresh_cache(), config.patch(post_grad_custom_post_pass=globally), torch.no_grad():
        moe_compile.compile(torch.nn.Linear(8, 8))(torch.ones(5, 8))
        options = {"post_grad_custom_post_pass": by_option}
        moe_compile.compile(torch.nn.Linear(8, 8), options=options)(torch.ones(5, 8))
    assert len(globally.graphs) == len(by_option.graphs) == 1
