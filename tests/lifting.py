"""Run the lifter on one ATen op, or on a small function, next to the real thing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from evaluator import Evaluator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from moe_compile.passes.lift import Interp
from moe_compile.passes.lift.expr import loads
from moe_compile.passes.lift.value import Value


class Routed:
    """A tensor of ids in 0 .. n-1, distinct along the last dimension or not: what the lifter knows of a routing decision."""

    def __init__(self, ids: Tensor, n: int, distinct: bool = True):
        self.ids, self.facts = ids, ((0, n), distinct)


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True))


class Program:
    """A functional ATen graph that grows op by op, with real values and the fake ones that the lifter looks at."""

    def __init__(self, training: bool = False):
        self.graph, self.mode, self.training = Graph(), fake_mode(), training
        self.real: dict[Node, Any] = {}
        self.facts: dict[Node, Any] = {}
        self._interp: Interp | None = None

    def input(self, t: Tensor | Routed) -> Node:
        n = self.graph.placeholder(f"arg{len(self.real)}")
        tensor = t.ids if isinstance(t, Routed) else t
        n.meta["val"], self.real[n] = self.mode.from_tensor(tensor, static_shapes=True), tensor
        if isinstance(t, Routed):
            self.facts[n] = t.facts
        return n

    def call(self, op: str, *args: Any, **kwargs: Any) -> Node:
        """`op`: "add.Tensor"; tensors among the arguments become inputs."""
        packet, overload = op.split(".")
        f = getattr(getattr(torch.ops.aten, packet), overload)
        args, kwargs = tree_map(self._as_node, (args, kwargs))
        n = self.graph.call_function(f, args, kwargs)
        self.real[n] = f(*self._map(args, self.real), **self._map(kwargs, self.real))
        with self.mode:
            n.meta["val"] = f(*self._map(args, "val"), **self._map(kwargs, "val"))
        return n

    def item(self, n: Node, i: int) -> Node:
        out = self.graph.call_function(operator.getitem, (n, i))
        out.meta["val"], self.real[out] = n.meta["val"][i], self.real[n][i]
        return out

    def _as_node(self, a: Any) -> Any:
        return self.input(a) if isinstance(a, Tensor | Routed) else a

    def _map(self, args: Any, by: Any) -> Any:
        look = (lambda n: n.meta[by]) if isinstance(by, str) else by.__getitem__
        return torch.fx.map_arg(args, look)

    # ------------------------------------------------------------ lifting
    @property
    def interp(self) -> Interp:
        if self._interp is None:
            first = next((n for n in self.facts), next(iter(self.graph.nodes)))
            self._interp = Interp(first, dict(self.facts), self.training)
        return self._interp

    @property
    def evaluator(self) -> Evaluator:
        return Evaluator({n: v for n, v in self.real.items() if isinstance(v, Tensor)})

    def closed(self, n: Node) -> str | None:
        """Why the node stayed a leaf (which is always right), None if a rule opened it."""
        self.interp.value(n)
        return self.interp.reasons.get(n)

    def opened(self, n: Node) -> bool:
        """Is the value of n an expression over the inputs alone?"""
        value = self.interp.value(n)
        return all(a.op == "placeholder" for x in loads(value.expr) for a in x.args[0].nodes)

    def error(self, n: Node) -> str | None:
        """How the lifted value differs from the real one, None if it does not."""
        want = self.real[n]
        got = self.interp.value(n)
        if isinstance(want, tuple | list):
            found = [_difference(self.evaluator, g, w) for g, w in zip(got, want)]
            return next((d for d in found if d), None) if len(got) == len(want) else f"{len(got)} values, not {len(want)}"
        return _difference(self.evaluator, got, want)


def _difference(ev: Evaluator, got: Value, want: Any) -> str | None:
    have = ev.tensor(got)
    want = torch.as_tensor(want).double()
    if have.shape != want.shape:
        return f"shape {tuple(have.shape)}, not {tuple(want.shape)}"
    off = (have - want).abs()
    bad = ~((have == want) | (have.isnan() & want.isnan()) | (off <= 1e-5 * (1 + want.abs())))
    return f"{have.tolist()} is not {want.tolist()}: {got.expr}" if bad.any() else None


def traced(fn: Callable[..., Any], *inputs: Tensor | Routed, training: bool = False) -> tuple[Program, Any]:
    """A function as a `Program` (functional ATen, as `window.Trace` makes it), and the node or nodes of its result."""
    p = Program(training)
    tensors = [t.ids if isinstance(t, Routed) else t for t in inputs]
    fakes = [p.mode.from_tensor(t, static_shapes=True) for t in tensors]
    with p.mode, torch.no_grad():
        gm = make_fx(dispatch_functionalize(fn), tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    for n, t in zip(gm.graph.find_nodes(op="placeholder"), inputs):
        if isinstance(t, Routed):
            p.facts[n] = t.facts
    p.graph = gm.graph
    recorder = _Recorder(gm, p.real)
    recorder.run(*tensors)
    return p, gm.graph.output_node().args[0]


class _Recorder(torch.fx.Interpreter):
    def __init__(self, gm: GraphModule, real: dict[Node, Any]):
        super().__init__(gm, garbage_collect_values=False)
        self.seen = real

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]
