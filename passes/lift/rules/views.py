"""Views: renaming, splitting and selecting dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from ..algebra import compare, sub, subst, where
from ..expr import ONE, ZERO, Expr, Refused, Var, const, is_const, raw
from ..index import below, inside, mix, sel
from ..ranks import counted
from ..sizes import Size, prod, quotient
from ..value import Value, broadcast, common
from ._base import RULES, dim_of, filled, fixed, out_shape, rule
from .segments import cat_rows, cat_segments, rows_between, split_counts


@rule("view.default", "_unsafe_view.default", "reshape.default")
def _view(it, node, x: Value, shape):
    out = _counted(x, out_shape(node))
    if None in out or any(v.size is None for v in x.vars()):
        return _view_rows(x, out)
    flat = Value((tuple(x.vars()),), x.expr)
    done = flat.refine(0, common(flat.sizes(0), tuple(n for n in out if n != 1)))
    return Value(group(list(done.dims[0]), out), done.expr)


def _counted(x: Value, out: list[Size]) -> list[Size]:
    """The one extent that the trace could not name follows from all others, where we know the rows."""
    if out.count(None) != 1 or any(v.size is None for v in x.vars()):
        return out
    missing = quotient(prod(v.size for v in x.vars()), prod(n for n in out if n is not None))
    return [missing if n is None else n for n in out]


def group(atoms: list[Var], shape: list[Size]) -> list[tuple[Var, ...]]:
    """Deal the variables out to dimensions of the given extents."""
    dims = []
    for n in shape:
        d: list[Var] = []
        while prod(v.size for v in d) != n:
            if not atoms:
                raise Refused(f"a view to {shape} does not follow the factors of its source")
            d.append(atoms.pop(0))
        dims.append(tuple(d))
    return dims


def _view_rows(x: Value, out: list[Size]) -> Value:
    """A view that only adds or drops dimensions of size 1, its rows being data-dependent."""
    src = [(d, prod(v.size for v in d)) for d in x.dims if d]
    want = [n for n in out if n != 1]
    if len(src) != len(want) or any(a is not None and a != b for (_, a), b in zip(src, want)):
        return _view_of_one(x, out)
    dims = iter(src)
    return Value([() if n == 1 else next(dims)[0] for n in out], x.expr)


def _view_of_one(x: Value, out: list[Size]) -> Value:
    """A view in which one extent is data-dependent: all others take what they have from the left and from the right, it has the rest."""
    if out.count(None) != 1 or sum(v.size is None for v in x.vars()) != 1:
        raise Refused("a view merges a data-dependent dimension with another")
    atoms, at = x.vars(), out.index(None)
    before = group(atoms, out[:at])
    atoms.reverse()
    after = [d[::-1] for d in group(atoms, out[:at:-1])]
    if all(v.size is not None for v in atoms):
        raise Refused("a view merges a data-dependent dimension with another")
    return Value([*before, tuple(reversed(atoms)), *reversed(after)], x.expr)


@rule("t.default")
def _t(it, node, x: Value):
    return Value(x.dims[::-1], x.expr)


@rule("transpose.int")
def _transpose(it, node, x: Value, a, b):
    d = list(x.dims)
    d[a], d[b] = d[b], d[a]
    return Value(d, x.expr)


@rule("permute.default")
def _permute(it, node, x: Value, order):
    return Value([x.dims[i] for i in order], x.expr)


@rule("unsqueeze.default")
def _unsqueeze(it, node, x: Value, d):
    d = dim_of(d, len(x.dims) + 1)
    return Value((*x.dims[:d], (), *x.dims[d:]), x.expr)


@rule("squeeze.dim", "squeeze.dims", "squeeze.default")
def _squeeze(it, node, x: Value, d=None):
    n = len(x.dims)
    ds = range(n) if d is None else [dim_of(i, n) for i in (d if isinstance(d, list | tuple) else [d])]
    return Value([v for i, v in enumerate(x.dims) if i not in ds or v], x.expr)


@rule("expand.default")
def _expand(it, node, x: Value, shape, implicit=False):
    out = out_shape(node)
    dims = ((),) * (len(out) - len(x.dims)) + x.dims
    if any(not d and n is None for d, n in zip(dims, out)):
        raise Refused("an expand to a data-dependent size")
    return Value([d if d or n == 1 else (Var(n),) for d, n in zip(dims, out)], x.expr)


@rule("repeat.default")
def _repeat(it, node, x: Value, reps):
    out = out_shape(node)
    dims = ((),) * (len(out) - len(x.dims)) + x.dims
    new = []
    for d, n, times in zip(dims, out, reps):
        r = times if isinstance(times, int) else quotient(n, prod(v.size for v in d))
        if r is None:
            raise Refused("a repeat of a data-dependent dimension")
        new.append(((Var(r),) if r != 1 else ()) + tuple(d))
    return Value(new, x.expr)


@rule("repeat_interleave.self_int")
def _repeat_interleave(it, node, x: Value, n, dim=None, **k):
    if not isinstance(n, int):
        raise Refused("repeat_interleave by a data-dependent number")
    if dim is None:
        x, dim = Value((tuple(x.vars()),), x.expr), 0
    d = dim_of(dim, len(x.dims))
    return Value((*x.dims[:d], (*x.dims[d], *((Var(n),) if n != 1 else ())), *x.dims[d + 1 :]), x.expr)


@rule("flip.default")
def _flip(it, node, x: Value, ds):
    e = x.expr
    for d in ds:
        d = dim_of(d, len(x.dims))
        n = fixed(x.extent(d), "flip")
        if len(x.dims[d]) != 1 or n > 64:
            raise Refused("a flip of another dimension than a short one")
        v = x.dims[d][0]
        e = subst(e, {v: sel(v, *[const(n - 1 - i) for i in range(n)])})
    return Value(x.dims, e)


@rule("select.int")
def _select(it, node, x: Value, d, i):
    d = dim_of(d, len(x.dims))
    if isinstance(i, int):
        n = x.extent(d)
        e: Expr = const(i if i >= 0 else i + fixed(n, "a negative index"))
    else:
        e = i.expr
        if not inside(e, x.extent(d)):
            raise Refused("a select by an index whose range is not known")
    return Value(x.dims[:d] + x.dims[d + 1 :], x.at(d, e))


@rule("unbind.int")
def _unbind(it, node, x: Value, d=0):
    return [_select(it, node, x, d, i) for i in range(len(node.meta["val"]))]


@rule("slice.Tensor")
def _slice(it, node, x: Value, d=0, start=None, end=None, step=1):
    d = dim_of(d, len(x.dims))
    n = x.extent(d)
    start = _number(start)
    if step == 1 and start in (0, None) and n is not None and out_shape(node)[d] == n:
        return x
    if isinstance(start, Value) or isinstance(end, Value):
        return rows_between(x, d, start, end)
    start, full = start or 0, end is None or end >= 2**62
    if n is None:
        raise Refused("a slice of a data-dependent dimension")
    size = fixed(n, "a slice")
    start = max(start + size, 0) if start < 0 else min(start, size)
    end = size if full else min(end + size if end < 0 else end, size)
    return window(x, d, size, start, max(-(-(end - start) // step), 0), step)


def _number(v):
    return v.expr.args[0] if isinstance(v, Value) and is_const(v.expr) else v


def window(x: Value, d: int, n: int, start: int, size: int, step: int = 1) -> Value:
    """x[start : start + size*step : step] along d."""
    if size == n:
        return x
    v = Var(size) if size != 1 else None
    i: Expr = v if v is not None else ZERO
    if size and step == 1 and start % size == 0 and n % size == 0:
        e = mix(const(start // size), n // size, i, size)
    elif start < step and n == size * step:
        e = mix(i, size, const(start), step)
    elif step == 1 and len(x.dims[d]) == 1 and size:
        e = _offset(i, start)
    else:
        raise Refused("a slice that is not a block of equal blocks")
    return Value((*x.dims[:d], (v,) if v is not None else (), *x.dims[d + 1 :]), x.at(d, e))


def _offset(i: Expr, start: int) -> Expr:
    from ..algebra import add

    return add(i, const(start))


def _split(x: Value, d: int, sizes: list[int]) -> list[Value]:
    n, a, out = fixed(x.extent(d), "a split"), 0, []
    for s in sizes:
        out.append(window(x, d, n, a, s))
        a += s
    return out


@rule("split.Tensor")
def _split_even(it, node, x: Value, size, d=0):
    d = dim_of(d, len(x.dims))
    n = fixed(x.extent(d), "a split")
    return _split(x, d, [min(size, n - a) for a in range(0, n, size)])


@rule("split_with_sizes.default")
def _split_sizes(it, node, x: Value, sizes, d=0):
    d = dim_of(d, len(x.dims))
    sizes = [_number(s) for s in sizes]
    if all(isinstance(s, int) for s in sizes):
        return _split(x, d, sizes)
    return split_counts(x, d, [s.expr if isinstance(s, Value) else const(s) for s in sizes])


@rule("cat.default")
def _cat(it, node, xs, d=0):
    d = dim_of(d, len(xs[0].dims))
    xs = [x for x in xs if 0 not in x.sizes(d)]
    if len(xs) == 1:
        return xs[0]
    domains = [x.dims[d][0].domain if len(x.dims[d]) == 1 else None for x in xs]
    if any(domains):
        return _cat_rows(xs, d, domains)
    sizes = [x.extent(d) for x in xs]
    if None in sizes:
        raise Refused("a cat along a data-dependent dimension")
    if len(set(sizes)) > 1:
        return cat_parts(xs, d, sizes) if any(counted(x.expr) for x in xs) else cat_offsets(xs, d, sizes)
    which = Var(len(xs))
    parts = [Value((*x.dims[:d], (), *x.dims[d + 1 :]), x.expr) for x in xs] if sizes[0] == 1 else xs
    dims, es = broadcast(*parts)
    return Value([*dims[:d], (which, *dims[d]), *dims[d + 1 :]], sel(which, *es))


def _cat_rows(xs: list[Value], d: int, domains: list):
    from ..expr import Enum, Segment

    if all(isinstance(s, Segment) for s in domains):
        return cat_segments(xs, d, domains)
    if all(isinstance(s, Enum) and s.parent for s in domains):
        return cat_rows(xs, d, domains)
    raise Refused("a cat of data-dependent rows that are not the experts' segments")


def cat_parts(xs: list[Value], d: int, sizes: list[Size]) -> Value:
    """cat([rows of the experts' buffers, a row of zeros]): which part an index is in is compared with where the parts end."""
    p = Var(_plus(sizes))
    end: Size = 0
    parts = []
    for x, n in zip(xs, sizes):
        e = x.at(d, sub(p, _as_expr(end)))
        end = _plus([end, n])
        parts.append((end, Value((*x.dims[:d], (), *x.dims[d + 1 :]), e)))
    dims, es = broadcast(*[x for _, x in parts])
    out = es[-1]
    for (last, _), e in reversed(list(zip(parts[:-1], es[:-1]))):
        out = where(compare("lt", p, _as_expr(last)), e, out)
    return Value((*dims[:d], (p,), *dims[d + 1 :]), out)


@rule("constant_pad_nd.default")
def _pad(it, node, x: Value, pad, value=0):
    """A row of zeros behind the rows of the experts' buffers, as `cat` would put it there."""
    n = len(x.dims)
    if is_const(x.expr, value):
        return filled(node, x.expr)
    behind = {n - 1 - i // 2: amount for i, amount in enumerate(pad) if amount}
    if len(behind) != 1 or any(pad[::2]) or not all(isinstance(a, int) and a > 0 for a in behind.values()) or not counted(x.expr):
        raise Refused("padding")
    ((d, amount),) = behind.items()
    return cat_parts([x, Value([()] * n, const(value))], d, [x.extent(d), amount])


def _plus(sizes: Sequence[Size]) -> Size:
    return sum(sizes)


def _as_expr(n: Size) -> Expr:
    return const(n) if isinstance(n, int) else raw("size", n)


def cat_offsets(xs: list[Value], d: int, sizes: list[Size]) -> Value:
    """cat([0, cumsum]): the same offsets shifted by one."""
    if len(xs) != 2 or sizes[0] != 1 or len(xs[0].dims) != 1 or not is_const(xs[0].expr, 0) or len(xs[1].dims[0]) != 1:
        raise Refused("a cat of unequal parts")
    e, (v,) = xs[1].expr, xs[1].dims[0]
    if e.op != "below" or e.args[1] is not raw("add", v, ONE):
        raise Refused("a cat of unequal parts")
    n = Var(fixed(v.size, "expert offsets") + 1)
    return Value(((n,),), below(e.args[0], n))


@rule("stack.default")
def _stack(it, node, xs, d=0):
    d = dim_of(d, len(xs[0].dims) + 1)
    return RULES["cat.default"](it, node, [Value((*x.dims[:d], (), *x.dims[d:]), x.expr) for x in xs], d)


@rule("diagonal.default")
def _diagonal(it, node, x: Value, *a, **k):
    raise Refused("a diagonal")
