"""A module's forward on fake tensors, written down torch call by torch call.

The user's Python runs as it is; sizes are symbols (numbers.py), parameters and inputs are fake (shadow.py), submodules are called as
wholes. What Python wants to know of a tensor's contents is answered where it is known (constants.py, hit.py), given out as a symbol
(`.item()`, `.tolist()`, numpy), or answered with "not empty" (contents.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from moe_compile.probing.bodies import tokens_to_try
from moe_compile.probing.errors import Asked, NotProbed, code_at
from moe_compile.probing.numbers import Numbers, whole_numbers
from moe_compile.probing.outside import marks, outside_put_back, places_of
from moe_compile.probing.reads import SCALARS, Reads
from moe_compile.probing.recorder import Recorder, listening
from moe_compile.probing.recording import Recording
from moe_compile.probing.shadow import example_shapes, faked, shadow_of, tensors_of
from moe_compile.probing.state import left_behind, state_of
from moe_compile.probing.tape import Tape
from moe_compile.probing.tokens import shims
from moe_compile.probing.writes import Writes


def record(module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], flat: bool = False) -> Recording:
    """Run `forward` on a shadow of the module and of its arguments. flat: submodules from within. Raises NotProbed.

    Loops over sizes of the inputs may be ones over tokens, which all do the same, or may be good for these sizes alone.
    """
    tried = _Tried()
    try:
        return _record(module, forward, args, kwargs, flat, "sizes", tried)
    except NotProbed as e:
        if not (tried.looped or tried.unrolled):
            raise
        why, listed = e, _Tried()
        try:
            return _record(module, forward, args, kwargs, flat, "lists", listed)
        except NotProbed as other:
            why = other if isinstance(e, Asked) and listed.listed else e
        with contextlib.suppress(NotProbed):
            return _record(module, forward, args, kwargs, flat, "any" if tried.unrolled else "none", _Tried())
        raise why from None


@dataclass
class _Tried:
    """looped: there was a loop over tokens. unrolled: an expert was chosen by data outside of one. listed: tokens went into lists."""

    looped: bool = False
    unrolled: bool = False
    listed: bool = False


def _record(
    module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], flat: bool, loops: str, tried: _Tried
) -> Recording:
    numbers, reads = Numbers(), Reads()
    fake = FakeTensorMode(shape_env=numbers, allow_non_fake_inputs=False, static_shapes=False)
    fake.cache_enabled = False  # each expert has a number of rows of its own: filling the cache takes as long as the calls
    shadow, names = shadow_of(module, fake)
    tape = Tape(names, forward.__code__.co_filename)
    inputs, spec = tree_flatten((args, kwargs))
    mine, sources = _placeholders(tape, inputs, fake)
    a, k = tree_unflatten(list(mine), spec)
    recorder = Recorder(numbers, tape, shadow, entering=lambda m: reads.run(type(m).forward), flat=flat, loops=loops)
    done = Recording(
        tape.graph, None, tape.lines, tape.file, numbers, mine, sources, reads=reads, classes=recorder.classes, values=tape.value
    )
    done.paths = [_path(p) for p, _ in tree_flatten_with_path((args, kwargs))[0]]
    before, state, places = _Before(shadow), state_of(shadow, (a, k)), places_of(shadow)
    outside = marks(places)

    def path_of(m: nn.Module) -> str | None:
        return names.get(id(m)) if recorder.on else None

    writes = Writes(recorder, reads, set(sources))
    with outside_put_back(shadow):
        patches = listening(recorder), whole_numbers(module, shims(recorder)), reads.watching(forward, path_of), writes.watching(path_of)
        with torch.enable_grad(), fake, contextlib.ExitStack() as stack:
            for patch in (*patches, recorder):
                stack.enter_context(patch)
            out = _run(recorder, forward, shadow, a, k, tried)
            grad, outside_after = torch.is_grad_enabled(), marks(places)  # before `whole_numbers` puts the files' globals back
        done.rebound = before.rebound(tape)
        done.written = list(writes.names)
        known = {*done.rebound, *(f"{path}.{n}".lstrip(".") for path, n in done.written)}
        changed = [n for n in left_behind(state, state_of(shadow, (a, k))) if n not in known]
        before.refuse_changes([*changed, *left_behind(outside, outside_after)], grad)
    if loops == "lists" and not recorder.listing:
        raise NotProbed("no loop puts tokens into lists")
    done.output = tape.result(out)
    done.beyond = tokens_to_try(recorder, reads) if recorder.listing else 0
    done.entered = list(dict.fromkeys(recorder.entered))
    done.assumptions = {**recorder.assumptions, **numbers.assumptions}
    return done


def _placeholders(tape: Tape, inputs: list[Any], fake: FakeTensorMode) -> tuple[list[Any], dict[sympy.Symbol, tuple[int, int]]]:
    """The arguments to record with, and which (argument, dim) each size is."""
    mine: list[Any] = []
    sources: dict[sympy.Symbol, tuple[int, int]] = {}
    for i, (x, shape) in enumerate(zip(inputs, example_shapes(inputs))):
        if isinstance(x, torch.Tensor):
            x = faked(x, shape, fake)
            tape.hold(tape.graph.placeholder(f"p{i}"), x)
            for d, s in enumerate(x.shape):
                if isinstance(s, torch.SymInt) and isinstance(s.node.expr, sympy.Symbol):
                    sources.setdefault(s.node.expr, (i, d))
        elif not isinstance(x, SCALARS):
            raise NotProbed(f"an argument is a {type(x).__name__}")
        mine.append(x)
    return mine, sources


def _run(recorder: Recorder, forward: Callable[..., Any], shadow: nn.Module, args: tuple, kwargs: dict[str, Any], tried: _Tried) -> Any:
    recorder.on = recorder.numbers.answering = True
    try:
        out = forward(shadow, *args, **kwargs)
        if recorder.loops:
            raise NotProbed("a loop over tokens ends before its last one")
        return out
    except NotProbed:
        raise
    except Exception as e:
        kind = Asked if isinstance(_cause(e), Asked) or _is_index(_cause(e)) else NotProbed
        raise kind(_why(e)) from e
    finally:
        recorder.on = recorder.numbers.answering = False
        if recorder.stop_listening is not None:
            recorder.stop_listening()
        tried.looped, tried.unrolled, tried.listed = recorder.looped, recorder.unrolled, recorder.listing


class _Before:
    """Tensors of the shadow before the forward."""

    def __init__(self, shadow: nn.Module) -> None:
        self.shadow = shadow
        self.versions = {n: p._version for n, p in shadow.named_parameters()}
        self.ids = {name: id(v) for name, v in tensors_of(shadow).items()}

    def rebound(self, tape: Tape) -> dict[str, Node]:
        """Tensors that the forward has put in place of its buffers."""
        now = tensors_of(self.shadow)
        if set(self.ids) - set(now):
            raise NotProbed("the forward takes an attribute of the module away")
        return {n: tape.node(t) for n, t in now.items() if self.ids.get(n) != id(t)}

    def refuse_changes(self, changed: list[str], grad: bool) -> None:
        """changed: names of what else is not as it was. grad: whether gradients are on, as they were."""
        if changed:
            raise NotProbed(f"the forward leaves something behind in {', '.join(changed[:3])}")
        if written := [n for n, p in self.shadow.named_parameters() if self.versions.get(n) != p._version]:
            raise NotProbed(f"the forward writes to its parameter {written[0]}")
        if not grad:
            raise NotProbed("the forward leaves gradients switched off")


def _path(keys: Any) -> str:
    """ "kwargs['mask']" of a key path through (args, kwargs)."""
    first, *rest = keys
    text = ("args", "kwargs")[first.idx]
    for k in rest:
        text += f"[{k.idx if hasattr(k, 'idx') else k.key!r}]"
    return text


def _why(e: Exception) -> str:
    """What stopped the forward, and where in the user's code."""
    cause = _cause(e)
    if isinstance(cause, NotProbed):
        return str(cause)
    tb, place, code = e.__traceback__, "?", ""
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if not file.startswith((torch.__path__[0], __file__.rpartition("/")[0])):
            place, code = f"{file}:{tb.tb_lineno}", code_at(file, tb.tb_lineno)
        tb = tb.tb_next
    if _is_index(cause):
        return f"{place}: a list is indexed by a number that only the data tells: which expert runs is decided one token after the other"
    if type(cause).__name__ == "GuardOnDataDependentSymNode":
        return f"{place}: torch asks for a number that only the data tells, a number of rows or an id, to know a shape{code}"
    if "convert all Tensors to FakeTensors" in str(cause):
        return f"{place}: a tensor comes from outside of the module, of a file or an object: a buffer of the module would be seen{code}"
    return f"{place}: {type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:200]}{code}"


def _cause(e: BaseException) -> BaseException:
    while e.__cause__ is not None:
        e = e.__cause__
    return e


def _is_index(e: BaseException) -> bool:
    """Was a number of the data the index of a list?"""
    return type(e).__name__ == "GuardOnDataDependentSymNode" and "specialized integer" in str(e)
