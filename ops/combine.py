"""Stage op combine: each token's weighted sum over its K slots, accumulated in float32 (float64 for float64).

out[t] = sum_k w[t, k] * y[t, k]          (w = 1 without topk_weights)

Over ranks (`parallel` is a setup text, comm/setup.py) y is [R, O], a row for each that the dispatch gave, with this rank's slots summed
already (permute_experts_combine), and out[t] is the sum over ranks. In the batched format y has a row for each slot, and the weights are
applied here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import registry
from ._register import below_autograd, register_op
from .bags import dtype_of_sum, starts, sum_rows
from .comm import exchange

NAME = "combine"
SCHEMA = f"{NAME}(Tensor y_TKO, Tensor? topk_weights_TK, Tensor[] handle, ScalarType? out_dtype, str provider, str parallel='') -> Tensor"
BACKWARD_SCHEMA = f"{NAME}_backward(Tensor grad_TO, Tensor[] handle, str provider, str parallel) -> Tensor"
_CHUNK = 1 << 17  # elements of y handled at once on a CPU: 512 KiB in float32
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (8e-3, 8e-3),
    torch.float16: (1e-3, 1e-3),
}


def accumulate_dtype(y: Any, topk_weights: Any) -> Any:
    """float32, or wider if an operand is."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    return dtype if topk_weights is None else torch.promote_types(dtype, topk_weights.dtype)


def result_dtype(y: Any, topk_weights: Any, out_dtype: Any) -> Any:
    """out_dtype, or what y * w would have."""
    if out_dtype is not None:
        return out_dtype
    return y.dtype if topk_weights is None else torch.promote_types(y.dtype, topk_weights.dtype)


def local(y_TKO: Any, topk_weights_TK: Any, handle: list[Any], out_dtype: Any) -> Any:
    """Provider "local": out [T, O]."""
    if y_TKO.device.type == "cpu":
        return _local_cpu(y_TKO, topk_weights_TK, out_dtype)
    return _weighted_sum(y_TKO, topk_weights_TK, accumulate_dtype(y_TKO, topk_weights_TK)).to(out_dtype)


def _weighted_sum(y_TKO: Any, topk_weights_TK: Any, dtype: Any) -> Any:
    terms = y_TKO.to(dtype)
    return terms.sum(1) if topk_weights_TK is None else (terms * topk_weights_TK.to(dtype).unsqueeze(-1)).sum(1)


def _local_cpu(y_TKO: Any, topk_weights_TK: Any, out_dtype: Any) -> Any:
    """Where y must be cast, tokens in chunks that stay in cache: a copy of all of y costs 10 times the sum in page faults."""
    tokens, top_k, width = y_TKO.shape
    dtype = dtype_of_sum(y_TKO.dtype, None if topk_weights_TK is None else topk_weights_TK.dtype, out_dtype)
    step = max(1, tokens if dtype == y_TKO.dtype else _CHUNK // max(1, top_k * width))
    out_TO = y_TKO.new_empty((tokens, width), dtype=out_dtype)
    for first in range(0, tokens, step):
        chunk = slice(first, first + step)
        rows = y_TKO[chunk].to(dtype)
        weights = None if topk_weights_TK is None else topk_weights_TK[chunk].to(dtype).reshape(-1)
        slots = torch.arange(rows.shape[0] * top_k)
        out_TO[chunk] = sum_rows(rows.reshape(-1, width), slots, starts(rows.shape[0], top_k), weights)
    return out_TO


def _kernel(y_TKO: Any, topk_weights_TK: Any, handle: list[Any], out_dtype: Any, provider: str, parallel: str = "") -> Any:
    if parallel:
        own = exchange.exchange_of(provider, parallel, y_TKO.device)
        return own.collect(y_TKO, handle, result_dtype(y_TKO, topk_weights_TK, out_dtype), topk_weights_TK)
    if y_TKO.dim() != 3 or (topk_weights_TK is not None and topk_weights_TK.shape != y_TKO.shape[:2]):
        given = None if topk_weights_TK is None else tuple(topk_weights_TK.shape)
        raise ValueError(f"y must be [T, K, O] and topk_weights [T, K], got {tuple(y_TKO.shape)} and {given}")
    out_dtype = result_dtype(y_TKO, topk_weights_TK, out_dtype)
    return registry.kernel("comm", provider, NAME)(y_TKO, topk_weights_TK, handle, out_dtype)


def _fake(y_TKO: Any, topk_weights_TK: Any, handle: list[Any], out_dtype: Any, provider: str, parallel: str = "") -> Any:
    shape = (handle[0].shape[0], y_TKO.shape[1]) if parallel else (y_TKO.shape[0], y_TKO.shape[2])
    return y_TKO.new_empty(shape, dtype=result_dtype(y_TKO, topk_weights_TK, out_dtype))


def _backward_kernel(grad_TO: Any, handle: list[Any], provider: str, parallel: str) -> Any:
    return exchange.exchange_of(provider, parallel, grad_TO.device).send(grad_TO, handle)


def _backward_fake(grad_TO: Any, handle: list[Any], provider: str, parallel: str) -> Any:
    return grad_TO.new_empty((handle[1].shape[0], grad_TO.shape[1]))


class _OverRanks(torch.autograd.Function):
    """The gradient of a row is that of its token."""

    @staticmethod
    def forward(ctx: Any, y: Any, out_dtype: Any, provider: str, parallel: str, *handle: Any) -> Any:
        with below_autograd():
            out = OP.overload(y, None, list(handle), out_dtype, provider, parallel)
        ctx.save_for_backward(*handle)
        ctx.names, ctx.dtype = (provider, parallel), y.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_TO: Any) -> tuple[Any, ...]:
        with below_autograd():
            dy = BACKWARD_OP.overload(grad_TO.to(ctx.dtype), list(ctx.saved_tensors), *ctx.names)
        return dy, None, None, None, *[None] * len(ctx.saved_tensors)


class _Differentiable(torch.autograd.Function):
    """Not by register_autograd: its handling of the Tensor[] argument costs more than a small sum."""

    @staticmethod
    def forward(ctx: Any, y: Any, topk_weights: Any, handle: list[Any], *rest: Any) -> Any:
        with below_autograd():
            out = OP.overload(y, topk_weights, handle, *rest)
        # y is only read for the gradient of the weights, so it is not kept alive without them.
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, topk_weights)
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_TO: Any) -> tuple[Any, ...]:
        """Plain torch, which Inductor fuses with what stands around it."""
        y, topk_weights = ctx.saved_tensors
        if topk_weights is None:
            return grad_TO.to(ctx.dtype).unsqueeze(1).expand(ctx.shape), None, None, None, None
        dtype = torch.promote_types(torch.promote_types(ctx.dtype, torch.float32), topk_weights.dtype)
        grad = grad_TO.to(dtype).unsqueeze(1)
        dy = (grad * topk_weights.to(dtype).unsqueeze(-1)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        dw = (grad * y.to(dtype)).sum(-1).to(topk_weights.dtype) if ctx.needs_input_grad[1] else None
        return dy, dw, None, None, None


def _autograd(y: Any, topk_weights: Any, handle: list[Any], out_dtype: Any, provider: str, parallel: str = "") -> Any:
    if torch.is_grad_enabled() and (y.requires_grad or (topk_weights is not None and topk_weights.requires_grad)):
        if not parallel:
            return _Differentiable.apply(y, topk_weights, handle, out_dtype, provider)
        if topk_weights is not None:
            raise ValueError(f"provider {provider!r} weights rows in its combine, which has no gradient; train with a standard one")
        return _OverRanks.apply(y, out_dtype, provider, parallel, *handle)
    with below_autograd():
        return OP.overload(y, topk_weights, handle, out_dtype, provider, parallel)


OP = register_op(SCHEMA, _kernel, _fake, _autograd)
BACKWARD_OP = register_op(BACKWARD_SCHEMA, _backward_kernel, _backward_fake)


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider: weighted, unweighted, another output dtype, no tokens."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn((3, 2, 5), generator=generator, dtype=torch.float64).to(device, dtype)
    w = torch.rand((3, 2), generator=generator, dtype=torch.float64).to(device, dtype)
    yield y, w, [], None
    yield y, None, [], None
    yield y, w, [], torch.float32
    yield y[:0], w[:0], [], None
