"""Reading by index: substitution, once the index is proved to be in range."""

from __future__ import annotations

from ..algebra import replace, subst
from ..expr import ZERO, Enum, Expr, Refused, raw
from ..index import digits
from ..sizes import at_most
from ..value import Value, broadcast
from ._base import dim_of, rule
from .mask import enumerate_, expand_masks, in_rows, where_hit
from .reordered import moved_rows


@rule("index.Tensor")
def _index(it, node, x: Value, idx):
    return gather_rows(x, expand_masks(idx, node.args[1]))


def gather_rows(x: Value, idx: list) -> Value:
    """x[idx], idx being one index (or None) for each of the leading dimensions."""
    used = [i for i, v in enumerate(idx) if v is not None]
    dims, es = broadcast(*[idx[i] for i in used])
    if {v for d in dims for v in d} & set(x.vars()):
        x = x.renamed()
    table: dict = {}
    moved: dict = {}
    for i, e in zip(used, es):
        if (rows := moved_rows(x, i, e)) is not None:
            moved |= rows
        elif not in_rows(e, x.extent(i)):
            raise Refused("a gather by an index whose range is not known")
        elif x.dims[i]:
            table.update(zip(x.dims[i], digits(e, x.sizes(i))))
    first = used[0] if used == list(range(used[0], used[0] + len(used))) else 0
    before = [d for i, d in enumerate(x.dims) if i not in used and i < first]
    after = [d for i, d in enumerate(x.dims) if i not in used and i >= first]
    e = _moved(subst(x.expr, table), moved)
    for r in {v for d in dims for v in d if isinstance(v.domain, Enum)} & e.free:
        e = where_hit(e, r)
    return Value([*before, *dims, *after], e)


def _moved(e: Expr, rows: dict[Expr, Expr]) -> Expr:
    """e with rows of a mask in another order: it must be a function of their coordinates."""
    e = replace(e, rows) if rows else e
    if any(r in e.free for coord in rows for r in coord.free):
        raise Refused("the number of an enumerated row is used")
    return e


@rule("index_select.default")
def _index_select(it, node, x: Value, d, idx: Value):
    return gather_rows(x, [None] * dim_of(d, len(x.dims)) + [idx])


@rule("embedding.default")
def _embedding(it, node, w: Value, idx: Value, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    if it.training and (padding_idx >= 0 or scale_grad_by_freq or sparse):
        raise Refused("an embedding whose gradient is not that of a gather")
    return gather_rows(w, [idx])


@rule("gather.default")
def _gather(it, node, x: Value, d, idx: Value, **k):
    d = dim_of(d, len(x.dims))
    for i in range(len(x.dims)):
        if i != d and None not in idx.sizes(i) + x.sizes(i) and not at_most(idx.extent(i), x.extent(i)):
            raise Refused("a gather out of range")
    if set(idx.vars()) & set(x.vars()):
        idx = idx.renamed()
    table: dict = {}
    for i, dim in enumerate(x.dims):
        if not dim:
            continue
        e = idx.expr if i == d else idx.index(i) if idx.dims[i] else ZERO
        if not (i != d and None in x.sizes(i)) and not in_rows(e, x.extent(i)):
            raise Refused("a gather by an index whose range is not known")
        table.update(zip(dim, digits(e, x.sizes(i))))
    return Value(idx.dims, subst(x.expr, table))


@rule("masked_select.default")
def _masked_select(it, node, x: Value, mask: Value):
    dims, (e, m) = broadcast(x, mask)
    r = enumerate_(Value(dims, m))
    return gather_rows(Value(dims, e), [Value(((r,),), raw("coord", r, j)) for j in range(len(dims))])
