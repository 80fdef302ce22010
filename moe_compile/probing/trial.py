"""Does Dynamo capture a module by itself?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from moe_compile.capture import _flags_on


def captured(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether Dynamo makes one graph of the call, with its capture flags on; nothing is compiled."""
    graphs = []

    def stop(gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        raise _Seen

    dynamo = logging.getLogger("torch._dynamo")
    level = dynamo.level
    dynamo.setLevel(logging.CRITICAL)
    try:
        with _flags_on():
            torch._dynamo.optimize(stop, nopython=True)(lambda *a, **k: module(*a, **k))(*args, **kwargs)
    except Exception:  # noqa: BLE001  whatever it is, we know enough
        return bool(graphs)
    finally:
        dynamo.setLevel(level)
    return True  # it runs no torch call


class _Seen(Exception):
    """There is one graph."""
