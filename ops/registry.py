"""Providers: who computes a stage. Each names its ops, its limits and its cost; passes/select.py chooses among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

STAGES = ("route", "comm", "experts")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a provider is asked to compute, as far as it is known at compile time.

    stage: one of STAGES. tokens: T, of the first call where it varies, or None if unknown. program, weight_layout: as in
    permute_experts_unpermute.
    format: "standard" rows with ids, or "batched" [E, capacity, H]. world: ranks that share the experts (the
    experts stage is asked about those of one rank). compiler: the inner compiler's name, if it has one. max_tokens: the most that a
    rank dispatches, 0 if unknown. cuda_graphs: the call must be capturable. same_host: all ranks of the group are on one machine.
    ids_valid: each of a token's ids names an expert, and no expert twice.
    """

    stage: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    hidden: int = 0
    intermediate: int = 0
    num_experts: int = 0
    top_k: int = 1
    tokens: int | None = None
    program: str = ""
    weight_layout: str = ""
    quant: str = "none"
    format: str = "standard"
    world: int = 1
    training: bool = False
    compiler: str = ""
    max_tokens: int = 0
    cuda_graphs: bool = False
    same_host: bool = True
    ids_valid: bool = False


def _anything(problem: Problem) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a stage.

    kernels: op name -> implementation, called by that op with its prepared arguments.
    supports: None if the provider can take the problem, else the reason, with value and limit, why not.
    cost: estimated microseconds of one forward, comparable within a stage.
    replays: its kernels decide by sizes, strides, dtypes, devices, alignment and constants, and start kernels by replay.start alone, so
    that calls may be replayed.
    """

    name: str
    stage: str
    kernels: Mapping[str, Callable[..., Any]]
    cost: Callable[[Problem], float]
    supports: Callable[[Problem], str | None] = _anything
    replays: bool = False


_providers: dict[tuple[str, str], Provider] = {}


def register(provider: Provider) -> Provider:
    """Adds a provider, or replaces the one of the same stage and name. Raises ValueError for an unknown stage."""
    if provider.stage not in STAGES:
        raise ValueError(f"provider {provider.name!r} is for stage {provider.stage!r}; stages are {', '.join(STAGES)}")
    _providers[provider.stage, provider.name] = provider
    return provider


def providers(stage: str) -> list[Provider]:
    """All providers of a stage in the order of registration. Raises ValueError for an unknown stage."""
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")
    return [provider for (at, _), provider in _providers.items() if at == stage]


def get(stage: str, name: str) -> Provider:
    """The provider of that name. Raises ValueError naming the registered ones."""
    provider = _providers.get((stage, name))
    if provider is None:
        known = ", ".join(each.name for each in providers(stage))
        raise ValueError(f"no provider {name!r} is registered for stage {stage!r}; registered: {known}")
    return provider


def kernel(stage: str, name: str, op: str) -> Callable[..., Any]:
    """The provider's implementation of an op. Raises ValueError if the provider or its op is missing."""
    found = get(stage, name).kernels.get(op)
    if found is None:
        raise ValueError(f"provider {name!r} of stage {stage!r} does not implement {op}")
    return found


def replays(stage: str, at: int) -> Callable[[tuple[Any, ...]], bool]:
    """Of an op's arguments: may calls of the provider that stands at that place among them be replayed?"""

    def asked(args: tuple[Any, ...]) -> bool:
        found = _providers.get((stage, args[at]))
        return found is not None and found.replays

    return asked
