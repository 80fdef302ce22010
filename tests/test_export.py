"""moe_compile.rewrite: exported programs stay programs that run, train, save and load; graphs stay graphs. The given one is not touched."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Dense, E, H, I, calls, tokens
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile
from moe_compile.report import RewriteReport

ROWS = ({0: Dim("T", min=2, max=640)},)
STAGES = ["quantize_dispatch", "permute_experts_unpermute", "combine"]


class NoGradMask(Block):
    """As transformers writes it: the mask is made without gradients, a region of its own in an exported program."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, H)
        w, ids = self.route(x)
        with torch.no_grad():
            mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in range(E):
            slot, tok = torch.where(mask[e])
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out.reshape(shape)


class TwoLayers(nn.Module):
    """Two blocks with residuals, and a buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = NoGradMask(), NoGradMask()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y = self.first(x) + x
        return self.second(y) + y


class Linears(nn.Module):
    """Experts that are modules of nn.Linear, which symbolic_trace calls as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)) for _ in range(E))
        self.unread = nn.Linear(2, 2)

    def forward(self, x):  # no annotations: as strings, they keep a symbolic trace from being pickled
        b, s, h = x.shape
        x = x.view(-1, h)
        w, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.experts[e](x[tok]) * w[tok, slot, None])
        return out.view(b, s, h)


def exported(module: nn.Module | None = None, decomposed: bool = False, **kwargs) -> ExportedProgram:
    program = export(module or Block(), (tokens(),), dynamic_shapes=ROWS, **kwargs)
    return program.run_decompositions() if decomposed else program


def rewritten(program, blocks: int = 1, **kwargs):
    """The rewritten program, which the given one's text and that of its parts outlives."""
    before, report = str(program) + str(program.graph), RewriteReport()
    new = moe_compile.rewrite(program, report=report, **kwargs)
    assert len(report.rewritten) == blocks, str(report)
    assert str(program) + str(program.graph) == before
    return new


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def same(a, b, *inputs) -> None:
    torch.testing.assert_close(a(*inputs), b(*inputs), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- exported programs
@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_model_keeps_its_sizes_buffers_and_names(decomposed):
    sizes = {0: Dim("B", min=2, max=64), 1: Dim("S", min=2, max=64)}
    program = export(TwoLayers(), (torch.randn(3, 5, H),), dynamic_shapes=(sizes,))
    program = program.run_decompositions() if decomposed else program
    new = rewritten(program, 2)
    assert calls(new.graph_module, *STAGES) == STAGES * 2
    assert not calls(new.graph_module, "index_add_", "index_add", "index_put", "nonzero", "wrap_with_set_grad_enabled")
    assert not any(str(symbol).startswith("u") for symbol in new.range_constraints)
    assert new.state_dict.keys() == program.state_dict.keys()
    assert all(new.state_dict[name] is program.state_dict[name] for name in ("first.up", "count"))
    runs, wants = new.module(), program.module()
    for batch, length in ((3, 5), (2, 9)):
        same(runs, wants, torch.randn(batch, length, H))
    assert program.state_dict["count"] == 4  # theirs together
    with pytest.raises(AssertionError, match="Guard failed"):
        runs(torch.randn(65, 4, H))


@pytest.mark.parametrize("decomposed", [False, True])
def test_saved_and_loaded_before_and_after(decomposed):
    module = NoGradMask()
    program = exported(module, decomposed)
    same(saved_and_loaded(rewritten(program)).module(), module, tokens(5, 40))
    same(rewritten(saved_and_loaded(program)).module(), module, tokens(5, 40))


def test_a_rewritten_program_is_decomposed_and_rewritten_again():
    new = rewritten(exported())
    same(new.run_decompositions().module(), Block(), tokens())
    same(rewritten(new, 0).module(), Block(), tokens())


@pytest.mark.parametrize("base", [Block, Dense, NoGradMask])
def test_gradients_of_a_rewritten_program(base):
    module, x = base(), tokens(5, 40)
    runs = rewritten(exported(module)).module()
    want, got = (f(x).square().sum().backward() or {n: p.grad for n, p in f.named_parameters()} for f in (base(), runs))
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_an_autocast_region_stays_one():
    class Autocast(Dense):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.loop(x, *self.route(x))
            return y.float() + 1

    program = exported(Autocast())
    new = rewritten(program)
    assert not torch.is_autocast_enabled("cpu")
    assert "wrap_with_autocast" in calls(new.graph_module)
    torch.testing.assert_close(new.module()(tokens()), program.module()(tokens()), rtol=3e-2, atol=3e-2)


def test_modules_whose_calls_are_kept():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe, self.linear = Block(), nn.Linear(H, H)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.moe(self.linear(x)), x.sum()

    module = Around()
    new = rewritten(exported(module, preserve_module_call_signature=("moe", "linear")))
    apart = torch.export.unflatten(new)
    torch.testing.assert_close(apart(tokens()), module(tokens()))


def test_quantised_weights_are_constants_of_the_program():
    module = Block()
    with torch.no_grad():
        program = exported(module)
        new = rewritten(program, quant="fp8")
    assert sorted(new.constants.keys() - program.constants.keys()) == [f"moe_quantised_{i}" for i in range(4)]
    assert new.state_dict.keys() == program.state_dict.keys()
    x = tokens(5, 40)
    again, want = saved_and_loaded(new).module()(x), module(x)
    torch.testing.assert_close(again, new.module()(x))
    assert 0.005 < (again - want).norm() / want.norm() < 0.1


def test_over_ranks_the_sizes_of_an_exchange_are_symbols(rank_of):
    parallel = rank_of(0, 3)
    with torch.no_grad():
        new = saved_and_loaded(rewritten(exported(), parallel=parallel))
    assert calls(new.graph_module, "quantize_dispatch", "permute_experts_combine", "combine")
    assert all(limits.lower >= 0 for limits in new.range_constraints.values())


@pytest.mark.inductor
def test_ahead_of_time(tmp_path):
    module = Block()
    with torch.no_grad():
        new = rewritten(exported(module))
        path = torch._inductor.aoti_compile_and_package(new, package_path=str(tmp_path / "moe.pt2"))
        runs = torch._inductor.aoti_load_package(path)
        same(runs, module, tokens(5, 40))


# ---------------------------------------------------------------- graphs
def test_a_symbolic_trace_gets_shapes_from_example_inputs():
    module = Linears()
    graph = symbolic_trace(module)
    new = rewritten(graph, example_inputs=(torch.randn(2, 5, H),))
    assert calls(new, *STAGES) == STAGES
    assert new.state_dict().keys() == graph.state_dict().keys()
    assert all(a is b for a, b in zip(new.parameters(), graph.parameters(), strict=True))
    for x in (torch.randn(2, 5, H), torch.randn(3, 7, H)):
        same(new, module, x)
        same(pickle.loads(pickle.dumps(new)), module, x)
    new(torch.randn(2, 5, H)).square().sum().backward()
    assert module.experts[0][0].weight.grad is not None


def test_a_graph_with_example_inputs_refuses_sizes_that_were_not_assumed():
    new = rewritten(symbolic_trace(Linears()), example_inputs=(torch.randn(1, 5, H),))
    new(torch.randn(1, 9, H))
    with pytest.raises(AssertionError, match=r"dimension 0 of x must be 1.*example_inputs"):
        new(torch.randn(2, 5, H))
    with pytest.raises(AssertionError, match="dimension 1 of x must be 2 or more"):
        new(torch.randn(1, 1, H))


@pytest.mark.parametrize("mode", ["symbolic", "real"])
def test_a_graph_of_make_fx_stays_one_of_aten(mode):
    module = Block()
    kwargs = {"tracing_mode": mode, "_allow_non_fake_inputs": True}
    graph = make_fx(module, **kwargs)(tokens())
    new = rewritten(graph, **({} if mode == "symbolic" else {"example_inputs": (tokens(),)}))
    assert not [n for n in new.graph.nodes if n.op == "call_method" and n.target != "size"]
    same(new, module, tokens(4, 12))


def test_the_module_of_an_exported_program():
    module = TwoLayers()
    graph = exported(module).module()
    same(rewritten(graph, 2), graph, tokens(4, 12))


def test_a_leaf_module_with_a_hook_or_two_modes_is_left_a_call():
    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.Linear)

    module = Linears()
    module.before, module.after, module.seen = Dropping(H, H), nn.Linear(H, H), []
    module.after.register_forward_hook(lambda m, args, out: module.seen.append(out))
    inner = module.forward

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after, self.inner = module.before, module.after, module

        def forward(self, x: Tensor) -> Tensor:
            return self.after(inner(self.before(x)))

    around = Around().eval()
    graph = GraphModule(around, Leaves().trace(around))
    new = rewritten(graph, example_inputs=(torch.randn(2, 5, H),))
    assert [n.target for n in new.graph.nodes if n.op == "call_module" and "experts" not in n.target] == ["before", "after"]
    x, module.seen[:] = torch.randn(3, 7, H), []
    same(new, around, x)
    assert len(module.seen) == 2


# ---------------------------------------------------------------- nothing, and what cannot be meant
@pytest.mark.parametrize("make", [lambda m, x: export(m, x), lambda m, x: make_fx(m, tracing_mode="symbolic")(*x)])
def test_a_program_without_experts_comes_back_with_the_reason(make):
    program, report = make(nn.ReLU(), (tokens(),)), RewriteReport()
    new = moe_compile.rewrite(program, report=report)
    assert new is not program
    assert isinstance(new, ExportedProgram) == isinstance(program, ExportedProgram)
    assert "no routing decision was found" in str(report)
    same(new.module() if isinstance(new, ExportedProgram) else new, nn.ReLU(), tokens())


def test_a_block_that_is_not_understood_is_left_with_the_reason():
    class Norm(Block):
        def expert(self, x: Tensor, e: int) -> Tensor:
            return super().expert(x.cumprod(0), e)

    module, report = Norm(), RewriteReport()
    new = moe_compile.rewrite(exported(module), report=report)
    assert [r.rewritten for r in report.regions] == [False]
    assert report.regions[0].reason
    same(new.module(), module, tokens())


def test_a_defect_of_ours_costs_nobody_the_program(monkeypatch, fresh_dynamo):
    monkeypatch.setattr("moe_compile.passes.aten.lower", lambda *args, **kwargs: 1 / 0)
    report = RewriteReport()
    new = moe_compile.rewrite(exported(), report=report)
    assert "ZeroDivisionError" in str(report)
    same(new.module(), Block(), tokens())


def test_what_cannot_be_meant():
    with pytest.raises(TypeError, match=r"program is Block; .*torch.export.export"):
        moe_compile.rewrite(Block())
    with pytest.raises(ValueError, match="example_inputs is for a GraphModule"):
        moe_compile.rewrite(exported(), example_inputs=(tokens(),))
    with pytest.raises(ValueError, match=r"no fake tensors.*example_inputs.*\(x\)"):
        moe_compile.rewrite(symbolic_trace(Linears()))
    with pytest.raises(ValueError, match=r"example_inputs has 2 values; give one value for each of its inputs \(x\)"):
        moe_compile.rewrite(symbolic_trace(Linears()), example_inputs=(tokens(), tokens()))
    with pytest.raises(ValueError, match="does not run on fake tensors like example_inputs"):
        moe_compile.rewrite(symbolic_trace(Linears()), example_inputs=(torch.randn(3),))
    with pytest.raises(ValueError, match="validate is 'sometimes'"):
        moe_compile.rewrite(exported(), validate="sometimes")
