"""Keeps a graph for any number of tokens to those for which its exchange was chosen, so that decode and prefill have a graph each."""

from __future__ import annotations

import torch

from .decisions import tensor_of
from .region import MoERegion
from .select import ENDLESS, Choice


def keep_to_sizes(region: MoERegion, choice: Choice) -> None:
    """Guards on the number of tokens, where it is open: another number compiles anew. Ranks have the same number (Choice.sizes)."""
    ids = tensor_of(region.decision.ids)
    slots = ids.numel() if ids is not None else None
    if choice.sizes is None or not isinstance(slots, torch.SymInt) or not slots.node.has_hint():
        return
    above, below = choice.sizes
    if above >= 0:
        _guard(slots > above * region.formula.top_k)
    if below < ENDLESS:
        _guard(slots < below * region.formula.top_k)


def _guard(held: bool | torch.SymBool) -> None:
    """Asking for the truth of a symbolic comparison is what makes it a guard."""
    if not held:
        raise AssertionError("a graph was made for a number of tokens outside of its own range")
