"""docs/reliability.md: each section lies between two comments and is written by its own command; the others stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- name -->` and `<!-- end of name -->`."""
    before = page.read_text()
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if not re.search(rf"{re.escape(first)}.*{re.escape(last)}", before, re.DOTALL):
        raise ValueError(f"{page} has no section {name!r}: it lies between the lines {first} and {last}")
    page.write_text(before[: before.index(first) + len(first)] + f"\n{text}\n" + before[before.index(last) :])


def markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table whose first column is text, and whose others are numbers."""
    lines = [head, tuple("---" if n == 0 else "---:" for n in range(len(head))), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
