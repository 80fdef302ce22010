"""Tokens that tensor-parallel ranks hold alike: each is dispatched by one of them, and all get the result.

slice    rank i takes tokens i*c .. (i+1)*c of the padded T = c*tp; joining gathers them all
leader   rank 0 takes all tokens, the others none (their ids become -1); joining broadcasts

Each op's backward is the other's forward, for a gradient that the ranks hold alike as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .._register import Op, below_autograd, register_op
from . import collectives
from .exchange import ExchangeError
from .setup import Setup

TAKE_SCHEMA = "take_tokens(Tensor x_TX, float fill, str mode, int world, int rank, str parallel) -> Tensor"
JOIN_SCHEMA = "join_tokens(Tensor x_SX, SymInt tokens, str mode, int world, int rank, str parallel) -> Tensor"


def _share(tokens: Any, world: int) -> Any:
    return (tokens + world - 1) // world


def _take(x_TX: Any, fill: float, mode: str, world: int, rank: int, parallel: str) -> Any:
    if mode == "leader":
        return x_TX.clone() if rank == 0 else torch.full_like(x_TX, fill)
    share = _share(x_TX.shape[0], world)
    own = x_TX[rank * share : (rank + 1) * share]
    return F.pad(own, (0, 0, 0, share - own.shape[0]), value=fill) if own.shape[0] < share else own.clone()


def _take_fake(x_TX: Any, fill: float, mode: str, world: int, rank: int, parallel: str) -> Any:
    return x_TX.new_empty((x_TX.shape[0] if mode == "leader" else _share(x_TX.shape[0], world), x_TX.shape[1]))


def _join(x_SX: Any, tokens: int, mode: str, world: int, rank: int, parallel: str) -> Any:
    setup = Setup.parse(parallel)
    group = setup.process_group
    try:
        if mode == "leader":
            out = x_SX.clone(memory_format=torch.contiguous_format)
            dist.broadcast(out, dist.get_global_rank(group, 0), group=group)
            return out
        out = x_SX.new_empty((x_SX.shape[0] * world, x_SX.shape[1]))
        collectives.all_gather(out, x_SX.contiguous(), group=group)
    except RuntimeError as error:
        raise ExchangeError(
            f"join of tokens ({mode}): rank {dist.get_rank()} got no answer from its tensor-parallel group (ranks "
            f"{dist.get_process_group_ranks(group)}): {(str(error).splitlines() or [''])[0]}"
        ) from error
    return out[:tokens].clone() if tokens < out.shape[0] else out


def _join_fake(x_SX: Any, tokens: Any, mode: str, world: int, rank: int, parallel: str) -> Any:
    return x_SX.new_empty((tokens, x_SX.shape[1]))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, *rest: Any) -> Any:
        ctx.tokens, ctx.rest = x.shape[0], rest[1:]
        with below_autograd():
            return TAKE_OP.overload(x, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        with below_autograd():
            return JOIN_OP.overload(grad, ctx.tokens, *ctx.rest), *[None] * 5


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, tokens: Any, *rest: Any) -> Any:
        ctx.rest = rest
        with below_autograd():
            return JOIN_OP.overload(x, tokens, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        with below_autograd():
            return TAKE_OP.overload(grad, 0.0, *ctx.rest), *[None] * 5


def _autograd_of(function: Any, op: Any) -> Any:
    def call(x: Any, *rest: Any) -> Any:
        if torch.is_grad_enabled() and x.requires_grad:
            return function.apply(x, *rest)
        with below_autograd():
            return op().overload(x, *rest)

    return call


TAKE_OP: Op = register_op(TAKE_SCHEMA, _take, _take_fake, _autograd_of(_Take, lambda: TAKE_OP))
JOIN_OP: Op = register_op(JOIN_SCHEMA, _join, _join_fake, _autograd_of(_Join, lambda: JOIN_OP))
