"""The one way an op of this project is registered: schema, kernel, fake and backward under torch.ops.moe_compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

NAMESPACE = "moe_compile"


@dataclasses.dataclass(frozen=True)
class Op:
    """One registered op: what torch.ops calls.

    name: its name in torch.ops.moe_compile; schema: its full schema text; kernel, fake: as torch.library takes them.
    backward, setup_context: as torch.library.register_autograd takes them; backward None raises when differentiated.
    autograd: instead of those two, the whole kernel of the Autograd key.
    """

    name: str
    schema: str
    kernel: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    autograd: Callable[..., Any] | None = None

    @property
    def overload(self) -> Any:
        """The OpOverload, e.g. torch.ops.moe_compile.combine.default."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autograd: Callable[..., Any] | None = None,
) -> Op:
    """Registers a functional op, or replaces the implementation of one registered with the same schema.

    torch keeps the first registration when a module is imported twice (a reload, a second copy on sys.path) and
    says nothing. So torch gets trampolines that look the op up in a table owned by torch.ops.moe_compile, and a
    second registration replaces the table's entry: compiled graphs go on working, and call the new code.

    Raises RuntimeError if the name is registered with another schema.
    """
    op = Op(schema[: schema.index("(")], schema, kernel, fake, backward, setup_context, autograd)
    table = _table()
    old = table.get(op.name)
    if old is not None and old[0].schema != schema:
        raise RuntimeError(
            f"{NAMESPACE}::{op.name} is already registered as {old[0].schema!r}, now as {schema!r}. "
            "Two versions of moe_compile are imported in one process; start a new one."
        )
    # The Library must live as long as the process: torch unregisters the op when it is collected.
    table[op.name] = (op, old[1] if old is not None else _define(op))
    return op


def _table() -> dict[str, tuple[Op, Library]]:
    """Ops by name, on torch's own namespace object so that a second import of this module finds them."""
    namespace = vars(getattr(torch.ops, NAMESPACE))
    table: dict[str, tuple[Op, Library]] = namespace.setdefault("_moe_compile_ops", {})
    return table


def _define(op: Op) -> Library:
    """Library.define and impl, not custom_op: 8 us a call where that takes 20 (benchmarks/notes.md)."""
    name, table = op.name, _table()
    library = Library(NAMESPACE, "FRAGMENT")
    library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*args: Any) -> Any:
        if torch._C._is_any_autocast_enabled():
            # Casts are part of an op's program; the region's autocast must not be applied a second time.
            with torch._C._DisableAutocast():
                return table[name][0].kernel(*args)
        return table[name][0].kernel(*args)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: table[name][0].fake(*args), lib=library)
    if op.autograd is not None:
        library.impl(name, lambda *args: _autograd_of(name)(*args), "Autograd")
    else:
        _define_backward(name, library)
    return library


def _autograd_of(name: str) -> Callable[..., Any]:
    autograd = _table()[name][0].autograd
    if autograd is None:
        raise RuntimeError(f"{NAMESPACE}::{name} was registered again without its autograd kernel; start a new process")
    return autograd


def _define_backward(name: str, library: Library) -> None:
    table = _table()

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup = table[name][0].setup_context
        if setup is not None:
            setup(ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        found = table[name][0].backward
        if found is None:
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no derivative (double backward through the experts is not supported); "
                "run this part of the model in eager mode."
            )
        return found(ctx, *grads)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library)
