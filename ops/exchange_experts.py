"""Op exchange_experts: dispatch over ranks, the experts of this rank, and combine, in one call for inference.

    out = combine(permute_experts_combine(quantize_dispatch(x, ids, moved)...))        (passes/fuse.py, on the way to Inductor)

Received rows never leave the op, so a provider may hand out views of its workspace (Exchange.dispatch_views), and the experts' rows may
stay in their sorted order up to the sum over a row's slots (Exchange.collect_slots): nothing is copied only to pass a stage.
"""

from __future__ import annotations

from typing import Any

import torch

from . import combine, experts, experts_batched, registry
from ._register import register_op
from .comm import exchange, payload
from .layout import quantises_rows
from .quantize_dispatch import received_slots

NAME = "exchange_experts"
# moved: routing weights [T, K] that travel; w_at, inner_at: which of them weighs the results, and which the program reads, -1: none.
# combine_weights: those that a batched provider applies at the source.
SCHEMA = (
    f"{NAME}(Tensor x_TH, Tensor ids_TK, Tensor[] moved_TK, int w_at, int inner_at, Tensor? combine_weights_TK, Tensor[] weights, "
    "Tensor[] biases, str program, str weight_layout, str bias_layout, int top_k, ScalarType? out_dtype, str comm, str experts, "
    "str parallel) -> Tensor out_TO"
)


def run(
    x_TH: Any, ids_TK: Any, moved: list[Any], w_at: int, inner_at: int, combine_weights: Any, weights: list[Any], biases: list[Any],
    program: str, weight_layout: str, bias_layout: str, top_k: int, out_dtype: Any, comm: str, provider: str, parallel: str,
) -> Any:  # fmt: skip
    own = exchange.exchange_of(comm, parallel, x_TH.device)
    got = own.dispatch_views(x_TH, ids_TK, moved)
    kernels = registry.get("experts", provider).kernels
    params = weights, biases, program, weight_layout, bias_layout, top_k
    if own.format == "batched" and experts_batched.NAME in kernels:
        return _in_place(x_TH, got, own, params, kernels[experts_batched.NAME], combine_weights, out_dtype)
    as_sent = _taken_as_sent(own, kernels, weight_layout)
    rows = experts.stand_in(got.rows, x_TH.dtype) if as_sent else _plain(got, own, x_TH.dtype)
    order, offsets = received_slots(got, own, may_read=not (x_TH.is_cuda and torch.cuda.is_current_stream_capturing()))
    w, inner = (got.weights[at] if at >= 0 else None for at in (w_at, inner_at))
    call = experts.prepare(rows, order, offsets, inner, *params)
    out_dtype = _result_dtype(call, w, combine_weights, out_dtype)
    if experts.SORTED in kernels and own.format == "standard":
        y, rows = kernels[experts.SORTED_E4M3](experts.with_e4m3(call, got.rows, got.scales)) if as_sent else kernels[experts.SORTED](call)
        return own.collect_slots(y, rows.view(got.ids.shape), w, got.handle, out_dtype)
    y_RO = torch.ops.moe_compile.permute_experts_combine(rows, order, offsets, inner, *params, w, out_dtype, provider)
    return own.collect(y_RO, got.handle, out_dtype, combine_weights)


def _taken_as_sent(own: Any, kernels: Any, weight_layout: str) -> bool:
    """Do e4m3 rows go straight into products with weights that want them so?"""
    return own.setup.quant != "none" and own.format == "standard" and experts.SORTED_E4M3 in kernels and quantises_rows(weight_layout)


def _plain(got: Any, own: Any, dtype: Any) -> Any:
    return got.rows if own.setup.quant == "none" else payload.dequantize(got.rows, got.scales, dtype)


def _in_place(x_TH: Any, got: Any, own: Any, params: tuple[Any, ...], kernel: Any, combine_weights: Any, out_dtype: Any) -> Any:
    """Rows of the batched format, computed where they lie."""
    batch = experts_batched.batch_of(got, own, x_TH.shape[0])
    as_sent = own.setup.quant != "none" and quantises_rows(params[3])
    rows = experts.stand_in(got.rows, x_TH.dtype) if as_sent else experts_batched.plain_rows(got, batch, x_TH.dtype)
    call = experts.prepare_unsorted(rows, batch.counts_E.shape[0], None, *params)
    call = experts.with_e4m3(call, got.rows, got.scales) if as_sent else call
    experts_batched.check(call, batch)
    out_dtype = _result_dtype(call, None, combine_weights, out_dtype)
    y_RO = kernel(call, batch)
    y_RO = y_RO.to(out_dtype) if out_dtype.itemsize < y_RO.dtype.itemsize else y_RO  # what travels back
    return own.collect(y_RO, got.handle, out_dtype, combine_weights)


def _result_dtype(call: experts.Call, w: Any, combine_weights: Any, out_dtype: Any) -> Any:
    weights = w if w is not None else combine_weights
    return combine.result_dtype(call.x.new_empty(0, dtype=call.values[-1].dtype), weights, out_dtype)


def _fake(*args: Any) -> Any:
    x, ids, moved, w_at, _, combine_weights, weights, biases, program, weight_layout, bias_layout, top_k, out_dtype, *_ = args
    first = x.new_empty((0, x.shape[1]))
    none = ids.new_empty((0,), dtype=torch.int64)
    offsets = ids.new_empty((_num_local(weights, weight_layout),), dtype=torch.int32)
    inner = None if args[4] < 0 else moved[args[4]].new_empty((0, top_k))
    call = experts.prepare(first, none, offsets, inner, weights, biases, program, weight_layout, bias_layout, top_k)
    dtype = _result_dtype(call, moved[w_at] if w_at >= 0 else None, combine_weights, out_dtype)
    return x.new_empty((x.shape[0], call.values[-1].width), dtype=dtype)


def _num_local(weights: list[Any], layout: str) -> int:
    entry = layout.split(",")[0].strip()
    return int(entry.partition("*")[2]) if "*" in entry else int(weights[0].shape[0])


OP = register_op(SCHEMA, run, _fake)
