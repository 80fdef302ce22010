"""What both kinds of loops over tokens are held against: calls on every token in token_blocks.py, lists of them in list_blocks.py."""

from __future__ import annotations

import torch
from corpus.harness import observe, worst
from probed_blocks import H, K
from torch import Tensor, nn

import moe_compile


def tokens(n: int, seed: int) -> Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(seed))


def expect_rewritten(module: nn.Module, top_k: int = K) -> None:
    """The block is rewritten whole and keeps values and gradients. `module.batched`: it takes sequences."""
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    fast = moe_compile.compile(module, inner="eager", report=report)
    for seed, n in enumerate((12, 7, 8)):
        x = torch.stack([tokens(n, s) for s in range(2 + seed)]) if hasattr(module, "batched") else tokens(n, seed)
        want, got = (observe(m, module, x, grad=True) for m in (module, fast))
        assert worst(got, want)[0] < 1e-4, (n, worst(got, want))
    assert report.rewritten, str(report)
    assert all(r.top_k == top_k for r in report.rewritten), str(report)
