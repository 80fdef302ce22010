"""Op grouped_mm: rows sorted by expert, each expert's rows times its weight; what a compiler that fuses the rest needs of a stage.

    out[r] = rows[r] @ W[e]        (transposed: @ W[e].T)       offsets[e - 1] <= r < offsets[e]

Rows behind the last offset give zero. Weights stay where they are (layout: one entry of ops/layout.py); one of another
dtype is cast to that of the rows. It reads the offsets back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ._register import below_autograd, register_op
from .blocks import cut, split
from .experts import first_derivatives
from .layout import Params, views
from .products_cpu import Products, for_weight_gradient, in_one_call, multiply

NAME = "grouped_mm"
_ARGS = "Tensor offsets_E, Tensor[] weights, str layout"
SCHEMA = f"{NAME}(Tensor rows_RI, {_ARGS}, bool transposed) -> Tensor"
WEIGHTS_SCHEMA = f"{NAME}_weights(Tensor rows_RI, Tensor grad_RO, {_ARGS}) -> Tensor[]"


def _params(weights: Any, layout: str, offsets: Any) -> Params:
    return Params(weights, layout, offsets.shape[0], "weight")


def _kernel(rows: Any, offsets: Any, weights: Any, layout: str, transposed: bool) -> Any:
    num_experts = offsets.shape[0]
    if not rows.is_cuda and num_experts and 2 * len(rows) >= num_experts and in_one_call(rows, weights[0], layout):
        weight = weights[0] if (layout == "eio") != transposed else weights[0].transpose(1, 2)
        out = torch._grouped_mm(rows, weight, offs=offsets)
        used = offsets[-1].item()
        if used < len(rows):
            out[used:] = 0
        return out
    return _by_expert(rows, offsets, weights, layout, transposed)


def _by_expert(rows: Any, offsets: Any, weights: Any, layout: str, transposed: bool) -> Any:
    params, ends = _params(weights, layout, offsets), offsets.tolist()
    out = rows.new_empty((len(rows), params.fan(0)[0 if transposed else 1]))
    blocks = cut(ends, max(1, len(rows)))
    products = Products(params, offsets, blocks)
    for block in blocks:
        used = slice(block.start, block.stop)
        multiply(split(block, rows[used]), products.of_runs(block, 0, rows.dtype, transposed), split(block, out[used]))
    out[ends[-1] if ends else 0 :] = 0
    return out


def _fake(rows: Any, offsets: Any, weights: Any, layout: str, transposed: bool) -> Any:
    return rows.new_empty((rows.shape[0], _params(weights, layout, offsets).fan(0)[0 if transposed else 1]))


def _weights_kernel(rows: Any, grad: Any, offsets: Any, weights: Any, layout: str) -> list[Any]:
    """The gradient of each weight: rows.T @ grad of its expert's rows; zeros for an expert without rows."""
    params, ends = _params(weights, layout, offsets), offsets.tolist()
    grads = [torch.empty_like(weight) for weight in weights]
    targets = views(params.slots[0], grads)
    starts = [0, *ends[:-1]]
    for target, start, end in zip(targets, starts, ends, strict=True):
        if start == end:
            target.zero_()
    for block in cut(ends, max(1, len(rows))):
        used = slice(block.start, block.stop)
        left, right = for_weight_gradient(block, rows[used], grad[used], params.slots[0].axes)
        own = [targets[expert] for expert in block.experts]
        if own[0].dtype == left.dtype:
            multiply(split(block, left.t(), 1), split(block, right), own)
            continue
        for target, a, b in zip(own, split(block, left.t(), 1), split(block, right), strict=True):
            target.copy_(a @ b)
    return grads


def _weights_fake(rows: Any, grad: Any, offsets: Any, weights: Any, layout: str) -> list[Any]:
    return [torch.empty_like(weight) for weight in weights]


class _Differentiable(torch.autograd.Function):
    """Keeps rows only where a weight wants its gradient."""

    @staticmethod
    def forward(ctx: Any, layout: str, rows: Any, offsets: Any, *weights: Any) -> Any:
        ctx.layout, ctx.needs = layout, [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        ctx.save_for_backward(rows if any(ctx.needs[1:]) else None, offsets, *weights)
        return OP.overload(rows, offsets, weights, layout, False)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        rows, offsets, *weights = ctx.saved_tensors
        found: list[Any] = [None] * len(ctx.needs)
        with below_autograd():
            if ctx.needs[0]:
                found[0] = OP.overload(grad, offsets, weights, ctx.layout, True)
            if any(ctx.needs[1:]):
                found[1:] = WEIGHTS_OP.overload(rows, grad, offsets, weights, ctx.layout)
        grads = first_derivatives(found, ctx.needs, (grad, rows, *weights))
        return None, grads[0], None, *grads[1:]


def differentiable(rows: Any, offsets: Any, weights: Any, layout: str) -> Any:
    """The op with gradients. It has no Autograd kernel of its own: a call then costs one hop into Python, not two."""
    return _Differentiable.apply(layout, rows, offsets, *weights)


_TAGS = (torch.Tag.cudagraph_unsafe,)
OP = register_op(SCHEMA, _kernel, _fake, tags=_TAGS)
WEIGHTS_OP = register_op(WEIGHTS_SCHEMA, _weights_kernel, _weights_fake, tags=_TAGS)


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples: stacked, an expert without rows and rows without an expert, lists, no rows."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Any:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(device, dtype)

    def ends(*values: int) -> Any:
        return torch.tensor(values, dtype=torch.int32, device=device)

    yield rand(7, 4), ends(2, 2, 5), [rand(3, 4, 8)], "eio", False
    yield rand(7, 8), ends(2, 2, 7), [rand(3, 4, 8)], "eio", True
    yield rand(5, 4), ends(3, 5), [rand(8, 4), rand(8, 4)], "oi*2", False
    yield rand(0, 4), ends(0, 0), [rand(2, 8, 4)], "eoi", False
