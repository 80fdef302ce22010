"""Trace the part of a Dynamo graph behind a routing decision to functional ATen, node by node.

The trace answers three questions about every Dynamo node: which ATen node holds its value when it has just run, which holds it *now*
(in-place ops move it on), and which ATen nodes it made.  Nothing is executed on real tensors and the Dynamo graph is not touched.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, dispatch_functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_slot, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, SymT, symbol_is_type
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves

from .decisions import callee
from .lift.places import USERS
from .lift.sizes import size_of
from .pulled import dequantisation

CREATORS = {"zeros", "ones", "full", "empty", "arange", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
            "new_full", "new_empty", "tensor"}  # fmt: skip
LARGEST_CONSTANT = 4096  # elements
CONTEXT = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}


_DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


class _Stop(Exception):
    """The visitor has seen enough."""


def symbolic(n: Node) -> Any:
    """What Dynamo recorded for a node: a fake tensor, a SymInt, a tuple of them."""
    return n.meta.get("example_value", n.meta.get("val"))


def is_size(n: Node) -> bool:
    """A size known from the inputs' shapes (a number, or arithmetic on Dynamo's size symbols)."""
    v = symbolic(n)
    return (isinstance(v, torch.SymInt | int) and not isinstance(v, bool) and size_of(v) is not None) or _is_fraction(n)


def _is_fraction(n: Node) -> bool:
    """A number on the way from sizes to a size, as in ceil(1.25 * tokens): no tensor is computed from it."""
    v = symbolic(n)
    if not isinstance(v, torch.SymFloat) or not (symbols := v.node.expr.free_symbols):
        return False
    if not all(symbol_is_type(s, SymT.SIZE) for s in symbols):
        return False
    return all(isinstance(symbolic(u), torch.SymInt | torch.SymFloat | torch.SymBool) for u in n.users)


def collect(first: Node, until: Node | None) -> tuple[list[Node], list[Node]]:
    """Nodes from `first` up to (not including) `until` with the constants they need, and their free inputs, in program order."""
    body: list[Node] = []
    n = first
    while n.op not in ("output", "root") and n is not until:
        body.append(n)
        n = n.next
    inside = set(body)
    pulled: dict[Node, None] = {}
    inputs: dict[Node, None] = {}
    for n in body:
        for a in n.all_input_nodes:
            if a not in inside and a not in pulled and a not in inputs:
                _place(a, first, pulled, inputs)
    return [*pulled, *body], list(inputs)


def _place(a: Node, first: Node, pulled: dict[Node, None], inputs: dict[Node, None]) -> None:
    """A constant made before the window that nothing has touched since, and a weight dequantised there, is computed inside."""
    if callee(a) in CREATORS and all(not (u < first) for u in a.users):
        for x in a.all_input_nodes:
            if x not in pulled and x not in inputs:
                inputs[x] = None
        pulled[a] = None
    elif (made := dequantisation(a, first)) is not None:
        for n in made:
            pulled[n] = None
            inputs.update((x, None) for x in n.all_input_nodes if x.op in ("placeholder", "get_attr"))
    else:
        inputs[a] = None


@dataclass(frozen=True)
class Ambient:
    """What is in force where a window starts: gradient mode, and the `_enter_autocast` nodes that are still open."""

    grad: bool
    autocast: tuple[Node, ...] = ()


def ambients(graph: Graph, grad: bool) -> dict[Node, Ambient]:
    """The ambient state before each node of a graph that is entered with gradient mode `grad`."""
    found, here = {}, Ambient(grad)
    for n in graph.nodes:
        found[n] = here
        if callee(n) == "_set_grad_enabled":
            here = replace(here, grad=bool(n.args[0]))
        elif callee(n) == "_enter_autocast":
            here = replace(here, autocast=(*here.autocast, n))
        elif callee(n) == "_exit_autocast":
            here = replace(here, autocast=tuple(a for a in here.autocast if a is not n.args[0]))
    return found


class Trace:
    """The state of a trace, given to the visitor after every Dynamo node."""

    def __init__(self, gm: GraphModule, nodes: list[Node], inputs: list[Node], ambient: Ambient):
        self.gm, self.nodes = gm, nodes
        self.inputs = [n for n in inputs if callee(n) != "_enter_autocast"]
        self.grad, self.ambient = ambient.grad, ambient
        self._open: dict[Node, Any] = {}
        self.floats: dict[Node, float] = {}
        self.ended: str | None = None  # why the trace ended early
        self.autocast_at_root: str | None = None  # device type
        self.env: dict[Node, Any] = {}
        self.at_def: dict[Node, Any] = {}
        self.created: dict[Node, list[Node]] = {}
        self.owner: dict[Node, Node] = {}
        self.ran: list[Node] = []
        self.tracer: Any = None
        self._last: Node | None = None

    # ------------------------------------------------------------ questions
    def now(self, n: Node) -> Any:
        """ATen node(s) that hold n's value at this point of the trace."""
        found = self._holders(self.env[n])
        self._claim(None)
        return found

    def node_of(self, n: Node) -> Node | None:
        """The one ATen node that held n's value when it had just run; None for tuples and numbers."""
        found = self.at_def.get(n)
        return found if isinstance(found, Node) else None

    def constant(self, a: Node) -> torch.Tensor | None:
        """The elements of a small tensor that the code spells out (a table of numbers), None for any other ATen node."""
        spelled = a.op == "get_attr" and a in self.owner and callee(self.owner[a]) == "tensor"
        found = getattr(self.tracer.root, str(a.target), None) if spelled else None
        if not isinstance(found, torch.Tensor) or isinstance(found, torch._subclasses.FakeTensor) or found.numel() > LARGEST_CONSTANT:
            return None
        with _disable_current_modes():
            return found.detach().cpu()

    # ------------------------------------------------------------ running
    def run(self, visit: Callable[[Trace, Node], bool]) -> None:
        """Trace; stops when `visit` returns True.  Raises what an op of the window raises on fake tensors."""
        mode = fake_mode_of(self.inputs + self.nodes)
        env = mode.shape_env
        values = [_fixed_float(symbolic(n)) for n in self.inputs]
        self.floats = {n: v for n in self.nodes if not _is_fraction(n) and isinstance(v := _fixed_float(symbolic(n)), float)}
        with mode, quiet(env), uncached(mode, self.nodes):
            leaves = [_leaf(v, mode) for v in values]
            flat, spec = tree_flatten(leaves)

            def body(*args: Any) -> None:
                self.tracer = torch.fx.experimental.proxy_tensor.get_proxy_mode().tracer
                for n, v in zip(self.inputs, torch.utils._pytree.tree_unflatten(list(args), spec)):
                    self._record(n, v)
                for n in self.nodes:
                    if not self._step(n):
                        break
                    self.ran.append(n)
                    if visit(self, n):
                        break
                raise _Stop  # nothing of make_fx's own epilogue is wanted

            # symbolic extents need the Python implementations of what C++ would do with numbers
            dispatcher = enable_python_dispatcher() if _has_symbols(flat) else contextlib.nullcontext()
            with torch.no_grad(), self._autocast(), dispatcher, contextlib.suppress(_Stop):
                make_fx(dispatch_functionalize(body), tracing_mode="real", _allow_non_fake_inputs=True)(*flat)

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        """The autocast regions open at the window's start; whatever is open at its end is closed."""
        with autocast_restored():
            try:
                for n in self.ambient.autocast:
                    self._open[n] = n.target(*n.args, **n.kwargs)  # type: ignore[operator]
                yield
            finally:
                for mode in reversed(list(self._open.values())):
                    torch.amp.autocast_mode._exit_autocast(mode)
                self._open.clear()

    def _record(self, n: Node, value: Any) -> None:
        _same_range(symbolic(n), value)
        self.env[n] = value
        self.at_def[n] = self._holders(value)
        self._claim(n)

    def _step(self, n: Node) -> bool:
        """Run one node; False where it needs to know a size that only the data tells."""
        try:
            self._record(n, self._execute(n))
        except _DATA_DEPENDENT:
            why = "decides by a size that only the data tells, so the code behind it was not looked at"
            if "dropout" in callee(n):
                why = "within the experts, in training: its random numbers would be others; with p = 0 they are rewritten"
            self.ended = f"`{callee(n)}` {why}"
            return False
        return True

    def _execute(self, n: Node) -> Any:
        if callee(n) == "_set_grad_enabled":
            self.grad = bool(n.args[0])
            return None
        if callee(n) == "_enter_autocast":
            self._open[n] = n.target(*n.args, **n.kwargs)  # type: ignore[operator]
            return None
        if callee(n) == "_exit_autocast":
            torch.amp.autocast_mode._exit_autocast(self._open.pop(n.args[0]))  # type: ignore[arg-type]
            return None
        if n in self.floats:
            return self.floats[n]
        args, kwargs = torch.fx.map_arg((n.args, n.kwargs), lambda a: self.env[a])
        if n.op == "call_function":
            return n.target(*args, **kwargs)  # type: ignore[operator]
        if n.op == "call_method":
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        if n.op == "call_module":
            return self.gm.get_submodule(str(n.target))(*args, **kwargs)
        return operator.attrgetter(str(n.target))(self.gm)

    def _holders(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [self._holders(v) for v in value]
        if not isinstance(value, FunctionalTensor):
            return None
        torch._sync(value)
        inner = torch._from_functional_tensor(value.elem)
        slot = get_proxy_slot(inner, self.tracer, None)
        return slot.proxy.node if slot is not None else None

    def _claim(self, n: Node | None) -> None:
        """Attribute the ATen nodes made since the last claim to Dynamo node n (None: to the question just asked)."""
        start = self._last.next if self._last is not None else next(iter(self.tracer.graph.nodes), None)
        made = []
        while start is not None and start.op != "root":
            made.append(start)
            self._last, start = start, start.next
        for a in made:
            if n is not None:
                self.owner[a] = n
                a.meta[USERS] = n
            if not self.grad:
                a.meta["no_grad"] = True
        if n is not None:
            self.created[n] = made


def fake_mode_of(nodes: Iterable[Node]) -> FakeTensorMode:
    for n in nodes:
        for v in tree_leaves(symbolic(n)):
            if isinstance(v, torch._subclasses.FakeTensor):
                return v.fake_mode
    raise ValueError("the graph's nodes carry no fake tensors; it does not come from Dynamo")


@contextlib.contextmanager
def uncached(mode: FakeTensorMode, nodes: Iterable[Node]) -> Iterator[None]:
    """Without fake tensors' cache where sizes are what the data tells: each is another one, and filling it takes as long as the calls."""
    before, found = mode.cache_enabled, any(callee(n) in _ROWS and (callee(n) != "where" or len(n.args) == 1) for n in nodes)
    mode.cache_enabled = before and not found
    try:
        yield
    finally:
        mode.cache_enabled = before


_ROWS = {"nonzero", "where", "argwhere", "unique", "masked_select", "item"}


def quiet(env: Any) -> contextlib.ExitStack:
    """No guards from analysis, and fresh data-dependent symbols are nobody's business."""
    stack = contextlib.ExitStack()
    if env is not None:
        stack.enter_context(env.suppress_guards())
        stack.enter_context(env.ignore_fresh_unbacked_symbols())
    return stack


@contextlib.contextmanager
def autocast_restored() -> Iterator[None]:
    """Autocast is on afterwards where it was before: a region closed inside of make_fx opens again when the guards around it end."""
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        yield
    finally:
        for device, on in before.items():
            torch.set_autocast_enabled(device, on)


def _has_symbols(leaves: Iterable[Any]) -> bool:
    return any(
        isinstance(v, torch.SymInt) or (isinstance(v, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in v.shape)) for v in leaves
    )


def _same_range(original: Any, ours: Any) -> None:
    """A number out of a tensor gets a fresh symbol here; what Dynamo has learned of its own (a count >= 0) holds for it."""
    if not isinstance(original, torch.SymInt) or not isinstance(ours, torch.SymInt):
        return
    old, new, env = original.node.expr, ours.node.expr, ours.node.shape_env
    if old.is_symbol and new.is_symbol and old != new and new not in backed_values(env) and old in env.var_to_range:
        env.var_to_range[new] = env.var_to_range[old]
        if old in env.size_like:
            env.size_like.add(new)


def backed_values(env: Any) -> Any:
    """What Dynamo saw for its size symbols (named differently before torch 2.13)."""
    found = getattr(env, "backed_var_to_val", None)
    return env.var_to_val if found is None else found


def _fixed_float(v: Any) -> Any:
    """A float attribute that `dynamic=True` made symbolic (a clamp limit) is a constant of the formula.

    Reading it sets a guard, so that another value recompiles.
    """
    return float(v) if isinstance(v, torch.SymFloat) and v.node.has_hint() else v


def _leaf(v: Any, mode: FakeTensorMode) -> Any:
    """A fresh fake tensor like v, without its history."""
    if isinstance(v, torch.Tensor):
        with torch.no_grad():
            return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
    if isinstance(v, tuple | list):
        return [_leaf(x, mode) for x in v]
    return v
