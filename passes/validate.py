"""Execute the original block and its replacement on fresh random inputs, degenerate routings included, before the rewrite is kept.

Two comparisons: in float64 (every float dtype of both sides raised, so that equal formulas agree to rounding and unequal ones do not hide
in it), and in the model's own dtypes.  In training the gradients of every input are compared as well.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from moe_compile.ops.registry import providers

from .decisions import Decision, callee, tensor_of
from .region import MoERegion
from .signs import never_negative
from .window import autocast_restored, backed_values, symbolic

STRICT = 1e-7  # relative to the largest element, both sides in float64
LOOSE = {torch.float64: 1e-7, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
CHEAP = 32_000_000  # elements of all inputs up to which float64 copies are made
ROUTINGS = ("random", "all tokens to one expert", "an expert without tokens")


class Mismatch(Exception):
    """The replacement computes something else; the message says where and by how much."""


class _Stuck(Mismatch):
    """The original does not run on such inputs."""


def validate(region: MoERegion, old: GraphModule, new: GraphModule, decisions: dict[Node, Decision], training: bool) -> str:
    """Raises Mismatch; returns a line for the report. Weights of either sign are tried first: some code takes probabilities alone."""
    try:
        return _validate(region, old, new, decisions, training, frozenset())
    except _Stuck:
        if not (positive := frozenset(n for n in region.inputs if never_negative(n))):
            raise
        return _validate(region, old, new, decisions, training, positive)


def _validate(
    region: MoERegion, old: GraphModule, new: GraphModule, decisions: dict[Node, Decision], training: bool, positive: frozenset[Node]
) -> str:
    start, worst, notes = time.perf_counter(), 0.0, []
    generator = torch.Generator().manual_seed(0x5EED)
    inputs = [n for n in region.inputs if callee(n) != "_enter_autocast"]
    strict, frozen = _numel(inputs) <= CHEAP, {i for i, n in enumerate(inputs) if n in region.scales}
    for routing in ROUTINGS:
        args = [_fresh(n, decisions, region, routing, generator) for n in inputs]
        args = [a.abs() if n in positive else a for n, a in zip(inputs, args)]
        if strict:
            try:
                worst = max(
                    worst,
                    _compare(old, new, [_double(a) for a in args], STRICT, f"{routing}, float64", training, _upcast, frozen),
                )
            except _NotInDouble as e:
                strict, notes = False, [f"not in float64: {e}"]
        native = _compare(old, new, args, _native_limit(region, args), routing, training, contextlib.nullcontext, frozen)
        worst = worst if strict else max(worst, native)
    kind = ("outputs and gradients" if training else "outputs") + (" in float64 and the model's dtype" if strict else "")
    ms = (time.perf_counter() - start) * 1e3
    return f"{len(ROUTINGS)} routings, {kind}: largest relative error {worst:.1e} ({ms:.0f} ms)" + "".join("; " + n for n in notes)


def _numel(inputs: list[Node]) -> int:
    shapes = (_concrete(t.shape) for n in inputs if (t := tensor_of(n)) is not None)
    return sum(torch.Size(s).numel() for s in shapes)


# ---------------------------------------------------------------- inputs
def _concrete(shape: Any) -> list[int]:
    return [s if isinstance(s, int) else _hint(s) for s in shape]


def _hint(s: Any) -> int:
    """The extent that Dynamo saw; nothing is guarded by reading it."""
    expr, env = s.node.expr, s.node.shape_env
    return int(expr.xreplace(dict(backed_values(env))))


def _fresh(n: Node, decisions: dict[Node, Decision], region: MoERegion, routing: str, g: torch.Generator) -> Any:
    v = symbolic(n)
    if isinstance(v, torch.SymInt):
        return _hint(v)
    if isinstance(v, torch.SymFloat):
        return float(v)
    if isinstance(v, tuple | list):
        raise Mismatch(f"input {n.name} is a tuple")
    if not isinstance(v, torch.Tensor):
        return v
    shape = _concrete(v.shape)
    pinned = [f for u, f in region.trace.floats.items() if n in u.all_input_nodes]
    if pinned and not shape:
        return torch.tensor(pinned[0], dtype=v.dtype, device=v.device)
    if n in decisions:
        return _ids(shape, decisions[n], routing if n is region.decision.ids else "random", g).to(v.device, v.dtype)
    if v.dtype.is_floating_point:
        if v.dtype.itemsize == 1:
            return _numbers(shape, v, region.exponents, n, g)
        scale = 1.0 if len(shape) < 2 else max(shape[-1], 1) ** -0.25
        return _noise(torch.Size(shape), v, g).mul_(scale)
    if v.dtype == torch.bool:
        return (torch.rand(shape, generator=g) < 0.5).to(v.device)
    if n in region.numbers and v.dtype in (torch.int8, torch.uint8):
        return _numbers(shape, v, region.exponents, n, g)
    return torch.zeros(shape, dtype=v.dtype, device=v.device)


def _numbers(shape: list[int], like: torch.Tensor, exponents: set[Node], n: Node, g: torch.Generator) -> torch.Tensor:
    """Numbers of quantised weights, or exponents of their scales: any byte that is a number, exponents around one."""
    low, high = (123, 131) if n in exponents or like.dtype == torch.float8_e8m0fnu else (0, 256)
    count, block = torch.Size(shape).numel(), 1_000_003
    tile = torch.randint(low, high, (min(count, block),), generator=g, dtype=torch.uint8)
    tile[tile & 127 == 127] = 0  # NaN in e4m3
    found = tile.repeat(-(-count // block))[:count] if count > block else tile
    return found.reshape(shape).view(like.dtype).to(like.device)


def _noise(shape: torch.Size, like: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Normal noise; large tensors repeat a block of prime length, as drawing billions of numbers takes longer than using them."""
    n, block = shape.numel(), 1_000_003
    tile = torch.randn(min(n, block), generator=g).to(device=like.device, dtype=like.dtype)
    return tile.repeat(-(-n // block))[:n].reshape(shape) if n > block else tile.reshape(shape)


def _ids(shape: list[int], d: Decision, routing: str, g: torch.Generator) -> torch.Tensor:
    """Ids in range, distinct over the last dimension where the decision makes them so."""
    n = d.facts[0][1]
    k = shape[-1] if shape and d.facts[1] else 1
    scores = torch.rand([*(shape[:-1] if d.facts[1] else shape), n], generator=g)
    if routing == "all tokens to one expert":
        scores[..., n // 2] = 2.0
    if routing == "an expert without tokens" and k < n:
        scores[..., 0] = -1.0
    ids = scores.topk(k, dim=-1).indices
    return ids.reshape(shape)


# ---------------------------------------------------------------- float64
class _NotInDouble(Exception):
    """The original cannot run in float64."""


_LOW = {torch.float32, torch.bfloat16, torch.float16}


def _raise_dtype(x: Any) -> Any:
    if isinstance(x, torch.dtype) and x in _LOW:
        return torch.float64
    if isinstance(x, str) and any(x == p.name for p in providers("experts")):
        return "reference"
    if isinstance(x, str):
        return re.sub(r"'(bfloat16|float16|float32)'", "'float64'", x)
    return x


class _Double(TorchDispatchMode):
    """Every float dtype that an op names becomes float64, and the experts' provider the reference, which takes it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_raise_dtype, (tuple(args), kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """What torch's op computes, in float64, which it does not take: groups of rows (2-D @ 3-D), or of the contraction (2-D @ 2-D)."""
    if bias is not None or offs is None or a.dim() != 2:
        raise NotImplementedError("_grouped_mm of this form in float64")
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    if b.dim() == 2:
        return torch.stack([a[:, s:e] @ b[s:e] for s, e in zip(starts, ends)])
    rest = a.new_zeros(a.shape[0] - ends[-1], b.shape[-1])
    return torch.cat([*[a[s:e] @ b[i] for i, (s, e) in enumerate(zip(starts, ends))], rest])


@contextlib.contextmanager
def _upcast() -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double(), _no_autocast():
            yield
    finally:
        torch.set_default_dtype(was)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _double(a: Any) -> Any:
    return a.double() if isinstance(a, torch.Tensor) and a.dtype.is_floating_point and a.dtype.itemsize > 1 else a


# ---------------------------------------------------------------- running
def _native_limit(region: MoERegion, args: list) -> float:
    """Rounding of the coarsest dtype that takes part."""
    dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
    dtypes |= {val.dtype for a in region.trace.owner if isinstance(val := a.meta.get("val"), torch.Tensor)}
    return max(LOOSE.get(t, 0.0) for t in dtypes)


def _compare(old: GraphModule, new: GraphModule, args: list, limit: float, what: str, training: bool, mode: Any, frozen: set[int]) -> float:
    try:
        want = _run(old, args, training, mode, frozen)
    except (RuntimeError, NotImplementedError) as e:
        if mode is _upcast:
            raise _NotInDouble(str(e).splitlines()[0][:120]) from e
        raise _Stuck(f"the original does not run on fresh inputs: {str(e).splitlines()[0][:160]}") from e
    got = _run(new, args, training, mode, frozen)
    worst, least = 0.0, NOISE[mode is _upcast] * _largest(want)
    for name in want:
        error = _error(got[name], want[name], name, what, least if name.startswith("gradient") else 1e-30)
        if not error <= limit:
            raise Mismatch(f"{name} differs by {error:.1e} (limit {limit:.0e}) for {what}")
        worst = max(worst, error)
    return worst


# Gradients that are so much smaller than the largest one may be all rounding: that of a weight divided by itself, say.
NOISE = {True: 1e-8, False: 1e-3}  # in float64, where the limit is far below it; in the model's own dtypes


def _largest(found: dict[str, torch.Tensor]) -> float:
    """Of the gradients' elements."""
    sizes = [
        float(g.double().nan_to_num(posinf=0, neginf=0).abs().max())
        for name, g in found.items()
        if name.startswith("gradient") and g.numel()
    ]
    return max(sizes, default=0.0)


def _error(got: torch.Tensor, want: torch.Tensor, name: str, what: str, least: float) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Mismatch(f"{name} is {got.dtype}{list(got.shape)}, the original's {want.dtype}{list(want.shape)} for {what}")
    if want.numel() == 0:
        return 0.0
    a, b = got.double(), want.double()
    known = torch.isfinite(b)  # random masks can leave a row without any score: NaN in the original says nothing
    if not known.any():
        raise Mismatch(f"{name} is nowhere finite in the original for {what}")
    a, b = a[known], b[known]
    return float((a - b).abs().max() / b.abs().max().clamp(min=max(least, 1e-30)))


def _run(gm: GraphModule, args: list, training: bool, mode: Any, frozen: set[int]) -> dict[str, torch.Tensor]:
    """Output, and in training the gradients of all inputs but the frozen ones, by name."""
    floats = {i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dtype.is_floating_point and i not in frozen}
    own = [a.detach().requires_grad_(training and i in floats) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
    with autocast_restored(), torch.set_grad_enabled(training), mode(), _drawn_alike():
        # in-place ops may not hit a leaf, nor what the next run reads; nobody writes into something as large as the experts' weights
        given = [a.clone() if isinstance(a, torch.Tensor) and a.numel() <= CHEAP else a for a in own]
        out = gm(*given)
        found = {"output": out.detach()}
        if training and out.requires_grad:
            leaves = [own[i] for i in sorted(floats)]
            grads = torch.autograd.grad(out, leaves, _cotangent(out), allow_unused=True)
            names = [p.name for p in gm.graph.nodes if p.op == "placeholder"]
            for i, grad, leaf in zip(sorted(floats), grads, leaves):
                found[f"gradient of {names[i]}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


@contextlib.contextmanager
def _drawn_alike() -> Iterator[None]:
    """Within, random numbers are the same for both sides; those of the user's program go on as if nothing had been drawn."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0x5EED)
        for i in devices:
            torch.cuda.default_generators[i].manual_seed(0x5EED)
        yield


def _cotangent(out: torch.Tensor) -> torch.Tensor:
    n = out.numel()
    wave = torch.linspace(-1, 1, max(n, 1), device=out.device, dtype=torch.float64)[:n].sin()
    return wave.reshape(out.shape).to(out.dtype)
