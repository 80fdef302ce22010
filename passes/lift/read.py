"""Read the MoE formula off the value of a node: which ids, slots, weights and program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .algebra import cases, mul, refresh
from .beside import apart
from .expr import ONE, Expr, Refused, Var, factors, is_const, loads, raw, subexprs, terms
from .index import inside
from .listed import unlisted
from .merge import select
from .normal import First, gather_experts, is_id, leftovers, merge_selects, num_ids, spread, sum_slots, used_ids
from .program import Builder, Param
from .ranks import collapse, counted
from .sizes import prod, quotient
from .value import Value

NOTHING_SUMMED = "no sum over experts"
_BUFFERS = ("routing machinery", "several sums", "experts are selected by several")
NO_WEIGHT = "no expert weight is selected by an id"


@dataclass
class Formula:
    """out[rows, feat] = sum over slots of weight * program(x[rows]; ids[rows, slots])  + rest, all as expressions.

    `weight` None: unweighted.  `inner`: the routing weight that the program itself uses as `w`, None if it does not.
    `summed` False: out[rows, slots, feat], the slots' rows as they are (nobody adds them up, or only later).
    `frozen`: what the program reads only where no gradient flows ("x", "w", "mm0", "b1"): it gets none, not zeros.
    """

    dims: tuple[tuple[Var, ...], ...]
    rows: list[Var]
    slots: list[Var]
    feat: tuple[Var, ...]
    ids: Expr
    weight: Expr | None
    inner: Expr | None
    x: Expr
    x_feat: tuple[Var, ...]
    program: str
    weights: list[Param]
    biases: list[Param]
    num_experts: int
    rest: list[Expr] = field(default_factory=list)
    dtype: Any = None
    summed: bool = True
    frozen: frozenset[str] = frozenset()

    @property
    def top_k(self) -> int:
        return prod(v.size for v in self.slots)

    def score(self) -> tuple[bool, bool, bool, int]:
        """Prefer the node of all rows, after the sum over the slots, after the weighting, and of the most slots."""
        summed = (self.summed and bool(self.slots)) or bool(self._columns())
        return self.parts() == 1, summed, self.weight is not None, self.top_k

    def parts(self) -> int:
        """How many parts the rows come in, where the code takes a part by its number: one sequence of a batch after the other."""
        chosen = [x for x in loads(self.ids) if x.args[0].range is not None]
        taken = [n for x in chosen for a, n in zip(x.args[1:-1], x.args[0].shape[:-1]) if is_const(a) and isinstance(n, int)]
        return prod(taken)  # type: ignore[no-any-return]

    def partial(self) -> bool:
        """Are there slots that nothing was computed of, as where code goes through them one by one?"""
        return any(self.top_k < n for n in self._columns())

    def _columns(self) -> list[int]:
        """Of how many slots one or some were taken by their number."""
        chosen = [x for x in loads(self.ids) if x.args[0].range is not None]
        taken = [x for x in chosen if is_const(x.args[-1]) or (x.args[-1] in self.slots and x.args[-1].size != x.args[0].shape[-1])]
        return [x.args[0].shape[-1] for x in taken if isinstance(x.args[0].shape[-1], int)]


def read(value: Value, dtype: torch.dtype, first: First | None = None) -> Formula:
    """Value of a node -> Formula, or Refused with the reason.

    first: of the ids, those that have an expert with linear layers; for the others the experts' op gives zero.
    """
    try:
        return _read(value, dtype, first)
    except Refused as e:
        if not str(e).startswith(_BUFFERS) or not counted(value.expr):
            raise
        raise Refused(f"{e} (it counts positions, as code with a capacity does: each buffer row must be one slot's token)") from e


_MACHINES = {
    "count": "a count of tokens or ids", "perm": "a sorted order", "inv": "the order before sorting", "coord": "rows that a mask finds",
    "seg": "an expert's part of sorted rows", "below": "a running count", "scat": "a scatter", "rows": "a number of rows",
    "undef": "memory that nothing was written to", "moved": "the places of sorted rows", "nth": "the numbers of sorted rows",
}  # fmt: skip


def _read(value: Value, dtype: torch.dtype, first: First | None) -> Formula:
    value = _parts_together(_split_rows(value))
    rows = _rows(value)
    expr, rest = _one_term(collapse(unlisted(value.expr)), rows, first)
    expr, others = apart(collapse(merge_selects(expr)), rows)
    rest = rest + others
    if bad := leftovers(expr):
        if not used_ids(expr, rows):
            raise Refused(NOTHING_SUMMED)
        raise Refused("routing machinery is left in the formula: " + ", ".join(_MACHINES.get(op, op) for op in sorted(bad)))
    expr = _drop_cast(expr, dtype)
    slots, body = _peel_slots(_push_constants(expr), rows)
    ids = _selector(body, rows)
    for strip in (False, True):
        builder = Builder(rows, slots, ids, strip_casts=strip)
        try:
            return _formula(value, builder, _drop_cast(body, dtype), rest, dtype, first)
        except Refused as e:
            if strip or "different inputs" not in str(e):
                raise
    raise Refused("the expert's layers read different inputs")


def _rows(value: Value) -> list[Var]:
    return [v for d in value.dims[:-1] for v in d]


def _split_rows(value: Value) -> Value:
    """Rows that are read as (row div n, row mod n) are two variables: a token and a slot."""
    for x in subexprs(value.expr):
        if x.op in ("idiv", "mod") and isinstance(x.args[0], Var):
            for i, d in enumerate(value.dims[:-1]):
                if d == (x.args[0],) and (q := quotient(d[0].size, x.args[1])) is not None:
                    return _split_rows(value.refine(i, (q, x.args[1])))
    return value


def _parts_together(value: Value) -> Value:
    """Rows that were computed in parts, one sequence of a batch after the other: one expression of the part's number."""
    for v in _rows(value):
        parts = value.expr.args[1:] if value.expr.op == "sel" and value.expr.args[0] is v else cases(v, value.expr)
        if parts and len(parts) == v.size:
            together = select(v, *parts)
            return value if together.op == "sel" else Value(value.dims, together)
    return value


def _one_term(expr: Expr, rows: list[Var], first: First | None) -> tuple[Expr, list[Expr]]:
    """The term that sums over the experts, and the others (a residual, a shared expert, where the accumulator started)."""
    expr = spread(expr)
    found, rest = gather_experts(expr, first, rows)
    if found is not None:
        return found, rest
    if first is not None:
        raise Refused(NOTHING_SUMMED)
    ts = terms(expr)
    mine = [t for t in ts if used_ids(t, rows) or leftovers(t) or _selects(t)]
    if not mine:
        raise Refused(NOTHING_SUMMED)
    return mine[0] if len(mine) == 1 else sum_slots(mine, rows), [t for t in ts if t not in mine]


def _selects(e: Expr) -> bool:
    return any(x.op in ("sel", "where") and any(is_id(a) for a in subexprs(x)) for x in subexprs(e))


def _drop_cast(e: Expr, dtype: torch.dtype) -> Expr:
    """Rounding each slot's row to the output's dtype before the sum: we sum in float32 and round once."""
    while e.op == "cast" and (e.args[1] == dtype or e.args[1] == torch.float32):
        e = e.args[0]
    if e.op == "mul":  # w * cast(y, float32): the combine widens by itself
        return mul(*[f.args[0] if f.op == "cast" and f.args[1] == torch.float32 and _matrix(f) else f for f in e.args])
    return e


def _matrix(e: Expr) -> bool:
    return e.args[0].op == "sum" or (e.args[0].op == "add" and any(t.op == "sum" for t in e.args[0].args))


def _push_constants(expr: Expr) -> Expr:
    """c * sum f  ->  sum c * f"""
    numbers = [f for f in factors(expr) if is_const(f)]
    others = [f for f in factors(expr) if not is_const(f)]
    if not numbers or len(others) != 1 or others[0].op != "sum":
        return expr
    v, body = others[0].args
    return raw("sum", v, _push_constants(mul(*numbers, body)))


def _peel_slots(expr: Expr, rows: list[Var]) -> tuple[list[Var], Expr]:
    """Open the sums over slots: those whose variable the ids depend on."""
    bound = []
    while expr.op == "sum":
        v, expr = refresh(expr)
        bound.append(v)
    ids = used_ids(expr, rows)
    slots = [v for v in bound if any(v in i.free for i in ids)]
    if any(not isinstance(v.size, int) for v in slots):
        raise Refused("a sum over tokens of the experts' outputs")
    for v in reversed([v for v in bound if v not in slots]):  # sums commute: those over features go inside
        expr = raw("sum", v, expr)
    return slots, expr


def _selector(body: Expr, rows: list[Var]) -> Expr:
    """The one routing id by which parameters are selected."""
    ids = used_ids(body, rows)
    if len(ids) != 1:
        several = "experts are selected by several different ids: choices made one after the other, not side by side in one tensor"
        raise Refused(several if ids else NO_WEIGHT)
    return ids[0]


def _formula(value: Value, b: Builder, body: Expr, rest: list[Expr], dtype: torch.dtype, first: First | None) -> Formula:
    feat = value.dims[-1] if value.dims else ()
    weight: list[Expr] = []
    f: list[Expr] = []
    for x in factors(body):
        (weight if not x.free & set(feat) and not b.has_expert(x) else f).append(x)
    numbers = [x for x in weight if is_const(x)]
    if len(numbers) == len(weight):  # no routing weight: a constant factor belongs to the experts
        f, weight = numbers + f, []
    text = b.vec(mul(*f), feat)
    if not b.weights or b.x is None:
        raise Refused("no linear layer of the selected expert")
    n = _num_experts(b, first)
    _no_capture(b, rest, feat)
    w = mul(*weight) if weight else None
    if n < num_ids(b.ids):
        _no_table(b, [*weight, *([b.w] if b.w is not None else [])])
    rows, slots = _unsummed(b)
    frozen = frozenset(b.used - b.live)
    return Formula(
        value.dims,
        rows,
        slots,
        feat,
        b.ids,
        w,
        b.w,
        b.x[0],
        b.x[1],
        text,
        b.weights,
        b.biases,
        n,
        rest,
        dtype,
        not slots or bool(b.slots),
        frozen,
    )


def _num_experts(b: Builder, first: First | None) -> int:
    """The experts that the weights are of; the first of them, where ids run over fewer or select nothing beyond them."""
    have = {p.num_experts for p in b.weights + b.biases}
    fits = all(isinstance(x, int) and x >= (first.count if first is not None else num_ids(b.ids)) for x in have)
    if not fits:
        raise Refused(f"weights of {' and '.join(sorted(map(str, have)))} experts for ids that run over 0..{num_ids(b.ids) - 1}")
    return first.count if first is not None else have.pop() if len(have) == 1 else num_ids(b.ids)  # type: ignore[return-value]


def _no_table(b: Builder, weight: list[Expr]) -> None:
    """No tensor is read at an id that has no expert."""
    for x in (x for w in weight for x in loads(w)):
        if x is not b.ids and any(b.ids in subexprs(a) and not inside(a, n) for a, n in zip(x.args[1:], x.args[0].shape)):
            raise Refused(f"{x.args[0]} has no value for ids without an expert")


def _unsummed(b: Builder) -> tuple[list[Var], list[Var]]:
    """Without a sum over slots: trailing row variables that choose among experts for the same token are its slots."""
    rows, slots = list(b.rows), list(b.slots)
    assert b.x is not None
    while not b.slots and len(rows) > 1 and rows[-1] not in b.x[0].free and isinstance(rows[-1].size, int) and rows[-1].size <= 64:
        slots.insert(0, rows.pop())
    return rows, slots


def _no_capture(b: Builder, rest: list[Expr], feat: tuple[Var, ...]) -> None:
    """Everything must be a function of the root's own indices."""
    assert b.x is not None
    allowed = set(b.rows)
    if not b.x[0].free <= allowed | set(b.x[1]):
        raise Refused("the experts' input depends on more than the token")
    for e in (b.ids, *([b.w] if b.w is not None else [])):
        if not e.free <= allowed | set(b.slots):
            raise Refused("the routing depends on more than the token and the slot")
    for e in rest:
        if not e.free <= allowed | set(feat) or leftovers(e):
            raise Refused("a term beside the experts depends on the routing")


__all__ = ["ONE", "Formula", "loads", "read"]
