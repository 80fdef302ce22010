"""Write docs/parallel.svg: what moves where under EP, EP x TP and EP x DP.

    python docs/parallel_picture.py

Standard library only. The picture brings its own background, light or dark as the reader's system asks for.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_suffix("").with_name("parallel.svg")
WIDTH, LEFT, COLUMN, GAP = 900, 96, 192, 8  # a rank's column is COLUMN wide, GAP from the next
SIDE = 26  # of a token's square

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 13px; fill: #1f2328 }
.page { fill: #ffffff } .head { font-size: 17px; font-weight: 600 } .note { fill: #57606a } .small { font-size: 12px }
.rank { fill: #f6f8fa; stroke: #d0d7de } .expert { fill: #ffffff; stroke: #57606a } .band { fill: #eaeef2; stroke: none }
.group { fill: none; stroke: #57606a; stroke-dasharray: 5 4 } .ghost { fill: none; stroke: #afb8c1; stroke-dasharray: 3 3 }
.ghost-text { fill: #8c959f } .line { fill: none; stroke: #57606a; stroke-width: 1.5 } .tip { fill: #57606a }
.sum { fill: none; stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 6 4 } .sum-text { fill: #cf222e } .sum-tip { fill: #cf222e }
.c0 { fill: #0969da } .c1 { fill: #bf5b04 } .c2 { fill: #1a7f37 } .c3 { fill: #8250df }
.l0 { stroke: #0969da } .l1 { stroke: #bf5b04 } .l2 { stroke: #1a7f37 } .l3 { stroke: #8250df }
.way { fill: none; stroke-width: 1.7 } .on { fill: #ffffff; font-weight: 600; font-size: 12px }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .note { fill: #9da7b3 } .rank { fill: #161b22; stroke: #30363d }
.expert { fill: #0d1117; stroke: #9da7b3 } .band { fill: #21262d } .group { stroke: #9da7b3 } .ghost { stroke: #57606a }
.ghost-text { fill: #6e7681 } .line { stroke: #9da7b3 } .tip { fill: #9da7b3 }
.sum { stroke: #ff7b72 } .sum-text, .sum-tip { fill: #ff7b72 }
.c0 { fill: #1f6feb } .c1 { fill: #bd561d } .c2 { fill: #238636 } .c3 { fill: #8957e5 }
.l0 { stroke: #4493f8 } .l1 { stroke: #db6d28 } .l2 { stroke: #3fb950 } .l3 { stroke: #ab7df8 } .on { fill: #ffffff }
}
"""


class Picture:
    """Elements in the order of drawing."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, kind: str, radius: float = 4) -> None:
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>')

    def path(self, d: str, kind: str, tips: str = "") -> None:
        """tips: "end", "both" or none; the markers are called after the kind's first word."""
        marks = "".join(f' marker-{at}="url(#{kind.split()[0]}-tip)"' for at in {"end": ["end"], "both": ["start", "end"]}.get(tips, []))
        self.parts.append(f'<path class="{kind}" d="{d}"{marks}/>')

    def token(self, x: float, y: float, name: str, color: int) -> None:
        """A square around (x, y)."""
        self.rect(x - SIDE / 2, y - SIDE / 2, SIDE, SIDE, f"c{color}")
        self.text(x, y + 4.5, name, "on", "middle")

    def ghost(self, x: float, y: float, name: str) -> None:
        self.rect(x - SIDE / 2, y - SIDE / 2, SIDE, SIDE, "ghost")
        self.text(x, y + 4.5, name, "ghost-text small", "middle")

    def curve(self, x0: float, y0: float, x1: float, y1: float, color: int) -> None:
        bend = (y1 - y0) * 0.55
        self.path(f"M{x0:g},{y0:g} C{x0:g},{y0 + bend:g} {x1:g},{y1 - bend:g} {x1:g},{y1:g}", f"way l{color}")

    def svg(self, height: int) -> str:
        tip = '<marker id="{0}-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        tip += '<path class="{1}" d="M0,0 L8,4 L0,8 z"/></marker>'
        markers = tip.format("line", "tip") + tip.format("sum", "sum-tip")
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        title = "<title>What moves between ranks: expert parallelism alone, with tensor parallelism, with data parallelism</title>"
        page = f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>'
        return "\n".join([head, title, f"<style>{STYLE}</style><defs>{markers}</defs>", page, *self.parts, "</svg>"]) + "\n"


def left_of(rank: int) -> float:
    return LEFT + rank * (COLUMN + GAP)


def places(rank: int, count: int, step: float = 40) -> list[float]:
    """The middles of `count` squares in a rank's column."""
    middle = left_of(rank) + COLUMN / 2
    return [middle + (i - (count - 1) / 2) * step for i in range(count)]


# ---------------------------------------------------------------- EP alone
TOKENS = {  # of four ranks, two each: the experts that the router chose
    "a1": (0, 5), "a2": (2, 3), "b1": (1, 6), "b2": (3, 4), "c1": (5, 7), "c2": (0, 2), "d1": (6, 7), "d2": (1, 4),
}  # fmt: skip
HOME = {name: "abcd".index(name[0]) for name in TOKENS}


def wanted(rank: int) -> list[str]:
    """Tokens with an expert on the rank, which has two of the eight."""
    return [name for name, experts in TOKENS.items() if any(e // 2 == rank for e in experts)]


def alone(p: Picture, y: float) -> float:
    """Returns where the next panel may start."""
    p.text(20, y + 18, "ep = 4: every rank has tokens of its own, the whole router, and a quarter of the experts", "head")
    top, sent, back, end = y + 74, y + 212, y + 288, y + 420
    for rank in range(4):
        p.rect(left_of(rank), y + 34, COLUMN, 412, "rank", 6)
        p.text(left_of(rank) + 8, y + 52, f"rank {rank}", "small note")
    at = {name: places(HOME[name], 2, 70)[int(name[1]) - 1] for name in TOKENS}
    for rank in range(4):
        arrived = wanted(rank)
        for name, x in zip(arrived, places(rank, len(arrived)), strict=True):
            p.curve(at[name], top + 32, x, sent - 15, HOME[name])
            p.curve(x, back + 15, at[name], end - 15, HOME[name])
            p.token(x, sent, name, HOME[name])
            p.token(x, back, name, HOME[name])
        for i, middle in enumerate(places(rank, 2, 84)):
            p.rect(middle - 38, (sent + back) / 2 - 13, 76, 26, "expert")
            p.text(middle, (sent + back) / 2 + 4.5, f"expert {2 * rank + i}", "small", "middle")
    for name, x in at.items():
        p.token(x, top, name, HOME[name])
        p.text(x, top + 28, f"{TOKENS[name][0]}, {TOKENS[name][1]}", "small note", "middle")
        p.token(x, end, name, HOME[name])
    for height, words in ((top, "tokens"), (top + 24, "ids"), ((top + sent) / 2 + 14, "dispatch"), ((sent + back) / 2, "experts"),
                          ((back + end) / 2, "combine"), (end, "output")):  # fmt: skip
        p.text(LEFT - 12, height + 4.5, words, "note" if words == "ids" else "", "end")
    there = "dispatch: a row, its ids and routing weights go once to each rank that has one of the token's experts (a2: one)"
    back_home = "combine: each of these ranks sends one row back, the weighted sum over its own experts; the sums are added at home"
    p.text(LEFT, y + 468, there, "note")
    p.text(LEFT, y + 487, back_home, "note")
    return y + 516


# ---------------------------------------------------------------- EP x TP
def with_tp(p: Picture, y: float) -> float:
    p.text(20, y + 18, "tp = 2 beside it: two ranks hold the same tokens, and each token is still sent once", "head")
    for half, mode in enumerate(("slice", "leader")):
        sharing(p, y + 34, half, mode)
    return y + 330


def sharing(p: Picture, y: float, half: int, mode: str) -> None:
    first, names = 2 * half, ("a1", "a2", "a3", "a4")
    x0, x1 = left_of(first), left_of(first + 1) + COLUMN
    told = {"slice": 'tp_dispatch="slice" (default)', "leader": 'tp_dispatch="leader"'}[mode]
    p.text((x0 + x1) / 2, y + 14, told, "", "middle")
    for i in range(2):
        p.rect(left_of(first + i), y + 24, COLUMN, 236, "rank", 6)
        p.text(left_of(first + i) + 8, y + 42, f"rank {i}", "small note")
    mine = [names[:2], names[2:]] if mode == "slice" else [names, ()]
    for i in range(2):
        for name, x in zip(names, places(first + i, 4), strict=True):
            (p.token(x, y + 66, name, 0) if name in mine[i] else p.ghost(x, y + 66, name))
            if name in mine[i]:
                p.path(f"M{x:g},{y + 82:g} L{x:g},{y + 102:g}", "line", "end")
                p.path(f"M{x:g},{y + 136:g} L{x:g},{y + 156:g}", "line", "end")
                p.token(x, y + 172, name, 0)
            p.token(x, y + 236, name, 0)
    p.rect(x0 + 10, y + 106, x1 - x0 - 20, 28, "band")
    p.text((x0 + x1) / 2, y + 124, "dispatch, experts, combine over the ep group", "small", "middle")
    starts, ends = [places(first, 4), places(first + 1, 4)], y + 220
    if mode == "slice":
        for i in range(2):
            for j in range(2):
                source = (starts[i][2 * i] + starts[i][2 * i + 1]) / 2
                target = (starts[j][2 * i] + starts[j][2 * i + 1]) / 2
                p.path(f"M{source:g},{y + 188:g} L{target:g},{ends:g}", "line", "end")
    else:
        for j in range(2):
            p.path(f"M{sum(starts[0]) / 4:g},{y + 188:g} L{sum(starts[j]) / 4:g},{ends:g}", "line", "end")
    words = {"slice": "all-gather in the tp group", "leader": "broadcast in the tp group"}[mode]
    p.text((x0 + x1) / 2, y + 280, words, "note", "middle")
    if half == 0:
        for height, word in ((66, "tokens"), (172, "sums"), (236, "output")):
            p.text(LEFT - 12, y + height + 4.5, word, "", "end")


# ---------------------------------------------------------------- EP x DP
def with_dp(p: Picture, y: float) -> float:
    p.text(20, y + 18, "ep = 2 and dp = 2: two ep groups hold all experts each; rows stay inside, gradients meet", "head")
    for rank in range(4):
        x = left_of(rank)
        p.rect(x + 8, y + 60, COLUMN - 16, 104, "rank", 6)
        p.text(x + 18, y + 80, f"rank {rank}", "small note")
        for i, middle in enumerate(places(rank, 2)):
            p.token(middle, y + 100, f"{'abcd'[rank]}{i + 1}", rank)
        p.rect(x + 24, y + 126, COLUMN - 48, 26, "expert")
        p.text(x + COLUMN / 2, y + 143.5, f"experts {'0 to 3' if rank % 2 == 0 else '4 to 7'}", "small", "middle")
    for group in range(2):
        x0, x1 = left_of(2 * group), left_of(2 * group + 1) + COLUMN
        p.rect(x0, y + 34, x1 - x0, 140, "group", 8)
        p.text(x0 + 12, y + 51, f"ep group {group}", "small note")
        p.path(f"M{x0 + COLUMN - 28:g},{y + 100:g} L{x0 + COLUMN + GAP + 28:g},{y + 100:g}", "line", "both")
        p.text((x0 + x1) / 2, y + 90, "rows", "small note", "middle")
    for first in range(2):
        a, b, low = left_of(first) + COLUMN / 2, left_of(first + 2) + COLUMN / 2, y + 188 + 18 * first
        p.path(f"M{a:g},{y + 154:g} L{a:g},{low:g} L{b:g},{low:g} L{b:g},{y + 156:g}", "sum", "both")
    middle = (left_of(1) + left_of(2) + COLUMN) / 2
    p.text(middle, y + 224, "gradients of the same experts: summed over replica_group", "small sum-text", "middle")
    p.rect(LEFT, y + 238, left_of(3) + COLUMN - LEFT, 30, "band")
    whole = "router, attention, embeddings: whole on every rank; DDP or FSDP2 averages their gradients over all ranks"
    p.text(middle, y + 257.5, whole, "", "middle")
    return y + 286


def draw() -> str:
    p = Picture()
    y = alone(p, 14)
    y = with_tp(p, y)
    y = with_dp(p, y)
    return p.svg(int(y))


if __name__ == "__main__":
    TARGET.write_text(draw())
    print(f"wrote {TARGET}")
