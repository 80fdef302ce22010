"""A stand-in for pplx-kernels' AllToAll on a CPU, which checks that dispatch and combine take turns."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from library_base import Living, everyone, shuffled


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
