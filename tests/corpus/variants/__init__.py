"""Own near-variants of naive MoE layers, one file a family.  VARIANTS: name -> Variant, in file order."""

from corpus.variants import capacity, dense, dispatched, experts, gathered, masked, outside, precision, routers, sorted_groups, wild
from corpus.variants.base import VARIANTS, Variant

FAMILIES = (masked, dense, gathered, sorted_groups, routers, experts, outside, precision, wild, capacity, dispatched)

__all__ = ["FAMILIES", "VARIANTS", "Variant"]
