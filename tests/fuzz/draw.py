"""Hypothesis draws specs: simple things first, so that it shrinks to them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz import loops, styles
from fuzz.experts import ACTS, BODIES, STORAGES
from fuzz.mistakes import SETTINGS, mistakes
from fuzz.routers import ROUTERS, fits
from fuzz.source import EXTRAS, RETURNED
from fuzz.spec import PLAIN, Spec

SPELLINGS = ("loop", "slot_buffer", *styles.SORTED, *styles.GATHERED, *styles.DENSE, "capacity", "tokens", "groups")
LOOPS = 10  # how often a loop is drawn for each other spelling twice
OFTEN = ("loop",) * LOOPS + tuple(n for n in SPELLINGS[1:] if n not in ("tokens", "groups")) + ("tokens", "groups")
EDITS = ("none", "none", "none", "none", "in_place", "replaced", "other_mode", "top_k")
SHAPES_OF_IDS = ("where", "nonzero", "nonzero_tuple", "any_rows", "mask", "mask_weights", "dense")


MANY = 10  # drawn together: hypothesis goes on with variants of what it has drawn, which then are the same blocks again


@dataclass(frozen=True)
class Sizes:
    """What calls and compilations cost: numbers of experts, dynamic, tokens of the first call and of the next ones."""

    experts: tuple[int, ...] = (3, 4, 2, 3)
    dynamic: tuple[bool, ...] = (True, True, True, True, True, False)
    first: tuple[int, ...] = (5, 7, 4, 2, 1)
    tokens: tuple[tuple[int, ...], ...] = ((5, 6, 7), (7, 12, 1, 6))


ALL, CHEAP = Sizes(), Sizes((2, 2, 3), (True,), (5, 7, 2), ((5, 6, 7), (7, 6)))


def drawn(count: int, start: int = 0, sizes: Sizes = ALL) -> list[Spec]:
    """That many different blocks, always the same ones for the same arguments."""
    found: dict[Spec, None] = {}

    @seed(start)
    @settings(max_examples=count // 2 + 10, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.lists(specs(sizes), min_size=MANY, max_size=MANY))
    def collect(several: list[Spec]) -> None:
        found.update(dict.fromkeys(several))

    collect()
    if len(found) < count:
        raise ValueError(f"{count} examples were asked for, and hypothesis draws {len(found)} different ones: ask for fewer")
    return random.Random(start).sample(list(found), count)


@st.composite
def specs(draw: Any, sizes: Sizes = ALL) -> Spec:
    """Any block of the grammar."""

    def pick(options: Iterable[Any]) -> Any:
        return draw(st.sampled_from(list(options)))

    f: dict[str, Any] = {"spelling": pick(OFTEN), "experts": pick(sizes.experts), "top_k": pick((2, 1))}
    f["router"] = pick(n for n in ROUTERS if fits(Spec(router=n, **f)))
    f.update(storage=pick(STORAGES), body=pick(BODIES), act=pick(ACTS), biases=draw(st.booleans()), inner=pick((8, 12)))
    f.update(_loop(pick) if f["spelling"] == "loop" else _skip(f["spelling"], pick))
    f["extra"] = pick(_extras(Spec(**f)))
    f.update(returned=pick(_returned(f["extra"])), batched=draw(st.booleans()), training=draw(st.booleans()))
    f.update(grad=pick((True, True, False)), dynamic=pick(sizes.dynamic))
    f.update(first=pick(sizes.first), tokens=tuple(pick(t) for t in sizes.tokens))
    f["mistake"] = pick(mistakes(Spec(**f))) if pick((False, True, True)) else PLAIN
    return Spec(**f, edit=pick(edits(Spec(**f))))


def edits(s: Spec) -> list[str]:
    """What may be changed after the compilation."""
    settings = s.router in ("scaled", "temperature") or s.mistake in SETTINGS
    fixed = s.router == "argmax_twice" or s.mistake == "ids_of_first_call"  # another number of slots is no block any more
    return [*(e for e in EDITS if e != "top_k" or not fixed), *(["settings"] * 3 if settings else [])]


def _loop(pick: Any) -> dict[str, Any]:
    f = {"head": pick(loops.HEADS)}
    f["select"] = "where" if f["head"] == "slots" else pick(loops.SELECTS)
    by_mask, dense = f["select"] in loops.MASKS, f["select"] in loops.DENSE
    often = ("never",) * 3 if f["head"] in loops.SKIPPING else ()
    f["skip"] = pick([*often, *(loops.OF_MASK if by_mask or dense else loops.SKIPS)])
    f["add"] = "index_add_" if dense else pick(loops.ADD_MASKS if by_mask else loops.ADDS)
    return {**f, "weighted": pick(("after", "after", "after", "before"))}


def _skip(spelling: str, pick: Any) -> dict[str, Any]:
    if spelling in ("slot_buffer", "groups"):
        return {"skip": pick(("never", "any", "sum"))}
    return {"skip": pick(("never", "any"))} if spelling in styles.SORTED else {}


def _extras(s: Spec) -> list[str]:
    """Ids without an expert where the spelling has a meaning for them."""
    marked = s.spelling == "loop" and s.select in SHAPES_OF_IDS and s.head in ("range", "slots")
    return [n for n in EXTRAS if marked or n not in ("beyond", "below")]


def _returned(extra: str) -> list[str]:
    return [n for n in RETURNED if n != "loss" or extra not in ("beyond", "below")]
