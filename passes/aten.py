"""Graphs of torch.export and make_fx: what the passes want of them before, and ATen nodes where they wrote torch code after.

Before:   y = wrap_with_set_grad_enabled(False, body, x)          region.reshape(-1, 8), a method without metadata
After:    _set_grad_enabled(False); ...; _set_grad_enabled(True)  aten.view.default(region, [s0, 8]) with its fake tensor
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from .decisions import callee, returns_itself, writes_in_place
from .window import CONTEXT, ambients, quiet

Kept = dict[GraphModule, set[Node]]
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # how many arguments stand before the body


def parts(gm: GraphModule) -> list[GraphModule]:
    """The graph and the graphs nested in it."""
    return [each for each in gm.modules() if isinstance(each, GraphModule)]


def copy_with_names(gm: GraphModule) -> GraphModule:
    """A deep copy; an input called like one of Python's own functions (`input`, as torch.export allows it) keeps its name."""
    new = copy.deepcopy(gm)
    for mine, theirs in zip(parts(new), parts(gm), strict=True):
        for n, given in zip(mine.graph.nodes, theirs.graph.nodes, strict=True):
            n.name = given.name
        mine.recompile()
    return new


def is_aten(gm: GraphModule) -> bool:
    """Are all calls of the graph those of ops, as torch.export and make_fx write them?"""
    calls = [n for n in gm.graph.nodes if n.op.startswith("call")]
    return bool(calls) and all(n.op == "call_function" and _is_op(n) for n in calls)


def _is_op(n: Node) -> bool:
    known = isinstance(n.target, OpOverload | HigherOrderOperator) or callee(n) in CONTEXT
    return known or getattr(n.target, "__module__", None) in ("_operator", "math", "torch")


# ---------------------------------------------------------------- regions
def open_regions(gm: GraphModule) -> None:
    """Bodies of gradient and autocast regions come into the graph, between the nodes that switch them on and off."""
    for part in parts(gm):
        again = True
        while again:  # a body may hold regions
            opened = [_opened(part, n) for n in list(part.graph.nodes) if callee(n) in _REGIONS]
            again = any(opened)
        part.recompile()


def _opened(gm: GraphModule, n: Node) -> bool:
    """False for a region whose results are not taken one by one."""
    count = _REGIONS[callee(n)]
    arguments: Any = n.args
    how, body, inner = arguments[:count], arguments[count], arguments[count + 1 :]
    if any(u.target is not operator.getitem for u in n.users):
        return False
    with gm.graph.inserting_before(n):
        if count == 1:
            before = ambients(gm.graph, True)[n].grad
            gm.graph.call_function(torch._C._set_grad_enabled, how)
            results = _copied(gm, body, inner)
            gm.graph.call_function(torch._C._set_grad_enabled, (before,))
        else:
            entered = gm.graph.call_function(torch.amp.autocast_mode._enter_autocast, how)
            results = _copied(gm, body, inner)
            gm.graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    for user in list(n.users):
        substitute(user, results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(n)
    if not body.users:
        gm.graph.erase_node(body)
        _forget_module(gm, str(body.target))
    return True


def _forget_module(gm: GraphModule, name: str) -> None:
    """A body that nothing in the graph names any more, or the passes would find its blocks a second time."""
    if not any(n.op in ("get_attr", "call_module") and f"{n.target}.".startswith(f"{name}.") for n in gm.graph.nodes):
        gm.delete_submodule(name)


def _copied(gm: GraphModule, body: Node, inputs: Iterable[Any]) -> Any:
    """The body's nodes at the insertion point; its results there."""
    inner = gm.get_submodule(str(body.target)).graph
    table = dict(zip((n for n in inner.nodes if n.op == "placeholder"), inputs, strict=True))
    return copy_into(gm.graph, inner, table, f"{body.target}.")


def copy_into(graph: Graph, inner: Graph, table: dict[Node, Any], prefix: str = "") -> Any:
    """Copies the nodes of `inner` that `table` does not have; returns what it puts out. prefix: of attributes' names."""
    result: Any = None
    for n in inner.nodes:
        if n.op == "output":
            result = map_arg(n.args[0], table.__getitem__)
        elif n not in table:
            table[n] = graph.node_copy(n, table.__getitem__)
            if n.op in ("get_attr", "call_module"):
                table[n].target = f"{prefix}{n.target}"
    return result


def substitute(n: Node, value: Any) -> None:
    """Whoever reads n reads `value`, a node or a constant."""
    if isinstance(value, Node):
        n.replace_all_uses_with(value)
        return
    for user in list(n.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda a: value if a is n else a)


def close_regions(gm: GraphModule) -> GraphModule:
    """As torch.export writes them: gradient and autocast regions as higher-order ops."""
    from torch._export.passes.replace_autocast_with_hop_pass import replace_autocast_with_hop_pass
    from torch._export.passes.replace_set_grad_with_hop_pass import replace_set_grad_with_hop_pass

    with torch.enable_grad():
        gm, _ = replace_set_grad_with_hop_pass(gm, None)
        gm, _ = replace_autocast_with_hop_pass(gm, None)
    return gm


# ---------------------------------------------------------------- metadata
def fake_mode(gm: GraphModule) -> FakeTensorMode | None:
    """The one mode of the fake tensors that all nodes with a value carry; None where some have none, or there are several."""
    modes, values = set(), 0
    for n in gm.graph.nodes:
        found = _recorded(n)
        if found is None and n.op not in ("output",) and not _valueless(n):
            return None
        for v in tree_leaves(found):
            if isinstance(v, torch.Tensor):
                values += 1
                modes.add(getattr(v, "fake_mode", None))
    return modes.pop() if len(modes) == 1 and values else None


def _recorded(n: Node) -> Any:
    return n.meta.get("val", n.meta.get("example_value"))


def _valueless(n: Node) -> bool:
    """Calls without a result, unused ones, and modules."""
    return callee(n) in CONTEXT or not n.users or n.op in ("get_attr", "call_module")


def note_examples(gm: GraphModule) -> None:
    """Every node's value where the passes look first, and alike for memory that the code shares (a loaded program has lost that)."""
    for part in parts(gm):
        functional = not any(writes_in_place(n) for n in part.graph.nodes)
        for n in part.graph.nodes:
            if (value := _recorded(n)) is not None:
                n.meta["example_value"] = value if functional else _aliased(n, value)


def gather_items(gm: GraphModule) -> None:
    """What is taken out of a tuple stands right behind it: the ids of a top-k may not come before its values, as a block begins there."""
    for part in parts(gm):
        for n in reversed(list(part.graph.nodes)):
            whole = n.args[0] if n.target is operator.getitem else None
            if isinstance(whole, Node) and whole.op.startswith("call") and isinstance(_recorded(whole), tuple | list):
                whole.append(n)


def _aliased(n: Node, value: Any) -> Any:
    """The same value, in the memory of what it is a view of."""
    if n.target is operator.getitem and isinstance(n.args[0], Node):
        whole = n.args[0].meta.get("example_value")
        return whole[n.args[1]] if isinstance(whole, tuple | list) else value
    if not isinstance(n.target, OpOverload) or not any(r.alias_info is not None for r in n.target._schema.returns):
        return value
    if returns_itself(n):
        return n.args[0].meta.get("example_value", value) if isinstance(n.args[0], Node) else value
    mode: Any = next((v.fake_mode for v in tree_leaves(value) if hasattr(v, "fake_mode")), None)
    args, kwargs = map_arg((n.args, n.kwargs), lambda a: a.meta.get("example_value"))
    with mode, quiet(mode.shape_env), torch.no_grad(), enable_python_dispatcher():
        return n.target(*args, **kwargs)


def forget_examples(gm: GraphModule) -> None:
    for part in parts(gm):
        for n in part.graph.nodes:
            if "val" in n.meta:
                n.meta.pop("example_value", None)


# ---------------------------------------------------------------- lowering
def kept(gm: GraphModule) -> Kept:
    """The nodes of a graph, to know the new ones by."""
    return {part: set(part.graph.nodes) for part in parts(gm)}


def lower(gm: GraphModule, before: Kept, mode: FakeTensorMode, pre_dispatch: bool) -> None:
    """New nodes become ATen nodes and stage ops, each with its fake tensor. pre_dispatch: composite ops may stay."""
    for part in parts(gm):
        new = [n for n in part.graph.nodes if n not in before.get(part, set())]
        for n in new:
            with mode, torch.no_grad(), enable_python_dispatcher():
                _lower(part, n, mode, pre_dispatch)
        part.graph.lint()
        part.recompile()


def _lower(gm: GraphModule, n: Node, mode: FakeTensorMode, pre_dispatch: bool) -> None:
    if callee(n) in CONTEXT or n.op == "output":
        return
    if n.op == "get_attr":
        n.meta["val"] = mode.from_tensor(operator.attrgetter(str(n.target))(gm), static_shapes=True)
    elif _stays(n):
        args, kwargs = map_arg((n.args, n.kwargs), lambda a: a.meta["val"])
        n.meta["val"] = n.target(*args, **kwargs)  # type: ignore[operator]
        if bindings := compute_unbacked_bindings(mode.shape_env, n.meta["val"]):
            n.meta["unbacked_bindings"] = bindings
        if isinstance(n.meta["val"], list):
            _unpack(gm.graph, n)
    else:
        _expand(gm.graph, n, pre_dispatch)


def _unpack(graph: Graph, n: Node) -> None:
    """Who reads a list that an op puts out reads its tensors one by one: a saved program knows no other way."""
    with graph.inserting_after(n):
        made = [graph.call_function(operator.getitem, (n, i)) for i in reversed(range(len(n.meta["val"])))][::-1]
    for i, each in enumerate(made):
        each.meta = {**n.meta, "val": n.meta["val"][i]}
    for user in [u for u in n.users if u not in made]:
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda a: list(made) if a is n else a)


def rename_items(gm: GraphModule) -> dict[str, str]:
    """Old -> new names. A program that is loaded calls the lists that ops put out getitem_<number>, whoever has that name already."""
    renamed = {}
    for n in gm.graph.nodes:
        if n.target is operator.getitem and n.name.startswith("getitem"):
            old = n.name
            n._rename("item")
            renamed[old] = n.name
    return renamed


def _stays(n: Node) -> bool:
    """A stage op, or one of its results."""
    if n.target is operator.getitem:
        return isinstance(n.args[0], Node) and isinstance(n.args[0].meta.get("val"), tuple | list)
    return isinstance(n.target, OpOverload) and not n.target._can_decompose()


def _expand(graph: Graph, n: Node, pre_dispatch: bool) -> None:
    """The ATen ops that a call or method comes to."""
    inputs = n.all_input_nodes
    values = [a.meta["val"] for a in inputs]

    def call(*given: Any) -> Any:
        args, kwargs = map_arg((n.args, n.kwargs), dict(zip(inputs, given)).__getitem__)
        return _function(n)(*args, **kwargs)

    traced = make_fx(call, tracing_mode="real", pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*values)
    table = dict(zip((p for p in traced.graph.nodes if p.op == "placeholder"), inputs, strict=True))
    kept_meta = {key: n.meta[key] for key in ("stack_trace", "nn_module_stack") if n.meta.get(key) is not None}
    with graph.inserting_before(n):
        result = copy_into(graph, traced.graph, table)
    for made in table.values():
        made.meta = {**made.meta, **kept_meta} if made not in inputs else made.meta
    substitute(n, result)
    graph.erase_node(n)


def _function(n: Node) -> Callable[..., Any]:
    if n.op == "call_method":
        return lambda this, *args, **kwargs: getattr(this, str(n.target))(*args, **kwargs)
    return n.target  # type: ignore[return-value]
