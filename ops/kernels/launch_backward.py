"""Gradients of an expert program of two layers, y = h @ W (+ bias), h = epilogue(products of x, biases, w).

    forward   z = products of x, saved in the order of slots [N, OUT], in the model's dtype; h is not kept
    reverse   one kernel: dh = scale * (grad @ W.T); h and dz from z in registers; h * scale, dz and each row's gradients of scale and w
    weights   dW = (h * scale).T @ grad and dW_i = x.T @ dz_i for each expert, x and grad read through the slots
    x         dz @ W_i.T by the forward's GEMM, and one sum over a token's rows
Scale is the weight of the sum over slots. Sums of rows run in a fixed order: results are the same to the bit in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from moe_compile.ops.experts import Call, empty_grads
from moe_compile.ops.program import Program

from . import configs_backward as configs
from . import launch
from .launch import PRECISION, Saves, biases_of, columns, multiplied, processors, type_of
from .layers import Columns, Layer
from .plan import Plan


class Reversed(NamedTuple):
    """dz [P, OUT] by weight number; h [P, I] times the scale; dscale, dw float32 [P] or None."""

    dz: Mapping[int, Any]
    h: Any
    dscale: Any
    dw: Any


def unfit(layers: Sequence[Layer], program: Program) -> str | None:
    """Why a program has no backward here."""
    text, stops = program.text, any(step.op == "stop" for step in program.steps)
    if sum(bool(layer.products) for layer in layers) != 2 or not _plain(layers[-1], program) or stops:
        return f"the backward takes two layers of products, the last with a bias at most, and no stop; {text!r} is not of that form"
    hidden = layers[-2]
    for at, bias in enumerate(hidden.biases):
        readers = [op for op in hidden.body if f"b{at}" in op.args]
        if len(readers) != 1 or readers[0].function != "add" or _added_to(hidden, readers[0].args, bias) is None:
            return f"the backward takes biases that are added to their product and read nowhere else, in {text!r}"
    return None


def _plain(last: Layer, program: Program) -> bool:
    """Is the result a product, or a product and a bias?"""
    whole = all((each.start, each.step) == (0, 1) for each in (*last.products, *last.biases))
    ends = [program.steps[-1], *(program.steps[arg] for arg in program.steps[-1].args)]
    if len(last.products) != 1 or not whole:
        return False
    if not last.body:
        return ends[0].op == "mm"
    added = len(last.body) == 1 and last.body[0].function == "add" and set(last.body[0].args) == {"p0", "b0"}
    return added and {step.op for step in ends[1:]} == {"mm", "b"}


def _added_to(layer: Layer, args: tuple[str, ...], bias: Columns) -> Columns | None:
    """The product that a bias is added to, if that is all that happens to it and both have the same columns."""
    names = [arg for arg in args if arg.startswith("p")]
    if len(names) != 1 or sum(op.args.count(names[0]) for op in layer.body) != 1:
        return None
    product = layer.products[int(names[0][1:])]
    return product if (product.start, product.step) == (bias.start, bias.step) else None


def saved_products(call: Call, layers: Sequence[Layer], saved: Sequence[Any], kept: Sequence[int], plan: Plan) -> dict[int, Any]:
    """z by weight number: what the forward saved, and the rest computed again."""
    hidden = layers[-2]
    read = {each.of for each in hidden.products}
    given = {call.program.steps[step].attrs[0]: tensor for step, tensor in zip(kept, saved, strict=True)}
    found = {j: tensor for j, tensor in given.items() if j in read}
    missing = sorted(read - found.keys())
    if missing:
        found |= {j: new_product(call, hidden, j) for j in missing}
        again = Saves({j: found[j] for j in missing}, call.offsets)
        launch.run(tuple(layers[:-1]), call.x.contiguous(), _route_w(call), call.weights, call.biases, call.top_k, plan, again)
    return found


def new_product(call: Call, layer: Layer, j: int) -> Any:
    return call.x.new_empty((call.order.shape[0], call.weights.fan(j)[1]), dtype=layer.operand)


def gradients(call: Call, layers: Sequence[Layer], grad: Any, z: Mapping[int, Any], needs: Sequence[bool], plan: Plan) -> list[Any]:
    """Gradients in call.parameters() order; grad [T, O] of the sum over slots, or [N, O] of each."""
    grads = empty_grads(call, needs)
    split, num_weights = 2 + len(call.weights.tensors), len(call.weights.tensors)
    hidden, last = layers[-2:]
    changes = layers[0] if len(layers) > 2 else None
    grad, share = grad.contiguous(), call.top_k if call.combined else 1
    found = _reverse(call, hidden, last, grad, share, z, plan, wants_h=any(needs[2:split]))
    if found.dscale is not None and last.biases:
        _bias_of_last(call, last, grad, share, found.dscale, plan)
    if call.combined and call.combine_weights is not None and needs[-1]:
        _to_slots(found.dscale, plan, grads[-1])
    if needs[1]:
        if found.dw is None:
            grads[1].zero_()
        else:
            _to_slots(found.dw, plan, grads[1])
    x_TH = call.x if call.x.stride(-1) == 1 else call.x.contiguous()
    weight_grads = grads[2:split]
    if found.h is not None:
        read = (x_TH, call.top_k) if changes is None else (launch.spread(x_TH, plan, call.top_k, changes, _route_w(call)), 0)
        _weight(call, last, last.products[0].of, (found.h, 0), (grad, share), weight_grads, plan)
        for j, dz in found.dz.items():
            _weight(call, hidden, j, read, (dz, 0), weight_grads, plan)
    bias_grads, wanted = grads[2 + num_weights :], needs[2 + num_weights :]
    for j in {each.of for each in hidden.biases}:
        _bias(call, j, (_rows_of_bias(hidden, j, found.dz), 0), None, bias_grads, wanted, plan)
    for each in last.biases:
        _bias(call, each.of, (grad, share), _scale(call), bias_grads, wanted, plan)
    if needs[0] or (changes is not None and needs[1]):
        drows_PH = _rows(call, hidden, found.dz, plan)
        if changes is None:
            grads[0].copy_(launch.add_up(drows_PH, plan, None, call.x.shape[0], call.top_k, call.x.dtype))
        else:
            _through_changes(call, changes, x_TH, drows_PH, plan, grads, needs)
    return grads


def _through_changes(call: Call, changes: Layer, x_TH: Any, drows_PH: Any, plan: Plan, grads: list[Any], needs: Sequence[bool]) -> None:
    """Gradients of x and w where rows were changed before their product."""
    dx_TH = grads[0] if needs[0] and grads[0].stride(-1) == 1 else torch.empty_like(x_TH)
    wants_w = needs[1] and changes.reads_w
    dw_TK = torch.zeros((x_TH.shape[0], call.top_k), dtype=torch.float32, device=x_TH.device) if wants_w else None
    launch.unspread(x_TH, drows_PH, plan, changes, _route_w(call), dx_TH, dw_TK)
    if needs[0] and dx_TH is not grads[0]:
        grads[0].copy_(dx_TH)
    if dw_TK is not None:
        grads[1].add_(dw_TK.to(grads[1].dtype))


def _route_w(call: Call) -> Any:
    return None if call.topk_weights is None else call.topk_weights.contiguous()


def _reverse(call: Call, hidden: Layer, last: Layer, grad: Any, share: int, z: Mapping[int, Any], plan: Plan, wants_h: bool) -> Reversed:
    from .backward_gemm import reverse_kernel
    from .epilogue import adjoint_of

    padded, device = plan.slots.shape[0], grad.device
    t = configs.reverse_tiles(plan.block_rows, hidden.width, grad.shape[1], last.operand.itemsize)
    num_tiles = -(-hidden.width // t.cols)
    dz = {j: torch.empty((padded, each.shape[1]), dtype=hidden.operand, device=device) for j, each in z.items()}
    h = torch.empty((padded, hidden.width), dtype=last.operand, device=device) if wants_h else None
    scale = _scale(call)
    wanted = (scale is not None, hidden.reads_w)
    per_tile = [torch.zeros((num_tiles, padded), dtype=torch.float32, device=device) if each else None for each in wanted]
    if padded:
        w = launch.weights_of(_turned(last), call.weights, t, turned=True)
        b, b_strides = biases_of(hidden, call.biases)
        first, second = hidden.products[0].of, hidden.products[-1].of
        two = len(hidden.products) > 1
        route_w = call.topk_weights.contiguous() if hidden.reads_w else plan.slots
        programs = min(padded // plan.block_rows * num_tiles, 4 * processors(device))
        reverse_kernel[(programs,)](
            grad, w.operands[0], *b, route_w, scale, z[first], z[second] if two else None, dz[first], dz[second] if two else None, h,
            *per_tile,
            plan.slots, plan.blocks, plan.num_blocks, plan.counts, plan.firsts, call.offsets, num_tiles, programs, padded,
            grad.shape[1], hidden.width, grad.stride(0), *w.strides[:3], *b_strides, z[first].stride(0), z[second].stride(0), hidden.width,
            *columns(hidden), ADJOINT=adjoint_of(hidden), READS_W=hidden.reads_w, BIASES=len(hidden.biases), SHARE=share,
            W_FROM=w.source, W_TYPE=type_of(w.dtype), DTYPE=multiplied(last.operand, device), TRANSPOSED=w.transposed,
            EVEN=grad.shape[1] % t.depth == 0, PRECISION=PRECISION.get(last.operand, "tf32"), BM=t.rows, BN=t.cols, BK=t.depth,
            GROUP=t.group, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    dscale, dw = (None if each is None else each.sum(0) for each in per_tile)
    return Reversed(dz, h, dscale, dw)


def _turned(layer: Layer, j: int | None = None) -> Layer:
    """The plain product by a weight whose outputs are read as inputs."""
    of = layer.products[0].of if j is None else j
    return Layer(layer.operand, (Columns(of, 0, 1),), (), False, 0, layer.operand, (), "p0")


def _to_slots(values_P: Any, plan: Plan, out_TK: Any) -> None:
    rows = plan.rows.long()
    found = values_P.index_select(0, rows.clamp(min=0)) if values_P.numel() else values_P.new_zeros(rows.shape)
    out_TK.copy_(torch.where(rows >= 0, found, 0).view(out_TK.shape))


def _rows(call: Call, hidden: Layer, dz: Mapping[int, Any], plan: Plan) -> Any:
    """[P, H]: the gradients of the rows that the hidden layer reads."""
    total = None
    for j, each in dz.items():
        part = launch.product(_turned(hidden, j), each, call.weights, call.x.shape[1], plan)
        total = part if total is None else total.add_(part)
    return total


def _weight(call: Call, layer: Layer, j: int, rows: tuple[Any, int], grad: tuple[Any, int], grads: Sequence[Any], plan: Plan) -> None:
    """Weight j's gradient rows.T @ grad for each expert, into its place in grads. Each with its share: 0 for [P, .], else slots a row."""
    from .backward_gemm import weight_kernel

    slot = call.weights.slots[j]
    own = grads[slot.first : slot.first + slot.num]
    if not any(each.numel() for each in own):
        return
    like = next(each for each in own if each.numel())
    own = launch.alike([each if each.numel() else torch.empty_like(like) for each in own]) if not slot.stacked else own
    (fan_in, fan_out), (_, stride_in, stride_out) = call.weights.fan(j), launch.strides_of(slot, own[0])
    t = configs.weight_tiles(fan_in, fan_out, layer.operand.itemsize)
    tiles_a, tiles_b, experts = -(-fan_in // t.rows), -(-fan_out // t.cols), plan.counts.shape[0]
    programs = min(experts * tiles_a * tiles_b, 4 * processors(plan.counts.device))
    weight_kernel[(programs,)](
        rows[0], grad[0], own[0] if slot.stacked else launch.table(own), plan.slots, plan.counts, plan.firsts, fan_in, fan_out, tiles_a,
        tiles_b, programs, rows[0].stride(0), grad[0].stride(0), own[0].stride(0) if slot.stacked else 0, stride_in, stride_out, E=experts,
        SHARE_A=rows[1], SHARE_B=grad[1], OUT_FROM="stack" if slot.stacked else "table", OUT_TYPE=type_of(own[0].dtype),
        DTYPE=multiplied(layer.operand, plan.counts.device), PRECISION=PRECISION.get(layer.operand, "tf32"), BM=t.rows, BN=t.cols,
        BK=t.depth, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    for given, written in zip(grads[slot.first : slot.first + slot.num], own, strict=True):
        if given.numel() and given is not written:
            given.copy_(written)


def _scale(call: Call) -> Any:
    """The weights [T, K] of the sum over slots, or None."""
    return call.combine_weights.contiguous() if call.combined and call.combine_weights is not None else None


def _bias_of_last(call: Call, last: Layer, grad: Any, share: int, dscale_P: Any, plan: Plan) -> None:
    """What the last layer's bias adds to the gradient of scale."""
    from .backward_gemm import bias_dot_kernel

    (bias, _), (stride, _) = biases_of(last, call.biases)
    if plan.slots.shape[0]:
        bias_dot_kernel[(plan.blocks.shape[0],)](
            grad, bias, dscale_P, plan.slots, plan.blocks, plan.num_blocks, grad.shape[1], grad.stride(0), stride, SHARE=share,
            BM=plan.block_rows, BLOCK=64,
        )  # fmt: skip


def _rows_of_bias(hidden: Layer, j: int, dz: Mapping[int, Any]) -> Any:
    """dz of the product that bias j is added to: their gradients are the same."""
    at = next(at for at, each in enumerate(hidden.biases) if each.of == j)
    product = _added_to(hidden, next(op for op in hidden.body if f"b{at}" in op.args).args, hidden.biases[at])
    assert product is not None
    return dz[product.of]


def _bias(call: Call, j: int, rows: tuple[Any, int], scale: Any, grads: Sequence[Any], needs: Sequence[bool], plan: Plan) -> None:
    """Bias j's gradient: the sum over an expert's rows, each times its scale. rows with their share, as for _weight."""
    from .backward_gemm import column_kernel

    slot = call.biases.slots[j]
    if not any(needs[slot.first : slot.first + slot.num]):
        return
    whole = torch.empty((plan.counts.shape[0], rows[0].shape[1]), dtype=torch.float32, device=plan.counts.device)
    block = 128
    column_kernel[(whole.shape[0], -(-whole.shape[1] // block))](
        rows[0], scale, whole, plan.slots, plan.counts, plan.firsts, whole.shape[1], rows[0].stride(0), whole.stride(0), SHARE=rows[1],
        BK=32, BLOCK=block,
    )  # fmt: skip
    for at, part in enumerate([whole] if slot.stacked else whole.unbind(0), slot.first):
        if needs[at]:
            grads[at].copy_(part)
