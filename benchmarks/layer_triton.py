"""The two small Triton functions that OpenAI's triton_kernels needs for this layer: packed ids, and a SwiGLU without its clamp and bias."""

from __future__ import annotations

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
