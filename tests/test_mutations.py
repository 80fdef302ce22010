"""Each mutant compiles to its own meaning or stays as it is; by default a sample.

All of them, with the table of kills: python tests/mutations/table.py
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict

import pytest
from corpus.harness import Seen, distance, error, observe, worst
from mutations.base import EXPERT, GRADIENT_ONLY, ROUNDING, ROUTER
from mutations.catalogue import FAMILIES, ROUTINGS, build, inputs, mutants, same_meaning, set_routing
from mutations.judge import judge


def sample(each: int = 1) -> list[tuple[str, str]]:
    """Each mutation in `each` styles, the styles taken in turn."""
    styles = defaultdict(list)
    for family, mutation in mutants():
        styles[mutation].append(family)
    chosen = []
    for turn, (mutation, families) in enumerate(styles.items()):
        for n in range(min(each, len(families))):
            chosen.append((families[(turn + n * (len(families) // 2 or 1)) % len(families)], mutation))
    return list(dict.fromkeys(chosen))


CHOSEN = list(mutants()) if os.environ.get("MOE_COMPILE_MUTANTS") == "all" else sample()
IDS = [f"{family}-{mutation}" for family, mutation in CHOSEN]


@pytest.mark.parametrize("family", FAMILIES)
def test_original_is_rewritten(family):
    verdict = judge(family, None)
    assert verdict.status == "rewritten", verdict


@pytest.mark.parametrize(("family", "mutation"), CHOSEN, ids=IDS)
def test_mutant_means_itself(family, mutation):
    verdict = judge(family, mutation)
    assert verdict.status in ("rewritten", "refused"), verdict


# What one layer may hide in the next: the same nodes with other constants, orders, weights or gradients.
SECOND = [
    ("masked_list", "act_all"),
    ("masked_list", "down_rotated"),
    ("masked_stack", "scale_by_index"),
    ("slot_preserving", "halves_swapped"),
    ("sort_split", "weight_detached"),
    ("sliced_groups", "clamp_all"),
    ("grouped", "transposed_all"),
    ("grouped", "scale_inside"),
    ("gather_bmm", "bias_dropped_all"),
    ("gather_einsum", "up_plus_one"),
    ("dense_bmm", "x_detached"),
    ("dense_einsum", "residual_inside"),
    ("input_weighted", "weighted_twice"),
]


@pytest.mark.parametrize(("family", "mutation"), SECOND, ids=[f"{f}-{m}" for f, m in SECOND])
def test_second_layer_is_not_taken_for_the_first(family, mutation):
    """Equal layers are analysed once; this one only looks equal."""
    verdict = judge(family, mutation, second_layer=True)
    assert verdict.status in ("rewritten", "refused"), verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mutant_differs_from_its_original(family):
    """The suite itself: a mutation that changes nothing kills nothing."""
    alike = [m for m in FAMILIES[family].mutations() if not _differs(family, m)]
    assert not alike


@functools.lru_cache(maxsize=len(ROUTINGS) + 1)
def original(family: str, routing: str) -> Seen:
    return eager(family, None, routing)


def eager(family: str, mutation: str | None, routing: str) -> Seen:
    module = build(family, mutation)
    set_routing(module, routing)
    return observe(module, module, inputs(family, 20), grad=True)


def _differs(family: str, mutation: str) -> bool:
    values, anything, rms = 0.0, 0.0, 0.0
    for routing in ROUTINGS:
        got, want = eager(family, mutation, routing), original(family, routing)
        values = max([values, *map(error, got.outputs, want.outputs)])
        anything, rms = max(anything, worst(got, want)[0]), max(rms, distance(got, want))
    if same_meaning(family, mutation):
        return anything < (2e-2 if "bf16" in family else 1e-4)
    if mutation in GRADIENT_ONLY:
        return values == 0.0 and anything > 1e-3
    return rms > 1e-6 if mutation in ROUNDING else values > 1e-2


def test_sample_shows_every_mutation():
    shown = {mutation for _, mutation in sample()}
    assert shown == {mutation for _, mutation in mutants()}
    assert shown >= {*ROUTER, *EXPERT}
