"""Calls that are replayed give the bits of calls that are not, at any address; what cannot be replayed is computed as it is. In Triton's
interpreter, and the same on a GPU."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Cases
from triton_cases import APART, BIASED, HALVES, ONE, PAIRS, WEIGHTED_ROWS, Sizes, parameters, routed

import moe_compile
from moe_compile.ops import _register, experts, experts_combine, local_experts, registry, replay, route
from moe_compile.ops.kernels import tuned
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


def recorded() -> int:
    return sum(isinstance(each, replay.Recipe) for each in replay._calls.values())


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


# ---------------------------------------------------------------- what is recorded
class Doubled:
    """In the place of a kernel of Triton's interpreter: out = 2 * x."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(x: Any, out: Any, fails: bool = False) -> None:
            if fails:
                raise RuntimeError("it fails")
            out.copy_(x * 2)

        return run


DOUBLED = Doubled()


def double(x: torch.Tensor, *_: Any) -> torch.Tensor:
    out = torch.empty_like(x)
    replay.start(DOUBLED, (1,), x, out)
    return out


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "DEVICES", {"cpu"})


def call(kernel: Callable[..., Any], *args: Any, times: int = 3, name: str = "op") -> Any:
    for _ in range(times):
        found = replay.call(name, kernel, args)
    return found


@pytest.mark.replays
def test_the_third_call_runs_none_of_the_python(on_cpu: None) -> None:
    spy = mock.Mock(side_effect=double)
    for value in (1.0, 2.0, 3.0, 4.0):
        assert torch.equal(replay.call("op", spy, (torch.full((3,), value), 0)), torch.full((3,), 2 * value))
    assert spy.call_count == 2


@pytest.mark.replays
@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(4), 0), (torch.ones(3).double(), 0), (torch.ones(6)[::2], 0), (torch.ones(3), 1), (torch.ones(4)[1:], 0),
        (torch.ones(3), True, 0),
    ],
    ids=["size", "dtype", "stride", "constant", "alignment", "arguments"],
)  # fmt: skip
def test_other_arguments_are_another_call(on_cpu: None, other: tuple[Any, ...]) -> None:
    call(double, torch.ones(3), 0)
    spy = mock.Mock(side_effect=double)
    assert torch.equal(replay.call("op", spy, other), 2 * other[0])
    assert spy.call_count == 1


@pytest.mark.replays
@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1.0, 2.0), (float("inf"), float("nan"))])
def test_numbers_differ_by_their_digits(on_cpu: None, one: float, other: float) -> None:
    call(double, torch.ones(3), one)
    spy = mock.Mock(side_effect=double)
    replay.call("op", spy, (torch.ones(3), other))
    assert spy.call_count == 1
    call(double, torch.ones(3), float("nan"))
    replay.call("op", spy, (torch.ones(3), float("nan")))
    assert spy.call_count == 1  # NaNs are alike


def host_reads(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).fill_(x.sum().item())


def sizes_by_data(x: torch.Tensor) -> torch.Tensor:
    return x.new_ones(x.nonzero().shape[0])


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, device="meta").new_zeros(x.shape, device="cpu") + x


FOREIGN = torch.full((3,), 7.0)


def foreign(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    replay.start(DOUBLED, (1,), FOREIGN, out)
    return out


def gives_its_input(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1)


@pytest.mark.replays
@pytest.mark.parametrize("kernel", [host_reads, sizes_by_data, elsewhere, foreign, gives_its_input], ids=lambda kernel: kernel.__name__)
def test_what_may_go_another_way_is_computed_each_time(on_cpu: None, kernel: Callable[..., Any]) -> None:
    spy = mock.Mock(side_effect=kernel)
    for value in range(4):
        x = torch.full((3,), float(value))
        assert torch.equal(replay.call("op", spy, (x,)), kernel(x))
    assert spy.call_count == 4
    assert recorded() == 0


def ops_of_torch(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    zeros, parts = torch.zeros_like(x), list(double(x).split(2))
    zeros[1:].add_(parts[0]).mul_(3)
    low, _ = torch.stack([zeros, x.clone()]).min(0)
    return torch.cat([low, *parts]), [zeros, x.new_empty(0), torch.topk(x, 2).indices]


@pytest.mark.replays
def test_ops_of_torch_are_replayed_too(on_cpu: None) -> None:
    spy = mock.Mock(side_effect=ops_of_torch)
    for _ in range(5):
        x = torch.randn(3)
        (a, own), (b, wanted) = replay.call("op", spy, (x,)), ops_of_torch(x)
        assert torch.equal(a, b)
        assert all(torch.equal(*pair) for pair in zip(own, wanted, strict=True))
    assert spy.call_count == 2
    assert recorded() == 1


class Started:
    """In the place of a compiled kernel: reads and writes floats at addresses, as a GPU would, and keeps what it was started with."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    @staticmethod
    def fn(x: Any, box: Any, two: Any, nothing: Any, out: Any, n: int, FACTOR: int, MORE: int = 5) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, stream: Any = None, **meta: Any) -> Started:
            self.calls.append((grid, args, stream, meta))
            if stream is not None:  # with parameters in their order
                x, box, (first, second), nothing, out, n, factor, more = args
                assert (nothing, more) == (0, 5)
                assert all(type(each) is int for each in (x, first, second, out))
                total = factor * (floats(x, n) + floats(box.base.data_ptr(), n) + floats(first, n) + floats(second, n))
                floats(out, n)[:] = total
            return self

        return run


def floats(address: int, n: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_float * n).from_address(address), dtype=torch.float32)


@dataclasses.dataclass
class Box:
    base: Any
    shape: list[int]
    padding: str = "zero"


@pytest.mark.replays
def test_compiled_kernels_get_addresses_in_the_order_of_their_parameters(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.runtime

    from moe_compile.ops import replay_steps

    active = types.SimpleNamespace(get_current_device=lambda: None, get_current_stream=lambda index: 7)
    monkeypatch.setattr(triton.runtime, "driver", types.SimpleNamespace(active=active))
    calls: list[Any] = []
    kernel = Started(calls)

    def summed(x: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        middle = torch.empty(x.shape[0] + 2)
        replay.start(kernel, (3,), x[2:], Box(parts[0], [4]), tuple(parts), x[:0], middle[2:], 4, FACTOR=3, num_warps=4)
        out = torch.empty(4)
        replay.start(kernel, (3, 2), middle[2:], Box(parts[1], [4]), tuple(parts), x[:0], out, 4, FACTOR=1)
        return out

    boxes = []
    for time in range(5):
        x, parts = torch.randn(6), [torch.randn(4), torch.randn(4)]
        calls.clear()
        got = replay.call("op", summed, (x, parts))
        if time < 2:
            continue
        once = 3 * (x[2:] + 2 * parts[0] + parts[1])
        torch.testing.assert_close(got, once + parts[0] + 2 * parts[1])
        assert [(grid, stream) for grid, _, stream, _ in calls] == [((3, 1, 1), 7), ((3, 2, 1), 7)]
        boxes.append([args[1] for _, args, _, _ in calls])
        assert [box.base.data_ptr() for box in boxes[-1]] == [each.data_ptr() for each in parts]
        assert all((type(box), box.shape, box.padding) == (Box, [4], "zero") for box in boxes[-1])
        again = replay.call("op", summed, (x, parts))
        torch.testing.assert_close(again, got)
        assert [args[1] for _, args, _, _ in calls[2:]] == boxes[-1]  # kept by address
    assert len(replay_steps._known) == 1  # both arguments have one form


def test_descriptors_of_triton_and_gluon_are_moved_to_other_addresses() -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia import hopper
    from triton.tools import tensor_descriptor

    from moe_compile.ops import replay_steps

    x = torch.empty(64, 64, dtype=torch.float16)
    layouts = [gl.NVMMASharedLayout.get_default_for(block, gl.float16) for block in ([64, 64], [32, 64])]
    boxes = [
        tensor_descriptor.TensorDescriptor(x, [64, 64], [64, 1], [64, 64]),
        tensor_descriptor.TensorDescriptor(x, [64, 64], [64, 1], [32, 64]),
        *(hopper.TensorDescriptor(x, [64, 64], [64, 1], block, own) for block, own in zip(([64, 64], [32, 64]), layouts)),
    ]
    known = [replay_steps._known_like(box) for box in boxes]
    assert len({id(each) for each in known}) == len(boxes)  # each has another form
    for box, own in zip(boxes, known):
        assert replay_steps.is_box(box)
        assert replay_steps._known_like(box) is own
        moved = replay_steps._box_at(1024, replay_steps._with_base(box, None), own)
        assert type(moved) is type(box)
        assert moved.base.data_ptr() == 1024
        assert {**vars(moved), "base": x} == vars(box)


@pytest.mark.replays
def test_a_call_that_raises_leaves_nothing_behind(on_cpu: None) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        replay.start(DOUBLED, (1,), x, x, True)
        return x

    for _ in range(3):
        with pytest.raises(RuntimeError, match="it fails"):
            replay.call("op", fails, (torch.ones(3),))
    assert getattr(replay._here, "recording", None) is None
    assert torch.equal(call(double, torch.ones(3)), torch.full((3,), 2.0))
    assert recorded() == 1


@pytest.mark.replays
def test_calls_inside_of_a_recorded_one_are_not_recorded_themselves(on_cpu: None) -> None:
    def outer(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = replay.call("inner", double, (x,))
        return found

    assert torch.equal(call(outer, torch.ones(3), times=4), torch.full((3,), 2.0))
    assert [key[0] for key, value in replay._calls.items() if isinstance(value, replay.Recipe)] == ["op"]


@pytest.mark.replays
def test_memory_is_bounded_and_the_oldest_is_forgotten(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    for size in range(1, 10):
        call(double, torch.ones(size))
    assert len(replay._calls) == 4
    assert {key[4][0] for key in replay._calls} == {6, 7, 8, 9}


@pytest.mark.replays
def test_a_recipe_keeps_no_tensor_alive(on_cpu: None) -> None:
    import gc
    import weakref

    x = torch.ones(3)
    seen = weakref.ref(x)
    call(double, x)
    del x
    gc.collect()
    assert recorded() == 1
    assert seen() is None


@pytest.mark.replays
def test_changed_choices_forget_what_was_recorded(on_cpu: None) -> None:
    call(double, torch.ones(3))
    with tuned.only(()):
        assert recorded() == 0
        call(double, torch.ones(3))
    assert recorded() == 0
    call(double, torch.ones(3))
    tuned.forget()
    assert recorded() == 0


@pytest.mark.replays
def test_an_op_that_is_registered_again_forgets_what_was_recorded(on_cpu: None) -> None:
    call(double, torch.ones(3))
    op = route.OP
    _register.register_op(op.schema, op.kernel, op.fake, op.autograd, replays=op.replays)
    assert recorded() == 0


@pytest.mark.replays
def test_threads_record_for_themselves(on_cpu: None) -> None:
    found: list[Any] = []
    inside, go_on = threading.Event(), threading.Event()

    def slow(x: torch.Tensor) -> torch.Tensor:
        if replay._here.__dict__.get("recording") is not None:
            inside.set()
            go_on.wait(10)
        return double(x)

    thread = threading.Thread(target=lambda: found.append(call(slow, torch.ones(3), name="slow")))
    thread.start()
    assert inside.wait(10)
    assert torch.equal(call(double, torch.full((2,), 3.0)), torch.full((2,), 6.0))  # none of it goes into the other's recording
    go_on.set()
    thread.join()
    assert torch.equal(found[0], torch.full((3,), 2.0))
    assert recorded() == 2


@pytest.mark.replays
def test_other_devices_and_paused_calls_are_left_alone() -> None:
    spy = mock.Mock(side_effect=double)
    call(spy, torch.ones(3), times=4)
    assert spy.call_count == 4
    assert not replay._calls
    with mock.patch.object(replay, "DEVICES", {"cpu"}), replay.paused():
        call(spy, torch.ones(3), times=4)
    assert spy.call_count == 8
    assert not replay._calls


def test_only_providers_that_say_so_are_replayed() -> None:
    args = (None, "reference")
    assert not registry.replays("experts", -1)(args)
    assert registry.replays("experts", -1)((None, "triton"))
    assert registry.replays("experts", 0)(("triton", None))
    assert not registry.replays("experts", -1)((None, "unknown"))
    assert [each.name for each in registry.providers("experts") if each.replays] == ["triton"]


def test_every_kernel_is_started_where_it_can_be_recorded() -> None:
    """A launch that a recording does not see would be missing in all replays."""
    folder = Path(replay.__file__).parent / "kernels"
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.append((path.name, ast.unparse(node.func)))
    assert [name for name, text in found if "kernel" in text.split("[")[0]] == []
    starts = sum(path.read_text().count("start(\n") + path.read_text().count(" start(") for path in folder.glob("*.py"))
    assert starts >= 25


if __name__ == "__main__":
    CASES.main()
