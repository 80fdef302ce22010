"""Compile one mutant and decide: rewritten as itself, refused, or wrong."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from corpus.harness import Seen, distance, missing_grads, observe, worst

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


def judge(family: str, mutation: str | None, validate: str = "auto") -> Verdict:
    """Compile with inner="eager"; compare with the mutant run eagerly on fresh inputs, gradients too."""
    import moe_compile

    torch._dynamo.reset()
    module, report = build(family, mutation), moe_compile.RewriteReport()
    compiled = moe_compile.compile(module, inner="eager", validate=validate, report=report)
    cases = [(routing, 20 + seed) for seed, routing in enumerate(ROUTINGS)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [_compare(family, mutation, module, compiled, *case) for case in cases]
    except Exception as error:  # noqa: BLE001  (a crash of the compiler is a verdict)
        return Verdict(family, mutation, "CRASH", float("inf"), reason=f"{type(error).__name__}: {error}"[:300])
    bad, error, of, none_grads = max(found)
    status = "WRONG" if bad else "rewritten" if report.rewritten else "refused"
    reasons = "; ".join(str(r.reason) for r in report.refused) or "; ".join(report.notes)
    return Verdict(family, mutation, status, error, of, reasons, none_grads)


def _compare(family, mutation, module, compiled, routing, seed) -> tuple[bool, float, str, tuple[str, ...]]:
    set_routing(module, routing)
    x = inputs(family, seed)
    want, got = observe(module, module, x, grad=True), observe(compiled, module, x, grad=True)
    error, of = worst(got, want)
    bad = error > _tolerance(family, mutation) or not _nearest_to_itself(
        family, mutation, module, routing, x, got, want
    )
    return bad, error, f"{of} ({routing})", tuple(missing_grads(got, want))


def _tolerance(family: str, mutation: str | None) -> float:
    dtype = build(family, None).dtype
    return TOLERANCE[torch.bfloat16 if mutation in ROUNDING else dtype]


def _nearest_to_itself(family, mutation, module, routing, x, got: Seen, want: Seen) -> bool:
    """Where rounding forbids a tight tolerance: clearly nearer to the mutant than to the original."""
    loose = _tolerance(family, mutation) > 1e-3
    if not loose or mutation is None or same_meaning(family, mutation):
        return True
    original = build(family, None)
    set_routing(original, routing)
    away = distance(observe(original, original, x, grad=True), want)
    return distance(got, want) <= max(0.5 * away, 1e-7) or away < 1e-7


__all__ = ["GRADIENT_ONLY", "Verdict", "judge"]
