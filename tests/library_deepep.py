"""A stand-in for DeepEP V1 (deep_ep.Buffer) on a CPU: the same calls and refusals. What the kernels leave undefined is NaN or nonsense."""

from __future__ import annotations

from typing import Any

import torch
from library_base import Living, everyone, local_ids, padded, shuffled, to_ranks

from moe_compile.ops import payload


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
