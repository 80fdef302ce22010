"""Measured choices: which is taken for which layer, and a user's file that is read once, whole, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import Cases

from moe_compile import logs
from moe_compile.ops.kernels import configs, tuned, tuned_file
from moe_compile.ops.kernels.tiles import Shape, Strip, Tiles
from moe_compile.ops.kernels.tuned import FEW, FIRST, NEXT, ROWS, Machine

H200 = Machine("H200", "3.6")
SHAPE = Shape(1024, 128, 2048, 768, 2, 2)
TILES = Tiles(16, 32, 64, 8, 5, group=4, swap=True)
CASES = Cases(__file__)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, on a machine that looks like an H200."""
    monkeypatch.setattr(tuned_file, "path", lambda: tmp_path / "cache" / "tiles.json")
    monkeypatch.setattr(tuned, "machine_of", lambda device=None: H200)
    tuned.forget()
    logs.forget()
    yield tmp_path / "cache" / "tiles.json"
    tuned.forget()
    logs.forget()


def point(*entries: Any, tokens: int = 128, **more: Any) -> tuned_file.Point:
    return tuned_file.Point({"hidden": 2048}, tokens, entries, 10.0, 12.0, "2026-01-01", **more)


def keep(*entries: Any, machine: Machine = H200, **more: Any) -> None:
    tuned_file.keep(machine, point(*entries, **more))


# ---------------------------------------------------------------- lookups
def test_without_a_file_the_rules_choose() -> None:
    assert configs.block_rows(SHAPE) == configs._block_rows(SHAPE)
    assert configs.tiles(SHAPE, 16, True) == configs._tiles(SHAPE, 16, True)
    assert configs.strip(SHAPE, True, False) == configs._strip(SHAPE, False)
    assert configs.strip(SHAPE, False, True) == configs._strip_across(SHAPE, True, False)


def test_what_was_measured_comes_first() -> None:
    strip = Strip(4, 512, 4)
    keep(tuned.entry(ROWS, SHAPE, 0, 64), tuned.entry(FIRST, SHAPE, 16, TILES), tuned.entry(FEW[1], SHAPE, 0, strip))
    assert configs.block_rows(SHAPE) == 64
    assert configs.tiles(SHAPE, 16, True) == TILES
    assert configs.tiles(SHAPE, 16, False) == configs._tiles(SHAPE, 16, False)
    assert configs.tiles(SHAPE, 32, True) == configs._tiles(SHAPE, 32, True)
    assert configs.strip(SHAPE, True, True) == strip
    assert configs.strip(SHAPE, False, True) != strip


@pytest.mark.parametrize(("slots", "rows"), [(511, 0), (512, 32), (1400, 32), (1500, 128), (4096, 128), (4097, 0)])
def test_the_nearest_within_twice_as_many_slots(slots: int, rows: int) -> None:
    with tuned.only([tuned.entry(ROWS, SHAPE, 0, 32), tuned.entry(ROWS, changed(slots=2048), 0, 128)]):
        assert configs.block_rows(changed(slots=slots)) == (rows or configs._block_rows(changed(slots=slots)))


def changed(**fields: Any) -> Shape:
    return Shape(**{**SHAPE.__dict__, **fields})


@pytest.mark.parametrize("field", ["experts", "inner", "width", "products", "itemsize"])
def test_of_another_layer_nothing_is_known(field: str) -> None:
    with tuned.only([tuned.entry(ROWS, SHAPE, 0, 1024)]):
        assert configs.block_rows(changed(**{field: 4})) != 1024
        assert configs.block_rows(SHAPE) == 1024


def test_layouts_are_told_apart_where_they_are_known() -> None:
    with tuned.only([tuned.entry(ROWS, changed(layout="oi"), 0, 1024)]):
        found = [configs.block_rows(changed(layout=layout)) == 1024 for layout in ("", "oi", "io")]
    assert found == [True, True, False]


def test_of_another_device_or_triton_nothing_is_known(caplog: pytest.LogCaptureFixture) -> None:
    for machine, word in ((Machine("B200", "3.6"), "none for H200"), (Machine("H200", "3.5"), "Triton 3.5")):
        keep(tuned.entry(ROWS, SHAPE, 0, 1024), machine=machine)
        logs.forget()
        caplog.clear()
        assert configs.block_rows(SHAPE) == 16
        assert word in caplog.text
        tuned_file.path().unlink()
        tuned.forget()


def test_a_device_without_measurements_of_its_own_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tuned.machine_of.cache_clear()
    assert tuned.machine_of(torch.device("cpu")) is None


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tuned.entry(ROWS, SHAPE, 0, 64))
    reads = []
    real = tuned_file._sections
    monkeypatch.setattr(tuned_file, "_sections", lambda: reads.append(1) or real())
    for slots in (900, 1000, 1024, 1024, 100000):
        configs.block_rows(changed(slots=slots))
    assert len(reads) == 1


def test_the_memory_of_choices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "MOST_KNOWN", 8)
    for slots in range(100):
        configs.block_rows(changed(slots=slots))
    assert len(tuned._chosen) <= 8


def test_only_tells_what_was_taken_and_ends() -> None:
    entry = tuned.entry(ROWS, SHAPE, 0, 1024)
    with tuned.only([entry, tuned.entry(FIRST, SHAPE, 16, TILES)]) as used:
        assert configs.block_rows(SHAPE) == 1024
        assert used == {entry}
    assert configs.block_rows(SHAPE) == 16


def test_nothing_of_triton_is_imported_with_the_tables() -> None:
    code = "import sys, moe_compile.ops.kernels.tuned_file, moe_compile.ops.kernels.configs; print('triton' in sys.modules)"
    before = "import sys, moe_compile.ops; print('triton' in sys.modules)"
    found = [subprocess.run([sys.executable, "-c", each], capture_output=True, text=True, check=True).stdout for each in (before, code)]
    assert found[0] == found[1]


# ---------------------------------------------------------------- the file
def test_points_come_back_as_they_were_kept() -> None:
    first = point(tuned.entry(ROWS, SHAPE, 0, 64), tuned.entry(NEXT, SHAPE, 16, TILES))
    second = point(tuned.entry(FEW[2], changed(layout="io"), 0, Strip(16, 16, 4)), tokens=1, finished=False)
    tuned_file.keep(H200, first)
    tuned_file.keep(H200, second)
    assert tuned_file.points_for(H200) == [first, second]
    again = point(tuned.entry(ROWS, SHAPE, 0, 32))
    tuned_file.keep(H200, again)
    assert tuned_file.points_for(H200) == [second, again]


def test_machines_share_a_file_and_are_removed_alone() -> None:
    keep(tuned.entry(ROWS, SHAPE, 0, 64))
    keep(tuned.entry(ROWS, SHAPE, 0, 128), machine=Machine("B200", "3.6"))
    keep(tuned.entry(ROWS, SHAPE, 0, 32), machine=Machine("H200", "3.5"))
    assert configs.block_rows(SHAPE) == 64
    assert tuned_file.remove("H200") == 2
    assert [len(tuned_file.points_for(each)) for each in (H200, Machine("B200", "3.6"))] == [0, 1]
    assert configs.block_rows(SHAPE) == 16


def text_with(**changes: Any) -> str:
    """A good file's text with one entry's fields changed."""
    value = {**tuned_file.entry_json(tuned.entry(FIRST, SHAPE, 16, TILES)), **changes}
    whole = {"layer": {}, "tokens": 1, "microseconds": 1, "rules": 1, "date": "", "finished": True, "entries": [value]}
    section = {**H200._asdict(), "kernels": tuned_file.kernels_hash(), "points": [whole]}
    return json.dumps({"format": tuned_file.FORMAT, "sections": [section]})


BROKEN = {
    "cut off": text_with()[:-20],
    "empty": "",
    "not ours": '{"name": "something"}',
    "a list": "[1, 2]",
    "another format": text_with().replace('"format": 1', '"format": 7'),
    "no sections": '{"format": 1}',
    "role": text_with(role="second"),
    "slots": text_with(slots="many"),
    "tiles' fields": text_with(value={"rows": 16, "columns": 3}),
    "tiles' sizes": text_with(value={**TILES.__dict__, "cols": 24}),
    "tiles' flags": text_with(value={**TILES.__dict__, "swap": 1}),
    "tiles' rows": text_with(rows=32),
    "block rows": text_with(role=ROWS, value=7),
    "a number": text_with(value=12),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_once_and_ignored(name: str, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text(BROKEN[name])
    for _ in range(3):
        assert configs.tiles(SHAPE, 16, True) == configs._tiles(SHAPE, 16, True)
        tuned.forget()
    assert len(caplog.records) == 1
    assert str(own_cache) in caplog.text
    assert "--forget" in caplog.text
    keep(tuned.entry(FIRST, SHAPE, 16, TILES))
    assert configs.tiles(SHAPE, 16, True) == TILES


def test_the_good_file_of_these_cases_is_good(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text(text_with())
    assert configs.tiles(SHAPE, 16, True) == TILES
    assert not caplog.records


def test_other_kernels_make_a_file_outdated(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    keep(tuned.entry(ROWS, SHAPE, 0, 64))
    monkeypatch.setattr(tuned_file, "kernels_hash", lambda: "another")
    tuned.forget()
    assert configs.block_rows(SHAPE) == 16
    assert "kernels" in caplog.text


def test_a_folder_in_the_files_place_is_told(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_cache.mkdir(parents=True)
    assert configs.block_rows(SHAPE) == 16
    assert str(own_cache) in caplog.text


def test_a_write_that_fails_leaves_the_old_file(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tuned.entry(ROWS, SHAPE, 0, 64))
    before = own_cache.read_text()
    monkeypatch.setattr(tuned_file.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        keep(tuned.entry(ROWS, SHAPE, 0, 32))
    assert own_cache.read_text() == before
    assert not [each for each in own_cache.parent.iterdir() if each.name not in ("tiles.json", "tiles.json.lock")]


# ---------------------------------------------------------------- the kernels take it
GATED = "mm(1, silu(cols(mm(0, x), 0, 16, 1)) * cols(mm(0, x), 16, 32, 1))"
BIASED = "(mm(1, gelu(cols(mm(0, x) + b(0), 0, 32, 2)) * (cols(mm(0, x) + b(0), 1, 32, 2) + 1.0)) + b(1)) * w"
APART = "mm(2, silu(mm(0, x)) * mm(1, x))"
CHANGED_ROWS = "mm(1, relu(mm(0, x * w)))"


@CASES.add(*((tokens, layout, text) for tokens in (1, 20) for layout in ("eoi", "io*") for text in (GATED, BIASED, APART, CHANGED_ROWS)))
def what_tune_answers_is_what_the_kernels_ask(tokens: int, layout: str, text: str) -> None:
    from moe_compile.tuning_layer import Work

    _compared(Work(24, 16, 4, 2, "float32", layout, text), tokens, 1e-5)


HALVES = "mm(1, silu(cols(mm(0, x), 0, 32, 1)) * cols(mm(0, x), 32, 64, 1))"
PAIRS = "mm(1, cols(mm(0, x), 0, 64, 2) * cols(mm(0, x), 1, 64, 2))"


@CASES.add(
    ("mxfp4", PAIRS), ("mxfp4", CHANGED_ROWS), ("int4", HALVES), ("int8", PAIRS), ("fp8_block", HALVES), ("fp8_block", PAIRS),
    ("fp8_channel_w", HALVES),
)  # fmt: skip
def so_it_is_for_quantised_weights(kind: str, text: str) -> None:
    from moe_compile.tuning_layer import Work

    _compared(Work(64, 32, 4, 2, "bfloat16", "eoi", text, kind), 20, 2e-2)


def _compared(work: Any, tokens: int, limit: float) -> None:
    """Choices of all sorts: each is all that the kernels ask for, and gives what the rules' choice gives."""
    from moe_compile.tuning_gpu import inputs, parameters, run
    from moe_compile.tuning_layer import Choice, Point, entries, neighbours, rules, starts

    asked = Point(work, tokens)
    weights = parameters(work, "cpu")
    given, own = inputs(asked, 0, "cpu"), rules(asked)
    with tuned.only(()):
        right = run(work, given, weights).float()
    near = neighbours(asked, own)
    for choice in (near[0], near[-1], starts(asked)[-1], Choice(own.rows, own.layers)):
        with tuned.only(entries(asked, choice)) as used:
            out = run(work, given, weights).float()
        assert used == set(entries(asked, choice)), choice
        assert float((out - right).abs().max()) < limit * float(right.abs().max()), choice


test_in_interpreter = CASES.test()

if __name__ == "__main__":
    CASES.main()


def test_a_plain_last_layer_holds_all_slots_where_registers_do() -> None:
    few, many = Shape(8, 128, 768, 2048, 1, 2), Shape(16, 64, 14336, 4096, 1, 2)
    assert configs.at_once(configs.strip(few, True, True, plain=True), few.inner, few.slots)
    assert configs.strip(many, True, True, plain=True) == configs._strip(many, True)
    assert not configs.at_once(configs.strip(many, True, True, plain=True), many.inner, many.slots)
