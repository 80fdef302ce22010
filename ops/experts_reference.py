"""Provider "reference" of the experts: one expert at a time in plain torch, any device and dtype. Slow; the oracle."""

from __future__ import annotations

from typing import Any

import torch

from . import registry
from .evaluate import Adjoints, Reads, evaluate, reverse
from .experts import NAME, Call, empty_grads
from .layout import view


def forward(call: Call) -> Any:
    """y [T, K, O] in slot order; rows of slots without an expert are zero."""
    tokens, top_k, width = call.out_shape
    y_NO = call.x.new_zeros((tokens * top_k, width), dtype=call.values[-1].dtype)
    for expert, slots in _groups(call):
        y_NO[slots] = evaluate(call.program, _reads(call, expert, slots))[-1].expand(len(slots), width)
    return y_NO.view(tokens, top_k, width)


def backward(call: Call, grad_NO: Any, needs_grad: list[bool]) -> list[Any]:
    """Gradients in call.parameters() order; half precision sums over slots and experts are taken in float32."""
    grads = [grad.zero_() for grad in empty_grads(call, needs_grad)]
    split = 2 + len(call.weights.tensors)
    weight_grads, bias_grads = grads[2:split], grads[split:]
    needs = call.needs(needs_grad)
    dx_TH = _accumulator(call.x)
    for expert, slots in _groups(call):
        reads = _reads(call, expert, slots)
        adjoints = _adjoints(call, expert, weight_grads, bias_grads, needs_grad)
        values = evaluate(call.program, reads)
        dx, dw = reverse(call.program, values, grad_NO[slots], needs, adjoints)
        if dx is not None:
            dx_TH.index_add_(0, slots // call.top_k, dx.to(dx_TH.dtype))
        if dw is not None:
            grads[1].view(-1)[slots] = dw.view(-1)
    if needs_grad[0]:
        grads[0].copy_(dx_TH)
    return grads


def _groups(call: Call) -> list[tuple[int, Any]]:
    """(expert, its slots) for each expert that has any."""
    ends = call.offsets.tolist()
    starts = [0, *ends[:-1]]
    return [(e, call.order[a:b]) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]


def _reads(call: Call, expert: int, slots: Any) -> Reads:
    w = None if call.topk_weights is None else call.topk_weights.reshape(-1, 1)[slots]
    return Reads(
        call.x[slots // call.top_k],
        w,
        lambda j, rows: rows @ call.weights.of(j, expert).to(rows.dtype),
        lambda j: call.biases.of(j, expert),
    )


def _adjoints(
    call: Call, expert: int, weight_grads: list[Any], bias_grads: list[Any], needs_grad: list[bool]
) -> Adjoints:
    needs = call.needs(needs_grad)

    def mm(j: int, rows: Any, grad: Any, wanted: bool) -> Any:
        target = view(call.weights.slots[j], weight_grads, expert) if needs.weight(j) else None
        if target is not None and target.numel():
            target += (rows.t() @ grad).to(target.dtype)
        return grad @ call.weights.of(j, expert).to(grad.dtype).t() if wanted else None

    def bias(j: int, grad: Any) -> None:
        target = view(call.biases.slots[j], bias_grads, expert)
        if target.numel():
            target += grad
    return Adjoints(mm, bias)


def _accumulator(x: Any) -> Any:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros_like(x, dtype=dtype)


def cost(problem: registry.Problem) -> float:
    """Microseconds: some 20 launches an expert, and its copies beside the arithmetic."""
    return 1e6 + 200.0 * problem.num_experts


PROVIDER = registry.register(
    registry.Provider("reference", "experts", {NAME: forward, NAME + "_backward": backward}, cost)
)
