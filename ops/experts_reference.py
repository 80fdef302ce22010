"""Provider "reference" of the experts: one expert at a time in plain torch, any device and dtype. Slow; the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import registry
from .evaluate import Adjoints, Reads, evaluate, reverse, reverse_plan
from .experts import BACKWARD, NAME, Call, empty_grads, unfit_for_training
from .layout import view


def forward(call: Call) -> Any:
    """y [T, K, O] in slot order; rows of slots without an expert are zero."""
    tokens, top_k, width = call.out_shape
    y_NO = call.x.new_zeros((tokens * top_k, width), dtype=call.values[-1].dtype)
    for expert, slots in _groups(call):
        y_NO[slots] = evaluate(call.program, _reads(call, expert, slots))[-1].expand(len(slots), width)
    return y_NO.view(tokens, top_k, width)


def backward(call: Call, grad_NO: Any, saved: list[Any], needs_grad: Sequence[bool]) -> list[Any]:
    """Gradients in call.parameters() order, values recomputed; half precision is summed over slots in float32."""
    grads = [grad.zero_() for grad in empty_grads(call, needs_grad)]
    plan = reverse_plan(call.program, call.needs(needs_grad), keep=False)
    dx_TH = torch.zeros_like(call.x, dtype=torch.promote_types(call.x.dtype, torch.float32))
    for expert, slots in _groups(call):
        values = evaluate(call.program, _reads(call, expert, slots), plan)
        adjoints = _adjoints(call, expert, grads)
        dx, dw, _ = reverse(call.program, call.values, values, grad_NO[slots], plan, adjoints)
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
    def mm(index: int, rows: Any) -> Any:
        return call.rows_seen(index, rows) @ call.weights.of(call.program.steps[index].attrs[0], expert).to(rows.dtype)

    return Reads(
        lambda: call.x[slots // call.top_k],
        lambda: call.topk_weights.reshape(-1, 1)[slots],
        mm,
        lambda j: call.biases.of(j, expert),
    )


def _adjoints(call: Call, expert: int, grads: list[Any]) -> Adjoints:
    split = 2 + len(call.weights.tensors)
    weight_grads, bias_grads = grads[2:split], grads[split:]

    def mm(j: int, rows: Any, grad: Any, wanted: bool) -> Any:
        target = view(call.weights.slots[j], weight_grads, expert)
        if target is not None:
            target += (rows.t() @ grad).to(target.dtype)
        return grad @ call.weights.of(j, expert).to(grad.dtype).t() if wanted else None

    def bias(j: int, grad: Any) -> None:
        target = view(call.biases.slots[j], bias_grads, expert)
        if target is not None:
            target += grad

    return Adjoints(mm, bias)


def cost(problem: registry.Problem) -> float:
    """Microseconds: some 20 launches an expert, and its copies beside the arithmetic."""
    return 1e6 + 200.0 * problem.num_experts


def supports(problem: registry.Problem) -> str | None:
    if problem.cuda_graphs and problem.device.startswith("cuda"):
        return "reference reads the experts' counts back to the host, which no CUDA graph can hold"
    return unfit_for_training(problem)


PROVIDER = registry.register(registry.Provider("reference", "experts", {NAME: forward, BACKWARD: backward}, cost, supports))
