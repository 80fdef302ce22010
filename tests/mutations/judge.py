"""Compile one mutant and decide: rewritten as itself, refused, or wrong."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from corpus.harness import Seen, beyond_noise, distance, missing_grads, observe, worst
from torch import Tensor, nn

from mutations.catalogue import GRADIENT_ONLY, ROUNDING, ROUTINGS, build, inputs, same_meaning, set_routing

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Verdict:
    """status: rewritten | refused | WRONG | CRASH; error: the largest over routings, in what `of` names."""

    family: str
    mutation: str | None
    status: str
    error: float = 0.0
    of: str = ""
    reason: str = ""
    none_grads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.family}-{self.mutation or 'original'}"


@dataclass(frozen=True)
class Subject:
    """What is judged: the mutant, or a stack of the original and the mutant (equal layers are analysed once)."""

    family: str
    mutation: str | None
    second_layer: bool = False

    def build(self, mutated: bool = True) -> nn.Module:
        last = build(self.family, self.mutation if mutated else None)
        return nn.Sequential(build(self.family, None), last) if self.second_layer else last

    @property
    def tolerance(self) -> float:
        dtype = torch.bfloat16 if self.mutation in ROUNDING else build(self.family, None).dtype
        return TOLERANCE[dtype] * (3 if self.second_layer else 1)


def judge(family: str, mutation: str | None, second_layer: bool = False, **compile_kwargs: Any) -> Verdict:
    """Compile with inner="eager"; compare with the mutant run eagerly on fresh inputs, gradients too."""
    import moe_compile

    torch._dynamo.reset()
    subject, report = Subject(family, mutation, second_layer), moe_compile.RewriteReport()
    module = subject.build()
    compiled = moe_compile.compile(module, inner="eager", report=report, **compile_kwargs)
    cases = [(routing, 20 + seed) for seed, routing in enumerate(ROUTINGS)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [_compare(subject, module, compiled, *case) for case in cases]
    except Exception as error:  # noqa: BLE001  (a crash of the compiler is a verdict)
        return Verdict(family, mutation, "CRASH", float("inf"), reason=f"{type(error).__name__}: {error}"[:300])
    bad, error, of, none_grads = max(found)
    wanted = 2 if second_layer else 1
    status = "WRONG" if bad else "rewritten" if len(report.rewritten) >= wanted else "refused"
    reasons = "; ".join(str(r.reason) for r in report.refused) or "; ".join(report.notes)
    return Verdict(family, mutation, status, error, of, reasons, none_grads)


def _compare(subject, module, compiled, routing, seed) -> tuple[bool, float, str, tuple[str, ...]]:
    set_routing(module, routing)
    x = inputs(subject.family, seed)
    want, got = observe(module, module, x, grad=True), observe(compiled, module, x, grad=True)
    error, of = worst(got, want)
    bad = False
    if error > subject.tolerance:
        wider = torch.float64 if x.dtype is torch.float32 else torch.float32  # grouped_mm has no float64
        exact = copy.deepcopy(module).to(wider)
        off = beyond_noise(got, want, observe(exact, exact, x.to(wider), grad=True), subject.tolerance)
        bad, of = bool(off), ", ".join(off) or of
    bad = bad or not _nearest_to_itself(subject, routing, x, got, want)
    return bad, error, f"{of} ({routing})", tuple(missing_grads(got, want))


def _nearest_to_itself(subject: Subject, routing: str, x: Tensor, got: Seen, want: Seen) -> bool:
    """Where rounding forbids a tight tolerance: clearly nearer to the mutant than to the original."""
    if subject.tolerance < 1e-3 or subject.mutation is None or same_meaning(subject.family, subject.mutation):
        return True
    if subject.mutation == "accumulator_bf16":
        return True  # its dtype tells it from the original; combine may sum in float32 before it rounds
    original = subject.build(mutated=False)
    set_routing(original, routing)
    away = distance(observe(original, original, x, grad=True), want)
    return away < subject.tolerance / 2 or distance(got, want) <= 0.5 * away


__all__ = ["GRADIENT_ONLY", "Verdict", "judge"]
