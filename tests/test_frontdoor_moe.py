"""`@moe_compile.moe`: a marked module is a region of its own wherever it is used, and otherwise what it was."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import moe_compile
from moe_compile import passes
from moe_compile.report import GraphReport, RegionReport

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """Stands for an MoE block: its graph breaks at `nonzero` unless the capture flags are on."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        out = torch.zeros_like(x)
        rows = torch.nonzero(x[:, 0] > 0)[:, 0]
        return out.index_add(0, rows, self.gate(x)[rows] * scale)


@moe_compile.moe(inner="eager")
class Marked(Block):
    pass


class ByInstance(Block):
    pass


class Outer(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.before, self.moe = nn.Linear(8, 8), moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(self.before(x)) + 1


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graphs(monkeypatch):
    """The number of calls of `nonzero` and of nodes in each graph that our backend gets."""
    seen = []

    def run(gm, options, inputs=()):
        names = [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
        seen.append((names.count("nonzero"), names.count("linear")))
        return GraphReport(regions=[RegionReport(True)])

    monkeypatch.setattr(passes, "run", run, raising=False)
    return seen


def expected(model, x):
    moe = model.moe
    return Block.forward(moe, model.before(x)) + 1


def test_in_an_eager_model_the_block_alone_is_compiled(graphs, x):
    model = Outer(Marked())
    torch.testing.assert_close(model(x), expected(model, x))
    assert graphs == [(1, 1)]


def test_inside_moe_compile_it_is_inlined(graphs, x):
    model = Outer(Marked())
    torch.testing.assert_close(moe_compile.compile(model, inner="eager")(x), expected(model, x))
    assert graphs == [(1, 2)]


@pytest.mark.parametrize("backend", ["eager", "moe_compile"])
def test_inside_torch_compile_it_stays_a_region_behind_a_graph_break(graphs, x, backend):
    model = Outer(Marked())
    options = {"inner": "eager"} if backend == "moe_compile" else None
    torch.testing.assert_close(torch.compile(model, backend=backend, options=options)(x), expected(model, x))
    assert (1, 1) in graphs


def test_inside_fullgraph_it_is_inlined(graphs, x):
    model = Outer(Marked())
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected(model, x))
    assert graphs == []


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_the_plain_forward(graphs, x, strict):
    model = Outer(Marked())
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), expected(model, x))
    assert graphs == []


def test_marking_an_instance_leaves_its_class_mates_alone(graphs, x):
    marked, plain = Outer(moe_compile.moe(ByInstance(), inner="eager")), Outer(ByInstance())
    torch.testing.assert_close(plain(x), expected(plain, x))
    assert graphs == []
    torch.testing.assert_close(marked(x), expected(marked, x))
    assert graphs == [(1, 1)]


def test_module_is_what_it_was(x):
    block, plain = Marked(), Block()
    assert list(block.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in block.named_parameters()] == ["gate.weight", "gate.bias"]
    assert isinstance(block, Marked)
    assert isinstance(block, Block)
    assert type(block).__name__ == "Marked"
    assert inspect.signature(block.forward) == inspect.signature(plain.forward)
    block.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("make", [Marked, lambda: moe_compile.moe(ByInstance(), inner="eager")])
def test_copies_and_pickles_are_marked_modules_of_their_own(graphs, x, make):
    block = make()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        with torch.no_grad():
            other.gate.weight.zero_()
        graphs.clear()
        torch.testing.assert_close(other(x), Block.forward(other, x))
        assert not torch.equal(other(x), block(x))


def test_keyword_arguments_and_gradients_pass_through(graphs, x):
    block, plain = Marked(), Block()
    plain.load_state_dict(block.state_dict())
    block(x, scale=2.0).sum().backward()
    plain(x, scale=2.0).sum().backward()
    torch.testing.assert_close(block.gate.weight.grad, plain.gate.weight.grad)


def test_many_instances_share_one_compilation(graphs, x):
    for _ in range(12):
        block = Marked()
        torch.testing.assert_close(block(x), Block.forward(block, x))
    assert len(graphs) == 1


def test_marking_twice_is_once_and_other_options_are_an_error():
    block = moe_compile.moe(ByInstance(), inner="eager")
    forward = type(block).forward
    assert moe_compile.moe(block, inner="eager") is block
    assert type(block).forward is forward
    with pytest.raises(ValueError, match="already marked"):
        moe_compile.moe(ByInstance(), inner="aot_eager")


def test_only_module_classes_of_ones_own_can_be_marked():
    with pytest.raises(TypeError, match=r"nn\.Module class or instance"):
        moe_compile.moe(lambda x: x)
    with pytest.raises(TypeError, match="torch's own Sequential"):
        moe_compile.moe(nn.Sequential())
