"""What `torch.compile(model, backend="moe_compile")` finds under that name: the backend, and an ear for blocks that it will not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from moe_compile import broken
from moe_compile.backend import Backend
from moe_compile.options import Options, split_report

broken.listen()


def moe_compile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """The entry point behind `torch.compile(model, backend="moe_compile", mode=..., options=...)`.

    gm: Dynamo's graph. options: see Options.parse; "report" is a RewriteReport to fill. name: torch.compile's label
    of the region, passed on to Inductor. Returns the compiled graph. Raises ValueError or TypeError for options that
    cannot be meant.
    """
    broken.listen()
    rest, report = split_report(options)
    return Backend(Options.parse(mode, rest), report, name=name)(gm, example_inputs)
