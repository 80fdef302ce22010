"""Where an expert's parameters are: text layouts over the op's flat tensor lists, used in place, never stacked.

"eio" | "eoi" | "eo"            one tensor with a leading expert dimension
"io*8" | "oi*8" | "o*8"         one tensor an expert
"eoi:fp8_block" | "eio:int8"    quantised weights (quantized.py has the kinds): two tensors, values and scales
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .quantized import KINDS, ROWS_TOO, Quantized, check, dequantize_expert

_LAYOUT = re.compile(rf"(?:(e)(io|oi|o)|(io|oi|o)\*(\d+)|(e)(io|oi):({'|'.join(KINDS)}))")


class Slot(NamedTuple):
    """One parameter of a layout: tensors[first : first + num] hold it for all experts.

    stacked: one tensor with a leading expert dimension, else one tensor an expert. axes: "io", "oi" or "o". kind: of quantised
    weights, whose two tensors are values and scales.
    """

    stacked: bool
    axes: str
    first: int
    num: int
    kind: str = ""


@functools.lru_cache(maxsize=256)
def parse_layout(text: str) -> tuple[Slot, ...]:
    """Slots of a layout's entries, which commas separate."""
    slots: list[Slot] = []
    first = 0
    for entry in text.split(",") if text else []:
        match = _LAYOUT.fullmatch(entry.strip())
        if match is None:
            raise ValueError(
                f"layout {text!r}: {entry!r} is none of eio, eoi, eo, io*N, oi*N, o*N, eio:KIND, eoi:KIND ({', '.join(KINDS)})"
            )
        stacked, axes, kind = match[3] is None, match[2] or match[3] or match[6], match[7] or ""
        count = 2 if kind else 1 if stacked else int(match[4])
        slots.append(Slot(stacked, axes, first, count, kind))
        first += count
    return tuple(slots)


def quantised(layout: str) -> bool:
    """Has a layout quantised weights?"""
    return ":" in layout


def quantises_rows(layout: str) -> bool:
    """Do all weights ask for quantised rows?"""
    return all(slot.kind in ROWS_TOO for slot in parse_layout(layout))


class Params:
    """Weights or biases of all experts: `of(j, e)` is a view [in, out] (or [out]) of the caller's tensors; of quantised ones a copy.

    Raises ValueError if the layout and the tensors do not fit, or an expert dimension is not num_experts.
    """

    def __init__(self, tensors: Sequence[Any], layout: str, num_experts: int, name: str) -> None:
        self.tensors = tensors
        self.slots = parse_layout(layout)
        self._check(layout, num_experts, name)

    def _check(self, layout: str, num_experts: int, name: str) -> None:
        wanted = sum(slot.num for slot in self.slots)
        if wanted != len(self.tensors):
            raise ValueError(f"{name} layout {layout!r} describes {wanted} tensors, got {len(self.tensors)}")
        for j, slot in enumerate(self.slots):
            tensor = self.tensors[slot.first]
            own = self.quantized(j)
            if own is not None:
                check(own, f"{name} {j}")
            experts = tensor.shape[0] if slot.stacked else slot.num
            if (tensor.dim() != slot.stacked + len(slot.axes) and own is None) or experts != num_experts:
                raise ValueError(
                    f"{name} layout {layout!r} with {num_experts} experts does not fit a tensor of shape "
                    f"{tuple(tensor.shape)} (entry {slot.axes!r}, {experts} experts)"
                )

    def of(self, j: int, expert: int) -> Any:
        """Parameter j of an expert: a view, [in, out] for a weight and [out] for a bias; a quantised one as new float32."""
        own = self.quantized(j)
        if own is None:
            return view(self.slots[j], self.tensors, expert)
        weight = dequantize_expert(own, expert)
        return weight.t() if own.axes == "oi" else weight

    def all(self, j: int, transposed: bool = False) -> list[Any]:
        """`of(j, e)` for every expert (or its transpose [out, in])."""
        own = self.quantized(j)
        if own is None:
            return views(self.slots[j], self.tensors, transposed)
        weights = [self.of(j, expert) for expert in range(own.experts)]
        return [weight.t() for weight in weights] if transposed else weights

    def fan(self, j: int) -> tuple[Any, Any]:
        """(in, out) of weight j."""
        own = self.quantized(j)
        if own is not None:
            return own.fan
        axes, shape = self.slots[j].axes, self.tensors[self.slots[j].first].shape
        return (shape[-2], shape[-1]) if axes == "io" else (shape[-1], shape[-2])

    def quantized(self, j: int) -> Quantized | None:
        """Weight j where it is quantised."""
        slot = self.slots[j]
        return Quantized(self.tensors[slot.first], self.tensors[slot.first + 1], slot.kind, slot.axes) if slot.kind else None

    def first(self, j: int) -> Any:
        """The tensor that tells parameter j's dtype and width."""
        return self.tensors[self.slots[j].first]

    def firsts(self) -> list[Any]:
        return [self.tensors[slot.first] for slot in self.slots]


def view(slot: Slot, tensors: Sequence[Any], expert: int) -> Any:
    """An expert's part of a slot as [in, out] or [out]; None where the tensor stands in for no gradient."""
    tensor = tensors[slot.first if slot.stacked else slot.first + expert]
    if _is_stand_in(tensor):
        return None
    tensor = tensor.select(0, expert) if slot.stacked else tensor
    return tensor.t() if slot.axes == "oi" else tensor


def views(slot: Slot, tensors: Sequence[Any], transposed: bool = False) -> list[Any]:
    """view() for every expert, or its transpose: two calls for a stacked tensor. [] for a stand-in."""
    own = tensors[slot.first : slot.first + slot.num]
    if slot.stacked and _is_stand_in(own[0]):
        return []
    if slot.axes != "o" and (slot.axes == "oi") != transposed:
        own = [tensor if _is_stand_in(tensor) else tensor.transpose(-2, -1) for tensor in own]
    return list(own[0].unbind(0)) if slot.stacked else [None if _is_stand_in(tensor) else tensor for tensor in own]


def _is_stand_in(tensor: Any) -> bool:
    """experts.empty_grads gives an empty vector for a parameter that needs no gradient."""
    return bool(tensor.dim() == 1 and tensor.numel() == 0)
