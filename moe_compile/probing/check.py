"""A program against the module that it was recorded from, on the module's own tensors.

The program does what the module did, step by step, and runs over no rows where the module skipped; so results and gradients must be equal
but for the last bit. Random arguments of few tokens and of many leave each expert without tokens in some, and hit it in others.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from moe_compile.probing.errors import NotProbed
from moe_compile.probing.outside import outside_put_back
from moe_compile.probing.program import Program
from moe_compile.probing.recording import Recording
from moe_compile.probing.state import put_back
from moe_compile.probing.steer import STEERINGS, Steered, steered
from moe_compile.probing.writes import put_back_written, written_now

log = logging.getLogger("moe_compile")
TOKENS = (2, 1, 3, 5, 17, 64, 2, 1, 3)
CLOSE, CLOSE_HALF = 1e-5, 4e-3


def check(module: nn.Module, forward: Any, program: Program, recording: Recording, args: tuple, kwargs: dict[str, Any]) -> int:
    """Raises NotProbed where the two differ; otherwise the number of calls that were compared."""
    done = 0
    calls: list[tuple[int, str | None]] = [(n, None) for n in TOKENS]
    calls += [(n, kind) for kind in STEERINGS for n in (2, 19)]
    calls += [(64, "first")]
    calls += [(recording.beyond, "first")] if recording.beyond else []
    with _untouched(module):
        for seed, (tokens, steering) in enumerate(calls):
            a, k = _arguments(recording, args, kwargs, tokens, seed, steering)
            if program.fits(module, a, k):
                with Steered(steering) if steering else nullcontext():
                    _compare(module, forward, program, a, k, seed)
                done += 1
        with other_mode(module):
            for seed, tokens in enumerate(TOKENS[:4]):
                a, k = _arguments(recording, args, kwargs, tokens, seed, None)
                if program.fits(module, a, k):
                    _compare(module, forward, program, a, k, seed)
    if done < 3:
        raise NotProbed(f"the program fits {done} of {len(calls)} random calls: too few to be checked")
    return done


def _arguments(
    r: Recording, args: tuple, kwargs: dict[str, Any], tokens: int, seed: int, steering: str | None
) -> tuple[tuple, dict[str, Any]]:
    """Random arguments like those of the recorded call, of other sizes."""
    gen = torch.Generator().manual_seed(seed)
    leaves, spec = tree_flatten((args, kwargs))
    sizes: dict[Any, int] = {}
    made = []
    for fake, x in zip(r.inputs, leaves):
        if isinstance(x, torch.Tensor):
            shape = [_size(s, sizes, tokens) for s in fake.shape]
            x = _random(x, shape, gen, r.classes, steering)
        made.append(x)
    a, k = tree_unflatten(made, spec)
    return a, k


def _size(s: Any, sizes: dict[Any, int], tokens: int) -> int:
    if isinstance(s, int):
        return s
    e = s.node.expr
    if e.is_number:
        return int(e)
    if e not in sizes:
        sizes[e] = tokens if not sizes else 1 + tokens // 3
    return sizes[e]


def _random(x: torch.Tensor, shape: list[int], gen: torch.Generator, classes: list[int], steering: str | None) -> torch.Tensor:
    if x.is_floating_point() or x.is_complex():
        return torch.randn(shape, generator=gen).to(x.device, x.dtype)
    if x.dtype is torch.bool:
        return (torch.rand(shape, generator=gen) < 0.5).to(x.device)
    high = int(x.max()) + 1 if x.numel() else 1
    low = min(int(x.min()), 0) if x.numel() else 0
    high = min((c for c in classes if c >= high), default=high)  # ids that the code counts, and that were not among these
    if len(shape) == 2 and shape[1] <= high - low:  # ids of a token are distinct
        scores = torch.rand(shape[0], high - low, generator=gen)
        scores = steered(scores, -1, shape[1], steering) if steering else scores
        return (scores.argsort(-1, descending=True)[:, : shape[1]] + low).to(x.device, x.dtype)
    return torch.randint(low, high, shape, generator=gen).to(x.device, x.dtype)


def _compare(module: nn.Module, forward: Any, program: Program, args: tuple, kwargs: dict[str, Any], seed: int) -> None:
    want, got = _both(module, forward, program, args, kwargs, seed)
    if got.keys() != want.keys():
        raise NotProbed(f"the program gives {sorted(got)} where the module gives {sorted(want)}")
    off = _largest(got, want)
    if off is not None and not _equal_in_float64(module, forward, program, args, kwargs, seed):
        raise NotProbed(f"for some routing, {off[0]} of the program is off by {off[1]:.1e}: what is skipped for no rows matters")


def _both(
    module: nn.Module, forward: Any, program: Program, args: tuple, kwargs: dict[str, Any], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the module gives, and what the program gives."""
    runs = (forward, lambda m, *a, **k: program.run(m, a, k))
    want, got = (_seen(module, run, args, kwargs, seed, program.written) for run in runs)
    return want, got


def _largest(got: dict[str, Any], want: dict[str, Any]) -> tuple[str, float] | None:
    """The first that differs by more than the order of a sum explains, and by how much."""
    for name, w in want.items():
        off = _difference(got[name], w, 1e-30 if name.startswith("output") else 1e-6)
        if off > (CLOSE if _exact(w) else CLOSE_HALF):
            return name, off
    return None


def _equal_in_float64(module: nn.Module, forward: Any, program: Program, args: tuple, kwargs: dict[str, Any], seed: int) -> bool:
    """Was it rounding, as of sums over many tokens in another order?"""
    a, k = tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (args, kwargs))
    try:
        want, got = _both(copy.deepcopy(module).double(), forward, program, a, k, seed)
    except Exception:  # the code names a dtype
        log.debug("%s in float64", type(module).__name__, exc_info=True)
        return False
    return got.keys() == want.keys() and _largest(got, want) is None


def _exact(t: Any) -> bool:
    return not isinstance(t, torch.Tensor) or t.dtype in (torch.float32, torch.float64) or not t.is_floating_point()


def _seen(
    module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any], seed: int, written: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    """Outputs, gradients, buffers and written attributes after one call."""
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in leaves]
    a, k = tree_unflatten([x * 1 if isinstance(x, torch.Tensor) and x.requires_grad else x for x in leaves], spec)  # may be written to
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    torch.manual_seed(seed)
    with torch.enable_grad(), put_back_written(module, written):
        out = forward(module, *a, **k)
        after = written_now(module, written)
        seen: dict[str, Any] = {f"output {i}": x for i, x in enumerate(tree_leaves(out))}
        seen["the kind of the output"] = str(tree_flatten(out)[1])
        seen.update(_gradients(module, leaves, seen))
    for n, b in module.named_buffers():
        seen[f"buffer {n}"] = b.clone()
        b.data.copy_(buffers[n])
    seen.update(after)
    seen.update({f"argument {i} afterwards": x for i, x in enumerate(tree_leaves((a, k)))})
    return {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in seen.items()}


def _gradients(module: nn.Module, leaves: list[Any], seen: dict[str, Any]) -> dict[str, Any]:
    outputs = [t for t in seen.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    wanted = {f"argument {i}": x for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad}
    wanted.update({n: p for n, p in module.named_parameters() if p.requires_grad})
    if not outputs or not wanted:
        return {f"gradient of {n}": torch.zeros_like(x) for n, x in wanted.items()}
    waves = [torch.linspace(-1, 1, max(t.numel(), 1), device=t.device)[: t.numel()].sin().reshape(t.shape).to(t.dtype) for t in outputs]
    grads = torch.autograd.grad(outputs, list(wanted.values()), waves, allow_unused=True)
    return {f"gradient of {n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), grads)}


def _difference(got: Any, want: Any, least: float) -> float:
    """Relative to the largest value; least: the smallest that counts as one (a gradient may be all rounding, an output may be small)."""
    if not isinstance(want, torch.Tensor):
        return 0.0 if got is want or got == want else float("inf")
    if not isinstance(got, torch.Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    got, want = got.double(), want.double()
    if not torch.equal(got.isnan(), want.isnan()) or not torch.equal(got.isinf(), want.isinf()):
        return float("inf")
    got, want = got.nan_to_num(posinf=0, neginf=0), want.nan_to_num(posinf=0, neginf=0)
    return float((got - want).abs().max() / want.abs().max().clamp(min=least))


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Random states, attributes and buffers are afterwards what they were."""
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    python = random.getstate()
    with torch.random.fork_rng([d for d in devices if d is not None]), put_back(module), outside_put_back(module):
        try:
            yield
        finally:
            random.setstate(python)


@contextmanager
def other_mode(module: nn.Module) -> Iterator[None]:
    """Training if it was evaluation, and the other way round."""
    modes = {m: m.training for m in module.modules()}
    try:
        module.train(not module.training)
        yield
    finally:
        for m, training in modes.items():
            m.training = training
