"""Table and roofline picture of what benchmarks/moe_layer.py wrote: python benchmarks/layer_plot.py results/NAME.csv

Writes NAME.md and NAME.png beside NAME.csv. The picture needs matplotlib (`pip install moe_compile[bench]`); without it only the table is
written. Needs no torch. Only times of one session (one machine, not restarted) are compared with each other.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = "ours"
CASE = ("session", "mode", "dtype", "shape", "tokens", "routing")
WAYS = {
    "forward": "Forward: replays of a CUDA graph (on a CPU: eager calls).",
    "train": "Train: eager calls of forward and backward (x, both weights, routing weights), from an idle device.",
}

Row = dict[str, str]


class Point:
    """One case: all peers that were asked for it."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {row["peer"]: row for row in rows}
        self.first = rows[0]

    def times(self, ours: bool) -> list[tuple[float, str]]:
        """(microseconds, peer) of right results, ours or all others."""
        right = [row for row in self.rows.values() if row["us"] and row["ok"] == "True"]
        return sorted((float(row["us"]), row["peer"]) for row in right if (row["peer"].split()[0] == OURS) == ours)

    @property
    def floor(self) -> float:
        return float(self.first["floor_us"])

    @property
    def gain(self) -> float | None:
        """The best other peer's time by our best, or None if one of them is missing."""
        mine, others = self.times(True), self.times(False)
        return others[0][0] / mine[0][0] if mine and others else None

    @property
    def label(self) -> str:
        return f"{self.first['tokens']} {self.first['routing']}"


def points(rows: list[Row]) -> dict[tuple[str, ...], Point]:
    """By case, in the order of the file; a later row replaces an earlier one of the same peer."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in CASE), []).append(row)
    return {case: Point(own) for case, own in found.items()}


def distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# ---------------------------------------------------------------- the table
def table(rows: list[Row]) -> str:
    found = points(rows)
    return "\n".join([*_header(rows), *_short(found), *_all(found), *_notes(rows)]) + "\n"


def _header(rows: list[Row]) -> list[str]:
    lines = ["# One MoE layer on one device, routing given", ""]
    for session in distinct(row["session"] for row in rows):
        own = [row for row in rows if row["session"] == session]
        rates = [f"{row['shape']} {float(row['flop_rate']) / 1e12:.0f} TFLOP/s, {float(row['byte_rate']) / 1e12:.2f} TB/s" for row in own]
        lines += [
            f"Session {session}, {', '.join(distinct(row['date'] for row in own))}: {own[0]['hardware']}; medians of "
            f"{', '.join(distinct(row['repeats'] for row in own))} samples. Rates before each shape: {'; '.join(distinct(rates))}.", "",
            *(f"- {each}" for each in distinct(row["software"] for row in own)), "",
            *(f"    {each}" for each in distinct(row["command"] for row in own)), "",
        ]  # fmt: skip
    ways = " ".join(WAYS[mode] for mode in distinct(row["mode"] for row in rows))
    return [
        *lines,
        f"Microseconds, from ids to the combined output, L2 cache overwritten and other inputs before each sample. {ways} Floor: the "
        "larger of operations and bytes (weights of the experts hit, activations once) at the rates above. Errors against float32; WRONG "
        "if over the limit.", "",
    ]  # fmt: skip


def _short(found: dict[tuple[str, ...], Point]) -> list[str]:
    lines = [
        "## In short", "", "| mode | shape | tokens, routing | floor | ours | of floor | best other | of floor | ours is faster by |",
        "|" + "---|" * 9,
    ]  # fmt: skip
    for point in found.values():
        mine, others = point.times(True), point.times(False)
        lines.append(
            f"| {point.first['mode']} | {point.first['shape']} | {point.label} | {_number(point.floor)} | {_best(mine, point.floor)} | "
            f"{_best(others, point.floor)} | {_times(point.gain)} |"
        )
    return [*lines, "", *_means(found), ""]


def _means(found: dict[tuple[str, ...], Point]) -> list[str]:
    """Geometric means by mode and shape, and of all shapes."""
    lines = []
    for mode in distinct(case[1] for case in found):
        gains = {case: point.gain for case, point in found.items() if case[1] == mode and point.gain is not None}
        shapes = distinct(case[3] for case in gains)
        parts = [f"{shape} {_mean(gain for case, gain in gains.items() if case[3] == shape and gain)}" for shape in shapes]
        if gains:
            least, case = min((gain, case) for case, gain in gains.items() if gain)
            whole = _mean(gain for gain in gains.values() if gain)
            lines.append(
                f"{mode}: ours is faster than the best other at each point by {whole} (geometric mean of {len(gains)}; "
                f"{', '.join(parts)}), at the least by {least:.2f}x ({' '.join(case[3:])})."
            )
    return lines


def _mean(gains: Iterable[float]) -> str:
    logs = [math.log(gain) for gain in gains]
    return f"{math.exp(sum(logs) / len(logs)):.3f}x"


def _all(found: dict[tuple[str, ...], Point]) -> list[str]:
    """A table for each shape: every peer at every point."""
    lines: list[str] = []
    for group in dict.fromkeys(case[:4] for case in found):
        own = [point for case, point in found.items() if case[:4] == group]
        peers = distinct(peer for point in own for peer, row in point.rows.items() if row["us"])
        first = own[0].first
        lines += [
            f"## {first['shape']}, {first['mode']} (session {first['session']})", "",
            f"Hidden {first['hidden']}, intermediate {first['inter']}, {first['experts']} experts, top-{first['top_k']}, {first['dtype']}.",
            "", "| | floor | " + " | ".join(peers) + " |", "|" + "---|" * (len(peers) + 2),
        ]  # fmt: skip
        for point in own:
            best = min((us for us, _ in (*point.times(True), *point.times(False))), default=0.0)
            cells = [_cell(point.rows.get(peer), best) for peer in peers]
            lines.append(f"| {point.label} | {_number(point.floor)} | " + " | ".join(cells) + " |")
        lines += ["", *_extremes(own, peers), ""]
    return lines


def _extremes(own: list[Point], peers: list[str]) -> list[str]:
    """The largest error of each peer, and in training the most memory."""

    def most(peer: str, key: str) -> float:
        return max((float(point.rows[peer][key]) for point in own if peer in point.rows and point.rows[peer]["us"]), default=0.0)

    lines = ["Largest errors: " + ", ".join(f"{peer} {most(peer, 'error'):.1e}" for peer in peers) + "."]
    if own[0].first["mode"] == "train" and any(most(peer, "peak_gib") for peer in peers):
        lines += [
            "",
            "Most memory beside weights and inputs, GiB: " + ", ".join(f"{peer} {most(peer, 'peak_gib'):.1f}" for peer in peers) + ".",
        ]
    return lines


def _cell(row: Row | None, best: float) -> str:
    if row is None or not row["us"]:
        return "-"
    if row["ok"] != "True":
        return f"WRONG ({row['error']})"
    text = _number(float(row["us"]))
    return f"**{text}**" if float(row["us"]) == best else text


def _best(times: list[tuple[float, str]], floor: float) -> str:
    return f"{_number(times[0][0])} {times[0][1]} | {floor / times[0][0]:.2f}" if times else "- | -"


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"


def _number(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _notes(rows: list[Row]) -> list[str]:
    """Why peers are missing, and what was said of those that are not; each once, with its cases."""
    missing, said = _by_note(rows, False), _by_note(rows, True)
    return [*(["## Not measured", "", *missing, ""] if missing else []), *(["## Notes", "", *said, ""] if said else [])]


def _by_note(rows: list[Row], timed: bool) -> list[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["note"] and bool(row["us"]) == timed:
            where.setdefault((row["peer"], row["note"]), []).append(f"{row['shape']} {row['tokens']} {row['routing']}")
    everywhere = {peer: sum(row["peer"] == peer for row in rows) for peer in distinct(row["peer"] for row in rows)}
    return [f"- {peer}: {note}" + (f" ({', '.join(at)})" if len(at) < everywhere[peer] else "") for (peer, note), at in where.items()]


# ---------------------------------------------------------------- the picture
def picture(rows: list[Row], path: Path) -> None:
    """Rooflines of the last session: a panel for each shape and mode, our best and the best other at every point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {case: point for case, point in points(rows).items() if case[0] == rows[-1]["session"]}
    groups = list(dict.fromkeys(case[:4] for case in found))
    columns = min(2, len(groups))
    panels: Any
    figure, panels = pyplot.subplots(
        -(-len(groups) // columns), columns, figsize=(7 * columns, 5 * -(-len(groups) // columns)), squeeze=False
    )
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for group, panel in zip(groups, panels.flat):
        _panel(panel, [point for case, point in found.items() if case[:4] == group])
        panel.set_title(f"{group[3]}, {group[1]}, {group[2]}, {rows[-1]['hardware']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, own: list[Point]) -> None:
    intensities = [_intensity(point) for point in own]
    _roof(panel, own[0], min(intensities) / 2, max(intensities) * 2)
    for ours, color, name, markers in ((True, "black", "ours", "ov"), (False, "C1", "best other", "x+")):
        for routing, marker in zip(("uniform", "zipf"), markers):
            marked = [(_intensity(p), _rate(p, p.times(ours)[0][0])) for p in own if p.first["routing"] == routing and p.times(ours)]
            if marked:
                panel.scatter(*zip(*marked), marker=marker, color=color, label=f"{name}, {routing}", s=30, alpha=0.7)
    for point, intensity in zip(own, intensities):
        if point.first["routing"] == own[0].first["routing"] and (best := point.times(True) or point.times(False)):
            panel.annotate(
                point.first["tokens"], (intensity, _rate(point, best[0][0])), textcoords="offset points", xytext=(4, -10), fontsize=7
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations a byte")
    panel.set_ylabel("TFLOP/s")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=8)


def _roof(panel: Any, point: Point, low: float, high: float) -> None:
    flops, bytes_ = float(point.first["flop_rate"]), float(point.first["byte_rate"])
    at = [low, min(max(flops / bytes_, low), high), high]
    panel.plot(at, [min(flops, x * bytes_) / 1e12 for x in at], color="gray", linewidth=1, label="floor")


def _intensity(point: Point) -> float:
    return float(point.first["flops"]) / float(point.first["bytes"])


def _rate(point: Point, us: float) -> float:
    return float(point.first["flops"]) / us / 1e6


# ---------------------------------------------------------------- files
def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a CSV file (a case's peer is replaced), and writes table and picture of all that is in it then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = {_key(row): row for row in [*(read(path) if path.exists() else []), *({k: str(v) for k, v in row.items()} for row in rows)]}
    together = list(keep.values())
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(together[-1]))
        writer.writeheader()
        writer.writerows(together)
    render(path, together)


def _key(row: Row) -> tuple[str, ...]:
    return (*(row[key] for key in CASE), row["peer"])


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def render(path: Path, rows: list[Row]) -> None:
    path.with_suffix(".md").write_text(table(rows))
    try:
        picture(rows, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no picture: {error}; pip install moe_compile[bench]")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/layer_plot.py FILE.csv, as benchmarks/moe_layer.py --out writes it")
    path = Path(sys.argv[1])
    render(path, read(path))
    print(f"wrote {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
