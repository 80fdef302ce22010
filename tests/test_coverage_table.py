"""docs/coverage.md lists exactly the present cases, with reasons; a sample of its rows is reproduced."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from corpus import hf_zoo, styles
from corpus.variants import VARIANTS

DOCS = Path(__file__).resolve().parents[1] / "docs"
SAMPLE = (
    "hf_mixtral_440_range",
    "tf5_grouped_mm",
    "makemoe_any_mask",
    "slot_then_expert",
    "stack_gather",
    "olmoe",
)


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("coverage_table", DOCS / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["coverage_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written() -> str:
    return (DOCS / "coverage.md").read_text()


def test_lists_exactly_the_present_cases(coverage, written):
    eager = [name + coverage.EAGER for name in coverage.eager_models()]
    names, first = list(coverage.parse(written)), [*styles.CASES, *VARIANTS, *hf_zoo.ZOO]
    assert names[: len(first)] == first
    assert names[len(first) :] in ([], eager)


def full(rows: dict[str, tuple[str, str]], names: list[str]) -> int:
    done = [rows[name][1].split("/") for name in names if name in rows]
    return sum(int(rewritten) >= int(blocks) for rewritten, blocks in done)


def test_as_many_are_rewritten_in_full_as_before(coverage, written):
    rows, eager = coverage.parse(written), [name + coverage.EAGER for name in coverage.eager_models()]
    assert full(rows, list(styles.CASES)) >= 33
    assert full(rows, list(VARIANTS)) >= 112
    assert full(rows, list(hf_zoo.ZOO)) >= 64
    assert full(rows, eager) >= 56


OLDER = sorted(page.name for page in DOCS.glob("coverage-*.md"))


def test_pages_of_older_versions_are_linked(written):
    assert OLDER
    assert all(f"({page})" in written for page in OLDER)


@pytest.mark.parametrize("page", OLDER)
def test_page_of_an_older_version(coverage, page):
    """Each model of the zoo is a row, or is named with the reason why it is none; of some of these a block is one. Heads count the rows."""
    written = (DOCS / page).read_text()
    text, _, alone = written.partition("## Blocks of these by themselves")
    rows, blocks = coverage.parse(text), coverage.parse(alone)
    beside = re.findall(r"^- `(\w+)`: .+$", text, flags=re.MULTILINE)
    (gone,) = re.findall(r"^Not there yet: (.*)\.$", written, flags=re.MULTILINE)
    assert sorted([*rows, *beside, *gone.split(", ")]) == sorted(hf_zoo.ZOO)
    assert f"{len(rows)} cases" in text
    assert f"{full(rows, list(rows))} rewritten in full" in text
    assert blocks.keys() <= set(beside)
    assert not blocks or (f"{len(blocks)} cases" in alone and f"{full(blocks, list(blocks))} rewritten in full" in alone)
    test_rows_that_are_not_rewritten_say_why(written)


def test_rows_that_are_not_rewritten_say_why(written):
    for row in re.findall(r"^\| `.*$", written, flags=re.MULTILINE):
        _, _, _, done, error, why, _ = (cell.strip() for cell in row.replace("\\|", "/").split("|"))
        rewritten, blocks = map(int, done.split("/"))
        assert why or rewritten >= blocks, row
        assert float(error) < 5e-2, row


@pytest.mark.parametrize("name", SAMPLE)
def test_row_is_reproduced(coverage, written, name):
    row = coverage.row_of(name)
    assert (row.graphs, f"{row.rewritten}/{row.blocks}") == coverage.parse(written)[name], str(row)
