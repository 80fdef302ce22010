"""A recording as one call in a graph: the passes spell the block out once, for all layers like it (passes/blocks.py).

Only a recording of torch calls alone becomes one, without submodules as wholes, that writes into nothing that it was given, and whose
results are tensors of their own. A module without it runs its program, which Dynamo traces step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.printers import PythonPrinter

from moe_compile.passes.blocks import Block, known
from moe_compile.passes.decisions import decisions, writes_to
from moe_compile.probing.reads import SCALARS
from moe_compile.probing.recording import Recording


def whole(name: str, r: Recording, plain: Callable[..., Any]) -> tuple[Block, Callable[..., Any]] | None:
    """The block, and `run(module, args, kwargs)` that calls it, or `plain` where an argument is not contiguous."""
    results = list(dict.fromkeys(n for n in tree_leaves(r.output, is_leaf=lambda x: isinstance(x, Node)) if isinstance(n, Node)))
    if not all(r.values[n].is_contiguous() for n in r.graph.nodes if n.op == "placeholder"):
        return None  # strides of the results follow from theirs
    if not results or r.rebound or r.written or any(n.op == "call_module" for n in r.graph.nodes) or not _own(r, results):
        return None
    graph, inputs = _graph(r, results)
    if not decisions(graph) or (places := _places(r, inputs, results)) is None:
        return None
    kinds = tuple((r.values[n].dtype, r.values[n].device) for n in results)
    block = Block(graph, places, kinds)
    return block, _run(r, known(block, name), inputs, results, plain)


def _own(r: Recording, results: list[Node]) -> bool:
    """Are the results new tensors, one apart from the other, and what was given as it was?"""
    given = {_memory(r, n) for n in r.graph.nodes if n.op in ("placeholder", "get_attr")}
    made = [_memory(r, n) for n in results]
    if None in made or given & set(made) or len(set(made)) < len(made):
        return False
    return all(_memory(r, target) not in given for n in r.graph.nodes for target in writes_to(n))


def _memory(r: Recording, n: Node) -> int | None:
    t = r.values.get(n)
    return int(t.untyped_storage()._cdata) if isinstance(t, torch.Tensor) else None


def _graph(r: Recording, results: list[Node]) -> tuple[Graph, list[Node]]:
    """The recorded calls with all tensors that they are given as placeholders; those tensors' nodes in the recording, in the same order."""
    graph, table = Graph(), {}
    inputs = [n for op in ("placeholder", "get_attr") for n in r.graph.nodes if n.op == op]
    for i, n in enumerate(inputs):
        table[n] = graph.placeholder(f"t{i}")
        table[n].meta["example_value"] = r.values[n]
    line = min(r.lines.values(), default=1)
    for n in r.graph.nodes:
        if n.op in ("call_function", "call_method"):
            table[n] = new = graph.node_copy(n, table.__getitem__)
            line = r.lines.get(n, line)
            new.meta["stack_trace"] = f'File "{r.file}", line {line}, in forward'
            new.meta["example_value"] = r.values.get(n)  # for whoever looks for decisions; replaced where the block is spelled out
    graph.output(tuple(table[n] for n in results))
    return graph, inputs


# ---------------------------------------------------------------- shapes of the results
def _places(r: Recording, inputs: list[Node], results: list[Node]) -> Callable[..., Any] | None:
    """(shape, strides) of each result, computed from the shapes of the tensors given; None where only the data tells."""
    at = {int(str(n.target)[1:]): i for i, n in enumerate(inputs) if n.op == "placeholder"}
    names = {s: sympy.Symbol(f"t[{at[i]}].shape[{d}]", integer=True) for s, (i, d) in r.sources.items() if i in at}
    texts = []
    for n in results:
        t = r.values[n]
        parts = [[_text(s, names) for s in sizes] for sizes in (t.shape, t.stride())]
        if any(x is None for part in parts for x in part):
            return None
        texts.append("(" + ", ".join(f"({' '.join(f'{x},' for x in part)})" for part in parts) + ")")
    made: Callable[..., Any] = eval(f"lambda t: [{', '.join(texts)}]")
    return made


def _text(s: Any, names: dict[sympy.Symbol, sympy.Symbol]) -> str | None:
    if not isinstance(s, torch.SymInt):
        return str(s)
    e = s.node.expr
    return str(PythonPrinter().doprint(e.xreplace(names))) if e.free_symbols <= names.keys() else None


# ---------------------------------------------------------------- the call
def _run(r: Recording, key: str, inputs: list[Node], results: list[Node], plain: Callable[..., Any]) -> Callable[..., Any]:
    scope: dict[str, Any] = {"block": torch.ops.moe_compile.recorded_block.default, "plain": plain}
    reached: dict[str, str] = {"": "self"}
    lines = ["def run(self, args, kwargs):"]
    given = []
    for n in inputs:
        if n.op == "placeholder":
            given.append(r.paths[int(str(n.target)[1:])])
            lines.append(f"    if not {given[-1]}.is_contiguous(): return plain(self, args, kwargs)")
            continue
        path, _, name = str(n.target).rpartition(".")
        lines += [f"    {line}" for line in _reach(path, reached)]
        given.append(_attribute(reached[path], name))
    lines.append(f"    t = block([{', '.join(given)}], {key!r})")
    lines.append(f"    return {''.join(_result(r.output, results, scope))}")
    exec(compile("\n".join(lines), r.file, "exec"), scope)
    run: Callable[..., Any] = scope["run"]
    return run


def _reach(path: str, reached: dict[str, str]) -> Iterator[str]:
    """Statements that give each module on the way to the path a name, once."""
    if path not in reached:
        outer, _, name = path.rpartition(".")
        yield from _reach(outer, reached)
        reached[path] = f"m{len(reached)}"
        yield f"{reached[path]} = {_attribute(reached[outer], name)}"


def _attribute(of: str, name: str) -> str:
    return f"{of}.{name}" if name.isidentifier() else f"getattr({of}, {name!r})"


def _result(x: Any, results: list[Node], scope: dict[str, Any]) -> Iterator[str]:
    """Python code of what the forward returns."""
    if isinstance(x, Node):
        yield f"t[{results.index(x)}]"
    elif isinstance(x, tuple | list):
        yield "(" if isinstance(x, tuple) else "["
        for part in x:
            yield from _result(part, results, scope)
            yield ", "
        yield ")" if isinstance(x, tuple) else "]"
    elif isinstance(x, dict):
        yield "{"
        for k, v in x.items():
            yield f"{k!r}: "
            yield from _result(v, results, scope)
            yield ", "
        yield "}"
    else:
        assert isinstance(x, SCALARS)
        scope[name := f"v{len(scope)}"] = x
        yield name
