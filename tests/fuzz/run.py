"""Random MoE blocks, compiled and compared with themselves: python tests/fuzz/run.py [--examples 2000] [--seed 0] [--jobs 2]

Prints how many were rewritten, refused (and why), wrong or crashed, by spelling, with a mistake and without.  What is wrong or crashes is
made as simple as it can be, and its source printed.  --write docs/reliability.md also writes that page's section.  Exit status 1 if
anything was wrong or crashed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reliability import write_section

from fuzz.draw import drawn
from fuzz.judge import Verdict, judge
from fuzz.shrink import shrunk
from fuzz.spec import Spec
from fuzz.table import bad_ones, section, text

LIMIT = 600  # seconds for one example: then its process is taken for dead


def judged(specs: list[Spec], jobs: int) -> Iterator[Verdict]:
    """Verdicts as they come, from processes that are replaced now and then: compiled code is never freed."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_quiet, maxtasksperchild=200) as pool:
        found = pool.imap_unordered(judge, specs)
        for _ in specs:
            yield found.next(LIMIT)


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the section of this page")
    parser.add_argument("--verbose", action="store_true", help="a line for each block")
    args = parser.parse_args()
    found = []
    for verdict in judged(drawn(args.examples, args.seed), args.jobs):
        found.append(verdict)
        print(f"\r{len(found)} of {args.examples}", end="", file=sys.stderr, flush=True)
        if args.verbose or verdict.bad:
            print(f"\n{verdict.status} {verdict.spec} {verdict.reason}", flush=True)
    print(file=sys.stderr)
    print(text(found))
    _quiet()
    for verdict in bad_ones(found):
        print(f"\n{'-' * 100}\n{shrunk(verdict)}", flush=True)
    if args.write:
        command = f"python tests/fuzz/run.py --examples {args.examples} --seed {args.seed}"
        write_section(args.write, "fuzz", section(found, command))
    return int(any(v.bad for v in found))


if __name__ == "__main__":
    sys.exit(main())
