"""Choices made one after the other, by tensors of ids of their own: w_0 f(id_0) + w_1 f(id_1) is a sum over k of w_k f(id_k)."""

from __future__ import annotations

from collections.abc import Sequence

from .algebra import mul, replace, subst
from .expr import Expr, Refused, Var, alpha, factors, raw
from .index import sel
from .merge import select
from .normal import num_ids, used_ids


def side_by_side(terms: Sequence[Expr], rows: Sequence[Var]) -> Expr:
    """One sum over the choices, of terms that select the same experts by different ids. Raises Refused."""
    parts = [_Choice(t, rows) for t in terms]
    first = parts[0]
    if any(num_ids(p.ids) != num_ids(first.ids) or p.experts_key() != first.experts_key() for p in parts):
        raise Refused("several sums over experts are added")
    k = Var(len(parts))
    experts = subst(first.experts, {first.index: _id_of(k, [p.ids for p in parts])})
    return raw("sum", k, raw("mul", sel(k, *[p.weight for p in parts]), experts))


def _id_of(k: Var, ids: list[Expr]) -> Expr:
    """The k-th id: a column of their tensor, where all of them are."""
    return (select if len({e.args[0] for e in ids}) == 1 else sel)(k, *ids)


class _Choice:
    """weight * experts, the experts as a function of `index` in place of the ids."""

    def __init__(self, term: Expr, rows: Sequence[Var]) -> None:
        ids = used_ids(term, rows)
        if len(ids) != 1 or ids[0].op != "load":
            raise Refused("several sums over experts are added")
        self.ids, self.index = ids[0], Var(num_ids(ids[0]))
        mine = [f for f in factors(term) if used_ids(f, rows)]
        self.weight = mul(*[f for f in factors(term) if f not in mine])
        self.experts = replace(mul(*mine), {self.ids: self.index})

    def experts_key(self) -> object:
        return alpha(self.experts, [self.index])


__all__ = ["side_by_side"]
