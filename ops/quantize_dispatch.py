"""Stage op quantize_dispatch: which slots each expert has, and (for comm providers that move rows) their rows.

order    slot numbers n = t*K + k sorted stably by expert; slots whose id is not in [0, E) come last, or (over ranks) are left out
offsets  end of each expert's run in order, the `offs` of torch's grouped_mm

Over ranks (`parallel` is a setup text, comm/setup.py) the rows are those that this rank received, R of them, and order, offsets and
weights_RK speak of their R*K slots and of the experts of this rank. Gradients of rows and weights_RK travel back as they came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import registry
from ._register import below_autograd, register_composite, register_op
from .comm import exchange
from .comm.setup import Setup, local_range
from .kernels.plan import sort_ids
from .kernels.plan import supports as can_sort
from .sizes import dynamic_size

NAME = "quantize_dispatch"
SCHEMA = (
    f"{NAME}(Tensor x_TH, Tensor ids_TK, int num_experts, str quant, str provider, Tensor[]? weights_TK=None, str parallel='') -> "
    "(Tensor rows, Tensor scales, Tensor order, Tensor offsets, Tensor[] handle, Tensor[] weights_RK)"
)
BACKWARD_SCHEMA = (
    f"{NAME}_backward(Tensor? grad_RH, Tensor?[] grads_RK, Tensor[] handle, str provider, str parallel, ScalarType dtype) -> "
    "(Tensor dx_TH, Tensor[] dweights_TK)"
)
QUANT = ("none", "fp8")
EXACT_BYTES = 64 << 20  # of rows for all slots that could come, above which their true number is read back


def counting_sort(ids_TK: Any, num_experts: int, in_range: bool = False) -> tuple[Any, Any]:
    """order int64 [N], offsets int32 [E]. Reads nothing back to the host, so it can be captured in a CUDA graph.

    in_range: no id is outside of [0, E).
    """
    ids = ids_TK.reshape(-1)
    keys = ids if in_range else torch.where(ids < 0, num_experts, ids)  # ids >= E sort behind the experts by themselves
    sorted_keys, order = torch.sort(keys, stable=True)
    experts = torch.arange(num_experts, dtype=sorted_keys.dtype, device=ids.device)
    return order, torch.searchsorted(sorted_keys, experts, right=True, out_int32=True)


def sorted_slots(ids_TK: Any, num_experts: int) -> tuple[Any, Any]:
    """counting_sort; on a GPU by small kernels of our own instead of a sort. Not for graphs that are being traced."""
    if ids_TK.is_cuda and can_sort(ids_TK.device, num_experts) is None:
        return sort_ids(ids_TK, num_experts)
    return counting_sort(ids_TK, num_experts)


def local(x_TH: Any, ids_TK: Any, num_experts: int, quant: str) -> tuple[Any, ...]:
    """Provider "local": the experts read x itself, so rows and scales have no rows, and there is no handle."""
    if quant != "none":
        raise ValueError(f"provider 'local' moves no rows and quantises none, quant is {quant!r}; use quant='none'")
    order, offsets = sorted_slots(ids_TK, num_experts)
    return x_TH.new_empty((0, x_TH.shape[-1])), x_TH.new_empty(0, dtype=torch.float32), order, offsets, [], []


def _kernel(
    x_TH: Any, ids_TK: Any, num_experts: int, quant: str, provider: str, weights: Sequence[Any] | None = None, parallel: str = ""
) -> tuple[Any, ...]:
    if quant not in QUANT:
        raise ValueError(f"quant {quant!r} is not supported; supported: {', '.join(QUANT)}")
    if ids_TK.dim() != 2 or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64 [T, K], got {ids_TK.dtype} {tuple(ids_TK.shape)}")
    if not parallel:
        found: tuple[Any, ...] = registry.kernel("comm", provider, NAME)(x_TH, ids_TK, num_experts, quant)
        return found
    return _over_ranks(x_TH, ids_TK, list(weights or ()), exchange.exchange_of(provider, parallel, x_TH.device))


def _over_ranks(x_TH: Any, ids_TK: Any, weights: list[Any], own: Any) -> tuple[Any, ...]:
    got = own.dispatch(x_TH, ids_TK, weights)
    order, offsets = received_slots(got, own)
    return got.rows, got.scales, order, offsets, got.handle, got.weights


def received_slots(got: Any, own: Any, may_read: bool = True) -> tuple[Any, Any]:
    """(order, offsets) of what an exchange `own` brought; may_read: its number of slots may be read back to the host."""
    first, end = local_range(own.setup.num_experts, own.world, own.rank)
    ids = got.ids if got.ids is not None else exchange.place_ids(got.metadata.counts_E, got.rows.shape[0] // (end - first))
    order, offsets = sorted_slots(ids, end - first)
    if may_read and exact(own.setup, ids.shape[1], own.rows_known):
        order = order[: _used_slots(got, offsets, own.setup)].clone()
    return order, offsets


def _used_slots(got: Any, offsets: Any, setup: Setup) -> int:
    """Received slots with an expert of this rank: from the host's counts where these count each slot, else read from the device."""
    counts = None if got.metadata is None else got.metadata.counts_cpu
    if counts is not None and setup.ids_valid:
        return sum(counts)
    return int(offsets[-1].item()) if offsets.shape[0] else 0


def exact(setup: Setup, slots: int, rows_known: bool) -> bool:
    """Does order name the slots with an expert alone? Where the host learns their number anyway, and where those of the worst case
    would be large; never where nothing may be read back."""
    if not rows_known or setup.cuda_graphs:
        return not rows_known
    return setup.world * setup.max_tokens * slots * setup.hidden * setup.torch_dtype.itemsize > EXACT_BYTES


def _fake(
    x_TH: Any, ids_TK: Any, num_experts: int, quant: str, provider: str, weights: Sequence[Any] | None = None, parallel: str = ""
) -> tuple[Any, ...]:
    if parallel:
        return _fake_over_ranks(x_TH, ids_TK, weights, provider, Setup.parse(parallel))
    order = ids_TK.new_empty((ids_TK.shape[0] * ids_TK.shape[1],), dtype=torch.int64)
    offsets = ids_TK.new_empty((num_experts,), dtype=torch.int32)
    return x_TH.new_empty((0, x_TH.shape[-1])), x_TH.new_empty(0, dtype=torch.float32), order, offsets, [], []


def _fake_over_ranks(x_TH: Any, ids_TK: Any, weights: Sequence[Any] | None, provider: str, setup: Setup) -> tuple[Any, ...]:
    kernels = registry.get("comm", provider).kernels
    count = kernels[exchange.RECEIVED](x_TH.shape[0], setup)
    rows = dynamic_size(x_TH) if count is None else count
    slots = kernels[exchange.SLOTS](setup) if exchange.SLOTS in kernels else ids_TK.shape[1]
    known = count is not None
    first, end = local_range(setup.num_experts, setup.world, torch.distributed.get_rank(setup.process_group))
    fp8 = setup.quant == "fp8"
    return (
        x_TH.new_empty((rows, x_TH.shape[1]), dtype=torch.float8_e4m3fn if fp8 else x_TH.dtype),
        x_TH.new_empty((rows, -(-x_TH.shape[1] // exchange.SCALE_BLOCK)) if fp8 else (0,), dtype=torch.float32),
        ids_TK.new_empty((dynamic_size(x_TH) if exact(setup, slots, known) else rows * slots,), dtype=torch.int64),
        ids_TK.new_empty((end - first,), dtype=torch.int32),
        kernels[exchange.HANDLE](x_TH, ids_TK, rows, setup),
        [w.new_empty((rows, slots)) for w in weights or ()] if exchange.SLOTS not in kernels else [],
    )


class _Differentiable(torch.autograd.Function):
    """Rows and weights that travelled; nothing else that the op returns has a gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Any, num_experts: int, quant: str, provider: str, parallel: str, x: Any, *weights: Any) -> Any:
        with below_autograd():
            rows, scales, order, offsets, handle, moved = OP.overload(x, ids, num_experts, quant, provider, list(weights), parallel)
        ctx.save_for_backward(*handle)
        ctx.names, ctx.dtype, ctx.num_moved = (provider, parallel), x.dtype, len(moved)
        ctx.mark_non_differentiable(scales, order, offsets, *handle)
        ctx.set_materialize_grads(False)
        return (rows, scales, order, offsets, len(handle), *handle, *moved)

    @staticmethod
    def backward(ctx: Any, grad_rows: Any, *rest: Any) -> Any:
        grads = list(rest[len(rest) - ctx.num_moved :]) if ctx.num_moved else []
        with below_autograd():
            dx, dweights = BACKWARD_OP.overload(grad_rows, grads, list(ctx.saved_tensors), *ctx.names, ctx.dtype)
        dweights = [each if grad is not None else None for each, grad in zip(dweights, grads, strict=True)]
        return None, None, None, None, None, dx if grad_rows is not None else None, *dweights


def _autograd(
    x: Any, ids: Any, num_experts: int, quant: str, provider: str, weights: Sequence[Any] | None = None, parallel: str = ""
) -> tuple[Any, ...]:
    """Provider local moves no rows, so nothing that it returns has a gradient."""
    if not parallel or not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *(weights or ())))):
        with below_autograd():
            found: tuple[Any, ...] = OP.overload(x, ids, num_experts, quant, provider, weights, parallel)
            return found
    if quant != "none":
        raise ValueError(f"rows quantised as {quant!r} have no gradient; train with quant='none'")
    rows, scales, order, offsets, count, *rest = _Differentiable.apply(ids, num_experts, quant, provider, parallel, x, *(weights or ()))
    return rows, scales, order, offsets, rest[:count], rest[count:]


def _backward_kernel(grad: Any, grads: list[Any], handle: list[Any], provider: str, parallel: str, dtype: Any) -> tuple[Any, list[Any]]:
    own = exchange.exchange_of(provider, parallel, handle[0].device)
    dx = own.collect(grad, handle, dtype) if grad is not None else handle[0].new_empty(0, dtype=dtype)
    return dx, [handle[0].new_empty(0) if each is None else own.collect(each, handle, each.dtype) for each in grads]


def _backward_fake(grad: Any, grads: list[Any], handle: list[Any], provider: str, parallel: str, dtype: Any) -> tuple[Any, list[Any]]:
    tokens = handle[0].shape[0]
    dx = grad.new_empty((tokens, grad.shape[1]), dtype=dtype) if grad is not None else handle[0].new_empty(0, dtype=dtype)
    return dx, [handle[0].new_empty(0) if each is None else each.new_empty((tokens, each.shape[1])) for each in grads]


OP = register_op(SCHEMA, _kernel, _fake, _autograd)
BACKWARD_OP = register_op(BACKWARD_SCHEMA, _backward_kernel, _backward_fake)


def _sort_kernel(ids_TK: Any, num_experts: int, in_range: bool) -> tuple[Any, Any, Any, Any]:
    ids, top_k = ids_TK.reshape(-1), ids_TK.shape[1]
    order, offsets = counting_sort(ids, num_experts, in_range)
    tokens = order.div(top_k, rounding_mode="floor") if top_k else order.clone()
    return order, offsets, tokens, torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))


def _sort_fake(ids_TK: Any, num_experts: int, in_range: bool) -> tuple[Any, Any, Any, Any]:
    def slots() -> Any:
        return ids_TK.new_empty((ids_TK.shape[0] * ids_TK.shape[1],), dtype=torch.int64)

    return slots(), ids_TK.new_empty((num_experts,), dtype=torch.int32), slots(), slots()


# order and offsets as above; each sorted slot's token; each slot's place in order. in_range: every id is known to be in [0, E).
SORT_SCHEMA = (
    "sort_slots(Tensor ids_TK, int num_experts, bool in_range) -> (Tensor order_N, Tensor offsets_E, Tensor tokens_N, Tensor places_N)"
)
SORT_OP = register_op(SORT_SCHEMA, _sort_kernel, _sort_fake)
INLINE_SORT_OP = register_composite(SORT_SCHEMA.replace("sort_slots", "sort_slots_inline"), _sort_kernel)


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider: plain, duplicates with ids of no expert, no tokens."""
    x = torch.ones((3, 4), dtype=dtype, device=device)
    yield x, torch.tensor([[0, 3], [3, 1], [2, 0]], device=device), 4, "none"
    yield x, torch.tensor([[1, 1], [-1, 7], [0, 4]], device=device), 4, "none"
    yield x[:0], torch.empty((0, 2), dtype=torch.int64, device=device), 4, "none"
