"""MoE blocks and what the tests of the graph passes do with them: Dynamo's graph, the rewritten graph, eager against compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import moe_compile
from moe_compile import passes
from moe_compile.options import Options
from moe_compile.passes.decisions import callee
from moe_compile.report import GraphReport, RewriteReport

H, I, E, K, T = 8, 6, 3, 2, 7  # noqa: E741
CAPTURE = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}


class Block(nn.Module):
    """out[t] = sum_k w[t, k] * f_ids[t, k](x[t]) as a masked loop; tests override one step."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gate = nn.Parameter(torch.randn(E, H, generator=g))
        self.up = nn.Parameter(torch.randn(E, I, H, generator=g) * 0.4)
        self.down = nn.Parameter(torch.randn(E, H, I, generator=g) * 0.4)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.gate).softmax(-1).topk(K, dim=-1)

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up[e])), self.down[e])

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x) if out is None else out
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out

    def forward(self, x: Tensor) -> Any:
        return self.loop(x, *self.route(x))


class ReadBeforeWrite(Block):
    """Gathers the experts' rows of h, changes h in place, then runs the experts; returns (out, h)."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        h = x.cumprod(-1)
        at = [torch.where(ids == e) for e in range(E)]
        rows = [h[tok] for tok, _ in at]
        h.add_(1)
        out = torch.zeros_like(x)
        for e, (tok, slot) in enumerate(at):
            out.index_add_(0, tok, self.expert(rows[e], e) * w[tok, slot, None])
        return out, h


class Dense(Block):
    """The same with every expert on every token and the weights scattered to [T, E]: fewer nodes, no data-dependent shape."""

    def loop(self, x: Tensor, w: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
        gates = torch.zeros(x.shape[0], E, dtype=w.dtype).scatter(1, ids, w)
        parts = [gates[:, e, None] * self.expert(x, e) for e in range(E)]
        return sum(parts[1:], parts[0])


def block(forward: Callable[..., Any], base: type[Block] = Block, **members: Any) -> Block:
    """A block with another forward (and other methods or attributes)."""
    cls = type(forward.__name__, (base,), {"forward": forward, **{n: m for n, m in members.items() if callable(m)}})
    made = cls()
    for name, value in members.items():
        if not callable(value):
            made.register_buffer(name, value) if isinstance(value, Tensor) else setattr(made, name, value)
    return made


def tokens(seed: int = 3, count: int = T) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """An inner compiler that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, _example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


def graph_of(fn: Callable[..., Any], *args: Any, grad: bool = False, dynamic: bool = False) -> GraphModule:
    """The graph that Dynamo hands to a backend."""
    seen = Recorder()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(CAPTURE), torch.set_grad_enabled(grad):
        torch.compile(fn, backend=seen, dynamic=dynamic, fullgraph=True)(*args)
    (gm,) = seen.graphs
    return gm


def rewrite(gm: GraphModule, grad: bool = False, **options: Any) -> GraphReport:
    with torch.set_grad_enabled(grad):
        return passes.run(gm, Options(inner="eager", **options))


def calls(gm: GraphModule, *names: str) -> list[str]:
    """Short names of what the graph calls, those asked for or all, in program order."""
    found = [callee(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    return [n for n in found if not names or n in names]


def node(gm: GraphModule, name: str, which: int = 0) -> Node:
    """The which-th node that calls `name`."""
    return [n for n in gm.graph.nodes if callee(n) == name][which]


def stages(gm: GraphModule) -> int:
    """Number of rewritten blocks in a graph."""
    return len(calls(gm, "permute_experts_unpermute"))


class Compared:
    """A module run eagerly and compiled on the same inputs and random numbers."""

    def __init__(self, module: nn.Module, *inputs: Any, grad: bool = False, dynamic: bool | None = None, **options: Any):
        torch._dynamo.reset()
        self.report, self.inner = RewriteReport(), Recorder()
        self.eager, self.module = copy.deepcopy(module), module
        self.compiled = moe_compile.compile(module, inner=self.inner, report=self.report, dynamic=dynamic, **options)
        self.grad, self.error = grad, 0.0
        self(*inputs)

    def __call__(self, *inputs: Any) -> None:
        want, got = self._run(self.eager, self.eager, inputs), self._run(self.compiled, self.module, inputs)
        assert want.keys() == got.keys()
        for name, t in want.items():
            assert got[name].shape == t.shape, name
            off = float((got[name].double() - t.double()).abs().max()) if t.numel() else 0.0
            assert off <= 1e-5 * (1 + float(t.double().abs().max())), f"{name} is off by {off:.1e}\n{self.report}"

    def _run(self, fn: Callable[..., Any], module: nn.Module, inputs: tuple) -> dict[str, Tensor]:
        """Outputs, changed inputs, buffers and gradients by name."""
        own = [a.clone() if isinstance(a, Tensor) else a for a in inputs]
        given = [a.detach().requires_grad_() if self.grad and isinstance(a, Tensor) and a.is_floating_point() else a for a in own]
        torch.manual_seed(11)
        with torch.set_grad_enabled(self.grad):
            out = fn(*given)
        outs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        found = {f"output {i}": t.detach().clone() for i, t in enumerate(outs)}
        if self.grad:
            sum((t * torch.linspace(-1, 1, t.numel()).reshape(t.shape)).sum() for t in outs if t.requires_grad).backward()
            found |= {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
            found |= {f"gradient of input {i}": a.grad for i, a in enumerate(given) if isinstance(a, Tensor) and a.grad is not None}
            module.zero_grad()
        found |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
        return found | {f"input {i}": a.detach() for i, a in enumerate(given) if isinstance(a, Tensor)}

    @property
    def reasons(self) -> list[str | None]:
        return [r.reason for r in self.report.regions]

    @property
    def rewritten(self) -> int:
        return len(self.report.rewritten)
