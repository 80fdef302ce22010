"""The benchmarks with tiny sizes on the CPU, those over ranks on two gloo processes: what they print and write, and that a wrong result
fails them."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_jobs
import pytest
import torch
from bench_jobs import FOLDER, Done
from interpreted import Cases
from ranks import Ranks

BROKEN = """
from moe_compile.ops import registry
from moe_compile.ops.comm import alltoall
from moe_compile.ops.comm.exchange import EXCHANGE


class Broken(alltoall.AllToAll):
    name = "broken"

    def collect(self, rows_RX, handle, out_dtype, weights_TK=None):
        out = super().collect(rows_RX, handle, out_dtype)
        out[-1] *= 1 - 0.05 * self.rank  # one row of one rank, by a little
        return out


kernels = {**alltoall.PROVIDER.kernels, EXCHANGE: Broken}
registry.register(registry.Provider("broken", "comm", kernels, alltoall.cost, alltoall.supports))
"""
TINY = ["--tokens", "1", "5", "--hidden", "256", "--experts", "8", "--top-k", "2", "--repeats", "3"]


Run = Callable[..., Done]  # (script, *arguments)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Run]:
    """Runs a benchmark on two CPU ranks that stay."""
    with Ranks(2) as pair:
        yield lambda script, *args: pair.run(bench_jobs.on_ranks, script, "--cpu", *args, timeout=300)[0]


@pytest.fixture(scope="module")
def alone() -> Iterator[Run]:
    """Runs a benchmark in one process that stays."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), bench_jobs.quiet_environment) as pool:
        yield lambda script, *args, **options: pool.submit(bench_jobs.alone, script, *args, **options).result(300)


def plot(name: str = "plot") -> Any:
    """benchmarks/plot.py, or another that needs nothing, as a module."""
    spec: Any = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table_rows(text: str) -> list[list[str]]:
    """Cells of every line of a Markdown table that is not its head."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line] for line in lines]


@pytest.fixture(scope="module")
def exchanged(ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """What benchmarks/exchange.py says and writes, run twice with one file."""
    path = tmp_path_factory.mktemp("exchange") / "x.csv"
    ranks("exchange", *TINY, "--providers", "raw", "--payloads", "none", "--out", str(path))
    return ranks("exchange", *TINY, "--providers", "alltoall", "allgather", "deepep_ll", "--out", str(path)), path


def test_every_exchange_is_measured_and_right(exchanged: tuple[Done, Path]) -> None:
    done, path = exchanged
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = {(row["name"], row["payload"], row["tokens"]) for row in rows if row["both_us"]}
    assert {(name, payload, n) for name in ("alltoall", "allgather") for payload in ("none", "fp8") for n in ("1", "5")} <= timed
    assert {row["name"].split(",")[0] for row in rows if row["kind"] == "part" and row["both_us"]} == {
        "raw all_to_all_single", "raw all_gather + reduce_scatter",
    }  # fmt: skip
    for row in rows:
        assert row["ok"] == "True", row
        times = [row[f"{part}_us"] for part in ("dispatch", "collect", "both")]
        assert all(float(t) > 0 for t in times) if row["both_us"] else row["note"].startswith("not supported: "), row


def test_one_table_and_a_picture_of_several_runs(exchanged: tuple[Done, Path], alone: Run) -> None:
    _, path = exchanged
    done = alone("plot", str(path))
    assert done.returncode == 0, done.stderr
    text = path.with_suffix(".md").read_text()
    assert text.count("### ") == 4
    cells = [row for row in table_rows(text) if row[0] in ("alltoall", "allgather")]
    assert len(cells) == 8
    assert all(len(row) == 9 and float(row[3]) > 0 and float(row[7]) >= 1 and float(row[8]) < 5e-2 for row in cells), cells
    assert any("raw all_to_all_single" in row[0] and row[0].endswith("(part)") for row in table_rows(text))
    assert path.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None), done.stdout


def test_a_wrong_result_fails_the_run_of_torchrun(tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    args = [*TINY, "--providers", "alltoall", "broken", "--payloads", "none", "--plugin", str(plugin)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FOLDER / "exchange.py"), "--cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode != 0
    found = {row[0]: row[7] for row in table_rows(done.stdout)}
    assert found["broken"] == "WRONG", done.stdout + done.stderr
    assert float(found["alltoall"]) == 1.0


def test_ratios_are_those_of_one_session_and_wrong_rows_have_none() -> None:
    def row(session: str, name: str, us: str, kind: str = "provider", mode: str = "eager", ok: str = "True") -> dict[str, str]:
        about = {"hardware": "4 x GPU", "software": "torch", "command": "x", "date": "today", "flush": "True", "repeats": "3"}
        case = {"world": "4", "hidden": "64", "top_k": "2", "experts": "8", "dtype": "bfloat16", "payload": "none", "tokens": "16"}
        times = {"dispatch_us": us, "collect_us": us, "both_us": us, "error": "1e-3", "note": "" if us else "not supported: so"}
        return {"session": session, **about, **case, "name": name, "kind": kind, "mode": mode, **times, "ok": ok}

    rows = [
        row("a", "nvlink", "20"), row("a", "nvlink", "10", mode="graph"), row("a", "nvlink_batched", "5"), row("a", "alltoall", "30"),
        row("a", "fast but wrong", "1", ok="False"), row("a", "raw lib", "15", "raw"), row("a", "raw part", "2", "part"),
        row("b", "alltoall", "11"), row("a", "later", ""), row("a", "later", "40"), row("a", "never", ""),
    ]  # fmt: skip
    text = plot().table(rows)
    better, eager, graph = [cells[2:] for cells in table_rows(text) if cells[0] == "bfloat16" and len(cells) == 7]
    assert better == ["10", "alltoall 30", "3.00x", "raw lib 15", "1.50x"]
    assert eager == ["20", "alltoall 30", "1.50x", "raw lib 15", "0.75x"]
    assert graph == ["10", "-", "-", "-", "-"]
    ratio = {cells[0]: cells[7] for cells in table_rows(text.split("session b)")[0]) if len(cells) == 9}
    assert ratio["nvlink"] == "1.00"
    assert ratio["alltoall"] == "3.00"
    assert ratio["later"] == "4.00"
    assert ratio["fast but wrong"] == "WRONG"
    assert [line for line in text.splitlines() if line.startswith("- never")] == ["- never, eager: not supported: so (16 bfloat16)"]


@pytest.mark.parametrize("train", [[], ["--train"]])
def test_a_layer_over_ranks_is_measured(ranks: Run, train: list[str]) -> None:
    args = ["--shape", "tiny", "--tokens", "8", "--repeats", "3", "--inner", "eager", "--providers", "alltoall", "allgather", "pplx"]
    done = ranks("ep_layer", *args, *train)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row[0]: row for row in table_rows(done.stdout)}
    for path in ("ours alltoall", "ours allgather", "by hand", "transformers"):
        assert float(found[path][1]) > 0, done.stdout
        assert float(found[path][3]) > 0
    assert "pplx runs on CUDA devices" in found["ours pplx"][5]


def test_a_model_over_ranks_gives_its_logits(ranks: Run) -> None:
    done = ranks("ep_model", "--tiny", "--providers", "alltoall", "--inner", "eager", "--repeats", "2", "--rivals", "eager")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row[0]: row for row in table_rows(done.stdout)}
    assert float(found["ours alltoall, float32"][2]) < 1e-5
    assert float(found["ours alltoall, bfloat16"][2]) < 6e-2
    for path in ("one GPU", "ours alltoall"):
        assert float(found[path][1]) > 0
        assert float(found[path][4]) > 0
    rival = found["transformers, expert parallel, eager"]
    assert rival[1] == "-" or float(rival[1]) > 0, rival  # its plan may not run on gloo; the reason stands in the table


ENDS = """
import dataclasses
import os

import layer_measure

from moe_compile.ops import experts_cpu, registry
from moe_compile.ops.experts import COMBINED

calls = []


def provider(name, kernel):
    registry.register(dataclasses.replace(experts_cpu.PROVIDER, name=name, kernels={**experts_cpu.PROVIDER.kernels, COMBINED: kernel}))


def wrong(call, out_dtype):
    out = experts_cpu.PROVIDER.kernels[COMBINED](call, out_dtype)
    out[-1] *= 1.05
    return out


def aborts(call, out_dtype):
    os.abort()


def faults(call, out_dtype):
    calls.append(call)
    if len(calls) > 5:  # two to begin with, three to be checked: then peers take turns
        layer_measure.works = lambda device: False
        raise RuntimeError("an illegal memory access")
    return experts_cpu.PROVIDER.kernels[COMBINED](call, out_dtype)


provider("wrong", wrong)
provider("aborts", aborts)
provider("faults", faults)
"""


LAYER = ["moe_layer", "--cpu", "--shapes", "tiny", "--repeats", "3"]
PEERS = {
    "--forward": {"transformers grouped_mm", "transformers batched_mm", "hand grouped_mm", "dense bmm"},
    "--train": {"transformers grouped_mm", "transformers batched_mm", "hand grouped_mm", "dense bmm"},
    "--quant=fp8": {"hand grouped_mm, dequantised before"},
    "--quant=mxfp4": {"hand grouped_mm, dequantised before"},
}


@pytest.mark.parametrize("mode", PEERS)
def test_a_layer_on_one_device_is_measured_beside_its_peers(alone: Run, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    done = alone(*LAYER, mode, "--tokens", "5", "--without", "transformers grouped_mm compiled", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    name, (_, _, kind) = "train" if mode == "--train" else "forward", mode.partition("=")
    assert {(row["mode"], row["dtype"]) for row in rows} == {(name, f"bfloat16 x {kind}" if kind else "bfloat16")}
    assert {row["peer"] for row in rows if row["us"]} >= {"ours cpu_grouped", "ours reference"} | PEERS[mode]
    for row in rows:
        assert row["ok"] == "True", row
        assert (float(row["us"]) > 0 and 0 < float(row["error"]) < (1e-1 if kind == "fp8" else 2e-2)) if row["us"] else row["note"], row
    text = path.with_suffix(".md").read_text()
    assert [row[1:3] for row in table_rows(text) if row[0] == name] == [[f"tiny {kind}".strip(), at] for at in ("5 uniform", "5 zipf")]
    assert "- vLLM: vLLM's fused_experts runs on cuda, device is cpu" in text
    assert path.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None), done.stdout


def test_quantised_weights_are_not_trained(alone: Run) -> None:
    done = alone(*LAYER, "--train", "--quant", "int8")
    assert done.returncode == 2
    assert "quantised weights have no gradients" in done.stderr


def test_wrong_peers_and_those_that_end_the_process_are_named(alone: Run, tmp_path: Path) -> None:
    plugin, path = tmp_path / "ends.py", tmp_path / "layer.csv"
    plugin.write_text(ENDS)
    names = ["--peers", "ours cpu", "ours wrong", "ours aborts", "ours faults", "hand", "--plugin", str(plugin)]
    done = alone(*LAYER, "--tokens", "3", "--routings", "zipf", *names, "--out", str(path), "--verbose", children=True)
    assert done.returncode != 0
    assert "some results are WRONG" in done.stderr
    with path.open(newline="") as file:
        found = {row["peer"]: row for row in csv.DictReader(file)}
    assert {peer for peer, row in found.items() if row["us"]} == {"ours cpu_grouped", "ours wrong", "hand grouped_mm"}
    assert [peer for peer, row in found.items() if row["us"] and row["ok"] == "False"] == ["ours wrong"]
    (cells,) = (row for row in table_rows(done.stdout) if row[0] == "3 zipf")
    assert float(cells[2].strip("*")) > 0
    assert cells[3].startswith("WRONG")
    assert found["ours aborts"]["note"] == "ended the process: signal SIGABRT"
    fault = "took the device with it: while peers took turns: RuntimeError: an illegal memory access"
    assert found["ours faults"]["note"] == fault
    assert "tiny 3 zipf: ours aborts" in done.stderr


CASES = Cases(__file__)


def of_library(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> Any:
    """benchmarks/layer_quantized.py, for which these libraries are there and take tensors of a CPU."""
    monkeypatch.syspath_prepend(str(FOLDER))
    peers: Any = importlib.import_module("layer_quantized")
    monkeypatch.setattr(peers, "cuda_forward", lambda *_, **__: None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
    return peers


def error_of(make: Any, kind: str, tokens: int = 5) -> float:
    """Of a peer, on a layer whose sizes are whole groups of 128 columns."""
    case_of: Any = importlib.import_module("layer_case")
    case = case_of.Case("small", case_of.SHAPES["small"], tokens, "zipf", False)
    layer = case_of.Layer(case.shape, torch.bfloat16, torch.device("cpu"), False, kind)
    inputs = case_of.inputs_of(case, torch.bfloat16, layer.device, 1)
    (error,) = case_of.Reference(layer, inputs, 0).errors(make(layer, case).call(*inputs[:3]))
    return float(error)


@CASES.add()
def kernels_around_deep_gemm() -> None:
    """Its product in torch, with what it asks of its inputs; Triton's interpreter rounds to e4m3 by cutting bits off."""

    def product(a: Any, b: Any, out: Any, owners: Any) -> None:
        (rows, scales), (values, of_values) = a, b
        assert (rows.dtype, owners.dtype, rows.shape[0] % 128) == (torch.float8_e4m3fn, torch.int32, 0)
        assert scales.stride() == (1, rows.shape[0])
        out.fill_(float("nan"))
        x = (rows.float().unflatten(1, (-1, 128)) * scales[:, :, None]).flatten(1)
        for first in range(0, rows.shape[0], 128):
            (owner,) = set(owners[first : first + 128].tolist())
            if owner >= 0:
                w = values[owner].float() * of_values[owner].repeat_interleave(128, 0).repeat_interleave(128, 1)
                out[first : first + 128] = x[first : first + 128] @ w.t()

    library = SimpleNamespace(get_m_alignment_for_contiguous_layout=lambda: 128, m_grouped_fp8_gemm_nt_contiguous=product)
    with pytest.MonkeyPatch.context() as patch:
        peers = of_library(patch, deep_gemm=library)
        for tokens in (1, 40):
            assert error_of(peers.deep_gemm, "fp8_block", tokens) < 0.2


test_in_interpreter = CASES.test()


@pytest.mark.parametrize("kind", ["fp8_block", "int8", "int4"])
def test_vllm_gets_quantised_weights_in_its_forms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fused_experts in torch, from what vLLM says of its arguments."""

    def dense(values: Any, scales: Any, shape: list[int]) -> Any:
        if kind == "fp8_block":
            return values.float() * scales.repeat_interleave(shape[0], 1).repeat_interleave(shape[1], 2)
        assert (values.dtype, shape[0]) == (torch.uint8, 0)
        low_first = torch.stack((values & 15, values >> 4), 3).flatten(2)
        numbers = low_first.float() - 8 if kind == "int4" else values.float() - 128
        return numbers * scales.float().repeat_interleave(shape[1], 2)

    def fused_experts(x: Any, w13: Any, w2: Any, weights: Any, ids: Any, quant_config: Any) -> Any:
        up, down = (
            dense(w13, quant_config["w1_scale"], quant_config["block_shape"]),
            dense(w2, quant_config["w2_scale"], quant_config["block_shape"]),
        )
        gate, line = torch.einsum("th,tkih->tki", x.float(), up[ids]).chunk(2, 2)
        return torch.einsum("tk,tki,tkhi->th", weights, torch.nn.functional.silu(gate) * line, down[ids])

    config = {f"{name}_moe_quant_config": dict for name in ("fp8_w8a8", "int8_w8a16", "int4_w4a16")}
    kernels = SimpleNamespace(get_moe_configs=lambda *_: None, fused_experts=fused_experts)
    fused_moe = SimpleNamespace(config=SimpleNamespace(**config), fused_moe=kernels)
    peers = of_library(monkeypatch, vllm__model_executor__layers__fused_moe=fused_moe)
    assert error_of(peers.vllm, kind) < 1e-5


def test_the_floor_of_a_quantised_layer_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    case_of: Any = importlib.import_module("layer_case")
    case = case_of.Case("small", case_of.SHAPES["small"], 3, "uniform", False)
    numbers, rows = 3 * 256 * 128, 2 * 3 * 256 * 2
    for kind, weights in (("", 2 * numbers), ("fp8_block", numbers + 4 * numbers / 128**2), ("mxfp4", numbers / 2 + numbers / 32)):
        layer = case_of.Layer(case.shape, torch.bfloat16, torch.device("cpu"), False, kind)
        inputs = case_of.inputs_of(case, torch.bfloat16, layer.device, 1)
        work = case_of.Work.of(case, [inputs], layer)
        assert work.bytes == len(inputs.ids.unique()) * weights + rows
        assert work.flops == 2 * numbers * 3 * 2


def test_a_peer_that_ended_two_points_is_left_out_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    shape = plot("moe_layer").Shape("tiny", argparse.Namespace(tokens=[1, 2, 3], routings=["zipf"]), "")
    shape.broken = {(1, "zipf"): {"a": "signal", "b": "signal"}, (2, "zipf"): {"a": "silent"}}
    assert {**shape.without((2, "zipf"))} == {"a": "silent"}
    assert list(shape.without((3, "zipf"))) == ["a"]


def test_a_process_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = plot("moe_layer")
    receive, send = os.pipe()
    os.write(send, b"one\ntwo\nrest")
    with subprocess.Popen(["sleep", "60"]) as silent:
        assert list(module.lines(receive, silent, 0.2)) == ["one", "two", None]
        silent.kill()
        silent.wait()
        assert list(module.lines(receive, silent, 60)) == []  # although the pipe is still open
    assert module.ending(silent.returncode) == "signal SIGKILL"


def test_gains_of_a_layer_are_against_the_best_right_other_of_the_session() -> None:
    def row(session: str, tokens: str, peer: str, us: str, ok: str = "True", note: str = "") -> dict[str, str]:
        about = {"session": session, "date": "today", "hardware": "GPU", "software": "torch", "command": "x", "repeats": "3"}
        shape = {"shape": "tiny", "hidden": "64", "inter": "32", "experts": "8", "top_k": "2", "dtype": "bfloat16", "mode": "forward"}
        work = {"routing": "zipf", "floor_us": "5", "flops": "1e9", "bytes": "1e6", "flop_rate": "1e15", "byte_rate": "4e12"}
        found = {"of_floor": "0.5", "error": "1e-3" if us else "", "peak_gib": "0"}
        return {**about, **shape, **work, "tokens": tokens, "peer": peer, "us": us, **found, "ok": ok, "note": note}

    rows = [
        row("a", "1", "ours x", "10"), row("a", "1", "ours y", "20"), row("a", "1", "library", "12"),
        row("a", "1", "fast but wrong", "1", "False"),
        row("a", "2", "ours x", "10"), row("a", "2", "library", "30"), row("a", "2", "absent", "", note="not importable: so"),
        row("b", "1", "library", "6"),
    ]  # fmt: skip
    text = plot("layer_plot").table(rows)
    short = [cells for cells in table_rows(text) if cells[0] == "forward"]
    assert [cells[8] for cells in short] == ["1.20x", "3.00x", "-"]
    assert short[0][3:8] == ["5.0", "10.0 ours x", "0.50", "12.0 library", "0.42"]
    assert "by 1.897x (geometric mean of 2; tiny 1.897x), at the least by 1.20x (tiny 1 zipf)" in text
    assert "WRONG (1e-3)" in text
    assert "- absent: not importable: so" in text
    chosen = [*rows[:4], row("a", "1", "ours", "11")]
    for own, gain in ((chosen, "1.09x"), ([*chosen[:4], row("a", "1", "ours", "11", "False")], "-")):
        (short,) = (cells for cells in table_rows(plot("layer_plot").table(own)) if cells[0] == "forward")
        assert short[8] == gain  # the provider that is chosen counts, not the best


def test_tables_of_several_runs_are_put_together(tmp_path: Path) -> None:
    module = plot("layer_plot")
    row = {"session": "a", "mode": "forward", "dtype": "bfloat16", "shape": "tiny", "tokens": 1, "routing": "zipf"}
    paths = [tmp_path / "one.csv", tmp_path / "two.csv"]
    module.add(paths[0], [{**row, "peer": "x", "us": 1}, {**row, "peer": "y", "us": 2}])
    module.add(paths[1], [{**row, "peer": "y", "us": 3}, {**row, "peer": "z", "us": 4}])
    assert module.gather(list(map(str, paths))) == paths[0]
    assert [(each["peer"], each["us"]) for each in module.read(paths[0])] == [("x", "1"), ("y", "3"), ("z", "4")]


DOUBLED = """
import dataclasses

from moe_compile.ops import experts_cpu, registry


calls = []


def doubled(kernel):
    def call(*args):
        calls.append(kernel)  # right at first: a rewrite is validated
        return kernel(*args) * (2 if len(calls) > 4 else 1)

    return call


kernels = {name: doubled(kernel) for name, kernel in experts_cpu.PROVIDER.kernels.items()}
registry.register(dataclasses.replace(experts_cpu.PROVIDER, name="wrong", kernels=kernels, cost=lambda problem: 0.0))
"""
MODEL = ["--layers", "1", "--decode", "2", "--context", "16", "--modes", "default", "--repeats", "2"]


def test_a_whole_model_is_measured_beside_transformers_experts(alone: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.csv"
    done = alone("whole_model", "--cpu", "--models", "gptoss", *MODEL, "--prefill", "2x8", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5
    for row in rows:
        assert row["ok"] == "True", row
        assert float(row["us"]) > 0
        assert row["path"] == "without" or 0 < float(row["error"]) < 3e-2
    cells = [row for row in table_rows(path.with_suffix(".md").read_text()) if row[0].startswith(("decode", "prefill"))]
    assert [row[0] for row in cells] == ["decode 2 x 1 behind 16", "prefill 2 x 8"]
    assert all(float(cell) > 0 for row in cells for cell in row[1:6])
    assert "- ours: experts: cpu_grouped" in done.stdout


def test_a_wrong_model_fails_the_run(alone: Run, tmp_path: Path) -> None:
    plugin = tmp_path / "wrong.py"
    plugin.write_text(DOUBLED)
    done = alone("whole_model", "--cpu", "--models", "mixtral", *MODEL, "--prefill", "--paths", "loop", "ours", "--plugin", str(plugin))
    assert done.returncode != 0
    (cells,) = (row for row in table_rows(done.stdout) if row[0].startswith("decode"))
    assert float(cells[1]) > 0, done.stdout + done.stderr
    assert cells[4].startswith("WRONG")


def test_a_block_is_measured_with_and_without_replays(alone: Run, tmp_path: Path) -> None:
    path = tmp_path / "block.md"
    done = alone("block_host", "--cpu", "--models", "mixtral", "--tokens", "1", "5", "--samples", "2", "--calls", "2", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [row for row in table_rows(path.read_text()) if row[0].startswith("mixtral")]
    assert [row[0] for row in cells] == ["mixtral 1", "mixtral 5"]
    assert all(float(part) > 0 for row in cells for cell in row[1:] for part in cell.split(" / "))


def test_a_wrong_block_fails_the_run(alone: Run, tmp_path: Path) -> None:
    plugin = tmp_path / "wrong.py"
    plugin.write_text(DOUBLED)
    done = alone("block_host", "--cpu", "--models", "mixtral", "--tokens", "5", "--samples", "2", "--calls", "2", "--plugin", str(plugin))
    assert done.returncode != 0
    assert "WRONG" in done.stdout


def test_first_calls_are_measured_and_held_against_a_limit(alone: Run, tmp_path: Path) -> None:
    path = tmp_path / "first.csv"
    args = ["--what", "layer", "--shapes", "tiny", "--tokens", "4", "--train", "--limit", "-1", "--out", str(path)]
    done = alone("first_call", "--cpu", *args)
    assert done.returncode != 0
    with path.open(newline="") as file:
        empty, filled = csv.DictReader(file)
    assert (empty["caches"], empty["ok"], filled["caches"], filled["ok"]) == ("empty", "False", "filled", "True"), done.stdout + done.stderr
    assert all(float(row[key]) > 0 for row in (empty, filled) for key in ("first_s", "second_ms"))
    (cells,) = (row for row in table_rows(path.with_suffix(".md").read_text()) if row[0].startswith("layer"))
    assert cells[:2] == ["layer tiny 4 forward", "cpu_grouped"]
    assert cells[9] == "over the limit, or failed"


def test_compiled_kernels_are_counted_and_those_of_a_cache_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(FOLDER))
    kernel = plot("layer_triton")._pack
    types = ("*i64", "*u32", "*i16", "i32", "i32", "i32", "constexpr", "constexpr", "constexpr")
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), {"TOP_K": 2, "WORDS": 1, "BLOCK": 32})
    with plot("first_call").Compilations() as found:
        for _ in range(2):
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert (found.kernels, found.loaded) == (1, 1)
    assert 0 < found.seconds < 60
    assert triton.knobs.compilation.listener is None


if __name__ == "__main__":
    CASES.main()
