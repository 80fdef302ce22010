"""Ops start_exchange and finish_exchange: exchange_experts beside what else the model computes meanwhile, say a shared expert.

    token = start_exchange(..., tag)            # goes its way on a stream of its own
    ...                                         # whatever does not need out
    out = finish_exchange(token, kept, ...)     # the current stream waits for it

The result waits under its tag, which a graph uses once at a time. kept: what start still reads, so that no compiler gives its memory
away before. On a CPU, start computes at once. Files: passes/overlap.py writes the pair, where it pays.
"""

from __future__ import annotations

from typing import Any

import torch

from . import exchange_experts
from ._register import register_op

START_SCHEMA = exchange_experts.SCHEMA.replace("exchange_experts(", "start_exchange(").replace(
    "str parallel) -> Tensor out_TO", "str parallel, str tag) -> Tensor token"
)
FINISH_SCHEMA = "finish_exchange(Tensor token, Tensor[] kept, SymInt tokens, SymInt width, ScalarType dtype, str tag) -> Tensor out_TO"

_streams: dict[Any, Any] = {}
_waiting: dict[tuple[Any, str], Any] = {}  # (device, tag) -> result, still being made


def _stream(device: Any) -> Any:
    """The side stream of a device: one, as all calls of an exchange must follow each other."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _start(*args: Any) -> Any:
    *given, tag = args
    x = given[0]
    if not x.is_cuda:
        _waiting[x.device, tag] = exchange_experts.run(*given)
        return x.new_empty(0)
    side = _stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))  # its inputs, and whoever read the memory that it allocates
    with torch.cuda.stream(side):
        _waiting[x.device, tag] = exchange_experts.run(*given)
    return x.new_empty(0)


def _finish(token: Any, kept: list[Any], tokens: int, width: int, dtype: Any, tag: str) -> Any:
    out = _waiting.pop((token.device, tag), None)
    if out is None:
        raise RuntimeError(f"finish_exchange: nothing was started under the tag {tag!r}; a graph calls start_exchange first, once for each")
    if token.is_cuda:
        torch.cuda.current_stream(token.device).wait_stream(_stream(token.device))
    return out


def _start_fake(*args: Any) -> Any:
    return args[0].new_empty(0)


def _finish_fake(token: Any, kept: list[Any], tokens: Any, width: Any, dtype: Any, tag: str) -> Any:
    return token.new_empty((tokens, width), dtype=dtype)


START = register_op(START_SCHEMA, _start, _start_fake)
FINISH = register_op(FINISH_SCHEMA, _finish, _finish_fake)
