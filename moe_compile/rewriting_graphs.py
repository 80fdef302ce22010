"""Plain FX graphs on their way to the passes: copies that share parameters, leaf modules as torch code, shapes from example inputs."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_compile.passes import aten


# ---------------------------------------------------------------- copies
def copy_of(gm: GraphModule) -> GraphModule:
    """Another graph, and other graphs nested in it; the same parameters, buffers and other modules."""
    new = GraphModule(gm, copy.deepcopy(gm.graph), type(gm).__name__)
    new.meta = dict(gm.meta)
    new.training = gm.training
    for name, module in gm._modules.items():
        new._modules[name] = copy_of(module) if isinstance(module, GraphModule) else module
    new._parameters.update(gm._parameters)
    new._buffers.update(gm._buffers)
    new._non_persistent_buffers_set |= gm._non_persistent_buffers_set
    return new


# ---------------------------------------------------------------- modules
class _AllTracer(Tracer):
    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return False


def open_modules(gm: GraphModule) -> None:
    """Leaf modules with parameters, torch's own Linear for one, as the code of their forward, where the passes can see the parameters."""
    for n in list(gm.graph.nodes):
        if n.op == "call_module" and (graph := _code_of(gm.get_submodule(str(n.target)))) is not None:
            table = _arguments(graph, n)
            with gm.graph.inserting_before(n):
                result = aten.copy_into(gm.graph, graph, table, f"{n.target}.")
            aten.substitute(n, result)
            gm.graph.erase_node(n)
    gm.recompile()


def hoist_attributes(gm: GraphModule) -> None:
    """Tensors that the graph takes from its module come first, each once: the passes take what is read before a block for its inputs."""
    head = next(n for n in gm.graph.nodes if n.op != "placeholder")
    first: dict[str, Node] = {}
    for n in [n for n in gm.graph.nodes if n.op == "get_attr" and isinstance(_attribute(gm, n), torch.Tensor)]:
        if (own := first.setdefault(str(n.target), n)) is n:
            head.prepend(n) if n is not head else None
        else:
            n.replace_all_uses_with(own)
            gm.graph.erase_node(n)


def _attribute(gm: GraphModule, n: Node) -> Any:
    return operator.attrgetter(str(n.target))(gm)


def _code_of(module: torch.nn.Module) -> Graph | None:
    """What a module without others inside computes, in training and outside of it; None where that is not known to be all it does."""
    hooked = any(getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))
    if hooked or module._modules or not module._parameters or isinstance(module, GraphModule):
        return None
    found = []
    for training in (True, False):
        alike = copy.copy(module)
        alike.training = training
        try:
            found.append(_AllTracer().trace(alike))
        except Exception:  # noqa: BLE001  whatever a forward does with what is no tensor
            return None
    return found[0] if str(found[0]) == str(found[1]) else None


def _arguments(graph: Graph, call: Node) -> dict[Node, Any]:
    """The forward's parameters -> what the call gives for them."""
    table: dict[Node, Any] = {}
    for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        default = n.args[0] if n.args else None
        table[n] = call.args[i] if i < len(call.args) else call.kwargs.get(str(n.target), default)
    return table


# ---------------------------------------------------------------- shapes
class Shapes:
    """Fake tensors for all nodes of a graph, its inputs' sizes symbols. `insist`: the graph then holds its inputs to what was assumed."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._given = list(inputs)
        fakes = [self._fake(value, f"input_{i}") for i, value in enumerate(inputs)]
        with self.mode, self.env.ignore_fresh_unbacked_symbols():
            _Propagation(gm, self.mode).run(*fakes, enable_io_processing=False)

    def _fake(self, value: Any, name: str) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        from torch._dynamo.source import ConstantSource

        if isinstance(value, torch.nn.Parameter):
            return self.mode.from_tensor(value, static_shapes=True)
        sizes: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * value.dim())
        return self.mode.from_tensor(value, source=ConstantSource(name), symbolic_context=sizes)

    def insist(self, gm: GraphModule) -> None:
        """Checks at the graph's head."""
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        with gm.graph.inserting_before(first):
            for condition, text in self._conditions(gm.graph, inputs):
                why = f"{text}: so it was in example_inputs when moe_compile.rewrite made this graph; rewrite it with inputs like these"
                gm.graph.call_function(torch._assert, (condition, why))

    def _conditions(self, graph: Graph, inputs: Sequence[Node]) -> Iterator[tuple[Node, str]]:
        seen: dict[Any, tuple[Node, str]] = {}
        for n, given in zip(inputs, self._given, strict=True):
            if not isinstance(given, torch.Tensor):
                if isinstance(given, bool | int | float | str):
                    yield graph.call_function(operator.eq, (n, given)), f"{n.name} must be {given!r}"
                continue
            for i, size in enumerate(n.meta["example_value"].shape):
                here = graph.call_method("size", (n, i))
                name = f"dimension {i} of {n.name}"
                expr = size.node.expr if isinstance(size, torch.SymInt) else int(size)
                if isinstance(expr, int) or expr.is_number:
                    yield graph.call_function(operator.eq, (here, int(expr))), f"{name} must be {int(expr)}"
                elif expr in seen:
                    yield graph.call_function(operator.eq, (here, seen[expr][0])), f"{name} must be {seen[expr][1]}"
                elif expr.is_symbol:
                    seen[expr] = here, name
                    yield graph.call_function(operator.ge, (here, 2)), f"{name} must be 2 or more"
                else:
                    raise ValueError(f"{name} is {expr} of other sizes in the code, which no check stands for; export the model instead")


class _Propagation(Interpreter):
    """Runs a graph on fake tensors and notes each node's."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(found, static_shapes=True) if isinstance(found, torch.Tensor) else found

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = result
        return result


def propagated(gm: GraphModule, inputs: Sequence[Any] | None) -> Shapes:
    """Raises ValueError without inputs, or for such as the graph does not take."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    wanted = f"one value for each of its inputs ({', '.join(names) or 'none'})"
    if inputs is None:
        raise ValueError(
            "the graph's nodes carry no fake tensors of one mode, so no shapes are known; give moe_compile.rewrite example_inputs, "
            + wanted
        )
    if len(inputs) != len(names):
        raise ValueError(f"example_inputs has {len(inputs)} values; give {wanted}")
    try:
        return Shapes(gm, inputs)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the graph does not run on fake tensors like example_inputs ({type(error).__name__}: {text}); {wanted}"
        ) from error


def note_gradients(gm: GraphModule) -> None:
    """make_fx forgets which tensors require gradients: parameters tell, and where gradients are on, its inputs may."""
    if not torch.is_grad_enabled():
        return
    for n in gm.graph.nodes:
        value = n.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or value.requires_grad:
            continue
        if _attribute(gm, n).requires_grad if n.op == "get_attr" else n.op == "placeholder" and "val" in n.meta:
            n.meta["example_value"] = value.detach().requires_grad_()
