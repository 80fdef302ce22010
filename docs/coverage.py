"""Write docs/coverage.md: every style and zoo model, captured, rewritten or refused and why, and the error.

    python docs/coverage.py            all of it (some minutes)
    python docs/coverage.py NAME ...   print these rows only
    python docs/coverage.py --zoo PAGE the models that the installed transformers has, whichever that is, to a page of their own

Each row compiles with inner="eager" and compares with eager: values, and for styles gradients.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
TARGET = ROOT / "docs" / "coverage.md"

import torch  # noqa: E402
from corpus import hf_zoo, styles  # noqa: E402
from corpus.expected import STYLE_REGIONS  # noqa: E402
from corpus.harness import dynamo_graphs, error, observe, worst  # noqa: E402
from corpus.older_blocks import BLOCKS  # noqa: E402
from corpus.variants import VARIANTS  # noqa: E402

import moe_compile  # noqa: E402

HEADER = """\
# Coverage

Written by `python docs/coverage.py`; `tests/test_coverage_table.py` checks that no case is missing and recomputes
a sample.

*graphs*: how many Dynamo makes, by default / with its flags for data-dependent shapes and scalars, which
`moe_compile.compile` turns on for itself (a name is what Dynamo raises; 0: it skips the code).
*rewritten*: MoE blocks replaced by stage ops, of those in the code. *error*: largest difference from eager
relative to the largest value, gradients included for styles.

The zoo is of transformers 5.17; [coverage-4.57.md](coverage-4.57.md) has those of its models that transformers 4.57 has, in other words.
"""


@dataclass(frozen=True)
class Row:
    name: str
    graphs: str
    rewritten: int
    blocks: int
    error: float
    why: str

    def __str__(self) -> str:
        done = f"{self.rewritten}/{self.blocks}"
        return f"| `{self.name}` | {self.graphs} | {done} | {self.error:.0e} | {self.why} |"


def style_row(name: str) -> Row:
    """A style's row, with gradients."""
    if name in VARIANTS:
        module, x = VARIANTS[name].build(), VARIANTS[name].inputs()
    else:
        module, (x,) = styles.CASES[name].factory(), styles.CASES[name].inputs()
    graphs = f"{graphs_by_default(module, x)} / {dynamo_graphs(module, x)}"
    blocks = STYLE_REGIONS.get(name, 1)
    report, compiled = compile_eager(module)
    want, got = observe(module, module, x, grad=True), observe(compiled, module, x, grad=True)
    return Row(
        name,
        graphs,
        len(report.rewritten),
        blocks,
        worst(got, want)[0],
        why(report, blocks, module, (x,), {}),
    )


ONE_FORM = {
    "aria_text", "dbrx", "doge_cdmoe_block", "jetmoe", "llama4_text", "longcat_flash", "nllb_moe", "step3p7_text", "switch_transformers",
    "vitpose_backbone",
}  # fmt: skip
EAGER = "_eager"  # behind the name of a zoo model: its experts as the loop that transformers writes


def eager_models() -> list[str]:
    """The zoo's models whose experts have an eager form beside the one that is used by default."""
    return [name for name in hf_zoo.ZOO if name not in ONE_FORM]


def zoo_row(name: str) -> Row:
    """A zoo model's row: values only."""
    model, kwargs = hf_zoo.ZOO[name.removesuffix(EAGER)]()
    if name.endswith(EAGER):
        model.set_experts_implementation("eager")
        name = name.removesuffix(EAGER)
        return replace(_zoo_row(name, model, kwargs), name=name + EAGER)
    return _zoo_row(name, model, kwargs)


def _zoo_row(name: str, model: torch.nn.Module, kwargs: dict) -> Row:
    return _row_of_model(name, model, kwargs, hf_zoo.MOE_LAYERS[name])


def _row_of_model(name: str, model: torch.nn.Module, kwargs: dict, blocks: int) -> Row:
    graphs = f"{graphs_by_default(model, **kwargs)} / {dynamo_graphs(model, **kwargs)}"
    report, compiled = compile_eager(model)
    with torch.no_grad():
        off = error(hf_zoo.first_tensor(compiled(**kwargs)), hf_zoo.first_tensor(model(**kwargs)))
    return Row(name, graphs, len(report.rewritten), blocks, off, why(report, blocks, model, (), kwargs))


NO_DECISION = "the rest shows no routing decision: never called, or its experts come from a table"


def compile_eager(module: torch.nn.Module) -> tuple[moe_compile.RewriteReport, torch.nn.Module]:
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    return report, moe_compile.compile(module, inner="eager", report=report)


def graphs_by_default(module: torch.nn.Module, *args: torch.Tensor, **kwargs: object) -> int | str:
    return dynamo_graphs(module, *args, flags=False, **kwargs)


def why(report: moe_compile.RewriteReport, blocks: int, module: torch.nn.Module, args: tuple, kwargs: dict) -> str:
    """Why not all blocks are rewritten: the regions' reasons, or what broke the graph."""
    if len(report.rewritten) >= blocks:
        return ""
    with torch.no_grad():
        told = moe_compile.explain(module)(*args, **kwargs)
    reasons = [r.reason for r in told.refused] or told.graph_breaks or list(filter(_says_why, [*told.notes, *report.notes]))
    return shorten("; ".join(dict.fromkeys(map(str, reasons or [NO_DECISION]))))


def _says_why(note: str) -> bool:
    """Not what was recorded, and not what Dynamo captured where no recording was possible: no graph has a break."""
    return " is captured from a recording" not in note and " stays as it is: " not in note


def shorten(text: str, limit: int = 160) -> str:
    """One line of a Markdown cell, without the places where packages lie on this machine."""
    text = re.sub(r"(/[^\s:|]+/)+(?=[^\s/:|]+\.py)", "", text.replace("\n", " ")).replace("|", "\\|")
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def section(title: str, rows: list[Row]) -> str:
    full = sum(row.rewritten >= row.blocks for row in rows)
    one = sum(row.graphs.endswith(" 1") for row in rows)
    head = (
        f"## {title}\n\n{len(rows)} cases, {one} of them one graph with the flags, {full} rewritten in full, "
        f"largest error {max(row.error for row in rows):.0e}.\n\n"
        "| case | graphs | rewritten | error | why not |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(str, rows)) + "\n"


def progress(name: str, row: Row) -> Row:
    print(f"{name:40s} {row}", file=sys.stderr, flush=True)
    return row


def document() -> str:
    given = [progress(name, style_row(name)) for name in styles.CASES]
    own = [progress(name, style_row(name)) for name in VARIANTS]
    zoo = [progress(name, zoo_row(name)) for name in hf_zoo.ZOO]
    eager = [progress(name + EAGER, zoo_row(name + EAGER)) for name in eager_models()]
    parts = [
        HEADER,
        section("Styles of real repositories (`tests/corpus/styles.py`)", given),
        section("Near variants (`tests/corpus/variants/`)", own),
        section("transformers models (`tests/corpus/hf_zoo.py`)", zoo),
        section('The same with experts_implementation="eager"', eager),
    ]
    return "\n".join(parts)


LIMIT = 300  # seconds for one model of an installed transformers
LARGEST = 20_000_000  # parameters: a configuration that names its sizes otherwise would make a real model of it


def of_installed(page: str) -> str:
    """A page of the zoo's models in the transformers that is installed: older ones write the same families otherwise."""
    import transformers

    found = dict(zip(hf_zoo.ZOO, _bounded(list(hf_zoo.ZOO))))
    rows = [found[name] for name in found if isinstance(found[name], Row)]
    alone = [name for name in BLOCKS if isinstance(found[name], str)]
    other = [f"- `{name}`: {shorten(why)}" for name, why in found.items() if isinstance(why, str) and why != ABSENT]
    gone = ", ".join(name for name, why in found.items() if why == ABSENT)
    title = f"transformers {transformers.__version__}"
    how = f"Written by `python docs/coverage.py --zoo {page}`, where that version is installed."
    head = f"# {title}\n\n{how} [coverage.md](coverage.md) explains the columns.\n"
    left = ["", "Not built, or not run, by the zoo, which is written for the newest version:", "", *other] if other else []
    blocks = section("Blocks of these by themselves (`tests/corpus/older_blocks.py`)", [block_row(name) for name in alone]) if alone else ""
    return "\n".join([head, section("Models", rows), *left, "", blocks, f"Not there yet: {gone}.", ""])


def block_row(name: str) -> Row:
    """One MoE block of a model that the zoo does not build."""
    return _row_of_model(name, *BLOCKS[name](), 1)


ABSENT = "no such model"


def _bounded(names: list[str]) -> Iterator[Row | str]:
    """Each model's row, or why there is none, from a process that is replaced where a model takes too long."""
    context = multiprocessing.get_context("spawn")
    pool = context.Pool(1, _quiet)
    for name in names:
        try:
            found = pool.apply_async(_installed_row, (name,)).get(LIMIT)
        except multiprocessing.TimeoutError:
            found = f"not done within {LIMIT} seconds"
            pool.terminate()
            pool = context.Pool(1, _quiet)
        print(f"{name:40s} {found}", file=sys.stderr, flush=True)
        yield found
    pool.terminate()


def _quiet() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _installed_row(name: str) -> Row | str:
    try:
        model, kwargs = hf_zoo.ZOO[name]()
        if (size := sum(p.numel() for p in model.parameters())) > LARGEST:
            return f"of {size / 1e6:.0f} M parameters, as its configuration has other names for its sizes"
        with torch.no_grad():
            model(**kwargs)
    except Exception as e:  # noqa: BLE001  written for another version
        return ABSENT if isinstance(e, ImportError) else f"{type(e).__name__}: {e}"
    return _zoo_row(name, model, kwargs)


def row_of(name: str) -> Row:
    return zoo_row(name) if name.removesuffix(EAGER) in hf_zoo.ZOO else style_row(name)


def parse(text: str) -> dict[str, tuple[str, str]]:
    """name -> (graphs, rewritten) of every row of the written table."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (\d+/\d+) \|", text, flags=re.MULTILINE)
    return {name: (graphs.strip(), done) for name, graphs, done in rows}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--zoo"]:
        Path(sys.argv[2]).write_text(of_installed(sys.argv[2]))
    elif sys.argv[1:]:
        print(*map(row_of, sys.argv[1:]), sep="\n")
    else:
        TARGET.write_text(document())
