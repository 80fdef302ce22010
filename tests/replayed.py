"""What tests of replayed calls ask of ops/replay.py."""

from __future__ import annotations

from moe_compile.ops import replay


def recorded() -> int:
    """How many calls are known that will be replayed."""
    return sum(isinstance(each, replay.Recipe) for each in replay._calls.values())
