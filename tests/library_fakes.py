"""Stand-ins for DeepEP (V1, V2) and pplx-kernels on a CPU: the same calls and the same refusals, slowly over torch.distributed's objects.

What the libraries leave undefined is NaN or nonsense here, and the order that V2 does not promise is shuffled. What ranks run in tests of
the adapters stands at the end.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import exchange_cases as cases
import torch
import torch.distributed as dist

from moe_compile.ops import payload, quantize_dispatch
from moe_compile.ops.comm import deepep_ht, deepep_ll, deepep_v2, exchange, libraries, library_exchange, pplx

BATCHED = ("deepep_ll", "pplx")
MODULES = {"deepep_ht": deepep_ht, "deepep_ll": deepep_ll, "deepep_v2": deepep_v2, "pplx": pplx}
ALIVE: list[Any] = []  # library objects that were made and not destroyed
MADE: list[Any] = []  # all of them


def everyone(thing: Any) -> list[Any]:
    """What each rank has."""
    mine, found = io.BytesIO(), [b""] * dist.get_world_size()
    torch.save(thing, mine)  # tensors of fp8 can be saved, not pickled
    dist.all_gather_object(found, mine.getvalue())
    return [torch.load(io.BytesIO(each), weights_only=False) for each in found]


def local_ids(idx: Any, num_experts: int, rank: int) -> Any:
    local = num_experts // dist.get_world_size()
    return torch.where((idx >= rank * local) & (idx < (rank + 1) * local), idx - rank * local, -1)


def to_ranks(idx: Any, num_experts: int) -> Any:
    """bool [T, W]: which ranks have one of the token's experts."""
    world = dist.get_world_size()
    return torch.stack([(local_ids(idx, num_experts, r) >= 0).any(1) for r in range(world)], 1).view(len(idx), world)


def shuffled(things: Any) -> Any:
    """In another order: places that kernels take by atomics."""
    order = torch.randperm(len(things))
    return things[order] if isinstance(things, torch.Tensor) else [things[i] for i in order.tolist()]


def padded(rows: Any, count: int, fill: Any) -> Any:
    return torch.cat([rows, torch.full((count - len(rows), *rows.shape[1:]), fill, dtype=rows.dtype)])


class Living:
    def __init__(self, explicitly_destroy: bool) -> None:
        self.explicitly_destroy = explicitly_destroy
        ALIVE.append(self)
        MADE.append(self)

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        ALIVE.remove(self)  # ValueError the second time


class Config:
    def __init__(self, num_sms: int = 20, nvl_send: int = 6, nvl_recv: int = 256, rdma_send: int = 6, rdma_recv: int = 256) -> None:
        assert 0 < nvl_send < nvl_recv
        self.num_sms = num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 128 * (hidden_bytes + num_ranks)


class Buffer(Living):
    """deep_ep.Buffer."""

    def __init__(
        self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, low_latency_mode: bool = False, num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False, explicitly_destroy: bool = False,
    ) -> None:  # fmt: skip
        assert num_nvl_bytes % 128 == 0
        assert num_rdma_bytes % 128 == 0
        assert (num_nvl_bytes > 0) != (num_rdma_bytes > 0)
        assert low_latency_mode == (num_rdma_bytes > 0)
        super().__init__(explicitly_destroy)
        self.rank, self.world = group.rank(), group.size()
        self.size, self.low_latency = num_nvl_bytes + num_rdma_bytes, low_latency_mode

    # ---- normal kernels
    def get_dispatch_layout(self, topk_idx: Any, num_experts: int, **kw: Any) -> tuple[Any, ...]:
        assert topk_idx.dim() == 2
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == torch.int64
        assert num_experts > 0
        in_rank = to_ranks(topk_idx, num_experts)
        counts = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).to(torch.int32)
        return in_rank.sum(0).to(torch.int32), None, counts, in_rank, None

    def dispatch(
        self, x: Any, handle: Any = None, num_tokens_per_rank: Any = None, num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None, num_tokens_per_expert: Any = None, topk_idx: Any = None, topk_weights: Any = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        x, scales = x if isinstance(x, tuple) else (x, None)
        self._check_normal(x, scales, topk_idx, topk_weights)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert isinstance(handle, tuple)
            assert len(handle) == 6
            assert handle[4].shape == (x.shape[0], self.world)
            rows = self._rows(x, handle[4])
            return padded(rows, handle[3].shape[0], float("nan")), None, None, None, None, None
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert is_token_in_rank.dtype == torch.bool
        assert len(num_tokens_per_expert) % self.world == 0
        assert len(num_tokens_per_expert) // self.world <= 128
        return self._dispatch(x, scales, topk_idx, topk_weights, is_token_in_rank, len(num_tokens_per_expert), num_worst_tokens, config)

    def _check_normal(self, x: Any, scales: Any, topk_idx: Any, topk_weights: Any) -> None:
        assert not self.low_latency
        assert x.dim() == 2
        assert x.is_contiguous()
        row = x.shape[1] * x.element_size()
        assert row % 32 == 0
        assert row // 2 + 8 <= 8192
        assert row <= self.size // 128
        assert scales is None or (x.element_size() == 1 and scales.dtype == torch.float32 and scales.shape[0] == x.shape[0])
        assert (topk_idx is None) == (topk_weights is None)
        if topk_idx is not None:
            assert topk_idx.dtype == torch.int64
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_idx.shape == topk_weights.shape
            assert topk_idx.shape[0] == x.shape[0]
            assert topk_idx.shape[1] <= 32

    def _rows(self, mine: Any, in_rank: Any) -> Any:
        return torch.cat([rows[there[:, self.rank]] for rows, there in everyone((mine, in_rank))])

    def _dispatch(
        self, x: Any, scales: Any, idx: Any, weights: Any, in_rank: Any, num_experts: int, worst: int, config: Any
    ) -> tuple[Any, ...]:
        rows, ids, w = (self._rows(each, in_rank) for each in (x, idx, weights))
        ids = local_ids(ids, num_experts, self.rank)
        w = torch.where(ids >= 0, w, 0)
        sources = self._rows(torch.arange(len(x), dtype=torch.int32), in_rank)
        local = num_experts // self.world
        counts = [] if worst else torch.bincount(ids[ids >= 0], minlength=local).tolist()
        prefix = torch.stack([each.sum(0) for each in everyone(in_rank)]).cumsum(0).to(torch.int32)
        channels = torch.zeros((self.world, config.num_sms // 2), dtype=torch.int32)
        count = worst or len(rows)
        assert len(rows) <= count
        own = (prefix, channels, channels.clone(), padded(sources, count, -7), in_rank, in_rank.to(torch.int32) - 1)
        got = padded(rows.float(), count, float("nan")).to(rows.dtype) if scales is not None else padded(rows, count, float("nan"))
        got = (got, padded(self._rows(scales, in_rank), count, float("nan"))) if scales is not None else got
        return got, padded(ids, count, -1), padded(w, count, float("nan")), counts, own, None

    def combine(self, x: Any, handle: Any, topk_weights: Any = None, bias: Any = None, config: Any = None) -> tuple[Any, ...]:
        assert not self.low_latency
        assert isinstance(handle, tuple)
        assert config is not None
        prefix, _, _, sources, _, heads = handle
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        assert x.shape[1] * 2 % 16 == 0
        assert len(x) == len(sources)
        assert x.shape[1] * 2 <= self.size // 128
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert len(topk_weights) == len(x)
            assert topk_weights.shape[1] <= 32
        heads.data.masked_fill_(heads < 0, -5)  # what the kernel does, again and again to the same values, behind autograd's back
        out = torch.zeros((len(heads), x.shape[1]))
        numbers = None if topk_weights is None else torch.zeros((len(heads), topk_weights.shape[1]))
        for r, (rows, w, at, ends) in enumerate(everyone((x.float(), topk_weights, sources, prefix))):
            first = 0 if self.rank == 0 else int(ends[self.rank - 1, r])
            part = slice(first, int(ends[self.rank, r]))
            out.index_add_(0, at[part].long(), rows[part])
            if numbers is not None:
                numbers.index_add_(0, at[part].long(), w[part])
        return out.to(x.dtype), numbers, None

    # ---- low latency
    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        return 128 * num_max_dispatch_tokens_per_rank * hidden * num_experts

    def low_latency_dispatch(
        self, x: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: int, use_fp8: bool = True
    ) -> tuple[Any, ...]:
        most, local = num_max_dispatch_tokens_per_rank, num_experts // self.world
        assert self.low_latency
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        assert topk_idx.is_contiguous()
        assert len(x) == len(topk_idx) <= most
        assert topk_idx.dtype == torch.int64
        assert num_experts % self.world == 0
        assert self.world * most % 4 == 0
        assert topk_idx.shape[1] <= 11
        got = torch.full((local, self.world * most, x.shape[1]), float("nan"), dtype=x.dtype)
        sources = torch.full((local, self.world * most), -7, dtype=torch.int32)
        ranges, counts = torch.zeros((local, self.world), dtype=torch.int64), torch.zeros(local, dtype=torch.int32)
        for r, (rows, idx) in shuffled(list(enumerate(everyone((x, topk_idx))))):
            assert idx.numel() == 0 or bool((idx < num_experts).all())
            for e in range(local):
                tokens = shuffled((idx == self.rank * local + e).nonzero()[:, 0])
                assert len(tokens) == len(tokens.unique()) <= most, "an expert has places for each token once"
                part = slice(int(counts[e]), int(counts[e]) + len(tokens))
                got[e, part], sources[e, part], ranges[e, r] = rows[tokens], tokens.to(torch.int32), part.start << 32 | len(tokens)
                counts[e] += len(tokens)
        if use_fp8:
            flat, scales = payload.quantize_rows(got.view(-1, x.shape[1]), "fp8")
            scales = scales.view(local, self.world * most, -1).transpose(1, 2).contiguous().transpose(1, 2)
            return (flat.view(got.shape), scales), counts, (sources, ranges, most, x.shape[1], num_experts), None, None
        return got, counts, (sources, ranges, most, x.shape[1], num_experts), None, None

    def low_latency_combine(self, x: Any, topk_idx: Any, topk_weights: Any, handle: tuple[Any, ...]) -> tuple[Any, ...]:
        sources, ranges, most, hidden, num_experts = handle
        local = num_experts // self.world
        assert x.shape == (local, self.world * most, hidden)
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        assert topk_idx.shape == topk_weights.shape
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert len(topk_idx) <= most
        out, everything = torch.zeros((len(topk_idx), hidden)), everyone((x.float(), sources, ranges))
        for t, k in (topk_idx >= 0).nonzero().tolist():
            rank, e = divmod(int(topk_idx[t, k]), local)
            rows, at, spans = everything[rank]
            begin, count = int(spans[e, self.rank]) >> 32, int(spans[e, self.rank]) & 0xFFFFFFFF
            (place,) = (at[e, begin : begin + count] == t).nonzero(as_tuple=True)
            out[t] += topk_weights[t, k] * rows[e, begin + int(place[0])]
        return out.to(x.dtype), None, None


class EPHandle:
    """deep_ep.EPHandle."""

    def __init__(
        self, do_expand: bool, num_experts: int, expert_alignment: int, num_max_tokens_per_rank: int, num_sms: int, topk_idx: Any,
        num_recv_tokens: int, num_expanded_tokens: int, num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: Any, psum_num_recv_tokens_per_expert: Any, num_unaligned_recv_tokens_per_expert: Any,
        recv_src_metadata: Any, dst_buffer_slot_idx: Any, token_metadata_at_forward: Any, channel_linked_list: Any,
    ) -> None:  # fmt: skip
        assert not do_expand
        assert expert_alignment == 1
        assert topk_idx is not None
        self.num_experts, self.most, self.num_sms, self.topk_idx = num_experts, num_max_tokens_per_rank, num_sms, topk_idx
        self.num_recv_tokens, self.ends = num_recv_tokens, psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_scaleup_rank = self.ends
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        self.recv_src_metadata, self.dst_buffer_slot_idx = recv_src_metadata, dst_buffer_slot_idx


class ElasticBuffer(Living):
    """deep_ep.ElasticBuffer, without the host's sync."""

    def __init__(
        self, group: Any, num_bytes: Any = None, num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0,
        prefer_overlap_with_compute: bool = True, num_cpu_timeout_secs: int = 300, num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:  # fmt: skip
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        assert isinstance(num_gpu_timeout_secs, int)
        super().__init__(explicitly_destroy)
        self.rank, self.world, self.most, self.hidden = group.rank(), group.size(), num_max_tokens_per_rank, hidden

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 64

    def dispatch(
        self, x: Any, topk_idx: Any = None, topk_weights: Any = None, cumulative_local_expert_recv_stats: Any = None,
        num_experts: Any = None, num_max_tokens_per_rank: Any = None, expert_alignment: Any = None, num_sms: int = 0, handle: Any = None,
        do_handle_copy: bool = True, do_cpu_sync: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        x, scales = x if isinstance(x, tuple) else (x, None)
        assert num_sms > 0
        assert num_experts % self.world == 0
        assert x.dim() == 2
        assert x.is_contiguous()
        assert len(x) <= self.most
        assert x.shape[1] * x.element_size() % 16 == 0
        assert x.shape[1] * x.element_size() <= 2 * self.hidden
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert not do_cpu_sync
            assert handle.num_experts == num_experts
            self._check_repeats(handle.topk_idx)
            return self._rows(x, handle.dst_buffer_slot_idx, handle.topk_idx, num_experts), None, None, handle, None
        assert do_cpu_sync is False
        assert not do_handle_copy
        assert num_max_tokens_per_rank == self.most
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert len(topk_idx) == len(x)
        assert topk_weights is None or (topk_weights.dtype == torch.float32 and topk_weights.is_contiguous())
        return self._dispatch(x, scales, topk_idx, topk_weights, num_experts, num_sms)

    def _dispatch(self, x: Any, scales: Any, idx: Any, weights: Any, num_experts: int, sms: int) -> tuple[Any, ...]:
        self._check_repeats(idx)
        slots, local = self._slots(idx, num_experts), num_experts // self.world
        counts = torch.stack([to_ranks(each, num_experts)[:, self.rank].sum() for each in everyone(idx)])
        ends, total = counts.cumsum(0).to(torch.int32), int(counts.sum())
        ids = self._rows(idx, slots, idx, num_experts, 99)
        live = torch.arange(len(ids)).unsqueeze(1) < total
        ids = torch.where(live, local_ids(ids, num_experts, self.rank), torch.randint(0, local, ids.shape))
        per_expert = torch.bincount(ids[:total][ids[:total] >= 0], minlength=local).to(torch.int32)
        origin = self._rows(self.rank * self.most + torch.arange(len(x)).view(-1, 1), slots, idx, num_experts, 10**6)
        masters = torch.tensor([[last_lane(row >= 0)] for row in ids[:total]] + [[10**6]] * (len(ids) - total), dtype=torch.int64)
        meta = torch.cat([origin, masters, torch.full((len(ids), idx.shape[1]), 10**6)], 1).to(torch.int32)
        own = EPHandle(
            False, num_experts, 1, self.most, sms, idx, len(ids), 0, [], ends, per_expert.cumsum(0).to(torch.int32), per_expert, meta,
            slots, None, None,
        )  # fmt: skip
        got = self._rows(x, slots, idx, num_experts)
        got = got if scales is None else (got, self._rows(scales, slots, idx, num_experts))
        return got, ids, None if weights is None else self._rows(weights, slots, idx, num_experts), own, None

    @staticmethod
    def _check_repeats(idx: Any) -> None:
        used = idx.sort(1).values
        assert not ((used[:, 1:] == used[:, :-1]) & (used[:, 1:] >= 0)).any(), "device-side assert: an expert twice"

    def _slots(self, idx: Any, num_experts: int) -> Any:
        """int32 [T, K]: the place of each token at each rank, at its last slot there, in no promised order."""
        slots, local = torch.full(idx.shape, -1, dtype=torch.int32), num_experts // self.world
        for r in range(self.world):
            tokens = to_ranks(idx, num_experts)[:, r].nonzero().view(-1)
            order = torch.randperm(len(tokens))
            for place, t in zip(order.tolist(), tokens.tolist(), strict=True):
                slots[t, last_lane(idx[t] // local == r)] = self.rank * self.most + place
        return slots

    def _rows(self, mine: Any, slots: Any, idx: Any, num_experts: int, fill: Any = None) -> Any:
        local, parts = num_experts // self.world, []
        for r, (rows, at, ids) in enumerate(everyone((mine, slots, idx))):
            here = ((at >= 0) & (ids // local == self.rank)).nonzero()
            places = at[here[:, 0], here[:, 1]].long() - r * self.most
            part = torch.empty((len(here), *rows.shape[1:]), dtype=rows.dtype)
            part[places] = rows[here[:, 0]]
            parts.append(part)
        found, most = torch.cat(parts), self.world * self.most
        if found.dtype == torch.float8_e4m3fn:
            return padded(found.float(), most, float("nan")).to(found.dtype)
        return padded(found, most, float("nan") if fill is None else fill)

    def combine(self, x: Any, handle: Any, topk_weights: Any = None) -> tuple[Any, ...]:
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        assert x.shape[1] % 256 == 0
        assert x.shape[1] <= self.hidden
        assert len(x) == len(handle.recv_src_metadata) == self.world * self.most
        assert handle.num_sms > 0
        top_k, local = handle.topk_idx.shape[1], handle.num_experts // self.world
        assert handle.recv_src_metadata.shape[1] == top_k + 2
        if topk_weights is not None:
            assert topk_weights.shape == (len(x), top_k)
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
        return self._epilogue(handle.topk_idx, local, *self._arrived(x, topk_weights, handle))

    def _arrived(self, x: Any, weights: Any, handle: Any) -> tuple[Any, Any]:
        """What ranks have written into this one's buffer: by rank or, where they outnumber the slots, by slot. NaN elsewhere."""
        top_k = handle.topk_idx.shape[1]
        by_rank = self.world <= top_k
        rows = torch.full((self.world if by_rank else top_k, self.most, x.shape[1]), float("nan"))
        numbers = torch.full((*rows.shape[:2], top_k), float("nan"))
        for r, (theirs, w, meta, ends) in enumerate(everyone((x.float(), weights, handle.recv_src_metadata, handle.ends))):
            for i in range(0 if self.rank == 0 else int(ends[self.rank - 1]), int(ends[self.rank])):
                at = r if by_rank else int(meta[i, 1]), int(meta[i, 0]) % self.most
                rows[at] = theirs[i]
                if w is not None:
                    numbers[at] = w[i]
        return rows, None if weights is None else numbers

    def _epilogue(self, idx: Any, local: int, rows: Any, numbers: Any) -> tuple[Any, ...]:
        """Adds a token's rows up; the number of a slot is the one that its expert's rank sent."""
        out, sums = torch.zeros((len(idx), rows.shape[2])), torch.zeros(idx.shape)
        for t, ids in enumerate(idx):
            ranks = torch.where(ids >= 0, ids // local, -1)
            for r in sorted(set(ranks.tolist()) - {-1}):
                at = r if self.world <= len(ids) else last_lane(ranks == r), t
                out[t] += rows[at]
                if numbers is not None:
                    sums[t, ranks == r] = numbers[at][ranks == r]
        return out.to(torch.bfloat16), None if numbers is None else sums, None


def last_lane(which: Any) -> int:
    """The last place that is true: the lane that V2's kernels let speak for its like."""
    return int(which.nonzero()[-1])


class AllToAll(Living):
    """pplx_kernels.AllToAll."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(True)
        self.most, self.experts, self.top_k, self.rank, self.world, self.hidden, self.wide, self.scales = sizes
        self.own: Any = None

    @classmethod
    def intranode(
        cls, max_num_tokens: int, num_experts: int, experts_per_token: int, rank: int, world_size: int, dp_size: int, hidden_dim: int,
        hidden_dim_bytes: int, hidden_dim_scale_bytes: int, group_name: str = "default",
    ) -> AllToAll:  # fmt: skip
        assert world_size % dp_size == 0
        assert world_size // dp_size > 1
        assert dp_size == 1
        assert num_experts % world_size == 0
        assert hidden_dim_bytes % 16 == 0
        assert hidden_dim_scale_bytes % 16 == 0
        assert group_name == dist.group.WORLD.group_name
        return cls(max_num_tokens, num_experts, experts_per_token, rank, world_size, hidden_dim, hidden_dim_bytes, hidden_dim_scale_bytes)

    def dispatch(
        self, out_expert_num_tokens: Any, out_expert_x: Any, out_expert_x_scale: Any, dp_x: Any, dp_x_scale: Any, indices: Any,
        bound_m: Any, do_send: bool = True, do_recv: bool = True,
    ) -> None:  # fmt: skip
        local = self.experts // self.world
        assert self.own is None, "hangs: dispatch and combine take turns"
        assert indices.dtype == torch.uint32
        assert indices.shape == (len(dp_x), self.top_k)
        assert indices.is_contiguous()
        assert dp_x.is_contiguous()
        assert dp_x.shape[1] * dp_x.element_size() == self.wide
        assert len(dp_x) <= self.most
        assert out_expert_x.shape == (local, self.most * self.world, dp_x.shape[1])
        assert out_expert_num_tokens.dtype == torch.int32
        assert (self.scales > 0) == (dp_x_scale is not None) == (out_expert_x_scale is not None)
        out_expert_num_tokens.zero_()
        out_expert_x.fill_(float("nan"))
        self.own = {}
        if out_expert_x_scale is not None:
            out_expert_x_scale.fill_(float("nan"))
        for r, (rows, scales, idx) in shuffled(list(enumerate(everyone((dp_x, dp_x_scale, indices.view(torch.int32)))))):
            assert len(idx) == 0 or all(len(set(ids)) == len(ids) and min(ids) >= 0 and max(ids) < self.experts for ids in idx.tolist())
            for t, k in shuffled((idx // local == self.rank).nonzero().tolist()):
                e = int(idx[t, k]) % local
                at = int(out_expert_num_tokens[e])
                out_expert_x[e, at] = rows[t]
                if scales is not None:
                    out_expert_x_scale[e, at] = scales[t]
                out_expert_num_tokens[e] += 1
                self.own[e, r, t] = at

    def combine(
        self, out_tokens: Any, indices: Any, weights: Any, expert_y: Any, bound_m: Any, do_send: bool = True, do_recv: bool = True
    ) -> None:
        local = self.experts // self.world
        assert self.own is not None
        assert expert_y.is_contiguous()
        assert weights.dtype == torch.float32
        assert indices.dtype == torch.uint32
        assert out_tokens.dtype == torch.bfloat16
        assert out_tokens.shape == (len(indices), self.hidden) == (len(weights), self.hidden)
        everything, idx = everyone((expert_y.float(), self.own)), indices.view(torch.int32)
        out = torch.zeros(out_tokens.shape)
        for t, ids in enumerate(idx.tolist()):
            for k, one in enumerate(ids):
                rows, places = everything[one // local]
                out[t] += weights[t, k] * rows[one % local, places[one % local, self.rank, t]]
        out_tokens.copy_(out)
        self.own = None


# ---------------------------------------------------------------- installing
def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__file__ = f"/fake/{name}.py"
    made.__dict__.update(attributes)
    return made


def deep_ep(elastic: bool = True) -> types.ModuleType:
    more = {"ElasticBuffer": ElasticBuffer, "EPHandle": EPHandle, "__version__": "2.1.0"} if elastic else {}
    return module("deep_ep", Buffer=Buffer, Config=Config, topk_idx_t=torch.int64, **more)


def pplx_kernels() -> types.ModuleType:
    entries = types.SimpleNamespace(all_to_all_intranode_create=len)
    return module("pplx_kernels", AllToAll=AllToAll, ops=types.SimpleNamespace(_ops=entries))


@contextlib.contextmanager
def installed(*modules: types.ModuleType) -> Iterator[None]:
    """The modules can be imported, until the end of the block. What else is imported meanwhile stays."""
    before = {each.__name__: sys.modules.get(each.__name__) for each in modules}
    sys.modules.update({each.__name__: each for each in modules})
    libraries.forget()
    try:
        yield
    finally:
        for name, found in before.items():
            sys.modules.pop(name, None)
            if found is not None:
                sys.modules[name] = found
        libraries.forget()


# ---------------------------------------------------------------- what ranks run
def _close(got: Any, wanted: Any, limit: float, what: str, close: Any = cases._close) -> None:
    """With few tokens of 16 columns in bfloat16 the rounding of one row decides."""
    close(got, wanted, 4 * limit, what)


def layers(provider: str, seed: int, routings: tuple[str, ...], backward: bool, **fields: Any) -> int:
    """The routings with several numbers of tokens, as stages with gradients or as one op; then everything is given back, twice."""
    done = 0
    with installed(deep_ep(), pplx_kernels()), mock.patch.object(cases, "_close", _close):
        for routing in routings:
            for tokens in ([5, 3, 0, 7], [1, 0, 2, 1], [0], [17, 4, 9, 1]):
                for top_k, num_experts in ((2, 8), (1, 4), (4, 4)):
                    cases.one_layer(provider, tokens, top_k, num_experts, routing, seed + done, torch.bfloat16, backward=backward, **fields)
                    done += 1
        shared = len(ALIVE)
        exchange.destroy_all()
        exchange.destroy_all()
        assert not ALIVE
        assert not library_exchange._lent
    return shared


def quantised(provider: str) -> None:
    """Rows of fp8: expert e multiplies by e + 1."""
    setup = cases.setup_for(512, 2, 8, torch.bfloat16, quant="fp8", max_tokens=17, ids_valid=True)
    g = torch.Generator().manual_seed(dist.get_rank())
    tokens = (5, 17, 0, 1)[dist.get_rank()]
    x, w = torch.randn((tokens, 512), generator=g).bfloat16(), torch.rand((tokens, 2), generator=g)
    ids = cases.ids_for(tokens, 2, 8, "random", g)
    with installed(deep_ep(), pplx_kernels()):
        own = exchange.exchange_of(provider, setup.text, "cpu")
        got = own.dispatch(x, ids, [] if provider in BATCHED else [w])
        assert got.rows.dtype == torch.float8_e4m3fn
        assert got.scales.shape == (len(got.rows), 4)
        rows = payload.dequantize(got.rows, got.scales, torch.float32)
        first = dist.get_rank() * (8 // own.world)
        factors = torch.where(got.ids >= 0, got.ids + first + 1, 0) * (1 if provider in BATCHED else got.weights[0])
        y = torch.where((got.ids >= 0).any(1, keepdim=True), rows * factors.sum(1, keepdim=True), 0).bfloat16()
        out = own.collect(y, got.handle, torch.bfloat16, w if provider in BATCHED else None)
        exchange.destroy_all()
    _close(out, x.double() * (w.double() * (ids + 1)).sum(1, keepdim=True), 2e-2, provider)


def as_wide_as_slots() -> None:
    """V2's sum of rows that are as wide as a token has slots."""
    setup = cases.setup_for(256, 2, 8, torch.bfloat16, max_tokens=4)
    local = 8 // dist.get_world_size()
    with installed(deep_ep()):
        own = exchange.exchange_of("deepep_v2", setup.text, "cpu")
        got = own.dispatch(torch.zeros(1, 256).bfloat16(), torch.tensor([[0, local]]), [])
        out = own.collect(torch.full((len(got.ids), 2), 1.0 + dist.get_rank()).bfloat16(), got.handle, torch.bfloat16)
        exchange.destroy_all()
    assert out.tolist() == [[3.0, 3.0]]  # from ranks 0 and 1


def handles_like_fakes(provider: str, **fields: bool) -> None:
    """The op's fake gives tensors of the shapes and dtypes that the exchange gives."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    setup = cases.setup_for(16, 2, 8, torch.bfloat16, max_tokens=8, **fields)
    x, ids = torch.randn(5, 16).bfloat16(), torch.tensor([[0, 7], [3, 1], [2, 6], [5, 4], [1, 0]])
    weights = [] if MODULES[provider].PROVIDER.kernels.get(exchange.SLOTS) else [torch.rand(5, 2), torch.rand(5, 2).bfloat16()]
    with installed(deep_ep(), pplx_kernels()):
        got = quantize_dispatch.OP.overload(x, ids, 8, "none", provider, weights, setup.text)
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fake = [mode.from_tensor(each) for each in (x, ids, *weights)]
            like = quantize_dispatch.OP.overload(*fake[:2], 8, "none", provider, fake[2:], setup.text)
        for real, copy in zip(flat(got), flat(like), strict=True):
            assert (real.dtype, real.dim()) == (copy.dtype, copy.dim()), (provider, real.shape, copy.shape, real.dtype, copy.dtype)
            assert all(not isinstance(b, int) or a == b for a, b in zip(real.shape, copy.shape, strict=True)), (real.shape, copy.shape)
        if weights:  # a second set of weights came along, in its own dtype
            first, second = got[5]
            everything = torch.cat(everyone(torch.cat([w.float() for w in weights], 1)))
            pairs = torch.cat([first, second.float()], 1)[(first != 0).any(1)]
            for row in pairs.tolist():
                assert any(all(a in (0.0, b) for a, b in zip(row, each, strict=True)) for each in everything.tolist())
        exchange.destroy_all()


def flat(things: Any) -> list[Any]:
    return [each for thing in things for each in (thing if isinstance(thing, list | tuple) else [thing])]


def an_object_is_shared(provider: str) -> tuple[int, int, int]:
    """(objects made for two top_k and two widths, alive after one of three exchanges is gone, alive at the end)."""
    MADE.clear()
    with installed(deep_ep(), pplx_kernels()):
        setups = [cases.setup_for(h, k, 8, torch.bfloat16, max_tokens=8, ids_valid=True) for h, k in ((512, 2), (512, 3), (1024, 2))]
        found = [exchange.exchange_of(provider, setup.text, "cpu") for setup in setups]
        made = len(MADE)
        found[0].destroy()
        found[0].destroy()
        alive = len(ALIVE)
        exchange.destroy_all()
        return made, alive, len(ALIVE)


def raised(own: Any, text: str) -> None:
    with own.calling("dispatch"):
        raise RuntimeError(text)


def stopped() -> bool:
    raise RuntimeError("CUDA error: unspecified launch failure")


def what_goes_wrong(provider: str) -> dict[str, str]:
    """Messages of what an adapter refuses while it runs."""
    told: dict[str, str] = {}

    def note(what: str, call: Any) -> None:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            told[what] = f"{type(error).__name__}: {error}"

    x, ids = torch.randn(3, 256).bfloat16(), torch.tensor([[0, 1], [2, 3], [1, 7]])
    setup = cases.setup_for(256, 2, 8, torch.bfloat16, max_tokens=4, ids_valid=True)
    libraries.forget()
    note("no library", lambda: exchange.exchange_of(provider, setup.text, "cpu"))
    with installed(deep_ep(), pplx_kernels()):
        own: Any = exchange.exchange_of(provider, setup.text, "cpu")
        got = own.dispatch(x, ids, [])
        note("float32 sum", lambda: own.collect(got.rows.float(), got.handle, torch.float32))
        note("wide", lambda: own.collect(got.rows.repeat(1, 2), got.handle, torch.bfloat16))
        note("send", lambda: own.send(x, got.handle))
        if provider == "pplx":
            note("twice", lambda: own.dispatch(x, ids, []))
        own.collect(got.rows, got.handle, torch.bfloat16)
        if provider == "pplx":
            note("collect twice", lambda: own.collect(got.rows, got.handle, torch.bfloat16))
        note("tokens", lambda: own.dispatch(torch.zeros(9, 256).bfloat16(), ids.repeat(3, 1), []))
        note("refused", lambda: own.dispatch(x[:, :3], ids, []) if provider == "deepep_v2" else None)
        for what in ("DeepEP error: CPU recv timeout", "CUDA error: unspecified launch failure"):
            note(what, lambda what=what: raised(own, what))
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", stopped), mock.patch.object(own, "device", torch.device("cuda")):
            note("device dispatch", lambda: own.dispatch(x, ids, []))
            note("device combine", lambda: own.collect(got.rows, got.handle, torch.bfloat16))
            note("device check", exchange.check_all)
        own.destroy()
        note("destroyed", lambda: own.dispatch(x, ids, []))
        exchange.destroy_all()
    return told
