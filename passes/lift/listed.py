"""Before buffers are solved: slots that were computed one by one and stacked are terms, experts that were are one expression."""

from __future__ import annotations

from collections.abc import Callable

from .algebra import add, rebuild, subst
from .expr import Expr, Var, const, loads, subexprs
from .merge import select
from .ranks import counted

_FEW = 4  # slots


def unlisted(e: Expr) -> Expr:
    """sum_k sel(k, a, b) c  ->  a c + b c, where positions are counted in a and b; sel(e, f_0, f_1)  ->  f_e of experts' buffers."""
    return _terms_of_slots(_experts(e)) if counted(e) else e


def _terms_of_slots(e: Expr) -> Expr:
    if not counted(e):
        return e
    if e.op == "sum" and isinstance(e.args[0].size, int) and e.args[0].size <= _FEW and _stacked(*e.args):
        v, body = e.args
        return _terms_of_slots(add(*[subst(body, {v: const(i)}) for i in range(v.size)]))
    return _over_parts(e, _terms_of_slots)


def _stacked(v: Var, body: Expr) -> bool:
    return any(f.op == "sel" and f.args[0] is v and counted(f) for f in subexprs(body))


def _experts(e: Expr) -> Expr:
    if not counted(e):
        return e
    if e.op != "sel" or not all(part.op == "sum" or any(f.op == "sum" for f in part.args) for part in e.args[1:]):
        return _over_parts(e, _experts)
    routing = {n for x in loads(e) for leaf in x.args[:1] if leaf.rank or leaf.total or leaf.range for n in leaf.nodes}
    merged = select(*e.args)
    return e if any(len(x.args[0].nodes) > 1 and routing & set(x.args[0].nodes) for x in loads(merged)) else merged


def _over_parts(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    parts = [f(a) if isinstance(a, Expr) else a for a in e.args]
    return rebuild(e.op, parts) if any(a is not b for a, b in zip(parts, e.args)) else e


__all__ = ["unlisted"]
