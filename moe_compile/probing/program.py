"""A recording as two Python functions: one that says whether a call fits, one that computes it.

Each line carries the user's file and line number, so that reports and errors point at the user's code.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_flatten
from torch.utils._sympy.printers import PythonPrinter

from moe_compile.probing.emptiness import name_of
from moe_compile.probing.reads import SCALARS, equals, own_settings, reach
from moe_compile.probing.recording import Recording
from moe_compile.probing.regions import closed, opened
from moe_compile.probing.whole import whole


@dataclass(frozen=True)
class Program:
    """fits(module, args, kwargs): whether `run(module, args, kwargs)` computes what the module's forward does.

    structure, held: what a module must be made of for that, and what objects the code has read from it.
    """

    structure: Any
    held: dict[tuple[str, str], Any]
    fits: Callable[..., bool]
    run: Callable[..., Any]
    assumptions: tuple[str, ...]
    source: str
    written: tuple[tuple[str, str], ...] = ()  # attributes that it gives plain values, (path of a module, name)
    whole: Callable[..., Any] | None = None  # the same as one call in a graph, of `block`
    block: Any = None

    def is_for(self, module: nn.Module, structure: Any) -> bool:
        """Is it a module like the recorded one?  structure: the module's."""
        return bool(self.structure == structure and self.held == _held(module, list(self.held)))


def write_program(module: nn.Module, recording: Recording, args: tuple, kwargs: dict[str, Any], flat: bool = False) -> Program:
    source, run = _run(recording)
    text, fits = _fits(module, recording, args, kwargs)
    held = _held(module, list(recording.reads.attributes))
    written = tuple(recording.written)
    block, once = (whole(type(module).__name__, recording, run) if flat else None) or (None, None)
    return Program(structure_of(module), held, fits, run, tuple(recording.assumptions), f"{text}\n\n{source}", written, once, block)


# ---------------------------------------------------------------- what it computes
def _run(r: Recording) -> tuple[str, Callable[..., Any]]:
    for name, n in r.rebound.items():
        r.graph.call_function(setattr, (r.graph.get_attr(""), name, n))
    r.graph.output(r.output)
    _drop_unread(r.graph)
    code = r.graph.python_code("self")
    tree = _Itself().visit(ast.parse(code.src))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef))
    _place_lines(function, r)
    function.body = _with_blocks(function.body)
    function.name, function.args = "run", ast.parse("def run(self, args, kwargs): pass").body[0].args  # type: ignore[attr-defined]
    function.body = [*_unpack(r), *function.body]
    for s in function.body[: len(_unpack(r))]:
        _at_line(s, function.lineno)
    module = ast.fix_missing_locations(ast.Module([function], []))
    scope = dict(code.globals)
    scope.update({"torch": torch, "math": math})
    exec(compile(module, r.file, "exec"), scope)
    return ast.unparse(module), scope["run"]


class _Itself(ast.NodeTransformer):
    """The recorded module itself: FX reaches all that has a name, and it has none."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node) == "getattr(self, '')":
            return ast.Name("self", ast.Load())
        return self.generic_visit(node)


def _unpack(r: Recording) -> list[ast.stmt]:
    """p3 = kwargs["mask"], for each tensor among the arguments."""
    inputs = [n for n in r.graph.nodes if n.op == "placeholder"]
    return [ast.parse(f"{n.name} = {r.paths[int(str(n.target)[1:])]}").body[0] for n in inputs]


def _drop_unread(graph: Graph) -> None:
    """Reads and pure calls that nothing needs."""
    for n in reversed(list(graph.nodes)):
        if not n.users and _pure(n):
            graph.erase_node(n)


def _pure(n: Node) -> bool:
    name = name_of(n)
    if n.op == "get_attr":
        return True
    if n.op not in ("call_function", "call_method") or name in ("opened", "closed", "setitem", "setattr"):
        return False
    if name in ("getitem", "item"):
        return True
    random = name in ("dropout", "bernoulli", "rand", "randn", "multinomial", "rand_like", "randn_like", "randint", "randperm")
    return not random and not name.endswith("_") and not name.startswith("i") and name in _DROPPABLE


_DROPPABLE = {"size", "nonzero", "unique", "greater", "gt", "sum", "arange", "full", "tensor", "unsqueeze", "squeeze", "eq", "ne", "any",
              "getattr", "where", "bincount", "one_hot", "permute", "argsort", "cumsum", "to", "cpu", "max", "add"}  # fmt: skip


def _place_lines(function: ast.FunctionDef, r: Recording) -> None:
    """The line of the user's code on each statement."""
    lines = {n.name: line for n, line in r.lines.items()}
    function.lineno = function.end_lineno = first = min(lines.values(), default=1)
    line = first
    for s in function.body:
        target = s.targets[0].id if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name) else ""
        line = lines.get(target, line)
        _at_line(s, line)


def _at_line(s: ast.AST, line: int) -> None:
    part: Any
    for part in ast.walk(s):
        if hasattr(part, "lineno"):
            part.lineno = part.end_lineno = line
            part.col_offset = part.end_col_offset = 0


def _with_blocks(body: list[ast.stmt]) -> list[ast.stmt]:
    """opened("grad", False) ... closed()  ->  with torch.set_grad_enabled(False): ..."""
    stack: list[list[ast.stmt]] = [[]]
    for s in body:
        call = s.value if isinstance(s, ast.Assign | ast.Expr) and isinstance(s.value, ast.Call) else None
        kind = ast.unparse(call.func).rpartition("_")[2] if call is not None else ""
        if call is not None and kind == opened.__name__:
            block = ast.With([ast.withitem(_context(call))], [])
            _at_line(block, s.lineno)
            block.lineno = block.end_lineno = s.lineno
            block.col_offset = block.end_col_offset = 0
            stack[-1].append(block)
            stack.append(block.body)
        elif call is not None and kind == closed.__name__:
            if not stack[-1]:
                stack[-1].append(_at(ast.Pass(), s.lineno))
            stack.pop()
        elif not _forgets(s):
            stack[-1].append(s)
    return stack[0]


def _forgets(s: ast.stmt) -> bool:
    """x = None, which FX writes to free memory; under Dynamo it frees nothing."""
    return isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant) and s.value.value is None


def _at(s: Any, line: int) -> Any:
    s.lineno = s.end_lineno = line
    s.col_offset = s.end_col_offset = 0
    return s


def _context(call: ast.Call) -> ast.expr:
    kind, *rest = call.args
    text = ", ".join(ast.unparse(a) for a in rest)
    if isinstance(kind, ast.Constant) and kind.value == "grad":
        return ast.parse(f"torch.set_grad_enabled({text})", mode="eval").body
    device, dtype, enabled, cache = (ast.unparse(a) for a in rest)
    return ast.parse(f"torch.autocast({device}, dtype={dtype}, enabled={enabled}, cache_enabled={cache})", mode="eval").body


# ---------------------------------------------------------------- whether it fits
def _fits(module: nn.Module, r: Recording, args: tuple, kwargs: dict[str, Any]) -> tuple[str, Callable[..., bool]]:
    scope: dict[str, Any] = {"torch": torch, "math": math}
    tests = [f"len(args) == {len(args)}", f"len(kwargs) == {len(kwargs)}", *[f"{k!r} in kwargs" for k in kwargs]]
    for path in r.entered:  # what torch's own code reads of its modules, nobody has noted
        tests += [equals(f"{reach(path)}.{n}", v, scope) for n, v in own_settings(module.get_submodule(path))]
    tests += _surroundings(module, scope)
    leaves = tree_flatten((args, kwargs))[0]
    for i, (value, path) in enumerate(zip(leaves, r.paths)):
        tests += _tensor_tests(path, value, r, i, scope) if isinstance(value, torch.Tensor) else _type_and_value(path, value, scope)
    tests += [_condition(e, answer, r) for e, answer in r.numbers.conditions.items()]
    tests += r.reads.tests(scope)
    lines = "".join(f"    if not ({t}): return False\n" for t in dict.fromkeys(tests))
    source = f"def fits(self, args, kwargs):\n{lines}    return True\n"
    exec(compile(source, f"<moe_compile: whether a recorded {type(module).__name__} fits>", "exec"), scope)
    return source, scope["fits"]


def _surroundings(module: nn.Module, scope: dict[str, Any]) -> list[str]:
    """Autocast and the default dtype, by which torch chooses dtypes that the recorded Python code has seen."""
    kinds = {"cpu", *(p.device.type for p in module.parameters())} - {"meta"}
    tests = [f"torch.is_autocast_enabled({kind!r}) is {torch.is_autocast_enabled(kind)}" for kind in sorted(kinds)]
    for kind in sorted(kinds):
        if torch.is_autocast_enabled(kind):
            tests.append(f"torch.get_autocast_dtype({kind!r}) == {torch.get_autocast_dtype(kind)}")
    return [*tests, f"torch.get_default_dtype() == {torch.get_default_dtype()}"]


def _type_and_value(path: str, value: Any, scope: dict[str, Any]) -> list[str]:
    """1, 1.0 and True are three values: what Python makes of them differs."""
    exact = [f"type({path}) is {type(value).__name__}"] if isinstance(value, int | float | str) and not isinstance(value, bool) else []
    return [*exact, equals(path, value, scope)]


def structure_of(module: nn.Module) -> Any:
    """The modules in it, the shapes of their tensors, and which of these are one."""
    first: dict[int, int] = {}
    return [
        (path, type(m), [(n, _seen(t), first.setdefault(id(t), len(first))) for n, t in [*m._parameters.items(), *m._buffers.items()]])
        for path, m in module.named_modules()
    ]


def _held(module: nn.Module, names: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """What stands under these names, (path of a module, attribute), but for modules."""
    try:
        values = {(path, n): getattr(module.get_submodule(path), n) for path, n in names}
    except AttributeError:
        return {}
    return {at: _seen(v) for at, v in values.items() if not isinstance(v, nn.Module) and at[1] != "training"}


def _seen(v: Any, depth: int = 3) -> Any:
    if isinstance(v, SCALARS):
        return type(v), v if v == v else "nan"
    if isinstance(v, torch.Tensor):
        return type(v), tuple(v.shape), v.dtype, v.device
    if depth and isinstance(v, list | tuple):
        return type(v), [_seen(x, depth - 1) for x in v]
    if depth and isinstance(v, dict):
        return type(v), [(k if isinstance(k, SCALARS) else id(k), _seen(x, depth - 1)) for k, x in v.items()]
    if depth and not callable(v) and hasattr(v, "__dict__"):
        return type(v), [(k, _seen(x, depth - 1)) for k, x in vars(v).items()]
    return type(v), _Same(v)


class _Same:
    """Equal to itself alone, and keeps its object, so that no other gets its address."""

    def __init__(self, v: Any) -> None:
        self.v = v

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.v is self.v

    __hash__ = None  # type: ignore[assignment]


def _tensor_tests(path: str, value: torch.Tensor, r: Recording, i: int, scope: dict[str, Any]) -> list[str]:
    scope[f"device{i}"] = value.device
    tests = [f"isinstance({path}, torch.Tensor)", f"{path}.dim() == {value.dim()}", f"{path}.dtype == {value.dtype}"]
    tests.append(f"{path}.device == device{i}")
    for d, s in enumerate(r.inputs[i].shape):
        if isinstance(s, torch.SymInt) and not s.node.expr.is_number:
            source = r.sources.get(s.node.expr)
            if source == (i, d):
                tests.append(f"{path}.shape[{d}] > 0")
            else:
                tests.append(f"{path}.shape[{d}] == {_number(s.node.expr, r)}")
        else:
            tests.append(f"{path}.shape[{d}] == {int(s)}")
    return tests


def _condition(e: sympy.Basic, answer: bool, r: Recording) -> str:
    return f"({_number(e, r)})" if answer else f"not ({_number(e, r)})"


def _number(e: sympy.Basic, r: Recording) -> str:
    names = {s: sympy.Symbol(f"{r.paths[i]}.shape[{d}]", integer=True) for s, (i, d) in r.sources.items()}
    return str(PythonPrinter().doprint(e.xreplace(names)))
