"""What every kernel of the exchange shares: regions of the workspace, words of state, and signals between ranks.

Every rank runs the same sequence of operations ("ops", numbered from 1 on the device). Addresses of peers' memory come as int64
[regions, W]; signals are int64 words that only grow. The argument why no rank overwrites what another still reads stands in engine.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton resolves the names in annotations as kernel globals, so only tl.constexpr can stand there.)

from __future__ import annotations

import triton
import triton.language as tl

# Regions of the workspace, in the order of the address table.
REGIONS = (
    "started", "pushed", "landed", "ids", "weights_0", "weights_1", "scales", "rows", "back", "counts", "counted", "sources", "batched",
)  # fmt: skip
STARTED = tl.constexpr(0)  # [W] the op that each peer has begun
PUSHED = tl.constexpr(1)  # [W] op << 32 | rows, once all rows of that peer are here
LANDED = tl.constexpr(2)  # [W*M] (batched: [M*K]) the op whose row of `back` is here
IDS = tl.constexpr(3)  # int32 [W*M, K]
WEIGHTS = tl.constexpr(4)  # float32 [W*M, K], two of them
SCALES = tl.constexpr(6)  # float32 [W*M, H/128]
ROWS = tl.constexpr(7)  # [W*M, H]
BACK = tl.constexpr(8)  # [W*M, O] (batched: [M*K, O])
COUNTS = tl.constexpr(9)  # int32 [2, W, E] slots of each expert on each rank, of odd and even ops
COUNTED = tl.constexpr(10)  # [W] the op whose counts are here
SOURCES = tl.constexpr(11)  # int32 [EL, C] where a batched row came from: rank * M*K + slot
BATCHED = tl.constexpr(12)  # [EL, C, H]

# Words of this rank's own state.
OP = tl.constexpr(0)
LAST_PUSH = tl.constexpr(1)
LAST_COLLECT = tl.constexpr(2)
ARRIVED = tl.constexpr(3)
BROKEN = tl.constexpr(4)
CLOCK = tl.constexpr(5)
TICKET = tl.constexpr(6)
HIGH = tl.constexpr(8)  # [W] rows of each peer whose ids are not yet -1 again

POLLS = tl.constexpr(64)  # between two looks at the clock


@triton.jit
def _address(addresses, region, peer, W: tl.constexpr):
    return tl.load(addresses + region * W + peer)


@triton.jit
def rows_of(addresses, region, peer, like: tl.constexpr, W: tl.constexpr):
    """A peer's region as a pointer of like's type; without the hint Triton emits scalar stores to it."""
    return tl.multiple_of(_address(addresses, region, peer, W).to(like), 16)


@triton.jit
def words_of(addresses, region, peer, index, W: tl.constexpr):
    return _address(addresses, region, peer, W).to(tl.pointer_type(tl.int64)) + index


@triton.jit
def tell_all(addresses, region, rank, value, W: tl.constexpr, WP: tl.constexpr):
    """value (one, or one a peer) into word `rank` of the region on every peer, after everything this program wrote or acquired."""
    peer = tl.arange(0, WP)
    base = tl.load(addresses + region * W + peer, mask=peer < W, other=0)
    words = base.to(tl.pointer_type(tl.int64)) + rank
    tl.atomic_xchg(words, tl.zeros([WP], tl.int64) + value, mask=peer < W, sem="release", scope="sys")


@triton.jit
def _clock(state):
    """Nanoseconds, the same in all threads: an atomic runs in one of them and is broadcast. The value is the last caller's."""
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    return tl.atomic_max(state + CLOCK, now, sem="relaxed", scope="gpu")


@triton.jit
def _give_up(late, peer, state, status, STAGE: tl.constexpr):
    tl.store(status + 1, tl.min(tl.where(late, peer, 1 << 20)).to(tl.int64))
    tl.store(status + 2, tl.load(state + OP) + 1)
    tl.store(status, STAGE)
    tl.store(state + BROKEN, 1)


@triton.jit
def wait(words, mask, level, peer, state, status, timeout_ns, STAGE: tl.constexpr, TIMER: tl.constexpr):
    """Until every masked word (own memory, written by `peer`) is >= level, then all that its writer released is visible.

    Returns the words and 1, or 0 if the time ran out (at once if it ever did before).
    """
    none = tl.zeros(mask.shape, tl.int64)
    seen = tl.atomic_add(words, none, mask=mask, sem="acquire", scope="sys")
    waiting = tl.max((mask & (seen < level)).to(tl.int32))
    polls = 0
    start = tl.load(state + BROKEN) * 0
    good = 1
    while waiting > 0:
        seen = tl.atomic_add(words, none, mask=mask, sem="acquire", scope="sys")
        waiting = tl.max((mask & (seen < level)).to(tl.int32))
        polls += 1
        if polls % POLLS == 0:
            late = waiting > 0
            if TIMER:
                now = _clock(state)
                if polls == POLLS:
                    start = _clock(state)
                elif tl.load(state + BROKEN) == 0:
                    late = late & (now - start > timeout_ns)
            if late & ((polls > POLLS) | (not TIMER)):
                _give_up(mask & (seen < level), peer, state, status, STAGE)
                good = 0
                waiting = 0
    tl.debug_barrier()
    return seen, good


@triton.jit
def wait_for_peers(
    addresses, region, level, rank, state, status, timeout_ns, W: tl.constexpr, WP: tl.constexpr,
    STAGE: tl.constexpr, TIMER: tl.constexpr,
):  # fmt: skip
    peer = tl.arange(0, WP)
    words = words_of(addresses, region, rank, peer, W)
    return wait(words, peer < W, level, peer, state, status, timeout_ns, STAGE, TIMER)


@triton.jit
def arrive(state):
    """Number of programs that ended before this one. The last sees, and may release, what all of them wrote."""
    tl.debug_barrier()
    before = tl.atomic_add(state + ARRIVED, 1, sem="acq_rel", scope="sys")
    tl.debug_barrier()
    return before
