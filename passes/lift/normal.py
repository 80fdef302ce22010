"""Normal form: sum over experts of [id = e] f_e becomes f_id, the experts merged into one expression of the id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .algebra import distinct_slots, mul, refresh, slot_test, subst
from .expr import ZERO, Expr, Refused, Var, alpha, factors, is_const, loads, raw, subexprs, terms
from .index import bounds, inside, is_int, sel
from .merge import Merger

MACHINERY = {"perm", "inv", "coord", "seg", "count", "below", "scat", "undef", "rows"}


def is_id(e: Expr) -> bool:
    """An integer in 0..n-1 computed from a routing decision."""
    b = bounds(e)
    return b is not None and b[0] == 0 and isinstance(b[1], int) and is_int(e) and _chosen(e)


def _chosen(e: Expr) -> bool:
    """Is a routing decision read, and no other tensor by it?"""
    found = [x.args[0].range is not None for x in top_loads(e)]
    return bool(found) and all(found)


def top_loads(e: Expr) -> Iterator[Expr]:
    """Loads that are not part of another load's index."""
    if e.op == "load":
        yield e
        return
    for a in e.args:
        if isinstance(a, Expr):
            yield from top_loads(a)


def num_ids(e: Expr) -> int:
    b = bounds(e)
    assert b is not None  # callers ask is_id first
    return b[1]  # type: ignore[return-value]


def _arm(f: Expr) -> bool:
    """[id = const]"""
    return f.op == "eq" and is_const(f.args[1]) and is_id(f.args[0])


def cheap_test(expr: Expr) -> None:
    """Refuse partial sums (the accumulator inside the loop) before any work is done on them."""
    seen: dict[tuple, list[int]] = {}
    for t in terms(expr):
        while t.op == "sum":
            t = t.args[1]
        hits = [f for f in factors(t) if _arm(f)]
        if len(hits) == 1:
            ids, c = hits[0].args
            where = tuple(a if is_const(a) else None for a in ids.args[1:]) if ids.op == "load" else ()
            seen.setdefault((num_ids(ids), *where), []).append(c.args[0])
    for (n, *_), have in seen.items():
        if sorted(have) != list(range(n)):
            raise Refused(describe_experts(sorted(have), n))


PARTIAL = "the sum over experts is not over each"


def describe_experts(have: list[int], n: int) -> str:
    missing = [e for e in range(n) if e not in have]
    twice = sorted({e for e in have if have.count(e) > 1})
    what = [
        f"expert {', '.join(map(str, missing[:4]))} is missing" if missing else "",
        f"expert {twice[0]} counts twice" if twice else "",
    ]
    return f"{PARTIAL} of 0..{n - 1} once: " + "; ".join(w for w in what if w)


def peel(e: Expr) -> tuple[list[Var], Expr]:
    """Bound variables of the outer sums, and the body."""
    vs = []
    while e.op == "sum":
        v, e = refresh(e)
        vs.append(v)
    return vs, e


def gather_experts(expr: Expr) -> tuple[Expr | None, list[Expr]]:
    """sum_e sum_k [id=e] f_e  ->  sum_k sel(id, f_0, f_1, ...); returns the new sum and the terms left over."""
    groups: dict = {}
    rest: list[Expr] = []
    cheap_test(expr)
    for t in terms(expr):
        vs, body = peel(t)
        tests = [f for f in factors(body) if _arm(f)]
        if len(tests) != 1:
            rest.append(t)
            continue
        ids, c = tests[0].args
        arm = (c.args[0], vs, ids, mul(*[f for f in factors(body) if f is not tests[0]]))
        groups.setdefault((alpha(ids, vs), tuple(v.size for v in vs)), []).append(arm)
    if not groups:
        return None, rest
    sums = [_select_arm(arms) for arms in groups.values()]
    return sums[0] if len(sums) == 1 else _sum_slots(sums), rest


def _sum_slots(sums: list[Expr]) -> Expr:
    """f(id_0) + f(id_1) + ...: slots written out one by one, in whatever order, are a sum over k."""
    slot = {s: [a.args[0] for a in s.args[0].args[1:] if is_const(a)] for s in sums if s.op == "sel" and s.args[0].op == "load"}
    if len(slot) < len(sums) or any(not c for c in slot.values()):
        raise Refused("several sums over experts are added")
    k = Var(len(sums))
    parts = tuple(merge_selects(s) for s in sorted(sums, key=lambda s: slot[s][-1]))
    return raw("sum", k, Merger(k).merge(parts))


def _select_arm(arms: list[tuple]) -> Expr:
    vs0, ids0 = arms[0][1], arms[0][2]
    n = num_ids(ids0)
    have = sorted(a[0] for a in arms)
    if have != list(range(n)):
        raise Refused(describe_experts(have, n))
    parts = [subst(body, dict(zip(vs, vs0))) for _, vs, _, body in sorted(arms, key=lambda a: a[0])]
    e = sel(ids0, *parts)
    for v in reversed(vs0):
        e = raw("sum", v, e)
    return e


def merge_selects(e: Expr) -> Expr:
    """sel(id, f_0 ... f_E-1) -> f_id, for every selection by a routing decision."""

    def step(x: Expr) -> Expr:
        if x.op == "where":
            x = fold_where(x) or x
        if x.op == "sel" and is_id(x.args[0]) and len(x.args) - 1 == num_ids(x.args[0]):
            index = Var(len(x.args) - 1)
            arms = tuple(resolve(p, x.args[0], i) for i, p in enumerate(x.args[1:]))
            return subst(Merger(index).merge(arms), {index: x.args[0]})
        return x

    return rewrite_top(e, step)


def fold_where(e: Expr) -> Expr | None:
    """where([id=E-1], a, where([id=E-2], b, ...)) covering every id  ->  sel(id, ...)."""
    arms: dict[int, Expr] = {}
    key: Expr | None = None
    while True:
        if e.op == "where" and _arm(e.args[0]):
            c, body, nxt = e.args
        elif arms and e.op == "mul" and _arm(e.args[0]):
            c, body, nxt = e.args[0], mul(*e.args[1:]), ZERO
        else:
            break
        ids, n = c.args
        if key is not None and ids is not key:
            return None
        key = ids
        arms.setdefault(n.args[0], body)
        e = nxt
    if key is None or set(arms) != set(range(num_ids(key))):
        return None
    return sel(key, *[arms[i] for i in range(len(arms))])


def resolve(part: Expr, ids: Expr, i: int) -> Expr:
    """Inside arm i of sel(id_k, ...), id_k = i: sum_k' [id_k' = i] g_k' = g_k, as the ids of a token are distinct."""

    def step(x: Expr) -> Expr:
        if x.op == "sum" and ids.op == "load" and distinct_slots(x):
            test = slot_test(x)
            assert test is not None  # distinct_slots implies it
            a, b = test.args
            same = a.args[0] is ids.args[0] and a.args[1:-1] == ids.args[1:-1]
            if is_const(b, i) and same and inside(ids.args[-1], x.args[0].size):
                return subst(mul(*[f for f in factors(x.args[1]) if f is not test]), {x.args[0]: ids.args[-1]})
        return x

    return rewrite_top(part, step)


def rewrite_top(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """Apply f top-down, then to the parts of the result."""
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if x.op == "var":
            return x
        if x not in memo:
            y = f(x)
            memo[x] = y if y.op == "var" else raw(y.op, *[go(a) if isinstance(a, Expr) else a for a in y.args])
        return memo[x]

    return go(e)


def leftovers(e: Expr) -> set[str]:
    """Operators that must not survive in a formula: pieces of routing machinery that no lemma removed."""
    return {x.op for x in subexprs(e)} & MACHINERY


def used_ids(e: Expr, rows: Iterable[Var]) -> list[Expr]:
    """The routing ids by which a row-independent tensor (a parameter) is selected, directly or as a digit of a merged dimension."""
    found: dict[Expr, None] = {}
    rows = frozenset(rows)
    for x in loads(e):
        digits = [d for a in x.args[1:] for d in (a.args[::2] if a.op == "mix" else (a,))]
        ids = [d for d in digits if is_id(d)]
        if len(ids) == 1 and not any(d.free & rows for d in digits if d is not ids[0]):
            found[ids[0]] = None
    return list(found)
