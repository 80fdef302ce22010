"""The graph that is being written: which node holds which fake tensor, and each symbol as nodes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from moe_compile.probing import formulas
from moe_compile.probing.errors import NotProbed, code_of, users_frame, where


class Tape:
    """names: id of a parameter, buffer or module -> its name. Lines are kept for the nodes that `file` makes."""

    def __init__(self, names: dict[int, str], file: str) -> None:
        self.names, self.file = names, file
        self.graph = Graph()
        self.value: dict[Node, Any] = {}
        self.lines: dict[Node, int] = {}
        self._nodes: dict[int, Node] = {}  # id of a fake tensor -> node
        self._keep: list[torch.Tensor] = []  # so that no other tensor gets its id
        self._origins: dict[sympy.Symbol, Node | Callable[[], Node]] = {}
        self._formulas: dict[sympy.Basic, Any] = {}
        self._steps: dict[Any, Node] = {}
        self.numbers: dict[Node, Any] = {}  # a number's node -> the symbolic number
        self.gone: dict[int, Node | None] = {}  # id of what one token computed in a loop that is over -> what all of them did

    # ------------------------------------------------------------ nodes
    def add(self, op: str, target: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Node:
        n = self.graph.create_node(op, target, args, kwargs or {})
        frame = users_frame(2)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        if frame is not None:
            self.lines[n] = frame.f_lineno
        return n

    def hold(self, n: Node, value: Any) -> Any:
        """The node holds the value, and every part of it."""
        self.value[n] = value
        if isinstance(value, torch.Tensor):
            if not self.holds(value):
                self._nodes[id(value)] = n
                self._keep.append(value)
                self._sizes(n, value)
        elif isinstance(value, dict):
            for key, v in value.items():
                self._part(n, key, v)
        elif isinstance(value, tuple | list):
            for i, v in enumerate(value):
                self._part(n, i, v)
        return value

    def _part(self, n: Node, key: Any, v: Any) -> None:
        if isinstance(v, torch.Tensor | tuple | list | dict):
            self.hold(self.add("call_function", operator.getitem, (n, key)), v)

    def _sizes(self, n: Node, t: torch.Tensor) -> None:
        for i, s in enumerate(t.shape):
            if isinstance(s, torch.SymInt) and isinstance(e := s.node.expr, sympy.Symbol) and e not in self._origins:
                self._origins[e] = functools.partial(self.add, "call_method", "size", (n, i))

    def holds(self, t: torch.Tensor) -> bool:
        return id(t) in self._nodes

    def node(self, t: torch.Tensor) -> Node:
        if id(t) in self.gone:
            raise NotProbed(f"{where(users_frame())}: what the last token of a loop over tokens has computed is used behind it")
        if not self.holds(t):
            name = self.names.get(id(t))
            if name is None:
                raise NotProbed(f"{where(users_frame())}: a tensor comes from outside of the module")
            self.hold(self.add("get_attr", name), t)
        return self._nodes[id(t)]

    # ------------------------------------------------------------ symbols
    def item(self, s: sympy.Symbol, n: Node) -> bool:
        """The symbol is what node n holds; False where its origin is known already."""
        if s in self._origins:
            return False
        self._origins[s] = self.add("call_method", "item", (n,))
        return True

    def origin(self, s: sympy.Symbol) -> Node | None:
        """The node whose number the symbol is, where that is known already."""
        found = self._origins.get(s)
        return found if isinstance(found, Node) else None

    def source(self, s: sympy.Symbol) -> torch.Tensor | None:
        """The tensor of one element whose number the symbol is."""
        n = self.origin(s)
        found = self.value.get(n.args[0]) if n is not None and n.args else None  # type: ignore[arg-type]
        return found if isinstance(found, torch.Tensor) else None

    def symbols(self, name: str) -> list[sympy.Symbol]:
        return [s for s in self._origins if s.name == name]

    def number(self, s: Any) -> Any:
        """A symbolic number as nodes."""
        e = s.node.expr
        if e.is_number:
            return int(e) if isinstance(s, torch.SymInt) else float(e)
        if e not in self._formulas:
            self._formulas[e] = found = formulas.written(e, self._symbol, lambda f, args: self._folded(f, args))
            if isinstance(found, Node):
                self.numbers[found] = s
        return self._formulas[e]

    def _symbol(self, x: sympy.Symbol) -> Node:
        if x not in self._origins:
            frame = users_frame()
            raise NotProbed(f"{where(frame)}: a number that no torch call has given, as of one token in a loop over tokens{code_of(frame)}")
        origin = self._origins[x]
        if not isinstance(origin, Node):
            self._origins[x] = origin = origin()
        return origin

    def _folded(self, f: Callable[..., Any], args: tuple) -> Any:
        """The step as a node; sums that begin alike share it."""
        if (f, args) not in self._steps:
            self._steps[f, args] = self.add("call_function", f, args)
        return self._steps[f, args]

    # ------------------------------------------------------------ what a loop over tokens leaves
    def forget(self, nodes: list[Node]) -> None:
        """Take nodes away that nothing else needs."""
        away = set(nodes)
        for n in reversed(nodes):
            self.graph.erase_node(n)
            for table in (self.value, self.lines, self.numbers):
                table.pop(n, None)  # type: ignore[attr-defined]
        self.gone.update({key: None for key, n in self._nodes.items() if n in away and key not in self.gone})
        self.gone = {key: None if n in away else n for key, n in self.gone.items()}
        for known in (self._nodes, self._origins, self._formulas, self._steps):
            for key in [key for key, n in known.items() if isinstance(n, Node) and n in away]:  # type: ignore[attr-defined]
                del known[key]  # type: ignore[attr-defined]

    def alone(self, t: torch.Tensor) -> bool:
        """Made here, and its memory under no other name."""
        memory = t.untyped_storage()._cdata
        others = [k for k in self._keep if k is not t and id(k) not in self.gone and k.untyped_storage()._cdata == memory]
        return self.node(t).op.startswith("call") and not others

    def renamed(self, t: torch.Tensor, n: Node) -> None:
        """From now on, node n holds the tensor."""
        self._nodes[id(t)], self.value[n] = n, t

    def written(self, x: Any) -> Any:
        """An argument with nodes for tensors and symbols."""
        if isinstance(x, torch.Tensor):
            return self.node(x)
        if isinstance(x, torch.SymInt | torch.SymFloat):
            return self.number(x)
        if isinstance(x, torch.SymBool):
            raise NotProbed(f"{where(users_frame())}: a truth value that only the data tells is an argument")
        if isinstance(x, slice):
            return slice(self.written(x.start), self.written(x.stop), self.written(x.step))
        if isinstance(x, torch.Size | tuple):
            return tuple(map(self.written, x))
        if isinstance(x, list):
            return list(map(self.written, x))
        if isinstance(x, dict):
            return {k: self.written(v) for k, v in x.items()}
        return x

    def result(self, out: Any) -> Any:
        """What the forward returns, with nodes for tensors and symbols."""
        if isinstance(out, torch.Tensor):
            return self.node(out)
        if isinstance(out, torch.SymInt | torch.SymFloat):
            return self.number(out)
        if type(out) in (tuple, list):
            return type(out)(self.result(x) for x in out)
        if type(out) is dict:
            return {k: self.result(v) for k, v in out.items()}
        if out is None or isinstance(out, bool | int | float | str):
            return out
        raise NotProbed(f"the forward returns a {type(out).__name__}")
