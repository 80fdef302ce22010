"""What of a call is recorded, what it is known by, and what is refused: with stand-ins for kernels, on CPU tensors."""

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
from replayed import recorded

from moe_compile.ops import _register, registry, replay, route
from moe_compile.ops.kernels import tuned


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


class Nothing:
    """A kernel whose one argument is a table of addresses, the first of nothing."""

    @staticmethod
    def fn(table: Any) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(table: Any, stream: Any = None) -> Nothing:
            assert table[0] == 0
            assert table[1] > 0
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
        replay.start(kernel, (3, 2), middle[2:], Box(parts[1], [4]), (parts[0], parts[1]), x[:0], out, 4, FACTOR=1)
        replay.start(Nothing(), (1,), (x[:0], x[1:]))
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
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_calls_recorded_in_one_mode_are_right_in_any(on_cpu: None, mode: Callable[[], Any]) -> None:
    call(ops_of_torch, torch.randn(3))
    with mode():
        for _ in range(2):
            x = torch.randn(3)
            (a, own), (b, wanted) = replay.call("op", ops_of_torch, (x,)), ops_of_torch(x)
            assert torch.equal(a, b)
            assert a.is_inference() == b.is_inference()
            assert all(torch.equal(*pair) for pair in zip(own, wanted, strict=True))
    assert recorded() == 1


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
