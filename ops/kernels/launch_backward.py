"""Gradients of an expert program of two layers, y = h @ W (+ bias), h = epilogue(products of x, biases, w).

    forward   z = products of x, saved in the order of slots [N, OUT], in the model's dtype; h is not kept
    reverse   dh = grad @ W.T by the forward's GEMM; one pass computes h again from z, writes h * scale over dh, and dz, and sums up each
              row's gradients of scale and w
    weights   dW = (h * scale).T @ grad and dW_i = x.T @ dz_i for each expert; x and grad in sorted order
    x         dz @ W_i.T by the forward's GEMM, and one sum over a token's rows
In two halves, so that z can be freed between: reverse, and the gradients of weights and x. Scale is the weight of the sum over slots.
Sums of rows run in a fixed order: results are the same to the bit in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from moe_compile.ops.experts import Call, empty_grads
from moe_compile.ops.layout import Params
from moe_compile.ops.program import Program
from moe_compile.ops.replay import start

from . import configs_backward as configs
from . import fitting, launch
from .launch import PRECISION, Saves, biases_of, columns, descriptor, multiplied, processors, type_of
from .layers import Columns, Layer
from .plan import Plan, kept_rows


class Carried(NamedTuple):
    """What stands between the two halves of a backward; P = plan.kept_rows. Without elements where it is not wanted.

    grad [P, O]: of the slots' rows in sorted order, zeros in the padding; h [P, I] times the scale; dscale, dw float32 [T, K]: of the
    weights of the sum, and of the program's w; dz: [P, OUT] for each weight of the first products, zeros in the padding.
    """

    grad: Any
    h: Any
    dscale: Any
    dw: Any
    dz: tuple[Any, ...]

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Carried:
        grad, h, dscale, dw, *dz = tensors
        return cls(grad, h, dscale, dw, tuple(dz))

    def tensors(self) -> list[Any]:
        return [*self[:4], *self.dz]

    @staticmethod
    def of_last(layers: Sequence[Layer]) -> list[bool]:
        """Which of the tensors the gradients of the last layer's weight and bias are made of."""
        return [True, True, False, False, *(False for _ in first_weights(layers))]


def parameters_of_last(call: Call, layers: Sequence[Layer]) -> list[bool]:
    """Which of call.parameters() are the last layer's."""
    last = layers[-1]
    own = [{each.of for each in last.products}, {each.of for each in last.biases}]
    lists = [
        [j in of for j, slot in enumerate(p.slots) for _ in range(slot.num)] for p, of in zip((call.weights, call.biases), own, strict=True)
    ]
    return [False, False, *lists[0], *lists[1], *([False] if call.combined else [])]


@functools.lru_cache(maxsize=256)
def unfit(layers: tuple[Layer, ...], program: Program) -> str | None:
    """Why a program has no backward here."""
    text, stops = program.text, any(step.op == "stop" for step in program.steps)
    if sum(bool(layer.products) for layer in layers) != 2 or not _plain(layers[-1], program) or stops:
        return f"the backward takes two layers of products, the last with a bias at most, and no stop; {text!r} is not of that form"
    hidden = layers[-2]
    if {each.of for each in hidden.products} & {each.of for each in layers[-1].products} or (
        {each.of for each in hidden.biases} & {each.of for each in layers[-1].biases}
    ):
        return f"the backward takes layers with weights and biases of their own, {text!r} reads some in both"
    if any(each.step == 0 for each in hidden.products) or (
        len(hidden.products) > 1 and _overlap(hidden.products[0], hidden.products[1], hidden.width)
    ):
        return f"the backward takes products whose columns are read once, {text!r} reads some again"
    for at, bias in enumerate(hidden.biases):
        readers = [op for op in hidden.body if f"b{at}" in op.args]
        if len(readers) != 1 or readers[0].function != "add" or _added_to(hidden, readers[0].args, bias) is None:
            return f"the backward takes biases that are added to their product and read nowhere else, in {text!r}"
    return None


def _overlap(a: Columns, b: Columns, width: int) -> bool:
    """Do both read a column of one weight?"""
    first, second = (range(each.start, each.start + each.step * width, each.step) for each in (a, b))
    return a.of == b.of and not set(first).isdisjoint(second)


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


def first_weights(layers: Sequence[Layer]) -> list[int]:
    """The weights that dz are for, in their order."""
    return sorted({each.of for each in layers[-2].products})


def carried_types(call: Call, layers: Sequence[Layer], needs: Sequence[bool]) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """(shape, dtype) of Carried's tensors. Sizes may be symbolic."""
    hidden, last = layers[-2:]
    padded, slots = kept_rows(call.order.shape[0], call.offsets.shape[0]), (call.x.shape[0], call.top_k)
    return [
        ((padded, call.values[-1].width), last.operand),
        ((padded, hidden.width) if _wants_weights(call, needs) else (0,), last.operand),
        (slots if call.combined and call.combine_weights is not None else (0,), torch.float32),
        (slots if hidden.reads_w else (0,), torch.float32),
        *(((padded, call.weights.fan(j)[1]), hidden.operand) for j in first_weights(layers)),
    ]


def reverse(call: Call, layers: Sequence[Layer], grad: Any, z: Mapping[int, Any], needs: Sequence[bool], plan: Plan) -> Carried:
    """From grad, [T, O] of the sum over slots or [N, O] of each, to the first products. z is not read any more after it."""
    hidden, last = layers[-2:]
    share = call.top_k if call.combined else 1
    rows_PO = launch.spread(grad.contiguous().to(last.operand), plan, share, clear=True)
    dh_PI = launch.product(_turned(last), rows_PO, call.weights, hidden.width, plan)
    h, dz, dscale, dw = _through_epilogue(call, hidden, last, dh_PI, z, plan, _wants_weights(call, needs))
    if dscale.numel() and last.biases:
        _bias_of_last(call, last, rows_PO, dscale, plan)
    return Carried(rows_PO, rows_PO.new_empty(0) if h is None else h, dscale, dw, tuple(dz[j] for j in first_weights(layers)))


def _wants_weights(call: Call, needs: Sequence[bool]) -> bool:
    return any(needs[2 : 2 + len(call.weights.tensors)])


def gradients(call: Call, layers: Sequence[Layer], carried: Carried, needs: Sequence[bool], plan: Plan) -> list[Any]:
    """Gradients in call.parameters() order. What needs does not ask for is not read from carried."""
    split, (hidden, last) = 2 + len(call.weights.tensors), layers[-2:]
    changes = layers[0] if len(layers) > 2 else None
    x_TH = call.x if call.x.stride(-1) == 1 else call.x.contiguous()
    dz = dict(zip(first_weights(layers), carried.dz, strict=True))
    of_weights = [2 <= at < split for at in range(len(needs))]
    grads = empty_grads(call, [need and not own for need, own in zip(needs, of_weights, strict=True)])
    if call.combined and call.combine_weights is not None and needs[-1]:
        grads[-1].copy_(carried.dscale)
    if needs[1]:
        grads[1].copy_(carried.dw) if hidden.reads_w else grads[1].zero_()
    if needs[0] or (changes is not None and needs[1]):
        _rows_gradients(call, hidden, changes, x_TH, dz, plan, grads, needs)
    weights = empty_grads(call, [need and own for need, own in zip(needs, of_weights, strict=True)])[2:split]  # after rows, which need room
    j = last.products[0].of
    if _wanted(call.weights, j, weights):
        _weight(call, last, j, carried.h, carried.grad, weights, plan)
    if any(_wanted(call.weights, j, weights) for j in dz):
        _first_weights(call, hidden, changes, x_TH, dz, weights, plan)
    bias_grads, wanted = grads[split:], needs[split:]
    for j in {each.of for each in hidden.biases}:
        _bias(call, j, _rows_of_bias(hidden, j, dz), None, bias_grads, wanted, plan)
    for bias in last.biases:
        _bias(call, bias.of, carried.grad, _scale(call), bias_grads, wanted, plan)
    return [*grads[:2], *weights, *grads[split:]]


def _wanted(params: Params, j: int, grads: Sequence[Any]) -> bool:
    """Has weight j a gradient to be written?"""
    slot = params.slots[j]
    return any(each.numel() for each in grads[slot.first : slot.first + slot.num])


def _first_weights(
    call: Call, hidden: Layer, changes: Layer | None, x_TH: Any, dz: Mapping[int, Any], weights: Sequence[Any], plan: Plan
) -> None:
    """Of the first products, some columns of x at a time: its rows in sorted order are many times as large as x."""
    route_w = _route_w(call) if changes is not None else None
    step = configs.read_columns(x_TH.shape[1])
    for begin in range(0, x_TH.shape[1], step):
        part = x_TH[:, begin : begin + step]
        read_PH = launch.spread(part, plan, call.top_k, changes, route_w, clear=True)
        for j, each in dz.items():
            _weight(call, hidden, j, read_PH, each, weights, plan, begin)
        del read_PH


def _rows_gradients(
    call: Call, hidden: Layer, changes: Layer | None, x_TH: Any, dz: Mapping[int, Any], plan: Plan, grads: list[Any], needs: Sequence[bool]
) -> None:
    """Of x, and of w where rows were changed before their product."""
    drows_PH = _rows(call, hidden, dz, plan)
    if changes is not None:
        _through_changes(call, changes, x_TH, drows_PH, plan, grads, needs)
        return
    into = grads[0] if grads[0].is_contiguous() else None
    dx_TH = launch.add_up(drows_PH, plan, None, call.x.shape[0], call.top_k, call.x.dtype, into)
    if into is None:
        grads[0].copy_(dx_TH)


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


def _through_epilogue(
    call: Call, hidden: Layer, last: Layer, dh_PI: Any, z: Mapping[int, Any], plan: Plan, wants_h: bool
) -> tuple[Any, dict[int, Any], Any, Any]:
    """(h times the scale or None, dz by weight, each slot's gradients of the scale and of w, float32 [T, K], or [0] if not wanted)."""
    from .backward_gemm import reverse_kernel
    from .epilogue import adjoint_of

    padded, device = dh_PI.shape[0], dh_PI.device
    t = configs.reverse_rows(plan.block_rows, hidden.width)
    dz = {j: _new_gradient(hidden, j, padded, each) for j, each in z.items()}
    h = None if not wants_h else dh_PI if t.in_place and dh_PI.dtype == last.operand else torch.empty_like(dh_PI, dtype=last.operand)
    scale = _scale(call)
    slots = (call.x.shape[0], call.top_k)  # those without an expert have zeros
    per_slot = [torch.zeros(slots if each else 0, dtype=torch.float32, device=device) for each in (scale is not None, hidden.reads_w)]
    if padded:
        b, b_strides = biases_of(hidden, call.biases)
        first, second = hidden.products[0].of, hidden.products[-1].of
        two = len(hidden.products) > 1
        programs = min(padded // t.rows, t.each * processors(device))
        start(
            reverse_kernel, (programs,),
            dh_PI, *b, call.topk_weights.contiguous() if hidden.reads_w else plan.slots, scale, z[first], z[second] if two else None,
            dz[first], dz[second] if two else None, h, *(each if each.dim() == 2 else None for each in per_slot), plan.slots,
            plan.blocks, plan.num_blocks, plan.counts, plan.firsts, call.offsets, programs, hidden.width, dh_PI.stride(0), *b_strides,
            z[first].stride(0), z[second].stride(0), *columns(hidden), ADJOINT=adjoint_of(hidden), READS_W=hidden.reads_w,
            BIASES=len(hidden.biases), BM=plan.block_rows, ROWS=t.rows, BLOCK=t.cols, num_warps=t.warps,
        )  # fmt: skip
    return h, dz, per_slot[0], per_slot[1]


def _new_gradient(hidden: Layer, j: int, padded: int, like: Any) -> Any:
    """[P, OUT] for dz; zeros in columns that nothing reads."""
    read = hidden.width * sum(each.of == j for each in hidden.products)
    new = torch.empty if read == like.shape[1] else torch.zeros
    return new((padded, like.shape[1]), dtype=hidden.operand, device=like.device)


def _turned(layer: Layer, j: int | None = None) -> Layer:
    """The plain product by a weight whose outputs are read as inputs."""
    of = layer.products[0].of if j is None else j
    return Layer(layer.operand, (Columns(of, 0, 1),), (), False, 0, layer.operand, (), "p0")


def _rows(call: Call, hidden: Layer, dz: Mapping[int, Any], plan: Plan) -> Any:
    """[P, H]: the gradients of the rows that the hidden layer reads."""
    total = None
    for j, each in dz.items():
        part = launch.product(_turned(hidden, j), each, call.weights, call.x.shape[1], plan)
        total = part if total is None else total.add_(part)
    return total


def _weight(call: Call, layer: Layer, j: int, rows_P: Any, grad_P: Any, grads: Sequence[Any], plan: Plan, begin: int = 0) -> None:
    """Weight j's gradient rows.T @ grad for each expert, of inputs begin on, into its place in grads.

    Padding is zero in one of both, and finite.
    """
    slot = call.weights.slots[j]
    given = grads[slot.first : slot.first + slot.num]
    if not _wanted(call.weights, j, grads):
        return
    fan_in, fan_out = rows_P.shape[1], call.weights.fan(j)[1]
    like = next(each for each in given if each.numel())
    whole = [each if each.numel() else torch.empty_like(like) for each in given]
    axis = like.dim() - 2 + slot.axes.index("i")
    parts = [each.narrow(axis, begin, fan_in) for each in whole]
    own = launch.alike(parts) if not slot.stacked else _rows_whole(parts)
    _, stride_in, stride_out = launch.strides_of(slot, own[0])
    sides = [(rows_P, fan_in, stride_in), (grad_P, fan_out, stride_out)]
    if stride_in == 1:  # the kernel's columns are next to each other in the gradient
        sides.reverse()
    (a, high, stride), (b, wide, _) = sides
    own_or_table = own[0] if slot.stacked else launch.table(own)
    to = own_or_table, own[0].stride(0) if slot.stacked else 0, stride, "stack" if slot.stacked else "table", type_of(own[0].dtype)
    tiles = configs.weight_tiles(high, wide, layer.operand.itemsize, plan.block_rows)
    fitting.start(
        tiles, ("gradient", layer.operand, high, wide, a.device), configs.smaller,
        lambda fit: _products_by_expert(fit, a, b, (high, wide), to, layer.operand, plan), f"the gradient of weight {j} on {a.device}",
    )  # fmt: skip
    for part, written in zip(parts, own, strict=True):
        if part is not written:
            part.copy_(written)


def _products_by_expert(t: configs.Grid, a: Any, b: Any, sizes: tuple[int, int], to: tuple[Any, ...], dtype: Any, plan: Plan) -> None:
    """a.T @ b [high, wide] of each expert's rows, to: (where, strides of experts and of rows, and how the kernel writes it)."""
    from .backward_gemm import weight_kernel

    (high, wide), (out, of_expert, of_row, form, out_type) = sizes, to
    tiles_a, tiles_b, experts, device = -(-high // t.rows), -(-wide // t.cols), plan.counts.shape[0], plan.counts.device
    boxed = [launch.describable(each, each.dtype) for each in (a, b)]
    programs = min(experts * tiles_a * tiles_b, t.each * processors(device))
    start(
        weight_kernel, (programs,),
        descriptor(a, [t.depth, t.rows]) if boxed[0] else a, descriptor(b, [t.depth, t.cols]) if boxed[1] else b, out, plan.counts,
        plan.firsts, high, wide, tiles_a, tiles_b, programs, experts, a.stride(0), b.stride(0), of_expert, of_row,
        A_FROM="tma" if boxed[0] else "rows", B_FROM="tma" if boxed[1] else "rows", OUT_FROM=form, OUT_TYPE=out_type,
        DTYPE=multiplied(dtype, device), PRECISION=PRECISION.get(dtype, "tf32"), BM=t.rows, BN=t.cols, BK=t.depth, FLAT=t.flat,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip


def _rows_whole(own: Sequence[Any]) -> list[Any]:
    """The stacked gradient, or another in its place where neither inputs nor outputs are next to each other."""
    (only,) = own
    return [only if 1 in only.stride()[1:] else torch.empty(only.shape, dtype=only.dtype, device=only.device)]


def _scale(call: Call) -> Any:
    """The weights [T, K] of the sum over slots, or None."""
    return call.combine_weights.contiguous() if call.combined and call.combine_weights is not None else None


def _bias_of_last(call: Call, last: Layer, grad_PO: Any, dscale_TK: Any, plan: Plan) -> None:
    """What the last layer's bias adds to the gradient of scale."""
    from .backward_gemm import bias_dot_kernel

    (bias, _), (stride, _) = biases_of(last, call.biases)
    if plan.blocks.shape[0]:
        start(
            bias_dot_kernel, (plan.blocks.shape[0],),
            grad_PO, bias, dscale_TK, plan.slots, plan.blocks, plan.num_blocks, grad_PO.shape[1], grad_PO.stride(0), stride,
            BM=plan.block_rows, BLOCK=64,
        )  # fmt: skip


def _rows_of_bias(hidden: Layer, j: int, dz: Mapping[int, Any]) -> Any:
    """dz of the product that bias j is added to: their gradients are the same."""
    at = next(at for at, each in enumerate(hidden.biases) if each.of == j)
    product = _added_to(hidden, next(op for op in hidden.body if f"b{at}" in op.args).args, hidden.biases[at])
    assert product is not None
    return dz[product.of]


def _bias(call: Call, j: int, rows_P: Any, scale: Any, grads: Sequence[Any], needs: Sequence[bool], plan: Plan) -> None:
    """Bias j's gradient: the sum over an expert's rows, each times its scale."""
    from .backward_gemm import column_kernel

    slot = call.biases.slots[j]
    if not any(needs[slot.first : slot.first + slot.num]):
        return
    whole = torch.empty((plan.counts.shape[0], rows_P.shape[1]), dtype=torch.float32, device=plan.counts.device)
    block = 128
    start(
        column_kernel, (whole.shape[0], -(-whole.shape[1] // block)),
        rows_P, scale, whole, plan.slots, plan.counts, plan.firsts, whole.shape[1], rows_P.stride(0), whole.stride(0),
        BK=32, BLOCK=block,
    )  # fmt: skip
    for at, part in enumerate([whole] if slot.stacked else whole.unbind(0), slot.first):
        if needs[at]:
            grads[at].copy_(part)
