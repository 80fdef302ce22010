"""Run a module, eager or compiled, and compare what comes out: values, gradients of inputs and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Dynamo's flags under which data-dependent shapes and .tolist() stay in one graph.
CAPTURE = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}


@dataclass
class Seen:
    """Floating outputs by position, and gradients by name ("input", or the parameter's)."""

    outputs: list[Tensor]
    grads: dict[str, Tensor | None] = field(default_factory=dict)

    def items(self) -> dict[str, Tensor | None]:
        return {
            **{f"output {i}": t for i, t in enumerate(self.outputs)},
            **{f"d {n}": g for n, g in self.grads.items()},
        }


def tensors(out: Any) -> list[Tensor]:
    """The floating tensors of an output: a tensor, a (nested) tuple or list, a mapping."""
    if torch.is_tensor(out):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        out = list(out.values())
    return [t for part in out for t in tensors(part)] if isinstance(out, (tuple, list)) else []


def observe(fn: Callable[..., Any], module: nn.Module, x: Tensor, grad: bool) -> Seen:
    """Call fn(x); with `grad` also differentiate a fixed random projection of all outputs."""
    torch.manual_seed(5)  # code that draws random numbers draws the same ones
    if not grad:
        with torch.no_grad():
            return Seen([t.detach().clone() for t in tensors(fn(x))])
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    outputs = tensors(fn(x))
    gen = torch.Generator().manual_seed(11)
    loss = sum((t * torch.randn(t.shape, generator=gen).to(t.dtype)).sum() for t in outputs if t.requires_grad)
    if torch.is_tensor(loss):
        loss.backward()
    grads = {"input": x.grad, **{n: p.grad for n, p in module.named_parameters()}}
    return Seen([t.detach().clone() for t in outputs], {n: g if g is None else g.clone() for n, g in grads.items()})


def error(got: Tensor | None, want: Tensor | None) -> float:
    """Largest difference relative to the largest wanted value; None equals zeros, NaN must meet NaN."""
    if got is None or want is None:
        other = want if got is None else got
        return 0.0 if other is None or not other.abs().max() else float("inf")
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    got, want = got.double(), want.double()
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    got, want = got.nan_to_num(), want.nan_to_num()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))


def worst(got: Seen, want: Seen) -> tuple[float, str]:
    """The largest error and the name of what it is an error of."""
    a, b = got.items(), want.items()
    if a.keys() != b.keys():
        return float("inf"), f"outputs {sorted(a)} instead of {sorted(b)}"
    return max((error(a[n], b[n]), n) for n in b)


def beyond_noise(got: Seen, want: Seen, exact: Seen, tolerance: float) -> list[str]:
    """Names of what differs by more than `tolerance` and by more than eager's own rounding explains.

    exact: the same in a wider type.  A sum that cancels (the gradient of a bias before a softmax) is all rounding.
    """
    a, b, e = got.items(), want.items(), exact.items()
    floor = 1e-6 * max(_off(t, None) for t in e.values())
    return [n for n in b if error(a[n], b[n]) > tolerance and _off(a[n], e[n]) > max(8 * _off(b[n], e[n]), floor)]


def _off(got: Tensor | None, exact: Tensor | None) -> float:
    if got is None or exact is None:
        got, exact = torch.zeros(1) if got is None else got, torch.zeros(1) if exact is None else exact
    return float((got.double() - exact.double()).abs().max()) if got.numel() else 0.0


def distance(got: Seen, want: Seen) -> float:
    """Root mean square of all differences, each relative to its own tensor: what rounding leaves small."""
    total, count = 0.0, 0
    for a, b in zip(got.items().values(), want.items().values(), strict=True):
        if a is not None and b is not None and a.shape == b.shape:
            scale = float(b.double().abs().max().clamp(min=1e-6))
            total += float(((a.double() - b.double()) / scale).square().sum())
            count += b.numel()
    return (total / max(count, 1)) ** 0.5


def missing_grads(got: Seen, want: Seen) -> list[str]:
    """Names whose gradient is None on one side only."""
    return [n for n in want.grads if (got.grads.get(n) is None) != (want.grads[n] is None)]


def dynamo_graphs(module: nn.Module, *args: Any, flags: bool = True, **kwargs: Any) -> int | str:
    """How many graphs Dynamo makes of it, with its capture flags or without, or what it raises."""
    count = 0

    def backend(gm: torch.fx.GraphModule, _example_inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return gm.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(CAPTURE if flags else {}), torch.no_grad():
        try:
            torch.compile(module, backend=backend)(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (whatever it raises is the answer)
            return type(error).__name__
    return count


PRODUCTS = ("linear", "matmul", "mm", "einsum")


def left_over(gm: Any) -> list[str]:
    """Products by weights of rewritten experts that the graph computes beside our ops: the user's loop, which should be gone."""
    ours = [n for n in gm.graph.nodes if "permute_experts" in str(n.target) or "local_experts" in str(n.target)]
    lists = [a for n in ours for a in n.args if isinstance(a, (list, tuple))]
    weights = {a for own in lists for a in own if getattr(a, "op", None) in ("placeholder", "get_attr")}
    return [f"{u.name} of {w.name}" for w in weights for u in w.users if u not in ours and any(p in str(u.target) for p in PRODUCTS)]
