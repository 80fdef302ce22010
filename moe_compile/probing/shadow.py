"""The module and its arguments on fake tensors: sizes that may vary are symbols, others are numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext


def shadow_of(module: nn.Module, fake: FakeTensorMode) -> tuple[nn.Module, dict[int, str]]:
    """A copy of the module on fake parameters, and the names of its modules, parameters and buffers."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        for t in [*m._parameters.values(), *m._buffers.values(), *[v for v in vars(m).values() if isinstance(v, torch.Tensor)]]:
            if t is not None and id(t) not in memo:
                memo[id(t)] = fake.from_tensor(t, static_shapes=True)
    shadow = copy.deepcopy(module, memo)
    names: dict[int, str] = {}
    for path, m in shadow.named_modules(remove_duplicate=True):
        names[id(m)] = path
        for n, t in tensors_of(m).items():
            names.setdefault(id(t), f"{path}.{n}".lstrip("."))
    return shadow, names


def tensors_of(m: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and other tensors that are attributes of the module."""
    every = {**vars(m), **m._parameters, **m._buffers}
    return {n: t for n, t in every.items() if isinstance(t, torch.Tensor)}


def example_shapes(inputs: list[Any]) -> list[list[int]]:
    """The shapes to record with: numbers of rows that tell from each other, and from one, which means "any" to torch."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 1]
    one_row = bool(tensors) and all(x.shape[0] <= 1 for x in tensors)
    shapes = []
    for x in inputs:
        shape = list(x.shape) if isinstance(x, torch.Tensor) else []
        if one_row and len(shape) > 1:
            shape[0] = 3
        if len(tensors) == 1 and len(shape) > 1:
            for d in range(len(shape) - 1):
                shape[d] = next(n for n in (shape[d], 5, 7, 11, 13, 17) if n > 1 and n not in shape[:d])
        shapes.append(shape)
    return shapes


def faked(x: torch.Tensor, shape: list[int], fake: FakeTensorMode) -> FakeTensor:
    """Sizes that may vary are symbols: all but the last."""
    free = [d < x.dim() - 1 and n > 1 for d, n in enumerate(shape)]
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK if f else DimDynamic.STATIC for f in free])
    x = x.detach() if list(x.shape) == shape else x.new_empty(shape)
    return fake.from_tensor(x, symbolic_context=context)
