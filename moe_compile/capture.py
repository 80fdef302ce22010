"""How a model's frames become graphs: Dynamo's capture flags, on for one model's compilations and off for all others.

Two flags let Dynamo capture `nonzero`, `where(mask)` and `.item()`, which naive MoE loops are made of. They are global,
they can make Dynamo or the inner compiler raise where it would have broken the graph, and without a rewrite they only
make graphs harder to compile. So they are on only inside the calls in which Dynamo converts a frame of our model, and a
frame whose conversion raises is converted again without them.

Modules that Dynamo cannot capture even so are recorded (probing/), and the recording is captured here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

from torch.fx import GraphModule

from moe_compile.errors import ParallelError
from moe_compile.logs import warn_once
from moe_compile.no_tokens import sizes_open
from moe_compile.refused import Refused
from moe_compile.report import RewriteReport

FLAGS = ("capture_dynamic_output_shape_ops", "capture_scalar_outputs")

_active = threading.local()


class NothingRewritten(Exception):
    """The backend found no MoE block to rewrite in a graph that only the capture flags made possible.

    codes: the code that was captured, where the graph is a frame from its first line to its last and no formula was found in it.
    """

    def __init__(self, why: str, codes: Iterable[CodeType] = ()) -> None:
        super().__init__(why)
        self.codes = frozenset(codes)


def flags_active() -> bool:
    """Whether Dynamo is converting a frame with our flags, and would convert it again without them if we raised."""
    return bool(getattr(_active, "depth", 0))


class WithCaptureFlags:
    """Dynamo's frame callback with the capture flags on while it works on a frame, or off if that raises.

    report: hears which frames were captured without flags, and forgets what the attempt with flags had put into it.
    over_ranks: the graph must be right for any number of tokens even if there are none now, as other ranks have some.
    """

    def __init__(self, callback: Callable[..., Any], report: RewriteReport | None = None, over_ranks: bool = False) -> None:
        self._callback = callback
        self._over_ranks = over_ranks
        self._report = report
        self._refused = Refused()
        # Dynamo's cache lookup follows this chain to the backend from C, with frame evaluation on: it must be a real
        # attribute, since a Python-level __getattr__ would be handed back to Dynamo as a frame, without end.
        self._torchdynamo_orig_backend = callback._torchdynamo_orig_backend  # type: ignore[attr-defined]

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        with sizes_open(frame.f_locals) if self._over_ranks else contextlib.nullcontext():
            return self._converted(frame, *args, **kwargs)

    def _converted(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if self._refused.holds(frame):
            return self._callback(frame, *args, **kwargs)
        undo = self._report.checkpoint() if self._report is not None else None
        try:
            with _flags_on():
                return self._callback(frame, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever it is, it may be the flags' doing: the second try decides
            note, first = _why_without(frame, error), error
            for cause in _causes(error):
                if isinstance(cause, NothingRewritten):
                    self._refused.add(frame, cause.codes)
            warn_once(note, details=error)
        if self._report is not None and undo is not None:
            undo()
            self._report.notes.append(note)
        try:
            return self._callback(frame, *args, **kwargs)
        except Exception as error:
            if _over_ranks(error) and _over_ranks(first):  # the whole graph's reason says more than that of its pieces
                raise first from None
            raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # its own (not there yet while this object is copied), or Python's
            raise AttributeError(name)
        return getattr(self._callback, name)


@contextlib.contextmanager
def _flags_on() -> Iterator[None]:
    """Dynamo's configuration with the flags on, and `flags_active()` true, while no other thread compiles."""
    from torch._dynamo import config
    from torch._dynamo.convert_frame import compile_lock

    _active.depth = getattr(_active, "depth", 0) + 1
    try:
        with compile_lock, config.patch({flag: True for flag in FLAGS if hasattr(config, flag)}):
            yield
    finally:
        _active.depth -= 1


def data_dependent(gm: GraphModule) -> bool:
    """Whether a size or a number in the graph is known only when it runs (`nonzero`, `.item()`)."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, GraphModule)]
    return any(node.meta.get("unbacked_bindings") for graph in graphs for node in graph.nodes)


def _why_without(frame: Any, error: Exception) -> str:
    code = frame.f_code
    name, file, line = own_code(frame) if code.co_filename.startswith("<") else (code.co_name, code.co_filename, code.co_firstlineno)
    where = f"{name} ({file}:{line})"
    causes = list(_causes(error))
    ours = next((cause for cause in causes if isinstance(cause, NothingRewritten)), None)
    last = causes[-1]
    text = (str(last).splitlines() or [""])[0]
    why = str(ours or f"capturing it with {' and '.join(FLAGS)} raised {type(last).__name__}: {text}")
    return f"{where} is compiled without Dynamo's capture flags: {why}"


def own_code(frame: Any) -> tuple[str, str, int]:
    """Name, file and line of what the user wrote, where the frame runs a forward that probing has made."""
    from moe_compile.probing.install import own_forward

    cls = type(frame.f_locals.get("self"))
    code = getattr(own_forward(cls), "__code__", frame.f_code) if hasattr(cls, "forward") else frame.f_code
    return f"{cls.__name__}.{code.co_name}", code.co_filename, code.co_firstlineno


def _over_ranks(error: Exception) -> bool:
    return any(isinstance(cause, ParallelError) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__
