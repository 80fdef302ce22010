"""Python loops over tokens: their body runs once, on the row of any one token, and becomes torch calls on all of them (batched.py).

A loop is one over `range(x.shape[0])`, over a tensor whose first size varies, or over a list of it; several of them side by side (zip,
enumerate) are one loop, and loops may stand in each other. Within, `x[t]` is a row. What one token computes may go into row t of a tensor,
or be the only entry of a list that torch stacks afterwards; anything else that is left of the last token is refused. A loop that only puts
tokens into lists, one an expert, goes through its body more than once (lists.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node

from moe_compile.probing import lists
from moe_compile.probing.bodies import listen, refuse_decisions
from moe_compile.probing.errors import NotProbed, users_frame, where
from moe_compile.probing.numbers import length_of, of_data
from moe_compile.probing.paths import Cell, Path, keep

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder


def row_of(x: torch.Tensor) -> torch.Tensor:
    """Stands on the tape for x[t] until the loop is over."""
    raise AssertionError("a row of one token outside of its loop")


class Place(NamedTuple):
    """An index with a token's number: what stands before it and behind it, and whether it is t:t+1."""

    loop: Loop
    before: tuple
    rest: tuple
    one: bool


class Loop:
    """One loop over tokens: what is written down from `start` on is its body."""

    def __init__(self, r: Recorder, length: Any) -> None:
        self.r, self.length = r, length
        self.start: Node | None = None
        self.over = False
        self.outer: tuple[Loop, ...] = ()  # those that it stands in
        self.path: Path | None = None  # where tokens go into lists: this way through the outermost loop
        self.next: Loop | None = None  # the same loop on its next way
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor, Node]] = {}  # id of a tensor -> it, its row, the row's node
        self.versions: dict[int, int] = {}
        self.turned: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (id, dimension) -> it, with that dimension first
        with r.numbers.ignore_fresh_unbacked_symbols():
            self.number = r.numbers.create_unbacked_symint()

    def open(self) -> None:
        self.start = next(iter(reversed(self.r.tape.graph.nodes)), None) or self.r.tape.graph._root
        self.outer = tuple(self.r.loops)
        if self.r.over_tokens == "lists":
            self._begin_path()
        self.r.loops.append(self)
        self.r.looped = True

    def _begin_path(self) -> None:
        if self.outer:
            self.path = self.outer[0].path
        elif self.path is None:
            self.path, self.r.listing = Path(), True
            refuse_decisions(self.r, frame := users_frame())
            if self.r.stop_listening is None:
                listen(self.r, frame)
        self.r.members[self.number.node.expr] = self

    def close(self) -> None:
        from moe_compile.probing.batched import batch

        if self.r.loops[-1:] != [self]:
            raise NotProbed(f"{where(users_frame())}: a loop over tokens ends before one that stands in it")
        self.r.loops.pop()
        self.r.stacked.clear()  # it holds rows of this loop
        self.over = True
        if self.path is None:
            batch(self.r, self)
        else:
            lists.close(self.r, self)

    def again(self) -> Loop | None:
        """The same loop once more, where another way leads through its body."""
        if self.next is None and self.path is not None and not self.outer and (turns := self.path.following()) is not None:
            self.next = Loop(self.r, self.length)
            self.next.path = Path(turns, self.path.number)
        return self.next

    def now(self) -> Loop:
        return self if self.next is None else self.next.now()

    def row(self, x: torch.Tensor) -> torch.Tensor:
        """x[t]"""
        if not x.dim() or not _same(x.shape[0], self.length):
            raise NotProbed(f"{where(users_frame())}: a loop over tokens reads a tensor by the token's number that has not a row for each")
        if id(x) not in self.rows:
            n, version = self.r.tape.node(x), x._version
            with self.r.off():
                row = x.select(0, 0)
            held = self.r.tape.add("call_function", row_of, (n,))
            self.r.tape.hold(held, row)
            self.r.ranges.note("getitem", (x,), {}, row)
            self.rows[id(x)], self.versions[id(x)] = (x, row, held), version
            if self.path is not None:
                known = self.r.cells.get(id(x))
                keep(self.r, row, known[1].row(self) if known is not None else Cell(x, version, (self,)))
        return self.rows[id(x)][1]


def _same(a: Any, b: Any) -> bool:
    a, b = (x.node.expr if isinstance(x, torch.SymInt) else x for x in (a, b))
    return bool(a == b)


# ---------------------------------------------------------------- what goes through the tokens
class Visits:
    """An iterator with one item, that of any token. Those that are made before the first of them begins are one loop."""

    def __init__(self, r: Recorder, length: Any, item: Callable[[Loop], Any]) -> None:
        waiting = r.waiting
        if waiting is None or waiting.start is not None or not _same(waiting.length, length):
            waiting = r.waiting = Loop(r, length)
        self.loop, self.item, self.begun = waiting, item, False

    def __iter__(self) -> Visits:
        return self

    def __next__(self) -> Any:
        if self.begun:
            if not self.loop.over:
                self.loop.close()
            again = self.loop.again()
            if again is None:
                raise StopIteration
            self.loop = again
        if self.loop.start is None:
            self.loop.open()
        self.begun = True
        return self.item(self.loop)


class _Range:
    """range(number of tokens)"""

    def __init__(self, r: Recorder, length: Any) -> None:
        self.r, self.length = r, length

    def __iter__(self) -> Iterator[Any]:
        return Visits(self.r, self.length, lambda loop: loop.number)

    def __len__(self) -> int:
        raise NotProbed(f"{where(users_frame())}: the length of a range of tokens")


def over_rows(r: Recorder, t: torch.Tensor, item: Callable[[torch.Tensor], Any] = lambda row: row) -> Iterator[Any]:
    """for row in t"""
    return Visits(r, t.shape[0], lambda loop: item(loop.row(t)))


def shims(r: Recorder) -> dict[str, Any]:
    """`range` and `enumerate`, which know numbers of tokens."""

    def tokens(*args: Any) -> Any:
        stop = args[-1] if len(args) == 1 or (len(args) == 2 and type(args[0]) is int and args[0] == 0) else None
        if r.on and (is_size(r, stop) or (type(stop) is int and _taken_for_tokens(r, stop))):
            return _Range(r, stop)
        return range(*args)

    def numbered(things: Any, start: int = 0) -> Any:
        each, loop = iter(things), r.waiting
        return enumerate(each, start) if loop is None or loop.start is not None else ((loop.now().number + start, x) for x in each)

    def length(x: Any) -> Any:
        found = lists.length(r, x) if r.on and r.over_tokens == "lists" else None
        return length_of(x) if found is None else found

    return {"range": tokens, "enumerate": numbered, "len": length}


def _taken_for_tokens(r: Recorder, stop: int) -> bool:
    """Is a loop over a constant one over tokens, or over a token's slots while tokens are put into lists?"""
    return (r.over_tokens == "any" and not r.loops and stop > 1) or (lists.open_path(r) is not None and stop > 0)


def is_size(r: Recorder, n: Any) -> bool:
    """A number of tokens: a symbol that the shapes of the inputs tell, where loops over tokens are looked for at all."""
    return r.over_tokens != "none" and isinstance(n, torch.SymInt) and bool(n.node.expr.free_symbols) and not of_data(n)


# ---------------------------------------------------------------- x[t]
def place(r: Recorder, index: Any) -> Place | None:
    """Where an index has the number of a loop's token, of the outermost loop that has one there."""
    parts = index if isinstance(index, tuple) else (index,)
    for loop in r.loops:
        for at, part in enumerate(parts):
            one = isinstance(part, slice) and part.step is None
            if _is_number(loop, part.start if one else part) and (not one or _same(part.stop, loop.number + 1)):
                return Place(loop, parts[:at], parts[at + 1 :], one)
    return None


def _is_number(loop: Loop, n: Any) -> bool:
    return isinstance(n, torch.SymInt) and _same(n, loop.number)


def of_token(r: Recorder, n: Node) -> bool:
    """Is it computed from the row of a token whose loop is open?"""
    rows, seen, todo = {node for loop in r.loops for _, _, node in loop.rows.values()}, set(), [n]
    while todo:
        n = todo.pop()
        if n in rows:
            return True
        seen.add(n)
        todo += [a for a in n.all_input_nodes if a not in seen]
    return False


def _first(r: Recorder, x: torch.Tensor, at: Place) -> torch.Tensor:
    """x[2, :, t] is [2, :] of row t of x.movedim(2, 0)."""
    d = len(at.before)
    if not all(isinstance(p, int | slice | torch.SymInt) for p in at.before):
        raise NotProbed(f"{where(users_frame())}: an index of several kinds in a loop over tokens")
    if d and (id(x), d) not in at.loop.turned:
        with r:
            at.loop.turned[id(x), d] = x, x.movedim(d, 0)
    return at.loop.turned[id(x), d][1] if d else x


def read(r: Recorder, x: torch.Tensor, at: Place) -> torch.Tensor:
    row, rest = at.loop.row(_first(r, x, at)), _rest(at)
    with r:
        row = row.unsqueeze(len(at.before)) if at.one else row
        found = row[rest] if rest else row
    known = r.cells.get(id(row))
    if known is not None and rest and id(found) not in r.cells and not at.one:
        keep(r, found, known[1].part(rest))
    return found


def write(r: Recorder, x: torch.Tensor, at: Place, value: Any) -> None:
    row, rest = at.loop.row(_first(r, x, at)), _rest(at)
    if value is row and not rest:  # out[t] += y has written it already
        return
    with r:
        row = row.unsqueeze(len(at.before)) if at.one else row
        row[rest or Ellipsis] = value


def _rest(at: Place) -> tuple:
    """The index of the row."""
    rest = (*at.before, *(slice(None),) * at.one, *at.rest)
    return rest if any(not isinstance(p, slice) or p != slice(None) for p in rest) else ()


# ---------------------------------------------------------------- lists of rows
def stacked(r: Recorder, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """torch.stack or cat of the only entry that a loop over tokens has put into a list: all tokens' entries."""
    each = args[0] if args else kwargs.get("tensors")
    if name not in ("stack", "cat", "concat", "vstack") or not isinstance(each, list | tuple) or len(each) != 1:
        return None
    found = r.tape.gone.get(id(each[0])) if isinstance(each[0], torch.Tensor) else None
    if found is None:
        return None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim != 0 or "out" in kwargs:
        raise NotProbed(f"{where(users_frame())}: what tokens have computed is put together along another dimension than the first")
    with r:
        every = r.tape.value[found]
        if name == "stack":
            return every.clone()
        return every.flatten(0, 1) if every.dim() > 1 + (name == "vstack" and each[0].dim() == 1) else every.clone()
