"""All mutants: FAMILIES x the mutations that apply, and how to build and feed one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mutations import capacity, loops, probed, sorted_rows, vectorised
from mutations.base import GRADIENT_ONLY, ROUNDING, SAME, E, Family, H, T

FAMILIES: dict[str, type[Family]] = {
    "masked_list": loops.MaskedList,
    "masked_stack": loops.MaskedStack,
    "slot_preserving": loops.SlotPreserving,
    "dense_loop": loops.DenseLoop,
    "sort_split": sorted_rows.SortSplit,
    "sliced_groups": sorted_rows.SlicedGroups,
    "titan_like": sorted_rows.TitanLike,
    "grouped": sorted_rows.Grouped,
    "grouped_bf16": sorted_rows.GroupedBf16,
    "gather_bmm": vectorised.GatherBmm,
    "gather_einsum": vectorised.GatherEinsum,
    "dense_einsum": vectorised.DenseEinsum,
    "dense_bmm": vectorised.DenseBmm,
    "input_weighted": vectorised.InputWeighted,
    "capacity_top_k": capacity.CapacityTopK,
    "capacity_slots": capacity.CapacitySlots,
    "capacity_top_1": capacity.CapacityTop1,
    "capacity_masks": capacity.CapacityMasks,
    "capacity_choices": capacity.CapacityChoices,
    "capacity_rows": capacity.CapacityFirstRows,
    "slot_scatter": loops.SlotScatter,
    "identities": loops.Identities,
    "hit_list": probed.HitList,
    "skipped_rows": probed.SkippedRows,
    "counted_rows": probed.CountedRows,
}

# Equal to the original although the mutation is on: an overwrite repeated, a buffer wholly overwritten; what a mask or the buffer's end
# takes away again, and counts of so few tokens that no small integer overflows.
ALSO_SAME = {
    ("slot_preserving", "expert_twice"),
    ("slot_preserving", "buffer_ones"),
    ("slot_scatter", "expert_twice"),
    ("slot_scatter", "buffer_ones"),
    ("capacity_top_k", "positions_unmasked"),
    *((f"capacity_{each}", same) for each in ("top_k", "slots", "top_1") for same in capacity.SAME),
    *(("capacity_choices", same) for same in capacity.CapacityChoices.same),
    *(("capacity_rows", same) for same in ("counts_exclusive", "counts_in_uint8")),
}

ROUTINGS = ("random", "two_experts", "empty_expert")


def mutants() -> Iterator[tuple[str, str]]:
    """(family, mutation) of every mutant."""
    for name, family in FAMILIES.items():
        for mutation in family.mutations():
            yield name, mutation


def build(family: str, mutation: str | None) -> Family:
    """The seeded module in training mode: equal parameters for every mutation of a family."""
    torch.manual_seed(0)
    module = FAMILIES[family](mutation)
    for p in module.parameters():
        nn.init.normal_(p, std=0.35 if p.dim() > 1 else 0.3)
    module.register_buffer("usual_bias", module.gate.bias.detach().clone())
    return module.to(module.dtype).train()


def inputs(family: str, seed: int, tokens: int = T) -> Tensor:
    """Fresh tokens [tokens / 2, 2, H]."""
    x = torch.randn(tokens // 2, 2, H, generator=torch.Generator().manual_seed(seed))
    return x.to(FAMILIES[family].dtype)


def set_routing(model: nn.Module, routing: str) -> None:
    """All tokens to experts 2 and 0 (`two_experts`), none to expert 1 (`empty_expert`), or as routed."""
    push = {"two_experts": {2: 8.0, 0: 6.0}, "empty_expert": {1: -40.0}}.get(routing, {})
    for module in model.modules():
        if isinstance(module, Family):
            bias = module.usual_bias.clone()
            for e, value in push.items():
                bias[e] += value
            module.gate.bias.data.copy_(bias)


def same_meaning(family: str, mutation: str) -> bool:
    """Whether the mutant computes what the original computes, gradients included."""
    return mutation in SAME or (family, mutation) in ALSO_SAME


__all__ = [
    "FAMILIES",
    "GRADIENT_ONLY",
    "ROUNDING",
    "ROUTINGS",
    "SAME",
    "E",
    "build",
    "inputs",
    "mutants",
    "same_meaning",
]
