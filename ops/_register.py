"""The one way an op of this project is registered: schema, kernel, fake and backward under torch.ops.moe_compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

NAMESPACE = "moe_compile"


class Op:
    """One registered op: what torch.ops calls, and what tests and benchmarks need beside it.

    name: the op's name in torch.ops.moe_compile; schema: its full schema text.
    kernel, fake, backward, setup_context: as torch.library takes them; backward None means "raises when differentiated".
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
    ) -> None:
        self.schema = schema
        self.name = schema[: schema.index("(")]
        self.kernel = kernel
        self.fake = fake
        self.backward = backward or _no_backward(self.name)
        self.setup_context = setup_context

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
) -> Op:
    """Registers a functional op, or replaces the implementation of one registered with the same schema.

    torch keeps the first registration when a module is imported twice (a reload, a second copy on sys.path) and says
    nothing. So torch gets trampolines that look the op up in a table owned by torch.ops.moe_compile, and a second
    registration replaces the table's entry: compiled graphs go on working, and call the new code.

    Raises RuntimeError if the name is registered with another schema.
    """
    op = Op(schema, kernel, fake, backward, setup_context)
    table = _table()
    old = table.get(op.name)
    if old is not None and old[0].schema != schema:
        raise RuntimeError(
            f"{NAMESPACE}::{op.name} is already registered with another schema: {old[0].schema!r}, now {schema!r}. "
            "Two versions of moe_compile are imported in one process; start a new one."
        )
    # The Library must live as long as the process: torch unregisters the op when it is collected.
    table[op.name] = (op, old[1] if old is not None else _define(op.name, schema))
    return op


def _table() -> dict[str, tuple[Op, Library]]:
    """Ops by name, stored on torch's own namespace object so that a second import of this module finds it."""
    table: dict[str, tuple[Op, Library]] = vars(getattr(torch.ops, NAMESPACE)).setdefault("_moe_compile_ops", {})
    return table


def _define(name: str, schema: str) -> Library:
    """Library.define/impl and not custom_op: half the cost of a call (benchmarks/notes.md)."""
    table = _table()
    library = Library(NAMESPACE, "FRAGMENT")
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*args: Any) -> Any:
        if _autocast_is_on():
            # Casts are part of an op's program; the region's autocast must not be applied a second time.
            with torch._C._DisableAutocast():
                return table[name][0].kernel(*args)
        return table[name][0].kernel(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup = table[name][0].setup_context
        if setup is not None:
            setup(ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        return table[name][0].backward(ctx, *grads)

    qualified = f"{NAMESPACE}::{name}"
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, lambda *args: table[name][0].fake(*args), lib=library)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)
    return library


def _autocast_is_on() -> bool:
    return bool(torch._C._is_any_autocast_enabled())


def _no_backward(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no derivative (double backward through the experts is not supported); "
            "compute it in eager mode, without backend='moe_compile'."
        )

    return backward
