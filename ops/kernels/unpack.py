"""Quantised weights into the numbers that are multiplied, in registers."""


# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl


def _fp4(i: int) -> str:
    """Number i of two int16 into bfloat16: sign and three bits to their places, which is the number / 2^126, times the scale / FOLDED."""
    first = f"shl.b32 t, $1, {12 - 4 * i};" if i < 3 else "mov.b32 t, $1;"
    return f"""{{ .reg .b32 t, u;
        {first}
        and.b32 u, t, 0x70007000;
        shr.u32 u, u, 6;
        lop3.b32 u, t, 0x80008000, u, 0xEA;
        mul.rn.bf16x2 $0, u, $2; }}"""


def _int4(i: int) -> str:
    """Number i of two int16 into bfloat16: as the last bits of 128 + n, then - 136."""
    first = f"shr.u32 t, $1, {4 * i};" if i else "mov.b32 t, $1;"
    return f"""{{ .reg .b32 t, c;
        {first}
        lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 c, 0x43084308;
        sub.rn.bf16x2 $0, t, c; }}"""


FP4: tl.constexpr = tl.constexpr(tuple(_fp4(i) for i in range(4)))
FOLDED: tl.constexpr = tl.constexpr(2.0**63)  # what sums of such products are short of; half of 2^126, so that neither end is reached
INT4: tl.constexpr = tl.constexpr(tuple(_int4(i) for i in range(4)))


@triton.jit
def power_of_two(exponent, DTYPE: tl.constexpr, FOLD: tl.constexpr):
    """2^(exponent - 127) of uint8; 0 for exponent 0. FOLD: bfloat16 for FP4, times 2^126 / FOLDED; infinite from 2^65 on."""
    if FOLD:
        found = (tl.minimum(exponent.to(tl.int32) + 63, 255) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        found = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True).to(DTYPE)
    return found


@triton.jit
def _e2m1(code):
    """float32 of 4 bits."""
    mantissa = (code & 1).to(tl.float32)
    power = 1 << ((code >> 1) & 3)
    magnitude = tl.where(power == 1, mantissa * 0.5, (mantissa + 2.0) * power.to(tl.float32) * 0.25)
    return tl.where(code > 7, -magnitude, magnitude)


@triton.jit
def _small_integer(bits):
    """float32 of bits - 8, as the last bits of 2^23 + n: faster than a conversion."""
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def number(units, NTH: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, factor, FAST: tl.constexpr):
    """Number NTH of each unit; of "fp4" times factor. FAST: of int16 into bfloat16, two at a time, by assembly, "fp4" with a folded one."""
    if KIND == "fp8":
        found = units
    elif KIND == "e4m3":
        found = units.to(tl.float32).to(DTYPE)  # straight to bfloat16 takes the slowest of conversions
    elif KIND == "int8":
        found = units.to(DTYPE)
    elif FAST:
        if KIND == "int4":
            found = tl.inline_asm_elementwise(INT4[NTH], "=r,r", [units], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            found = tl.inline_asm_elementwise(FP4[NTH], "=r,r,r", [units, factor], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        bits = (units.to(tl.int32) >> (4 * NTH)) & 15
        found = _small_integer(bits).to(DTYPE) if KIND == "int4" else _e2m1(bits).to(DTYPE) * factor
    return found


@triton.jit
def numbers(units, scales, KIND: tl.constexpr, PER: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """[N, PER * BU]: first the first number of each unit, then the second, ... scales, of "fp4": exponents [N, 4], each of BU / 4 units.

    FAST: by assembly, into bfloat16, four a unit; those of "fp4" are 1 / FOLDED of what they stand for then.
    """
    N: tl.constexpr = units.shape[0]
    BU: tl.constexpr = units.shape[1]
    factor = 1.0
    if KIND == "fp4":
        factor = power_of_two(scales, DTYPE, FAST)[:, :, None].broadcast_to(N, 4, BU // 4).reshape(N, BU)
    found = number(units, 0, KIND, DTYPE, factor, FAST)
    if PER == 2:
        found = tl.join(found, number(units, 1, KIND, DTYPE, factor, FAST)).permute(0, 2, 1).reshape(N, 2 * BU)
    elif PER == 4:
        second = number(units, 1, KIND, DTYPE, factor, FAST)
        third = number(units, 2, KIND, DTYPE, factor, FAST)
        last = number(units, 3, KIND, DTYPE, factor, FAST)
        found = tl.join(tl.join(found, third), tl.join(second, last)).permute(0, 2, 3, 1).reshape(N, 4 * BU)
    return found
