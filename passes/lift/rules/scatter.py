"""Writing by index: a scatter is a sum over the rows written, once they are proved to be distinct or to accumulate."""

from __future__ import annotations

from typing import Any

from ..algebra import add, eq, mul, replace, same_rows, scat, subst, sum_, where
from ..expr import ONE, ZERO, Expr, Refused, Segment, Var, const, factors, is_const, raw, terms
from ..index import bounds, count, digits, inv, is_bool, perm
from ..sizes import Size, prod
from ..value import Value, broadcast, common, index_of, onto, same_domain
from ._base import dim_of, fixed, rule
from .mask import enumerate_, expand_masks, in_rows
from .reduce import counted
from .segments import between, key_at
from .written import aligned, goes_to_rows_of_its_own, marked


def scatter_sum(base: Value, d: int, idx: Value, src: Value) -> tuple[Value, Expr]:
    """base (renamed), and  sum over rows r of [idx(r) = p] src(.., r, ..)  as an expression over its dims."""
    out, s = base.renamed(), src
    other = [i for i in range(len(out.dims)) if i != d]
    for i in other:
        if bool(out.dims[i]) != bool(s.dims[i]):
            raise Refused("a scatter of another size")
        sizes = common(out.sizes(i), s.sizes(i)) if out.dims[i] else ()
        out, s = out.refine(i, sizes), s.refine(i, sizes)
    i_expr = onto(_idx_over(idx, s, d), s.dims)
    if not in_rows(i_expr, out.extent(d)):
        raise Refused("a scatter by an index whose range is not known")
    rows = [v.fresh() for v in s.dims[d]]
    table = dict(zip(s.dims[d], rows))
    for i in other:
        table.update(zip(s.dims[i], out.dims[i]))
    e = mul(eq(subst(i_expr, table), out.index(d)), subst(s.expr, table))
    if len(out.dims) == 1 and is_const(s.expr, 1) and (c := counted(e, rows)):
        return out, count(*c)
    for v in reversed(rows):
        e = sum_(v, e)
    return out, e


def _idx_over(idx: Value, s: Value, d: int) -> Value:
    """Index brought to the rank of s; a 1-d index stands on dimension d."""
    if len(idx.dims) == 1 and len(s.dims) > 1:
        idx = Value(((),) * d + idx.dims + ((),) * (len(s.dims) - d - 1), idx.expr)
    for i in range(len(s.dims)):
        if idx.dims[i]:
            idx = idx.refine(i, s.sizes(i))
    return idx


@rule("index_add.default")
def _index_add(it, node, base: Value, d, idx: Value, src: Value, alpha=1):
    d = dim_of(d, len(base.dims))
    src = src.refine(d, common(src.sizes(d), idx.sizes(0)))
    idx = idx.refine(0, src.sizes(d))
    out, e = scatter_sum(base, d, idx, src)
    return Value(out.dims, add(out.expr, mul(const(alpha), e)))


@rule("scatter_add.default")
def _scatter_add(it, node, base: Value, d, idx: Value, src: Value):
    d = dim_of(d, len(base.dims))
    _same_extents(idx, src)
    dims, (i, s) = broadcast(idx, src)
    out, e = scatter_sum(base, d, Value(dims, i), Value(dims, s))
    return Value(out.dims, add(out.expr, e))


def _same_extents(idx: Value, src: Value) -> None:
    """The index's extents decide how much of the source is written; only all of it is covered here."""
    if any(idx.extent(i) != src.extent(i) for i in range(len(src.dims))):
        raise Refused("a scatter of a part of its source")


@rule("scatter_reduce.two")
def _scatter_reduce(it, node, base: Value, d, idx: Value, src: Value, reduce, include_self=True):
    if reduce != "sum" or not include_self:
        raise Refused(f"scatter_reduce {reduce}")
    return _scatter_add(it, node, base, d, idx, src)


@rule("scatter.src", "scatter.value")
def _scatter(it, node, base: Value, d, idx: Value, src, **kw):
    """Overwrite.  The slots of one row are distinct (a fact of topk), so at most one of them writes an element."""
    if kw:
        raise Refused("scatter with reduce")
    d = dim_of(d, len(base.dims))
    if isinstance(src, Value):
        _same_extents(idx, src)
    dims, (i, s) = broadcast(idx, src if isinstance(src, Value) else const(src))
    slots = dims[d]
    if len(slots) > 1 or (slots and not (i.op == "load" and i.args[0].distinct and i.args[-1] is slots[0])):
        if d == 0 and isinstance(src, Value) and _whole_rows(base, dims, i):
            return overwrite_rows(base, Value((dims[0],), i), Value(dims, s))
        raise Refused("a scatter whose indices are not known to be distinct")
    out, _ = scatter_sum(base, d, Value(dims, i), Value(dims, ONE if not isinstance(src, Value) else s))
    for a in range(len(out.dims)):
        if a != d and tuple(v.size for v in dims[a]) != out.sizes(a):
            raise Refused("a scatter over merged dimensions")
    table = {v: w for a in range(len(dims)) if a != d for v, w in zip(dims[a], out.dims[a])}
    k = slots[0].fresh() if slots else None
    if slots:
        table[slots[0]] = k  # type: ignore[assignment]
    return Value(out.dims, scat(k, eq(subst(i, table), out.index(d)), subst(s, table), out.expr))


def _whole_rows(base: Value, dims: list[tuple[Var, ...]], i: Expr) -> bool:
    """Is the index the same for all places of a row, and are these all places of the base's rows?"""
    others = range(1, len(dims))
    return not i.free & {v for a in others for v in dims[a]} and all(prod(v.size for v in dims[a]) == base.extent(a) for a in others)


@rule("index_put.default", "_unsafe_index_put.default")
def _index_put(it, node, base: Value, idx, vals: Value, accumulate=False):
    idx = expand_masks(idx, node.args[1])
    if len(idx) == 1 and idx[0] is not None and len(idx[0].dims) > 1:
        idx[0], vals = _without_ones(base, idx[0], vals)
    if any(v is None for v in idx) or any(len(v.dims) != 1 for v in idx):
        raise Refused("an index_put of another form")
    base, d_index = _flatten_indexed(base, idx)
    vals = Value(((),) * (len(base.dims) - len(vals.dims)) + vals.dims, vals.expr)
    if accumulate:
        vals = vals.refine(0, d_index.sizes(0))
        out, e = scatter_sum(base, 0, d_index.refine(0, vals.sizes(0)), vals)
        return _unflatten(node, Value(out.dims, add(out.expr, e)))
    return _unflatten(node, overwrite_rows(base, d_index, vals))


def _without_ones(base: Value, idx: Value, vals: Value) -> tuple[Value, Value]:
    """An index [n, 1] (a mask's nonzero as a column) writes the same rows as one of [n]."""
    n = len(idx.dims)
    kept = [i for i, d in enumerate(idx.dims) if d]
    if len(kept) != 1:
        return idx, vals
    padded = ((),) * (n + len(base.dims) - 1 - len(vals.dims)) + vals.dims
    if any(padded[i] for i in range(n) if i not in kept):
        raise Refused("an index_put of another form")
    return Value((idx.dims[kept[0]],), idx.expr), Value((padded[kept[0]], *padded[n:]), vals.expr)


@rule("masked_scatter.default")
def _masked_scatter(it, node, base: Value, mask: Value, vals: Value):
    """A mask of whole rows takes the rows of vals in order, as base[mask] = vals does; vals is known to have just as many."""
    dims, (e, m) = broadcast(base, mask)
    lead = max((i + 1 for i, d in enumerate(dims) if m.free & set(d)), default=0)
    rest = [prod(v.size for v in d) for d in dims[lead:]]
    if not lead or not vals.dims[0] or [vals.extent(i) for i in range(1, len(vals.dims))] != rest or len(base.dims) != len(dims):
        raise Refused("a masked_scatter that does not fill whole rows")
    if any(base.extent(i) != prod(v.size for v in d) for i, d in enumerate(dims)) or not is_bool(m):
        raise Refused("a masked_scatter of another form")
    r = enumerate_(Value(dims[:lead], m))
    flat, index = _flatten_indexed(Value(dims, e), [Value(((r,),), raw("coord", r, j)) for j in range(lead)])
    return _unflatten(node, overwrite_rows(flat, index, vals))


@rule("index_copy.default")
def _index_copy(it, node, base: Value, d, idx: Value, vals: Value):
    if dim_of(d, len(base.dims)) != 0:
        raise Refused("an index_copy along another dimension than the first")
    return overwrite_rows(base, idx, vals)


def _flatten_indexed(base: Value, idx: list) -> tuple[Value, Value]:
    """Several index vectors (the columns of a mask's nonzero) address the leading dimensions as one flat row number."""
    if len(idx) == 1:
        return base, idx[0]
    from ..index import mix

    dims, es = broadcast(*idx)
    if not all(in_rows(e, base.extent(i)) for i, e in enumerate(es)):
        raise Refused("a scatter by an index whose range is not known")
    flat = mix(*[x for i, e in enumerate(es) for x in (e, base.extent(i))])
    merged = tuple(v for d in base.dims[: len(idx)] for v in d)
    return Value((merged, *base.dims[len(idx) :]), base.expr), Value(dims, flat)


def _unflatten(node, x: Value) -> Value:
    from ._base import out_shape
    from .views import group

    want = out_shape(node)
    if len(x.dims) == len(want):
        return x
    lead = len(want) - len(x.dims) + 1
    return Value((*group(list(x.dims[0]), want[:lead]), *x.dims[1:]), x.expr)


def overwrite_rows(base: Value, idx: Value, vals: Value) -> Value:
    """base[idx] = vals, where idx is proved to be injective."""
    e = idx.expr
    if (others := goes_to_rows_of_its_own(base, idx)) is not None:
        idx, vals = aligned(idx, vals)
        out, written = scatter_sum(base, 0, idx, vals)
        return marked(Value(out.dims, written), others)
    if len(idx.dims[0]) != 1:
        raise Refused("rows are overwritten by an index over several variables")
    (r,) = idx.dims[0]
    if not vals.dims[0]:
        vals = Value(((r,), *vals.dims[1:]), vals.expr)
    vals = vals.refine(0, (r.size,))
    if len(vals.dims[0]) != 1 or not same_domain(r, vals.dims[0][0]):
        raise Refused("the written rows are not the rows of the index")
    vals = Value(((r,), *vals.dims[1:]), subst(vals.expr, {vals.dims[0][0]: r}))
    if e.op == "perm" and e.args[1] is r and same_rows(e.args[0], r):  # a permutation covers every row
        return _permuted(base, vals, e, r)
    if not _injective_rows(e, r):
        raise Refused("rows are overwritten by an index that is not known to be injective")
    return _masked_write(base, e, r, vals)


def _permuted(base: Value, vals: Value, e: Expr, r: Var) -> Value:
    order = e.args[0]
    b = base.renamed().refine(0, order.sizes)
    if b.sizes(0) != order.sizes:
        raise Refused("a permutation writes rows of another extent")
    at = inv(order, b.index(0))
    features = [mine or tuple(v.fresh() for v in theirs) for mine, theirs in zip(vals.dims[1:], b.dims[1:])]  # values may broadcast
    return Value((b.dims[0], *features), subst(vals.expr, {r: at}))


def _masked_write(base: Value, e: Expr, r: Var, vals: Value) -> Value:
    b = base.renamed()
    for i in range(1, len(b.dims)):
        if bool(b.dims[i]) != bool(vals.dims[i]):
            vals = Value((*vals.dims[:i], tuple(v.fresh() for v in b.dims[i]), *vals.dims[i + 1 :]), vals.expr)
        s = common(b.sizes(i), vals.sizes(i))
        b, vals = b.refine(i, s), vals.refine(i, s)
    t = {v: w for i in range(1, len(b.dims)) for v, w in zip(vals.dims[i], b.dims[i])}
    new = subst(vals.expr, t)
    old = b.at(0, e)
    was = [] if is_const(old, 0) else terms(old)
    rest = [x for x in terms(new) if x not in was]
    if len(rest) == len(terms(new)) - len(was) and (was or is_const(b.expr, 0)):  # base[idx] += rest
        out, added = scatter_sum(b, 0, Value(((r,),), e), Value(((r,), *b.dims[1:]), add(*rest)))
        return Value(out.dims, add(out.expr, added))
    return _select_rows(b, e, r, new)


def _select_rows(b: Value, e: Expr, r: Var, new: Expr) -> Value:
    """Rows of a mask over one flat row number: where(cond, new, old)."""
    dom = r.domain
    cols = [raw("coord", r, j) for j in range(len(dom.dims))]
    if not ((len(cols) == 1 and e is cols[0]) or (e.op == "mix" and tuple(e.args[::2]) == tuple(cols))):
        raise Refused("rows are overwritten, not accumulated")
    b = b.refine(0, common(b.sizes(0), tuple(v.size for d in dom.dims for v in d)))
    left = list(b.dims[0])
    table: dict[Any, Expr] = {}
    at: dict[Expr, Expr] = {}
    for col, d in zip(cols, dom.dims):
        at[col] = index_of(_leading(left, prod(v.size for v in d)))
        table.update(zip(d, digits(at[col], [v.size for v in d])))
    new = replace(new, at)
    if r in new.free:
        raise Refused("the written rows use the row number itself")
    return Value(b.dims, where(subst(dom.cond, table), new, b.expr))


def _leading(vs: list[Var], n: Size) -> list[Var]:
    """Takes the first variables away that together run over n."""
    found: list[Var] = []
    while prod(v.size for v in found) != n:
        if not vs:
            raise Refused("rows are overwritten by a mask over other dimensions")
        found.append(vs.pop(0))
    return found


def _injective_rows(e: Expr, r: Var) -> bool:
    """Is e different for different rows of r's enumeration?"""
    from ..expr import Enum

    if not isinstance(r.domain, Enum):
        return False
    used = {c.args[1] for c in (e.args[::2] if e.op == "mix" else (e,)) if c.op == "coord" and c.args[0] is r}
    if not used or any(c.op != "coord" for c in (e.args[::2] if e.op == "mix" else (e,))):
        return False
    other = [v for i, d in enumerate(r.domain.dims) if i not in used for v in d]
    return not other or (len(other) == 1 and any(_one_slot_test(f, other[0]) for f in factors(r.domain.cond)))


def _one_slot_test(f: Expr, k: Var) -> bool:
    """[id_k = e] with distinct ids: at most one k for the other coordinates."""
    return f.op == "eq" and any(
        a.op == "load" and a.args[0].distinct and a.args[-1] is k and k not in b.free for a, b in (f.args, f.args[::-1])
    )


@rule("copy.default")
def _copy(it, node, dst: Value, src: Value, *a):
    src_dtype, dst_dtype = node.args[1].meta["val"].dtype, node.args[0].meta["val"].dtype
    from .pointwise import cast

    e = src.expr if src_dtype == dst_dtype else cast(src.expr, dst_dtype)
    vals = Value(((),) * (len(dst.dims) - len(src.dims)) + src.dims, e)
    return Value([v or tuple(x.fresh() for x in d) for v, d in zip(vals.dims, dst.dims)], vals.expr)


@rule("slice_scatter.default")
def _slice_scatter(it, node, base: Value, src: Value, d=0, start=None, end=None, step=1):
    """base[a:b] = src between neighbouring offsets: the rows of one expert."""
    d = dim_of(d, len(base.dims))
    seg = src.dims[0][0].domain if src.dims and len(src.dims[0]) == 1 else None
    if d != 0 or not isinstance(seg, Segment):
        return _block_scatter(base, src, d, start, end, step)
    order, lo, hi = between(start, end)
    if hi != lo + 1 or seg.key != Segment(order, lo).key:
        raise Refused("a slice assignment of other rows than those of the expert")
    b = base.renamed()
    if len(b.dims[0]) != 1 or b.extent(0) != prod(order.sizes):
        raise Refused("a slice assignment into rows that are not those sorted")
    (row,) = b.dims[0]
    for i in range(1, len(b.dims)):
        s = common(b.sizes(i), src.sizes(i))
        b, src = b.refine(i, s), src.refine(i, s)
    t = {v: w for i in range(1, len(b.dims)) for v, w in zip(src.dims[i], b.dims[i])}
    new = subst(replace(src.expr, {raw("seg", src.dims[0][0]): row}), t)
    if src.dims[0][0] in new.free:
        raise Refused("the row number inside an expert's segment is used")
    return Value(b.dims, where(eq(key_at(order, perm(order, row)), const(lo)), new, b.expr))


def _block_scatter(base: Value, src: Value, d: int, start, end, step) -> Value:
    """base[.., i, ..] = src for one block of equal blocks (a select or slice of fixed size written back)."""
    if isinstance(start, Value) or isinstance(end, Value):
        raise Refused("a slice assignment of data-dependent rows")
    if step != 1:
        return _strided_scatter(base, src, d, start or 0, end, step)
    n, start = fixed(base.extent(d), "a slice assignment"), start or 0
    end = n if end is None or end > n else end
    start, end = (start + n if start < 0 else start), (end + n if end < 0 else end)
    size = end - start
    if size == n:
        return _copy_dims(base, src)
    if size <= 0 or start % size or n % size:
        raise Refused("a slice assignment that is not a block of equal blocks")
    b = base.renamed().refine(d, common(base.sizes(d), (n // size, *((size,) if size != 1 else ()))))
    return _write_block(b, src, d, start // size, n // size)


def _strided_scatter(base: Value, src: Value, d: int, start: int, end, step: int) -> Value:
    """base[start::step] = src where step divides the extent: one digit of the index is fixed."""
    n = fixed(base.extent(d), "a slice assignment")
    if n % step or not 0 <= start < step or (end is not None and end < n):
        raise Refused("a strided slice assignment that does not run to the end")
    b = base.renamed().refine(d, common(base.sizes(d), tuple(s for s in (n // step, step) if s != 1)))
    lead: list[Var] = list(b.dims[d])
    last: list[Var] = []
    while prod(v.size for v in last) != step:
        last.insert(0, lead.pop())
    return _written(b, src, d, lead, last, start)


def _copy_dims(base: Value, src: Value) -> Value:
    return Value([v or tuple(x.fresh() for x in d) for v, d in zip(src.dims, base.dims)], src.expr)


def _write_block(b: Value, src: Value, d: int, block: int, blocks: int) -> Value:
    lead: list[Var] = []
    inner = list(b.dims[d])
    while prod(v.size for v in lead) != blocks:
        lead.append(inner.pop(0))
    return _written(b, src, d, inner, lead, block)


def _written(b: Value, src: Value, d: int, inner: list[Var], which: list[Var], at: int) -> Value:
    """b with src where the digits `which` of dimension d are `at`; `inner`: its other digits, which src has."""
    for i in range(len(b.dims)):
        if i != d and b.dims[i]:
            if not src.dims[i]:
                raise Refused("a slice assignment that broadcasts")
            s = common(b.sizes(i), src.sizes(i))
            b, src = b.refine(i, s), src.refine(i, s)
    if tuple(v.size for v in inner) != src.sizes(d):
        src = src.refine(d, tuple(v.size for v in inner))
    table = {v: w for i in range(len(b.dims)) if i != d for v, w in zip(src.dims[i], b.dims[i])}
    table.update(zip(src.dims[d], inner))
    return Value(b.dims, _everywhere(index_of(which), where(eq(index_of(which), const(at)), subst(src.expr, table), b.expr)))


def _everywhere(i: Expr, e: Expr) -> Expr:
    """where([i=1], a, where([i=0], b, c)) with i in 0..1: c is never used."""
    arms: list[tuple[Expr, Expr]] = []
    rest = e
    while rest.op == "where" and rest.args[0].op == "eq" and rest.args[0].args[0] is i and is_const(rest.args[0].args[1]):
        arms.append((rest.args[0], rest.args[1]))
        rest = rest.args[2]
    known = bounds(i)
    if known is None or {c.args[1].args[0] for c, _ in arms} != set(range(*known)):
        return e
    out = arms[-1][1]
    for c, a in reversed(arms[:-1]):
        out = where(c, a, out)
    return out


@rule("select_scatter.default")
def _select_scatter(it, node, base: Value, src: Value, d, i):
    d = dim_of(d, len(base.dims))
    if isinstance(i, Value):
        raise Refused("an assignment to a data-dependent index")
    n = fixed(base.extent(d), "an assignment to an index")
    one = Value((*src.dims[:d], (), *src.dims[d:]), src.expr)
    b = base.renamed()
    if n == 1:
        return _copy_dims(b, one)
    return _write_block(b, one, d, i % n, n)


__all__ = ["ZERO", "overwrite_rows", "scatter_sum"]
