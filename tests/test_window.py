"""The trace of a window: which ATen node holds a value then and now, what is in force where it starts, and no trace left behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Compared, E, H, K, T, block, graph_of, node, rewrite, tokens
from torch.fx import Graph

from moe_compile.passes.decisions import callee, decisions
from moe_compile.passes.lift import opname
from moe_compile.passes.window import Ambient, Trace, ambients, collect, is_size


def traced(fn, *args, grad=False, visit=None, dynamic=False):
    """(the graph, the trace of all of it)"""
    gm = graph_of(fn, *args, grad=grad, dynamic=dynamic)
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder",))
    body, inputs = collect(first, None)
    trace = Trace(gm, body, inputs, Ambient(grad))
    states = {}

    def look(trace, n):
        states[n] = {m: trace.now(m) for m in trace.ran}
        return bool(visit and visit(trace, n))

    trace.run(look)
    return gm, trace, states


# ---------------------------------------------------------------- values, then and now
def test_an_in_place_op_moves_a_value_on():
    def fn(x):
        y = x * 2
        z = y.add(1)
        y.add_(5)
        return y + z

    gm, trace, states = traced(fn, torch.randn(3))
    y, write = node(gm, "mul"), node(gm, "add_")
    assert opname(trace.at_def[y]) == "mul.Tensor"
    assert states[node(gm, "add")][y] is trace.at_def[y]
    assert states[write][y] is not trace.at_def[y]
    assert states[write][y] is trace.at_def[write]  # y.add_ gives out y


def test_a_write_through_a_view_reaches_every_name():
    def fn(x):
        y = x * 2
        row = y[0]
        flat = y.view(-1)
        row.zero_()
        return y, flat

    gm, trace, states = traced(fn, torch.randn(2, 3))
    last = states[node(gm, "zero_")]
    for name in ("mul", "view"):
        n = node(gm, name)
        assert last[n] is not trace.at_def[n], name


def test_a_write_to_an_input_is_seen():
    def fn(x):
        x.mul_(2)
        return x + 1

    gm, trace, _ = traced(fn, torch.randn(3))
    x = gm.graph.find_nodes(op="placeholder")[0]
    assert trace.env[x] is not None
    assert trace.at_def[x].op == "placeholder"


def test_results_of_several_tensors_are_held_by_several_nodes():
    gm, trace, _ = traced(lambda x: x.topk(2)[0] + x.topk(2)[1], torch.randn(3, 4))
    held = trace.at_def[node(gm, "topk")]
    assert [opname(h) for h in held] == ["getitem", "getitem"]
    assert trace.node_of(node(gm, "topk")) is None


def test_every_aten_node_belongs_to_the_node_that_made_it():
    def fn(x, w):
        return F.silu(F.linear(x, w)).sum(-1)

    gm, trace, _ = traced(fn, torch.randn(3, 4), torch.randn(5, 4))
    for name in ("linear", "silu", "sum"):
        made = trace.created[node(gm, name)]
        assert made, name
        assert all(trace.owner[a] is node(gm, name) for a in made)
    assert "mm.default" in [opname(a) for a in trace.created[node(gm, "linear")]]


def test_it_stops_where_the_visitor_has_seen_enough():
    gm, trace, _ = traced(lambda x: x.relu().tanh().exp(), torch.randn(3), visit=lambda t, n: callee(n) == "tanh")
    assert [callee(n) for n in trace.ran] == ["relu", "tanh"]
    assert node(gm, "exp") not in trace.created


def test_nothing_is_executed_on_real_tensors_and_the_graph_is_not_touched():
    x = torch.randn(3)
    before = x.clone()
    gm, _, _ = traced(lambda x: x.mul_(2), x)
    assert torch.equal(x, before * 2)  # Dynamo's own run, once
    assert [callee(n) for n in gm.graph.nodes if n.op == "call_method"] == ["mul_"]


# ---------------------------------------------------------------- what a window is made of
def test_untouched_constants_are_computed_inside_and_touched_ones_are_inputs():
    def fn(x):
        a, b = torch.zeros(T, H), torch.zeros(T, H)
        b[0] = 1
        ids = F.linear(x, torch.ones(E, H)).topk(K)[1]
        a[0] = 2
        return a + b + ids.sum()

    gm = graph_of(fn, tokens())
    (d,) = decisions(gm.graph)
    body, inputs = collect(d.ids.next, None)
    a, b = (n for n in gm.graph.nodes if callee(n) == "zeros")
    assert a in body
    assert b in inputs
    assert d.ids in inputs
    assert body.index(a) < body.index(node(gm, "setitem", 1))


def test_a_window_ends_before_the_node_it_is_told():
    gm = graph_of(lambda x: x.relu().tanh().exp(), torch.randn(3))
    body, inputs = collect(node(gm, "relu"), node(gm, "exp"))
    assert [callee(n) for n in body] == ["relu", "tanh"]
    assert [n.op for n in inputs] == ["placeholder"]


# ---------------------------------------------------------------- gradient mode and autocast
def test_what_is_in_force_before_each_node():
    def fn(x):
        a = x.relu()
        with torch.no_grad():
            b = x.tanh()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                c = x.exp()
        return a + b + c.sigmoid()

    gm = graph_of(fn, torch.randn(3), grad=True)
    state = ambients(gm.graph, True)
    found = {name: state[node(gm, name)] for name in ("relu", "tanh", "exp", "sigmoid")}
    assert {n: a.grad for n, a in found.items()} == {"relu": True, "tanh": False, "exp": False, "sigmoid": True}
    assert {n: len(a.autocast) for n, a in found.items()} == {"relu": 0, "tanh": 0, "exp": 1, "sigmoid": 0}


def test_nested_autocast_regions_close_in_order():
    g = Graph()
    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    a = g.call_function(enter, ("cpu", torch.bfloat16, True, None))
    b = g.call_function(enter, ("cpu", torch.float16, True, None))
    g.call_function(leave, (b,))
    c = g.call_function(leave, (a,))
    end = g.output(())
    state = ambients(g, True)
    assert [state[n].autocast for n in (b, c, end)] == [(a,), (a,), ()]


def test_ops_without_gradient_are_marked():
    def fn(x):
        with torch.no_grad():
            y = x.tanh()
        return y + x.relu()

    _, trace, _ = traced(fn, torch.randn(3), grad=True)
    marked = {callee(n): [bool(a.meta.get("no_grad")) for a in trace.created[n]] for n in trace.ran if trace.created.get(n)}
    assert marked["tanh"] == [True]
    assert marked["relu"] == [False]


class Boom(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_autocast_and_gradient_mode_are_as_before_whatever_happens(fails):
    def fn(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            y = F.linear(x, w)
            return y.exp()

    def visit(trace, n):
        if callee(n) == "linear":
            assert torch.is_autocast_enabled("cpu")
            if fails:
                raise Boom
        return callee(n) == "linear"  # in the middle of the region

    with torch.enable_grad():
        try:
            traced(fn, torch.randn(3, 4), torch.randn(5, 4), grad=True, visit=visit)
        except Boom:
            assert fails
        assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_shows_as_casts():
    def fn(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, w)

    gm, trace, _ = traced(fn, torch.randn(3, 4), torch.randn(5, 4))
    assert [opname(a) for a in trace.created[node(gm, "linear")]].count("_to_copy.default") == 2


# ---------------------------------------------------------------- symbolic token counts
def test_no_guards_from_analysis_under_dynamic_shapes():
    """The counts of tokens, each with a graph of its own only if the original has one."""
    c = Compared(Block(), tokens(), dynamic=True)
    assert c.rewritten == 1
    for count in (2, 3, 16, 33, 100, 257):
        c(tokens(count=count))
    assert len(c.inner.graphs) == 1


def test_the_analysis_adds_no_guard_and_no_symbol():
    gm = graph_of(Block(), tokens(), dynamic=True)
    env = next(v.fake_mode.shape_env for n in gm.graph.nodes if isinstance(v := n.meta.get("example_value"), torch.Tensor))
    guards, pending = len(env.guards), len(env.pending_fresh_unbacked_symbols)
    report = rewrite(gm)
    assert [r.rewritten for r in report.regions] == [True]
    assert len(env.guards) == guards
    assert len(env.pending_fresh_unbacked_symbols) == pending


def test_sizes_are_arithmetic_on_what_the_inputs_tell():
    def fn(x):
        n = x.shape[0] * 2
        return x.new_zeros(n), torch.nonzero(x[:, 0]).shape[0]

    gm = graph_of(fn, torch.randn(6, 4), dynamic=True)
    sizes = [n for n in gm.graph.nodes if n.op == "call_function" and is_size(n)]
    assert sizes
    assert not any(is_size(n) for n in gm.graph.nodes if "nonzero" in n.name)


def test_a_float_attribute_is_a_constant_of_the_formula():
    """Under dynamic=True Dynamo makes it a symbol; another value must recompile and must not give the old result."""

    def expert(self, x, e):
        return F.linear(F.linear(x, self.up[e]).clamp(max=self.limit), self.down[e])

    module = block(Block.forward, expert=expert, limit=0.25)
    c = Compared(module, tokens(), dynamic=True)
    c.eager.limit = c.module.limit = 0.5
    c(tokens(4))
    c(tokens(5, count=11))
