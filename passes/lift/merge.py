"""Anti-unification: what E unrolled experts have in common, as one expression of the expert index."""

from __future__ import annotations

from typing import Any

from .algebra import subst
from .expr import BINDERS, Expr, Refused, Var, make_stack, raw
from .index import sel


class Merger:
    """E expressions, equal but for the expert, become one expression of `index`."""

    def __init__(self, index: Var):
        self.index = index
        self.memo: dict[tuple, Expr] = {}

    def merge(self, parts: tuple[Expr, ...]) -> Expr:
        if all(p is parts[0] for p in parts):
            return parts[0]
        if parts not in self.memo:
            self.memo[parts] = self._merge(parts)
        return self.memo[parts]

    def _merge(self, parts: tuple[Expr, ...]) -> Expr:
        a = parts[0]
        if any(p.op != a.op or len(p.args) != len(a.args) for p in parts):
            raise Refused(f"the experts are not alike: {_unlike(parts)}")
        if a.op == "var":
            raise Refused("the experts run over different indices")
        if a.op == "const":
            return self._constants(parts)
        if a.op in BINDERS and isinstance(a.args[0], Var):
            return self._bound(parts)
        if a.op == "load" and len({p.args[0] for p in parts}) > 1:
            return self._stack(parts)
        return raw(a.op, *[self._argument(a.op, tuple(p.args[i] for p in parts)) for i in range(len(a.args))])

    def _argument(self, op: str, xs: tuple) -> Any:
        if isinstance(xs[0], Expr):
            return self.merge(xs)
        if any(x != xs[0] for x in xs):
            raise Refused(f"the experts differ in {op}")
        return xs[0]

    def _constants(self, parts: tuple[Expr, ...]) -> Expr:
        values = [p.args[0] for p in parts]
        if values != list(range(len(parts))) or not all(isinstance(v, int) for v in values):
            raise Refused(f"the experts differ in a constant: {values[:4]}")
        return self.index

    def _bound(self, parts: tuple[Expr, ...]) -> Expr:
        v = parts[0].args[0]
        if any(p.args[0].size != v.size for p in parts):
            raise Refused("the experts differ in size")
        opened = []
        for p in parts:
            opened.append([p.args[i] if p.args[0] is v else subst(p.args[i], {p.args[0]: v}) for i in range(1, len(p.args))])
        return raw(parts[0].op, v, *[self.merge(tuple(xs)) for xs in zip(*opened)])

    def _stack(self, parts: tuple[Expr, ...]) -> Expr:
        leaves = tuple(p.args[0] for p in parts)
        if len({leaf.shape for leaf in leaves}) > 1:
            raise Refused("the experts differ in size")
        if any(leaf.dequantised for leaf in leaves):  # all of them at once would be a copy of the weights in full
            raise Refused("each expert's weights are dequantised by themselves in a way that no kernel knows")
        if any(len(leaf.nodes) > 1 for leaf in leaves):
            raise Refused("experts within experts")
        rest = [self.merge(tuple(p.args[i] for p in parts)) for i in range(1, len(parts[0].args))]
        return raw("load", make_stack(leaves), self.index, *rest)


def select(index: Expr, *parts: Expr) -> Expr:
    """parts[index]; merged at once into one expression of the index where the parts are alike, else kept as `sel`."""
    try:
        which = Var(len(parts))
        return subst(Merger(which).merge(tuple(parts)), {which: index})
    except Refused:
        return sel(index, *parts)


def _unlike(parts: tuple[Expr, ...]) -> str:
    """Which is the first that computes something else than the one before all others, and what."""
    a = parts[0]
    e, b = next((i, p) for i, p in enumerate(parts) if p.op != a.op or len(p.args) != len(a.args))
    if a.op == b.op:
        return f"expert {e} has {len(b.args)} parts in a `{b.op}` where expert 0 has {len(a.args)}"
    return f"expert {e} has a `{b.op}` where expert 0 has a `{a.op}`"
