"""Rows of one expert: slices between neighbouring offsets of sorted ids, splits by counts, and their concatenation.

No ATen op is registered here; views.py and scatter.py call these.
"""

from __future__ import annotations

from ..algebra import compare, mul, replace, subst
from ..expr import ZERO, Enum, Expr, Order, Refused, Segment, Var, alpha, const, factors, is_const, raw, terms
from ..index import bounds, perm, sel
from ..merge import select
from ..sizes import prod
from ..value import Value, broadcast


def key_at(order: Order, index: Expr) -> Expr:
    """Key of unsorted row `index`."""
    from ..index import digits

    return subst(order.expr, dict(zip(order.vars, digits(index, order.sizes))))


def rows_between(x: Value, d: int, start, end) -> Value:
    """A slice between neighbouring offsets of a sorted key is the segment of one key value."""
    if len(x.dims[d]) != 1:
        raise Refused("a data-dependent slice of a merged dimension")
    v = x.dims[d][0]
    total = all_rows(end)
    if total is not None and start in (0, None) and total == v.size:
        return x
    order, lo, hi = between(start, end)
    if prod(order.sizes) != v.size or hi != lo + 1:
        raise Refused("a slice that does not run between neighbouring expert offsets")
    r = Var(None, Segment(order, lo))
    return Value((*x.dims[:d], (r,), *x.dims[d + 1 :]), subst(x.expr, {v: raw("seg", r)}))


def between(start, end) -> tuple[Order, int, int]:
    """(order, a, b) when start = #(key < a), end = #(key < b)."""
    e = end.expr if isinstance(end, Value) else const(end)
    s = start.expr if isinstance(start, Value) else const(start or 0)
    if (e_order := as_below(e)) is None:
        raise Refused("the end of a slice is no expert offset")
    order, hi = e_order
    if is_const(s, 0):
        return order, 0, hi
    s_order = as_below(s)
    if s_order is None or s_order[0].key != order.key:
        raise Refused("the start of a slice is no expert offset")
    return order, s_order[1], hi


def as_below(e: Expr) -> tuple[Order, int] | None:
    """below(order, n), or the sum of the counts of keys 0..n-1."""
    if e.op == "below" and is_const(e.args[1]):
        return e.args[0], e.args[1].args[0]
    ts = terms(e)
    if all(t.op == "count" and is_const(t.args[1]) for t in ts) and len({t.args[0].key for t in ts}) == 1:
        ids = sorted(t.args[1].args[0] for t in ts)
        if ids == list(range(len(ids))) and (bounds(ts[0].args[0].expr) or (-1,))[0] >= 0:
            return ts[0].args[0], len(ids)
    below = [t for t in ts if t.op == "below" and is_const(t.args[1])]
    if len(ts) == 2 and len(below) == 1 and (c := _negated_count(ts)) is not None:  # #(key < a+1) - #(key = a)
        order, a = below[0].args[0], below[0].args[1].args[0] - 1
        return (order, a) if c.args[0].key == order.key and is_const(c.args[1], a) else None
    if len(ts) == 2 and len(below) == 1:  # #(key < a) + #(key = a)
        other = next(t for t in ts if t is not below[0])
        if other.op == "count" and other.args[0].key == below[0].args[0].key and is_const(other.args[1], below[0].args[1].args[0]):
            return below[0].args[0], below[0].args[1].args[0] + 1
    return None


def _negated_count(ts: list[Expr]) -> Expr | None:
    for t in ts:
        if t.op == "mul" and len(t.args) == 2 and any(is_const(a, -1) for a in t.args):
            return next((a for a in t.args if a.op == "count"), None)
    return None


def all_rows(v):
    """Number of rows when v = the sum of the counts of all key values."""
    if not isinstance(v, Value):
        return None
    found = as_below(v.expr)
    b = bounds(found[0].expr) if found else None
    return prod(found[0].sizes) if found and b and found[1] == b[1] else None


def split_counts(x: Value, d: int, es: list[Expr]) -> list[Value]:
    """Sorted rows split by the token counts of experts 0, 1, 2, ..."""
    if len(x.dims[d]) == 1 and isinstance(x.dims[d][0].domain, Enum):
        return split_rows(x, d, es)
    if not all(e.op == "count" and is_const(e.args[1], i) for i, e in enumerate(es)):
        raise Refused("the split sizes are not the token counts of experts 0, 1, 2 ...")
    order = es[0].args[0]
    if len(x.dims[d]) != 1 or x.dims[d][0].size != prod(order.sizes) or any(e.args[0].key != order.key for e in es):
        raise Refused("a split of rows that are not those counted")
    b = bounds(order.expr)
    if not b or b[0] < 0 or b[1] != len(es):
        raise Refused(f"{len(es)} split sizes for ids that run over {b}")
    v = x.dims[d][0]
    rs = [Var(None, Segment(order, i)) for i in range(len(es))]
    return [Value((*x.dims[:d], (r,), *x.dims[d + 1 :]), subst(x.expr, {v: raw("seg", r)})) for r in rs]


def split_rows(x: Value, d: int, es: list[Expr]) -> list[Value]:
    """Rows of nonzero(mask[e, t]) come expert by expert: split by sum_t mask[e, t] into the rows of each expert."""
    from .mask import enumerate_
    from .reduce import total

    (r,) = x.dims[d]
    dom = r.domain
    if len(dom.dims) != 2 or len(dom.dims[0]) != 1 or dom.dims[0][0].size != len(es):
        raise Refused("a split of enumerated rows of another form")
    e, out = dom.dims[0][0], []
    for i, size in enumerate(es):
        mask = Value((dom.dims[1],), subst(dom.cond, {e: const(i)}))
        if not any(alpha(total(m)) == alpha(size) for m in (mask, positive(mask))):
            raise Refused("the split sizes are not the row counts of the mask")
        row = enumerate_(mask)
        row.domain.parent = (dom, i)
        moved = replace(x.expr, {raw("coord", r, 0): const(i), raw("coord", r, 1): raw("coord", row, 0)})
        if r in moved.free:
            raise Refused("the number of an enumerated row is used")
        out.append(Value((*x.dims[:d], (row,), *x.dims[d + 1 :]), moved))
    return out


def positive(mask: Value) -> Value:
    """[g > 0] for [g != 0]. A split by such counts has sizes that add up to all rows, or raises: then no g is less than zero."""

    def step(f: Expr) -> Expr:
        if f.op == "sum":
            return raw("sum", f.args[0], mul(*map(step, factors(f.args[1]))))
        nonzero = f.op == "not" and f.args[0].op == "eq" and is_const(f.args[0].args[1], 0)
        return compare("gt", *f.args[0].args) if nonzero else f

    return Value(mask.dims, mul(*map(step, factors(mask.expr))))


def cat_rows(xs: list[Value], d: int, domains: list) -> Value:
    """The opposite of split_rows."""
    whole = domains[0].parent[0]
    if any(p.parent[0] is not whole for p in domains) or [p.parent[1] for p in domains] != list(range(whole.dims[0][0].size)):
        raise Refused("a cat of enumerated rows that are not all of them in order")
    row = Var(None, whole)
    parts = []
    for x in xs:
        moved = replace(x.expr, {raw("coord", x.dims[d][0], 0): raw("coord", row, 1)})
        if x.dims[d][0] in moved.free:
            raise Refused("the number of an enumerated row is used")
        parts.append(Value((*x.dims[:d], (), *x.dims[d + 1 :]), moved))
    dims, es = broadcast(*parts)
    return Value([*dims[:d], (row,), *dims[d + 1 :]], sel(raw("coord", row, 0), *es))


def cat_segments(xs: list[Value], d: int, segs: list[Segment]) -> Value:
    """Rows of expert 0, 1, ... one after the other: the sorted order again."""
    order = segs[0].order
    b = bounds(order.expr)
    if any(s.order.key != order.key for s in segs) or not b or b[0] != 0 or [s.index for s in segs] != list(range(b[1])):
        raise Refused("a cat of expert segments that are not all of them in order")
    row, parts = Var(prod(order.sizes)), []
    for x in xs:
        moved = replace(x.expr, {raw("seg", x.dims[d][0]): row})
        if x.dims[d][0] in moved.free:
            raise Refused("the row number inside an expert's segment is used")
        parts.append(Value((*x.dims[:d], (), *x.dims[d + 1 :]), moved))
    dims, es = broadcast(*parts)
    return Value([*dims[:d], (row,), *dims[d + 1 :]], select(key_at(order, perm(order, row)), *es))


__all__ = ["ZERO", "all_rows", "between", "cat_rows", "cat_segments", "key_at", "rows_between", "split_counts"]
