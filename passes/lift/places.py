"""Places in the user's code, for reasons: where a node was made, what a tensor is called there, an expression in these names."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from .expr import Expr, Leaf, Var

USERS = "users_node"  # of an ATen node's meta: the node of the user's graph that it was traced from
_LONGEST = 50  # letters of a line of code
_PART = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\.(\w+)|\[(\d+)\]")


def where(n: Node) -> str:
    """ "file:line" of the user's code that made the node."""
    return _line(n)[0]


def told(n: Node) -> str:
    """ "moe.py:33 `out = out + y`", or the node's name where nothing tells of its code."""
    place, code = _line(n.meta.get(USERS, n))
    if not place:
        return tensor(n)
    short = place.replace("\\", "/").rpartition("/")[2]
    return f"{short} `{code}`" if code else short


def tensor(n: Node) -> str:
    """What the user calls a tensor: a parameter's name, or the code that computes it."""
    n = n.meta.get(USERS, n)
    source = getattr(n, "_dynamo_source", None) or getattr(n.meta.get("grapharg"), "source", None)
    if source is not None:
        parts = [next(filter(None, found)) for found in _PART.findall(source.name if isinstance(source.name, str) else source.name())]
        return ".".join(parts[1:] if parts[:1] == ["self"] else parts) or n.name
    return told(n) if _line(n)[0] else n.name


def _line(n: Node) -> tuple[str, str]:
    lines = (n.meta.get("stack_trace") or "").splitlines()
    at = next((i for i in reversed(range(len(lines))) if lines[i].strip().startswith("File ")), None)
    if at is None:
        return "", ""
    file, line = lines[at].strip().split(",")[:2]
    code = lines[at + 1].strip() if at + 1 < len(lines) else ""
    place = f"{file.removeprefix('File ').strip().strip(chr(34))}:{line.replace('line', '').strip()}"
    return place, code if len(code) <= _LONGEST else f"{code[: _LONGEST - 3]}..."


def computed(e: Any) -> str:
    """What an expression is computed from, in the user's names."""
    read: dict[str, None] = {}
    todo = [e]
    while todo:
        x = todo.pop(0)
        if isinstance(x, Leaf):
            read.setdefault(tensor(x.nodes[0]))
        elif isinstance(x, Expr) and not isinstance(x, Var):
            todo += x.args
    if not read:
        return "a number that says which token, slot, expert or feature it is"
    return "what is computed from " + ", ".join([*read][:3])
