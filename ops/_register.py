"""The one way an op of this project is registered: schema, kernel, fake and backward under torch.ops.moe_compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

from . import replay

NAMESPACE = "moe_compile"
BELOW = "_below_autograd"  # behind the name of an op with gradients: the same without, one dispatch less


@dataclasses.dataclass(frozen=True)
class Op:
    """One registered op: what torch.ops calls.

    name: its name in torch.ops.moe_compile; schema: its full schema text; kernel, fake: as torch.library takes them.
    autograd: the kernel of the Autograd key: an autograd.Function around the op below Autograd. None for an op that is
    only called below it. composite: the kernel is torch code that is traced through. replays: may a call on a
    GPU with such arguments be replayed (replay.py)? It decides by nothing but sizes, strides, dtypes, devices, alignment and constants.
    """

    name: str
    schema: str
    kernel: Callable[..., Any]
    fake: Callable[..., Any]
    autograd: Callable[..., Any] | None = None
    composite: bool = False
    tags: tuple[Any, ...] = ()
    replays: Callable[[tuple[Any, ...]], bool] | None = None

    @property
    def overload(self) -> Any:
        """The OpOverload, e.g. torch.ops.moe_compile.combine.default."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    *,
    composite: bool = False,
    tags: tuple[Any, ...] = (),
    replays: Callable[[tuple[Any, ...]], bool] | None = None,
) -> Op:
    """Registers a functional op, or replaces the implementation of one registered with the same schema.

    tags: of torch.Tag, beside pt2_compliant_tag. replays: as in Op.

    torch keeps the first registration when a module is imported twice (a reload, a second copy on sys.path) and
    says nothing. So torch gets trampolines that look the op up in a table owned by torch.ops.moe_compile, and a
    second registration replaces the table's entry: compiled graphs go on working, and call the new code.

    Raises RuntimeError if the name is registered with another schema.
    """
    op = Op(schema[: schema.index("(")], schema, kernel, fake, autograd, composite, tags, replays)
    table = _table()
    old = table.get(op.name)
    if old is not None and old[0].schema != schema:
        raise RuntimeError(
            f"{NAMESPACE}::{op.name} is already registered as {old[0].schema!r}, now as {schema!r}. "
            "Two versions of moe_compile are imported in one process; start a new one."
        )
    # The Library must live as long as the process: torch unregisters the op when it is collected.
    table[op.name] = (op, old[1] if old is not None else _define(op))
    replay.forget()
    return op


def register_composite(schema: str, function: Callable[..., Any]) -> Op:
    """Registers an op without a kernel of its own: whoever traces it sees the torch code and the ops that `function` calls.

    Raises RuntimeError as register_op does.
    """
    return register_op(schema, function, function, composite=True)


def below_autograd() -> Any:
    """A context in which an op's own call goes past its Autograd kernel."""
    return torch._C._AutoDispatchBelowAutograd()


def twin_below(overload: Any) -> Any:
    """The op that Inductor's graphs call in place of one of ours, where nothing is left of autograd: 5 us less. None if it has none."""
    name = overload._schema.name.removeprefix(NAMESPACE + "::") if getattr(overload, "namespace", "") == NAMESPACE else ""
    found = _table().get(name)
    if found is None or found[0].autograd is None:
        return None
    return getattr(getattr(torch.ops, NAMESPACE), name + BELOW).default


def _table() -> dict[str, tuple[Op, Library]]:
    """Ops by name, on torch's own namespace object so that a second import of this module finds them."""
    namespace = vars(getattr(torch.ops, NAMESPACE))
    table: dict[str, tuple[Op, Library]] = namespace.setdefault("_moe_compile_ops", {})
    return table


def _define(op: Op) -> Library:
    """Library.define and impl, not custom_op: 6 us a call where that takes 11 (benchmarks/notes.md)."""
    name, table = op.name, _table()
    library = Library(NAMESPACE, "FRAGMENT")
    library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag, *op.tags))
    lists = [i for i, argument in enumerate(op.overload._schema.arguments) if str(argument.type) == "List[Tensor]"]

    def with_lists(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """AOTInductor's packages give None for an empty list of tensors."""
        if any(i < len(args) and args[i] is None for i in lists):
            return tuple([] if i in lists and arg is None else arg for i, arg in enumerate(args))
        return args

    def compute(args: tuple[Any, ...]) -> Any:
        found = table[name][0]
        if found.replays is not None and found.replays(args):
            return replay.call(name, found.kernel, args)
        return found.kernel(*args)

    def kernel(*args: Any) -> Any:
        args = with_lists(args) if lists else args
        if torch._C._is_any_autocast_enabled():
            # Casts are part of an op's program; the region's autocast must not be applied a second time.
            with torch._C._DisableAutocast():
                return compute(args)
        return compute(args)

    def autograd(*args: Any) -> Any:
        args = with_lists(args) if lists else args
        found = table[name][0].autograd
        return found(*args) if found is not None else kernel(*args)

    if op.composite:
        library.impl(name, kernel, "CompositeImplicitAutograd")
        return library
    own = [name]
    if op.autograd is not None:
        library.impl(name, autograd, "Autograd")
        library.define(op.schema.replace(name, name + BELOW, 1), tags=(torch.Tag.pt2_compliant_tag, *op.tags))
        own.append(name + BELOW)
    for each in own:
        library.impl(each, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{each}", lambda *args: table[name][0].fake(*args), lib=library)
    return library
