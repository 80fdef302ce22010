"""Stage op permute_experts_unpermute: each slot's row through its expert, results in slot order; and its backward op.

y[t, k] = f_e(x[t], w[t, k])   with e the expert of slot n = t*K + k, f the program (ops/program.py)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import registry
from ._register import below_autograd, register_op
from .evaluate import Needs, reverse_plan
from .infer import Inputs, Value, infer
from .layout import Params, quantised
from .program import Program, parse
from .quantize_dispatch import counting_sort
from .quantized import LONGEST_ROW, ROWS_TOO, rounded_rows, stored

NAME = "permute_experts_unpermute"
ARGS_WITHOUT_PROVIDER = (
    "Tensor x_TH, Tensor order_N, Tensor offsets_E, Tensor? topk_weights_TK, Tensor[] weights, Tensor[] biases, "
    "str program, str weight_layout, str bias_layout, int top_k"
)
_ARGS = f"{ARGS_WITHOUT_PROVIDER}, str provider"
SCHEMA = f"{NAME}({_ARGS}) -> Tensor"
SAVING = NAME + "_saving"
SAVING_SCHEMA = f"{SAVING}({_ARGS}, bool[] needs_grad) -> (Tensor y_TKO, Tensor[] saved)"
BACKWARD = NAME + "_backward"
SORTED = "permute_experts"  # (call) -> (y, int32 [N] the row of each slot in it, -1 for those of no expert)
SORTED_E4M3 = "permute_experts_e4m3"  # the same of e4m3 rows with call.x_scales
LOCAL = "local_experts"  # (call without order, ids [T, K], number of experts, out dtype) -> out [T, O]: local_experts.py
COMBINED = "permute_experts_combine"  # these three: experts_combine.py
COMBINED_SAVING = COMBINED + "_saving"
COMBINED_BACKWARD = COMBINED + "_backward"
REVERSE = COMBINED + "_reverse"  # these four: experts_two_steps.py
CARRIED = COMBINED + "_carried"
GRADIENTS = COMBINED + "_gradients"
LAST = COMBINED + "_last"
SHARED = "permute_experts_shared"  # (call) -> (shape, dtype) of what the saving ops save behind the products, for all ops of a backward
BACKWARD_SCHEMA = f"{BACKWARD}(Tensor grad_TKO, Tensor[] saved, {_ARGS}, bool[] needs_grad) -> Tensor[]"

# (rtol, atol) of a provider against the reference in float64, for values around one
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (2e-3, 2e-3),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, prepared for a provider.

    x [T, H]; order int64 [N], slots sorted by expert, slots of no expert last or left out; offsets int32 [E], end of each expert's
    run in order; topk_weights [T, K] or None; values: the type of each step of the program. combined: the slots are
    summed too, with combine_weights [T, K] or None (experts_combine.py). x_scales: float32 [T, ceil(H / 128)] of e4m3 rows, only for
    providers with a kernel for SORTED_E4M3.
    """

    x: Any
    order: Any
    offsets: Any
    topk_weights: Any
    weights: Params
    biases: Params
    program: Program
    values: tuple[Value, ...]
    top_k: int
    combined: bool = False
    combine_weights: Any = None
    x_scales: Any = None

    def rows_seen(self, index: int, rows: Any) -> Any:
        """Rows as the product of step `index` multiplies them: of weights that ask for it as e4m3, there and back.

        Rows that came through a product have a scale for each 128 columns, as the kernels that made them write.
        """
        step = self.program.steps[index]
        kind = self.weights.slots[step.attrs[0]].kind
        if kind not in ROWS_TOO:
            return rows
        behind = any(_has_product(self.program, arg) for arg in step.args)
        return rounded_rows(rows, behind or stored(kind) == "fp8_block" or rows.shape[1] > LONGEST_ROW)

    @property
    def out_shape(self) -> tuple[Any, Any, Any]:
        return self.x.shape[0], self.top_k, self.values[-1].width

    def parameters(self) -> list[Any]:
        """Every differentiable argument in the order of needs_grad: x, topk_weights, weights, biases (, combine_weights)."""
        own = [self.x, self.topk_weights, *self.weights.tensors, *self.biases.tensors]
        return [*own, self.combine_weights] if self.combined else own

    def needs(self, needs_grad: Sequence[bool]) -> Needs:
        """needs_grad by slot: a parameter of several tensors needs one if any of them does."""
        split = 2 + len(self.weights.tensors)

        def any_of(params: Params, flags: Sequence[bool]) -> tuple[bool, ...]:
            return tuple(any(flags[slot.first : slot.first + slot.num]) for slot in params.slots)

        weights, biases = any_of(self.weights, needs_grad[2:split]), any_of(self.biases, needs_grad[split:])
        return Needs(needs_grad[0], needs_grad[1], weights, biases, self.combined and needs_grad[-1])


def _has_product(program: Program, at: int) -> bool:
    step = program.steps[at]
    return step.op == "mm" or any(_has_product(program, arg) for arg in step.args)


def refuse_gradients(weight_layout: str) -> None:
    """Raises ValueError where a gradient is wanted through quantised weights."""
    if quantised(weight_layout):
        raise ValueError(
            f"experts with quantised weights (layout {weight_layout!r}) have no gradients; call them under torch.no_grad(), "
            "or train with weights of a float type"
        )


def unfit_for_training(problem: registry.Problem) -> str | None:
    """What a provider says of gradients through quantised weights."""
    if problem.training and quantised(problem.weight_layout):
        return f"quantised weights (layout {problem.weight_layout!r}) have no gradients"
    return None


def prepare(x: Any, order: Any, offsets: Any, *inputs: Any) -> Call:
    """The call of a stage op's arguments without the provider."""
    return dataclasses.replace(prepare_unsorted(x, offsets.shape[0], *inputs), order=order, offsets=offsets)


def with_e4m3(call: Call, rows: Any, scales: Any) -> Call:
    """The call of stand-in rows with the e4m3 rows [T, H] and scales [T, ceil(H / 128)] that an exchange brought."""
    return dataclasses.replace(call, x=rows, x_scales=scales)


def stand_in(rows: Any, dtype: torch.dtype) -> Any:
    """Rows of a dtype and of the same shape that take no memory: what a call of e4m3 rows is prepared with."""
    return torch.empty((), dtype=dtype, device=rows.device).expand(rows.shape)


def prepare_unsorted(
    x: Any,
    num_experts: int,
    topk_weights: Any,
    weights: list[Any],
    biases: list[Any],
    program: str,
    weight_layout: str,
    bias_layout: str,
    top_k: int,
) -> Call:
    """A call whose slots are not sorted yet: order and offsets are None.

    Checks the arguments against each other (no data is read) and infers the types of the program's values.
    """
    parsed = parse(program)
    weight_params = Params(weights, weight_layout, num_experts, "weight")
    bias_params = Params(biases, bias_layout, num_experts, "bias")
    _check(parsed, x, weight_params, bias_params, topk_weights, top_k)
    values = infer(
        parsed,
        Inputs(
            Value(x.shape[1], x.dtype),
            None if topk_weights is None else Value(1, topk_weights.dtype),
            tuple(weight_params.fan(j) for j in range(len(weight_params.slots))),
            tuple(Value(tensor.shape[-1], tensor.dtype) for tensor in bias_params.firsts()),
        ),
    )
    return Call(x, None, None, topk_weights, weight_params, bias_params, parsed, values, top_k)


def combined(call: Call, combine_weights: Any) -> Call:
    """The same call with the sum over a token's slots."""
    if combine_weights is not None and combine_weights.dim() != 2:
        raise ValueError(f"combine_weights must be [T, K], got shape {tuple(combine_weights.shape)}")
    return dataclasses.replace(call, combined=True, combine_weights=combine_weights)


def _check(program: Program, x: Any, weights: Params, biases: Params, topk_weights: Any, top_k: int) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [T, H], got shape {tuple(x.shape)}; flatten batch and sequence first")
    if top_k < 1 or (topk_weights is not None and topk_weights.shape[-1] != top_k):
        given = None if topk_weights is None else tuple(topk_weights.shape)
        raise ValueError(f"top_k is {top_k}, topk_weights has shape {given}; they must agree and be at least 1")
    for name, wanted, slots in (("weight", program.num_weights, weights), ("bias", program.num_biases, biases)):
        if wanted > len(slots.slots):
            raise ValueError(f"expert program {program.text!r} reads {name} {wanted - 1}, layout has {len(slots.slots)}")


def _kernel(*args: Any) -> Any:
    *inputs, provider = args
    call = prepare(*inputs)
    check_slots(call)
    return registry.kernel("experts", provider, NAME)(call)


def check_slots(call: Call) -> None:
    slots = call.x.shape[0] * call.top_k
    if call.order.dim() != 1 or call.order.numel() > slots or call.order.dtype != torch.int64 or call.offsets.dtype != torch.int32:
        raise ValueError(
            f"order must be int64 of up to {slots} slots (T*K) and offsets int32 [E], got {call.order.dtype} "
            f"{tuple(call.order.shape)} and {call.offsets.dtype}; take them from quantize_dispatch"
        )


def _fake(*args: Any) -> Any:
    call = prepare(*args[:-1])
    return call.x.new_empty(call.out_shape, dtype=call.values[-1].dtype)


def _saving_kernel(*args: Any) -> tuple[Any, list[Any]]:
    """y, and the products that the backward reads, one [N, out] a product in sorted order (none: it recomputes)."""
    *inputs, provider, needs_grad = args
    call = prepare(*inputs)
    check_slots(call)
    if not _saves(provider):
        return registry.kernel("experts", provider, NAME)(call), []
    y, saved = registry.kernel("experts", provider, SAVING)(call, needs_grad)
    return y, saved


def _saving_fake(*args: Any) -> tuple[Any, list[Any]]:
    *inputs, provider, needs_grad = args
    call = prepare(*inputs)
    y = call.x.new_empty(call.out_shape, dtype=call.values[-1].dtype)
    return y, new_saved(call, provider, needs_grad) if _saves(provider) else []


def new_saved(call: Call, provider: str, needs_grad: Sequence[bool]) -> list[Any]:
    """Unfilled tensors as a provider's saving ops give them."""
    return [*empty_saved(call, needs_grad), *(call.x.new_empty(shape, dtype=dtype) for shape, dtype in shared_types(call, provider))]


def shared_types(call: Call, provider: str) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    types = registry.get("experts", provider).kernels.get(SHARED)
    return [] if types is None else list(types(call))


def _saves(provider: str) -> bool:
    return SAVING in registry.get("experts", provider).kernels


def empty_saved(call: Call, needs_grad: Sequence[bool]) -> list[Any]:
    """Unfilled buffers for the products that the backward reads."""
    kept = reverse_plan(call.program, call.needs(needs_grad), keep=True).kept
    types = [call.values[index] for index in kept]
    return [call.x.new_empty((call.order.shape[0], type.width), dtype=type.dtype) for type in types]


class _Differentiable(torch.autograd.Function):
    """Forward by the saving op, so that the products of a layer's input are not computed twice in training.

    Not by register_autograd: that only sees the inputs and outputs of the op that the user calls.
    """

    @staticmethod
    def forward(ctx: Any, num_weights: int, rest: tuple[Any, ...], *tensors: Any) -> Any:
        x, order, offsets, topk_weights, *params = tensors
        wanted = ctx.needs_input_grad[2:]
        ctx.needs, ctx.num_weights, ctx.rest = [wanted[0], *wanted[3:]], num_weights, rest
        inputs = (x, order, offsets, topk_weights, params[:num_weights], params[num_weights:], *rest)
        with below_autograd():
            y, saved = SAVING_OP.overload(*inputs, ctx.needs)
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: checkpointing unpacks each only once
        saved, tensors = kept[: ctx.num_saved], kept[ctx.num_saved :]
        x, order, offsets, topk_weights, *params = tensors
        inputs = (x, order, offsets, topk_weights, params[: ctx.num_weights], params[ctx.num_weights :], *ctx.rest)
        with below_autograd():
            found = BACKWARD_OP.overload(grad, list(saved), *inputs, ctx.needs)
        grads = first_derivatives(found, ctx.needs, tensors)
        return None, None, grads[0], None, None, *grads[1:]


def first_derivatives(found: Sequence[Any], needs: Sequence[bool], tensors: Sequence[Any]) -> list[Any]:
    """What a backward returns: None where no gradient is needed, and under create_graph an error for whoever differentiates again."""
    if torch.is_grad_enabled():
        anchor = next(each for each in tensors if each is not None and each.requires_grad)
        found = _FirstDerivative.apply(anchor, *found)
    return [each if need else None for each, need in zip(found, needs, strict=True)]


class _FirstDerivative(torch.autograd.Function):
    """Marks gradients as not differentiable again: an error where someone does, not a gradient that is silently zero."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, *grads: Any) -> tuple[Any, ...]:
        return tuple(grad.clone() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "double backward through moe_compile's experts is not supported; run this part of the model in eager mode, "
            "without backend='moe_compile'"
        )


def _autograd(*args: Any) -> Any:
    x, order, offsets, topk_weights, weights, biases, *rest = args
    tensors = (x, order, offsets, topk_weights, *weights, *biases)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        refuse_gradients(rest[1])
        return _Differentiable.apply(len(weights), tuple(rest), *tensors)
    with below_autograd():
        return OP.overload(*args)


def _backward_kernel(grad: Any, saved: list[Any], *args: Any) -> list[Any]:
    *inputs, provider, needs_grad = args
    call = prepare(*inputs)
    check_slots(call)
    run = registry.kernel("experts", provider, BACKWARD)
    grads: list[Any] = run(call, grad.reshape(-1, call.values[-1].width), saved, needs_grad)
    return grads


def empty_grads(call: Call, needs_grad: Sequence[bool]) -> list[Any]:
    """Unfilled gradient buffers in parameters() order, with the parameters' strides; 0 elements where none is needed.

    The fake returns these too, so that strides under torch.compile are those of the kernel.
    """
    grads = []
    for tensor, need in zip(call.parameters(), needs_grad, strict=True):
        grads.append(torch.empty_like(tensor) if need else call.x.new_empty(0))
    return grads


def _backward_fake(grad: Any, saved: list[Any], *args: Any) -> list[Any]:
    *inputs, _, needs_grad = args
    return empty_grads(prepare(*inputs), needs_grad)


OP = register_op(SCHEMA, _kernel, _fake, _autograd, replays=registry.replays("experts", -1))
SAVING_OP = register_op(SAVING_SCHEMA, _saving_kernel, _saving_fake, replays=registry.replays("experts", -2))
BACKWARD_OP = register_op(BACKWARD_SCHEMA, _backward_kernel, _backward_fake, replays=registry.replays("experts", -2))


def sample_inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, ...]]:
    """Argument tuples without the provider: SwiGLU stacked, biased interleaved lists, weighted input, no tokens."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Any:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(device, dtype)

    def slots(ids: list[list[int]], experts: int) -> tuple[Any, Any]:
        order, offsets = counting_sort(torch.tensor(ids, dtype=torch.int64, device=device), experts)
        return order, offsets

    glu = "mm(1, silu(cols(mm(0, x), 0, 6, 1)) * cols(mm(0, x), 6, 12, 1))"
    weights = [rand(4, 8, 12), rand(4, 6, 8)]
    yield rand(3, 8), *slots([[0, 2], [2, 1], [3, 0]], 4), None, weights, [], glu, "eio,eio", "", 2

    interleaved = "mm(1, gelu(cols(mm(0, x) + b(0), 0, 8, 2)) * (cols(mm(0, x) + b(0), 1, 8, 2) + 1.0)) + b(1)"
    weights = [rand(8, 8) for _ in range(3)] + [rand(8, 4) for _ in range(3)]
    biases = [rand(8) for _ in range(6)]
    layouts = ("oi*3,oi*3", "o*3,o*3")
    yield rand(2, 8), *slots([[0, 0], [-1, 2]], 3), rand(2, 2), weights, biases, f"({interleaved}) * w", *layouts, 2

    weights = [rand(2, 4, 4)]
    yield rand(3, 4), *slots([[1], [1], [1]], 2), rand(3, 1), weights, [], "relu(mm(0, x * w))", "eoi", "", 1
    yield rand(0, 4), *slots([], 2), None, weights, [rand(2, 4)], "mm(0, x) + b(0)", "eoi", "eo", 2
