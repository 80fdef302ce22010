"""Experts as programs beside the same experts as plain Python, and the loop over slots that the ops are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moe_compile.ops import experts
from moe_compile.ops.quantize_dispatch import counting_sort


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, its layouts, the shapes of its tensors, and what it means for one row: f(weights, biases, e, x, w).

    stacked parameters have shape (E, ...); in lists, E tensors of the rest.
    """

    program: str
    weights: tuple[tuple[int, ...], ...]
    f: Callable[..., Any]
    weight_layout: str
    biases: tuple[tuple[int, ...], ...] = ()
    bias_layout: str = ""
    weighted: bool = False


HIDDEN, INTER, E = 6, 4, 5


def _swiglu(ws: Any, bs: Any, e: int, x: Any, w: Any) -> Any:
    gate, up = (ws[0][e] @ x).chunk(2)
    return ws[1][e] @ (F.silu(gate) * up)


def _gpt_oss(ws: Any, bs: Any, e: int, x: Any, w: Any) -> Any:
    h = x @ ws[0][e] + bs[0][e]
    gate, up = h[::2].clamp(max=0.7), h[1::2].clamp(-0.7, 0.7)
    return ((up + 1) * (gate * torch.sigmoid(gate * 1.702))) @ ws[1][e] + bs[1][e]


GATE, UP = (f"cols(mm(0, x) + b(0), {first}, {2 * INTER}, 2)" for first in (0, 1))

CASES = {
    "swiglu": Case(
        f"mm(1, silu(cols(mm(0, x), 0, {INTER}, 1)) * cols(mm(0, x), {INTER}, {2 * INTER}, 1))",
        ((E, 2 * INTER, HIDDEN), (E, HIDDEN, INTER)),
        _swiglu,
        "eoi,eoi",
    ),
    "interleaved_clamped_biased": Case(
        f"mm(1, (clamp({UP}, -0.7, 0.7) + 1) * (clamp({GATE}, None, 0.7) * sigmoid(clamp({GATE}, None, 0.7) * 1.702))) + b(1)",
        ((E, HIDDEN, 2 * INTER), (E, INTER, HIDDEN)),
        _gpt_oss,
        "eio,eio",
        ((E, 2 * INTER), (E, HIDDEN)),
        "eo,eo",
    ),
    "three_lists": Case(
        "mm(2, gelu(mm(0, x)) * mm(1, x))",
        ((E, INTER, HIDDEN), (E, INTER, HIDDEN), (E, HIDDEN, INTER)),
        lambda ws, bs, e, x, w: ws[2][e] @ (F.gelu(ws[0][e] @ x) * (ws[1][e] @ x)),
        f"oi*{E},oi*{E},oi*{E}",
    ),
    "weighted_input_list_bias": Case(
        "relu(mm(0, x * w) + b(0))",
        ((E, HIDDEN, INTER),),
        lambda ws, bs, e, x, w: torch.relu((x * w) @ ws[0][e] + bs[0][e]),
        f"io*{E}",
        ((E, INTER),),
        f"o*{E}",
        weighted=True,
    ),
    "weighted_output": Case(
        "mm(1, square(relu(mm(0, x)))) * w",
        ((E, INTER, HIDDEN), (E, HIDDEN, INTER)),
        lambda ws, bs, e, x, w: (ws[1][e] @ torch.relu(ws[0][e] @ x).square()) * w,
        "eoi,eoi",
        weighted=True,
    ),
    "slices_that_do_not_tile": Case(
        f"mm(1, cols(mm(0, x), 0, {INTER}, 1) * cols(mm(0, x), 1, {INTER + 1}, 1) + stop(cols(mm(0, x), {INTER}, {2 * INTER}, 1)))",
        ((E, 2 * INTER, HIDDEN), (E, HIDDEN, INTER)),
        lambda ws, bs, e, x, w: ws[1][e] @ (lambda h: h[:INTER] * h[1 : INTER + 1] + h[INTER:].detach())(ws[0][e] @ x),
        "eoi,eoi",
    ),
    "a_slice_without_gradient": Case(
        f"mm(1, cols(mm(0, x), 0, {INTER}, 1) * stop(cols(mm(0, x), {INTER}, {2 * INTER}, 1)))",
        ((E, 2 * INTER, HIDDEN), (E, HIDDEN, INTER)),
        lambda ws, bs, e, x, w: ws[1][e] @ (lambda h: h[:INTER] * h[INTER:].detach())(ws[0][e] @ x),
        "eoi,eoi",
    ),
    "a_weight_twice_and_a_stopped_part": Case(
        "mm(0, tanh(mm(0, x)) * stop(sigmoid(x)))",
        ((E, HIDDEN, HIDDEN),),
        lambda ws, bs, e, x, w: ws[0][e] @ (torch.tanh(ws[0][e] @ x) * torch.sigmoid(x).detach()),
        "eoi",
    ),
}


def arguments(case: Case, ids: torch.Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Any]:
    """The op's arguments without the provider: random tensors, slots from ids [T, K]."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)

    def params(shapes: tuple[tuple[int, ...], ...], layout: str) -> list[torch.Tensor]:
        own = [rand(*shape) for shape in shapes]
        parts = zip(own, layout.split(","), strict=True) if own else ()
        return [t for tensor, entry in parts for t in ([tensor] if entry[0] == "e" else [p.clone() for p in tensor.unbind(0)])]

    order, offsets = counting_sort(ids, E)
    return [
        rand(ids.shape[0], HIDDEN), order, offsets, rand(*ids.shape) if case.weighted else None,
        params(case.weights, case.weight_layout), params(case.biases, case.bias_layout),
        case.program, case.weight_layout, case.bias_layout, ids.shape[1],
    ]  # fmt: skip


def by_expert(tensors: list[torch.Tensor], layout: str) -> list[Any]:
    """The tensors regrouped so that [j][e] is parameter j of expert e."""
    found, rest = [], list(tensors)
    for entry in layout.split(",") if layout else []:
        found.append(rest.pop(0) if entry[0] == "e" else [rest.pop(0) for _ in range(E)])
    return found


def slot_loop(case: Case, args: list[Any], ids: torch.Tensor) -> torch.Tensor:
    """y [T, K, O] slot by slot, in plain Python and torch: what the op has to equal, gradients included."""
    x, _, _, w, weights, biases = args[:6]
    ws, bs = by_expert(weights, case.weight_layout), by_expert(biases, case.bias_layout)
    zero = case.f(ws, bs, 0, x.new_zeros(HIDDEN), x.new_zeros(())) * 0
    rows = []
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            rows.append(case.f(ws, bs, e, x[t], None if w is None else w[t, k]) if 0 <= e < E else zero.detach())
    return torch.stack(rows).view(*ids.shape, -1) if rows else zero.detach().new_zeros((*ids.shape, zero.shape[-1]))


def with_grad(args: list[Any]) -> list[Any]:
    """Fresh leaves that require a gradient in place of the floating point tensors."""

    def leaf(value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(each) for each in value]
        return value.detach().clone().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value

    return [leaf(value) for value in args]


def leaves(args: list[Any]) -> list[torch.Tensor]:
    flat = [t for value in args for t in (value if isinstance(value, list) else [value])]
    return [t for t in flat if torch.is_tensor(t) and t.requires_grad]


def run(args: list[Any], provider: str) -> torch.Tensor:
    return experts.OP.overload(*args, provider)


def value_and_grads(y: torch.Tensor, args: list[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y and the gradients of all leaves for a fixed gradient of y; None (nothing flowed) counts as zeros."""
    seed = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
    own = leaves(args)
    found = torch.autograd.grad(y, own, seed, allow_unused=True) if y.requires_grad else [None] * len(own)
    return y.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(own, found, strict=True)]


IDS = {
    "mixed": [[0, 3], [3, 1], [2, 0], [4, 4]],
    "all_to_one": [[2, 2], [2, 2], [2, 2]],
    "no_expert": [[-1, 0], [5, 99], [-7, 4]],
    "one_token": [[1, 3]],
    "no_token": [],
    "k1": [[4], [0], [4], [1], [-1]],
    "k_all": [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]],
    "only_no_expert": [[-1, -1], [9, -1]],
}


def ids_of(name: str) -> torch.Tensor:
    rows = IDS[name]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(rows[0]) if rows else 2)
