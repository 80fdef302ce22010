"""What only a GPU shows of the Triton experts: the same bits again, other streams, memory that holds anything, more than 2**31 weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton_cases import HALVES

import moe_compile.ops  # noqa: F401  registers torch.ops.moe_compile
from moe_compile.ops.kernels.plan import sort_ids

pytestmark = pytest.mark.gpu
TOKENS, TOP_K, EXPERTS, HIDDEN, INTER = 3001, 4, 24, 512, 384


def layer(**like: Any) -> dict[str, Any]:
    """x, ids, weights of the sum, both weights; some ids are of no expert."""
    g = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Any:
        return (torch.randn(shape, generator=g, device="cuda") * shape[-1] ** -0.5).bfloat16()

    ids = torch.randint(-1, EXPERTS, (TOKENS, TOP_K), generator=g, device="cuda")
    weights = torch.rand((TOKENS, TOP_K), generator=g, device="cuda")
    found = {
        "x": normal(TOKENS, HIDDEN),
        "ids": ids,
        "w": weights,
        "w13": normal(EXPERTS, 2 * INTER, HIDDEN),
        "w2": normal(EXPERTS, HIDDEN, INTER),
    }
    return {**found, **like}


def forward(x: Any, ids: Any, w: Any, w13: Any, w2: Any, layout: str = "eoi,eoi") -> Any:
    text = HALVES.format(i=INTER, j=2 * INTER)
    return torch.ops.moe_compile.local_experts.default(x, ids, EXPERTS, None, [w13, w2], [], text, layout, "", w, x.dtype, "triton")


def gradients(x: Any, ids: Any, w: Any, w13: Any, w2: Any, layout: str = "eoi,eoi") -> list[Any]:
    """Out, and gradients of x, w and both weights."""
    own = [each.detach().requires_grad_() for each in (x, w, w13, w2)]
    order, offsets = sort_ids(ids, EXPERTS)
    texts = (HALVES.format(i=INTER, j=2 * INTER), layout, "", TOP_K)
    op = torch.ops.moe_compile.permute_experts_combine.default
    out = op(own[0], order, offsets, None, own[2:], [], *texts, own[1], x.dtype, "triton")
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), own)]


def all_of(**given: Any) -> list[Any]:
    with torch.no_grad():
        out = forward(**given)
    return [out, *gradients(**given)]


def same(got: list[Any], wanted: list[Any]) -> None:
    torch.cuda.synchronize()
    for at, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(a, b), (at, float((a.float() - b.float()).abs().max()))


def test_the_same_bits_again() -> None:
    given = layer()
    wanted = all_of(**given)
    busy, side = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            busy = (busy @ busy).tanh()  # so that programs are spread otherwise
        same(all_of(**given), wanted)


def test_on_other_streams() -> None:
    given = layer()
    wanted = all_of(**given)
    for _ in range(3):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            late = {name: torch.zeros_like(each) for name, each in given.items()}
            torch.cuda._sleep(20_000_000)
            for name, each in late.items():
                each.copy_(given[name])  # the layer has to wait for these
            got = all_of(**late)
        side.synchronize()
        same(got, wanted)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # and with it new memory is filled: NaN, and the largest whole numbers
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_was_not_written_is_not_read() -> None:
    given = layer()
    wanted = all_of(**given)
    with poisoned_memory():
        assert bool(torch.empty(8, device="cuda").isnan().all())
        same(all_of(**given), wanted)


def test_inputs_that_are_not_contiguous() -> None:
    given = layer()
    wanted = all_of(**given)
    wide = torch.zeros((TOKENS, 2 * HIDDEN + 16), dtype=torch.bfloat16, device="cuda")
    wide[:, 8 : 8 + HIDDEN] = given["x"]
    every_other = torch.zeros((TOKENS, 2 * HIDDEN), dtype=torch.bfloat16, device="cuda")
    every_other[:, ::2] = given["x"]
    turned = {name: given[name].t().contiguous().t() for name in ("ids", "w")}
    for x in (wide[:, 8 : 8 + HIDDEN], every_other[:, ::2]):
        got = all_of(**{**given, **turned, "x": x})
        torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            assert float((a.float() - b.float()).norm() / b.float().norm()) < 5e-3
    views = {name: given[name].transpose(1, 2) for name in ("w13", "w2")}
    for a, b in zip(all_of(**{**given, **views}, layout="eio,eio"), wanted, strict=True):
        b = b if a.shape == b.shape else b.transpose(1, 2)
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 5e-3


def test_more_weights_than_32_bits_count() -> None:
    """The last experts' weights stand beyond 2**31 elements."""
    experts, hidden, inter, tokens = 66, 4096, 4096, 40
    w13 = torch.empty((experts, 2 * inter, hidden), dtype=torch.bfloat16, device="cuda")
    w2 = torch.empty((experts, hidden, inter), dtype=torch.bfloat16, device="cuda")
    assert w13.numel() > 2**31
    for w in (w13, w2):
        w.normal_(0, w.shape[-1] ** -0.5)
    x = torch.randn((tokens, hidden), device="cuda").bfloat16()
    ids = torch.tensor([[experts - 1, 0]], device="cuda").repeat(tokens, 1)
    ids[::3, 0] = experts - 2
    scale = torch.rand((tokens, 2), device="cuda")
    text = HALVES.format(i=inter, j=2 * inter)
    op = torch.ops.moe_compile.local_experts.default
    for part in (slice(None), slice(0, 1)):  # by blocks of rows, and a single token
        got = op(x[part], ids[part], experts, None, [w13, w2], [], text, "eoi,eoi", "", scale[part], x.dtype, "triton")
        for t in (0, 1, tokens - 1)[: got.shape[0]]:
            wanted = 0
            for k in range(2):
                up = x[t].float() @ w13[ids[t, k]].float().t()
                wanted = wanted + scale[t, k] * ((torch.nn.functional.silu(up[:inter]) * up[inter:]) @ w2[ids[t, k]].float().t())
            assert float((got[t].float() - wanted).norm() / wanted.norm()) < 1e-2, t
