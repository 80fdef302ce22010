"""Checkpoints of sharded models: what is read, what is written, and that another ep reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from workers_sharding import INTER, E, H, Stacked, build

from moe_compile import checkpoint, checkpoint_files
from moe_compile.checkpoint import gather_state_dict, load_sharded, save_sharded
from moe_compile.config import ParallelConfig
from moe_compile.sharding import expert_parameters, expert_range, shard_experts

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, int]]:
    """(name, bytes) of each slice that was taken from a file."""
    taken: list[tuple[str, int]] = []

    class Slice:
        def __init__(self, name: str, of: Any) -> None:
            self.name, self.of, self.get_shape = name, of, of.get_shape

        def __getitem__(self, rows: Any) -> Any:
            value = self.of[rows]
            taken.append((self.name, value.nbytes))
            return value

    class File:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *exc: object) -> None:
            self.file.__exit__(*exc)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.file.get_slice(name))

        def keys(self) -> Any:
            return self.file.keys()

        def metadata(self) -> Any:
            return self.file.metadata()

    opened = checkpoint_files.opened
    for module in (checkpoint, checkpoint_files):
        monkeypatch.setattr(module, "opened", lambda path: File(opened(path)))
    return taken


def whole(folder: Path, files: int = 1) -> dict[str, torch.Tensor]:
    """The unsharded model, saved as others save models; returned with other values than `build` gives."""
    state = {name: torch.randn(v.shape, generator=torch.Generator().manual_seed(5)) for name, v in build().state_dict().items()}
    if files == 1:
        safetensors_torch.save_file(state, folder / "model.safetensors")
        return state
    weight_map = {name: f"model-{i % files}.safetensors" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        safetensors_torch.save_file({n: v for n, v in state.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


def holds(model: nn.Module, want: dict[str, torch.Tensor], rank: int, ep: int) -> None:
    first, last = expert_range(E, ep, rank)
    for name, value in model.state_dict().items():
        stacked = ep > 1 and name.startswith(("layers.1.up", "layers.1.down"))
        assert torch.equal(value, want[name][first:last] if stacked else want[name]), name


def save_all(rank_of: Any, folder: Path, ep: int, model: Any = build) -> dict[str, torch.Tensor]:
    """Saved by ep ranks, one after the other; rank 0 last, as its index says that all is there."""
    for rank in reversed(range(ep)):
        parallel = rank_of(rank, ep)
        save_sharded(shard_experts(model(), parallel), folder, parallel)
    return model().state_dict()


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("meta", [False, True])
def test_a_rank_reads_its_experts_only(rank_of, read, tmp_path, files, meta):
    want, parallel = whole(tmp_path, files), rank_of(1, 2)
    with torch.device("meta" if meta else "cpu"):
        model = shard_experts(build(), parallel)
    loaded = load_sharded(model, tmp_path, parallel)
    holds(model, want, 1, 2)
    assert (loaded.missing, loaded.unexpected) == ((), ())
    held = sum(value.nbytes for value in model.state_dict().values())
    assert sum(size for _, size in read) == loaded.bytes_read == held
    assert dict(read)["layers.1.up"] == 3 * INTER * H * 4
    assert not any(name.startswith("layers.0.experts.0.") for name, _ in read)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(len(p._backward_hooks) == 1 for p in expert_parameters(model).values())


def test_parameters_do_not_hang_on_the_file(rank_of, tmp_path):
    whole(tmp_path)
    parallel = rank_of(0, 2)
    with torch.device("meta"):
        model = shard_experts(build(), parallel)
    load_sharded(model, tmp_path / "model.safetensors", parallel)
    want = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


def test_dtype_and_device_are_the_models(rank_of, tmp_path):
    want, parallel = whole(tmp_path), rank_of(0, 2)
    with torch.device("meta"):
        model = shard_experts(build().to(torch.bfloat16).requires_grad_(False), parallel)
    load_sharded(model, tmp_path, parallel, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(expert_parameters(model)["layers.1.up"], want["layers.1.up"][:4].bfloat16())
    absent = model.layers[0].experts[6].up.weight
    assert (absent.dtype, absent.device.type) == (torch.bfloat16, "cpu")


@pytest.mark.parametrize(("saved", "loaded"), [(2, 4), (4, 2), (4, 1), (1, 2), (2, 2)])
def test_another_ep_reads_what_was_saved(rank_of, read, tmp_path, saved, loaded):
    want = save_all(rank_of, tmp_path, saved)
    for rank in range(loaded):
        parallel = rank_of(rank, loaded)
        with torch.device("meta"):
            model = shard_experts(build(), parallel)
        read.clear()
        load_sharded(model, tmp_path, parallel)
        holds(model, want, rank, loaded)
        assert sum(size for _, size in read) == sum(value.nbytes for value in model.state_dict().values())


def test_what_is_written(rank_of, tmp_path):
    save_all(rank_of, tmp_path, 4)
    files = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert sorted(files) == [*(f"experts-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), "rest.safetensors"]
    assert files["experts-00004-of-00004.safetensors"] < files["experts-00001-of-00004.safetensors"]
    index = json.loads((tmp_path / "moe_compile.index.json").read_text())
    assert index["experts"]["layers.1.up"][3] == ["experts-00004-of-00004.safetensors", 6, 7]
    assert index["weight_map"]["layers.0.experts.2.up.bias"] == "experts-00002-of-00004.safetensors"
    assert index["weight_map"]["layers.0.seen"] == "rest.safetensors"
    with checkpoint_files.opened(tmp_path / "experts-00002-of-00004.safetensors") as file:
        assert json.loads(file.metadata()["moe_compile"])["layers.1.up"] == [2, 4]


def test_files_without_their_index(rank_of, tmp_path):
    want = save_all(rank_of, tmp_path, 2)
    parallel, model = rank_of(2, 4), None
    model = shard_experts(build(), parallel)
    load_sharded(model, sorted(tmp_path.glob("*.safetensors")), parallel)
    holds(model, want, 2, 4)
    with pytest.raises(ValueError, match=r"layers.1.up is \[7, 6, 8\] in the model and \[4, 6, 8\] in the checkpoint .*rows 0 to 3"):
        load_sharded(model, tmp_path / "experts-00001-of-00002.safetensors", parallel, strict=False)


def test_replicas_do_not_write(rank_of, tmp_path):
    parallel = rank_of(1, 2)
    model = shard_experts(build(), parallel)
    object.__setattr__(parallel, "replica_group", dist.new_group([0, 1]))
    save_sharded(model, tmp_path, parallel)
    assert list(tmp_path.iterdir()) == []


def test_tied_parameters_are_saved_once_and_stay_tied(rank_of, tmp_path):
    def tied() -> Any:
        model = build()
        second = Stacked()
        second.up, second.gate.weight = model.layers[1].up, model.layers[1].gate.weight
        model.layers.append(second)
        return model

    want = save_all(rank_of, tmp_path, 2, tied)
    parallel = rank_of(1, 2)
    with torch.device("meta"):
        model = shard_experts(tied(), parallel)
    load_sharded(model, tmp_path, parallel)
    assert model.layers[2]._parameters["up"] is model.layers[1]._parameters["up"]
    assert model.layers[2].gate.weight is model.layers[1].gate.weight
    assert torch.equal(model.layers[2]._parameters["up"], want["layers.2.up"][4:])
    assert torch.equal(model.layers[2]._parameters["down"], want["layers.2.down"][4:])


def test_what_does_not_fit_is_said_before_anything_is_read(rank_of, read, tmp_path):
    state, parallel = whole(tmp_path), rank_of(1, 2)
    model = shard_experts(build(), parallel)
    state["surplus"] = state.pop("head.bias")
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"1 names missing \(head.bias\), 1 unexpected \(surplus\); pass strict=False"):
        load_sharded(model, tmp_path, parallel)
    assert read == []
    assert load_sharded(model, tmp_path, parallel, strict=False)[:2] == (("head.bias",), ("surplus",))
    with torch.device("meta"):
        lost = shard_experts(build(), parallel)
        lost.register_buffer("angles", torch.ones(3), persistent=False)
    save_all(rank_of, tmp_path, 2)
    with pytest.raises(RuntimeError, match=r"1 buffers are on the meta device, and no checkpoint holds them \(angles\)"):
        load_sharded(lost, tmp_path, parallel)


def test_another_configuration_is_said(rank_of, tmp_path):
    model = shard_experts(build(), rank_of(0, 2))
    for call in (load_sharded, save_sharded):
        with pytest.raises(ValueError, match=r"of this Both are spread over 2 ranks and parallel.ep is 1; pass the ParallelConfig"):
            call(model, tmp_path, ParallelConfig())
    with pytest.raises(ValueError, match=r"spread over 1 ranks and parallel.ep is 2; .* or call it first"):
        gather_state_dict(build(), rank_of(0, 2))


def test_missing_files_are_said(rank_of, tmp_path):
    parallel = rank_of(0, 2)
    model = shard_experts(build(), parallel)
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors and no index"):
        load_sharded(model, tmp_path, parallel)
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors does not exist; give"):
        load_sharded(model, tmp_path / "nowhere.safetensors", parallel)
    save_all(rank_of, tmp_path, 2)
    (tmp_path / "experts-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is named by the checkpoint's index, but does not exist"):
        load_sharded(model, tmp_path, parallel)


def test_without_safetensors(rank_of, tmp_path, monkeypatch):
    parallel = rank_of(0, 2)
    model = shard_experts(build(), parallel)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_sharded(model, tmp_path, parallel)


def test_a_model_that_is_not_sharded(rank_of, tmp_path):
    parallel, model = ParallelConfig(), build()
    save_sharded(model, tmp_path, parallel)
    with torch.device("meta"):
        other = build()
    load_sharded(other, tmp_path, parallel)
    got = gather_state_dict(other, parallel)
    assert got is not None
    assert list(got) == list(model.state_dict())
    assert all(torch.equal(got[name], value) for name, value in model.state_dict().items())
