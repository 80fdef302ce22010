"""The picture of benchmarks/layer_plot.py: a row of panels for each shape and mode. Needs matplotlib.

Roofline: our time and the best other's as operations a second, over operations a byte. Time over tokens: every peer, one routing. Share of
the floor over tokens: ours and the best other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from layer_plot import OURS, Point, Row, distinct, points
from matplotlib import pyplot

BEST = ((True, "black", "ours"), (False, "C1", "best other"))
STYLES = ("-", "--", ":")  # of routings
MARKERS = "ov^s"


def picture(rows: list[Row], path: Path) -> None:
    """Of the last session."""
    found = {case: point for case, point in points(rows).items() if case[0] == rows[-1]["session"]}
    groups = list(dict.fromkeys(case[:4] for case in found))
    figure, panels = pyplot.subplots(len(groups), 3, figsize=(21, 4.6 * len(groups)), squeeze=False)
    for group, (roof, time, share) in zip(groups, panels):
        own = [point for case, point in found.items() if case[:4] == group]
        _roofline(roof, own)
        _times(time, own)
        _shares(share, own)
        roof.set_title(f"{group[3]}, {group[1]}, {group[2]}, {rows[-1]['hardware']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _roofline(panel: Any, own: list[Point]) -> None:
    intensities = [_intensity(point) for point in own]
    _roof(panel, own[0], min(intensities) / 2, max(intensities) * 2)
    for routing, marker in zip(_routings(own), MARKERS):
        for ours, color, name in BEST:
            marked = [(_intensity(p), _rate(p, p.times(ours)[0][0])) for p in own if p.first["routing"] == routing and p.times(ours)]
            if marked:
                panel.scatter(*zip(*marked), marker=marker, color=color, label=f"{name}, {routing}", s=26, alpha=0.7)
    for point, intensity in zip(own, intensities):
        best = point.times(True) or point.times(False)
        if point.first["routing"] == own[0].first["routing"] and best:
            at = (intensity, _rate(point, best[0][0]))
            panel.annotate(point.first["tokens"], at, textcoords="offset points", xytext=(4, -10), fontsize=7)
    panel.set_yscale("log")
    _finish(panel, "operations a byte", "TFLOP/s")


def _roof(panel: Any, point: Point, low: float, high: float) -> None:
    flops, bytes_ = float(point.first["flop_rate"]), float(point.first["byte_rate"])
    at = [low, min(max(flops / bytes_, low), high), high]
    panel.plot(at, [min(flops, x * bytes_) / 1e12 for x in at], color="gray", linewidth=1, label="floor")


def _times(panel: Any, own: list[Point]) -> None:
    routing = own[0].first["routing"]
    own = [point for point in own if point.first["routing"] == routing]
    tokens = [int(point.first["tokens"]) for point in own]
    panel.plot(tokens, [point.floor for point in own], color="gray", linewidth=1, label="floor")
    for peer in distinct(peer for point in own for peer, row in point.rows.items() if row["us"] and row["ok"] == "True"):
        at = [(n, float(row["us"])) for n, row in zip(tokens, (point.rows.get(peer) for point in own)) if row and _right(row)]
        mine = peer.split()[0] == OURS
        panel.plot(*zip(*at), marker=".", color="black" if mine else None, linewidth=1.6 if mine else 0.9, label=peer,
                   linestyle="-" if peer == OURS or not mine else "--")  # fmt: skip
    panel.set_yscale("log")
    _finish(panel, f"tokens ({routing})", "us")
    panel.set_xticks(tokens, map(str, tokens))
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _shares(panel: Any, own: list[Point]) -> None:
    for routing, style in zip(_routings(own), STYLES):
        for ours, color, name in BEST:
            timed = [point for point in own if point.first["routing"] == routing and point.times(ours)]
            at = [int(point.first["tokens"]) for point in timed]
            shares = [point.floor / point.times(ours)[0][0] for point in timed]
            panel.plot(at, shares, style, marker=".", color=color, label=f"{name}, {routing}")
    panel.set_ylim(0, 1.05)
    _finish(panel, "tokens", "share of the floor")
    tokens = distinct(point.first["tokens"] for point in own)
    panel.set_xticks(list(map(int, tokens)), tokens)


def _finish(panel: Any, x: str, y: str) -> None:
    panel.set_xscale("log")
    panel.xaxis.minorticks_off()
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=7)


def _right(row: Row) -> bool:
    return bool(row["us"]) and row["ok"] == "True"


def _routings(own: list[Point]) -> list[str]:
    return distinct(point.first["routing"] for point in own)


def _intensity(point: Point) -> float:
    return float(point.first["flops"]) / float(point.first["bytes"])


def _rate(point: Point, us: float) -> float:
    return float(point.first["flops"]) / us / 1e6
