"""Normal form: sum over experts of [id = e] f_e becomes f_id, the experts merged into one expression of the id."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .algebra import add, compare, distinct_slots, mul, refresh, replace, slot_test, subst, where
from .expr import ONE, ZERO, Expr, Refused, Var, alpha, const, factors, is_const, loads, raw, subexprs, terms
from .index import bounds, inside, is_int, sel
from .merge import Merger, select

MACHINERY = {"perm", "inv", "coord", "seg", "count", "below", "scat", "undef", "rows", "moved", "nth"}


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


@dataclass(frozen=True)
class First:
    """The experts that have linear layers, where they are the first of all ids. identities: the code has the others, too."""

    count: int
    identities: bool = False


class Partial(Refused):
    """Not every id has an expert with layers; those that have one may be the first ones."""

    def __init__(self, why: str, first: First | None) -> None:
        super().__init__(why)
        self.first = first


def _check_experts(have: list[int], n: int, first: First | None) -> None:
    """Each expert once; or the first ones, where that is known to be all that the code has: who is sent to another gets nothing."""
    if have != list(range(n if first is None or first.identities else first.count)):
        raise Partial(describe_experts(have, n), First(len(have)) if have == list(range(len(have))) else None)


def cheap_test(expr: Expr, first: First | None = None) -> None:
    """Refuse partial sums (the accumulator inside the loop) before any work is done on them."""
    seen: dict[tuple, list[int]] = {}
    for t in terms(expr):
        while (inner := t if t.op == "sum" else _tested_sum(t)) is not None:
            t = inner.args[1]
        hits = [f for f in factors(t) if _arm(f)]
        if len(hits) == 1:
            ids, c = hits[0].args
            where = (ids.args[0], *map(_fixed_index, ids.args[1:])) if ids.op == "load" else ()
            seen.setdefault((num_ids(ids), *where), []).append(c.args[0])
    for (n, *_), have in seen.items():
        _check_experts(sorted(have), n, first)


def _fixed_index(a: Expr) -> Any:
    """What tells one choice of a token from another: a number, or the tensor that it is read from."""
    return a if is_const(a) else a.args[0] if a.op == "load" else None


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
    """Bound variables of the outer sums, and the body; c * sum_k [id_k = e] f is sum_k [id_k = e] c f."""
    vs = []
    while (inner := e if e.op == "sum" else _tested_sum(e)) is not None:
        v, body = refresh(inner)
        e = mul(*[f for f in factors(e) if f is not inner], body)
        vs.append(v)
    return vs, e


def _tested_sum(e: Expr) -> Expr | None:
    """The sum over one expert's slots in a product that has no such test itself (a test of the token, say: is there room?)."""
    sums = [f for f in factors(e) if f.op == "sum" and any(_arm(g) for g in factors(f.args[1]))]
    return sums[0] if len(sums) == 1 and not any(_arm(f) for f in factors(e)) else None


def spread(expr: Expr) -> Expr:
    """w * ([id = 0] f_0 + [id = 1] f_1 + ...), or a sum of such over slots, as sums of one expert each."""
    return add(*[part for t in terms(expr) for part in _spread(t)])


def _spread(t: Expr) -> list[Expr]:
    if t.op == "sum":
        parts = [p for each in terms(t.args[1]) for p in _spread(each)]
        spread_out = len(parts) > 1 and any(_arm(f) for p in parts for f in factors(p))
        return [raw("sum", t.args[0], p) for p in parts] if spread_out or (len(parts) == 1 and parts[0] is not t.args[1]) else [t]
    parts = [_stacked(f) if f.op == "sel" else f for f in factors(t)]
    sums = [f for f in parts if _sums_arms(f)]
    if len(sums) != 1 or t is sums[0]:
        return [t] if parts == factors(t) else [mul(*parts)]
    others = [f for f in parts if f is not sums[0]]
    return [mul(*others, part) for part in sums[0].args]


def _sums_arms(e: Expr) -> bool:
    return e.op == "add" and any(_arm(f) for part in e.args for f in factors(part))


def _stacked(e: Expr) -> Expr:
    """What slots give that were written out and stacked: one expression of the slot's number, where they are alike."""
    return select(*e.args) if all(any(map(is_id, loads(part))) for part in e.args[1:]) else e


def gather_experts(expr: Expr, first: First | None = None, rows: Sequence[Var] = ()) -> tuple[Expr | None, list[Expr]]:
    """sum_e sum_k [id=e] f_e  ->  sum_k sel(id, f_0, f_1, ...); returns the new sum and the terms left over.

    rows: the variables of a token. first: the experts that there are, where that is not one for each id.
    """
    groups: dict = {}
    rest: list[Expr] = []
    cheap_test(expr, first)
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
    sums = []
    for arms in groups.values():
        found, others = _select_arm(arms, first)
        sums.append(found)
        rest += others
    return sums[0] if len(sums) == 1 else sum_slots(sums, rows), rest


def sum_slots(sums: list[Expr], rows: Sequence[Var]) -> Expr:
    """f(id_0) + f(id_1) + ...: slots written out one by one, in whatever order, are a sum over k."""
    from .choices import side_by_side

    merged = [merge_selects(s) for s in sums]
    slots = [_slot(s, m, rows) for s, m in zip(sums, merged)]
    if any(s is None for s in slots) or len({s[0] for s in slots if s}) > 1:
        return side_by_side(merged, rows)
    parts = tuple(m for _, m in sorted(zip(slots, merged), key=lambda both: both[0][1]))  # type: ignore[index]
    try:
        return _numbered(parts)
    except Refused as e:
        with contextlib.suppress(Refused):  # the slots may differ in their weights only
            return side_by_side(parts, rows)
        raise e from None


def _numbered(parts: tuple[Expr, ...]) -> Expr:
    """The slots' terms as one expression of the slot's number."""
    k = Var(len(parts))
    found = Merger(k).merge(parts)
    if any(len(x.args[0].nodes) > 1 and k in x.args[1:] for x in loads(found)):
        raise Refused("several sums over experts are added, each of them of an expert of its own (as where experts choose tokens)")
    return raw("sum", k, found)


def _slot(e: Expr, merged: Expr, rows: Sequence[Var]) -> tuple[Any, Any] | None:
    """(the tensor of ids, the number of the slot) by which the term selects, where that is one number."""
    found = [e.args[0]] if e.op == "sel" else used_ids(merged, rows)
    numbers = [a.args[0] for a in found[0].args[1:] if is_const(a)] if len(found) == 1 and found[0].op == "load" else []
    return (found[0].args[0], numbers[-1]) if numbers else None


def _select_arm(arms: list[tuple], first: First | None) -> tuple[Expr, list[Expr]]:
    """(sum over the slots of what the selected expert computes, what experts without a layer add)"""
    vs0, ids0 = arms[0][1], arms[0][2]
    n = num_ids(ids0)
    _check_experts(sorted(a[0] for a in arms), n, first)
    parts = [within(subst(body, dict(zip(vs, vs0))), ids0, e) for e, vs, _, body in sorted(arms, key=lambda a: a[0])]
    layers = [_has_layer(p) for p in parts]
    m = sum(layers) if any(layers) and layers == sorted(layers, reverse=True) else len(parts)
    if m != (n if first is None else first.count):
        raise Partial(f"expert {m} and those behind it have no linear layer", First(m, True))
    e = sel(ids0, *parts) if m == n else _first_experts(ids0, parts[:m])
    return _over(vs0, e), _without_layers(vs0, ids0, parts[m:], m)


def within(body: Expr, ids: Expr, e: int) -> Expr:
    """The body where the id is e: what other experts would give there is zero."""
    tests = [x for x in subexprs(body) if _arm(x) and x.args[0] is ids]
    return replace(body, {x: ONE if is_const(x.args[1], e) else ZERO for x in tests}) if tests else body


def _has_layer(e: Expr) -> bool:
    """A sum of products of two tensors' elements."""
    for x in subexprs(e):
        if x.op == "sum":
            v, body = x.args
            if len({frozenset(load.args[0] for load in loads(f)) for f in factors(body) if v in f.free}) > 1:
                return True
    return False


def _over(vs: list[Var], e: Expr) -> Expr:
    for v in reversed(vs):
        e = raw("sum", v, e)
    return e


def _first_experts(ids: Expr, parts: list[Expr]) -> Expr:
    """f_id of the first experts. For all other ids it is what the stage ops give for slots without an expert: zero."""
    index = Var(len(parts))
    arms = tuple(resolve(merge_selects(p), ids, i) for i, p in enumerate(parts))
    return subst(Merger(index).merge(arms), {index: ids})


def _without_layers(vs: list[Var], ids: Expr, parts: list[Expr], m: int) -> list[Expr]:
    """[id >= m] g for the ids of experts that are all one function without a layer, the identity say: a term for each slot."""
    if not parts:
        return []
    if any(p is not parts[0] for p in parts) or len(vs) > 1 or any(not isinstance(v.size, int) for v in vs):
        raise Refused("experts without a linear layer that are not all the same")
    body = mul(compare("ge", ids, const(m)), parts[0])
    return [subst(body, {vs[0]: const(k)}) for k in range(vs[0].size)] if vs else [body]  # type: ignore[arg-type]


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
    """where([id=E-1], a, where([id=E-2], b, ...)) covering every id  ->  sel(id, ...).

    Where a test has more factors, [id=E-1] [kept], the others count where it fails, and as their ids differ that is what stands at the
    end of the chain.
    """
    arms: dict[int, Expr] = {}
    key: Expr | None = None
    kept: dict[int, Expr] = {}
    while True:
        if e.op == "where" and (test := _one_arm(e.args[0], key)) is not None:
            c, body, nxt = test, e.args[1], e.args[2]
            more = mul(*[f for f in factors(e.args[0]) if f is not test])
        elif arms and e.op == "mul" and (test := _one_arm(e, key)) is not None:
            c, body, nxt, more = test, mul(*[f for f in e.args if f is not test]), ZERO, ONE
        else:
            break
        ids, n = c.args
        if key is not None and ids is not key:
            return None
        key = ids
        if n.args[0] not in arms:
            arms[n.args[0]], kept[n.args[0]] = body, more
        elif not is_const(kept[n.args[0]], 1):
            return None
        e = nxt
    if key is None or set(arms) != set(range(num_ids(key))):
        return None
    return sel(key, *[where(kept[i], arms[i], e) for i in range(len(arms))])


def _one_arm(e: Expr, key: Expr | None) -> Expr | None:
    """The only factor [id = const], of one id where that is known."""
    found = [f for f in factors(e) if _arm(f) and (key is None or f.args[0] is key)]
    return found[0] if len(found) == 1 else None


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
        if x.args[0].rank is not None or x.args[0].total is not None:  # a count is no parameter
            continue
        digits = [d for a in x.args[1:] for d in (a.args[::2] if a.op == "mix" else (a,))]
        ids = [d for d in digits if is_id(d)]
        if len(ids) == 1 and not any(d.free & rows for d in digits if d is not ids[0]):
            found[ids[0]] = None
    return list(found)
