"""What tokens get that no expert has room for: where(kept, f_id, x) is a term for the experts and one beside them."""

from __future__ import annotations

from collections.abc import Sequence

from .algebra import mul, negate, unary, where
from .expr import Expr, Var, factors
from .normal import used_ids


def apart(e: Expr, rows: Sequence[Var]) -> tuple[Expr, list[Expr]]:
    """w where(c, f_id, x)  ->  w c f_id, and [w (not c) x]"""
    for f in factors(e):
        if (choice := _choice(f)) is None:
            continue
        c, a, b = choice
        if used_ids(c, rows) or bool(used_ids(a, rows)) == bool(used_ids(b, rows)):
            continue
        if used_ids(b, rows):
            c, a, b = negate(c), b, a
        others = [g for g in factors(e) if g is not f]
        found, more = apart(mul(*others, c, a), rows)
        return found, [mul(*others, negate(c), b), *more]
    return e, []


def _choice(f: Expr) -> tuple[Expr, Expr, Expr] | None:
    """where(c, a, b), also if the whole of it is cast."""
    if f.op in ("cast", "stop") and (inner := _choice(f.args[0])) is not None:
        c, a, b = inner
        f = where(c, unary(f.op, a, *f.args[1:]), unary(f.op, b, *f.args[1:]))
    return f.args if f.op == "where" else None


__all__ = ["apart"]
