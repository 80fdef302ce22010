"""Verdicts counted: by spelling and mistake, and refusals by reason, as text and as a section of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from reliability import markdown

from fuzz.judge import BAD, Verdict, kind_of
from fuzz.spec import PLAIN

STATUSES = ("rewritten", "refused", *BAD)
Row = tuple[str, ...]


def counted(found: list[Verdict], key: Callable[[Verdict], str]) -> list[Row]:
    """One row a key: tried, and how many of each status."""
    rows = []
    for name in sorted({key(v) for v in found}):
        statuses = Counter(v.status for v in found if key(v) == name)
        rows.append((name, str(statuses.total()), *(str(statuses[s]) for s in STATUSES)))
    return rows


def kind(v: Verdict) -> str:
    return "as it should be" if v.spec.mistake == PLAIN else "with a mistake"


def spelling(v: Verdict) -> str:
    s = v.spec
    return f"loop: {s.head}" if s.spelling == "loop" else s.spelling


def summary(found: list[Verdict]) -> list[Row]:
    statuses = Counter(v.status for v in found)
    return [*counted(found, kind), ("all", str(len(found)), *(str(statuses[s]) for s in STATUSES))]


def reasons(found: Iterable[Verdict]) -> list[tuple[str, int]]:
    return Counter(kind_of(v.reason) for v in found if v.status == "refused").most_common()


def bad_ones(found: list[Verdict]) -> list[Verdict]:
    """One of each kind of failure."""
    kinds = {(v.status, v.spec.mistake, v.spec.spelling, v.reason.partition(":")[2][:60]): v for v in found if v.bad}
    return list(kinds.values())


def text(found: list[Verdict]) -> str:
    head = ("", "tried", *STATUSES)
    tables = (summary(found), counted(found, spelling), counted(found, lambda v: v.spec.mistake))
    parts = [_columns(head, rows) for rows in tables]
    for title in ("as it should be", "with a mistake"):
        listed = reasons(v for v in found if kind(v) == title)
        parts.append("\n".join([f"refused, {title}:", *(f"{n:6d}  {why}" for why, n in listed)]))
    return "\n\n".join(parts)


def _columns(head: Row, rows: list[Row]) -> str:
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:{width}s}  " + " ".join(f"{cell:>9s}" for cell in row[1:]) for row in (head, *rows))


def section(found: list[Verdict], command: str) -> str:
    """The page's section."""
    head = ("", "tried", "rewritten", "refused", "wrong", "crashed", "invalid")
    plain = [v for v in found if v.spec.mistake == PLAIN]
    return "\n\n".join([
        f"Written by `{command} --write docs/reliability.md`, with torch {torch.__version__.partition('+')[0]}.",
        markdown(head, summary(found)),
        "By spelling, without a mistake:",
        markdown(head, counted(plain, spelling)),
        "Why blocks without a mistake were refused:",
        markdown(("reason", "blocks"), [(why, str(n)) for why, n in reasons(plain)]),
    ])  # fmt: skip
