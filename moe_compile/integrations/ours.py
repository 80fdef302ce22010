"""Is Dynamo tracing a frame for this package's backend?"""

from __future__ import annotations

from typing import Any

import torch


@torch.compiler.assume_constant_result
def compiling_for_us() -> bool:
    """True while Dynamo traces for `moe_compile`, else False, eager code included.

    Dynamo calls this and takes the answer for a constant, without a guard: what it compiled for us serves only us.
    """
    backend = _backend()
    return getattr(backend, "compiler_name", None) == "moe_compile" or _is_ours(getattr(backend, "compiler_fn", None))


def _is_ours(backend: Any) -> bool:
    from moe_compile.backend import Backend

    return isinstance(backend, Backend)


def _backend() -> Any:
    """The backend of the frame that Dynamo is tracing; None where it is not, or where this torch does not tell."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        backend = InstructionTranslator.current_tx().output.compiler_fn
    except (ImportError, AttributeError):
        return None
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend
