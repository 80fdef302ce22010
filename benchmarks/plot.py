"""Tables and a picture of what benchmarks/exchange.py wrote: python benchmarks/plot.py results/h200_exchange.csv

Writes x.md and x.png beside x.csv. The picture needs matplotlib (`pip install moe_compile[bench]`); without it only the table is written.
Needs no torch. Only times of one session (one machine, not restarted) are compared with each other.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = "nvlink"  # the provider whose advantage is told
FAMILY = ("nvlink", "nvlink_batched")  # what is no rival of it
CASE = ("session", "world", "hidden", "top_k", "experts", "dtype", "payload", "tokens")
WAYS = {
    "eager": "Eager: the device is idle when the clock starts, so the host's part counts.",
    "graph": "Graph: replays of a CUDA graph.",
}


class Entry:
    """One candidate in one case, in all its modes."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.name, self.kind = rows[0]["name"], rows[0]["kind"]
        self.modes = {row["mode"]: row for row in rows}

    @property
    def wrong(self) -> bool:
        return any(row["ok"] != "True" for row in self.modes.values())

    def time(self, *modes: str) -> float | None:
        """Microseconds of a whole exchange in the best of these modes; None if it was not measured, or is wrong."""
        times = [float(row["both_us"]) for mode, row in self.modes.items() if row["both_us"] and mode in modes]
        return None if self.wrong or not times else min(times)

    @property
    def best(self) -> float | None:
        return self.time(*WAYS)

    def text(self, mode: str, column: str) -> str:
        value = self.modes.get(mode, {}).get(column, "")
        return f"{float(value):.0f}" if value else "-"

    @property
    def error(self) -> str:
        return max((row["error"] for row in self.modes.values() if row["error"]), key=float, default="-")


def entries(rows: list[dict[str, str]]) -> dict[tuple[str, ...], list[Entry]]:
    """By case, in the order of the file. A later row replaces an earlier one; a refusal gives way to a measurement."""
    found: dict[tuple[str, ...], dict[str, dict[str, dict[str, str]]]] = {}
    for row in rows:
        modes = found.setdefault(tuple(row[key] for key in CASE), {}).setdefault(row["name"], {})
        old = modes.get(row["mode"])
        if old is None or row["both_us"] or not old["both_us"]:
            modes[row["mode"]] = row
    return {case: [Entry(list(modes.values())) for modes in names.values()] for case, names in found.items()}


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: what was measured with what, nvlink against the best other, every candidate of every case, and why some are missing."""
    cases = entries(rows)
    return "\n".join([*header(rows), *_summaries(cases), *_all(cases), *_reasons(cases)]) + "\n"


def header(rows: list[dict[str, str]]) -> list[str]:
    lines = ["# Exchanges of tokens between ranks", ""]
    for session in _distinct(row["session"] for row in rows):
        own = [row for row in rows if row["session"] == session]
        first = own[0]
        shape = f"hidden {first['hidden']}, top-{first['top_k']} of {first['experts']} experts, {first['dtype']}"
        flush = "L2 cache overwritten before each sample" if first["flush"] == "True" else "caches as they are"
        lines += [
            f"Session {session}, {', '.join(_distinct(row['date'] for row in own))}: {first['hardware']}; {shape}; "
            f"{first['repeats']} repeats, {flush}.", "", *(f"- {each}" for each in _distinct(row["software"] for row in own)), "",
            *(f"    {each}" for each in _distinct(row["command"] for row in own)), "",
        ]  # fmt: skip
    return [
        *lines,
        "Microseconds, maximum over ranks of the median. Both: from ids to combined rows, with nothing precomputed but in what is called "
        "a part. " + " ".join(WAYS[mode] for mode in _distinct(row["mode"] for row in rows)) + " Error: the largest relative error of a "
        "row on fresh random inputs, outputs poisoned before; WRONG if it is over the limit.", "",
    ]  # fmt: skip


def _summaries(cases: dict[tuple[str, ...], list[Entry]]) -> list[str]:
    """Where both modes were measured, one table for each and one for the better of the two."""
    present = [mode for mode in WAYS if any(e.time(mode) for found in cases.values() for e in found)]
    lines = _summary(cases, "the better mode of each", *present) if len(present) > 1 else []
    return [*lines, *(line for mode in present for line in _summary(cases, mode, mode))]


def _summary(cases: dict[tuple[str, ...], list[Entry]], title: str, *modes: str) -> list[str]:
    lines = [
        f"| payload | tokens a rank | {OURS} | best other provider | {OURS} is faster by | best raw library | {OURS} is faster by |",
        "|" + "---|" * 7,
    ]
    for case, found in cases.items():
        ours = next((own for e in found if e.name == OURS and (own := e.time(*modes))), None)
        if ours is None:
            continue
        cells = []
        for kind in ("provider", "raw"):
            others = [(own, e.name) for e in found if e.kind == kind and e.name.split("+")[0] not in FAMILY and (own := e.time(*modes))]
            own, name = min(others, default=(0.0, ""))
            cells += [f"{name} {own:.0f}", f"{own / ours:.2f}x"] if name else ["-", "-"]
        lines.append(f"| {_payload(case)} | {case[-1]} | {ours:.0f} | " + " | ".join(cells) + " |")
    return [f"## In short: {title}", "", *lines, ""] if len(lines) > 2 else []


def _all(cases: dict[tuple[str, ...], list[Entry]]) -> list[str]:
    lines = ["## All", ""]
    for case, found in cases.items():
        base = reference(found)
        against = f"times {base.name}" if base is not None else "ratio"
        lines += [
            f"### {case[-1]} tokens a rank, payload {_payload(case)} ({case[1]} ranks, session {case[0]})", "",
            f"| | dispatch eager | collect eager | both eager | dispatch graph | collect graph | both graph | {against} | error |",
            "|" + "---|" * 9,
        ]  # fmt: skip
        measured = [e for e in found if any(row["both_us"] for row in e.modes.values())]
        for entry in sorted(measured, key=lambda e: e.best or float("inf")):
            cells = [entry.text(mode, f"{part}_us") for mode in WAYS for part in ("dispatch", "collect", "both")]
            name = f"{entry.name} (part)" if entry.kind == "part" else entry.name
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {_ratio(entry, base)} | {entry.error} |")
        lines.append("")
    return lines


def _ratio(entry: Entry, base: Entry | None) -> str:
    if entry.wrong:
        return "WRONG"
    return f"{entry.best / base.best:.2f}" if base is not None and entry.best and base.best else "-"


def reference(found: list[Entry]) -> Entry | None:
    """What the others are compared with: ours, and without it the fastest whole exchange."""
    ours = [e for e in found if e.name == OURS and e.best is not None]
    return ours[0] if ours else _fastest(e for e in found if e.kind != "part")


def _fastest(found: Iterable[Entry]) -> Entry | None:
    return min((e for e in found if e.best is not None), key=lambda e: e.best or 0.0, default=None)


def _reasons(cases: dict[tuple[str, ...], list[Entry]]) -> list[str]:
    """Each reason once, with the cases that it is for; not that a library is missing here that another run had."""
    had = {entry.name for found in cases.values() for entry in found if any(row["both_us"] for row in entry.modes.values())}
    where: dict[tuple[str, str, str], list[str]] = {}
    for case, found in cases.items():
        for entry in found:
            for mode, row in entry.modes.items():
                if row["note"] and not (entry.name in had and "is not installed" in row["note"]):
                    where.setdefault((entry.name, mode, row["note"]), []).append(f"{case[-1]} {_payload(case)}")
    lines = [
        f"- {name}, {mode}: {note}" + (f" ({', '.join(at)})" if len(at) < len(cases) else "") for (name, mode, note), at in where.items()
    ]
    return ["## Not measured", "", *lines] if lines else []


def _payload(case: tuple[str, ...]) -> str:
    dtype, payload = case[CASE.index("dtype")], case[CASE.index("payload")]
    return dtype if payload == "none" else payload


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def picture(rows: list[dict[str, str]], path: Path) -> None:
    """Time of a whole exchange over tokens a rank, a panel for each payload; of the last session."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {case: found for case, found in entries(rows).items() if case[0] == rows[-1]["session"]}
    payloads = _distinct(_payload(case) for case in cases)
    panels: Any
    figure, panels = pyplot.subplots(1, len(payloads), figsize=(7 * len(payloads), 6), squeeze=False, sharey=True)
    for payload, panel in zip(payloads, panels[0]):
        _panel(panel, {case: found for case, found in cases.items() if _payload(case) == payload})
        panel.set_title(f"{rows[-1]['hardware']}, hidden {rows[-1]['hidden']}, top-{rows[-1]['top_k']} of {rows[-1]['experts']}, {payload}")
    panels[0][0].set_ylabel("microseconds, from ids to combined rows (the better of eager and graph)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _panel(panel: Any, cases: dict[tuple[str, ...], list[Entry]]) -> None:
    names = _distinct(e.name for found in cases.values() for e in found if e.best is not None and e.kind != "part")
    for name in names:
        points = [(int(case[-1]), e.best) for case, found in cases.items() for e in found if e.name == name and e.best is not None]
        panel.plot(*zip(*sorted(points)), marker="o", markersize=4, label=name, **_style(name))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sizes = sorted({int(case[-1]) for case in cases})
    panel.set_xticks(sizes, labels=[str(size) for size in sizes])
    panel.set_xlabel("tokens a rank")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=8)


def _style(name: str) -> dict[str, Any]:
    """One colour for each library, raw calls dashed, variants dotted."""
    plain = name.removeprefix("raw ").split("+")[0].split(",")[0]
    colors = ("nvlink", "alltoall", "allgather", "deepep_ht", "deepep_ll", "deepep_v2", "pplx", "nvlink_batched")
    color = "black" if plain == OURS else f"C{colors.index(plain) if plain in colors else 8}"
    line = "--" if name.startswith("raw") else ":" if name != plain else "-"
    return {"color": color, "linestyle": line, "linewidth": 3.0 if name == OURS else 1.2}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/plot.py FILE.csv, as benchmarks/exchange.py --out writes it")
    path = Path(sys.argv[1])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    path.with_suffix(".md").write_text(table(rows))
    try:
        picture(rows, path.with_suffix(".png"))
    except ImportError as error:
        print(f"wrote {path.with_suffix('.md')}; no picture: {error}; pip install moe_compile[bench]")
        return
    print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
