"""Calls that are replayed give the bits of calls that are not, at any address; what cannot be replayed is computed as it is. In Triton's
interpreter, and the same on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases
from replayed import recorded
from triton_cases import APART, BIASED, HALVES, ONE, PAIRS, WEIGHTED_ROWS, Sizes, parameters, routed

import moe_compile
from moe_compile.ops import experts, experts_combine, local_experts, replay, route
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.quantized import quantize_weights

CASES = Cases(__file__)
PROGRAMS = {"halves": HALVES, "pairs": PAIRS, "biased": BIASED, "apart": APART, "weighted": WEIGHTED_ROWS}
MANY, LITTLE = Sizes(9, 2, 4, 24, 16), Sizes(1, 2, 4, 24, 16)
TIMES = 4  # two that are replayed
FORMS = (
    ("halves", "eoi"),
    ("halves", "eio"),
    ("halves", "oi*"),
    ("pairs", "eio"),
    ("biased", "eoi"),
    ("apart", "io*"),
    ("weighted", "eio"),
)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def agree(op: Any, draw: Callable[[int], tuple[Any, ...]], replayed: bool | None = True) -> None:
    """Calls of fresh arguments, the earlier ones kept so that addresses differ, against the same calls computed anew."""
    replay.forget()
    torch.use_deterministic_algorithms(False)  # which fills new memory by an op of its own
    kept = []
    with mock.patch.object(replay, "DEVICES", {device()}), torch.no_grad():
        for time in range(TIMES):
            args = draw(time)
            got = op(*args)
            if time > 1:
                with replay.paused():
                    kept.append((args, got, op(*args)))
        assert replayed is None or recorded() == replayed, list(replay._calls.values())
        for _, got, wanted in kept:  # in the end: later calls must not have written to them
            for a, b in zip(*([each] if isinstance(each, torch.Tensor) else each for each in (got, wanted)), strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                assert torch.equal(a, b)


def layer(program: str, layout: str, s: Sizes, seed: int, dtype: torch.dtype = torch.float32, routing: str = "holes") -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    weights, biases, layouts = parameters(program, layout, s, g)
    text = program.format(i=s.inter, j=2 * s.inter)
    ids, w = routed(s, routing, g).to(device()), torch.rand((s.tokens, s.top_k), generator=g).to(device())
    x = torch.randn((s.tokens, s.hidden), generator=g)
    weights, biases = ([each.to(device(), dtype) for each in own] for own in (weights, biases))
    inner = w if "w" in text.replace("where", "") else None
    texts = (text, layouts, ",".join("eo" for _ in biases))
    return {"x": x.to(device(), dtype), "ids": ids, "w": w, "inner": inner, "params": (weights, biases), "texts": texts, "dtype": dtype}


def local_args(s: Sizes, *, inner: Any, x: Any, ids: Any, w: Any, params: Any, texts: Any, dtype: Any) -> tuple[Any, ...]:
    return (x, ids, s.experts, inner, *params, *texts, w.clone() if inner is w else w, dtype, "triton")


@CASES.add(*((*form, s.tokens) for form in FORMS for s in (MANY, LITTLE)))
def all_in_one(name: str, layout: str, tokens: int) -> None:
    s = MANY if tokens > 1 else LITTLE
    agree(local_experts.OP.overload, lambda seed: local_args(s, **layer(PROGRAMS[name], layout, s, seed)))


@CASES.add(("experts",), ("sum",))
def from_an_order(name: str) -> None:
    def draw(seed: int) -> tuple[Any, ...]:
        own = layer(HALVES, "eoi", MANY, seed, routing="random")
        order, offsets = counting_sort(own["ids"], MANY.experts)
        more = (own["w"], own["dtype"]) if name == "sum" else ()
        return own["x"], order, offsets, None, *own["params"], *own["texts"], MANY.top_k, *more, "triton"

    agree((experts if name == "experts" else experts_combine).OP.overload, draw)


@CASES.add((torch.bfloat16,), (torch.float16,))
def half_precision(dtype: torch.dtype) -> None:
    agree(local_experts.OP.overload, lambda seed: local_args(MANY, **layer(HALVES, "eoi", MANY, seed, dtype)))


@CASES.add(*((kind, tokens) for kind in ("fp8_block", "fp8_channel", "mxfp4", "int4") for tokens in (1, 5)))
def quantised(kind: str, tokens: int) -> None:
    s = Sizes(tokens, 2, 3, 128, 128)
    own = layer(HALVES, "eoi", s, 0, torch.bfloat16)
    flat = [part for w in own["params"][0] for part in quantize_weights(w, kind)[:2]]

    def draw(seed: int) -> tuple[Any, ...]:
        fresh = layer(HALVES, "eoi", s, seed, torch.bfloat16)
        text, _, biases = own["texts"]
        fresh["params"], fresh["texts"] = ([each.clone() for each in flat], []), (text, f"eoi:{kind},eoi:{kind}", biases)
        return local_args(s, **fresh)

    agree(local_experts.OP.overload, draw)


@CASES.add(("softmax",), ("groups",))
def routers(name: str) -> None:
    constants = route.Routing(2, normalize="sum") if name == "softmax" else route.Routing(2, "sigmoid", "sum", 1e-20, "add", 2.5, 2, 1)
    agree(route.OP.overload, lambda seed: (torch.randn((5, 8), device=device()), None, *constants))


@CASES.add()
def training() -> None:
    """Every op of a step, forward and backward, in the threads of autograd."""
    torch.use_deterministic_algorithms(False)
    replay.forget()
    with mock.patch.object(replay, "DEVICES", {device()}):
        for seed in range(TIMES):
            own = layer(HALVES, "eoi", MANY, seed, routing="random")
            order, offsets = counting_sort(own["ids"], MANY.experts)
            upstream = torch.randn((MANY.tokens, MANY.hidden), device=device())
            found = []
            for paused in (False, True):
                leaves = [own["x"].clone().requires_grad_(), own["w"].clone().requires_grad_()]
                weights = [each.clone().requires_grad_() for each in own["params"][0]]
                rest = (own["texts"][0], own["texts"][1], "", MANY.top_k, leaves[1], own["dtype"], "triton")
                if paused:
                    with replay.paused():
                        experts_combine.OP.overload(leaves[0], order, offsets, None, weights, [], *rest).backward(upstream)
                else:
                    experts_combine.OP.overload(leaves[0], order, offsets, None, weights, [], *rest).backward(upstream)
                found.append([each.grad for each in (*leaves, *weights)])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), seed
        assert recorded() >= 2, {key[0]: value for key, value in replay._calls.items()}


@CASES.add()
def parts_of_one_tensor() -> None:
    """Weights that lie in one tensor are told apart by where they begin."""

    def draw(seed: int) -> tuple[Any, ...]:
        own = layer(ONE, "eoi", Sizes(9, 2, 4, 16, 16), seed)
        whole = torch.stack(own["params"][0])
        own["params"] = (list(whole.unbind(0)), [])
        return local_args(Sizes(9, 2, 4, 16, 16), **own)

    agree(local_experts.OP.overload, draw)


@CASES.add()
def the_same_tensor_twice() -> None:
    """Of two inputs at one address it is not known which of them a kernel reads."""
    square = Sizes(9, 2, 4, 16, 16)

    def draw(seed: int) -> tuple[Any, ...]:
        own = layer(ONE, "eoi", square, seed)
        own["params"] = ([own["params"][0][0]] * 2, [])
        return local_args(square, **own)

    agree(local_experts.OP.overload, draw, replayed=False)


@CASES.add()
def rows_that_are_copied() -> None:

    def draw(seed: int) -> tuple[Any, ...]:
        own = layer(HALVES, "eoi", MANY, seed)
        own["x"] = own["x"].t().contiguous().t()
        return local_args(MANY, **own)

    agree(local_experts.OP.overload, draw)


@CASES.add()
def other_alignment() -> None:
    """The same shapes from other addresses: kernels were compiled for those that 16 divides."""
    torch.use_deterministic_algorithms(False)
    replay.forget()
    with mock.patch.object(replay, "DEVICES", {device()}), torch.no_grad():
        for shift in (0, 0, 0, 1, 1, 1, 0):
            own = layer(HALVES, "eoi", MANY, shift)
            room = torch.empty(own["x"].numel() + 1, device=device())
            own["x"] = room[shift : shift + own["x"].numel()].view(own["x"].shape).copy_(own["x"])
            args = local_args(MANY, **own)
            got = local_experts.OP.overload(*args)
            with replay.paused():
                assert torch.equal(got, local_experts.OP.overload(*args)), shift
        assert recorded() == 2


@CASES.add()
def no_tokens() -> None:
    agree(
        local_experts.OP.overload,
        lambda seed: local_args(Sizes(0, 2, 4, 24, 16), **layer(HALVES, "eoi", Sizes(0, 2, 4, 24, 16), seed)),
        None,
    )


test_in_interpreter = CASES.test()


@pytest.mark.gpu
@pytest.mark.replays
@pytest.mark.parametrize("name", CASES.functions)
def test_on_gpu(name: str) -> None:
    CASES.functions[name]()


@pytest.mark.gpu
@pytest.mark.replays
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_block_is_replayed_with_and_without_cuda_graphs(fresh_dynamo: None, mode: str) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(64, 8, bias=False)
            self.up = torch.nn.Parameter(torch.randn(8, 64, 48) * 0.1)
            self.down = torch.nn.Parameter(torch.randn(8, 48, 64) * 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, ids = self.gate(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for e in range(8):
                row, slot = (ids == e).nonzero(as_tuple=True)
                own = torch.nn.functional.silu(x[row] @ self.up[e]) @ self.down[e]
                out.index_add_(0, row, own * weights[row, slot, None])
            return out

    block = Block().cuda()
    compiled = moe_compile.compile(block, mode=None if mode == "default" else mode)
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(33, 64, device="cuda")
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert {key[0] for key, value in replay._calls.items() if isinstance(value, replay.Recipe)} >= {"route", "local_experts"}


def recorded_layer() -> tuple[Callable[[], tuple[Any, ...]], Any]:
    """(arguments anew, the op), after enough calls that the next one is replayed."""
    op, seeds = local_experts.OP.overload, iter(range(100))

    def draw() -> tuple[Any, ...]:
        return local_args(MANY, **layer(HALVES, "eoi", MANY, next(seeds), torch.bfloat16))

    with torch.no_grad():
        for _ in range(3):
            op(*draw())
    assert recorded() == 1
    return draw, op


@pytest.mark.gpu
@pytest.mark.replays
def test_replayed_calls_are_captured_and_run_on_the_current_stream() -> None:
    draw, op = recorded_layer()
    static, stream = draw(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = op(*static)
    for _ in range(3):
        fresh = draw()
        static[0].copy_(fresh[0])
        static[1].copy_(fresh[1])
        graph.replay()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), replay.paused():
            wanted = op(*static)
        with torch.no_grad(), torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what runs on another stream would be done before
            late = static[0].clone().mul_(2)
            there = op(late, *static[1:])
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad(), replay.paused():
            doubled = op(late, *static[1:])
        assert torch.equal(out, wanted)
        assert torch.equal(there, doubled)


@pytest.mark.gpus
@pytest.mark.replays
def test_calls_on_another_device_than_the_current_one_are_replayed_there() -> None:
    draw, op = recorded_layer()

    def there(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            [each.to("cuda:1") for each in arg] if isinstance(arg, list) else arg.to("cuda:1") if isinstance(arg, torch.Tensor) else arg
            for arg in args
        )

    with torch.no_grad():
        for _ in range(4):
            here = draw()
            assert torch.equal(op(*there(here)).cpu(), op(*here).cpu())
    assert recorded() == 2
    assert torch.cuda.current_device() == 0


if __name__ == "__main__":
    CASES.main()
