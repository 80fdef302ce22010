"""Providers: registered by stage and name, asked for their limits, and named in errors."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import pytest
import torch

from moe_compile import ops
from moe_compile.ops import _register, registry
from moe_compile.ops.registry import Problem, Provider


def test_every_stage_has_its_providers() -> None:
    names = {stage: [provider.name for provider in registry.providers(stage)] for stage in registry.STAGES}
    assert names["route"] == ["torch", "triton"]
    assert {"local", "allgather", "alltoall"} <= set(names["comm"])
    assert {"reference", "cpu_grouped", "cuda_grouped_mm"} <= set(names["experts"])


def test_a_provider_registered_again_replaces_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_providers", dict(registry._providers))
    first = Provider("mine", "experts", {}, lambda problem: 1.0)
    second = Provider("mine", "experts", {}, lambda problem: 2.0)
    registry.register(first)
    registry.register(second)
    assert registry.get("experts", "mine") is second
    assert [p.name for p in registry.providers("experts")].count("mine") == 1


def test_unknown_names_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no provider 'pigeon' .* registered: .*local"):
        registry.get("comm", "pigeon")
    with pytest.raises(ValueError, match="unknown stage 'expert'; stages are route, comm, experts"):
        registry.providers("expert")
    with pytest.raises(ValueError, match="stages are route, comm, experts"):
        registry.register(Provider("mine", "combine", {}, lambda problem: 0.0))
    with pytest.raises(ValueError, match=r"'reference' .* does not implement route"):
        registry.kernel("experts", "reference", "route")


def test_limits_are_said_with_value_and_limit() -> None:
    local, cpu = registry.get("comm", "local"), registry.get("experts", "cpu_grouped")
    assert local.supports(Problem("comm")) is None
    assert local.supports(Problem("comm", world=8)) == "local keeps all experts on one rank, world is 8"
    assert "fp8" in (local.supports(Problem("comm", quant="fp8")) or "")
    assert cpu.supports(Problem("experts")) is None
    assert cpu.supports(Problem("experts", device="cuda")) == "cpu_grouped runs on cpu, device is cuda"


def test_costs_grow_with_tokens_and_the_reference_is_never_the_cheapest() -> None:
    cheap = registry.get("experts", "cpu_grouped")
    few, many = (Problem("experts", hidden=512, intermediate=256, num_experts=32, top_k=4, tokens=t) for t in (1, 4096))
    assert cheap.cost(few) < cheap.cost(many) < registry.get("experts", "reference").cost(many)


def test_importing_the_ops_imports_nothing_heavy() -> None:
    code = "import sys, moe_compile.ops; print([m for m in ('transformers', 'triton', 'torch._inductor') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_importing_the_ops_twice_keeps_them_working_and_takes_the_new_code(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("moe_compile.ops.combine")
    y = torch.ones(1, 2, 3)
    before = torch.ops.moe_compile.combine(y, None, [], None, "local")
    table = _register._table()
    monkeypatch.setitem(table, "combine", table["combine"])
    _register.register_op(module.SCHEMA, lambda *args: torch.full((1, 3), 7.0), module.OP.fake, autograd=module.OP.autograd)
    assert torch.equal(torch.ops.moe_compile.combine(y, None, [], None, "local"), torch.full((1, 3), 7.0))
    monkeypatch.undo()
    assert torch.equal(torch.ops.moe_compile.combine(y, None, [], None, "local"), before)


def test_another_schema_under_a_registered_name_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"already registered as .* start a new one"):
        _register.register_op("combine(Tensor y) -> Tensor", lambda y: y, lambda y: y)


def test_each_op_with_gradients_has_a_twin_without_and_no_other_has_one() -> None:
    table = _register._table()
    for name, (op, _) in table.items():
        twin = _register.twin_below(op.overload)
        assert (twin is None) == (op.autograd is None), name
        if twin is not None:
            assert str(twin._schema) == str(op.overload._schema).replace(name, name + _register.BELOW, 1)
            assert not twin.has_kernel_for_dispatch_key(torch._C.DispatchKey.AutogradCPU)
    assert _register.twin_below(torch.ops.aten.add.Tensor) is None
    assert _register.twin_below(torch.add) is None


def test_a_twin_computes_the_same_for_real_and_fake_tensors() -> None:
    from moe_compile.ops import route

    for args in route.sample_inputs():
        twin = _register.twin_below(route.OP.overload)
        for got, wanted in zip(twin(*args), route.OP.overload(*args), strict=True):
            assert torch.equal(got, wanted)
        torch.library.opcheck(twin, args, test_utils=("test_schema", "test_faketensor"))


def test_source_hash_is_stable_and_covers_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.source_hash() == ops.source_hash()
    read: list[str] = []

    def read_bytes(path: pathlib.Path) -> bytes:
        read.append(path.name)
        return b""

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    ops.source_hash()
    assert {"combine.py", "experts_cpu.py", "program.py", "_register.py"} <= set(read)
