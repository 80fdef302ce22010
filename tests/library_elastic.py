"""A stand-in for DeepEP V2 (deep_ep.ElasticBuffer) on a CPU. The order that it does not promise is shuffled; undefined rows are NaN."""

from __future__ import annotations

from typing import Any

import torch
from library_base import Living, everyone, local_ids, padded, to_ranks


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
