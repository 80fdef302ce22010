"""Capacity: buffers of C rows an expert, filled by the positions of tokens among those of their expert.

Such code counts a mask M along the tokens (`cumsum`), drops the slots whose position is not below C, moves rows into [E, C] buffers, and
takes them out again.  A running count stays a tensor that the model computes; of it is known (`Rank`), where M holds at two places of one
column: equal counts mean the same place; and a count is at least 1.  So a buffer's row is one slot's token, and what a slot takes out of
the buffers is the expert's function of its own token, with the drop as a factor of its weight.

All is done under assumptions: in a product, each factor counts only where the others are not zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .algebra import add, compare, eq, mul, negate, rebuild, refresh, replace, subst, sum_
from .expr import BINDERS, ONE, ZERO, Expr, Var, alpha, const, factors, is_const, loads, raw, terms
from .index import digits, inside, is_bool, is_int, mix, pairs
from .positions import Facts, below, clamps_nothing, counts, decided, digit, end_of, indices, least, mask_at, orderings, same_row, within
from .sizes import prod


def collapse(e: Expr) -> Expr:
    """e, with the sums over experts' buffers solved."""
    if not counted(e):
        return e
    try:
        return _under(e, frozenset())
    finally:
        _done.clear()


_done: dict[tuple[Expr, Facts], Expr] = {}  # within one `collapse`: terms are shared, so each comes up many times


def counted(e: Expr) -> bool:
    """Does e read a running count?"""
    return any(x.args[0].rank is not None for x in loads(e))


def _under(e: Expr, known: Facts) -> Expr:
    """e where `known` holds."""
    if e.op in ("var", "const"):
        return e
    if (e, known) not in _done:
        _done[e, known] = _simplified(e, known)
    return _done[e, known]


def _simplified(e: Expr, known: Facts) -> Expr:
    if is_bool(e):
        if _among(e, known):
            return ONE
        if _among(negate(e), known) or (e.op == "eq" and counted(e) and _apart(e.args[0], e.args[1], known)):
            return ZERO
        if e.op == "not" and e.args[0].op == "eq" and is_const(e.args[0].args[1], 0) and e.args[0].args[0].op == "add":
            return compare("ne", _under(e.args[0].args[0], known), ZERO)  # of several terms, all but one may be zero here
        if (found := _buffers_test(e, known)) is not None:
            return found
    if e.op == "mul":
        return _product(list(e.args), known)
    if e.op == "sum":
        return _nest(e, known)
    if e.op in BINDERS and isinstance(e.args[0], Var):
        known = _without(known, [e.args[0]])
    if e.op == "clamp" and clamps_nothing(inner := _under(e.args[0], known), e.args[1], e.args[2], known):
        return inner
    return digit(_parts(e, known), known)


def _parts(e: Expr, known: Facts) -> Expr:
    if e.op == "where":  # each branch where it is taken
        c, a, b = e.args
        c, then, other = _under(c, known), known.union(factors(c)), known | {negate(c)}
        return rebuild("where", [c, _under(a, then), _under(b, other)])
    return rebuild(e.op, [_under(a, known) if isinstance(a, Expr) else a for a in e.args])


def _buffers_test(e: Expr, known: Facts) -> Expr | None:
    """A test of a buffer's row, expert * C + position: one of both, or one that always holds or never."""
    parts = _parts(e, known) if e.op in ("eq", "lt", "le", "gt", "ge") and counted(e) else e
    if parts.op == "eq" and (both := same_row(parts.args[0], parts.args[1], known)) is not None:
        return _under(both, known)
    if parts.op in ("lt", "le", "gt", "ge") and (holds := decided(parts, known)) is not None:
        return ONE if holds else ZERO
    return None


def _among(e: Expr, known: Facts) -> bool:
    """Is e one of the facts, but for the names of bound variables?"""
    return e in known or any(f.op == e.op and f.free == e.free and alpha(f) == alpha(e) for f in known)


def _without(known: Facts, vs: Iterable[Var]) -> Facts:
    hidden = frozenset(vs)
    return frozenset(f for f in known if not f.free & hidden)


def _product(fs: list[Expr], known: Facts) -> Expr:
    """Each factor under the others, one after the other (two factors must not vouch for each other)."""
    for i, f in enumerate(fs):
        others = [*fs[:i], *fs[i + 1 :]]
        if is_bool(f):
            fs[i] = _under(f, known.union(*(factors(o) for o in others if is_bool(o))))
        else:
            fs[i] = _under(f, known.union(*(_nonzero(o) for o in others)))
    return mul(*fs)


def _nonzero(f: Expr) -> list[Expr]:
    """What holds where f is not zero."""
    return factors(f) if is_bool(f) else [negate(eq(g, ZERO)) for g in (f, *(factors(f) if f.op == "mul" else ())) if not is_const(g)]


# ---------------------------------------------------------------- sums
def _nest(e: Expr, known: Facts) -> Expr:
    """Nested sums: all variables that an equation determines are solved for."""
    vs: list[Var] = []
    body = e
    while True:
        body = _spread(_under(_peeled(body, vs), known), vs)
        if body.op == "sum":
            continue
        if body.op == "add":
            return add(*[_under(_sums(vs, t), known) for t in body.args])
        if (solved := _solved(body, vs, known)) is None:
            return _sums(vs, body)
        body = solved


def _peeled(body: Expr, vs: list[Var]) -> Expr:
    """The body of nested sums as one product; their variables are added to vs."""
    while True:
        while body.op == "sum":
            v, body = refresh(body)
            vs.append(v)
        if (flat := _one_product(body)) is body:
            return body
        body = flat


def _one_product(body: Expr) -> Expr:
    """a * sum_k [.. = k] b  ->  sum_k [.. = k] a b; a sum without an equation, that of a linear layer, stays where it is."""
    inner = next((f for f in factors(body) if f.op == "sum" and _has_equation(f)), None)
    if inner is None or inner is body:
        return body
    v, b = refresh(inner)
    return raw("sum", v, mul(*[f for f in factors(body) if f is not inner], b))


def _spread(body: Expr, vs: list[Var]) -> Expr:
    """(a + b) f  ->  a f + b f, where both terms are tested: two choices that share the buffers."""
    both = next((f for f in factors(body) if f.op == "add" and all(_tested(t, vs) for t in f.args)), None)
    if both is None or both is body:
        return body
    others = [f for f in factors(body) if f is not both]
    return add(*[mul(t, *others) for t in both.args])


def _tested(t: Expr, vs: list[Var]) -> bool:
    return any(f.op == "eq" and f.free & set(vs) for f in factors(t))


def _has_equation(e: Expr) -> bool:
    v, body = e.args
    while body.op == "sum":
        body = body.args[1]
    return any(f.op == "eq" and v in f.free for f in factors(body))


def _sums(vs: list[Var], body: Expr) -> Expr:
    for v in reversed(vs):
        body = sum_(v, body)
    return body


def _solved(body: Expr, vs: list[Var], known: Facts) -> Expr | None:
    """The body with one variable of the sums less, or one equation between counts turned into one between places."""
    fs = factors(body)
    for f in fs:
        others = [g for g in fs if g is not f]
        facts = known.union(*(factors(g) for g in others if is_bool(g)))
        for a, b in _sides(f) if f.op == "eq" else ():
            if (slot := _same_slot(a, b, vs, facts)) is not None:
                vs.remove(a.args[-1])
                return subst(mul(*others), {a.args[-1]: slot})
            if a in vs and a not in b.free and (within(b, a.size, facts) or within(_under(b, facts), a.size, facts)):
                vs.remove(a)
                return subst(mul(*others), {a: b})
            if a.free & set(vs) and not b.free & set(vs) and (places := _same_place(a, b, facts, set(vs))) is not None:
                return mul(*places, *others)
    return None


def _sides(f: Expr) -> list[tuple[Expr, Expr]]:
    """Both ways to read an equation, and x - 1 = v for x = v + 1."""
    sides = [(f.args[0], f.args[1]), (f.args[1], f.args[0])]
    for a, b in sides[:]:
        variables = [t for t in terms(a) if isinstance(t, Var)]
        others = [t for t in terms(a) if not isinstance(t, Var)]
        if len(variables) == 1 and others and all(is_const(t) and is_int(t) for t in others):
            sides.append((variables[0], add(b, *[const(-t.args[0]) for t in others])))
    return sides


def _same_slot(a: Expr, b: Expr, vs: list[Var], facts: Facts) -> Expr | None:
    """k0 where a fact says that [id_k0 = b], and a is id_k of the same token: the ids of one token are distinct, so k is k0."""
    if a.op != "load" or not a.args[0].distinct or a.args[-1] not in vs or a.args[-1] in b.free:
        return None
    equations = [pair for f in facts if f.op == "eq" for pair in (f.args, f.args[::-1])]
    known = (x.args[-1] for x, y in equations if y is b and x.op == "load" and x.args[:-1] == a.args[:-1] and x is not a)
    return next((k for k in known if inside(k, a.args[-1].size) and not k.free & set(vs)), None)


def _same_place(a: Expr, b: Expr, facts: Facts, vs: set[Var]) -> list[Expr] | None:
    """Equations between the places of two running counts that are equal, where the rank lemma applies."""
    sides = [pair for f in facts if f.op == "eq" for pair in (f.args, f.args[::-1])]
    table: dict[Expr, Expr] = {u: w for u, w in sides if _given(u, w, vs)}
    facts = facts.union(*(factors(replace(f, _except(table, f))) for f in facts)) if table else facts
    a, b = _under(replace(a, table) if table else a, facts), _under(b, facts)
    left, right = Counter(terms(a)), Counter(terms(b))
    ours, theirs = list((left - right).elements()), list((right - left).elements())
    if len(ours) != 1 or len(theirs) != 1 or not (counts(ours[0], facts) and counts(theirs[0], facts)):
        return None
    x, y = ours[0], theirs[0]
    along = x.args[0].rank.along + 1
    if x.args[0] is not y.args[0] or any(p is not q for i, (p, q) in enumerate(zip(x.args, y.args)) if i not in (0, along)):
        return None
    return _equations(x.args[along], y.args[along])


def _given(u: Expr, w: Expr, vs: set[Var]) -> bool:
    """An element that an equation determines: what it is stands outside of the sums."""
    return u.op == "load" and bool(u.free & vs) and not w.free & vs


def _except(table: dict[Expr, Expr], f: Expr) -> dict[Expr, Expr]:
    """An equation is not used on itself."""
    return {u: w for u, w in table.items() if f.op != "eq" or u not in f.args}


def _equations(a: Expr, b: Expr) -> list[Expr]:
    if a.op == "mix" and inside(b, prod(a.args[1::2])) and all(inside(d, n) for d, n in pairs(a.args)):
        return [eq(x, y) for x, y in zip(a.args[::2], digits(b, a.args[1::2]))]
    return [eq(a, b)]


# ---------------------------------------------------------------- two choices, one behind the other
def _apart(a: Expr, b: Expr, facts: Facts) -> bool:
    """Are two positions known to differ?  No running count of first choices reaches one that stands behind all of them."""
    table = _same_ids(facts)
    facts = facts.union(raw("eq", *f.args[::-1]) for f in facts if f.op == "eq")
    facts = facts.union(*(factors(replace(f, _except(table, f))) for f in facts)) if table else facts
    a, b = (_under(replace(x, table) if table else x, facts) for x in (a, b))
    return _behind(a, b, facts) or _behind(b, a, facts)


def _same_ids(facts: Facts) -> dict[Expr, Expr]:
    """For ids that equations say are the same: one to stand for all of them, an index or one of the ids."""
    group: dict[Expr, Expr] = {}
    for f in facts:
        if f.op == "eq" and any(_is_choice(x) for x in f.args) and all(isinstance(x, Var) or _is_choice(x) for x in f.args):
            x, y = (group.get(x, x) for x in f.args)
            kept, gone = (x, y) if isinstance(x, Var) or not isinstance(y, Var) else (y, x)
            group = {**{u: kept if w is gone else w for u, w in group.items()}, gone: kept}
    return {u: w for u, w in group.items() if u is not w and _is_choice(u)}


def _is_choice(e: Expr) -> bool:
    return e.op == "load" and e.args[0].range is not None


def _behind(a: Expr, b: Expr, facts: Facts) -> bool:
    """a < b, as a is a running count, and b has the count of at least as many places in it."""
    left, right = (Counter(t for t in terms(x) if not is_const(t)) for x in (a, b))
    mine, theirs = list((left - right).elements()), list((right - left).elements())
    if len(mine) != 1 or mine[0].op != "load" or mine[0].args[0].rank is None:
        return False
    found = next((y for y in theirs if y.op == "load" and y.args[0].total is not None and _reaches(y, mine[0], facts)), None)
    if found is None:
        return False
    theirs.remove(found)
    numbers = [sum(t.args[0] for t in terms(x) if is_const(t)) for x in (a, b)]
    return least(add(*theirs), facts) + numbers[1] - numbers[0] > 0


def _reaches(total: Expr, count: Expr, facts: Facts) -> bool:
    """Does the total count every place that the running count has counted so far?

    Each test of the total must be one of the running count's own, or a limit to that count: if it holds here, it held before.
    """
    what, rank, along = total.args[0].total, count.args[0].rank, count.args[0].rank.along + 1
    if [v.size for v in what.over] != [v.size for v in rank.dims[rank.along]]:
        return False
    before = [v.fresh() for v in what.over]
    place = mix(*[x for v in before for x in (v, v.size)])
    earlier = raw("load", *count.args[:along], place, *count.args[along + 1 :])
    at = {**indices(what.dims, total.args[1:]), **dict(zip(what.over, before))}
    left = _under(subst(what.mask, at), frozenset(factors(mask_at(earlier))))
    here = dict(zip(before, digits(count.args[along], [v.size for v in before])))
    return all(_limits(f, earlier, set(before)) and _is_below(subst(f, here), facts) for f in factors(left) if not is_const(f, 1))


def _limits(test: Expr, count: Expr, places: set[Var]) -> bool:
    """count + more < limit, the limit and what is added the same for all places."""
    for _, small, large in orderings(test):
        others = [t for t in terms(small) if t is not count]
        if len(others) == len(terms(small)) - 1 and not any(e.free & places for e in (large, *others)):
            return True
    return False


def _is_below(test: Expr, facts: Facts) -> bool:
    """Does a fact say so, or that it is even less?"""
    if test in facts or is_const(test, 1):
        return True
    for op, small, large in orderings(test):
        end = end_of(op, large) if is_int(small) else None
        if end is not None and any(below(f, small, end) for f in facts):
            return True
    return False


__all__ = ["collapse", "counted"]
