"""What Python asks of one token in a loop that puts tokens into lists, and which tokens give the same answers.

The body of such a loop runs once for each way through it (lists.py). On each way a question has one answer: an id is 0, then 1, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from moe_compile.probing.emptiness import name_of
from moe_compile.probing.errors import NotProbed, users_frame, where

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder
    from moe_compile.probing.tokens import Loop

MOST = 4096  # ways through one loop


@dataclass(frozen=True)
class Cell:
    """One token's part of a tensor: source[t, k, *rest], then the steps (a function of one number, its other arguments)."""

    source: torch.Tensor
    version: int
    loops: tuple[Loop, ...]
    rest: tuple = ()
    steps: tuple[tuple[Callable[..., Any], tuple], ...] = ()

    def row(self, loop: Loop) -> Cell | None:
        return None if self.rest or self.steps else replace(self, loops=(*self.loops, loop))

    def part(self, rest: tuple) -> Cell | None:
        return None if self.rest or self.steps else replace(self, rest=rest)

    def key(self) -> Any:
        return id(self.source), tuple(map(id, self.loops)), str(self.rest), tuple((id(f), str(more)) for f, more in self.steps)

    def at(self, index: tuple) -> torch.Tensor:
        """With an index in place of the tokens' numbers. To be called while the recorder listens."""
        if self.source._version != self.version:
            raise NotProbed(f"{where(users_frame())}: what a loop over tokens has put into lists was written to behind it")
        everywhere = (*index, *self.rest)
        t: torch.Tensor = self.source[everywhere]
        for function, more in self.steps:
            t = function(t, *more)
        return t


_POINTWISE = {"eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv"}


def cell_of(r: Recorder, t: torch.Tensor) -> Cell | None:
    """The token's part that the tensor is: a row, an element, or a number computed from one by a single operator and plain numbers."""
    if id(t) in r.cells:
        return r.cells[id(t)][1]
    if t.dim() or not r.tape.holds(t) or id(t) in r.tape.gone:
        return None
    n = r.tape.node(t)
    first, *more = n.args or (None,)
    inner = r.tape.value.get(first) if isinstance(first, Node) else None
    if name_of(n) in ("getitem", "__getitem__") and isinstance(inner, torch.Tensor) and type(more[0]) is int and inner.dim() == 1:
        cell = cell_of(r, inner)
        return keep(r, t, cell.part((more[0],))) if cell is not None else None
    if n.op != "call_function" or name_of(n) not in _POINTWISE or n.kwargs or not isinstance(inner, torch.Tensor):
        return None
    if inner.dim() or any(not isinstance(a, bool | int | float) for a in more) or (cell := cell_of(r, inner)) is None:
        return None
    step: Any = n.target
    return keep(r, t, replace(cell, steps=(*cell.steps, (step, tuple(more)))))


def keep(r: Recorder, t: torch.Tensor, cell: Cell | None) -> Cell | None:
    if cell is not None:
        r.cells[id(t)] = t, cell
    return cell


# ---------------------------------------------------------------- one way through the body
class Path:
    """turns: the answers to the first questions; to later ones, the first of their answers."""

    def __init__(self, turns: tuple[int, ...] = (), before: int = 0) -> None:
        self.turns, self.number = turns, before + 1
        self.asked: dict[Any, tuple[Cell, int, int]] = {}  # -> (cell, the answer, how many there are)
        self._places: dict[int, torch.Tensor] | None = None
        if self.number > MOST:
            raise NotProbed(f"{where(users_frame())}: a loop over tokens asks for so much that there are more than {MOST} ways through it")

    def ask(self, cell: Cell, answers: int) -> int:
        key = cell.key()
        if key not in self.asked:
            at = len(self.asked)
            self.asked[key] = cell, self.turns[at] if at < len(self.turns) else 0, answers
        return self.asked[key][1]

    def following(self) -> tuple[int, ...] | None:
        """The turns of the next way: the last question that has one more answer gets it."""
        turns = [(answer, answers) for _, answer, answers in self.asked.values()]
        while turns and turns[-1][0] + 1 >= turns[-1][1]:
            turns.pop()
        return (*[answer for answer, _ in turns[:-1]], turns[-1][0] + 1) if turns else None

    def places(self, r: Recorder) -> dict[int, torch.Tensor]:
        """id of a loop -> numbers of the tokens, one for each that goes this way, in Python's order."""
        if self._places is None:
            loops = self._grid()
            with r:
                masks = [_where(cell, loops, answer) for cell, answer, _ in self.asked.values()]
                mask = masks[0]
                for other in masks[1:]:
                    mask = mask & other
                self._places = dict(zip(map(id, loops), torch.where(mask)))
            r.assumptions[f"{where(users_frame())}: lists of tokens, one an expert: an empty one adds nothing"] = None
        return self._places

    def _grid(self) -> tuple[Loop, ...]:
        """The loops that go through all that was asked, the outermost first."""
        every = {loop for cell, _, _ in self.asked.values() for loop in cell.loops}
        if not every:
            raise NotProbed(f"{where(users_frame())}: tokens in a list, and nothing that the data tells has put them there")
        deepest = max(every, key=lambda loop: len(loop.outer))
        chain = (*deepest.outer, deepest)
        if not every <= set(chain):
            raise NotProbed(f"{where(users_frame())}: what puts tokens into lists is asked in several loops side by side")
        return chain


def _spread(cell: Cell, loops: tuple[Loop, ...]) -> torch.Tensor:
    """For all tokens at once: a dimension for each of the loops."""
    if [loop for loop in loops if loop in cell.loops] != list(cell.loops):
        raise NotProbed(f"{where(users_frame())}: loops over tokens in another order than the dimensions of what they ask for")
    every = cell.at((slice(None),) * len(cell.loops))
    for d, loop in enumerate(loops):
        every = every if loop in cell.loops else every.unsqueeze(d)
    return every


def _where(cell: Cell, loops: tuple[Loop, ...], answer: int) -> torch.Tensor:
    """For which tokens the question, whether or which expert, has this answer."""
    every = _spread(cell, loops)
    if every.dtype is torch.bool:
        return every if answer else ~every
    return every == answer
