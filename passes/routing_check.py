"""Execute a router before and after: on random logits, on ties, and on a row of NaN."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from moe_compile.ops import route

from .decisions import tensor_of
from .router import Traced
from .validate import STRICT, Mismatch, _concrete, _double, _hint, _upcast
from .window import symbolic

EQUAL = 1e-6  # of weights, relative to the largest; ids are equal to the bit
KINDS = ("random logits", "ties", "a row of NaN")


def check(traced: Traced, old: GraphModule, new: GraphModule, training: bool) -> str:
    """Raises Mismatch; returns words for the report."""
    start = time.perf_counter()
    inputs = traced.window.inputs
    generator = torch.Generator().manual_seed(0x5EED)
    for kind in KINDS:
        args = [_fresh(traced, n, kind, generator) for n in inputs]
        _compare(_forward(old, args), _forward(new, args), EQUAL, kind)
        if training and kind != "a row of NaN":
            args = [_double(a) for a in args]
            wanted = [(t := tensor_of(n)) is not None and t.requires_grad for n in inputs]
            _compare(_gradients(old, args, wanted), _gradients(new, args, wanted), STRICT, f"{kind}, gradients in float64")
    took = f"({(time.perf_counter() - start) * 1e3:.0f} ms)"
    return f"router on {', '.join(KINDS)}: ids and weights{' and gradients' if training else ''} equal {took}"


def _fresh(traced: Traced, n: Node, kind: str, g: torch.Generator) -> Any:
    v = symbolic(n)
    if isinstance(v, torch.SymInt):
        return _hint(v)
    if not isinstance(v, torch.Tensor):
        return float(v) if isinstance(v, torch.SymFloat) else v
    shape = _concrete(v.shape)
    pinned = [f for u, f in traced.trace.floats.items() if n in u.all_input_nodes]
    if pinned and not shape:  # a float attribute under dynamic=True
        return torch.tensor(pinned[0], dtype=v.dtype, device=v.device)
    if not v.dtype.is_floating_point:
        return torch.zeros(shape, dtype=v.dtype, device=v.device)
    x = torch.randn(shape, generator=g)
    if len(shape) > 1:
        x = x.mul(2).round() / 2 if kind == "ties" else x
        if kind == "a row of NaN":
            x.reshape(-1, shape[-1])[:1] = float("nan")
    return (x if len(shape) > 1 else x / 8).to(v.device, v.dtype)


def _forward(gm: GraphModule, args: list[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return _run(gm, [a.clone() if isinstance(a, torch.Tensor) else a for a in args])


def _run(gm: GraphModule, args: list[Any]) -> list[torch.Tensor]:
    """Outputs with torch's functions in `route`: what is compared is its meaning, to the bit."""
    devices = {a.device.index for a in args if isinstance(a, torch.Tensor) and a.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), route.by_torch():
        torch.manual_seed(7)
        return [t for t in tree_leaves(gm(*args)) if isinstance(t, torch.Tensor)]


def _gradients(gm: GraphModule, args: list[Any], wanted: list[bool]) -> list[torch.Tensor]:
    """Of a fixed projection of all outputs, by every input that has them in the model."""
    with torch.enable_grad(), _upcast():
        own = [a.clone().requires_grad_() if want else a for a, want in zip(args, wanted)]
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in own]  # in-place ops may not hit a leaf
        outputs = [t for t in _run(gm, given) if t.requires_grad]
        leaves = [a for a in own if isinstance(a, torch.Tensor) and a.requires_grad]
        grads = torch.autograd.grad(outputs, leaves, [_projection(t) for t in outputs], allow_unused=True) if outputs else []
    return [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, grads)]


def _projection(t: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, t.numel() + 1, device=t.device, dtype=torch.float64).sin().reshape(t.shape).to(t.dtype)


def _compare(want: list[torch.Tensor], got: list[torch.Tensor], limit: float, what: str) -> None:
    if len(got) != len(want):
        raise Mismatch(f"the router gives {len(got)} tensors instead of {len(want)}")
    for a, b in zip(got, want):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(f"the router gives {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}")
        if not torch.equal(a.isnan(), b.isnan()) or not _equal(a.nan_to_num(), b.nan_to_num(), limit):
            raise Mismatch(f"the router differs on {what}")


def _equal(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    if torch.equal(a, b):
        return True
    if not b.is_floating_point() or not b.numel():
        return False
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) <= limit * float(b.abs().max().clamp(min=1e-30))
