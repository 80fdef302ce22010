"""Shipped tables of exchange costs (benchmarks/exchange.py; results in benchmarks/results). Microseconds, dispatch + collect."""

from __future__ import annotations

from collections.abc import Mapping

from .costs import Key, Table

SHIPPED: Mapping[Key, Table] = {}
