"""Formats of quantised expert weights: how numbers and scales lie, and there and back in plain torch.

kind            values                                                   scales
"fp8_block"     e4m3 [E, O, I]                                           [E, O/128, I/128], of each block of 128 x 128 (DeepSeek-V3)
"fp8_channel"   e4m3 [E, O, I]                                           [E, O], of each output
"mxfp4"         uint8 [E, O, I/32, 16], two e2m1 a byte, low half first  uint8 [E, O, I/32], exponents (bias 127) of 32 inputs (GPT-OSS)
"int8"          int8 [E, O, I]                                           [E, O, I/128], or [E, O, 1] of a whole output
"int4"          uint8 [E, O, I/2], number + 8, two a byte, low first     as int8

A weight is value * scale; scales are of a float type (those that are made here: float32 for fp8, bfloat16 for int8 and int4).
"fp8_block" and "fp8_channel" multiply rows that are quantised as well: e4m3, a scale for each 128 columns or for a row. The same weights
with rows that stay as they are have the kinds "fp8_block_w" and "fp8_channel_w". With axes "io" values lie [E, I, O] (int4: [E, I/2, O])
and scales with two inner dimensions likewise; mxfp4 has no such form. Sizes that are no multiple of 128 have one more, smaller block at
the end. No type holds more than the two tensors, so a checkpoint's tensors are used as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

BLOCK = 128  # inputs (and outputs) that share a scale
MX_BLOCK = 32
LARGEST = 448.0  # of float8_e4m3fn
LONGEST_ROW = 1 << 15  # columns up to which a row may have one scale
HALFWAY = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))  # True: up to the even one
ROWS_TOO = ("fp8_block", "fp8_channel")  # the rows are quantised as well
WEIGHTS_ONLY = ("fp8_block_w", "fp8_channel_w", "mxfp4", "int8", "int4")
KINDS = (*ROWS_TOO, *WEIGHTS_ONLY)
PACKED = ("mxfp4", "int4")  # two numbers a byte
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that scales may have (the last where a rewrite is validated)
VALUES = {"mxfp4": torch.uint8, "int8": torch.int8, "int4": torch.uint8}  # else e4m3
SCALES = {"mxfp4": torch.uint8, "int8": torch.bfloat16, "int4": torch.bfloat16}  # else float32


def stored(kind: str) -> str:
    """The kind by how numbers and scales lie."""
    return kind.removesuffix("_w")


def rounded_rows(rows_RI: Any, grouped: bool) -> Any:
    """The rows as e4m3 sees them, in their own type: a scale for each 128 columns (grouped), or for each row."""
    wide = rows_RI.float()
    if grouped:
        padded = _blocks(wide)
        scales = _scale(padded.abs().amax(2, keepdim=True), LARGEST)
        return (_e4m3(padded / scales).float() * scales).flatten(1)[:, : rows_RI.shape[1]].to(rows_RI.dtype)
    scales = _scale(wide.abs().amax(1, keepdim=True), LARGEST) if rows_RI.shape[1] else wide
    return (_e4m3(wide / scales).float() * scales).to(rows_RI.dtype)


class Quantized(NamedTuple):
    """Weights of all experts in one of the formats above."""

    values: Any
    scales: Any
    kind: str
    axes: str = "oi"

    @property
    def experts(self) -> int:
        return int(self.values.shape[0])

    @property
    def fan(self) -> tuple[int, int]:
        """(inputs, outputs)"""
        if self.kind == "mxfp4":
            return self.values.shape[2] * MX_BLOCK, self.values.shape[1]
        inner, outer = self.values.shape[1:] if self.axes == "io" else self.values.shape[:0:-1]
        return inner * (2 if self.kind == "int4" else 1), outer

    @property
    def stored(self) -> str:
        return stored(self.kind)

    @property
    def grouped(self) -> bool:
        """Has each block of inputs a scale, not only each output?"""
        return self.stored in ("fp8_block", "mxfp4") or (self.stored != "fp8_channel" and self._inner_scales() > 1)

    def _inner_scales(self) -> int:
        return int(self.scales.shape[1 if self.axes == "io" else 2])


def quantize_weights(weights: Any, kind: str, *, axes: str = "oi", group: int = BLOCK) -> Quantized:
    """weights [E, O, I] (axes "io": [E, I, O]) in any float type. group, of int8 and int4: 128 inputs a scale, or 0: an output."""
    _known(kind, axes)
    if weights.dim() != 3 or not weights.is_floating_point():
        raise ValueError(
            f"weights to quantise must be floating-point [experts, outputs, inputs], got {weights.dtype} {list(weights.shape)}"
        )
    if group not in (0, BLOCK):
        raise ValueError(f"group must be {BLOCK} inputs or 0 (a scale for each output), got {group}")
    reason = odd_inputs(kind, weights.shape[1 if axes == "io" else 2])
    if reason is not None:
        raise ValueError(f"{reason}; pad the weights or take another kind")
    if not weights.shape[0]:
        raise ValueError("weights of no experts cannot be quantised")
    return quantize_each([each.t() if axes == "io" else each for each in weights], kind, axes=axes, group=group)


def quantize_each(experts: Sequence[Any], kind: str, *, axes: str = "oi", group: int = BLOCK) -> Quantized:
    """Of one weight [O, I] an expert, one after the other: float32 is large. axes: how values and scales lie."""
    done = [_quantize(each.float(), stored(kind), group) for each in experts]
    values, scales = (torch.stack([_turned(pair[i], axes) for pair in done]) for i in (0, 1))
    return Quantized(values, scales, kind, axes)


def odd_inputs(kind: str, inner: int) -> str | None:
    """Why weights with `inner` inputs have no form of a kind."""
    unit = {"mxfp4": MX_BLOCK, "int4": 2}.get(kind, 1)
    return f"{kind} needs the number of inputs to be a multiple of {unit}, got {inner}" if inner % unit else None


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Any:
    """[E, O, I], or [E, I, O] as the values lie: the products in float32, then rounded to dtype."""
    check(q)
    out = torch.empty(dense_shape(q), dtype=dtype, device=q.values.device)
    for expert in range(q.experts):
        out[expert] = dequantize_expert(q, expert)
    return out


def dequantize_expert(q: Quantized, expert: int) -> Any:
    """float32 [O, I] of one expert, or [I, O]."""
    return _turned(_dequantize(_turned(q.values[expert], q.axes), _turned(q.scales[expert], q.axes), q.stored), q.axes)


def dense_shape(q: Quantized) -> tuple[int, int, int]:
    """(E, O, I), or (E, I, O) as the values lie."""
    inner, outer = q.fan
    return (q.values.shape[0], inner, outer) if q.axes == "io" else (q.values.shape[0], outer, inner)


def check(q: Quantized, name: str = "weights") -> None:
    """Raises ValueError where tensors are not what their kind says."""
    _known(q.kind, q.axes)
    dims, dtype = 4 if q.kind == "mxfp4" else 3, values_dtype(q.kind)
    if q.values.dim() != dims or q.values.dtype != dtype or (q.kind == "mxfp4" and q.values.shape[3] != MX_BLOCK // 2):
        wanted = f"{dtype} with {dims} dimensions" + (f", the last of {MX_BLOCK // 2}" if dims == 4 else "")
        raise ValueError(f"{name}: values of kind {q.kind!r} must be {wanted}, got {q.values.dtype} {list(q.values.shape)}")
    shapes = _scale_shapes(q)
    dtypes = (torch.uint8,) if q.kind == "mxfp4" else FLOATS
    if list(q.scales.shape) not in shapes or q.scales.dtype not in dtypes:
        raise ValueError(
            f"{name}: scales of kind {q.kind!r} for values {list(q.values.shape)} must be {' or '.join(map(str, dtypes))} "
            f"{' or '.join(map(str, shapes))}, got {q.scales.dtype} {list(q.scales.shape)}"
        )
    if q.values.device != q.scales.device:
        raise ValueError(f"{name}: values are on {q.values.device}, scales on {q.scales.device}; they must be on one device")


def values_dtype(kind: str) -> torch.dtype:
    return VALUES.get(kind, torch.float8_e4m3fn)


def scales_dtype(kind: str) -> torch.dtype:
    return SCALES.get(kind, torch.float32)


def _scale_shapes(q: Quantized) -> list[list[int]]:
    inner, outer = q.fan
    blocks = -(-inner // BLOCK)
    if q.stored == "fp8_channel":
        return [[q.experts, outer]]
    if q.kind == "mxfp4":
        return [[q.experts, outer, inner // MX_BLOCK]]
    first = -(-outer // BLOCK) if q.stored == "fp8_block" else outer
    pairs = [(first, blocks)] if q.stored == "fp8_block" else [(first, blocks), (first, 1)]
    return [[q.experts, i, o] if q.axes == "io" else [q.experts, o, i] for o, i in pairs]


def shapes_of(kind: str, axes: str, shape: Any) -> tuple[list[int], list[int]]:
    """Of values and scales of weights [E, O, I] (axes "io": [E, I, O]); int8 and int4 with groups of 128 inputs."""
    _known(kind, axes)
    experts, inner, outer = shape if axes == "io" else (shape[0], shape[2], shape[1])
    blocks = -(-inner // BLOCK)
    if kind == "mxfp4":
        return [experts, outer, inner // MX_BLOCK, MX_BLOCK // 2], [experts, outer, inner // MX_BLOCK]
    values = [inner // 2 if kind == "int4" else inner, outer]
    if stored(kind) == "fp8_channel":
        return [experts, *(values if axes == "io" else values[::-1])], [experts, outer]
    scales = [blocks, -(-outer // BLOCK) if stored(kind) == "fp8_block" else outer]
    return [experts, *(values if axes == "io" else values[::-1])], [experts, *(scales if axes == "io" else scales[::-1])]


def _known(kind: str, axes: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind of quantised weights must be one of {', '.join(KINDS)}, got {kind!r}")
    if axes not in ("oi", "io"):
        raise ValueError(f"axes of quantised weights must be 'oi' or 'io', got {axes!r}")
    if kind == "mxfp4" and axes == "io":
        raise ValueError("mxfp4 weights lie [experts, outputs, inputs / 32, 16]; axes must be 'oi', got 'io'")


def _turned(t: Any, axes: str) -> Any:
    return t.t().contiguous() if axes == "io" and t.dim() == 2 else t


# ---------------------------------------------------------------- one expert [O, I]
def _quantize(w_OI: Any, kind: str, group: int) -> tuple[Any, Any]:
    if kind == "fp8_channel":
        scales = _scale(w_OI.abs().amax(1), LARGEST)
        return _e4m3(w_OI / scales[:, None]), scales
    if kind == "mxfp4":
        return _quantize_mxfp4(w_OI)
    if kind == "fp8_block":
        scales = _scale(_blocks(_blocks(w_OI.abs()).amax(2).t()).amax(2).t().contiguous(), LARGEST)
        return _e4m3(w_OI / _spread(scales, w_OI.shape, BLOCK)), scales
    largest = 127.0 if kind == "int8" else 7.0
    amax = _blocks(w_OI.abs()).amax(2) if group else w_OI.abs().amax(1, keepdim=True)
    scales = _scale(amax, largest).bfloat16()
    numbers = (w_OI / _spread(scales.float(), w_OI.shape, 1)).round().clamp(-largest, largest)
    return (numbers.to(torch.int8) if kind == "int8" else _pack(numbers + 8)), scales


def _dequantize(values: Any, scales: Any, kind: str) -> Any:
    if kind == "fp8_channel":
        return values.float() * scales.float()[:, None]
    if kind == "mxfp4":
        numbers = _unpack(values.flatten(1))
        mantissa, power = (numbers & 1).float(), ((numbers >> 1) & 3).int()
        magnitude = torch.where(power == 0, mantissa * 0.5, torch.ldexp(mantissa + 2, power) * 0.25)
        signed = torch.where(numbers > 7, -magnitude, magnitude)
        return torch.ldexp(signed, scales.int().repeat_interleave(MX_BLOCK, 1) - 127)
    whole = _unpack(values).float() - 8 if kind == "int4" else values.float()
    wide = scales if scales.dtype == torch.float64 else scales.float()
    return whole * _spread(wide, whole.shape, BLOCK if kind == "fp8_block" else 1)


def _quantize_mxfp4(w_OI: Any) -> tuple[Any, Any]:
    """The largest of 32 inputs gets exponent 2 of e2m1 (OCP microscaling); what is beyond 6 becomes 6."""
    groups = w_OI.unflatten(1, (-1, MX_BLOCK))
    amax = groups.abs().amax(2)
    exponent = torch.where(amax > 0, torch.frexp(amax).exponent - 1 - 2, 0).clamp(-126, 127)
    magnitude = torch.ldexp(groups.abs(), -exponent[:, :, None])
    code = sum((magnitude >= at if up else magnitude > at).to(torch.uint8) for at, up in HALFWAY)
    code = torch.where(groups < 0, code + 8, code)
    return _pack(code.flatten(1)).unflatten(1, (-1, MX_BLOCK // 2)), (exponent + 127).to(torch.uint8)


def _scale(amax: Any, largest: float) -> Any:
    """Blocks of zeros have scale 1."""
    return torch.where(amax > 0, amax / largest, 1.0)


def _e4m3(t: Any) -> Any:
    return t.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _blocks(w_OI: Any) -> Any:
    """[O, ceil(I/128), 128], zeros behind the last."""
    return torch.nn.functional.pad(w_OI, (0, -w_OI.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _spread(scales: Any, shape: Any, rows: int) -> Any:
    """[O, I]: the scale of each weight; scales [O/rows, I/128] or [O, 1]."""
    wide = scales.repeat_interleave(BLOCK, 1)[:, : shape[1]] if scales.shape[1] > 1 or shape[1] <= BLOCK else scales
    return wide.repeat_interleave(rows, 0)[: shape[0]] if rows > 1 else wide


def _pack(numbers_OI: Any) -> Any:
    pairs = numbers_OI.to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)


def _unpack(packed_OI: Any) -> Any:
    return torch.stack([packed_OI & 15, packed_OI >> 4], 2).flatten(1)
