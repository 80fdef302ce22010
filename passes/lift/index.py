"""Index expressions: mixed-radix digits, permutations of a sort, and their ranges.  Each constructor is a lemma or two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .expr import ONE, ZERO, Expr, Order, Refused, Var, const, is_const, raw
from .sizes import Size, at_most, prod, quotient

BOOL = {"eq", "ne", "lt", "le", "gt", "ge", "not"}
INDEX = {"var", "idiv", "mod", "mix", "perm", "inv", "coord", "count", "below", "seg", "rows", "size", "moved", "nth"}


def is_bool(e: Expr) -> bool:
    return e.op in BOOL or (e.op == "const" and e.args[0] in (0, 1)) or (e.op == "mul" and all(map(is_bool, e.args)))


def is_int(e: Expr) -> bool:
    if e.op == "const":
        return isinstance(e.args[0], int) or float(e.args[0]).is_integer()
    if e.op == "load":
        return e.args[0].integer
    if e.op == "clamp":
        low, high = e.args[1:]
        limits = (low is None or isinstance(low, int)) and (high is None or isinstance(high, int | Expr))
        return limits and is_int(e.args[0])
    if e.op in ("add", "mul", "sum", "floor", "where", "sel"):
        return all(is_int(a) for a in e.args[(e.op in ("sum", "sel")) :])
    return e.op in BOOL or e.op in INDEX


def bounds(e: Expr) -> tuple[int, Size] | None:
    """Half-open integer range of an index expression, or None."""
    if e.op == "const":
        return (e.args[0], e.args[0] + 1) if isinstance(e.args[0], int) else None
    if isinstance(e, Var):
        return (0, e.size) if e.size is not None else None
    if e.op == "load":
        return e.args[0].range or e.args[0].limits
    if e.op == "mix":
        return (0, prod(e.args[1::2])) if all(inside(d, n) for d, n in pairs(e.args)) else None
    if e.op in ("perm", "inv"):
        return (0, prod(e.args[0].sizes))
    if e.op == "mod":
        return (0, e.args[1])
    if e.op == "idiv":
        return _idiv_bounds(e)
    if e.op == "coord":
        return (0, prod(v.size for v in e.args[0].domain.dims[e.args[1]]))
    if e.op == "seg":
        return (0, prod(e.args[0].domain.order.sizes))
    if e.op == "sel":
        return _hull([bounds(a) for a in e.args[1:]])
    if e.op == "where":
        return _hull([bounds(e.args[1]), _bounds_where(e.args[2], [raw("not", e.args[0])])])
    if e.op == "add":
        return _sum_bounds([bounds(a) for a in e.args])
    if is_bool(e):
        return (0, 2)
    if e.op == "mul":
        return (len(e.args) == 2 and _scaled_bounds(e)) or _masked_bounds(e)
    return None


def in_range(ids: Expr, num_experts: int) -> bool:
    """Is every id known to be an expert's?"""
    known = bounds(ids)
    return known is not None and known[0] >= 0 and isinstance(known[1], int) and known[1] <= num_experts


def _scaled_bounds(e: Expr) -> tuple[int, Size] | None:
    """A number times a bounded index."""
    for c, x in (e.args, e.args[::-1]):
        b = bounds(x)
        if is_const(c) and isinstance(c.args[0], int) and b is not None and isinstance(b[1], int):
            ends = (c.args[0] * b[0], c.args[0] * (b[1] - 1))
            return (min(ends), max(ends) + 1)
    return None


def _idiv_bounds(e: Expr) -> tuple[int, Size] | None:
    b, n = bounds(e.args[0]), e.args[1]
    if b is None:
        return None
    if isinstance(b[1], int) and isinstance(n, int):
        return (b[0] // n, (b[1] - 1) // n + 1)
    q = quotient(b[1], n)
    return (0, q) if q is not None and b[0] == 0 else None


def _bounds_where(e: Expr, conds: Sequence[Expr]) -> tuple[int, Size] | None:
    """Bounds of e where the conditions hold: [e != last] and [e < n] cut a range short."""
    b = bounds(e)
    for c in conds:
        op, x = ("not " + c.args[0].op, c.args[0]) if c.op == "not" else (c.op, c)
        n = x.args[1].args[0] if len(x.args) == 2 and x.args[0] is e and is_const(x.args[1]) else None
        if b is None or not isinstance(b[1], int) or not isinstance(n, int):
            continue
        if op in ("lt", "not ge") or (op in ("not eq", "ne") and n == b[1] - 1):
            b = (b[0], min(b[1], n))
        elif op in ("le", "not gt"):
            b = (b[0], min(b[1], n + 1))
    return b


def _masked_bounds(e: Expr) -> tuple[int, Size] | None:
    """A product of conditions and one bounded number: that, or 0."""
    rest = [f for f in e.args if not is_bool(f)]
    found = _bounds_where(rest[0], [f for f in e.args if is_bool(f)]) if len(rest) == 1 else None
    return _hull([(0, 1), found])


def _hull(bs: list) -> tuple[int, Size] | None:
    if None in bs or not all(isinstance(b[1], int) for b in bs):
        return None
    return (min(b[0] for b in bs), max(b[1] for b in bs))


def _sum_bounds(bs: list) -> tuple[int, Size] | None:
    if None in bs or not all(isinstance(b[1], int) for b in bs):
        return None
    return (sum(b[0] for b in bs), sum(b[1] - 1 for b in bs) + 1)


def inside(e: Expr, n: Size) -> bool:
    """Is 0 <= e < n proved?"""
    b = bounds(e)
    return b is not None and b[0] >= 0 and at_most(b[1], n)


def pairs(args: Sequence) -> list[tuple]:
    return list(zip(args[::2], args[1::2]))


def mix(*args: Any) -> Expr:
    """Mixed radix number: digit, size, digit, size, ..."""
    out: list[tuple] = []
    for d, n in pairs(args):
        if n == 1:
            continue
        if d.op == "mix" and prod(d.args[1::2]) == n:
            out += pairs(d.args)
            continue
        if out and d.op == "mod" and out[-1][0].op == "idiv" and out[-1][0].args == d.args and d.args[1] == n:
            whole = prod((n, out[-1][1]))
            if inside(d.args[0], whole):  # (e div n, e mod n) is e again
                out[-1] = (d.args[0], whole)
                continue
        out.append((d, n))
    if not out:
        return ZERO
    if len(out) == 1:
        return out[0][0]
    if all(is_const(d) for d, _ in out) and all(isinstance(n, int) for _, n in out):
        t = 0
        for d, n in out:
            t = t * n + d.args[0]
        return const(t)
    return raw("mix", *[x for p in out for x in p])


def _tail(a: Expr, n: Size) -> int | None:
    """Position from which the digits of mix `a` make up exactly n."""
    return next((i for i in range(2, len(a.args), 2) if prod(a.args[i + 1 :: 2]) == n), None)


def idiv(a: Expr, n: Size) -> Expr:
    if n == 1:
        return a
    if is_const(a) and isinstance(n, int):
        return const(int(a.args[0]) // n)
    if a.op == "mix" and (i := _tail(a, n)) is not None and _digits_fit(a, i):
        return mix(*a.args[:i])
    if inside(a, n):
        return ZERO
    return raw("idiv", a, n)


def mod(a: Expr, n: Size) -> Expr:
    if n == 1:
        return ZERO
    if is_const(a) and isinstance(n, int):
        return const(int(a.args[0]) % n)
    if a.op == "mix" and (i := _tail(a, n)) is not None and _digits_fit(a, i):
        return mix(*a.args[i:])
    if inside(a, n):
        return a
    return raw("mod", a, n)


def _digits_fit(a: Expr, i: int) -> bool:
    """Splitting a mixed-radix number before digit i needs the digits behind to be within their radix."""
    return all(inside(d, n) for d, n in pairs(a.args[i:]))


def digits(e: Expr, sizes: Sequence[Size]) -> list[Expr]:
    """Digits of index e in the mixed radix `sizes`."""
    if len(sizes) == 1:
        return [e]
    out = []
    for j, s in enumerate(sizes):
        n = prod(sizes[j + 1 :])
        if n is None or s is None:
            raise Refused("a data-dependent dimension merged with another is indexed")
        out.append(mod(idiv(e, n), s))
    return out


def perm(order: Order, r: Expr) -> Expr:
    """Row of the unsorted key that stands at sorted position r."""
    if r.op == "inv" and r.args[0] is order:
        return r.args[1]
    return raw("perm", order, r)


def inv(order: Order, s: Expr) -> Expr:
    """Sorted position of unsorted row s."""
    if s.op == "perm" and s.args[0] is order:
        return s.args[1]
    return raw("inv", order, s)


def sel(i: Expr, *parts: Expr) -> Expr:
    """parts[i]"""
    if is_const(i):
        return parts[i.args[0]]
    return parts[0] if all(p is parts[0] for p in parts) else raw("sel", i, *parts)


def count(order: Order, v: Expr) -> Expr:
    """Number of keys equal to v."""
    return raw("count", order, v)


def below(order: Order, v: Expr) -> Expr:
    """Number of keys < v."""
    least = bounds(order.expr)
    return ZERO if is_const(v) and least is not None and v.args[0] <= least[0] else raw("below", order, v)


__all__ = [
    "BOOL", "ONE", "below", "bounds", "count", "digits", "idiv", "inside", "inv", "is_bool", "is_int", "mix", "mod", "pairs", "perm", "sel",
]  # fmt: skip
