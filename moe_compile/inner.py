"""The compiler behind ours: Inductor, any other that Dynamo knows, or a callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from moe_compile.options import Options


def compile_graph(gm: GraphModule, inputs: Sequence[Any], options: Options, name: str | None = None) -> Callable[..., Any]:
    """Compile Dynamo's graph with options.inner; returns the callable that Dynamo puts in the graph's place."""
    if options.inner == "inductor":
        from moe_compile import inductor

        return inductor.compile_graph(gm, inputs, options, name)
    from torch._dynamo.backends.registry import lookup_backend

    kwargs: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        kwargs["mode"] = options.mode
    if options.inner_options:
        kwargs["options"] = options.inner_options
    return lookup_backend(options.inner)(gm, inputs, **kwargs)


def compiler_config(options: Options) -> Any:
    """The whole Inductor configuration that `options` lead to; None for other inner compilers."""
    if options.inner != "inductor":
        return None
    from moe_compile import inductor

    return inductor.wrapper(options).get_compiler_config()


def reset(options: Options) -> None:
    """Drop the inner compiler's state of earlier compilations (Inductor's CUDA graphs)."""
    if options.inner == "inductor":
        from moe_compile import inductor

        inductor.wrapper(options).reset()
