"""Table and picture of what benchmarks/moe_layer.py wrote: python benchmarks/layer_plot.py results/NAME.csv [MORE.csv ...]

Adds the rows of MORE.csv to NAME.csv, and writes NAME.md and NAME.png beside it. The picture needs matplotlib (`pip install
moe_compile[bench]`); without it only the table is written. Needs no torch. Only times of one session (one machine, not restarted) are
compared with each other.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "ours"
CASE = ("session", "mode", "dtype", "shape", "tokens", "routing")
WAYS = {
    "forward": "Forward: replays of a CUDA graph (on a CPU: eager calls).",
    "train": "Train: eager calls of forward and backward (x, both weights, routing weights), from an idle device.",
    "train ahead": "Train ahead: the same on a device that is busy until the host has launched all, so the host's part does not count.",
}

Row = dict[str, str]


class Point:
    """One case: all peers that were asked for it."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {row["peer"]: row for row in rows}
        self.first = rows[0]

    def times(self, ours: bool) -> list[tuple[float, str]]:
        """(microseconds, peer) of right results, ours or all others. Ours is what a user gets: OURS, whose provider is chosen by estimate,
        where it was measured; else our stages by each provider."""
        timed = [row for row in self.rows.values() if row["us"] and (row["peer"].split()[0] == OURS) == ours]
        if ours and self.rows.get(OURS, {}).get("us"):
            timed = [self.rows[OURS]]
        return sorted((float(row["us"]), row["peer"]) for row in timed if row["ok"] == "True")

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

    @property
    def shape(self) -> str:
        """With the kind of its weights where they are quantised."""
        return " ".join((self.first["shape"], *self.first["dtype"].split(" x ")[1:]))


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
        "larger of operations and bytes (weights of the experts hit, activations once) at the rates above. Errors against float32 (of "
        "quantised weights: with those that they stand for); WRONG if over the limit.", "",
    ]  # fmt: skip


def _short(found: dict[tuple[str, ...], Point]) -> list[str]:
    lines = [
        "## In short", "", "| mode | shape | tokens, routing | floor | ours | of floor | best other | of floor | ours is faster by |",
        "|" + "---|" * 9,
    ]  # fmt: skip
    for point in found.values():
        mine, others = point.times(True), point.times(False)
        lines.append(
            f"| {point.first['mode']} | {point.shape} | {point.label} | {_number(point.floor)} | {_best(mine, point.floor)} | "
            f"{_best(others, point.floor)} | {_times(point.gain)} |"
        )
    return [*lines, "", *_means(found), ""]


def _means(found: dict[tuple[str, ...], Point]) -> list[str]:
    """Geometric means by mode, dtype and shape, and of all shapes."""
    lines = []
    for mode, dtype in dict.fromkeys(case[1:3] for case in found):
        gains = {case: point.gain for case, point in found.items() if case[1:3] == (mode, dtype) and point.gain is not None}
        shapes = distinct(case[3] for case in gains)
        parts = [f"{shape} {_mean(gain for case, gain in gains.items() if case[3] == shape and gain)}" for shape in shapes]
        if gains:
            least, case = min((gain, case) for case, gain in gains.items() if gain)
            whole = _mean(gain for gain in gains.values() if gain)
            lines.append(
                f"{mode}, {dtype}: ours is faster than the best other at each point by {whole} (geometric mean of {len(gains)}; "
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
    if own[0].first["mode"].startswith("train") and any(most(peer, "peak_gib") for peer in peers):
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


# ---------------------------------------------------------------- files
def results(out: str) -> Path:
    """The CSV file's path: of a name it is in benchmarks/results."""
    path = Path(out)
    return path.with_suffix(".csv") if path.parent != Path(".") else Path(__file__).parent / "results" / f"{path.name}.csv"


def add(path: Path, rows: list[dict[str, Any]], key: Sequence[str] = (*CASE, "peer")) -> None:
    """Adds rows to a CSV file; one with the same key is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read(path) if path.exists() else []
    new = [{name: str(value) for name, value in row.items()} for row in rows]
    keep = {tuple(row[name] for name in key): row for row in [*before, *new]}
    together = list(keep.values())
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(together[-1]))
        writer.writeheader()
        writer.writerows(together)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def render(path: Path) -> None:
    """Writes table and picture of all that is in a CSV file."""
    rows = read(path)
    path.with_suffix(".md").write_text(table(rows))
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError as error:
        print(f"no picture: {error}; pip install moe_compile[bench]")
        return
    from layer_picture import picture

    picture(rows, path.with_suffix(".png"))


def gather(paths: Sequence[str], key: Sequence[str] = (*CASE, "peer")) -> Path:
    """Adds the rows of the other files to the first one."""
    first, *others = map(Path, paths)
    for other in others:
        add(first, read(other), key)
    return first


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python benchmarks/layer_plot.py FILE.csv [MORE.csv ...], as benchmarks/moe_layer.py --out writes them")
    path = gather(sys.argv[1:])
    render(path)
    print(f"wrote {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
