"""tests/sanitize.py, with scripts in the place of compute-sanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import sanitize

ERROR = """========= COMPUTE-SANITIZER
case test_plan_kernels:sizes-once-(1, 1)
case test_plan_kernels:again
========= Invalid __global__ write of size 4 bytes
=========     at _count+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""


def script(folder: Path, output: str, code: int) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(
        f"#!/bin/sh\ncat <<'END'\n{output}END\necho \"$@\" >> {folder}/given\necho $PYTORCH_NO_CUDA_MEMORY_CACHING\nexit {code}\n"
    )
    path.chmod(0o755)
    return str(path)


def test_every_chosen_case_is_there() -> None:
    pytest.importorskip("triton")
    names = sanitize.chosen(None)
    assert {name.split(":")[0] for name in names} == set(sanitize.CHOSEN)
    assert len(names) == len(set(names)) > 100
    with pytest.raises(SystemExit, match="no case of test_plan_kernels is named absent"):
        sanitize.chosen(["test_plan_kernels:absent"])
    with pytest.raises(SystemExit, match="FILE:PATTERN"):
        sanitize.chosen(["again"])


def test_a_report_is_told_with_its_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["test_plan_kernels:sizes-once-(1, 1)", "test_plan_kernels:again"]
    assert not sanitize.check("memcheck", names, 1, script(tmp_path, ERROR, 9))
    out = capsys.readouterr().out
    assert "memcheck: 2 cases in 1 processes, 1 of them not clean" in out
    assert "case test_plan_kernels:again: ========= Invalid __global__ write of size 4 bytes" in out
    assert "=========     at _count+0x90" in out
    given = (tmp_path / "given").read_text()
    assert given.startswith("--tool memcheck --error-exitcode 9")
    assert given.strip().endswith("--run test_plan_kernels:sizes-once-(1, 1) test_plan_kernels:again")


def test_a_case_that_fails_under_a_tool_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = "case test_plan_kernels:again\nAssertionError: 1 != 2\n========= ERROR SUMMARY: 0 errors\n"
    assert not sanitize.check("racecheck", ["test_plan_kernels:again"], 4, script(tmp_path, output, 1))
    out = capsys.readouterr().out
    assert "case test_plan_kernels:again" in out
    assert "AssertionError: 1 != 2" in out


def test_clean_cases_are_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"test_plan_kernels:{at}" for at in range(5)]
    assert sanitize.check("racecheck", names, 3, script(tmp_path, "========= RACECHECK SUMMARY: 0 hazards\n", 0))
    assert capsys.readouterr().out == "racecheck: 5 cases in 3 processes, 0 of them not clean\n"
    given = (tmp_path / "given").read_text().splitlines()
    assert sorted(word for line in given for word in line.split() if ":" in word) == names


def test_it_is_found_beside_nvcc_and_else_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    with pytest.raises(SystemExit, match=r"compute-sanitizer is not in PATH, .*; it comes with the CUDA toolkit: set CUDA_HOME"):
        sanitize.sanitizer()
    path = script(tmp_path / "bin", "", 0)
    assert sanitize.sanitizer() == path
