"""The ops under torch.compile: opcheck, one compile for all token counts, autocast, Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from ops_cases import value_and_grads, with_grad

from moe_compile.ops import combine, experts, experts_combine, local_experts, quantize_dispatch, route
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.route import Routing

OPS = torch.ops.moe_compile
HIDDEN, INTER, E, K = 16, 8, 4, 2
PROGRAM = f"mm(1, silu(cols(mm(0, x), 0, {INTER}, 1)) * cols(mm(0, x), {INTER}, {2 * INTER}, 1))"

CHECKED = [
    *((route.OP, args) for args in route.sample_inputs()),
    *((quantize_dispatch.OP, (*args, "local")) for args in quantize_dispatch.sample_inputs()),
    *((combine.OP, (*args, "local")) for args in combine.sample_inputs()),
    *((experts.OP, (*args, provider)) for args in experts.sample_inputs() for provider in ("reference", "cpu_grouped")),
    *((local_experts.OP, (*args, "cpu_grouped")) for args in local_experts.sample_inputs()),
    *((experts_combine.OP, (*args, provider)) for args in experts_combine.sample_inputs() for provider in ("reference", "cpu_grouped")),
]


@pytest.mark.parametrize("args", experts_combine.sample_inputs())
def test_opcheck_passes_for_experts_and_combine_in_one(args: tuple[Any, ...]) -> None:
    torch.library.opcheck(experts_combine.OP.overload, (*args, "cpu_grouped"))
    needs = [True, args[3] is not None, *[True] * (len(args[4]) + len(args[5])), args[10] is not None]
    torch.library.opcheck(experts_combine.SAVING_OP.overload, (*args, "cpu_grouped", needs))
    out, saved = experts_combine.SAVING_OP.overload(*args, "cpu_grouped", needs)
    torch.library.opcheck(experts_combine.BACKWARD_OP.overload, (torch.ones_like(out), saved, *args, "cpu_grouped", needs))


@pytest.mark.parametrize(("op", "args"), CHECKED)
def test_opcheck_passes_all_its_tests(op: Any, args: tuple[Any, ...]) -> None:
    own = with_grad(list(args))
    if op is route.OP and own[1] is not None:
        own[1] = own[1].detach()  # the bias chooses only
    torch.library.opcheck(op.overload, tuple(own))


@pytest.mark.parametrize("provider", ["reference", "cpu_grouped"])
@pytest.mark.parametrize("args", experts.sample_inputs())
def test_opcheck_passes_for_the_saving_and_the_backward_op(args: tuple[Any, ...], provider: str) -> None:
    needs = [True, args[3] is not None, *[True] * (len(args[4]) + len(args[5]))]
    torch.library.opcheck(experts.SAVING_OP.overload, (*args, provider, needs))
    y, saved = experts.SAVING_OP.overload(*args, provider, needs)
    torch.library.opcheck(experts.BACKWARD_OP.overload, (torch.ones_like(y), saved, *args, provider, needs))


def _layer(x: Any, gate: Any, up_gate: Any, down: Any, provider: str = "cpu_grouped") -> Any:
    weights, ids = OPS.route(x @ gate, None, *Routing(K, normalize="sum"))
    _, _, order, offsets, handle, _ = OPS.quantize_dispatch(x, ids, E, "none", "local")
    y = OPS.permute_experts_unpermute(x, order, offsets, None, [up_gate, down], [], PROGRAM, "eoi,eoi", "", K, provider)
    return OPS.combine(y, weights, handle, x.dtype, "local")


def _inputs(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HIDDEN), (HIDDEN, E), (E, 2 * INTER, HIDDEN), (E, HIDDEN, INTER))
    return with_grad([torch.randn(shape, generator=generator) * 0.5 for shape in shapes])


def _same_as_eager(compiled: Any, args: list[torch.Tensor], **tolerance: float) -> None:
    actual = value_and_grads(compiled(*args), args)
    expected = value_and_grads(_layer(*args), args)
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_compile_serves_every_token_count() -> None:
    """One token may cost a second graph and none a third: torch specialises the sizes 1 and 0."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_layer, dynamic=True, fullgraph=True, backend=counter)
    _same_as_eager(compiled, _inputs(7))
    first = counter.frame_count  # 2: Dynamo starts again when it finds the router's numbers to be constants
    for tokens in (2, 64, 33):
        _same_as_eager(compiled, _inputs(tokens))
    assert counter.frame_count == first
    _same_as_eager(compiled, _inputs(1))
    assert compiled(*_inputs(0)).shape == (0, HIDDEN)
    assert counter.frame_count <= 3 * first


@pytest.mark.usefixtures("fresh_dynamo")
def test_training_graph_keeps_the_products_of_the_forward() -> None:
    """The forward that AOTAutograd traces is the saving op, so that the backward multiplies nothing twice."""
    graphs: list[str] = []

    def keep(gm: Any, _: Any) -> Any:
        graphs.append(str(gm.graph))
        return gm

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep, bw_compiler=keep)
    args = _inputs(5)
    torch.compile(_layer, backend=backend, fullgraph=True)(*args).sum().backward()
    assert "permute_experts_unpermute_saving" in graphs[0]
    assert "permute_experts_unpermute_backward" in graphs[1]
    with torch.no_grad():
        torch.compile(_layer, backend=backend, fullgraph=True)(*args)
    assert "permute_experts_unpermute.default" in graphs[2]


def _layer_in_one(x: Any, gate: Any, up_gate: Any, down: Any) -> Any:
    weights, ids = OPS.route(x @ gate, None, *Routing(K, normalize="sum"))
    _, _, order, offsets, _, _ = OPS.quantize_dispatch(x, ids, E, "none", "local")
    args: Any = (x, order, offsets, None, [up_gate, down], [], PROGRAM, "eoi,eoi", "", K)
    return OPS.permute_experts_combine(*args, weights, x.dtype, "cpu_grouped")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.inductor
@pytest.mark.parametrize("layer", [_layer, _layer_in_one])
def test_inductor_runs_the_ops_forward_and_backward(layer: Any) -> None:
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    for tokens in (5, 9):
        _same_as_eager(compiled, _inputs(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("provider", ["reference", "cpu_grouped"])
def test_autocast_does_not_change_what_an_op_means(provider: str) -> None:
    """Casts stand in the program; the surrounding autocast must not add its own, forward or backward."""
    args = _inputs(6)
    ids = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3], [0, 2], [1, 2]])
    order, offsets = counting_sort(ids, E)
    logits = (args[0] @ args[1]).detach().requires_grad_()
    wanted = [logits, args[0], *args[2:]]

    def both() -> Any:
        weights, _ = OPS.route(logits, None, *Routing(K, "sqrtsoftplus", "softmax"))
        y = OPS.permute_experts_unpermute(args[0], order, offsets, None, args[2:], [], PROGRAM, "eoi,eoi", "", K, provider)
        out = OPS.combine(y, weights, [], None, "local")
        return [y, weights, out, *torch.autograd.grad(out.square().sum(), wanted, retain_graph=True)]

    plain = both()
    with torch.autocast("cpu", torch.bfloat16):
        cast = both()
    for actual, expected in zip(cast, plain, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_dynamo")
def test_checkpointing_recomputes_the_experts() -> None:
    args = _inputs(5)

    def block(*own: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(_layer, *own, use_reentrant=False)

    expected = value_and_grads(_layer(*args), args)
    torch.testing.assert_close(value_and_grads(block(*args), args), expected)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_grads(compiled(*args), args), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["reference", "cuda_grouped_mm"])
def test_cuda_layer_is_within_tolerance_of_float64(provider: str) -> None:
    """Expert 2 is chosen by no token: its weights are NaN and its gradients zero."""
    hidden, inter, tokens = 64, 32, 77
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(shape, generator=generator) * 0.2).to("cuda", torch.bfloat16)  # noqa: E731
    ids = torch.randint(0, 2, (tokens, K), generator=generator)
    ids[5] = torch.tensor([-1, E])
    ids[9] = 3
    order, offsets = counting_sort(ids.cuda(), E)
    weights = [draw(E, 2 * inter, hidden), draw(E, hidden, inter)]
    glu = f"(mm(1, silu(cols(mm(0, x), 0, {inter}, 1)) * cols(mm(0, x), {inter}, {2 * inter}, 1)) + b(0)) * w"
    args = [draw(tokens, hidden), order, offsets, draw(tokens, K), weights, [draw(E, hidden)], glu, "eoi,eoi", "eo", K]
    exact = with_grad([[t.double() for t in a] if isinstance(a, list) else a for a in args])
    exact[0], exact[3] = (exact[i].detach().double().requires_grad_() for i in (0, 3))
    for weight in weights:
        weight[2] = float("nan")
    mine = with_grad(args)
    actual = value_and_grads(experts.OP.overload(*mine, provider), mine)
    expected = value_and_grads(experts.OP.overload(*exact, "reference"), exact)
    for got, want in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=2e-2, atol=2e-2)
    assert all((grad[2] == 0).all() for grad in actual[1][2:4])


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda_grouped_mm", "triton"])
def test_cuda_ops_can_be_captured_in_a_cuda_graph(provider: str) -> None:
    hidden, inter = 64, 32
    x, gate = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((33, hidden), (hidden, E)))
    up_gate, down = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((E, 2 * inter, hidden), (E, hidden, inter)))
    program = f"mm(1, silu(cols(mm(0, x), 0, {inter}, 1)) * cols(mm(0, x), {inter}, {2 * inter}, 1))"

    def layer() -> Any:
        weights, ids = OPS.route(x @ gate, None, *Routing(K, normalize="sum"))
        _, _, order, offsets, handle, _ = OPS.quantize_dispatch(x, ids, E, "none", "local")
        y = OPS.permute_experts_unpermute(x, order, offsets, None, [up_gate, down], [], program, "eoi,eoi", "", K, provider)
        return OPS.combine(y, weights, handle, None, "local")

    with torch.no_grad():
        expected = layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer()
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, layer())
    assert not torch.equal(captured, expected)


@pytest.mark.gpu
def test_cuda_opcheck_of_the_reference_passes() -> None:
    for args in experts.sample_inputs("cuda"):
        torch.library.opcheck(experts.OP.overload, (*with_grad(list(args)), "reference"))
