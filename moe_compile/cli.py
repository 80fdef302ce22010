"""The command `moe-compile`, also `python -m moe_compile`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for what was said to be wrong, 2 for wrong arguments, 130 after Ctrl-C."""
    from moe_compile import tuning_command

    parser = argparse.ArgumentParser(prog="moe-compile", description="Mixture-of-Experts layers made fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    tune = commands.add_parser("tune", help="measure the tiles of the Triton kernels for your layers", description=tuning_command.__doc__)
    tuning_command.add_arguments(tune)
    args = parser.parse_args(argv)
    try:
        return tuning_command.run(args)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
