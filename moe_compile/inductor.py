"""Inductor behind our backend: torch.compile's reading of its options, and a cache key that knows the ops' sources."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import _TorchCompileInductorWrapper
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph, GraphModule

from moe_compile.capture import data_dependent, flags_active
from moe_compile.options import Options
from moe_compile.passes.fuse import fuse

_POST_PASS = "post_grad_custom_post_pass"


# Since torch 2.12 a pass may ask whether the graph is for inference; only such a one may wrap another of the kind.
_INFERENCE_AWARE: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
_PassBase: Any = _INFERENCE_AWARE or custom_graph_pass.CustomGraphPass


def compile_graph(gm: GraphModule, inputs: Sequence[Any], options: Options, name: str | None) -> Callable[..., Any]:
    """compile_fx of the graph, its stages fused, with the configuration of `options`, SourcesInCacheKey and BelowAutograd.

    name: label of the region, if any.
    """
    fuse(gm)
    patches = dict(configuration(options))
    user_passes = patches.get(_POST_PASS, getattr(inductor_config, _POST_PASS))
    patches[_POST_PASS] = SourcesInCacheKey(options, [*_as_list(user_passes), BelowAutograd()])
    region = {"compile_region_name": name} if name else {}
    with functorch_config.patch(_backward_now(gm)):
        return compile_fx(gm, inputs, config_patches=patches, **region)


def _backward_now(gm: GraphModule) -> dict[str, Any]:
    # Inductor compiles the backward graph when it is first needed. If it cannot, for sizes that only the data tells,
    # that must come out now, while the frame can still be captured without the flags.
    key = "force_non_lazy_backward_lowering"
    return {key: True} if flags_active() and data_dependent(gm) and hasattr(functorch_config, key) else {}


def configuration(options: Options) -> dict[str, Any]:
    """Inductor's configuration for `options`: those of the mode, overridden by the user's own."""
    return wrapper(options).config


def wrapper(options: Options) -> Any:
    """torch.compile's own reading of mode and options, with its type checks and settings for CUDA graphs."""
    return _TorchCompileInductorWrapper(options.mode, options.inner_options, None)


class SourcesInCacheKey(_PassBase):  # type: ignore[misc,valid-type]  # torch is Any to mypy
    """No pass of its own: puts the ops' sources into the key of Inductor's caches, which do not look into custom ops.

    user: the passes that stood in its place in the configuration. They run, and key the cache as before.
    """

    def __init__(self, options: Options, user: Any) -> None:
        self._options = options
        self._user = _as_list(user)

    def __call__(self, graph: Graph, is_inference: bool = False) -> None:
        for user_pass in self._user:
            inference = {"is_inference": is_inference} if _knows_inference(user_pass) else {}
            user_pass(graph, **inference)

    def uuid(self) -> str | None:
        """A digest of the ops' sources, the options and the user's passes; None (do not cache) if one has no uuid."""
        from moe_compile.ops import source_hash

        keys = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self._user]
        if None in keys:
            return None
        facts = (source_hash(), self._options.quant, _parallel_key(self._options.parallel), keys)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


class BelowAutograd(custom_graph_pass.CustomGraphPass):  # type: ignore[misc]  # torch is Any to mypy
    """Calls ops by their twins below autograd: what Inductor compiles is run there, and the way through it would only cost time."""

    def __call__(self, graph: Graph) -> None:
        from moe_compile.ops._register import twin_below

        for node in graph.nodes:
            twin = twin_below(node.target) if node.op == "call_function" else None
            node.target = twin or node.target

    def uuid(self) -> str:
        return "moe_compile.BelowAutograd"


def _parallel_key(parallel: Any) -> Any:
    # Process groups print as addresses, which differ from process to process.
    if parallel is None:
        return None
    names = [field.name for field in dataclasses.fields(parallel) if not field.name.endswith("_group")]
    return [(name, getattr(parallel, name)) for name in names]


def _knows_inference(user_pass: Any) -> bool:
    return _INFERENCE_AWARE is not None and isinstance(user_pass, _INFERENCE_AWARE)


def _as_list(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, Iterable) else [passes]
