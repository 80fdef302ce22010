"""Weights that `quant="fp8"` keeps in quantised form beside the model's own, and how they stay up to date.

A graph reads its quantised weights as buffers. Before each call the tensors that they were made of are compared with those of the call, by
identity and version; one that was replaced, or written in place, is quantised anew into the same memory, so that CUDA graphs see it.
Graphs of the same weights (decode and prefill, say) share one copy, which is gone with the last of them.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule

from moe_compile.ops.quantized import Quantized, dequantize_expert, quantize_each

META = "moe_compile_quantised"
Make = Callable[[Sequence[Any]], list[Any]]  # the tensors that a weight is computed from -> each expert's [O, I] in a float type


class Held:
    """One quantised weight [E, O, I]: what it was made of, its memory, and the relative error (root mean square) of its values."""

    def __init__(self, leaves: Sequence[Any], text: str, make: Make, kind: str) -> None:
        self._make, self._text, self._kind = make, text, kind
        self._lock = threading.Lock()
        experts = make(leaves)
        self.weight = quantize_each(experts, kind)
        self.error = relative_error(experts, self.weight)
        self._remember(leaves)

    def refresh(self, leaves: Sequence[Any]) -> None:
        """Quantises anew if the tensors are others than before, or have other values."""
        if self._known(leaves):
            return
        with self._lock, torch.no_grad():
            new = quantize_each(self._make(leaves), self._kind)
            if new.values.shape != self.weight.values.shape or new.values.device != self.weight.values.device:
                raise RuntimeError(
                    f"a weight that was compiled as {list(self.weight.values.shape)} on {self.weight.values.device} is now "
                    f"{list(new.values.shape)} on {new.values.device}; compile the model again (torch.compiler.reset())"
                )
            self.weight.values.copy_(new.values)
            self.weight.scales.copy_(new.scales)
            self._remember(leaves)

    def made_of(self, leaves: Sequence[Any]) -> bool:
        return len(leaves) == len(self._refs) and all(ref() is leaf for ref, leaf in zip(self._refs, leaves, strict=True))

    def _known(self, leaves: Sequence[Any]) -> bool:
        return self.made_of(leaves) and [_version(leaf) for leaf in leaves] == self._versions

    def _remember(self, leaves: Sequence[Any]) -> None:
        self._refs, self._versions = [weakref.ref(leaf) for leaf in leaves], [_version(leaf) for leaf in leaves]
        _held[_key(leaves, self._text, self._kind)] = self


def relative_error(experts: Sequence[Any], weight: Quantized) -> float:
    """Root mean square of what quantising changed, as a part of that of the weights."""
    off = whole = 0.0
    for expert, own in enumerate(experts):
        off += float((dequantize_expert(weight, expert) - own.float()).square().sum())
        whole += float(own.float().square().sum())
    return (off / whole) ** 0.5 if whole else 0.0


def _version(tensor: Any) -> int:
    """How often it was written; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else int(tensor._version)


_held: weakref.WeakValueDictionary[Any, Held] = weakref.WeakValueDictionary()


def held(leaves: Sequence[Any], text: str, make: Make, kind: str) -> Held:
    """The quantised weight that `make`, which `text` stands for, computes from the leaves: one that a living graph has, or a new one."""
    found = _held.get(_key(leaves, text, kind))
    if found is None or not found.made_of(leaves):
        found = Held(leaves, text, make, kind)
    found.refresh(leaves)
    return found


def _key(leaves: Sequence[Any], text: str, kind: str) -> Any:
    return kind, text, tuple(id(leaf) for leaf in leaves)


class Leaf(NamedTuple):
    """Where a call finds a tensor: among its arguments, or as it was when the graph was made."""

    position: int
    tensor: Any = None

    def of(self, args: Sequence[Any]) -> Any:
        return args[self.position] if self.tensor is None else self.tensor


class Reading(NamedTuple):
    """A quantised weight of a graph, and where a call finds what it is made of."""

    weight: Held
    leaves: tuple[Leaf, ...]


def readings(gm: GraphModule) -> list[Reading]:
    """Those of a rewritten graph; passes/quantize_blocks.py adds to them."""
    found: list[Reading] = gm.meta.setdefault(META, [])
    return found


def kept_fresh(compiled: Callable[..., Any], gm: GraphModule) -> Callable[..., Any]:
    """The compiled graph, which looks after its quantised weights before each call."""
    own = list(gm.meta.pop(META, ()))
    if not own:
        return compiled

    @functools.wraps(compiled, updated=())
    def call(*args: Any) -> Any:
        for weight, leaves in own:
            weight.refresh([leaf.of(args) for leaf in leaves])
        return compiled(*args)

    return call
