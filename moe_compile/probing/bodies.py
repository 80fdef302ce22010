"""The code of a loop that puts tokens into lists, read for decisions that no recording sees.

A list's length and Python's own numbers are others when the loop is recorded than when it runs: `if used[e] < limit` must not be in it.
What compares for equality, or cuts a list, is let through; the check then takes more tokens than any whole number that the code knows.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from moe_compile.probing.errors import NotProbed, of_user_file

if TYPE_CHECKING:
    from moe_compile.probing.reads import Reads
    from moe_compile.probing.recorder import Recorder

LARGEST = 8192  # tokens that the check takes
_FEW = 32
_NO_QUESTION = {"TO_BOOL", "UNARY_NOT", "EXTENDED_ARG", "CACHE", "NOT_TAKEN"}
_SLICES = {"BUILD_SLICE": None, "BINARY_SLICE": 2, "STORE_SLICE": 2}


def refuse_decisions(r: Recorder, frame: FrameType | None) -> None:
    """frame: the code that goes to the loop's first token."""
    body = _body(frame) if frame is not None and not frame.f_code.co_flags & inspect.CO_GENERATOR else []
    if frame is None or not body:  # whoever goes through a generator decides in code of its own
        raise NotProbed("tokens are put into lists, and not in a plain `for` loop")
    _refuse(body, frame.f_code)
    r.beyond |= any(i.opname == "COMPARE_OP" for i in body)


def listen(r: Recorder, loop: FrameType | None) -> None:
    """From now on, note the code that the user's code calls, but for torch's: in such loops, and behind them."""
    before, frames = sys.getprofile(), []
    while loop is not None:
        frames.append(loop)
        loop = loop.f_back
    outer = set(map(id, frames))  # no other frame gets one of these, as `stop` keeps them

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event != "call" or (caller := frame.f_back) is None:
            return
        mine = id(caller) in outer or caller.f_code in r.called or caller.f_code in r.later
        if mine and of_user_file(frame.f_code.co_filename):
            (r.called if r.loops else r.later).add(frame.f_code)

    def stop() -> None:
        sys.setprofile(before)
        frames.clear()
        r.stop_listening = None

    r.stop_listening = stop
    sys.setprofile(note)


def tokens_to_try(r: Recorder, reads: Reads) -> int:
    """0, or more tokens than any whole number that the code knows, where it may cut lists of tokens, or count tokens, by one."""
    for code in r.called:
        _refuse(_instructions(code), code)
    unknown = {code for code in r.called | r.later if code not in reads.codes and "<" not in code.co_name}
    if any(map(_cuts, unknown)):
        raise NotProbed("tokens are put into lists, and a method of an object cuts something at a place that nobody has noted")
    elsewhere = len({code.co_filename for code in {*reads.codes, *r.called, *r.later}}) > 1
    if not (r.beyond or elsewhere or any(map(_cuts, {*reads.codes, *r.called, *r.later}))):
        return 0
    most = max(_numbers(reads), default=0)
    if most >= LARGEST:
        raise NotProbed(
            f"tokens are put into lists by code that compares or cuts, and that knows the number {most}: the check has not so many"
        )
    return most + 1 if most > _FEW else 0


def _body(frame: FrameType) -> list[dis.Instruction]:
    each = list(_instructions(frame.f_code))
    head = next((i for i in each if i.offset == frame.f_lasti and i.opname == "FOR_ITER"), None)
    if head is None:
        return []
    inside = [i for i in dis.get_instructions(frame.f_code) if head.offset < i.offset < head.argval]
    return [*inside, *[j for i in inside if isinstance(i.argval, CodeType) for j in _instructions(i.argval)]]


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """Those of the code in it as well."""
    yield from dis.get_instructions(code)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _instructions(inner)


def _refuse(body: Iterable[dis.Instruction], code: CodeType) -> None:
    before, line = "", code.co_firstlineno
    for i in body:
        line = _line(i) or line
        at = f"{code.co_filename}:{line}"
        if i.opname == "COMPARE_OP" and any(sign in str(i.argval) for sign in "<>"):
            raise NotProbed(f"{at}: a loop that puts tokens into lists compares numbers by {i.argval}, as where experts have a capacity")
        if "JUMP" in i.opname and "_IF_" in i.opname and before not in ("COMPARE_OP", "CONTAINS_OP", "IS_OP"):
            raise NotProbed(f"{at}: a loop that puts tokens into lists decides by a truth value")
        before = before if i.opname in _NO_QUESTION else i.opname


def _line(i: Any) -> int | None:
    found = getattr(i, "line_number", i.starts_line)
    return found if type(found) is int else None


def _cuts(code: CodeType) -> bool:
    """Does it cut anything at a place that is not a small constant?"""
    each = list(_instructions(code))
    for at, i in enumerate(each):
        if i.opname in _SLICES:
            bounds = each[max(at - (_SLICES[i.opname] or int(i.arg or 2)), 0) : at]
            if not all(
                b.opname == "LOAD_CONST" and (b.argval is None or (type(b.argval) is int and abs(b.argval) <= _FEW)) for b in bounds
            ):
                return True
    return False


def _numbers(reads: Reads) -> Iterator[int]:
    """Whole numbers that the code names."""
    for code, names in reads.codes.items():
        yield from _within(code.co_consts)
        yield from _within([names[n] for n in code.co_names if n in names])
    yield from _within(list(reads.attributes.values()))
    yield from _within([cell.cell_contents for cell in reads.cells])


def _within(x: Any) -> Iterator[int]:
    if type(x) is int:
        yield x
    elif isinstance(x, CodeType):
        yield from _within(x.co_consts)
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _within(part)
    elif isinstance(x, dict):
        yield from _within(list(x.values()))
