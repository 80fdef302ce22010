"""Compiles what a call of the Triton experts would launch on an H100 or H200, without a GPU: python cross_compile.py prints JSON,
case -> [[kernel, bytes of shared memory], ...] or the error. The interpreter takes much that the compiler does not.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_compile.ops import experts_combine, local_experts
from moe_compile.ops.kernels import launch, launch_backward, launch_few, plan
from moe_compile.ops.quantize_dispatch import counting_sort

SWIGLU = "mm(1, silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {j}, 1))"
SPREAD = "mm(1, silu(cols(mm(0, w * x), 0, {i}, 1)) * cols(mm(0, w * x), {i}, {j}, 1))"
PAIRS = "mm(1, clamp(cols(mm(0, x), 0, {j}, 2), None, 7.0) * sigmoid(1.702 * cols(mm(0, x), 1, {j}, 2)))"
compiled: list[tuple[str, int]] = []


class Driver:
    """A device that can be compiled for and is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(run: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel.metadata.shared))
        return kernel

    return replacement


@contextlib.contextmanager
def pretended() -> Any:
    """CPU tensors are taken for those of an H200."""
    driver.set_active(Driver())
    types: dict[str, Any] = {"multiplied": lambda dtype, device: launch.type_of(dtype), "processors": lambda device: 132}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only(JITFunction.run)))
        stack.enter_context(mock.patch.object(plan, "_check_device"))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", side_effect=contextlib.nullcontext))
        stack.enter_context(mock.patch.object(torch, "empty", torch.zeros))
        for module in (launch, launch_backward, launch_few):
            for name, value in {**types, "starts_early": lambda device: True}.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


def layer(
    tokens: int, top_k: int, experts: int, hidden: int, inter: int, layout: str = "eoi", program: str = SWIGLU,
    dtype: torch.dtype = torch.bfloat16, backward: bool = False,
) -> None:  # fmt: skip
    up, down = (experts, 2 * inter, hidden), (experts, hidden, inter)
    weights = [torch.zeros(s if layout == "eoi" else (s[0], s[2], s[1]), dtype=dtype) for s in (up, down)]
    text, layouts = program.format(i=inter, j=2 * inter), f"{layout},{layout}"
    x, ids, w = torch.zeros((tokens, hidden), dtype=dtype), torch.zeros((tokens, top_k), dtype=torch.int64), torch.zeros((tokens, top_k))
    if not backward:
        local_experts.OP.overload(x, ids, experts, None, weights, [], text, layouts, "", w, dtype, "triton")
        return
    inner, summed = (w, None) if "w *" in text else (None, w)
    args = (x, *counting_sort(ids, experts), inner, weights, [], text, layouts, "", top_k, summed, dtype, "triton")
    needs = [True, inner is not None, True, True, summed is not None]
    out, saved = experts_combine.SAVING_OP.overload(*args, needs)
    experts_combine.BACKWARD_OP.overload(torch.zeros_like(out), saved, *args, needs)


CASES: dict[str, Callable[[], None]] = {
    "one token": lambda: layer(1, 4, 8, 2048, 768),
    "one token, inputs by outputs": lambda: layer(1, 4, 8, 2880, 2880, "eio", PAIRS),
    "16 rows": lambda: layer(16, 4, 16, 2048, 768),
    "32 rows": lambda: layer(64, 4, 16, 2048, 768, "eio", PAIRS),
    "64 rows": lambda: layer(256, 2, 16, 2048, 768),
    "128 rows": lambda: layer(4096, 2, 8, 2048, 768),
    "128 rows, pairs": lambda: layer(4096, 2, 8, 2880, 2880, "eio", PAIRS),
    "128 rows, float32": lambda: layer(1024, 2, 8, 256, 128, dtype=torch.float32),
    "odd sizes": lambda: layer(1024, 2, 8, 250, 101),
    "backward": lambda: layer(4096, 2, 8, 2048, 768, backward=True),
    "backward, weighted rows": lambda: layer(4096, 2, 8, 2048, 768, program=SPREAD, backward=True),
    "backward, pairs, float16": lambda: layer(1024, 2, 8, 256, 128, "eio", PAIRS, torch.float16, backward=True),
}


def main() -> None:
    found: dict[str, Any] = {}
    with pretended():
        for name in sys.argv[1:] or CASES:
            compiled.clear()
            try:
                CASES[name]()
                found[name] = list(dict.fromkeys(compiled))
            except Exception:  # noqa: BLE001  the traceback is the result
                found[name] = traceback.format_exc()
    print(json.dumps({"triton": triton.__version__, "cases": found}))


if __name__ == "__main__":
    main()
