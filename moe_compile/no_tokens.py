"""A rank without tokens: Dynamo would make a graph for exactly none, in which nothing tells what a MoE block computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx.experimental import _config as shapes

DEPTH = 3  # of lists and dicts of arguments


def sizes_open(variables: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """A context in which Dynamo takes the empty dimensions of these tensors for any size, none too.

    Of matrices and what has more dimensions: a list of no numbers holds no tokens' rows.
    """
    empty = [t for v in list(variables.values()) for t in _tensors(v, DEPTH) if t.dim() > 1 and t.numel() == 0]
    if not empty:
        return contextlib.nullcontext()
    for t in empty:
        for dim in (dim for dim, size in enumerate(t.shape) if size == 0):
            torch._dynamo.maybe_mark_dynamic(t, dim)
    return shapes.patch(backed_size_oblivious=True)


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each, depth - 1)
