"""Formats of quantised expert weights: how numbers and scales lie, and there and back in plain torch.

kind            values                                                   scales
"fp8_block"     e4m3 [E, O, I]                                           float32 [E, O/128, I/128], of each block of 128 x 128 (DeepSeek-V3)
"fp8_channel"   e4m3 [E, O, I]                                           float32 [E, O], of each output
"mxfp4"         uint8 [E, O, I/32, 16], two e2m1 a byte, low half first  uint8 [E, O, I/32], exponents (bias 127) of 32 inputs (GPT-OSS)
"int8"          int8 [E, O, I]                                           bfloat16 [E, O, I/128], or [E, O, 1] of a whole output
"int4"          uint8 [E, O, I/2], number + 8, two a byte, low first     as int8

A weight is value * scale. With axes "io" values lie [E, I, O] (int4: [E, I/2, O]) and scales with two inner dimensions likewise; mxfp4 has
no such form. Sizes that are no multiple of 128 have one more, smaller block at the end. No type holds more than the two tensors, so a
checkpoint's tensors are used as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

BLOCK = 128  # inputs (and outputs) that share a scale
MX_BLOCK = 32
LARGEST = 448.0  # of float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALFWAY = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))  # True: up to the even one
KINDS = ("fp8_block", "fp8_channel", "mxfp4", "int8", "int4")
ROWS_TOO = ("fp8_block", "fp8_channel")  # the rows are quantised as well
PACKED = ("mxfp4", "int4")  # two numbers a byte
VALUES = {
    "fp8_block": torch.float8_e4m3fn, "fp8_channel": torch.float8_e4m3fn, "mxfp4": torch.uint8, "int8": torch.int8, "int4": torch.uint8,
}  # fmt: skip
SCALES = {
    "fp8_block": torch.float32, "fp8_channel": torch.float32, "mxfp4": torch.uint8, "int8": torch.bfloat16, "int4": torch.bfloat16,
}  # fmt: skip


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
    def grouped(self) -> bool:
        """Has each block of inputs a scale, not only each output?"""
        return self.kind in ("fp8_block", "mxfp4") or (self.kind != "fp8_channel" and self._inner_scales() > 1)

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
    unit = {"mxfp4": MX_BLOCK, "int4": 2}.get(kind, 1)
    inner = weights.shape[1 if axes == "io" else 2]
    if inner % unit:
        raise ValueError(f"{kind} needs the number of inputs to be a multiple of {unit}, got {inner}; pad the weights or take another kind")
    if not weights.shape[0]:
        raise ValueError("weights of no experts cannot be quantised")
    done = [_quantize(each.t().float() if axes == "io" else each.float(), kind, group) for each in weights]  # by experts: float32 is large
    values, scales = (torch.stack([_turned(pair[i], axes) for pair in done]) for i in (0, 1))
    return Quantized(values, scales, kind, axes)


def dequantize(q: Quantized) -> Any:
    """float32 [E, O, I], or [E, I, O] as the values lie."""
    check(q)
    whole = [_dequantize(_turned(q.values[e], q.axes), _turned(q.scales[e], q.axes), q.kind) for e in range(q.experts)]
    return torch.stack([_turned(each, q.axes) for each in whole])


def check(q: Quantized, name: str = "weights") -> None:
    """Raises ValueError where tensors are not what their kind says."""
    _known(q.kind, q.axes)
    dims = 4 if q.kind == "mxfp4" else 3
    if q.values.dim() != dims or q.values.dtype != VALUES[q.kind] or (q.kind == "mxfp4" and q.values.shape[3] != MX_BLOCK // 2):
        wanted = f"{VALUES[q.kind]} with {dims} dimensions" + (f", the last of {MX_BLOCK // 2}" if dims == 4 else "")
        raise ValueError(f"{name}: values of kind {q.kind!r} must be {wanted}, got {q.values.dtype} {list(q.values.shape)}")
    shapes = _scale_shapes(q)
    if list(q.scales.shape) not in shapes or q.scales.dtype != SCALES[q.kind]:
        raise ValueError(
            f"{name}: scales of kind {q.kind!r} for values {list(q.values.shape)} must be {SCALES[q.kind]} "
            f"{' or '.join(map(str, shapes))}, got {q.scales.dtype} {list(q.scales.shape)}"
        )
    if q.values.device != q.scales.device:
        raise ValueError(f"{name}: values are on {q.values.device}, scales on {q.scales.device}; they must be on one device")


def _scale_shapes(q: Quantized) -> list[list[int]]:
    inner, outer = q.fan
    blocks = -(-inner // BLOCK)
    if q.kind == "fp8_channel":
        return [[q.experts, outer]]
    if q.kind == "mxfp4":
        return [[q.experts, outer, inner // MX_BLOCK]]
    first = -(-outer // BLOCK) if q.kind == "fp8_block" else outer
    pairs = [(first, blocks)] if q.kind == "fp8_block" else [(first, blocks), (first, 1)]
    return [[q.experts, i, o] if q.axes == "io" else [q.experts, o, i] for o, i in pairs]


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
        return values.float() * scales[:, None]
    if kind == "mxfp4":
        numbers = _unpack(values.flatten(1))
        magnitude = torch.tensor(E2M1, device=values.device)[(numbers & 7).long()]
        signed = torch.where(numbers > 7, -magnitude, magnitude)
        return torch.ldexp(signed, scales.int().repeat_interleave(MX_BLOCK, 1) - 127)
    whole = _unpack(values).float() - 8 if kind == "int4" else values.float()
    return whole * _spread(scales.float(), whole.shape, BLOCK if kind == "fp8_block" else 1)


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
