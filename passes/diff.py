"""A graph as text that stays the same across torch versions, and the difference between two of them.

Node names, parameter spellings and symbols differ between torch versions and between runs. The normal form renumbers
them: a node is called by its operation and counted (`linear_1`), a placeholder by the parameter or argument it is
(`experts.0.weight`), a symbol by its first appearance (`s0`, `u0`); every value has its dtype and shape behind it.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_DTYPES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "bool",
}  # fmt: skip
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_SYMBOL = re.compile(r"\b(zuf|zf|u|s)(\d+)\b")


class Names:
    """The names given so far. One object for a graph before and after a rewrite keeps the names of what stayed."""

    def __init__(self) -> None:
        self._nodes: dict[str, str] = {}
        self._count: Counter[str] = Counter()
        self._taken: set[str] = set()
        self._symbols: dict[str, str] = {}

    def node(self, node: Node, prefix: str = "") -> str:
        key = prefix + node.name
        if key not in self._nodes:
            self._nodes[key] = self._fresh(_base_name(node))
        return self._nodes[key]

    def _fresh(self, base: str) -> str:
        while True:
            number = self._count[base]
            self._count[base] += 1
            name = f"{base}_{number}" if number else base
            if name not in self._taken:
                self._taken.add(name)
                return name

    def symbols(self, text: str) -> str:
        """`text` with its symbols (s77, u3) renumbered in the order of their first appearance."""
        return _SYMBOL.sub(lambda match: self._symbol(match[0], match[1]), text)

    def _symbol(self, symbol: str, kind: str) -> str:
        if symbol not in self._symbols:
            new = "u" if kind.startswith("u") else "s"
            self._symbols[symbol] = f"{new}{sum(name.startswith(new) for name in self._symbols.values())}"
        return self._symbols[symbol]


def normal_form(gm: GraphModule, names: Names | None = None) -> str:
    """One line a node, `name = operation(arguments)  # dtype[shape]`, nested graphs indented below their user."""
    names = names or Names()
    return "\n".join(_lines(gm, names, prefix="", indent="")) + "\n"


def unified(before: str, after: str, context: int = 2, title: str = "graph") -> str:
    """The unified diff of two normal forms; empty where they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), f"{title} before", f"{title} after", lineterm="", n=context)
    return "\n".join(lines)


def coloured(diff: str) -> Any:
    """A unified diff as a rich Text (needs the package `rich`): removed red, added green, places dim."""
    from rich.text import Text

    styles = {"+++": "bold", "---": "bold", "@@": "cyan", "+": "green", "-": "red"}
    text = Text()
    for line in diff.splitlines():
        style = next((style for start, style in styles.items() if line.startswith(start)), "dim")
        text.append(line + "\n", style=style)
    return text


def _lines(gm: GraphModule, names: Names, prefix: str, indent: str) -> Iterator[str]:
    for node in gm.graph.nodes:
        yield indent + _line(node, names, prefix)
        for target in _nested(node, gm):
            yield f"{indent}  {target}:"
            yield from _lines(getattr(gm, target), names, f"{prefix}{target}.", indent + "    ")


def _line(node: Node, names: Names, prefix: str) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0], names, prefix)}"
    type_ = _type(node.meta.get("example_value", node.meta.get("val")), names)
    comment = f"  # {type_}" if type_ else ""
    return f"{names.node(node, prefix)} = {_expression(node, names, prefix)}{comment}"


def _expression(node: Node, names: Names, prefix: str) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"attribute {node.target}"
    arguments = [_argument(argument, names, prefix) for argument in node.args]
    arguments += [f"{key}={_argument(value, names, prefix)}" for key, value in node.kwargs.items()]
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    return f"{_operation(node)}({', '.join(arguments)})"


def _argument(value: Any, names: Names, prefix: str) -> str:
    if isinstance(value, Node):
        return names.node(value, prefix)
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_argument(item, names, prefix) for item in value)
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{comma})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_argument(item, names, prefix)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if part is None else _argument(part, names, prefix) for part in _slice_parts(value))
    return names.symbols(_constant(value))


def _slice_parts(value: slice) -> list[Any]:
    parts = [value.start, value.stop]
    return parts if value.step is None else [*parts, value.step]


def _constant(value: Any) -> str:
    if value is Ellipsis:
        return "..."
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if isinstance(value, str):
        return repr(re.sub(r" on node '\w+'", "", value))  # assertion messages quote node names
    if isinstance(value, (int, float, bool, complex, type(None))):
        return repr(value)
    return str(value)


def _base_name(node: Node) -> str:
    if node.op == "placeholder":
        return _input_name(node)
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".")[1]
    return _operation(node)


def _operation(node: Node) -> str:
    """`linear`, `getitem`, `aten.add.Tensor`, `moe_compile.route`: without the module paths that versions move."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _input_name(node: Node) -> str:
    """`experts.0.weight` for a parameter, `x` for an argument: from where Dynamo found it, else the node's name."""
    if isinstance(node.meta.get("example_value", node.meta.get("val")), _SYMBOLIC):
        return "size"
    dynamo_source = getattr(node, "_dynamo_source", getattr(node.meta.get("grapharg"), "source", None))
    name = getattr(dynamo_source, "name", None)
    source = str(name() if callable(name) else name or "")
    root = re.match(r"[LG]\['(\w+)'\]", source)
    if root is None:
        return node.name.removeprefix("l_").rstrip("_")
    path = [match[match.lastindex or 0] for match in _MEMBER.finditer(source, root.end())]
    of_module = re.match(r"\._(?:modules|parameters|buffers)", source[root.end() :])
    return ".".join(path if of_module else [root[1], *path])


def _type(value: Any, names: Names) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(names.symbols(str(size)) for size in value.shape)}]"
    if isinstance(value, _SYMBOLIC):
        return names.symbols(str(value))
    if isinstance(value, (tuple, list)):
        inside = [_type(item, names) for item in value]
        return f"({', '.join(inside)})" if all(inside) else ""
    return ""


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _nested(node: Node, gm: GraphModule) -> list[str]:
    if node.op != "get_attr" or not isinstance(getattr(gm, str(node.target), None), GraphModule):
        return []
    return [str(node.target)]
