"""Quantised models of other libraries whose experts call kernels that no graph shows: Dynamo sees their formula instead.

Only while a frame is compiled for us: eager calls and other compilers get what the library has.  `ours.py` says how that is known.

transformers_fp8.py     FP8Experts (fine-grained fp8), by transformers' own registry of experts' functions
transformers_mxfp4.py   Mxfp4GptOssExperts, by the forward of each block of a model
"""

from __future__ import annotations

from typing import Any

from . import transformers_fp8, transformers_mxfp4


def install() -> None:
    """Put the formulas beside the kernels of the libraries that are imported; nothing is imported for it. May be called again."""
    transformers_fp8.install()


def remove() -> None:
    """Undo `install`."""
    transformers_fp8.remove()


def prepare(model: Any) -> list[str]:
    """Give a model's blocks what `install` cannot: `moe_compile.compile` does it. Returns why blocks were left out; `restore` undoes it."""
    install()
    return transformers_mxfp4.prepare(model)


def restore(model: Any) -> None:
    """Undo `prepare`, but for `install`."""
    transformers_mxfp4.restore(model)


__all__ = ["install", "prepare", "remove", "restore"]
