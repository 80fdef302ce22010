"""Every mutant, compiled and judged: python tests/mutations/table.py [--family NAME] [--mutation NAME]

Prints one row a mutation and one column a style (R rewritten as itself, - refused, W wrong, C crash, blank
does not apply), then the counts and what went wrong.  --write docs/reliability.md also writes that page's section.
Exit status 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reliability import markdown, write_section

from mutations.catalogue import FAMILIES, mutants
from mutations.judge import Verdict, judge

LETTER = {"rewritten": "R", "refused": "-", "WRONG": "W", "CRASH": "C"}


def verdicts(families: list[str], only: list[str], **judge_kwargs: Any) -> list[Verdict]:
    found = []
    for family, mutation in [(f, None) for f in FAMILIES] + list(mutants()):
        if family in families and (not only or mutation in only):
            found.append(judge(family, mutation, **judge_kwargs))
            print(f"\r{len(found)} {found[-1].name:50s} {found[-1].status}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def table(found: list[Verdict]) -> str:
    families = [f for f in FAMILIES if any(v.family == f for v in found)]
    cells = {(v.family, v.mutation): LETTER[v.status] for v in found}
    rows = list(dict.fromkeys(v.mutation for v in found))
    lines = [f"{'':24s}" + " ".join(f"{f[:13]:13s}" for f in families)]
    for m in rows:
        lines.append(f"{m or 'original':24s}" + " ".join(f"{cells.get((f, m), ''):13s}" for f in families))
    return "\n".join(line.rstrip() for line in lines)


def summary(found: list[Verdict]) -> str:
    changed = [v for v in found if v.mutation is not None]
    counts = Counter(v.status for v in changed)
    text = ", ".join(f"{counts[s]} {s}" for s in LETTER)
    lines = [f"{len(changed)} mutants of {len({v.family for v in found})} styles: {text}"]
    for v in found:
        if v.status in ("WRONG", "CRASH"):
            lines.append(f"{v.status} {v.name}: error {v.error:.1e} in {v.of} {v.reason}")
    quiet = [v.name for v in found if v.none_grads]
    if quiet:
        lines.append(f"gradient None on one side only ({len(quiet)}): {', '.join(quiet[:20])}")
    return "\n".join(lines)


def section(found: list[Verdict]) -> str:
    """The page's section: a row for each style."""
    changed = [v for v in found if v.mutation is not None]
    styles = {f: [v for v in changed if v.family == f] for f in FAMILIES}
    rows = [_row(f, mutants) for f, mutants in styles.items() if mutants]
    head = ("style", "mutants", "rewritten", "refused", "wrong", "crashed")
    return "Written by `python tests/mutations/table.py --write docs/reliability.md`.\n\n" + markdown(head, [*rows, _row("all", changed)])


def _row(name: str, found: list[Verdict]) -> tuple[str, ...]:
    counts = Counter(v.status for v in found)
    return (name, str(len(found)), *(str(counts[s]) for s in LETTER))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--mutation", action="append", default=[])
    parser.add_argument("--validate", default="auto", choices=["auto", "always", "off"])
    parser.add_argument("--reasons", action="store_true", help="also print why each refused mutant was refused")
    parser.add_argument("--second-layer", action="store_true", help="each mutant as the layer after its original")
    parser.add_argument("--dynamic", action="store_true", help="compile with dynamic=True")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the section of this page; for all styles and mutations")
    args = parser.parse_args()
    if args.write and (args.family or args.mutation):
        parser.error("--write is for all styles and mutations: leave out --family and --mutation")
    settings = {"validate": args.validate, "second_layer": args.second_layer, "dynamic": args.dynamic or None}
    found = verdicts(args.family or list(FAMILIES), args.mutation, **settings)
    print(table(found), summary(found), sep="\n\n")
    if args.reasons:
        print("\n".join(f"{v.name}: {v.reason}" for v in found if v.status == "refused"))
    if args.write:
        write_section(args.write, "mutations", section(found))
    return int(any(v.status in ("WRONG", "CRASH") for v in found))


if __name__ == "__main__":
    sys.exit(main())
