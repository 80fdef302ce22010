"""A rank that dies or stalls is an error on every other one, within the configured time, that names the stage and the group."""

from __future__ import annotations

import parallel_cases as cases
import pytest
from ranks import Ranks


@pytest.mark.parametrize("how", ["dies", "stalls"])
@pytest.mark.parametrize("provider", ["alltoall", "allgather"])
def test_a_lost_rank_is_an_error_on_all_others(provider: str, how: str) -> None:
    with Ranks(3) as ranks:
        told = ranks.run_some([0, 2], cases.dead_rank, provider, 1, how, timeout=40)
    for text in told:
        seconds, _, message = text.partition(" s: ")
        assert float(seconds) < 12
        assert message.startswith(provider)
        assert "group (ranks [0, 1, 2])" in message
        assert "timeout 4 s" in message
