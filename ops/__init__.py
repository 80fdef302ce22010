"""The four stage ops of a MoE layer, torch.ops.moe_compile.*, and the providers that compute them.

    route -> quantize_dispatch -> permute_experts_unpermute -> combine

Shapes carry suffixes: T tokens, K top-k slots, E experts, H hidden, I intermediate, O output width, N = T*K slots, R rows.
Files: one a stage (route, quantize_dispatch, experts, combine); program, functions, infer, evaluate: the expert's
function as text; layout: parameters in place; registry: providers; experts_* and comm/: one provider each.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from . import (
    combine,
    exchange_async,
    exchange_experts,
    expert_shard,
    experts,
    experts_combine,
    experts_cpu,
    experts_cuda,
    experts_reference,
    experts_triton,
    experts_two_steps,
    grouped,
    inline,
    local_experts,
    quantize_dispatch,
    quantize_experts,
    registry,
    route,
)
from .comm import allgather, alltoall, deepep_ht, deepep_ll, deepep_v2, local, nvlink, nvlink_batched, payload, pplx, tokens
from .program import Program, parse
from .registry import Problem, Provider, providers, register

OPS = (
    route.OP,
    quantize_dispatch.OP,
    experts.OP,
    experts.SAVING_OP,
    experts.BACKWARD_OP,
    combine.OP,
    experts_combine.OP,
    grouped.OP,
    local_experts.OP,
    quantize_experts.OP,
    quantize_experts.QUANTIZE_OP,
)


def source_hash() -> str:
    """sha256 of this package's source: Inductor's cache does not key the bodies of custom ops (pytorch #160472)."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


__all__ = [
    "OPS",
    "Problem",
    "Program",
    "Provider",
    "allgather",
    "alltoall",
    "combine",
    "deepep_ht",
    "deepep_ll",
    "deepep_v2",
    "exchange_async",
    "exchange_experts",
    "expert_shard",
    "experts",
    "experts_combine",
    "experts_cpu",
    "experts_cuda",
    "experts_reference",
    "experts_triton",
    "experts_two_steps",
    "grouped",
    "inline",
    "local",
    "local_experts",
    "nvlink",
    "nvlink_batched",
    "parse",
    "payload",
    "pplx",
    "providers",
    "quantize_dispatch",
    "quantize_experts",
    "register",
    "registry",
    "route",
    "source_hash",
    "tokens",
]
