"""A failing block made as simple as it can be and still fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fuzz.draw import edits
from fuzz.judge import Verdict, judge
from fuzz.mistakes import mistakes
from fuzz.routers import fits
from fuzz.spec import PLAIN, Spec

SIMPLE = Spec()
ORDER = (
    "edit", "extra", "returned", "batched", "training", "biases", "act", "body", "weighted", "router", "skip", "add", "select", "storage",
    "head", "grad", "dynamic", "first", "tokens", "inner", "experts", "top_k", "mistake",
)  # fmt: skip


def shrunk(found: Verdict, verdict: Callable[[Spec], Verdict] = judge) -> Verdict:
    """Each part replaced by the simplest of its kind while the status stays."""
    while True:
        for field in ORDER:
            simpler = dataclasses.replace(found.spec, **{field: getattr(SIMPLE, field)})
            if simpler != found.spec and _possible(simpler) and (now := verdict(simpler)).status == found.status:
                found = now
                break
        else:
            return found


def _possible(s: Spec) -> bool:
    """Is it a block of the grammar?"""
    return fits(s) and s.edit in edits(s) and s.mistake in mistakes(dataclasses.replace(s, mistake=PLAIN))
