"""Times of this machine's exchanges: measured on request, kept in the user's cache, and put before the shipped tables.

    moe_compile.calibrate(parallel, hidden=4096, num_experts=64, top_k=6)      # all ranks; seconds, once for a machine

The choice over ranks must be alike on all of them, so the group's first rank reads the file and tells the others.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_compile.config import ParallelConfig
from moe_compile.ops import registry
from moe_compile.ops.comm import costs
from moe_compile.ops.comm.exchange import CAP, EXCHANGE, SLOTS, ExchangeError
from moe_compile.ops.comm.setup import Setup
from moe_compile.ops.registry import Problem

log = logging.getLogger("moe_compile")
TOKENS = (16, 128, 1024, 4096)
WARM = 3  # calls before those that are timed


def calibrate(
    parallel: ParallelConfig,
    *,
    hidden: int = costs.REFERENCE.hidden,
    num_experts: int = 256,
    top_k: int = costs.REFERENCE.top_k,
    dtype: torch.dtype = torch.bfloat16,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 10,
    keep: bool = True,
) -> costs.Table:
    """Microseconds of dispatch + collect of each provider on this group, the maximum over ranks of the median, eager.

    A collective call of the ep group. tokens: of a rank; a provider is timed at those that it takes in one call. The table decides the
    choices of this process from now on, for layers of any size, and (keep) of later ones on this machine, in cache_file(). Raises
    ValueError for a configuration of one rank, or one that ranks disagree on.
    """
    from moe_compile.groups import validate

    parallel = validate(parallel)
    if parallel.ep == 1:
        raise ValueError("calibrate: ep is 1, nothing is exchanged; give the ParallelConfig of the ranks that share experts")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    problem = Problem(
        "comm", device.type, dtype, hidden, num_experts=num_experts, top_k=top_k, quant=parallel.quant, world=parallel.ep,
        max_tokens=max(tokens), same_host=parallel.same_host, ids_valid=True,
    )  # fmt: skip
    setup = Setup(
        parallel.ep_group.group_name, hidden, top_k, num_experts, str(dtype).removeprefix("torch."), parallel.quant, max(tokens),
        float(parallel.timeout), ids_valid=True,
    )  # fmt: skip
    points = {}
    for provider in registry.providers("comm"):
        if _agreed(provider.supports(problem), setup) is None:
            points[provider.name] = _timed(provider, setup, device, sorted(tokens), repeats)
    shape = costs.Shape(hidden, top_k, dtype.itemsize)
    table = costs.Table(shape, f"calibrated {datetime.date.today()}", {name: found for name, found in points.items() if found})
    costs.use(costs.key_of(problem), table)
    if keep and dist.get_rank(parallel.ep_group) == 0:
        _keep(costs.key_of(problem), table)
    return table


def _agreed(reason: str | None, setup: Setup) -> str | None:
    """The first reason of any rank."""
    reasons: list[Any] = [None] * setup.world
    dist.all_gather_object(reasons, reason, group=setup.process_group)
    return next(filter(None, reasons), None)


def _timed(provider: registry.Provider, setup: Setup, device: Any, tokens: Sequence[int], repeats: int) -> dict[int, float]:
    """tokens -> microseconds, of those that the provider takes at once; nothing where it fails on a rank."""
    cap = provider.kernels[CAP](setup) if CAP in provider.kernels else 0
    setup = dataclasses.replace(setup, max_tokens=min(setup.max_tokens, cap or setup.max_tokens))
    found: dict[int, float] = {}
    try:
        own = provider.kernels[EXCHANGE](setup, device)
        try:
            for count in (t for t in tokens if t <= setup.max_tokens):
                found[count] = _microseconds(own, SLOTS in provider.kernels, count, repeats)
        finally:
            own.destroy()
    except (ExchangeError, MemoryError, torch.OutOfMemoryError) as error:
        log.warning("calibrate: %s is left out: %s", provider.name, error)
        found = {}
    return {} if _agreed(None if found else "it failed", setup) else found


def _microseconds(own: Any, batched: bool, tokens: int, repeats: int) -> float:
    setup, device = own.setup, own.device
    g = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn((tokens, setup.hidden), generator=g).to(device, setup.torch_dtype)
    ids = torch.rand((tokens, setup.num_experts), generator=g).topk(setup.top_k, -1).indices.to(device)
    w = torch.rand((tokens, setup.top_k), generator=g).to(device)

    def call() -> None:
        got = own.dispatch_views(x, ids, [] if batched else [w])
        rows = got.rows if setup.quant == "none" else got.rows.to(x.dtype)
        own.collect(rows, got.handle, x.dtype, w if batched else None)

    for _ in range(WARM):
        call()
    times = [_once(call, setup, device) for _ in range(repeats)]
    worst = torch.tensor([statistics.median(times)], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=setup.process_group)
    return float(worst)


def _once(call: Callable[[], None], setup: Setup, device: Any) -> float:
    dist.all_reduce(torch.zeros(1, device=device), group=setup.process_group)  # ranks start together
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * 1e6


# ---------------------------------------------------------------- the user's cache
def cache_file() -> Path:
    """Where calibrated tables are kept."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("moe_compile", appauthor=False)) / "exchange_costs.json"


def _keep(key: costs.Key, table: costs.Table) -> None:
    from filelock import FileLock

    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        tables = {**_read(file), key: table}
        file.write_text(json.dumps([costs.to_json(*each) for each in tables.items()], indent=1))


def _read(file: Path) -> dict[costs.Key, costs.Table]:
    """The tables of a file; none, with a warning, if something else stands there."""
    if not file.exists():
        return {}
    try:
        return dict(costs.from_json(each) for each in json.loads(file.read_text()))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        log.warning(
            "%s holds no exchange costs (%s: %s); shipped ones are used. calibrate() writes it anew", file, type(error).__name__, error
        )
        return {}


def use_kept(group: Any) -> None:
    """Tables of earlier calibrations for groups of this size, as the group's first rank has them; a collective call."""
    told: list[Any] = [None]
    if dist.get_rank(group) == 0:
        told[0] = _told_of_size(dist.get_world_size(group))
    dist.broadcast_object_list(told, group=group, group_src=0)
    if isinstance(told[0], str):
        raise RuntimeError(f"the calibrated exchange costs cannot be read on rank {dist.get_global_rank(group, 0)}: {told[0]}")
    for each in told[0]:
        costs.use(*costs.from_json(each))


def _told_of_size(world: int) -> list[Any] | str:
    """The kept tables for groups of this size, or why they cannot be had: no rank may wait for one that raised."""
    try:
        return [costs.to_json(key, table) for key, table in _read(cache_file()).items() if key.world == world]
    except Exception as error:  # noqa: BLE001  raised on all ranks
        return f"{type(error).__name__}: {error}"
