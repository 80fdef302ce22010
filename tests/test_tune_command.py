"""`moe-compile tune` with a bench that only pretends to measure: the search, resuming, wrong results, limits, what is told and kept."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from moe_compile import cli, logs, tuning_command, tuning_journal
from moe_compile.ops.kernels import configs, configs_scaled, tuned, tuned_file
from moe_compile.ops.kernels.tiles import Strip, Tiles
from moe_compile.ops.kernels.tuned import Machine
from moe_compile.ops.quantized import KINDS, ROWS_TOO
from moe_compile.tuning import DeviceLost, Sample, Search, TuneError
from moe_compile.tuning_journal import Journal
from moe_compile.tuning_layer import (
    Choice,
    Point,
    Work,
    bias_widths,
    choice_from,
    choice_json,
    entries,
    fans,
    gated,
    neighbours,
    questions,
    rules,
    starts,
    untunable,
)

H200 = Machine("H200", "3.6")
WORK = Work(2048, 768, 128, 8, "bfloat16", "eoi", gated("silu", 768))
POINT = Point(WORK, 256)
LAYER = ["--hidden", "2048", "--intermediate", "768", "--experts", "128", "--top-k", "8"]
BEST = Choice(
    32,
    (Tiles(32, 64, 128, 4, 5, group=4, swap=True, early=True), Tiles(32, 128, 64, 8, 3, group=4, swap=True, early=False)),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuned_file, "path", lambda: tmp_path / "tiles.json")
    tuned.forget()
    logs.forget()
    yield tmp_path / "tiles.json"
    tuned.forget()


class FakeBench:
    """Times grow with the distance from BEST, and wobble. `broken` do not compile, `wrong` compute something else, and fast."""

    def __init__(self, broken: Callable[[Choice], bool] = lambda c: False, wrong: Callable[[Choice], bool] = lambda c: False) -> None:
        self.broken, self.wrong = broken, wrong
        self.compiled: list[Choice] = []
        self.measured: list[tuple[Choice, int]] = []
        self.calls, self.stop_at, self.stop_with = 0, -1, KeyboardInterrupt()  # type: tuple[int, int, BaseException]

    def compile(self, point: Point, choices: Sequence[Choice], done: Callable[[], None]) -> dict[Choice, str]:
        self.compiled += choices
        for _ in choices:
            done()
        return {each: "too large" for each in choices if self.broken(each)}

    def measure(self, point: Point, choices: Sequence[Choice], repeats: int) -> list[Sample]:
        self.calls += 1
        if self.calls == self.stop_at:
            raise self.stop_with
        self.measured += [(each, repeats) for each in choices[1:]]
        assert choices[0] == rules(point)
        return [Sample(microseconds(each) * (0.1 if self.wrong(each) else 1.0), 0.5 if self.wrong(each) else 1e-3) for each in choices]


def microseconds(choice: Choice) -> float:
    off = 0.0
    for have, best in zip(choice.layers, BEST.layers):
        if isinstance(have, Strip):
            off += abs(math.log2(have.cols) - 2) + abs(math.log2(have.depth) - 9) + abs(math.log2(have.warps) - 2)
            continue
        for name, value in asdict(best).items():
            own = getattr(have, name)
            off += float(own != value) if isinstance(value, bool) else abs(math.log2(own) - math.log2(value))
    wobble = zlib.crc32(str(choice).encode()) % 7 / 7000
    return 100.0 * (1.05**off + wobble)


class Silent:
    def stage(self, text: str, total: int) -> None: ...
    def advance(self) -> None: ...


def search(bench: FakeBench, point: Point = POINT, deadline: float | None = None) -> Search:
    return Search(point, bench, Journal(H200), Silent(), deadline)


def tune(*args: str, bench: Any = None, machine: Machine | None = H200) -> int:
    parser = __import__("argparse").ArgumentParser()
    tuning_command.add_arguments(parser)
    return tuning_command.run(parser.parse_args([*LAYER, *args]), machine, bench or FakeBench())


# ---------------------------------------------------------------- the search
def test_the_best_is_found() -> None:
    bench = FakeBench()
    found = search(bench).run()
    assert found.finished
    assert found.choice.rows == 32
    assert found.microseconds < 1.12 * microseconds(BEST)
    assert found.microseconds < 0.9 * found.rules
    assert len({each for each, _ in bench.measured}) < 700


def test_few_tokens_get_strips() -> None:
    found = search(FakeBench(), Point(WORK, 1)).run()
    assert found.choice.rows == 0
    assert all(isinstance(each, Strip) for each in found.choice.layers)
    assert found.microseconds < found.rules


def test_most_repeats_go_to_the_best() -> None:
    bench = FakeBench()
    search(bench).run()
    often = [microseconds(each) for each, repeats in bench.measured if repeats == 25]
    once = [microseconds(each) for each, repeats in bench.measured if repeats == 5]
    assert len(often) < len(once) / 3
    assert sum(often) / len(often) < sum(once) / len(once)


def test_nothing_is_compiled_twice_and_the_rules_stand_first() -> None:
    bench = FakeBench()
    search(bench).run()
    assert bench.compiled[0] == rules(POINT)
    assert len(set(bench.compiled)) == len(bench.compiled)


def test_wrong_results_are_told_and_never_kept(capsys: pytest.CaptureFixture[str]) -> None:
    bench = FakeBench(wrong=lambda choice: choice.rows and choice.layers[0].persistent)
    assert tune("--tokens", "256", bench=bench) == 0
    assert "WRONG, not kept" in capsys.readouterr().out
    (kept,) = tuned_file.points_for(H200)
    assert not any(isinstance(each.value, Tiles) and each.key.role == tuned.FIRST and each.value.persistent for each in kept.entries)


def test_nan_is_wrong() -> None:
    own = search(FakeBench())
    assert own._judged(Sample(1.0, float("nan")), Sample(10.0), 5).wrong
    assert not own._judged(Sample(1.0, 1e-2), Sample(10.0), 5).reason


def test_what_does_not_compile_is_left_out() -> None:
    found = search(FakeBench(broken=lambda choice: choice.layers[1].warps == 8)).run()
    assert found.failed
    assert found.choice.layers[1].warps != 8


def test_where_nothing_is_faster_the_rules_stay() -> None:
    bench = FakeBench()
    bench.measure = lambda point, choices, repeats: [Sample(100.0 + (each != rules(point)), 0.0) for each in choices]  # type: ignore[method-assign]
    found = search(bench).run()
    assert found.choice == rules(POINT)
    assert found.finished


def test_rules_that_do_not_run_are_an_error() -> None:
    bench = FakeBench()
    bench.measure = lambda point, choices, repeats: [Sample(0.0, 0.0, "no kernel") for _ in choices]  # type: ignore[method-assign]
    with pytest.raises(TuneError, match="no kernel"):
        search(bench).run()


def test_rules_that_do_not_repeat_their_result_are_an_error() -> None:
    bench = FakeBench()
    bench.measure = lambda point, choices, repeats: [Sample(1.0, float("inf")) for _ in choices]  # type: ignore[method-assign]
    with pytest.raises(TuneError, match="own result"):
        search(bench).run()


# ---------------------------------------------------------------- stopping and going on
@pytest.mark.parametrize("calls", [1, 3, 6, 9])
def test_a_stop_loses_nothing(calls: int) -> None:
    whole = search(FakeBench()).run()
    Journal(H200).finish(POINT)
    first, second = FakeBench(), FakeBench()
    first.stop_at = calls
    stopped = search(first)
    outcome = stopped.run()
    assert isinstance(stopped.stopped, KeyboardInterrupt)
    assert not outcome.finished
    again = search(second).run()
    assert again.choice == whole.choice
    assert not {pair for pair in first.measured if pair[1] < 51} & set(second.measured)


def test_a_journal_survives_a_cut_and_other_lines() -> None:
    first = FakeBench()
    first.stop_at = 4
    search(first).run()
    known = Journal(H200).known(POINT)
    with tuning_journal.file().open("a") as out:
        out.write('\n[1]\n{"device": "H200", "choice"')
    assert Journal(H200).known(POINT) == known
    assert Journal(Machine("B200", "3.6")).known(POINT) == {}
    assert Journal(H200).known(Point(WORK, 128)) == {}
    Journal(H200).add(POINT, {BEST: next(iter(known.values()))})
    assert BEST in Journal(H200).known(POINT)


def test_ctrl_c_keeps_the_best_so_far_and_the_next_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    bench = FakeBench()
    bench.stop_at = 8
    assert tune("--tokens", "256", "1024", bench=bench) == 130
    told = capsys.readouterr().out
    assert "not finished" in told
    assert "not reached: 1024 tokens" in told
    (kept,) = tuned_file.points_for(H200)
    assert not kept.finished
    assert tuning_journal.file().exists()
    assert tune("--tokens", "256", "1024") == 0
    assert all(each.finished for each in tuned_file.points_for(H200))
    assert len(tuned_file.points_for(H200)) == 2
    assert not tuning_journal.file().exists()


def test_a_limit_stops_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--limit-minutes", "0") == 0
    assert "at the limit" in capsys.readouterr().out
    assert tuned_file.points_for(H200) == []
    stopped = search(FakeBench(), deadline=time.monotonic() - 1)
    assert stopped.run().choice == rules(POINT)


def test_a_lost_device_is_noted_and_the_choice_left_out_next_time(capsys: pytest.CaptureFixture[str]) -> None:
    bench = FakeBench()
    bench.stop_at, bench.stop_with = 2, DeviceLost(BEST, "an illegal memory access")
    assert tune("--tokens", "256", bench=bench) == 1
    assert "illegal memory access" in capsys.readouterr().err
    again = FakeBench()
    assert tune("--tokens", "256", bench=again) == 0
    assert BEST not in {each for each, _ in again.measured}


def test_what_is_kept_is_not_measured_again_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--tokens", "256") == 0
    second = FakeBench()
    assert tune("--tokens", "256", bench=second) == 0
    assert not second.measured
    assert "--again" in capsys.readouterr().out
    assert tune("--tokens", "256", "--again", bench=second) == 0
    assert second.measured


# ---------------------------------------------------------------- what is kept
def test_calls_take_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "machine_of", lambda device=None: H200)
    assert tune("--tokens", "256") == 0
    (kept,) = tuned_file.points_for(H200)
    first = questions(POINT)[0][1]
    assert configs.block_rows(first) == 32
    assert configs.tiles(first, 32, True) == next(each.value for each in kept.entries if each.key.role == tuned.FIRST)
    assert configs.tiles(replace(first, layout=""), 32, True) == configs.tiles(first, 32, True)


def test_show_and_forget(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--tokens", "1", "256") == 0
    capsys.readouterr()
    assert tune("--show") == 0
    shown = capsys.readouterr().out
    assert "2 measured for H200" in shown
    assert "2048" in shown
    assert tune("--show", machine=Machine("B200", "3.6")) == 0
    assert "0 measured for B200" in capsys.readouterr().out
    assert tune("--forget") == 0
    assert "deleted 2" in capsys.readouterr().out
    assert tuned_file.points_for(H200) == []


@pytest.mark.parametrize("args", [[], ["--show"], ["--forget"]])
def test_without_a_gpu_that_is_said(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuned, "machine_of", lambda device=None: None)
    assert cli.main(["tune", *LAYER, *args]) == 1
    assert "GPU" in capsys.readouterr().err


def test_a_dry_run_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuned, "machine_of", lambda device=None: None)
    assert cli.main(["tune", *LAYER, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "4096 tokens" in told
    assert "neighbours" in told


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "moe_compile", "tune", "--dry-run", "--hidden", "64"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "--intermediate, --experts, --top-k" in told.stderr


# ---------------------------------------------------------------- the layer
def test_sizes_come_from_a_configuration(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "qwen3_moe", "hidden_size": 512, "moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 4,
              "intermediate_size": 999, "hidden_act": "gelu_pytorch_tanh", "torch_dtype": "float16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    parser = __import__("argparse").ArgumentParser()
    tuning_command.add_arguments(parser)
    points = tuning_command.points_of(parser.parse_args(["--model", str(tmp_path), "--experts", "8", "--tokens", "32"]))
    assert points == [Point(Work(512, 96, 8, 4, "float16", "eoi", gated("gelu_tanh", 96)), 32)]


def test_a_model_that_is_not_here_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert cli.main(["tune", "--dry-run", "--model", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--experts", "4"], "top_k is 8"),
        (["--hidden", "0"], "hidden is 0"),
        (["--tokens", "0"], "from 1 on"),
        (["--quant", "mxfp4", "--intermediate", "760"], "multiple of 32"),
        (["--quant", "int8", "--layout", "oi*"], "with quantised weights"),
        (["--quant", "int8", "--dtype", "float32"], "with quantised weights"),
        (["--quant", "mxfp4", "--layout", "eio"], "give eoi"),
        (["--program", "silu(x)"], "has no product"),
        (["--program", "mm(0, x"], "not an expression"),
    ],
)
def test_bad_arguments_are_named(args: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--dry-run", *args) == 1
    assert word in capsys.readouterr().err


def test_widths_of_programs() -> None:
    biased = "(mm(1, gelu(cols(mm(0, x) + b(0), 0, 64, 2)) * (cols(mm(0, x) + b(0), 1, 64, 2) + 1.0)) + b(1)) * w"
    known = {
        gated("silu", 32): ([(48, 64), (32, 48)], []),
        biased: ([(48, 64), (32, 48)], [64, 48]),
        "mm(2, silu(mm(0, x)) * mm(1, x))": ([(48, 32), (48, 32), (32, 48)], []),
        "mm(2, tanh(mm(1, relu(mm(0, x)))))": ([(48, 32), (32, 32), (32, 48)], []),
        "mm(0, x) + b(0)": ([(48, 48)], [48]),
        "mm(1, relu(mm(0, x * w)))": ([(48, 32), (32, 48)], []),
    }
    for program, (sizes, biases) in known.items():
        work = Work(48, 32, 4, 2, "float32", "eio", program)
        assert (fans(work), bias_widths(work)) == (sizes, biases), program


@pytest.mark.parametrize("quant", ["", *KINDS])
@pytest.mark.parametrize("tokens", [1, 16, 256, 4096])
def test_what_is_tried_can_run(tokens: int, quant: str) -> None:
    point = Point(replace(WORK, quant=quant), tokens)
    if quant and tokens == 1:
        assert (untunable(point) is None) == (quant in ("mxfp4", "int4"))
        return
    tried = [near for start in starts(point) for near in neighbours(point, start)]
    assert len(set(tried)) > 10
    for choice in tried:
        assert choice_from(json.loads(json.dumps(choice_json(choice)))) == choice
        assert len(entries(point, choice)) == len(choice.layers) + bool(choice.rows)
        assert all(each.rows == choice.rows for each in choice.layers if isinstance(each, Tiles))


def test_tiles_of_quantised_weights_keep_what_the_kernels_need() -> None:
    for quant in KINDS:
        point = Point(replace(WORK, quant=quant), 300)
        for choice in (near for start in starts(point) for near in neighbours(point, start)):
            first, last = choice.layers
            assert (first.depth, last.depth) == (128, 128)
            assert quant not in ROWS_TOO or first.cols == 128  # a scale of the next layer's rows
            assert not last.swap or last.cols >= 16 * last.warps
            assert quant not in ("mxfp4", "int4") or first.cols <= 128  # the next layer's rows are ordered within them


def test_slots_of_quantised_weights_that_are_computed_singly_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--quant", "int8", "--tokens", "1", "--dry-run") == 0
    assert "nothing to tune" in capsys.readouterr().out
    assert tune("--quant", "mxfp4", "--tokens", "1", "--dry-run") == 0
    assert "blocks of 16 rows" in capsys.readouterr().out


def test_calls_with_quantised_weights_take_what_was_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    work = replace(WORK, quant="mxfp4")
    assert tune("--quant", "mxfp4", "--tokens", "256") == 0
    (kept,) = tuned_file.points_for(H200)
    assert kept.layer["quant"] == "mxfp4"
    monkeypatch.setattr(tuned, "machine_of", lambda device=None: H200)
    (rows, first, last) = kept.entries
    (_, shape), (_, other) = questions(Point(work, 256))
    assert configs_scaled.block_rows(shape, "fp4", False) == rows.value
    assert configs_scaled.tiles(shape, rows.value, "fp4", False, False) == first.value
    assert configs_scaled.tiles(other, rows.value, "fp4", False, False) == last.value
    assert configs_scaled.tiles(replace(shape, layout="oi:int4"), 16, "int4", False, False) == configs_scaled._tiles(
        shape, 16, "int4", False, False
    )
    assert tune("--show") == 0
    assert "eoi:mxfp4" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "quant"), [(1, ""), (40, ""), (40, "mxfp4"), (900, "fp8_block")])
def test_a_gpu_measures(tokens: int, quant: str) -> None:
    from moe_compile.tuning_gpu import GpuBench

    bench, point = GpuBench(workers=2), Point(Work(256, 128, 8, 2, "bfloat16", "eoi", gated("silu", 128), quant), tokens)
    try:
        choices = [*starts(point), *neighbours(point, rules(point))[:4]]
        failed = bench.compile(point, choices, lambda: None)
        assert not {rules(point)} & set(failed)
        samples = bench.measure(point, [each for each in choices if each not in failed], 3)
        assert not [each for each in samples if each.reason or each.off > 2e-2 or not 1 < each.microseconds < 1e5], samples
    finally:
        bench.close()
