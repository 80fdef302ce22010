"""Questions about the nodes of a functional ATen graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..lift.sizes import shape_of

ROW_VIEWS = {"view", "_unsafe_view", "unsqueeze", "squeeze", "clone", "alias"}


def op(a: Any) -> str:
    """ "topk" for aten.topk.default, "" for what is no call."""
    if not isinstance(a, Node) or a.op != "call_function":
        return ""
    packet = getattr(a.target, "overloadpacket", a.target)
    return getattr(packet, "__name__", "")


def argument(a: Node, i: int, name: str, default: Any = None) -> Any:
    return a.args[i] if len(a.args) > i else a.kwargs.get(name, default)


def shape(a: Any) -> list[Any]:
    """Extents, symbolic ones as sympy expressions; [] for what is no tensor."""
    v = a.meta.get("val") if isinstance(a, Node) else None
    return shape_of(v) if isinstance(v, torch.Tensor) else []


def dtype(a: Any) -> torch.dtype | None:
    v = a.meta.get("val") if isinstance(a, Node) else None
    return v.dtype if isinstance(v, torch.Tensor) else None


def floats(*nodes: Any) -> bool:
    return all((t := dtype(n)) is not None and t.is_floating_point for n in nodes)


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_last(a: Any, dim: Any) -> bool:
    """Is `dim` (a number, or a list of one) the last dimension of a?"""
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    n = len(shape(a))
    return n > 0 and is_number(dim) and dim % n == n - 1


def rows(a: Any) -> Any:
    """Past views that keep the last dimension (the same rows in the same order), or that come back to it."""
    while op(a) in ROW_VIEWS or op(a) == "expand":
        inner = a.args[0]
        if shape(a) == shape(inner) or (op(a) != "expand" and shape(a)[-1:] == shape(inner)[-1:]):
            a = inner
        elif op(a) == op(inner) == "view" and shape(a) == shape(inner.args[0]):
            a = inner.args[0]
        else:
            break
    return a


def plain(a: Any) -> Any:
    """The same, and past `detach`: for what only chooses, and carries no gradient."""
    while (r := rows(a)) is not a or op(a) == "detach":
        a = r if r is not a else a.args[0]
    return a


def uncast(a: Any) -> tuple[Any, torch.dtype | None]:
    """(what is cast, to which float dtype); (a, None) if nothing is."""
    if op(a) != "_to_copy" or not floats(a, a.args[0]) or a.meta["val"].device != a.args[0].meta["val"].device:
        return a, None
    return a.args[0], dtype(a)


def topk_part(a: Any, i: int) -> Any:
    """The largest-K over the last dimension whose values (0) or indices (1) these are, else None."""
    topk: Any = a.args[0] if op(a) == "getitem" and a.args[1] == i else None
    if op(topk) != "topk" or not isinstance(argument(topk, 1, "k"), int) or not argument(topk, 3, "largest", True):
        return None
    return topk if is_last(topk.args[0], argument(topk, 2, "dim", -1)) else None
