"""The stage ops composed as the compiler composes them, against one token and slot at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_compile.ops  # noqa: F401  (registers torch.ops.moe_compile)

OPS = torch.ops.moe_compile
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@dataclass(frozen=True)
class Body:
    """An expert as text and as Python f(x, w, weights, biases) of a row; weight_in: the weight is in it."""

    text: Callable[[int], str]
    call: Callable[..., Tensor]
    up: int  # columns of the up projection, in units of I
    biases: bool
    weight_in: bool


def _swiglu(x: Tensor, w: Tensor, m: list[Tensor], b: list[Tensor]) -> Tensor:
    gate, up = (x @ m[0]).chunk(2, -1)
    return (F.silu(gate) * up) @ m[1]


def _gpt_oss(x: Tensor, w: Tensor, m: list[Tensor], b: list[Tensor]) -> Tensor:
    h = x @ m[0] + b[0]
    gate, up = h[..., ::2].clamp(max=0.7), h[..., 1::2].clamp(-0.7, 0.7)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ m[1] + b[1]


def _input_weighted(x: Tensor, w: Tensor, m: list[Tensor], b: list[Tensor]) -> Tensor:
    return F.relu((x * w) @ m[0]).square() @ m[1]


def _residual(x: Tensor, w: Tensor, m: list[Tensor], b: list[Tensor]) -> Tensor:
    return (F.gelu(x @ m[0] + b[0]) @ m[1] + b[1] + x) * w


def _gpt_oss_text(i: int) -> str:
    gate = f"clamp(cols(mm(0, x) + b(0), 0, {2 * i}, 2), None, 0.7)"
    up = f"clamp(cols(mm(0, x) + b(0), 1, {2 * i}, 2), -0.7, 0.7)"
    return f"mm(1, ({up} + 1.0) * {gate} * sigmoid(1.702 * {gate})) + b(1)"


BODIES = {
    "swiglu": Body(
        lambda i: f"mm(1, silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {2 * i}, 1))",
        _swiglu,
        2,
        False,
        False,
    ),
    "gpt_oss": Body(_gpt_oss_text, _gpt_oss, 2, True, False),
    "input_weighted": Body(lambda i: "mm(1, square(relu(mm(0, x * w))))", _input_weighted, 1, False, True),
    "residual": Body(lambda i: "(mm(1, gelu(mm(0, x) + b(0))) + b(1) + x) * w", _residual, 1, True, True),
}


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, int, int, list[list[int]]]:
    """(T, E, K, ids): ids in -1..E, so duplicates, ids of no expert and experts without tokens occur."""
    tokens, experts = draw(st.integers(0, 33)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    kind = draw(st.sampled_from(["any", "distinct", "one", "none"]))
    if kind == "one":
        return tokens, experts, top_k, [[draw(st.integers(0, experts - 1))] * top_k] * tokens
    if kind == "none":
        return tokens, experts, top_k, [[-1] * top_k] * tokens
    if kind == "distinct":
        row = st.permutations(range(experts)).map(lambda p: list(p)[:top_k])
    else:
        row = st.lists(st.integers(-1, experts), min_size=top_k, max_size=top_k)
    return tokens, experts, top_k, draw(st.lists(row, min_size=tokens, max_size=tokens))


def stages(
    x: Tensor, ids: Tensor, w: Tensor, experts: int, body: Body, m: list[Tensor], b: list[Tensor], text: str,
    layout: str, provider: str,
) -> Tensor:  # fmt: skip
    """quantize_dispatch -> permute_experts_unpermute -> combine."""
    _, _, order, offsets, handle, _ = OPS.quantize_dispatch(x, ids, experts, "none", "local")
    bias_layout = ("eo,eo" if layout.startswith("e") else f"o*{experts},o*{experts}") if body.biases else ""
    y = OPS.permute_experts_unpermute(
        x, order, offsets, w if body.weight_in else None, m, b if body.biases else [], text, layout,
        bias_layout, ids.shape[1], provider,
    )  # fmt: skip
    return OPS.combine(y, None if body.weight_in else w, handle, None, "local")


def loop(x: Tensor, ids: Tensor, w: Tensor, body: Body, m: list[Tensor], b: list[Tensor]) -> Tensor:
    """The same, one token and one slot at a time; slots of no expert give nothing."""
    rows = []
    for t, row in enumerate(ids.tolist()):
        out = x[t] * 0
        for k, e in enumerate(row):
            if 0 <= e < m[0].shape[0]:
                y = body.call(x[t], w[t, k], [p[e] for p in m], [p[e] for p in b])
                out = out + (y if body.weight_in else y * w[t, k])
        rows.append(out)
    return torch.stack(rows) if rows else x * 0


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@SETTINGS
@given(
    routing=routings(),
    name=st.sampled_from(sorted(BODIES)),
    layout=st.sampled_from(["eio,eio", "eoi,eoi", "io*{},io*{}", "oi*{},oi*{}"]),
    provider=st.sampled_from(["reference", "cpu_grouped"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_stage_ops_equal_the_per_token_loop(routing, name, layout, provider, dtype):
    tokens, experts, top_k, ids = routing
    body, hidden, inner = BODIES[name], 6, 4
    generator = torch.Generator().manual_seed(tokens * 7 + experts)
    x = random((tokens, hidden), generator)
    w = random((tokens, top_k), generator)
    m = [random((experts, hidden, inner * body.up), generator), random((experts, inner, hidden), generator)]
    b = [random((experts, inner * body.up), generator), random((experts, hidden), generator)]
    ids = torch.tensor(ids, dtype=torch.int64).view(tokens, top_k)
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, *m, *b)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    laid_out, biases = lay_out(leaves[2:4], leaves[4:], layout.format(experts, experts))
    got = stages(
        leaves[0], ids, leaves[1], experts, body, laid_out, biases, body.text(inner),
        layout.format(experts, experts), provider,
    )  # fmt: skip
    want = loop(exact[0], ids, exact[1], body, exact[2:4], exact[4:])
    assert got.dtype == dtype
    assert got.shape == want.shape
    close(got, want, dtype)
    seed = random((tokens, hidden), generator)
    compare_gradients(got, leaves, want, exact, seed, dtype)


def lay_out(m: list[Tensor], b: list[Tensor], layout: str) -> tuple[list[Tensor], list[Tensor]]:
    """The op's flat lists for matrices [E, in, out]: views of them, as models hold their parameters."""
    weights: list[Tensor] = []
    for p, entry in zip(m, layout.split(","), strict=True):
        p = p.transpose(1, 2) if "oi" in entry else p
        weights.extend([p] if entry.startswith("e") else list(p.unbind(0)))
    return weights, list(b) if layout.startswith("e") else [v for p in b for v in p.unbind(0)]


def compare_gradients(got: Tensor, leaves: list[Tensor], want: Tensor, exact: list[Tensor], seed: Tensor, dtype) -> None:
    if want.requires_grad and want.numel():
        (want * seed).sum().backward()
        (got * seed.to(dtype)).sum().backward()
        for a, e in zip(leaves, exact, strict=True):
            close(
                torch.zeros_like(a) if a.grad is None else a.grad,
                torch.zeros_like(e) if e.grad is None else e.grad,
                dtype,
            )


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    scale = float(want.detach().abs().max()) if want.numel() else 0.0
    limit = (1e-10 if dtype is torch.float64 else 2e-5) * max(scale, 1.0)
    torch.testing.assert_close(got.detach().double(), want.detach(), rtol=0, atol=limit)


# ---- route


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """[T, E] with ties (few distinct values), NaN and infinities."""
    tokens, experts = draw(st.integers(0, 9)), draw(st.sampled_from([1, 2, 4, 6]))
    value = st.sampled_from([-2.0, 0.0, 0.0, 0.5, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf])
    rows = draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    return torch.tensor(rows, dtype=torch.float32).view(tokens, experts)


SCORES = {
    "softmax": lambda v: v.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda v: F.softplus(v).sqrt(),
    "none": lambda v: v,
}


def plain_router(v: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: str, scale: float) -> tuple[Tensor, Tensor]:
    """A router as models spell it."""
    scores = SCORES[score](v)
    ids = torch.topk(scores if bias is None else scores + bias, top_k, dim=-1).indices
    w = scores.gather(-1, ids)
    if normalize == "sum":
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
    if normalize == "softmax":
        w = w.softmax(-1)
    return w * scale, ids


@SETTINGS
@given(
    v=logits(),
    score=st.sampled_from(sorted(SCORES)),
    normalize=st.sampled_from(["none", "sum", "softmax"]),
    biased=st.booleans(),
    fraction=st.floats(0, 1),
)
def test_route_is_the_torch_spelling_bit_for_bit(v, score, normalize, biased, fraction):
    top_k = max(1, round(fraction * v.shape[1]))
    bias = torch.linspace(-0.2, 0.2, v.shape[1]) if biased else None
    eps = 1e-20 if normalize == "sum" else 0.0
    want_w, want_ids = plain_router(v, bias, top_k, score, normalize, 1.5)
    got_w, got_ids = OPS.route(
        v, bias, top_k, score, normalize, eps, "add", 1.5, 1, 1, "max", 0.0, None, None, True, "scores"
    )  # fmt: skip
    assert torch.equal(got_ids, want_ids)
    torch.testing.assert_close(got_w, want_w, rtol=0, atol=0, equal_nan=True)


def test_nan_scores_reach_the_output_as_in_eager():
    """A token with NaN scores gives NaN, the others are untouched."""
    x, gate = torch.randn(4, 6), torch.randn(6, 3)
    x[1] = math.nan
    w, ids = OPS.route(x @ gate, None, 2, "softmax", "sum", 0.0, "add", 1.0, 1, 1, "max", 0.0, None, None, True, "scores")
    m = [torch.randn(3, 6, 4), torch.randn(3, 4, 6)]
    body = BODIES["input_weighted"]
    out = stages(x, ids, w, 3, body, m, [], body.text(4), "eio,eio", "reference")
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_dispatch_sorts_slots_stably_and_puts_ids_of_no_expert_last(tokens):
    ids = torch.randint(-1, 5, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    _, _, order, offsets, _, _ = OPS.quantize_dispatch(torch.zeros(tokens, 2), ids, 4, "none", "local")
    flat = ids.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda n: (flat[n] if 0 <= flat[n] < 4 else 4, n))
    assert order.tolist() == expected
    assert offsets.tolist() == [sum(0 <= v <= e for v in flat) for e in range(4)]
