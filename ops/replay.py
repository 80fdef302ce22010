"""Calls over again: a call like an earlier one starts the same kernels at other addresses, without the Python that chose them.

    1st call with arguments of such shapes    as it is: kernels are compiled, tiles fitted to the device
    2nd                                       as it is, and recorded: what is allocated, and which kernel is started with what
    later ones                                allocations, starts and torch's ops alone

For few tokens the host takes longer to decide than a GPU to compute, if no CUDA graph holds the call (benchmarks/notes.md). All that is
decided depends on sizes, strides, dtypes, devices, alignment, the default dtype and the op's other arguments, which are the key here;
addresses go into each launch anew. A call is not replayed where its Python may go another way by contents (an op of torch whose result is
no tensor of the device, or has a size that data tells), where a kernel reads a tensor that the call neither was given nor made, and where
two inputs are one. In eager mode, under Inductor and in the capture of CUDA graphs it is all the same.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .replay_steps import Allocate, Compiled, Given, Interpreted, Recipe, Result, Torch, are_tensors, is_box

MOST = 1024  # calls that are remembered, some 10 KB each
ALIGNMENT = 16  # bytes: what kernels are compiled by, and descriptors ask for
DEVICES = {"cuda"}  # tests add "cpu", for Triton's interpreter
PLAIN = (torch.Tensor, torch.nn.Parameter)
_SEEN, _TENSOR = "seen once", "a tensor"
_calls: dict[tuple[Any, ...], Any] = {}  # key -> _SEEN, a Recipe, or why there is none; the oldest first
_pauses: list[None] = []  # one for each `paused`
_here = threading.local()  # .recording: this thread's
_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_BY_CONTENTS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def call(name: str, kernel: Callable[..., Any], args: Sequence[Any]) -> Any:
    """kernel(*args), replayed where a call of the same name like this one was recorded. args: tensors, lists of tensors, constants."""
    if _device_of(args) not in DEVICES or _pauses or getattr(_here, "recording", None) is not None:
        return kernel(*args)
    tensors, constants = _parts(args)
    addresses = [tensor.data_ptr() for tensor in tensors]
    if not all(type(tensor) in PLAIN for tensor in tensors):
        return kernel(*args)
    key = (name, torch.get_default_dtype(), *constants, *_described(tensors, addresses))
    found = _calls.get(key)
    if isinstance(found, Recipe):
        return found.run(tensors, addresses)
    if found is _SEEN:
        return _recorded(key, kernel, args, tensors)
    if found is None:
        _remember(key, _SEEN)
    return kernel(*args)


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta), in a way that can be recorded. A tuple of tensors is given as their addresses."""
    given = [tuple([each.data_ptr() for each in arg]) if are_tensors(arg) else arg for arg in args]
    recording = getattr(_here, "recording", None)
    if recording is None:
        kernel[grid](*given, **meta)
        return
    recording.starting = True  # the interpreter calls torch
    try:
        compiled = kernel[grid](*given, **meta)
    finally:
        recording.starting = False
    recording.started(kernel, grid, args, meta, compiled)


def forget() -> None:
    """Nothing is replayed that was recorded so far: what kernels are chosen by has changed."""
    _calls.clear()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Until the end of it no call of any thread is recorded or replayed (autograd's threads do not see a context's variables)."""
    _pauses.append(None)
    try:
        yield
    finally:
        _pauses.pop()


# ---------------------------------------------------------------- which calls are alike
def _device_of(args: Sequence[Any]) -> str | None:
    """The type of device of the first tensor."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return str(arg.device.type)
    return None


def _parts(args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(all tensors in one row, all else). Floats by their digits: 0.0 equals -0.0, and NaN nothing."""
    tensors: list[Any] = []
    constants: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            tensors.append(arg)
            constants.append(_TENSOR)
        elif isinstance(arg, list):
            own = [each for each in arg if isinstance(each, torch.Tensor)]
            tensors += own
            constants.append(len(own) if own else tuple(arg))
        else:
            constants.append(arg.hex() if type(arg) is float else arg)
    return tensors, constants


def _described(tensors: list[Any], addresses: list[int]) -> list[Any]:
    """What the Python decides by. get_device: a number, which is quicker than a device."""
    found: list[Any] = [address % ALIGNMENT for address in addresses]
    for each in tensors:
        found += each.shape, each.stride(), each.dtype, each.get_device()
    return found


def _remember(key: tuple[Any, ...], value: Any) -> None:
    if key not in _calls:
        while len(_calls) >= MOST:
            for oldest in list(_calls)[:1]:  # a list: other threads remember too
                _calls.pop(oldest, None)
    _calls[key] = value


# ---------------------------------------------------------------- recording
def _recorded(key: tuple[Any, ...], kernel: Callable[..., Any], args: Sequence[Any], tensors: list[Any]) -> Any:
    recording = Recording(tensors)
    _here.recording = recording
    try:
        with recording:
            result = kernel(*args)
    finally:
        _here.recording = None
    _remember(key, recording.recipe(result))
    return result


class Recording(TorchDispatchMode):
    """One call: its allocations and starts in their order. why: what of it cannot be replayed, the first found."""

    def __init__(self, tensors: list[Any]) -> None:
        super().__init__()
        self.inputs, self.device = [_bytes(tensor) for tensor in tensors], tensors[0].device
        self.made: list[tuple[int, int]] = []
        self.steps: list[Any] = []
        self.why: str | None = None
        self.starting = False  # a kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.starting:
            return result
        if func in _EMPTY:
            self.steps.append(Allocate(self._new(result), result))
        elif not (func.is_view and _views(result, args)):
            self._called(func, args, kwargs or {}, result)
        return result

    def _called(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An op of torch; what it returns is new memory, or (in place, out=) an argument again."""
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        returns = func._schema.returns
        if func.namespace != "aten" or _BY_CONTENTS & set(func.tags) or not all(isinstance(each, torch.Tensor) for each in results):
            self._refuse(f"it calls {func}")
            return
        read = Given(args, self.place), Given(tuple(kwargs.values()), self.place)
        listed = len(returns) != len(results)
        again = [not listed and own.alias_info is not None and not func.is_view for own in returns * len(results)]
        new = [None if old else self._new(each) for old, each in zip(again, results)]
        self.steps.append(Torch(func, *read, tuple(kwargs), new))

    def _new(self, tensor: Any) -> int:
        if tensor.device != self.device:
            self._refuse(f"it makes a tensor on {tensor.device}")
        self.made.append(_bytes(tensor))
        return len(self.inputs) + len(self.made) - 1

    def started(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], compiled: Any) -> None:
        if any(isinstance(each, torch.Tensor) or is_box(each) for each in meta.values()):
            self._refuse("a kernel has a tensor by name")
        self.steps.append((Interpreted if compiled is None else Compiled)(kernel, grid, args, meta, compiled, self.place))

    def place(self, tensor: Any) -> tuple[int, int] | None:
        """(which input, or behind these which allocation; bytes from its first element on), None if nothing is in the tensor.

        What was allocated last is looked at first: memory that was given back may have been allocated again.
        """
        if not tensor.numel():
            return None
        address, first = tensor.data_ptr(), len(self.inputs)
        for at in reversed(range(len(self.made))):
            if self.made[at][0] <= address < self.made[at][1]:
                return first + at, address - self.made[at][0]
        within = [at for at, (begin, end) in enumerate(self.inputs) if begin <= address < end]
        exact = [at for at in within if self.inputs[at][0] == address]
        one = exact or within
        if len(one) != 1:
            self._refuse("a kernel reads what is none of the call's tensors" if not one else "inputs share memory")
            return None
        return one[0], address - self.inputs[one[0]][0]

    def recipe(self, result: Any) -> Recipe | str:
        """Or why there is none."""
        found = Result(result, self.place, len(self.inputs))
        if found.wrong:
            self._refuse("it gives what it has not allocated")
        if self.why is not None:
            return self.why
        return Recipe(self.steps, found, len(self.inputs), len(self.made))

    def _refuse(self, why: str) -> None:
        self.why = self.why or why


def _views(result: Any, args: Any) -> bool:
    """Is all of it in memory of the arguments? contiguous, reshape and to give their argument's or new memory."""
    known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
    results = result if isinstance(result, (tuple, list)) else [result]
    return all(isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() in known for each in results)


def _bytes(tensor: Any) -> tuple[int, int]:
    """Addresses of its first element, and behind its last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
