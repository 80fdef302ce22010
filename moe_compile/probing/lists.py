"""Tokens in Python lists, one list an expert: each list stands for the tokens that were put there.

    for t, chosen in enumerate(ids.tolist()):      runs for any token whose id is 0, then for any whose id is 1, and so on (paths.py)
        for k, e in enumerate(chosen):
            lists[e].append((t, k))                lists[0] == [(t0, k0)], lists[1] == [(t1, k1)]
    rows = torch.tensor([t for t, _ in lists[1]])  the first of torch.where(ids == 1)

The loops' numbers and what was read by them are good for a whole list of them, as a tensor, an index or by its length; taken apart, nothing
tells which token it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sympy
import torch

from moe_compile.probing import formulas
from moe_compile.probing.batched import after, dependent
from moe_compile.probing.calls import writes
from moe_compile.probing.emptiness import name_of
from moe_compile.probing.errors import NotProbed, users_frame, where
from moe_compile.probing.paths import Cell, Path, cell_of, keep

if TYPE_CHECKING:
    from moe_compile.probing.recorder import Recorder
    from moe_compile.probing.tokens import Loop

_TENSORS = {"tensor", "as_tensor", "asarray", "new_tensor"}
_JOINED = {"stack", "cat", "concat", "concatenate"}


# ---------------------------------------------------------------- within the loop
def asked(r: Recorder, t: torch.Tensor) -> int | None:
    """The id of a token on this way through the loop's body."""
    path = open_path(r)
    below = r.ranges.below(t) if path is not None and not t.dim() else None
    if path is None or below is None or (cell := cell_of(r, t)) is None:
        return None
    return path.ask(cell, below)


def asked_truth(r: Recorder, t: torch.Tensor) -> bool | None:
    path = open_path(r)
    cell = cell_of(r, t) if path is not None and t.dtype is torch.bool else None
    return None if path is None or cell is None else bool(path.ask(cell, 2))


def open_path(r: Recorder) -> Path | None:
    return r.loops[0].path if r.loops else None


def note_number(r: Recorder, s: sympy.Symbol, t: torch.Tensor) -> None:
    """The symbol is one token's number."""
    if open_path(r) is not None and (cell := cell_of(r, t)) is not None:
        r.members[s] = cell


def close(r: Recorder, loop: Loop) -> None:
    """What was written down for one token is nothing that the program does."""
    place, body = where(users_frame()), after(loop.start)
    for n in body:
        if writes(name_of(n)) or name_of(n) in ("opened", "closed") or n.op == "call_module":
            raise NotProbed(f"{place}: a loop that puts tokens into lists does more than that ({name_of(n)})")
    gone = dependent(body, [n for _, _, n in loop.rows.values()])
    for n in gone:
        if isinstance(t := r.tape.value.get(n), torch.Tensor):
            cell_of(r, t)
    r.tape.forget(gone)


# ---------------------------------------------------------------- behind it
def tensor(r: Recorder, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """torch.tensor(rows), torch.stack(shares): of a list of what tokens have left."""
    given = args[1:] if name == "new_tensor" else args
    if not given or not isinstance(given[0], list | tuple) or name not in _TENSORS | _JOINED or not _of_tokens(r, given[0]):
        return None
    if name in _JOINED and (len(given) > 1 or kwargs):
        raise NotProbed(f"{where(users_frame())}: what tokens have put into lists is joined along another dimension than the first")
    if name in _JOINED:
        if not isinstance(given[0][0], torch.Tensor) or name != "stack":
            raise NotProbed(f"{where(users_frame())}: {name} of what tokens have put into lists")
        return values(r, given[0])
    with r:
        made = values(r, given[0]).detach()
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if made.is_floating_point() else made.dtype)
        return made.to(kwargs.get("device") or made.device, dtype)


def values(r: Recorder, members: Any) -> torch.Tensor:
    """[n, ...] what each token has put into the list."""
    paths = {id(p): p for x in members for p in _paths(r, x)}
    if len(members) != 1 or len(paths) != 1:
        raise NotProbed(f"{where(users_frame())}: a list into which tokens are put at several places, or other things as well")
    path = next(iter(paths.values()))
    if path is open_path(r):
        raise NotProbed(f"{where(users_frame())}: a list of tokens is read in the loop that fills it")
    return _value(r, members[0], path)


def length(r: Recorder, x: Any) -> Any:
    """len(x), which only the data tells of a list of tokens; None for other things."""
    if not isinstance(x, list | tuple | dict | set):
        return None
    if open_path(r) is not None and not isinstance(x, tuple):
        raise NotProbed(f"{where(users_frame())}: a loop that puts tokens into lists asks how many things are in one")
    if not isinstance(x, list | tuple) or isinstance(x, torch.Size) or not _of_tokens(r, x):
        return None
    paths = [p for part in x for p in _paths(r, part)]
    if len(x) > 1 or paths[0] is open_path(r):
        return None  # a pair (t, k)
    return next(iter(paths[0].places(r).values())).shape[0]


def element(r: Recorder, x: torch.Tensor, index: Any) -> torch.Tensor | None:
    """w[t, k], read behind the loop: good for a list of such, only."""
    parts = index if isinstance(index, tuple) else (index,)
    loops = [r.members.get(p.node.expr) if isinstance(p, torch.SymInt) else None for p in parts]
    here = [loop for loop in loops if loop is not None and not isinstance(loop, Cell)]
    if not here or open_path(r) is not None:
        return None
    rest = parts[len(here) :]
    if loops[: len(here)] != here or not all(isinstance(p, int | slice) for p in rest):
        raise NotProbed(f"{where(users_frame())}: an index of several kinds, one of them a token's number")
    r.tape.node(x)
    with r.off():
        first = (*[0] * len(here), *rest)
        row = x[first].clone()
    keep(r, row, Cell(x, x._version, tuple(here), tuple(rest)))
    r.tape.gone[id(row)] = None
    return row


# ---------------------------------------------------------------- what members are
def _of_tokens(r: Recorder, x: Any) -> bool:
    return bool(r.members) and any(True for _ in _paths(r, x))


def _paths(r: Recorder, x: Any) -> Iterator[Path]:
    """On which ways through which loops it was made."""
    if isinstance(x, list | tuple):
        for part in x:
            yield from _paths(r, part)
    elif isinstance(x, torch.SymInt | torch.SymFloat):
        for s in x.node.expr.free_symbols & r.members.keys():
            found = r.members[s]
            yield from _paths_of((found,) if not isinstance(found, Cell) else found.loops)
    elif isinstance(x, torch.Tensor) and id(x) in r.cells:
        yield from _paths_of(r.cells[id(x)][1].loops)


def _paths_of(loops: tuple[Loop, ...]) -> Iterator[Path]:
    yield from (loop.path for loop in loops if loop.path is not None)


def _value(r: Recorder, x: Any, path: Path) -> torch.Tensor:
    places = path.places(r)
    with r:
        if isinstance(x, torch.Tensor) and id(x) in r.cells:
            return _gathered(r.cells[id(x)][1], places)
        if isinstance(x, torch.SymInt | torch.SymFloat):
            return _number(r, x, places)
        if isinstance(x, list | tuple):
            return torch.stack([_value(r, part, path) for part in x], dim=1)
        if isinstance(x, int | float):
            return torch.full_like(next(iter(places.values())), x, dtype=None if isinstance(x, int) else torch.get_default_dtype())
    raise NotProbed(f"{where(users_frame())}: a {type(x).__name__} in a list of tokens")


def _gathered(cell: Cell, places: dict[int, torch.Tensor]) -> torch.Tensor:
    return cell.at(tuple(_rows(loop, places) for loop in cell.loops))


def _rows(loop: Loop, places: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(loop) not in places:
        raise NotProbed(f"{where(users_frame())}: a list of tokens is filled by a loop in which nothing was asked of the data")
    return places[id(loop)]


def _number(r: Recorder, x: Any, places: dict[int, torch.Tensor]) -> torch.Tensor:
    """A token's number, or what Python has made of it."""

    def symbol(s: sympy.Symbol) -> Any:
        found = r.members.get(s)
        if found is None:
            raise NotProbed(f"{where(users_frame())}: a number in a list of tokens is computed from sizes")
        return _gathered(found, places) if isinstance(found, Cell) else _rows(found, places)

    made = formulas.written(x.node.expr, symbol, lambda function, args: function(*args))
    if not isinstance(made, torch.Tensor):
        raise NotProbed(f"{where(users_frame())}: a number in a list of tokens that is none of a token")
    return made
