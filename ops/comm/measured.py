"""Shipped tables of exchange costs, in microseconds of dispatch + collect: benchmarks/exchange.py, the better of eager and CUDA graph.

Results and commands: benchmarks/results/h200_exchange.md; deepep_ht and alltoall in bfloat16: h200_exchange_later.md; two ranks:
h200_exchange_2.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from .costs import REFERENCE, Key, Table

_ORIGIN = "4 H200 of one host, torch 2.11"
_OF_TWO = "2 H200 of one host, torch 2.11"

SHIPPED: Mapping[Key, Table] = {
    Key("H200", 2, "none"): Table(
        REFERENCE,
        _OF_TWO,
        {
            "nvlink": {1: 18, 16: 20, 128: 30, 512: 70, 4096: 377},
            "nvlink_batched": {1: 35, 16: 39, 128: 84, 512: 224},
            "allgather": {1: 69, 16: 74, 128: 114, 512: 166, 4096: 649},
            "alltoall": {1: 972, 16: 1081, 128: 1038, 512: 1166, 4096: 1864},
            "deepep_ht": {1: 81, 16: 86, 128: 94, 512: 149, 4096: 539},
            "deepep_ll": {1: 48, 16: 51, 128: 101, 512: 287},
            "deepep_v2": {1: 55, 16: 58, 128: 70, 512: 113, 4096: 526},
            "pplx": {1: 48, 16: 52, 128: 108},
        },
    ),
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
