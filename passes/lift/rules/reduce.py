"""Sums, counts, matrix products."""

from __future__ import annotations

import torch

from ..algebra import add, compare, distinct_slots, eq, mul, orders_of, refresh, same_rows, subst, sum_, zero_or_one
from ..expr import ONE, ZERO, Expr, Order, Rank, Refused, Total, Var, const, factors, is_const, loads, make_order, raw, terms
from ..index import below, bounds, count, inside, inv, is_bool, is_int, mix, perm
from ..sizes import Size, prod
from ..value import Value, broadcast, common
from ._base import dim_of, fixed, out_shape, rule
from .segments import key_at


def _dims(ds, n: int) -> list[int]:
    if ds is None or ds == []:
        return list(range(n))
    return sorted(dim_of(d, n) for d in ([ds] if isinstance(ds, int) else ds))


@rule("sum.dim_IntList", "sum.default")
def _sum(it, node, x: Value, ds=None, keepdim=False, dtype=None):
    if dtype is not None and node is not None and dtype.is_floating_point and dtype != node.args[0].meta["val"].dtype:
        from .pointwise import cast

        x = Value(x.dims, cast(x.expr, dtype))
    return _reduced(x, _dims(ds, len(x.dims)), keepdim, _total(x.expr, [v for d in _dims(ds, len(x.dims)) for v in x.dims[d]]))


def _reduced(x: Value, ds: list[int], keepdim: bool, e: Expr) -> Value:
    return Value([() if i in ds else d for i, d in enumerate(x.dims) if keepdim or i not in ds], e)


def total(x: Value) -> Expr:
    """Sum over all dimensions."""
    return _total(x.expr, x.vars())


def _total(e: Expr, vs: list[Var]) -> Expr:
    if vs and (c := counted(e, vs)):
        return count(*c)
    for v in vs:
        n = v.fresh()
        e = sum_(n, subst(e, {v: n}))
    return e


@rule("any.dim", "any.dims", "any.default")
def _any(it, node, x: Value, ds=None, keepdim=False):
    if node.args[0].meta["val"].dtype != torch.bool:
        raise Refused("any over something that is not a truth value")
    ds = _dims(ds, len(x.dims))
    e = _total(x.expr, [v for d in ds for v in x.dims[d]])
    one_at_most = is_bool(e) or (e.op == "sum" and distinct_slots(e) and is_bool(e.args[1]))
    return _reduced(x, ds, keepdim, e if one_at_most else compare("ne", e, ZERO))


@rule("count_nonzero.dim_IntList", "count_nonzero.default")
def _count_nonzero(it, node, x: Value, ds=None):
    hit = x.expr if is_bool(x.expr) else compare("ne", x.expr, ZERO)
    return _sum(it, node, Value(x.dims, hit), ds)


@rule("mean.dim")
def _mean(it, node, x: Value, ds, keepdim=False, dtype=None):
    ds = _dims(ds, len(x.dims))
    n = fixed(prod(x.extent(d) for d in ds), "a mean")
    s = _sum(it, node, x, ds, keepdim, dtype)
    return Value(s.dims, mul(const(1 / n), s.expr))


def _as_count(e: Expr, vs: list[Var]) -> tuple[Order, Expr] | None:
    """[key(vs) = other]: (order of the key, other)."""
    if e.op != "eq":
        return None
    for key, other in (e.args, e.args[::-1]):
        if key.op == "load" and set(vs) == set(key.free) and not set(vs) & set(other.free):
            return make_order(list(vs), key), other
    return None


def counted(e: Expr, vs: list[Var]) -> tuple[Order, Expr] | None:
    """sum over vs of sum_k [key(vs, k) = other] (a one-hot or scattered 1 summed over tokens)."""
    extra = []
    while e.op == "sum":
        v, e = refresh(e)
        extra.append(v)
    return _as_count(e, list(vs) + extra[::-1])


@rule("histc.default", "bincount.default")
def _histogram(it, node, x: Value, *args, **kw):
    if "histc" in str(node.target):
        bins, lo, hi = list(args) + [100, 0, 0][len(args) :]
    else:
        bins, lo = out_shape(node)[0], 0
        if (args and args[0] is not None) or kw.get("weights") is not None:
            raise Refused("a weighted histogram")
        if bins is None:  # minlength decides, as the ids are proved to be smaller
            bins = kw.get("minlength", args[1] if len(args) > 1 else 0)
        hi = (bins or 0) - 1
    key = _unsorted(x)
    b = bounds(key.expr)
    if lo != 0 or not is_int(key.expr) or not b or b[0] < 0 or not isinstance(b[1], int) or b[1] > bins or hi not in (bins - 1, bins):
        raise Refused("a histogram whose bins are not one per expert id")
    if hi == bins - 1 and "histc" in str(node.target) and b[1] > bins:
        raise Refused("a histogram whose bins are not one per expert id")
    v = Var(bins)
    return Value(((v,),), count(make_order(key.vars(), key.expr), v))


def _unsorted(x: Value) -> Value:
    """The same multiset of keys in unsorted order."""
    vs = x.vars()
    if len(vs) == 1 and (order := next((o for o in orders_of(x.expr, vs[0]) if same_rows(o, vs[0])), None)):
        new = [Var(n) for n in order.sizes]
        e = subst(x.expr, {vs[0]: inv(order, mix(*[y for v in new for y in (v, v.size)]))})
        return Value((tuple(new),), e)
    return x


@rule("cumsum.default")
def _cumsum(it, node, x: Value, d, **k):
    e = x.expr
    if zero_or_one(e):
        d = dim_of(d, len(x.dims))
        return x if x.extent(d) == 1 else _running_count(it, node, x, d)
    if len(x.dims) != 1 or e.op != "count" or len(x.dims[0]) != 1:
        raise Refused("a cumsum of something else than token counts or a mask of tokens")
    v, at = x.dims[0][0], e.args[1]
    if at is not v or (bounds(e.args[0].expr) or (-1,))[0] < 0:
        raise Refused("a cumsum of counts that do not start at expert 0")
    return Value(x.dims, below(e.args[0], add(v, ONE)))


def _running_count(it, node, x: Value, d: int) -> Value:
    """Positions of tokens among those of a mask: a tensor of the model's own, of which is known what it counts."""
    n = x.extent(d)
    if not _holds_count(node, n):
        raise Refused(f"a running count of {n} rows in {str(node.meta['val'].dtype).removeprefix('torch.')}, which may not hold it")
    counts, mask = it.leaf(node), x.renamed()
    leaf = counts.expr.args[0]
    leaf.integer, leaf.rank = True, Rank(mask.dims, mask.expr, d)
    leaf.limits = (0, n + 1) if isinstance(n, int) else None
    return counts


def _holds_count(node, n: Size) -> bool:
    """Is a count of n places at most exact in the node's dtype?"""
    from .pointwise import largest_exact

    limit = largest_exact(node.meta["val"].dtype)
    return n is not None and (n <= limit if isinstance(n, int) else limit >= 2**24)


@rule("add.Tensor")
def _add(it, node, a, b, **kw):
    """A count in all that is added to a running count stays a tensor, too: second choices stand behind all first ones."""
    from .pointwise import added

    if _limited(a) or _limited(b):  # a third choice stands behind the counts of both others
        a, b = _in_all(it, node.args[0], a), _in_all(it, node.args[1], b)
    elif _reads_count(a):
        b = _in_all(it, node.args[1], b)
    elif _reads_count(b):
        a = _in_all(it, node.args[0], a)
    return added(it, node, a, b, **kw)


def _reads_count(x) -> bool:
    return isinstance(x, Value) and any(y.args[0].rank is not None for t in terms(x.expr) for f in factors(t) for y in loads(f))


def _limited(x) -> bool:
    """Is it a count in all of tests for room?"""
    return (
        isinstance(x, Value) and (parts := _counted_in_all(x.expr)) is not None and any(y.args[0].rank is not None for y in loads(parts[1]))
    )


def _in_all(it, node, x) -> Value:
    """x as it is, or a closed tensor of which is known what it counts."""
    if not isinstance(x, Value) or (parts := _counted_in_all(x.expr)) is None or not _holds_count(node, prod(v.size for v in parts[0])):
        return x
    x = x.renamed()
    over, mask = _counted_in_all(x.expr)  # type: ignore[misc]
    out = it.leaf(node)
    leaf, n = out.expr.args[0], prod(v.size for v in over)
    leaf.integer, leaf.total = True, Total(x.dims, over, mask)
    leaf.limits = (0, n + 1) if isinstance(n, int) else None
    return out


def _counted_in_all(e: Expr) -> tuple[list[Var], Expr] | None:
    """(places, what must hold there) of a sum of tests."""
    if e.op == "count":
        order, at = e.args
        new = {v: v.fresh() for v in order.vars}
        return list(new.values()), eq(subst(order.expr, new), at)
    over = []
    while e.op == "sum":
        v, e = refresh(e)
        over.append(v)
    return (over, e) if over and is_bool(e) else None


@rule("searchsorted.Tensor")
def _searchsorted(it, node, keys: Value, values: Value, out_int32=False, right=False, side=None, sorter=None):
    """First position of each id among the sorted ids: the offsets."""
    right = right or side == "right"
    if len(keys.dims) != 1 or len(keys.dims[0]) != 1 or sorter is not None:
        raise Refused("searchsorted of another form")
    (r,) = keys.dims[0]
    order = next((o for o in orders_of(keys.expr, r) if same_rows(o, r)), None)
    if order is None or (bounds(order.expr) or (-1,))[0] < 0 or keys.expr is not key_at(order, perm(order, r)) or not is_int(values.expr):
        raise Refused("searchsorted in something else than sorted ids")
    return Value(values.dims, below(order, add(values.expr, ONE) if right else values.expr))


# ---------------------------------------------------------------- matrix products
@rule("mm.default", "bmm.default", "matmul.default")
def _mm(it, node, a: Value, b: Value):
    return contract(a, b)


@rule("mv.default")
def _mv(it, node, a: Value, b: Value):
    m = contract(a, Value((b.dims[0], ()), b.expr))
    return Value(m.dims[:-1], m.expr)


@rule("dot.default")
def _dot(it, node, a: Value, b: Value):
    m = contract(Value(((), a.dims[0]), a.expr), Value((b.dims[0], ()), b.expr))
    return Value((), m.expr)


def contract(a: Value, b: Value) -> Value:
    """Batched matrix product: the last dim of a with the last but one of b."""
    sizes = common(a.sizes(-1 + len(a.dims)), b.sizes(len(b.dims) - 2)) if a.dims[-1] or b.dims[-2] else ()
    a, b = a.refine(len(a.dims) - 1, sizes), b.refine(len(b.dims) - 2, sizes)
    k = tuple(Var(v.size, v.domain) for v in a.dims[-1])
    left = Value((*a.dims[:-1], (), k), subst(a.expr, dict(zip(a.dims[-1], k))))
    right_k = tuple(Var(v.size, v.domain) for v in b.dims[-2])
    right = Value((*b.dims[:-2], (), b.dims[-1], right_k), subst(b.expr, dict(zip(b.dims[-2], right_k))))
    dims, (x, y) = broadcast(left, right)
    e = mul(x, y)
    for v in dims[-1]:
        e = sum_(v, e)
    return Value(dims[:-1], e)


@rule("addmm.default", "baddbmm.default")
def _addmm(it, node, c: Value, a: Value, b: Value, beta=1, alpha=1):
    dims, (x, y) = broadcast(contract(a, b), c)
    return Value(dims, add(mul(const(alpha), x), mul(const(beta), y)) if (alpha, beta) != (1, 1) else add(x, y))


@rule("convolution.default")
def _convolution(it, node, x: Value, w: Value, b, stride, padding, dilation, transposed, output_padding, groups):
    """A kernel of one place is a linear layer over the channels."""
    if transposed or groups != 1 or any(s != 1 for s in stride) or any(padding) or any(w.extent(i) != 1 for i in range(2, len(w.dims))):
        raise Refused("a convolution over several places, in steps or in groups")
    rows = Value((x.dims[0], *x.dims[2:], x.dims[1]), x.expr)
    out = contract(rows, Value((*[()] * (len(x.dims) - 2), w.dims[1], w.dims[0]), w.expr))
    if b is not None:
        dims, (y, z) = broadcast(out, b)
        out = Value(dims, add(y, z))
    return Value((out.dims[0], out.dims[-1], *out.dims[1:-1]), out.expr)


@rule("_grouped_mm.default", "transformers.grouped_mm_fallback.default")
def _grouped_mm(it, node, a: Value, b: Value, offs: Value | None = None, bias=None, out_dtype=None):
    """Row r takes the matrix of its group; the group of a sorted row is its key."""
    if offs is None or len(a.dims) != 2 or len(b.dims) != 3 or bias is not None or len(offs.dims) != 1 or len(offs.dims[0]) != 1:
        raise Refused("a grouped_mm of another form")
    order = _offsets_order(offs, a)
    if len(a.dims[0]) != 1:
        a = Value(((Var(a.extent(0)),), a.dims[1]), a.expr) if not a.dims[0] else a.refine(0, (a.extent(0),))
    if len(a.dims[0]) != 1:
        raise Refused("grouped_mm rows that are not one sorted dimension")
    r = a.dims[0][0]
    w = Value(b.dims[1:], b.at(0, key_at(order, perm(order, r))))
    sizes = common(a.sizes(1), w.sizes(0))
    a2, w2 = a.refine(1, sizes), w.refine(0, sizes)
    k = [v.fresh() for v in a2.dims[1]]
    e = mul(subst(a2.expr, dict(zip(a2.dims[1], k))), subst(w2.expr, dict(zip(w2.dims[0], k))))
    for v in k:
        e = sum_(v, e)
    return Value((a2.dims[0], w2.dims[1]), e)


def _offsets_order(offs: Value, a: Value) -> Order:
    e = offs.expr
    if e.op != "below" or e.args[1] is not add(offs.dims[0][0], ONE) or not inside(e.args[0].expr, offs.extent(0)):
        raise Refused("grouped_mm offsets that are not the running token counts of the experts")
    if a.extent(0) != prod(e.args[0].sizes):
        raise Refused("grouped_mm rows that are not those counted")
    return e.args[0]


# ---------------------------------------------------------------- softmax over the slots
@rule("_softmax.default")
def _softmax(it, node, x: Value, d, half_to_float=False):
    """Softmax over the experts of scores that are -inf but for the slots is the softmax over the slots, scattered."""
    d = dim_of(d, len(x.dims))
    e = x.expr
    if e.op != "scat" or len(x.dims[d]) != 1 or not is_const(e.args[3], float("-inf")) or not isinstance(e.args[0], Var):
        raise Refused("a softmax that is not over the slots of a token (one over features, inside of an expert, has no kernel)")
    k, test, src, _ = e.args
    if x.dims[d][0] not in test.free or x.dims[d][0] in src.free or not distinct_slots(raw("sum", k, test)):
        raise Refused("a softmax over scattered slots of another form")
    inner = k.fresh()
    return Value(x.dims, sum_(k, mul(test, raw("softmax", inner, subst(src, {k: inner}), k))))


# ---------------------------------------------------------------- numbers taken out of tensors
@rule("_local_scalar_dense.default", "item.default")
def _item(it, node, x: Value):
    return Value((), x.expr)


@rule("add", "sym_sum")
def _add_sizes(it, node, *args):
    xs = args[0] if len(args) == 1 else args
    return Value((), add(*[x.expr if isinstance(x, Value) else const(x) for x in xs]))


@rule("mul")
def _mul_sizes(it, node, *args):
    return Value((), mul(*[x.expr if isinstance(x, Value) else const(x) for x in args]))


@rule("sub")
def _sub_sizes(it, node, a, b):
    from .segments import all_rows

    n = all_rows(b)
    have = a.expr.args[0] if isinstance(a, Value) and a.expr.op in ("size", "const") else a
    if n is None or isinstance(have, Value):
        raise Refused("arithmetic on data-dependent sizes")
    return Value(
        (),
        ZERO if have == n else const(have - n) if isinstance(have, int) and isinstance(n, int) else raw("size", have - n),
    )


@rule("sym_size.int")
def _sym_size(it, node, x: Value, d):
    """Only ever used in shapes, which the rules take from the fake tensors."""
    return Value((), raw("rows", *x.dims[dim_of(d, len(x.dims))]))
