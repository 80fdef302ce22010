"""Capacity: buffers [E, C] filled by position, what does not fit dropped; and ids beyond the experts that a router masks away.

Each block is compiled, compared with eager (gradients too) where tokens are dropped, and rewritten.  What may go wrong with such code is
in `mutations/capacity.py`; here a sample of it, of which all but what is named is refused or another formula of the same kind.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corpus import styles
from corpus.harness import missing_grads, observe, worst
from mutations.judge import judge
from torch import Tensor, nn

import moe_compile
from moe_compile.passes.lift.algebra import add, compare, eq, mul, sum_
from moe_compile.passes.lift.expr import ONE, Leaf, Rank, Var, const, fresh_table, raw
from moe_compile.passes.lift.index import bounds
from moe_compile.passes.lift.ranks import collapse

H, E, C = 8, 4, 3


def check(module: nn.Module, x: Tensor, rewritten: int = 1) -> None:
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(module, inner="eager", report=report)
    for seed in range(3):
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        want, got = observe(module, module, x, grad=True), observe(compiled, module, x, grad=True)
        assert worst(got, want)[0] < 1e-4, (worst(got, want), str(report))
        assert missing_grads(got, want) == []
    assert len(report.rewritten) == rewritten, str(report)


@pytest.mark.parametrize("name", ["deepspeed_top1_einsum", "nanomoe_capacity_matmul"])
def test_styles_are_rewritten(name):
    case = styles.CASES[name]
    check(case.factory(), case.inputs()[0])


class Skipping(nn.Module):
    """The router has one choice more than there are experts; whoever takes it gets nothing."""

    def __init__(self, masked: int = E) -> None:
        super().__init__()
        self.gate, self.masked = nn.Linear(H, E + 1), masked
        self.up, self.down = nn.Parameter(torch.randn(E, H, H) * 0.3), nn.Parameter(torch.randn(E, H, H) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(1, dim=-1)
        skip = ids == self.masked
        w, ids = w.masked_fill(skip, 0.0), ids.masked_fill(skip, 0)
        if self.masked != E:  # or the largest id would be out of range
            ids = ids.clamp(max=E - 1)
        y = torch.einsum("th,tkho->tko", x, self.up[ids]).relu()
        return (torch.einsum("tko,tkoh->tkh", y, self.down[ids]) * w.unsqueeze(-1)).sum(1)


def test_skip_expert_is_rewritten():
    torch.manual_seed(0)
    check(Skipping(), torch.randn(12, H))


def test_another_masked_id_leaves_the_range_as_it_is():
    torch.manual_seed(0)
    check(Skipping(masked=1), torch.randn(12, H), rewritten=0)


class Routed(nn.Module):
    """`choices` ids, of which the first E have experts."""

    choices = E

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, self.choices, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E + 2, H, H) * 0.3), nn.Parameter(torch.randn(E, H, H) * 0.3)
        self.scales = nn.Parameter(torch.rand(E) + 0.5)

    def expert(self, x: Tensor, e: int) -> Tensor:
        return torch.relu(x @ self.up[e]) @ self.down[e]


class SwitchMasks(Routed):
    """As T5's Switch layers: a capacity for each sequence, rows written where the expert's mask holds."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        hot = F.one_hot(p.argmax(-1), E)
        mask = (hot * (hot.cumsum(-2) <= C)).bool()
        out = torch.zeros_like(x)
        for e in range(E):
            out[mask[:, :, e]] = self.expert(x[mask[:, :, e]], e)
        return p.max(-1).values.unsqueeze(-1) * out


class SwitchSlots(Routed):
    """A running count over a dimension of one is the mask itself: nothing is dropped."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.gate(x).softmax(-1).max(-1, keepdim=True)
        hot = F.one_hot(ids, E)
        mask = (hot * (hot.cumsum(-2) <= C)).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in range(E):
            slot, tok = torch.where(mask[e])
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out.view_as(hidden)


class Sequences(Routed):
    """Buffers for each sequence, positions counted from the tokens before, one-hot of clamped positions."""

    last = C - 1

    def forward(self, x: Tensor) -> Tensor:
        w, ids = (t.squeeze(-1) for t in self.gate(x).softmax(-1).topk(1, dim=-1))
        mask = F.one_hot(ids, E).float()
        position = (mask.cumsum(-2) - mask) * mask
        mask = mask * (position < C).float()
        place = F.one_hot(position.sum(-1).long().clamp(max=self.last), C)
        comb = (w * mask.sum(-1))[..., None, None] * F.one_hot(ids, E)[..., None] * place[..., None, :]
        rows = torch.einsum("bnd,bnec->ebcd", x, comb.bool().to(comb))
        y = torch.bmm(torch.relu(torch.bmm(rows.reshape(E, -1, H), self.up[:E])), self.down).reshape(rows.shape)
        return torch.einsum("ebcd,bnec->bnd", y, comb)


class LastShared(Sequences):
    """Two positions in one row."""

    last = C - 2


class Beyond(Routed):
    """Two ids more than experts: `other` says what they give, None for nothing. Tensors may have rows for them or not."""

    choices = E + 2

    def other(self, x: Tensor, e: int) -> Tensor | None:
        return x

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(self.choices):
            tok, slot = torch.where(ids == e)
            y = self.expert(x[tok], e) if e < E else self.other(x[tok], e)
            if y is not None:
                out.index_add_(0, tok, (y * w[tok, slot, None]).to(out.dtype))
        return out.view_as(hidden)


class Nothing(Beyond):
    def other(self, x: Tensor, e: int) -> Tensor | None:
        return None


class NothingMixed(Beyond):
    """What the ids beyond the experts add comes behind the loop."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        w, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return (out + x * (w * (ids >= E)).sum(-1, keepdim=True)).view_as(hidden)


class Differ(Beyond):
    def other(self, x: Tensor, e: int) -> Tensor | None:
        return x * 2 if e == E else x


class Scaled(Nothing):
    """A scale for each expert that there is, none for the ids beyond."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x, e) * self.scales[e]


class Convolutions(Routed):
    """Experts over pixels: kernels of one place are linear layers."""

    kernel, groups = 1, 1

    def __init__(self) -> None:
        super().__init__()
        around = {"kernel_size": self.kernel, "padding": self.kernel // 2}
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv1d(H, 2 * H, **around), nn.GELU(), nn.Conv1d(2 * H, H, groups=self.groups, **around)) for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + (w * (ids == e)).sum(-1, keepdim=True) * expert(x.transpose(1, 2)).transpose(1, 2)
        return out


class WiderKernels(Convolutions):
    kernel = 3


class Grouped(Convolutions):
    groups = 2


@pytest.mark.parametrize("case", [SwitchMasks, SwitchSlots, Sequences, Beyond, Nothing, NothingMixed, Convolutions])
def test_other_spellings_are_rewritten(case):
    check(case(), torch.randn(2, 9, H))


@pytest.mark.parametrize("case", [LastShared, Differ, Scaled, WiderKernels, Grouped])
def test_what_is_another_function_keeps_its_meaning(case):
    check(case(), torch.randn(2, 9, H), rewritten=0)


def test_identities_in_bfloat16():
    """Each slot's share is rounded by itself: there is no factor of the row to sum up."""
    torch._dynamo.reset()
    module, report = Beyond().bfloat16(), moe_compile.RewriteReport()
    x = torch.randn(2, 9, H).bfloat16()
    got = moe_compile.compile(module, inner="eager", report=report)(x)
    assert len(report.rewritten) == 1, str(report)
    torch.testing.assert_close(got, module(x), rtol=3e-2, atol=3e-2)


MUTANTS = [
    ("capacity_slots", None),
    ("capacity_top_k", None),
    ("capacity_top_1", "counts_over_experts"),
    ("capacity_top_1", "positions_halved"),
    ("capacity_top_1", "combine_next_row"),
    ("capacity_slots", "keeps_the_dropped"),
    ("capacity_top_k", "counts_other_ids"),
    ("capacity_masks", "starts_from_rows"),
    ("capacity_masks", "mask_of_next_expert"),
    ("identities", "two_last_differ"),
    ("identities", "next_row_last"),
    ("identities", "first_too"),
]


@pytest.mark.parametrize(("family", "mutation"), MUTANTS, ids=lambda m: str(m))
def test_mutants_mean_themselves(family, mutation):
    verdict = judge(family, mutation)
    assert verdict.status == "rewritten" if mutation is None else verdict.status in ("rewritten", "refused"), verdict


# ---------------------------------------------------------------- the lemma, by itself
class Buffers:
    """sum_s [id(s) = e] [count(s, e) < C + 1] [count(s, e) - 1 = c] x(s): what stands in row c of expert e's buffer."""

    def __init__(self, mask_of: int = 0):
        self.t, self.s, self.e, n = Var(6), Var(6), Var(E), Var(6)
        self.ids = [Leaf([object()], (6,), range=(0, E), integer=True) for _ in range(2)]
        self.x, self.counts = Leaf([object()], (6,)), Leaf([object()], (6, E), integer=True, limits=(0, 7))
        g = Var(E)
        self.counts.rank = Rank(((n,), (g,)), eq(raw("load", self.ids[mask_of], n), g), 0)

    def id(self, at: Var):
        return raw("load", self.ids[0], at)

    def position(self, at: Var, e):
        return add(raw("load", self.counts, at, e), const(-1))

    def kept(self, at: Var, e):
        return compare("lt", self.position(at, e), const(C))

    def taken(self, column=None):
        """Token t's row of the buffer of its expert, times its own tests."""
        e = self.id(self.t)
        row = self.position(self.t, e) if column is None else column
        inner = mul(eq(self.id(self.s), e), self.kept(self.s, e), eq(self.position(self.s, e), row), raw("load", self.x, self.s))
        return mul(self.kept(self.t, e), raw("tanh", sum_(self.s, inner)))


def test_a_slot_takes_its_own_token_out_of_the_buffer():
    with fresh_table():
        b = Buffers()
        assert collapse(b.taken()) is mul(b.kept(b.t, b.id(b.t)), raw("tanh", raw("load", b.x, b.t)))


@pytest.mark.parametrize("what", ["other mask", "other row", "next row"])
def test_what_the_lemma_does_not_say(what):
    with fresh_table():
        b = Buffers(mask_of=int(what == "other mask"))
        row = {"other mask": None, "other row": const(1), "next row": add(raw("load", b.counts, b.t, b.id(b.t)), const(0))}[what]
        left = collapse(b.taken(row))
        assert any(x.op == "sum" for x in left.args[-1].args), left


def test_masked_ids_have_the_range_that_is_left():
    with fresh_table():
        ids = raw("load", Leaf([object()], (6,), range=(0, E + 1), integer=True), Var(6))
        last, first = raw("not", eq(ids, const(E))), raw("not", eq(ids, const(0)))
        assert bounds(mul(last, ids)) == (0, E)
        assert bounds(mul(first, ids)) == (0, E + 1)
        assert bounds(raw("where", eq(ids, const(E)), ONE, ids)) == (0, E)
        assert bounds(raw("where", eq(ids, const(1)), ONE, ids)) == (0, E + 1)


def test_one_hot_of_positions_counts_only_in_exact_dtypes():
    """In uint8 a running count of many tokens wraps around."""

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.w = nn.Linear(H, 2), nn.Parameter(torch.randn(2, H, H) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            p = self.gate(x).softmax(-1)
            mask = F.one_hot(p.argmax(-1), 2)
            position = (mask.cumsum(0, dtype=torch.uint8).long() - 1) * mask
            comb = ((p * mask).unsqueeze(-1) * (position.unsqueeze(-1) == torch.arange(8)).float()) * (position < 8).unsqueeze(-1)
            y = torch.einsum("ech,eho->eco", torch.einsum("tec,th->ech", comb.bool().float(), x), self.w)
            return torch.einsum("tec,ech->th", comb, y)

    torch.manual_seed(0)
    check(Wraps(), torch.randn(600, H), rewritten=0)
