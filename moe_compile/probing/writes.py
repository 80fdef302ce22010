"""Plain values that a forward puts into attributes of modules: the program does so at the same place.

self.input_dtype = x.dtype      need not be there before; whoever reads it afterwards sees this value, not one to compare with

Only what no code has read before in this call: anything else is left to `state.py`, which refuses what has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import sympy
import torch
from torch import nn

from moe_compile.probing.errors import NotProbed, users_frame, where
from moe_compile.probing.reads import SCALARS, Reads
from moe_compile.probing.recorder import Recorder

At = tuple[str, str]  # path of a module, name of its attribute


class Writes:
    """names: what has been written down. sizes: symbols that are sizes of the arguments, all that a number may be made of."""

    def __init__(self, recorder: Recorder, reads: Reads, sizes: set[sympy.Symbol]) -> None:
        self.recorder, self.reads, self.sizes = recorder, reads, sizes
        self.names: dict[At, None] = {}

    @contextlib.contextmanager
    def watching(self, path_of: Callable[[nn.Module], str | None]) -> Iterator[None]:
        """path_of: the path of a module while its attributes are to be watched, else None."""
        before = nn.Module.__setattr__

        def write(m: nn.Module, name: str, value: Any) -> None:
            before(m, name, value)
            if (path := path_of(m)) is not None:
                self._note((path, name), value)

        with mock.patch.object(nn.Module, "__setattr__", write):
            yield

    def _note(self, at: At, value: Any) -> None:
        if self.reads.seen(*at):
            return
        if not self._plain(value) or self.recorder.loops or self._runs_as_a_whole(at[0]):
            if at in self.names:
                raise NotProbed(f"{where(users_frame())}: {at[1]} is written twice, and the second time not with a plain value")
            if isinstance(value, torch.Tensor) and not at[0]:
                self.reads.written.add(at)  # one of `rebound`
            return
        tape = self.recorder.tape
        tape.add("call_function", setattr, (tape.add("get_attr", at[0]), at[1], tape.written(value)))
        self.names[at] = None
        self.reads.written.add(at)

    def _plain(self, value: Any) -> bool:
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return set(value.node.expr.free_symbols) <= self.sizes
        if type(value) is tuple:
            return all(map(self._plain, value))
        return type(value) in SCALARS  # not a number of a class of its own

    def _runs_as_a_whole(self, path: str) -> bool:
        """Has the module run in a call that is one node?  What its code has read of itself then, nobody has noted."""
        wholes = (str(n.target) for n in self.recorder.tape.graph.nodes if n.op == "call_module")
        return any(path == w or path.startswith(f"{w}.") for w in wholes)


def written_now(module: nn.Module, names: tuple[At, ...]) -> dict[str, Any]:
    """What stands under these names."""
    return {f"attribute {path}.{n}".replace(" .", " "): vars(module.get_submodule(path)).get(n) for path, n in names}


@contextlib.contextmanager
def put_back_written(module: nn.Module, names: tuple[At, ...]) -> Iterator[None]:
    """What stands under these names is afterwards what it was, or is not there."""
    tables = [(vars(module.get_submodule(path)), n) for path, n in names]
    before = [table.get(n, put_back_written) for table, n in tables]
    try:
        yield
    finally:
        for (table, n), value in zip(tables, before):
            table.pop(n, None)
            if value is not put_back_written:
                table[n] = value
