"""Smart constructors of element expressions: sums, products, comparisons, selections.  Each simplification is a lemma.

NaN and infinity: `where(c, a, 0)` is read as `[c] a`, so a masked-out row contributes exactly zero whatever garbage it holds; the stage
ops keep that promise (a slot of no expert gives a zero row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .expr import BINDERS, ONE, ZERO, Enum, Expr, Order, Refused, Segment, Var, alpha, const, factors, is_const, raw
from .index import below, bounds, digits, idiv, inside, inv, is_bool, is_int, mix, mod, perm, sel
from .sizes import at_most, prod, quotient

# Pointwise functions with f(0) = 0: they pass through Iverson brackets and through sums with at most one non-zero term.
ZERO_AT_ZERO = {
    "silu",
    "gelu",
    "relu",
    "tanh",
    "neg",
    "cast",
    "floor",
    "erf",
    "abs",
    "sqrt",
    "stop",
    "leaky_relu",
    "elu",
    "square",
}


def add(*args: Expr) -> Expr:
    flat = [x for a in args for x in (a.args if a.op == "add" else (a,)) if not is_const(x, 0)]
    if len(flat) < 2:
        return flat[0] if flat else ZERO
    if all(map(is_const, flat)):
        return const(sum(a.args[0] for a in flat))
    whole = [x for x in flat if is_const(x) and isinstance(x.args[0], int)]
    if len(whole) > 1:
        return add(*[x for x in flat if x not in whole], const(sum(x.args[0] for x in flat if x in whole)))
    return raw("add", *flat)


def sub(a: Expr, b: Expr) -> Expr:
    return ZERO if a is b else add(a, mul(const(-1), b))


def mul(*args: Expr) -> Expr:
    """Product; Iverson factors go first, once each; other factors move into a sparse sum (tests stay outside of it)."""
    flat = [x for a in args for x in (a.args if a.op == "mul" else (a,)) if not is_const(x, 1)]
    if any(is_const(x, 0) for x in flat):
        return ZERO
    rest = [x for x in flat if not is_bool(x)]
    conds = [x for x in dict.fromkeys(flat) if is_bool(x) and not _implied(x, rest)]
    sparse = [x for x in rest if x.op == "sum" and is_sparse(x)]
    if len(rest) > 1 and sparse and one_slot(sparse):
        v, body = refresh(sparse[0])
        same = [subst(x.args[1], {x.args[0]: v}) for x in sparse[1:]]
        return sum_(v, mul(*conds, *[x for x in rest if x not in sparse], body, *same))
    numbers = [x for x in rest if is_const(x)]
    if len(numbers) > 1:
        rest = [const(math.prod(x.args[0] for x in numbers)), *[x for x in rest if not is_const(x)]]
    flat = conds + [x for x in rest if not is_const(x, 1)]
    if len(flat) < 2:
        return flat[0] if flat else ONE
    return raw("mul", *flat)


def _implied(c: Expr, rest: list[Expr]) -> bool:
    """[g != 0] g h = g h; also where g is a sum with one term at most, and h has moved into it."""
    if c.op != "not" or c.args[0].op != "eq" or not is_const(c.args[0].args[1], 0):
        return False
    g = c.args[0].args[0]
    return set(factors(g)) <= set(rest) or (
        g.op == "sum" and is_sparse(g) and distinct_slots(g) and any(_contains_term(x, g) for x in rest)
    )


def _contains_term(x: Expr, g: Expr) -> bool:
    if x.op != "sum" or not is_sparse(x) or not distinct_slots(x) or x.args[0].size != g.args[0].size:
        return False
    return set(factors(subst(g.args[1], {g.args[0]: x.args[0]}))) <= set(factors(x.args[1]))


def divide(a: Expr, b: Expr) -> Expr:
    """a / b; like a product, a quotient of a masked or sparse numerator moves inside."""
    if is_const(a, 0):
        return ZERO
    if a.op == "mul" and (cs := [f for f in a.args if is_bool(f)]):
        return mul(*cs, divide(mul(*[f for f in a.args if not is_bool(f)]), b))
    if a.op == "sum" and is_sparse(a) and distinct_slots(a):
        v, body = refresh(a)
        return sum_(v, divide(body, b))
    return raw("div", a, b)


def one_slot(sparse: list[Expr]) -> bool:
    """Do these sparse sums all pick the same slot?  sum_k [id_k=e] a_k * sum_k [id_k=e] b_k = sum_k [id_k=e] a_k b_k."""
    if len(sparse) == 1:
        return True
    tests = {(s.args[0].size, alpha(slot_test(s), [s.args[0]])) for s in sparse}  # type: ignore[arg-type]
    return len(tests) == 1 and all(map(distinct_slots, sparse))


def slot_test(s: Expr) -> Expr | None:
    """The factor [id_k = e] of sum_k [id_k = e] g: the sum that scatters a slot's value to its expert's column."""
    v, body = s.args
    return next((f for f in factors(body) if f.op == "eq" and v in f.free and any(a.op == "load" for a in f.args)), None)


def is_sparse(s: Expr) -> bool:
    return slot_test(s) is not None


def distinct_slots(s: Expr) -> bool:
    """At most one k passes the test: the ids of one token are different (a fact of topk)."""
    v, f = s.args[0], slot_test(s)
    return f is not None and any(_picks_one(a, b, v) for a, b in (f.args, f.args[::-1]))


def _picks_one(a: Expr, b: Expr, v: Var) -> bool:
    return a.op == "load" and a.args[0].distinct and a.args[-1] is v and v not in b.free and not any(v in x.free for x in a.args[1:-1])


def refresh(s: Expr) -> tuple[Var, Expr]:
    """Open a sum under a fresh bound variable."""
    v, body = s.args
    n = v.fresh()
    return n, subst(body, {v: n})


def eq(a: Expr, b: Expr) -> Expr:
    if a is b and is_int(a):  # a float may be NaN
        return ONE
    if _slots_of_one_token(a, b):
        return eq(a.args[-1], b.args[-1])
    if a.op == b.op == "mix" and a.args[1::2] == b.args[1::2] and _fits(a) and _fits(b):  # digits of one number system
        return mul(*map(eq, a.args[::2], b.args[::2]))
    if (taken := _where_taken(a, b) or _where_taken(b, a)) is not None:
        return taken
    if is_const(a) or a.op == "size":
        a, b = b, a
    if b.op == "size" and (r := bounds(a)) and at_most(r[1], b.args[0]):
        return ZERO
    if is_const(b):
        if is_const(a):
            return const(int(a.args[0] == b.args[0]))
        r = bounds(a)
        if r and (b.args[0] < r[0] or (isinstance(r[1], int) and b.args[0] >= r[1])):
            return ZERO
        if zero_or_one(a) and b.args[0] in (0, 1):
            return a if b.args[0] else negate(a)
        if a.op == "mix" and isinstance(n := prod(a.args[3::2]), int) and b.args[0] >= 0 and _fits(a):
            c = b.args[0]
            return mul(eq(a.args[0], const(c // n)), eq(mix(*a.args[2:]), const(c % n)))
    return raw("eq", a, b)


def _where_taken(a: Expr, b: Expr) -> Expr | None:
    """[where(c, x, y) = b], where b is never x, or never y."""
    if a.op != "where":
        return None
    c, first, second = a.args[0], eq(a.args[1], b), eq(a.args[2], b)
    if is_const(second, 0):
        return mul(c, first)
    return mul(negate(c), second) if is_const(first, 0) else None


def _slots_of_one_token(a: Expr, b: Expr) -> bool:
    """Ids of one token: they are equal where the slots are."""
    return a.op == b.op == "load" and a.args[0].distinct and a.args[:-1] == b.args[:-1] and all(map(is_int, (a.args[-1], b.args[-1])))


def zero_or_one(a: Expr) -> bool:
    """A truth value, or sum_k [id_k = e] with distinct ids."""
    return is_bool(a) or (a.op == "sum" and distinct_slots(a) and is_bool(a.args[1]))


def _fits(a: Expr) -> bool:
    return all(inside(d, n) for d, n in zip(a.args[2::2], a.args[3::2]))


def compare(op: str, a: Expr, b: Expr) -> Expr:
    """lt, le, gt, ge, ne with range facts."""
    if op == "ne":
        return a if is_const(b, 0) and zero_or_one(a) else _nonzero(a) if is_const(b, 0) else negate(eq(a, b))
    if op == "gt" and is_const(b, 0) and zero_or_one(a):
        return a
    if (is_const(b) or b.op == "size") and (taken := _compared_cases(op, a, b)) is not None:
        return taken
    if a.op == b.op == "size" and op in ("lt", "ge") and at_most(b.args[0], a.args[0]):
        return const(int(op == "ge"))
    if is_const(b) and (r := bounds(a)) and isinstance(r[1], int):
        c, lo, hi = b.args[0], r[0], r[1] - 1
        if {"lt": hi < c, "le": hi <= c, "gt": lo > c, "ge": lo >= c}[op]:
            return ONE
        if {"lt": lo >= c, "le": lo > c, "gt": hi <= c, "ge": hi < c}[op]:
            return ZERO
    return _positive(a) if op == "gt" and is_const(b, 0) else raw(op, a, b)


def _compared_cases(op: str, a: Expr, b: Expr) -> Expr | None:
    """where(c, x, y) compared with a number that decides it for x or for y; [c] n - 1 is where(c, n - 1, -1)."""
    cases = a if a.op == "where" else _masked_number(a)
    if cases is None:
        return None
    c, first, second = cases.args[0], compare(op, cases.args[1], b), compare(op, cases.args[2], b)
    if is_const(second):
        return negate(mul(c, negate(first))) if second.args[0] else mul(c, first)
    if is_const(first):
        return negate(mul(negate(c), negate(second))) if first.args[0] else mul(negate(c), second)
    return None


def _masked_number(a: Expr) -> Expr | None:
    """[c] n + number, n no test itself, as where(c, n + number, number)."""
    parts = [t for t in (a.args if a.op == "add" else (a,)) if not is_const(t)]
    if len(parts) != 1 or parts[0].op != "mul" or is_bool(parts[0]) or not (cs := [f for f in parts[0].args if is_bool(f)]):
        return None
    rest = mul(*[f for f in parts[0].args if not is_bool(f)])
    numbers = [t for t in a.args if is_const(t)] if a.op == "add" else []
    return raw("where", mul(*cs), add(rest, *numbers), add(*numbers)) if is_int(rest) else None


def _nonzero(a: Expr) -> Expr:
    """[a != 0]: tests come out of a product, and of a sum with one term at most."""
    if a.op == "mul" and (cs := [f for f in a.args if is_bool(f)]):
        return mul(*cs, _nonzero(mul(*[f for f in a.args if not is_bool(f)])))
    if a.op == "sum" and distinct_slots(a):
        v, body = refresh(a)
        return sum_(v, _nonzero(body))
    return negate(eq(a, ZERO))


def _positive(a: Expr) -> Expr:
    """[a > 0], likewise."""
    if a.op == "mul" and (cs := [f for f in a.args if is_bool(f)]):
        return mul(*cs, _positive(mul(*[f for f in a.args if not is_bool(f)])))
    if a.op == "sum" and distinct_slots(a):
        v, body = refresh(a)
        return sum_(v, _positive(body))
    return raw("gt", a, ZERO)


def negate(a: Expr) -> Expr:
    if is_const(a):
        return const(int(not a.args[0]))
    if a.op == "eq" and is_const(a.args[1], 0) and a.args[0].op == "mul" and any(map(is_bool, a.args[0].args)):
        return _nonzero(a.args[0])
    return a.args[0] if a.op == "not" else raw("not", a)


def where(c: Expr, a: Expr, b: Expr) -> Expr:
    if is_const(c):
        return a if c.args[0] else b
    if a is b:
        return a
    if is_const(b, 0):
        return mul(c, a)
    if is_const(a, 0):
        return mul(negate(c), b)
    if is_bool(c) and b.op == "mul" and set(factors(c)) <= set(b.args):  # where(c, a, c b): where c does not hold, c b is zero
        return mul(c, a)
    if c.op == "not":
        return raw("where", c.args[0], b, a)
    return raw("where", c, a, b)


def unary(op: str, a: Expr, *extra: Any) -> Expr:
    """Pointwise f(a); f([c] x) = [c] f(x) when f(0) = 0."""
    if op in ZERO_AT_ZERO and a.op == "mul" and (cs := [f for f in a.args if is_bool(f)]):
        rest = mul(*[f for f in a.args if not is_bool(f)])
        return a if is_bool(rest) and op in ("cast", "stop") else mul(*cs, unary(op, rest, *extra))
    if op in ZERO_AT_ZERO and a.op == "sum" and distinct_slots(a):  # f(sum_k [id_k = e] x_k) = sum_k [id_k = e] f(x_k)
        v, body = refresh(a)
        return sum_(v, unary(op, body, *extra))
    if op == "cast" and is_const(a) and not is_bool(a):
        return const(torch.tensor(a.args[0], dtype=extra[0]).item())
    if op in ("cast", "stop") and (is_const(a) or is_bool(a)):
        return a
    if op in ZERO_AT_ZERO and is_const(a, 0):
        return ZERO
    if op == "stop" and (is_int(a) or a.op == "stop"):
        return a
    if op == "sigmoid" and is_const(a, float("-inf")):
        return ZERO
    if op == "floor" and is_int(a):
        return a
    if a.op == "scat":  # pointwise through a scatter: both the written and the untouched element
        v, cond, src, base = a.args
        return scat(v, cond, unary(op, src, *extra), unary(op, base, *extra))
    return raw(op, a, *extra)


def scat(v: Var | None, cond: Expr, src: Expr, base: Expr) -> Expr:
    """src(v) at the only v with cond(v), else base.  v None: no variable (one slot)."""
    if is_const(base, 0):
        return sum_(v, mul(cond, src)) if v is not None else mul(cond, src)
    return raw("scat", v, cond, src, base)


# ---------------------------------------------------------------- sums
def sum_(v: Var, body: Expr) -> Expr:
    """sum over v, with the eliminations that turn scatter/sort/enumerate code into plain sums."""
    if is_const(body, 0):
        return ZERO
    if v not in body.free:
        return mul(const(v.size), body) if isinstance(v.size, int) else raw("sum", v, body)
    if v.size == 1:
        return subst(body, {v: ZERO})
    if isinstance(v.domain, Enum):
        return _sum_enum(v, body)
    if isinstance(v.domain, Segment):
        return _sum_segment(v, body)
    if body.op == "where" and (each := cases(v, body)) is not None:
        return add(*each)
    if body.op == "sel" and body.args[0] is v and not _alike(body.args[1:]):
        return add(*[subst(x, {v: const(i)}) for i, x in enumerate(body.args[1:])])
    fs = factors(body)
    conds = [f for f in fs if is_bool(f)]
    for f in conds:
        if f.op == "eq" and v in f.free:
            done = _delta(v, f, mul(*[g for g in fs if g is not f]))
            if done is not None:
                return done
    outer = [f for f in conds if v not in f.free]
    if outer:
        return mul(*outer, sum_(v, mul(*[f for f in fs if f not in outer])))
    if body.op == "add" and all(any(is_bool(f) and v in f.free for f in factors(t)) for t in body.args):
        return add(*[sum_(v, t) for t in body.args])
    if body.op == "sum" and is_sparse(body) and (swapped := _sparse_outermost(v, body)) is not None:
        return swapped
    order = next((o for o in orders_of(body, v) if same_rows(o, v)), None)
    if order is not None and (other := _any_order(v, order, body)) is not None:
        return other
    return raw("sum", v, body)


def cases(v: Var, body: Expr) -> list[Expr] | None:
    """where([v=2], a, where([v=1], b, c)) for each v, where all but one have an arm of their own."""
    arms: dict[int, Expr] = {}
    while body.op == "where" and body.args[0].op == "eq" and body.args[0].args[0] is v and is_const(body.args[0].args[1]):
        arms.setdefault(body.args[0].args[1].args[0], body.args[1])
        body = body.args[2]
    if not isinstance(v.size, int) or len(left := set(range(v.size)) - arms.keys()) > 1:
        return None
    arms.update(dict.fromkeys(left, body))
    return [subst(arms[i], {v: const(i)}) for i in range(v.size)] if arms.keys() == set(range(v.size)) else None


def _alike(parts: tuple[Expr, ...]) -> bool:
    """Can they be one expression of their number?"""
    from .merge import Merger

    try:
        Merger(Var(len(parts))).merge(parts)
    except Refused:
        return False
    return True


def _any_order(v: Var, order: Order, body: Expr) -> Expr | None:
    """sum over sorted rows of g(unsorted row)  =  the sum over the unsorted rows."""
    new = [Var(n) for n in order.sizes]
    g = replace(body, {raw("perm", order, v): mix(*[x for d in new for x in (d, d.size)])})
    if v in g.free:
        return None
    for d in reversed(new):
        g = sum_(d, g)
    return g


def _sparse_outermost(v: Var, body: Expr) -> Expr | None:
    """sum_v sum_k [id_k = ..] g  ->  sum_k sum_v ..., where the test does not depend on v or can be solved for it."""
    k, g = refresh(body)
    tests = [f for f in factors(g) if f.op == "eq" and k in f.free]
    solvable = (v not in f.free or any(x is v and inside(y, v.size) for x, y in (f.args, f.args[::-1])) for f in tests)
    return sum_(k, sum_(v, g)) if all(solvable) else None


def _delta(v: Var, f: Expr, rest: Expr) -> Expr | None:
    """sum_v [f] rest for an equation f in v that can be solved for v; None when it cannot."""
    for a, b in (f.args, f.args[::-1]):
        if v in b.free:
            continue
        if a is v and inside(b, v.size):
            return subst(rest, {v: b})
        order = next((o for o in orders_of(a, v) if same_rows(o, v)), None)
        if order is not None:
            return _unsort(v, order, a, b, rest)
        if a.op in ("idiv", "mod") and a.args[0] is v and (hi_size := quotient(v.size, a.args[1])) is not None:
            hi, lo = Var(hi_size), Var(a.args[1])
            at = {v: mix(hi, hi.size, lo, lo.size)}
            return sum_(lo, sum_(hi, mul(eq(subst(a, at), b), subst(rest, at))))
        if a.op == "mix" and v in a.args and b.op != "mix" and inside(b, prod(a.args[1::2])) and _all_fit(a):
            parts = digits(b, a.args[1::2])
            return sum_(v, mul(*[eq(d, x) for d, x in zip(a.args[::2], parts)], rest))
    return None


def _all_fit(a: Expr) -> bool:
    return all(inside(d, n) for d, n in zip(a.args[::2], a.args[1::2]))


def same_rows(order: Order, v: Var) -> bool:
    return v.size is not None and prod(order.sizes) == v.size


def _unsort(v: Var, order: Order, a: Expr, b: Expr, rest: Expr) -> Expr:
    """Change of variable: v is a row of the sorted domain, sum over the unsorted rows instead."""
    new = [Var(n) for n in order.sizes]
    at = inv(order, mix(*[x for d, n in zip(new, order.sizes) for x in (d, n)]))
    body = mul(eq(subst(a, {v: at}), b), subst(rest, {v: at}))
    for d in reversed(new):
        body = sum_(d, body)
    return body


def orders_of(e: Expr, v: Var) -> Iterator[Order]:
    """Orders whose permutation is applied to exactly v inside e."""
    if e.op == "perm" and e.args[1] is v:
        yield e.args[0]
    for a in e.args:
        if isinstance(a, Expr) and v in a.free:
            yield from orders_of(a, v)


def _sum_enum(r: Var, body: Expr) -> Expr:
    """sum over the rows of nonzero(cond) of g(coordinates)  =  sum over all points of [cond] g."""
    dims = r.domain.dims
    ren = {v: v.fresh() for d in dims for v in d}
    at = {raw("coord", r, j): mix(*[x for v in d for x in (ren[v], v.size)]) for j, d in enumerate(dims)}
    g = replace(body, at)
    if r in g.free:
        raise Refused("a sum over the rows of nonzero uses the row number itself")
    g = mul(subst(r.domain.cond, ren), g)
    for v in reversed(list(ren.values())):
        g = sum_(v, g)
    return g


def _sum_segment(r: Var, body: Expr) -> Expr:
    """sum over the rows of one expert's segment  =  sum over all sorted rows whose key is that expert."""
    order, row = r.domain.order, Var(prod(r.domain.order.sizes))
    g = replace(body, {raw("seg", r): row})
    if r in g.free:
        raise Refused("a sum over one expert's rows uses the row number itself")
    key = subst(order.expr, dict(zip(order.vars, digits(perm(order, row), order.sizes))))
    return sum_(row, mul(eq(key, const(r.domain.index)), g))


# ---------------------------------------------------------------- substitution
REBUILD: dict[str, Callable[..., Expr]] = {
    "div": divide,
    "add": add, "mul": mul, "eq": eq, "mix": mix, "idiv": idiv, "mod": mod, "perm": perm, "inv": inv, "sel": sel, "where": where,
    "sum": sum_, "not": negate, "below": below, "scat": scat,
}  # fmt: skip
COMPARE = {"lt", "le", "gt", "ge", "ne"}
UNARY = ZERO_AT_ZERO | {"sigmoid", "exp"}


def rebuild(op: str, args: list) -> Expr:
    if op in COMPARE:
        return compare(op, *args)
    if op in REBUILD:
        return REBUILD[op](*args)
    return unary(op, *args) if op in UNARY else raw(op, *args)


def replace(e: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replace whole sub-expressions (keys of table) simultaneously, re-simplifying on the way up."""
    memo: dict[Expr, Expr] = {}
    roots: frozenset[Var] = frozenset().union(*(k.free for k in table))

    def go(x: Expr) -> Expr:
        if x in table:
            return table[x]
        if x.op == "var" or not (x.free & roots):
            return x
        if x not in memo:
            memo[x] = rebuild(x.op, [go(a) if isinstance(a, Expr) else a for a in x.args])
        return memo[x]

    return go(e)


def subst(e: Expr, table: Mapping[Var, Expr]) -> Expr:
    """Simultaneous substitution of variables."""
    table = {k: v for k, v in table.items() if k is not v}
    return replace(e, table) if table else e  # type: ignore[arg-type]


__all__ = [
    "BINDERS", "add", "alpha", "compare", "distinct_slots", "eq", "is_sparse", "mul", "negate", "orders_of", "raw", "rebuild", "refresh",
    "replace", "scat", "slot_test", "sub", "subst", "sum_", "unary", "where", "zero_or_one",
]  # fmt: skip
