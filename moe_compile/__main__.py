"""python -m moe_compile: the command `moe-compile`."""

import sys

from moe_compile.cli import main

if __name__ == "__main__":  # not in a process that was spawned to compile
    sys.exit(main())
