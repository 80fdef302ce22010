"""Small Triton kernels that libraries leave to their users: for OpenAI's triton_kernels packed ids, and a SwiGLU without its clamp and
bias; for DeepGEMM everything around its grouped product of e4m3 rows."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def _pack(ids, packed, small, tokens, stride_word, words, TOP_K: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """packed[word * stride_word + token]: a bit for each of a token's experts; small: ids as int16."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WORDS)
    inside = rows < tokens
    bits = tl.zeros((BLOCK, WORDS), dtype=tl.uint32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids + rows * TOP_K + k, mask=inside, other=0).to(tl.uint32)
        tl.store(small + rows * TOP_K + k, expert.to(tl.int16), mask=inside)
        one = tl.full((BLOCK,), 1, dtype=tl.uint32) << (expert % 32)
        bits |= tl.where((expert // 32)[:, None] == columns[None, :], one[:, None], 0).to(tl.uint32)
    at = packed + columns[None, :] * stride_word + rows[:, None]
    tl.store(at, bits, mask=inside[:, None] & (columns < words)[None, :])


def pack(ids, packed, small) -> None:  # type: ignore[no-untyped-def]
    """ids int64 [T, K] into packed uint32 [words, T rounded up] and small int16 [T, K]."""
    tokens, top_k = ids.shape
    words = packed.shape[0]
    block = 32
    grid = (triton.cdiv(tokens, block),)
    _pack[grid](ids, packed, small, tokens, packed.stride(0), words, top_k, triton.next_power_of_2(words), block, num_warps=1)


@triton.jit
def plain_swiglu(input):  # type: ignore[no-untyped-def]
    """silu(even columns) * odd columns, in float32."""
    gate, up = tl.split(tl.reshape(input, (input.shape[0], input.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up.to(tl.float32)


# ---------------------------------------------------------------- around DeepGEMM's grouped product
@triton.jit
def _count(ids, counts, ranks, slots, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """ranks: the number of a slot among those of its expert, in any order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < slots
    expert = tl.load(ids + at, mask=inside, other=0)
    tl.store(ranks + at, tl.atomic_add(counts + expert, 1, mask=inside, sem="relaxed"), mask=inside)


@triton.jit
def _own(counts, starts, owners, experts, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """starts: an expert's first row, a multiple of ALIGNED; owners: the expert of each row of a block, -1 behind the last."""
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < experts, other=0)
    padded = (count + ALIGNED - 1) // ALIGNED * ALIGNED
    ends = tl.cumsum(padded, 0)
    first = tl.program_id(0) * ALIGNED
    if first == 0:
        tl.store(starts + e, ends - padded, mask=e < experts)
    owner = tl.max(tl.where((ends - padded <= first) & (first < ends), e, -1), 0)
    tl.store(owners + first + tl.arange(0, ALIGNED), tl.full((ALIGNED,), 0, tl.int32) + owner)


@triton.jit
def _e4m3(x):  # type: ignore[no-untyped-def]
    """Groups [G, 128] in float32 as e4m3, and a scale each."""
    scales = tl.maximum(tl.max(tl.abs(x), 1), 1e-10) / 448.0
    return (x / scales[:, None]).to(tl.float8e4nv), scales


@triton.jit
def _spread(x, ids, ranks, starts, rows, values, scales, groups, stride_scale, TOP_K: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token's row, quantised, to the rows of its slots."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = group < groups
    numbers, own = _e4m3(tl.load(x + token * groups * 128 + at, mask=inside[:, None], other=0.0).to(tl.float32))
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        row = (tl.load(starts + tl.load(ids + slot)) + tl.load(ranks + slot)).to(tl.int64)
        tl.store(rows + slot, row.to(tl.int32))
        tl.store(values + row * groups * 128 + at, numbers, mask=inside[:, None])
        tl.store(scales + group * stride_scale + row, own, mask=inside)


@triton.jit
def _gate(up, counts, starts, owners, values, scales, groups, stride_scale, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(first half) * second half of a row, quantised. Rows without a slot stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(owners + row)
    number = row - tl.load(starts + expert, mask=expert >= 0, other=0)
    if number < tl.load(counts + expert, mask=expert >= 0, other=0):
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = group < groups
        first = up + row * groups * 256 + at
        gate = tl.load(first, mask=inside[:, None], other=0.0).to(tl.float32)
        line = tl.load(first + groups * 128, mask=inside[:, None], other=0.0).to(tl.float32)
        numbers, own = _e4m3(gate / (1 + tl.exp(-gate)) * line)
        tl.store(values + row * groups * 128 + at, numbers, mask=inside[:, None])
        tl.store(scales + group * stride_scale + row, own, mask=inside)


@triton.jit
def _add_up(y, weights, rows, out, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token's slots by their weights, in float32."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows + token * TOP_K + k).to(tl.int64)
        part = tl.load(y + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + token * TOP_K + k)
    tl.store(out + token * columns + at, total.to(out.dtype.element_ty), mask=inside)


class Places(NamedTuple):
    """Where slots go: rows [T * K]; counts and starts [E] of the experts' rows; owners [R]: the expert of a row. ranks: for spread."""

    rows: Any
    counts: Any
    starts: Any
    owners: Any
    ranks: Any


def padded_rows(slots: int, experts: int, aligned: int) -> int:
    """The most rows that slots take where each expert's are padded to a multiple."""
    return aligned * (slots // aligned + min(slots, experts))


def places_of(ids: Any, experts: int, aligned: int, rows: int) -> Places:
    slots = ids.numel()
    new = functools.partial(torch.empty, dtype=torch.int32, device=ids.device)
    places = Places(new(slots), torch.zeros(experts, dtype=torch.int32, device=ids.device), new(experts), new(rows), new(slots))
    _count[(triton.cdiv(slots, 256),)](ids, places.counts, places.ranks, slots, 256)
    wide = triton.next_power_of_2(experts)
    _own[(rows // aligned,)](places.counts, places.starts, places.owners, experts, aligned, wide)
    return places


def spread(x: Any, ids: Any, places: Places) -> tuple[Any, Any]:
    """(e4m3 [R, H], float32 [H / 128, R])"""
    (tokens, hidden), rows, groups = x.shape, places.owners.shape[0], x.shape[1] // 128
    values, scales = _e4m3_rows(rows, hidden, x.device)
    args = (x, ids, places.ranks, places.starts, places.rows, values, scales, groups, rows)
    _spread[(tokens,)](*args, ids.shape[1], triton.next_power_of_2(groups), num_warps=8 if groups > 16 else 4)
    return values, scales


def gate(up: Any, places: Places) -> tuple[Any, Any]:
    """up [R, 2I] to (e4m3 [R, I], float32 [I / 128, R])"""
    rows, groups = up.shape[0], up.shape[1] // 256
    values, scales = _e4m3_rows(rows, groups * 128, up.device)
    block = min(16, triton.next_power_of_2(groups))
    args = (up, places.counts, places.starts, places.owners, values, scales, groups, rows)
    _gate[(rows, triton.cdiv(groups, block))](*args, block)
    return values, scales


def _e4m3_rows(rows: int, columns: int, device: Any) -> tuple[Any, Any]:
    values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty((columns // 128, rows), dtype=torch.float32, device=device)


def add_up(y: Any, weights: Any, places: Places) -> Any:
    """y [R, H] to [T, H]"""
    (tokens, top_k), columns = weights.shape, y.shape[1]
    out = torch.empty((tokens, columns), dtype=y.dtype, device=y.device)
    _add_up[(tokens, triton.cdiv(columns, 1024))](y, weights, places.rows, out, columns, top_k, 1024)
    return out
