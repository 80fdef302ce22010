"""Write expressions as graph nodes.

Every expression is emitted as a two-dimensional tensor [rows, columns]: the row variables flattened in the root's order (extent 1 where
the expression does not depend on them), then one other group of variables (slots, or features).  An existing node that is proved to hold
the same elements is used instead of new ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .decisions import tensor_of
from .emit_quantized import dequantised
from .holders import find_node, holder
from .lift import Refused
from .lift.algebra import subst
from .lift.expr import Expr, Var, is_const
from .lift.index import mix
from .lift.places import computed
from .lift.program import Digit, Param
from .lift.sizes import Size, prod, shape_of, size_of
from .region import MoERegion
from .window import symbolic

POINTWISE: dict[str, Callable[..., Any]] = {
    "silu": torch.nn.functional.silu, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "neg": torch.neg, "exp": torch.exp,
    "rsqrt": torch.rsqrt, "sqrt": torch.sqrt, "softplus": torch.nn.functional.softplus, "erf": torch.erf, "abs": torch.abs,
    "log": torch.log, "square": torch.square, "div": torch.div, "maximum": torch.maximum, "minimum": torch.minimum, "where": torch.where,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "not": torch.logical_not,
    "idiv": torch.floor_divide, "mod": torch.remainder, "log1p": torch.log1p, "expm1": torch.expm1, "reciprocal": torch.reciprocal,
    "floor": torch.floor, "exp2": torch.exp2, "sin": torch.sin, "cos": torch.cos,
}  # fmt: skip


def _unwritten(e: Expr) -> Refused:
    return Refused(f"{computed(e)} stands outside of the experts ({e.op}), in a form that cannot be written into the graph again")


class Emitter:
    """Adds nodes to `graph` at its insertion point.  `at(n)`: the node of this graph that stands for node n of the analysed window."""

    def __init__(self, graph: Graph, region: MoERegion, at: Callable[[Node], Node]):
        self.graph, self.region, self.at = graph, region, at
        self.rows = region.formula.rows
        self.read: set[Node] = set()  # nodes of the window or its inputs that the new code reads
        self._memo: dict[Any, Node] = {}

    # ------------------------------------------------------------ nodes
    def call(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(f, args, kwargs)

    def method(self, name: str, *args: Any) -> Node:
        return self.graph.call_method(name, args)

    def existing(self, n: Node) -> Node:
        self.read.add(n)
        return self.at(n)

    # ------------------------------------------------------------ expressions
    def matrix(self, e: Expr, columns: Sequence[Var]) -> Any:
        """e over (rows, columns) as a node of shape [rows or 1, columns or 1], or a number."""
        if is_const(e):
            return e.args[0]
        key = (e, tuple(columns))
        if key not in self._memo:
            self._memo[key] = self._found(e, list(columns)) or self._made(e, tuple(columns))
        return self._memo[key]

    def _found(self, e: Expr, columns: list[Var]) -> Node | None:
        vs = [v for v in self.rows if v in e.free] + [v for v in columns if v in e.free]
        on_rows = self.rows and all(v in e.free for v in self.rows)
        if not vs or (e.free & set(self.rows) and not on_rows) or not all(v in e.free for v in columns):
            return None
        width = prod(v.size for v in columns)
        n = find_node(self.region, e, vs, width)
        return None if n is None else self._shaped(self.existing(n), tensor_of(n), -1 if on_rows else 1, width)

    def _shaped(self, node: Node, like: torch.Tensor | None, rows: int, columns: Size) -> Node:
        if like is not None and like.dim() == 2 and shape_of(like)[1] == columns:
            return node
        return self.method("reshape", node, rows, columns)

    def _made(self, e: Expr, columns: tuple[Var, ...]) -> Node:
        a = e.args
        if e.op == "load":
            return self._load(e, columns)
        if e.op == "cast":
            return self.method("to", self.matrix(a[0], columns), a[1])
        if e.op == "size":
            return self._size(e.args[0])
        if e.op == "stop":
            return self.method("detach", self.matrix(a[0], columns))
        if e.op == "clamp":
            return self.call(torch.clamp, self.matrix(a[0], columns), a[1], self._size(a[2].args[0]) if isinstance(a[2], Expr) else a[2])
        if e.op == "sum":
            self._only_rows(e)
            return self.call(torch.sum, self.matrix(a[1], (a[0],)), 1, True)
        if e.op == "softmax" and tuple(columns) == (a[2],):
            return self.call(torch.softmax, self.matrix(a[1], (a[0],)), 1)
        if e.op == "sel" and columns == (a[0],):
            return self.call(torch.cat, [self._column(x) for x in a[1:]], 1)
        if e.op == "sel":
            raise Refused(f"an index or factor that differs from expert to expert stands outside of the experts: {computed(e)}")
        return self.pointwise(e, [self.matrix(x, columns) if isinstance(x, Expr) else x for x in a])

    def _size(self, size: Any) -> Any:
        """A number that the code calculates from sizes (a capacity, say): from sizes of what the window reads anyway."""
        from moe_compile.probing.errors import NotProbed
        from moe_compile.probing.formulas import written

        try:
            return size_argument(self, size, size)
        except Refused as e:
            try:
                return written(size, lambda s: size_argument(self, s, s), lambda f, args: self.call(f, *args))
            except NotProbed:
                raise e from None

    def _column(self, e: Expr) -> Node:
        """e over the rows, as one column of full height."""
        if not set(self.rows) <= e.free:
            raise Refused(f"{computed(e)} differs from choice to choice, and stands outside of the experts in a form that has no code")
        return self.matrix(e, ())

    def pointwise(self, e: Expr, args: Sequence[Any]) -> Node:
        """The function of a pointwise expression on nodes and numbers."""
        if e.op in ("add", "mul"):
            return self._fold(operator.add if e.op == "add" else operator.mul, list(args))
        if e.op not in POINTWISE:
            raise _unwritten(e)
        return self.call(POINTWISE[e.op], *args)

    def _only_rows(self, e: Expr) -> None:
        if not e.free <= set(self.rows):
            raise _unwritten(e)

    def _fold(self, f: Callable[..., Any], parts: list[Any]) -> Node:
        nodes = [p for p in parts if isinstance(p, Node)] + [p for p in parts if not isinstance(p, Node)]
        out = nodes[0]
        for p in nodes[1:]:
            out = self.call(f, out, p) if isinstance(out, Node) else f(out, p)
        return out

    # ------------------------------------------------------------ elements of a tensor
    def _load(self, e: Expr, columns: tuple[Var, ...]) -> Node:
        node, idx, sizes = self._tensor(e)
        for i, at in reversed(list(enumerate(idx))):
            if is_const(at):
                node = self.method("select", node, i, at.args[0])
                del idx[i], sizes[i]
            elif isinstance(at, Var) and _fewer(at.size, sizes[i]):  # the first choices of a sorted row
                node, sizes[i] = self.method("narrow", node, i, 0, at.size), at.size
        if len(idx) == 1 and not isinstance(idx[0], Var) and idx[0].op != "mix":  # a value per expert
            return self.call(operator.getitem, node, self.matrix(idx[0], columns))
        if idx and not isinstance(idx[-1], Var) and idx[-1].op != "mix":
            return self._gather(node, idx, sizes, columns)
        return self._arranged(node, idx, sizes, columns, e)

    def _tensor(self, e: Expr) -> tuple[Node, list[Expr], list[Size]]:
        """The tensor that a load reads, its indices and extents; one tensor an expert stands side by side, the expert last."""
        leaf, idx, sizes = e.args[0], list(e.args[1:]), list(e.args[0].shape)
        nodes = [self.existing(holder(self.region, n)) for n in leaf.nodes]
        if len(nodes) == 1:
            return nodes[0], idx, sizes
        return self.call(torch.stack, nodes, -1), [*idx[1:], idx[0]], [*sizes[1:], sizes[0]]

    def _gather(self, node: Node, idx: list[Expr], sizes: list[Size], columns: tuple[Var, ...]) -> Node:
        places = _flat(idx[:-1], sizes[:-1])
        if 0 < len(places) < len(self.rows) and places == list(self.rows[: len(places)]):
            return self._gather_outer(node, idx[-1], sizes[-1], columns, len(places))
        if places != list(self.rows):
            return self._gather_slots(node, places, idx[-1], sizes[-1], columns)
        if len(sizes) != 2:
            node = self.method("reshape", node, -1, sizes[-1])
        return self.call(torch.gather, node, 1, self.matrix(idx[-1], columns))

    def _gather_outer(self, node: Node, at: Expr, n: Size, columns: tuple[Var, ...], outer: int) -> Node:
        """One element for each place of a tensor [outer rows, n], the same for all inner rows (a count for each sequence, say)."""
        within = [size_argument(self, v.size, v.size) for v in self.rows[outer:]]
        width = self._fold(operator.mul, [*within, 1 if not at.free & set(columns) else prod(v.size for v in columns)])
        flat = self.method("reshape", node, -1, n)
        places = self.method("reshape", self.matrix(at, columns), self.method("size", flat, 0), width)
        return self.method("reshape", self.call(torch.gather, flat, 1, places), -1, prod(v.size for v in columns))

    def _gather_slots(self, node: Node, places: list[Expr], at: Expr, n: Size, columns: tuple[Var, ...]) -> Node:
        """One element for each place (row, column) of a tensor [places, n], whose places may lie in another order, slot by slot say."""
        want = [*self.rows, *columns]
        sizes = [v.size if isinstance(v, Var) and isinstance(v.size, int) else -1 for v in places]
        if len(places) != len(want) or set(places) != set(want) or not set(columns) <= at.free or sizes.count(-1) > 1:
            raise Refused("outside of the experts, a tensor is gathered by the routing whose rows are not the tokens")
        node = self.method("permute", self.method("reshape", node, *sizes, n), *map(places.index, want), len(want))
        node = self.method("reshape", node, -1, prod(v.size for v in columns), n)
        return self.method("squeeze", self.call(torch.gather, node, 2, self.method("unsqueeze", self.matrix(at, columns), 2)), 2)

    def _arranged(self, node: Node, idx: list[Expr], sizes: list[Size], columns: tuple[Var, ...], e: Expr) -> Node:
        """A tensor indexed by plain variables: permute its dimensions to (rows, columns) and flatten."""
        mine = _flat(idx, sizes)
        if not all(isinstance(v, Var) for v in mine) or len(set(mine)) < len(mine):
            raise _unwritten(e)
        on_rows, rest = [v for v in self.rows if v in mine], [v for v in columns if v in mine]
        if len(rest) not in (0, len(columns)) or len(on_rows) + len(rest) < len(mine):
            raise _unwritten(e)
        want = on_rows + rest
        if mine != want:
            groups = [_flat([i], [n]) for i, n in zip(idx, sizes)]
            if any(not set(g) <= set(want) for g in groups):
                raise _unwritten(e)
            order = sorted(range(len(idx)), key=lambda i: want.index(groups[i][0]))  # type: ignore[arg-type]
            if [v for i in order for v in groups[i]] != want:
                raise _unwritten(e)
            node = self.method("permute", node, *order)
            sizes = [sizes[i] for i in order]
        width = prod(v.size for v in rest)
        if 0 < len(on_rows) < len(self.rows):
            return self._repeated(node, on_rows, width)
        if len(sizes) == 2 and len(on_rows) and sizes[1] == width:
            return node
        return self.method("reshape", node, -1 if on_rows else 1, width)

    def _repeated(self, node: Node, some: list[Var], width: Size) -> Node:
        """A tensor [some of the rows' variables, width], the same for all of the others (a choice for each sequence, say)."""
        extents = [size_argument(self, v.size, v.size) for v in self.rows]
        node = self.method("reshape", node, *[n if v in some else 1 for v, n in zip(self.rows, extents)], width)
        return self.method("reshape", self.method("expand", node, *extents, width), -1, width)

    # ------------------------------------------------------------ parameters
    def parameter(
        self, p: Param, order: str, only: slice = slice(None), instead: dict[Node, Node] | None = None, experts: int | None = None
    ) -> tuple[list[Node], str]:
        """A weight ("i" and "o" digits) or bias ("o" digits) as the stage op takes it: the nodes, and their layout.

        only: the experts of a list that are wanted. instead: holder -> the node of this graph to read in its place; it has `experts`
        experts where it is stacked.
        """
        if p.format is not None:
            if p.num_experts != self.region.formula.num_experts:
                raise Refused("quantised experts of which only the first are used")
            if instead:
                raise Refused("quantised experts of a sharded module")
            return dequantised(self, p, order, only)
        nodes = [self._source(holder(self.region, n), instead or {}) for n in p.leaf.nodes[only]]
        if (n := self.region.formula.num_experts) != p.num_experts:
            nodes, experts = self._first(nodes, p, n, only), n
        letters = order.replace("e", "") if p.listed else order
        roles = [_role(dim) for dim in p.dims]
        if sorted(roles) == sorted(letters) and (p.listed or roles[0] == "e"):  # as it stands
            layout = "".join(roles)
        else:
            nodes, layout = [self._as_layout(n, p, letters, experts) for n in nodes], letters
        return nodes, layout + (f"*{len(nodes)}" if p.listed else "")

    def _first(self, nodes: list[Node], p: Param, n: int, only: slice) -> list[Node]:
        """The first n experts of a tensor that has more."""
        if p.listed or only != slice(None) or len(p.dims[0]) != 1 or p.dims[0][0].role != "e":
            raise Refused(f"{p.num_experts} experts in one tensor, of which {n} are used")
        return [self.call(operator.getitem, each, slice(0, n)) for each in nodes]

    def _source(self, n: Node, instead: dict[Node, Node]) -> Node:
        if n not in instead:
            return self.existing(n)
        self.read.add(n)
        return instead[n]

    def _as_layout(self, node: Node, p: Param, letters: str, experts: int | None) -> Node:
        """Views only: split merged dimensions, bring them into order, merge those of one role."""
        roles = ["o" if d.role == "c" else d.role for d in p.digits]
        sizes = [experts if d.role == "e" and experts is not None else d.size for d in p.digits]
        if any(len(dim) != 1 for dim in p.dims):
            node = self.method("reshape", node, *sizes)
        perm = [i for c in letters for i, r in enumerate(roles) if r == c]
        if perm != sorted(perm):
            node = self.method("permute", node, *perm)
        if len(perm) != len(letters):
            extents = {"e": experts} if experts is not None else {}
            node = self.method("reshape", node, *[extents.get(c, p.extent("oc" if c == "o" else c)) for c in letters])
        return node


def _role(dim: Sequence[Digit]) -> str:
    """The one role of a parameter's dimension ("c" digits choose among output columns), "?" where it is merged from several."""
    roles = {"o" if d.role == "c" else d.role for d in dim}
    return roles.pop() if len(roles) == 1 else "?"


def _fewer(n: Size, of: Size) -> bool:
    return isinstance(n, int) and isinstance(of, int) and n < of


def _flat(idx: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
    """The variables of the flattened index; (i div n, i mod n) over two dimensions is i."""
    whole = mix(*[x for pair in zip(idx, sizes) for x in pair])
    return [] if not idx else list(whole.args[::2]) if whole.op == "mix" else [whole]


def size_argument(emitter: Emitter, size: Size, sym: Any) -> Any:
    """A symbolic extent as a graph value: taken from a tensor that the window reads anyway."""
    if isinstance(size, int):
        return size
    for n in emitter.region.inputs:
        v = symbolic(n)
        if isinstance(v, torch.SymInt) and size_of(v) == size:
            return emitter.existing(n)
        t = tensor_of(n)
        if t is not None and size in (shape := shape_of(t)):
            return emitter.method("size", emitter.existing(n), shape.index(size))
    raise Refused(f"the extent {sym} of the output is not an extent of any input")


__all__ = ["Emitter", "find_node", "holder", "size_argument", "subst"]
