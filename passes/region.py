"""From a routing decision to a region that can be replaced: formula, root, and which nodes fall with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .decisions import Decision, callee, returns_itself, tensor_of, writes_to
from .lift import Formula, Interp, Refused, fresh_table, opname, read
from .lift.expr import Expr, Leaf, loads
from .lift.normal import PARTIAL, First, Partial
from .lift.places import tensor, told
from .lift.quantized import NUMBERS
from .lift.read import NO_WEIGHT, NOTHING_SUMMED
from .lift.sizes import shape_of
from .liveness import Liveness, same_storage
from .window import Ambient, Trace, collect, is_size

NO_EXPERTS = "nothing after this decision sums over experts"
PATIENCE = 40  # nodes looked at after a region was found: the weighting and the sum over slots may still come


@dataclass
class MoERegion:
    """The canonical form of one MoE block of a Dynamo graph.

    root: the node after which the block's output stands; target: the tensor that root writes in place, None if root's result is new.
    code: the window's Dynamo nodes in program order up to root; nodes: those of them that are more than arithmetic on sizes;
    inputs: what they read from outside.
    trace, interp: the ATen graph behind them, for emission and liveness.
    """

    decision: Decision
    formula: Formula
    root: Node
    target: Node | None
    code: list[Node]
    inputs: list[Node]
    trace: Trace
    interp: Interp
    root_value: Node
    now: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = [n for n in self.code if not is_size(n)]

    @property
    def scales(self) -> set[Node]:
        """What holds scales of quantised weights: dequantisation gives them no gradient (emission refuses where one is wanted)."""
        return self._holding(s.param.leaf for p in self.formula.weights if p.format for s in p.format.scales)

    def chosen_beside(self, decisions: dict[Node, Decision]) -> list[Node]:
        """The ids of other decisions that the experts are selected by."""
        atens = {a for x in loads(self.formula.ids) for a in x.args[0].nodes}
        mine = (n for n in [*self.inputs, *self.code] if n in decisions and n is not self.decision.ids)
        return [n for n in mine if self.trace.at_def.get(n) in atens]

    @property
    def exponents(self) -> set[Node]:
        """What holds scales as exponents. Where weights are not looked into, any byte may be one."""
        found = self._holding(s.param.leaf for p in self.formula.weights if p.format and p.format.kind == "mxfp4" for s in p.format.scales)
        return set(self.inputs) if self.interp.closed else found | self._dequantised(1, "mxfp4")

    @property
    def numbers(self) -> set[Node]:
        """What holds bytes of quantised weights or their scales."""
        found = self._holding(p.leaf for p in self.formula.weights if p.format)
        return found | self.exponents | self._dequantised(0, "")

    def _holding(self, leaves: Iterable[Leaf]) -> set[Node]:
        atens = {a for leaf in leaves for a in leaf.nodes}
        return {n for n in self.inputs if self.trace.at_def.get(n) in atens}

    def _dequantised(self, argument: int, kind: str) -> set[Node]:
        """The inputs behind an argument of every dequantize_experts in the user's own code."""
        made = [n for n in self.nodes if callee(n) == "dequantize_experts" and len(n.args) > argument and kind in str(n.args[2:])]
        return {_source(n.args[argument]) for n in made}

    @property
    def liveness(self) -> Liveness:
        return Liveness(self.trace, self.nodes, self.inputs, self.now, self.root, self.root_value)


def _source(n: Any) -> Any:
    """What a node is a view of, as far as first arguments tell."""
    while isinstance(n, Node) and n.op in ("call_function", "call_method") and n.args and isinstance(n.args[0], Node):
        n = n.args[0]
    return n


# ---------------------------------------------------------------- finding
class _Search:
    """Visitor of a trace: reads every candidate value, keeps the best formula."""

    def __init__(self, decision: Decision, others: dict[Node, Decision], training: bool, closed: bool = False, first: First | None = None):
        self.decision, self.others, self.training, self.closed = decision, others, training, closed
        self.first = first  # read(): the experts that there are, where an earlier search has seen no more
        self.seen: First | None = None
        self.interp: Interp | None = None
        self.best: MoERegion | None = None
        self.patience = PATIENCE
        self.visited = 0
        self.why = NO_EXPERTS
        self.after: set[Node] = set()
        self._last: Node | None = None

    def __call__(self, trace: Trace, n: Node) -> bool:
        if self.interp is None:
            self._start(trace)
        assert self.interp is not None
        if n in self.others and isinstance(trace.at_def[n], Node):
            self.interp.facts[trace.at_def[n]] = self.others[n].facts  # a second choice that masks the first one out
        self.visited += 1
        self.patience -= self.best is not None
        if self.patience < 0:
            return True
        holder, value = self._candidate(trace, n)
        if value is None or not self._downstream(value):
            return False
        self._look_at(trace, n, holder, value)
        if isinstance(holder, Node) and (whole := _whole(n, holder)) is not None and isinstance(now := trace.now(whole), Node):
            self._downstream(now)
            self._look_at(trace, n, whole, now)
        return False

    def _look_at(self, trace: Trace, n: Node, holder: Node | None, value: Node) -> None:
        val = value.meta.get("val")
        if isinstance(val, torch.Tensor) and val.dtype.is_floating_point and val.dim() >= 2:
            self._try(trace, n, holder, value, val)

    def _start(self, trace: Trace) -> None:
        facts = {}
        for n in trace.inputs:
            if n in self.others and isinstance(trace.at_def[n], Node):
                facts[trace.at_def[n]] = self.others[n].facts
        ids = trace.at_def[self.decision.ids]
        self.interp = Interp(ids, facts, self.training, self.closed)
        self.interp.constant = trace.constant
        self.interp.before = {ids}  # everything else before is an input of the trace, a leaf by itself
        self.after = {ids}
        self._last = trace.tracer.graph._root.next

    def _candidate(self, trace: Trace, n: Node) -> tuple[Node | None, Node | None]:
        """(the tensor written in place or None, the ATen node of the value)."""
        if len(written := writes_to(n)) == 1:
            target = written[0]
            while returns_itself(target) and target.args and isinstance(target.args[0], Node):
                target = target.args[0]  # out += y gives out another name
            now = trace.now(target)
            return target, now if isinstance(now, Node) else None
        return None, trace.node_of(n)

    def _downstream(self, a: Node) -> bool:
        """Does the value depend on the routing decision?  Extends the set over the ATen nodes made since the last question."""
        assert self._last is not None
        n = self._last.next
        while n.op != "root":
            if any(x in self.after for x in n.all_input_nodes):
                self.after.add(n)
            self._last, n = n, n.next
        return a in self.after

    def _try(self, trace: Trace, n: Node, target: Node | None, value: Node, val: torch.Tensor) -> None:
        assert self.interp is not None
        try:
            formula = read(self.interp.value(value), val.dtype, self.first)
        except Refused as e:
            if str(e) not in (NOTHING_SUMMED, NO_WEIGHT):
                self.why, self.seen = f"{told(n)}: {e}", e.first if isinstance(e, Partial) else None
            elif str(e) == NO_WEIGHT and PARTIAL in self.why:  # the whole sum is there by now, and fails for another reason
                self.why = f"{told(n)}: the experts are not made of linear layers, as far as can be seen"
            return
        if self.best is None or formula.score() > self.best.formula.score():
            self.best = self._region(trace, n, target, value, formula)
            # the next slot's code is as long as this one's, and that of the next part of the rows
            again = max(2 * formula.partial(), formula.parts() if formula.parts() > 1 else 0)
            self.patience = max(PATIENCE, again * self.visited)

    def _region(self, trace: Trace, n: Node, target: Node | None, value: Node, formula: Formula) -> MoERegion:
        assert self.interp is not None
        device = value.meta["val"].device.type
        trace.autocast_at_root = device if torch.is_autocast_enabled(device) else None
        now = {m: a for m in [*trace.inputs, *trace.ran] if isinstance(a := trace.now(m), Node)}
        read = {a for m in trace.ran for a in m.all_input_nodes}
        inputs = [m for m in trace.inputs if m in read or callee(m) == "_enter_autocast"]  # what comes behind the block may read others
        return MoERegion(self.decision, formula, n, target, list(trace.ran), inputs, trace, self.interp, value, now)

    def reasons(self) -> list[str]:
        it = self.interp
        return [] if it is None else [f"{told(a)} ({opname(a)}): {r}" for a, r in it.reasons.items() if a in self.after]


def _whole(n: Node, part: Node) -> Node | None:
    """What a part that n writes to is the last part of: `out[b][mask] += y` ends a loop over the sequences of a batch."""
    if callee(part) not in ("getitem", "select") or n.users or len(part.args) < 2 or not isinstance(part.args[0], Node):
        return None
    source, at = tensor_of(part.args[0]), part.args[-1]
    dim = part.args[1] if callee(part) == "select" else 0
    if source is None or not isinstance(at, int) or not isinstance(dim, int) or not same_storage(part, part.args[0]):
        return None
    return part.args[0] if at in (-1, shape_of(source)[dim] - 1) else None


def find_region(
    gm: GraphModule,
    decision: Decision,
    others: dict[Node, Decision],
    until: Node | None,
    ambient: Ambient,
    training: bool,
) -> MoERegion:
    """Lift what follows one routing decision.  Raises Refused with the reason why it is no MoE block that we can replace."""
    first = decision.ids.next
    nodes, inputs = collect(first, until)
    if decision.ids not in inputs:
        raise Refused("the chosen ids are not used")
    training = _flows(nodes, ambient, training)
    search = _Search(decision, others, training)
    trace = Trace(gm, nodes, inputs, ambient)
    trace.run(search)
    if search.best is None and search.seen is not None and trace.ended is None:  # not one for each id: ids without an expert add nothing
        search = _Search(decision, others, training, first=search.seen)
        trace = Trace(gm, nodes, inputs, ambient)
        trace.run(search)
    if search.best is None and any(t.dtype in NUMBERS and t.dim() > 1 for n in inputs if (t := tensor_of(n)) is not None):
        again = _Search(decision, others, training, closed=True)
        trace = Trace(gm, nodes, inputs, ambient)
        trace.run(again)
        search = again if again.best is not None else search
    if search.best is None:
        raise Refused(trace.ended or "; ".join([search.why, *search.reasons()[:2]]))
    _no_hidden_alias(search.best)
    return search.best


def _no_hidden_alias(region: MoERegion) -> None:
    """The trace gives every input storage of its own; that is wrong if one is changed in place and another is a view of it."""
    for n in region.inputs:
        if n in region.now and region.now[n] is not region.trace.at_def[n]:
            twins = [m for m in region.inputs if m is not n and tensor_of(m) is not None and same_storage(m, n)]
            if twins:
                raise Refused(f"{tensor(n)} is changed in place and {tensor(twins[0])} is a view of the same memory")


def _flows(nodes: list[Node], ambient: Ambient, training: bool) -> bool:
    """Do gradients flow anywhere in the window?"""
    return training and (ambient.grad or any(callee(n) == "_set_grad_enabled" and n.args[0] for n in nodes))


__all__ = ["MoERegion", "find_region", "fresh_table"]


def dtype_of(e: Expr) -> Any:
    """The dtype of an expression that is a tensor's element, maybe cast: float32 or wider where several meet."""
    if e.op == "cast":
        return e.args[1]
    found = None
    for load in [e] if e.op == "load" else loads(e):
        val = load.args[0].nodes[0].meta.get("val")
        if isinstance(val, torch.Tensor) and val.dtype.is_floating_point:
            found = val.dtype if found is None else torch.promote_types(found, val.dtype)
    return found or torch.float32
