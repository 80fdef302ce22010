"""Compiles what a call of the Triton experts would launch on an H100 or H200, without a GPU: python cross_compile.py prints JSON,
case -> [[kernel, bytes of shared memory, are registers overtaken?], ...] or the error. The interpreter takes more than the compiler does.
"""

from __future__ import annotations

import contextlib
import json
import re
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

from moe_compile.ops import experts as stage
from moe_compile.ops import experts_batched, experts_combine, experts_triton, local_experts, route
from moe_compile.ops.comm import exchange
from moe_compile.ops.kernels import launch, launch_backward, launch_few, launch_hopper, launch_scaled, launch_scaled_few, plan
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.quantized import scales_dtype, shapes_of, values_dtype
from moe_compile.ops.route import Routing

SWIGLU = "mm(1, silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {j}, 1))"
SPREAD = "mm(1, silu(cols(mm(0, w * x), 0, {i}, 1)) * cols(mm(0, w * x), {i}, {j}, 1))"
PAIRS = "mm(1, clamp(cols(mm(0, x), 0, {j}, 2), None, 7.0) * sigmoid(1.702 * cols(mm(0, x), 1, {j}, 2)))"
FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{")
UNDER_WAY = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]")
compiled: list[tuple[str, int, bool]] = []


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
        ptx = kernel.asm["ptx"]
        compiled.append((self.fn.__name__, kernel.metadata.shared, bool(FROM_REGISTERS.search(ptx) and UNDER_WAY.search(ptx))))
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
        for module in (launch, launch_backward, launch_few, launch_scaled, launch_scaled_few, launch_hopper):
            for name, value in {**types, **dict.fromkeys(("starts_early", "on_a_gpu", "on_hopper"), lambda device: True)}.items():
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


def quantised(kind: str, tokens: int, program: str = SWIGLU, hidden: int = 2048, inter: int = 768, experts: int = 16) -> None:
    """Weights of a kind, top 4."""
    flat = []
    for shape in ((experts, 2 * inter, hidden), (experts, hidden, inter)):
        values, scales = shapes_of(kind, "oi", shape)
        flat += [torch.zeros(values, dtype=values_dtype(kind)), torch.zeros(scales, dtype=scales_dtype(kind))]
    x, ids, w = torch.zeros((tokens, hidden), dtype=torch.bfloat16), torch.zeros((tokens, 4), dtype=torch.int64), torch.zeros((tokens, 4))
    text, layout = program.format(i=inter, j=2 * inter), f"eoi:{kind},eoi:{kind}"
    local_experts.OP.overload(x, ids, experts, None, flat, [], text, layout, "", w, torch.bfloat16, "triton")


def routed(tokens: int, experts: int, routing: Routing) -> None:
    route.by_kernel(torch.zeros((tokens, experts), dtype=torch.bfloat16), torch.zeros(experts) if routing.num_groups > 1 else None, routing)


def batched(rows: int, capacity: int, sent: torch.dtype = torch.bfloat16, kind: str = "", experts: int = 32) -> None:
    """rows: that an expert is likely to have. sent: the rows' dtype as they come. kind: of quantised weights."""
    hidden, inter, counts = 2048, 768, torch.zeros(experts, dtype=torch.int32)
    weights, layout = [torch.zeros(s, dtype=torch.bfloat16) for s in ((experts, 2 * inter, hidden), (experts, hidden, inter))], "eoi"
    x, scales = torch.zeros((experts * capacity, hidden), dtype=sent), torch.zeros((experts * capacity, hidden // 128))
    batch = experts_batched.Batch(counts, capacity, rows * experts, experts * capacity)
    if sent != torch.bfloat16 and not kind:
        got = exchange.Received(x, scales, None, [], [], exchange.ExpertTokensMetadata(counts))
        x = experts_batched.plain_rows(got, batch, torch.bfloat16)
    if kind:
        weights = [torch.zeros(s, dtype=torch.float8_e4m3fn) for s in ((experts, 2 * inter, hidden), (experts, hidden, inter))]
        weights = [each for w in weights for each in (w, torch.zeros((experts, w.shape[1] // 128, w.shape[2] // 128)))]
        layout = f"eoi:{kind}"
    as_sent = kind and sent == torch.float8_e4m3fn
    rows_in = stage.stand_in(x, torch.bfloat16) if as_sent else x
    text = SWIGLU.format(i=inter, j=2 * inter)
    call = stage.prepare_unsorted(rows_in, experts, None, weights, [], text, f"{layout},{layout}", "", 1)
    call = stage.with_e4m3(call, x, scales) if as_sent else call
    experts_triton.KERNELS[experts_batched.NAME](call, batch)


CASES: dict[str, Callable[[], None]] = {
    "one token": lambda: layer(1, 4, 8, 2048, 768),
    "one token, inputs by outputs": lambda: layer(1, 4, 8, 2880, 2880, "eio", PAIRS),
    "one token, inputs by outputs, halves": lambda: layer(1, 1, 8, 5120, 8192, "eio"),
    "router": lambda: routed(1, 128, Routing(8, normalize="sum", score_dtype=torch.float32)),
    "router of groups": lambda: routed(64, 256, Routing(8, "sigmoid", "sum", 1e-20, "add", 2.5, 8, 4, "top2_sum", 0.0, torch.float32)),
    "router, 4 tokens a program": lambda: routed(5000, 60, Routing(4, "none", "softmax")),
    "16 rows": lambda: layer(16, 4, 16, 2048, 768),
    "32 rows": lambda: layer(64, 4, 16, 2048, 768, "eio", PAIRS),
    "64 rows": lambda: layer(256, 2, 16, 2048, 768),
    "128 rows": lambda: layer(4096, 2, 8, 2048, 768),
    "128 rows, pairs": lambda: layer(4096, 2, 8, 2880, 2880, "eio", PAIRS),
    "128 rows, float32": lambda: layer(1024, 2, 8, 256, 128, dtype=torch.float32),
    "odd sizes": lambda: layer(1024, 2, 8, 250, 101),
    "batched, 16 rows": lambda: batched(2, 128),
    "batched, 32 rows": lambda: batched(16, 100),
    "batched, 64 rows": lambda: batched(40, 512),
    "batched, 128 rows": lambda: batched(128, 512),
    "batched, less capacity than a block": lambda: batched(2, 8),
    "batched, e4m3 rows": lambda: batched(2, 128, torch.float8_e4m3fn),
    "fp8_channel_w, 16 rows": lambda: quantised("fp8_channel_w", 64),
    "int4, 64 rows": lambda: quantised("int4", 200),
    "fp8_block, 64 rows": lambda: quantised("fp8_block", 256),
    "fp8_block, 128 rows": lambda: quantised("fp8_block", 4096),
    "fp8_channel, 128 rows": lambda: quantised("fp8_channel", 4096),
    "mxfp4, pairs, 16 rows": lambda: quantised("mxfp4", 16, PAIRS),
    "mxfp4, 128 rows": lambda: quantised("mxfp4", 4096),
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
