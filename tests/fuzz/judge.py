"""Compile one block and decide: rewritten as itself, refused, wrong, or crashed."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from corpus.harness import Seen, beyond_noise, error, observe, worst
from torch import Tensor, nn

from fuzz.mistakes import ROUNDING
from fuzz.source import Pair, source
from fuzz.spec import PLAIN, H, Spec

ROUTINGS = ("random", "to_one", "without_one")
BAD = ("WRONG", "CRASH", "INVALID")


@dataclass(frozen=True)
class Verdict:
    """status: rewritten | refused | WRONG | CRASH | INVALID (the block itself does not run); reason: why not rewritten, or what is bad."""

    spec: Spec
    status: str
    reason: str = ""

    @property
    def bad(self) -> bool:
        return self.status in BAD

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}\n{self.spec}\n\n{source(self.spec)}"


def judge(s: Spec) -> Verdict:
    """Compile with inner="eager"; compare with an equal block run eagerly, call after call, on inputs that no compilation saw."""
    import moe_compile

    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    pair = Pair(s)
    try:
        compiled = moe_compile.compile(pair.subject, inner="eager", report=report, dynamic=True if s.dynamic else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bad = _run(s, pair, compiled)
    finally:
        pair.forget()
        _forget_refusals()
    if bad:
        return Verdict(s, *bad)
    if report.rewritten and (done := _slots_rewritten(report)) < s.top_k and s.mistake == PLAIN:
        return Verdict(s, "refused", f"{done} of {s.top_k} slots are rewritten")
    return Verdict(s, "rewritten") if report.rewritten else Verdict(s, "refused", _why(report))


def _slots_rewritten(report: Any) -> int:
    """In the graph where the most are."""
    return max(sum(r.top_k or 0 for r in g.regions if r.rewritten) for g in report.graphs)


def _forget_refusals() -> None:
    """What the recording keeps for the next layer of a class that is gone now."""
    from moe_compile.probing import probe

    probe._REFUSED.clear()


def _run(s: Spec, pair: Pair, compiled: Any) -> tuple[str, str] | None:
    """What is bad, if anything: (status, what)."""
    calls = [(s.first, "random"), *zip(s.tokens, ROUTINGS[1:]), (s.first, "random")]
    for n, (tokens, routing) in enumerate(calls):
        for block in (pair.subject, pair.reference):
            _steer(block, routing)
            if n == 2:
                _edit(block, s.edit)
        x = _inputs(s, tokens, seed=n)
        before = copy.deepcopy(pair.reference)
        try:
            want = observe(pair.reference, pair.reference, x, s.grad)
        except Exception as e:  # noqa: BLE001  the grammar is to be mended
            return "INVALID", f"call {n}: {type(e).__name__}: {e}"
        try:
            got = observe(compiled, pair.subject, x, s.grad)
        except Exception as e:  # noqa: BLE001  whatever it raises is a verdict
            return "CRASH", f"call {n}, {tokens} tokens {routing}: {type(e).__name__}: {str(e)[:300]}"
        if off := _differs(s, before, x, got, want) or _state(pair):
            return "WRONG", f"call {n}, {tokens} tokens {routing}: {off}"
    return None


def _inputs(s: Spec, tokens: int, seed: int) -> Tensor:
    x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(100 + seed))
    return x.unsqueeze(0) if s.batched else x


def _steer(block: Any, routing: str) -> None:
    """All tokens to the last expert, none to the first, or as routed: by the router's bias."""
    push = {"to_one": (-1, 50.0), "without_one": (0, -50.0)}.get(routing)
    with torch.no_grad():
        bias = block.gate.bias
        bias.copy_(torch.linspace(-0.1, 0.1, bias.numel()))
        if push is not None:
            bias[push[0]] += push[1]


def _edit(block: Any, edit: str) -> None:
    """What a user may change after the compilation."""
    with torch.no_grad():
        if edit == "in_place":
            for p in block.parameters():
                p.mul_(0.8)
        if edit == "replaced":
            block.gate.weight = nn.Parameter(block.gate.weight.detach() * -1)
    if edit == "other_mode":
        block.train(not block.training)
    home = sys.modules[type(block).__module__]
    if edit == "top_k":
        home.K = 1  # type: ignore[attr-defined]
    if edit == "settings":
        _edit_settings(block, vars(home))


def _edit_settings(block: Any, names: dict[str, Any]) -> None:
    """Whichever of them it has."""
    for thing in (block, names.get("OBJECT")):
        if hasattr(thing, "scale"):
            thing.scale = 0.4
    if hasattr(type(block), "SCALE"):
        type(block).SCALE = 0.4
    if hasattr(block, "scales"):
        block.scales[0] = 2.0
    names = {**names, "settings": getattr(block, "settings", {}), "SCALES": getattr(block, "SCALES", [0, 0])}
    for name, key in (("settings", "scale"), ("SCALES", 1), ("CONFIG", "scale"), ("LIMITS", 1), ("BOX", 0), ("TABLE", 0)):
        if name in names:
            names[name][key] = 0.4


def _differs(s: Spec, before: nn.Module, x: Tensor, got: Seen, want: Seen) -> str:
    """Names of what is wrong by more than rounding."""
    tolerance = 3e-2 if s.mistake in ROUNDING else 1e-4
    if worst(got, want)[0] <= tolerance:
        return ""
    if len(got.outputs) != len(want.outputs) or got.grads.keys() != want.grads.keys():
        return worst(got, want)[1]
    values = [f"output {i} by {off:.1e}" for i, (g, w) in enumerate(zip(got.outputs, want.outputs)) if (off := error(g, w)) > tolerance]
    if values:
        return ", ".join(values)
    exact = before.double()
    names = beyond_noise(got, want, observe(exact, exact, x.double(), s.grad), tolerance)
    return ", ".join(f"{n} by {error(got.items()[n], want.items()[n]):.1e}" for n in names)


def _state(pair: Pair) -> str:
    """Buffers that are not what they should be."""
    want = dict(pair.reference.named_buffers())
    return ", ".join(f"buffer {n}" for n, b in pair.subject.named_buffers() if error(b, want[n]) > 1e-5)


# ---------------------------------------------------------------- reasons
def _why(report: Any) -> str:
    left = [n for n in report.notes if "stays as it is" in n]
    noted = [n for n in report.notes if "is captured from" not in n]
    found = left or [str(r.reason) for r in report.refused] or noted
    return found[0] if found else "no routing decision was found"


def kind_of(reason: str) -> str:
    """The first reason without names, numbers and places."""
    text = re.sub(r"^.*(stays as it is: |no MoE block was rewritten \()", "", reason.splitlines()[0].split("; ")[0])
    text = re.sub(r"\(`[^`]*`\)|`[^`]*`", "", text)
    text = re.sub(r"\S+\.py:\d+ ?\)?:? ", "", text)
    text = re.sub(r"^\w+: (?=[a-z])", "", text)
    text = re.sub(r"\b\w+_\d+\b|\d[\d.e+-]*", "#", text)
    return text[:120]
