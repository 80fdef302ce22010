"""bincount and histc of ids: the same counts by one_hot, whose shape the data does not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_compile.probing.errors import NotProbed, users_frame, where

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def bincount(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    """bincount(ids, minlength=E) is as long as E says, as ids are below E."""
    experts, below = args[2] if len(args) > 2 else kwargs.get("minlength", 0), r.ranges.below(args[0])
    if len(args) + len(kwargs) > 2 or kwargs.get("weights", args[1] if len(args) == 3 else None) is not None:
        raise NotProbed(f"{where(users_frame())}: a weighted bincount")
    if experts == 0 and below is not None:  # as long as the last id that is there: those behind it count nothing
        r.assumptions[f"{where(users_frame())}: experts beyond the last that is hit add nothing"] = None
        experts = below
    if below is None or below > experts:
        raise NotProbed(f"{where(users_frame())}: bincount of numbers that are not known to be below {experts}")
    with r:
        return torch.nn.functional.one_hot(args[0].long(), experts).sum(0)


def histc(r: Recorder, func: Any, args: tuple, kwargs: Any) -> Any:
    """histc of ids with bins as wide as one id. Bins before the first id count nothing."""
    bins, low, high = [*args[1:], *[None] * 3][:3]
    bins, low, high = kwargs.get("bins", bins), kwargs.get("min", low), kwargs.get("max", high)
    below = r.ranges.below(args[0])
    if not all(isinstance(x, int) for x in (bins, low, high, below)) or not isinstance(low, int) or low >= 0 or bins != high - low:
        return r.call(func, "histc", args, kwargs)
    if below > high:
        return r.call(func, "histc", args, kwargs)
    with r:
        counts_E = torch.nn.functional.one_hot(args[0].long().reshape(-1), high).sum(0)
        padded = torch.cat([torch.zeros(-low, dtype=torch.long, device=counts_E.device), counts_E])
        r.padded[r.tape.node(padded)] = -low, counts_E
        return padded.to(args[0].dtype)
