"""torch.unique of ids with their counts: all experts, those that are not hit with none, as what goes over no rows adds nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from moe_compile.probing.emptiness import name_of
from moe_compile.probing.errors import users_frame, where

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def unique(r: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name, below = getattr(func, "__name__", "unique"), r.ranges.below(args[0])
    asked = {k for k, v in kwargs.items() if v and k != "sorted"}
    ids = args[0] if name == "unique" else r.tape.value.get(_before_sorting(r.tape.node(args[0])))
    if asked != {"return_counts"} or len(args) > 1 or below is None or not isinstance(ids, torch.Tensor) or args[0] in r.constants:
        return r.call(func, name, args, kwargs)
    r.assumptions[f"{where(users_frame())}: the loop over the experts that are hit visits all of them"] = None
    with r:
        counts_E = torch.nn.functional.one_hot(ids.long().reshape(-1), below).sum(0)
        return torch.arange(below, dtype=ids.dtype, device=ids.device), counts_E


def _before_sorting(n: Node) -> Any:
    """The ids of which the node holds the sorted values: each comes in one run. By sort, or in the order of their own argsort."""
    if name_of(n) not in ("getitem", "__getitem__", "index_select", "gather") or not isinstance(n.args[0], Node):
        return None
    source, at = n.args[0], n.args[-1]
    if name_of(source) == "sort" and at == 0 and name_of(n) == "getitem":
        return source.args[0] if _ascending(source) else None
    return source if isinstance(at, Node) and name_of(at) == "argsort" and at.args[0] is source and _ascending(at) else None


def _ascending(sort: Node) -> bool:
    return not sort.kwargs.get("descending") and not any(a is True for a in sort.args)
