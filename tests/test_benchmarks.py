"""The benchmarks with tiny sizes on the CPU, those over ranks on two gloo processes: what they print and write, and that a wrong result
fails them."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
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


def torchrun(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The script on two CPU ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FOLDER / script), "--cpu", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)


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
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What benchmarks/exchange.py says and writes, run twice with one file."""
    path = tmp_path_factory.mktemp("exchange") / "x.csv"
    torchrun("exchange.py", *TINY, "--providers", "raw", "--payloads", "none", "--out", str(path))
    return torchrun("exchange.py", *TINY, "--providers", "alltoall", "allgather", "deepep_ll", "--out", str(path)), path


def test_every_exchange_is_measured_and_right(exchanged: tuple[subprocess.CompletedProcess[str], Path]) -> None:
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


def test_one_table_and_a_picture_of_several_runs(exchanged: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, path = exchanged
    done = subprocess.run([sys.executable, str(FOLDER / "plot.py"), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = path.with_suffix(".md").read_text()
    assert text.count("### ") == 4
    cells = [row for row in table_rows(text) if row[0] in ("alltoall", "allgather")]
    assert len(cells) == 8
    assert all(len(row) == 9 and float(row[3]) > 0 and float(row[7]) >= 1 and float(row[8]) < 5e-2 for row in cells), cells
    assert any("raw all_to_all_single" in row[0] and row[0].endswith("(part)") for row in table_rows(text))
    assert path.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None), done.stdout


def test_a_wrong_result_fails_the_run(tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    done = torchrun("exchange.py", *TINY, "--providers", "alltoall", "broken", "--payloads", "none", "--plugin", str(plugin))
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
def test_a_layer_over_ranks_is_measured(train: list[str]) -> None:
    args = ["--shape", "tiny", "--tokens", "8", "--repeats", "3", "--inner", "eager", "--providers", "alltoall", "allgather", "pplx"]
    done = torchrun("ep_layer.py", *args, *train)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row[0]: row for row in table_rows(done.stdout)}
    for path in ("ours alltoall", "ours allgather", "by hand", "transformers"):
        assert float(found[path][1]) > 0, done.stdout
        assert float(found[path][3]) > 0
    assert "pplx runs on CUDA devices" in found["ours pplx"][5]


def test_a_model_over_ranks_gives_its_logits() -> None:
    done = torchrun("ep_model.py", "--tiny", "--providers", "alltoall", "--inner", "eager", "--repeats", "2", "--rivals", "eager")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row[0]: row for row in table_rows(done.stdout)}
    assert float(found["ours alltoall, float32"][2]) < 1e-5
    assert float(found["ours alltoall, bfloat16"][2]) < 6e-2
    for path in ("one GPU", "ours alltoall"):
        assert float(found[path][1]) > 0
        assert float(found[path][4]) > 0
    rival = found["transformers, expert parallel, eager"]
    assert rival[1] == "-" or float(rival[1]) > 0, rival  # its plan may not run on gloo; the reason stands in the table


WRONG_ROW = """
import dataclasses

from moe_compile.ops import experts_cpu, registry
from moe_compile.ops.experts import COMBINED


def wrong(call, out_dtype):
    out = experts_cpu.PROVIDER.kernels[COMBINED](call, out_dtype)
    out[-1] *= 1.05
    return out


kernels = {**experts_cpu.PROVIDER.kernels, COMBINED: wrong}
registry.register(dataclasses.replace(experts_cpu.PROVIDER, name="wrong", kernels=kernels))
"""


def moe_layer(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "moe_layer.py"), "--cpu", "--shapes", "tiny", "--repeats", "3", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_layer_on_one_device_is_measured_beside_its_peers(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    done = moe_layer(f"--{mode}", "--tokens", "5", "--without", "transformers grouped_mm compiled", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["mode"] for row in rows} == {mode}
    timed = {row["peer"] for row in rows if row["us"]}
    own = {"ours cpu_grouped", "ours reference"}
    assert timed >= own | {"transformers grouped_mm", "transformers batched_mm", "hand grouped_mm", "dense bmm"}
    for row in rows:
        assert row["ok"] == "True", row
        assert (float(row["us"]) > 0 and 0 < float(row["error"]) < 2e-2) if row["us"] else row["note"], row
    text = path.with_suffix(".md").read_text()
    assert [row[2] for row in table_rows(text) if row[0] == mode] == ["5 uniform", "5 zipf"]
    assert "- vLLM: vLLM's fused_experts runs on cuda, device is cpu" in text
    assert path.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None), done.stdout


def test_a_wrong_layer_fails_the_run(tmp_path: Path) -> None:
    plugin = tmp_path / "wrong.py"
    plugin.write_text(WRONG_ROW)
    done = moe_layer("--tokens", "3", "--routings", "zipf", "--peers", "ours cpu", "ours wrong", "hand", "--plugin", str(plugin))
    assert done.returncode != 0
    (cells,) = (row for row in table_rows(done.stdout) if row[0] == "3 zipf")
    assert float(cells[2].strip("*")) > 0, done.stdout + done.stderr
    assert cells[3].startswith("WRONG")


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
