"""What is known where facts hold: of running counts, of the ranges of numbers made of them, of a buffer's row, expert * C + position."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from .algebra import add, eq, mul, negate, subst
from .expr import Expr, Rank, Var, factors, is_const, loads, raw, terms
from .index import bounds, digits, inside, is_bool, is_int, mix, pairs
from .sizes import Size, at_most, prod

Facts = frozenset[Expr]


# ---------------------------------------------------------------- running counts
def counts(e: Expr, facts: Facts) -> bool:
    """Is e a running count at a place where its mask holds?"""
    return e.op == "load" and e.args[0].rank is not None and all(_holds(f, facts) for f in factors(mask_at(e)))


def mask_at(count: Expr) -> Expr:
    rank: Rank = count.args[0].rank
    return subst(rank.mask, indices(rank.dims, count.args[1:]))


def indices(dims: tuple[tuple[Var, ...], ...], at: tuple[Expr, ...]) -> dict[Var, Expr]:
    """The variables of dimensions, where these are indexed so."""
    found: dict[Var, Expr] = {}
    for dim, i in zip(dims, at):
        if dim:
            found.update(zip(dim, digits(i, [v.size for v in dim])))
    return found


def _holds(f: Expr, facts: Facts) -> bool:
    """A test, or sum_k of a test with one k at most, that one of the facts is an instance of."""
    if is_const(f, 1) or f in facts:
        return True
    if f.op != "sum":
        return False
    v, body = f.args
    places = {x.args[-1] for fact in facts for x in loads(fact) if x.args[0].range is not None and len(x.args) > 1}
    return any(inside(k, v.size) and all(g in facts for g in factors(subst(body, {v: k}))) for k in places)


def clamps_nothing(e: Expr, low: Any, high: Any, facts: Facts) -> bool:
    """Is an integer known to lie within the limits?"""
    if not is_int(e) or not all(limit is None or isinstance(limit, int) for limit in (low, high)):
        return False
    return (low is None or least(e, facts) >= low) and (
        high is None or any(below(f, e, high + 1) for f in facts) or within(e, high + 1, facts)
    )


def least(e: Expr, facts: Facts) -> float:
    """A lower bound of a sum, or of one of two."""
    if e.op == "where":
        c, a, b = e.args
        return min(least(a, facts.union(factors(c))), least(b, facts | {negate(c)}))
    total = 0.0
    for t in terms(e):
        known = (0, None) if t.op == "load" and t.args[0].total is not None else bounds(t)
        total += 1 if counts(t, facts) else known[0] if known is not None else float("-inf")
    return total


def below(f: Expr, e: Expr, n: Size) -> bool:
    """Does a comparison say that e < n?"""
    for op, small, large in orderings(f):
        offset, end = constant(e, small), end_of(op, large)
        if offset is not None and end is not None and at_most(end + offset, n):
            return True
    return False


def end_of(op: str, limit: Expr) -> Size:
    """The first whole number that is not lt (le) the limit; None where that is no number or extent."""
    if limit.op == "size":
        return limit.args[0] + int(op == "le")
    if not is_const(limit) or not math.isfinite(limit.args[0]):
        return None
    return math.ceil(limit.args[0]) if op == "lt" else math.floor(limit.args[0]) + 1


def orderings(f: Expr) -> list[tuple[str, Expr, Expr]]:
    """A comparison as `small lt|le large`."""
    opposite = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
    if f.op == "not" and f.args[0].op in opposite:
        f = raw(opposite[f.args[0].op], *f.args[0].args)
    if f.op in ("lt", "le"):
        return [(f.op, *f.args)]
    return [({"gt": "lt", "ge": "le"}[f.op], *f.args[::-1])] if f.op in ("gt", "ge") else []


def constant(e: Expr, other: Expr) -> int | None:
    """e - other, where they differ in a constant only."""
    mine, theirs = (Counter(t for t in terms(x) if not is_const(t)) for x in (e, other))
    numbers = [sum(t.args[0] for t in terms(x) if is_const(t)) for x in (e, other)]
    return numbers[0] - numbers[1] if mine == theirs and all(float(c).is_integer() for c in numbers) else None


# ---------------------------------------------------------------- ranges
def within(e: Expr, n: Size, facts: Facts) -> bool:
    """Is 0 <= e < n where the facts hold?"""
    if inside(e, n):
        return True
    if e.op == "where":
        c, a, b = e.args
        return within(a, n, facts.union(factors(c))) and within(b, n, facts | {negate(c)})
    if e.op == "mul" and (tests := [f for f in e.args if is_bool(f)]):
        return at_most(1, n) and within(mul(*[f for f in e.args if f not in tests]), n, facts.union(tests))
    if e.op == "mix":
        return at_most(prod(e.args[1::2]), n) and all(within(d, size, facts) for d, size in pairs(e.args))
    if e.op == "clamp":
        return _within_limits(e, n, facts)
    if least(e, facts) >= 0 and (((b := bounds(e)) is not None and at_most(b[1], n)) or any(below(f, e, n) for f in facts)):
        return True
    return any((b := bounds(hi)) is not None and b[0] >= 0 and at_most(prod((c, b[1])), n) for c, hi, _ in _halves(e, facts))


def _within_limits(e: Expr, n: Size, facts: Facts) -> bool:
    """min(max(x, low), high), of whole numbers"""
    x, low, high = e.args
    if not is_int(e):
        return False
    from_zero = (low is not None and low >= 0) or least(x, facts) >= 0
    limited = high is not None and at_most(0, limit_of(high)) and at_most(limit_of(high) + 1, n)
    return from_zero and (limited or (low is None and within(x, n, facts)))


def limit_of(limit: Any) -> Size:
    """A clamp's limit, a number or an extent."""
    return limit.args[0] if isinstance(limit, Expr) else limit


# ---------------------------------------------------------------- rows of buffers
def split(e: Expr, n: Size, facts: Facts) -> tuple[Expr, Expr] | None:
    """(e div n, e mod n), where the facts say enough of the parts of e."""
    if e.op == "mix" and (i := next((i for i in range(2, len(e.args), 2) if prod(e.args[i + 1 :: 2]) == n), None)) is not None:
        fits = all(within(d, size, facts) for d, size in pairs(e.args[i:]))
        return (mix(*e.args[:i]), mix(*e.args[i:])) if fits else None
    return next(((hi, lo) for c, hi, lo in _halves(e, facts) if c == n), None)


def _halves(e: Expr, facts: Facts) -> Iterator[tuple[Size, Expr, Expr]]:
    """All (c, hi, lo) with e = hi * c + lo, a term of the sum and the others, and 0 <= lo < c."""
    for t in terms(e) if e.op == "add" and is_int(e) else ():
        for c, hi in _multiples(t):
            lo = add(*[x for x in terms(e) if x is not t])
            if within(lo, c, facts):
                yield c, hi, lo


def _multiples(t: Expr) -> list[tuple[Size, Expr]]:
    """All (c, x) with t = c * x."""
    fs = factors(t)
    found: list[tuple[Size, Expr]] = [(1, t)]
    for f in fs if len(fs) > 1 else ():
        n = f.args[0] if f.op == "size" or (is_const(f) and isinstance(f.args[0], int) and f.args[0] > 0) else None
        if n is not None:
            found.append((n, mul(*[g for g in fs if g is not f])))
    return found


def same_row(a: Expr, b: Expr, facts: Facts) -> Expr | None:
    """[a = b] as one equation between the experts and one between the positions in their buffers."""
    for n in _radices(a, b):
        mine, theirs = split(a, n, facts), split(b, n, facts)
        if mine is not None and theirs is not None:
            return mul(*[eq(x, y) for x, y in zip(mine, theirs)])
    return None


def _radices(a: Expr, b: Expr) -> list[Size]:
    sizes: list[Size] = []
    for e in (a, b):
        sizes += [prod(e.args[i + 1 :: 2]) for i in range(2, len(e.args), 2)] if e.op == "mix" else []
        sizes += [c for t in terms(e) for c, _ in _multiples(t)] if e.op == "add" else []
    return list(dict.fromkeys(sizes))


def digit(e: Expr, facts: Facts) -> Expr:
    """e, or which of its two halves e = x div n or e = x mod n is."""
    if e.op not in ("idiv", "mod") or (halves := split(e.args[0], e.args[1], facts)) is None:
        return e
    return halves[e.op == "mod"]


def decided(e: Expr, facts: Facts) -> bool | None:
    """Is a comparison with a limit known to hold, or not to?"""
    for test, outcome in ((e, True), (negate(e), False)):
        for op, small, large in orderings(test):
            if is_int(small) and (end := end_of(op, large)) is not None and within(small, end, facts):
                return outcome
    return None


__all__ = ["Facts", "below", "clamps_nothing", "constant", "counts", "decided", "digit", "end_of", "indices", "least", "mask_at",
           "orderings", "same_row", "split", "within"]  # fmt: skip
