"""Shipped tables of exchange costs, in microseconds of dispatch + collect: benchmarks/exchange.py, the better of eager and CUDA graph.

Results and commands: benchmarks/results/h200_exchange.md; deepep_ht and alltoall in bfloat16: h200_exchange_later.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from .costs import REFERENCE, Key, Table

_ORIGIN = "4 H200 of one host, torch 2.11"

SHIPPED: Mapping[Key, Table] = {
    Key("H200", 4, "none"): Table(
        REFERENCE,
        _ORIGIN,
        {
            "nvlink": {1: 20, 16: 24, 128: 51, 512: 144, 4096: 969},
            "nvlink_batched": {1: 36, 16: 43, 128: 110, 512: 314},
            "allgather": {1: 79, 16: 87, 128: 150, 512: 260, 4096: 1291},
            "alltoall": {128: 1032, 4096: 2934},
            "deepep_ht": {128: 118, 4096: 1168},
            "deepep_ll": {1: 49, 16: 56, 128: 129, 512: 401},
            "deepep_v2": {128: 95, 4096: 1259},
            "pplx": {16: 55, 128: 157, 4096: 3875},
        },
    ),
    Key("H200", 4, "fp8"): Table(
        REFERENCE,
        _ORIGIN,
        {
            "nvlink": {128: 44, 4096: 753},
            "allgather": {128: 189, 4096: 1505},
            "deepep_v2": {128: 116, 4096: 1407},
        },
    ),
}
