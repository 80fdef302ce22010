"""Taking a block out of Dynamo's graph: nothing else that the code does may be lost, moved or read too late."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, Compared, Dense, E, H, K, ReadBeforeWrite, T, block, calls, graph_of, node, rewrite, stages, tokens
from torch.utils.checkpoint import checkpoint

import moe_compile
from moe_compile.passes import select
from moe_compile.passes.diff import normal_form
from moe_compile.passes.emit import Emitter
from moe_compile.passes.lift import Refused


def test_a_plain_block_becomes_three_stage_ops():
    gm = graph_of(Block(), tokens())
    report = rewrite(gm)
    assert [r.rewritten for r in report.regions] == [True]
    stage_ops = ["quantize_dispatch", "permute_experts_unpermute", "combine"]
    assert calls(gm, *stage_ops) == stage_ops
    assert not calls(gm, "index_add_", "where", "zeros_like")
    assert report.nodes_after < report.nodes_before


def test_new_nodes_carry_the_users_source_line():
    gm = graph_of(Block(), tokens())
    rewrite(gm)
    assert "blocks.py" in node(gm, "permute_experts_unpermute").meta["stack_trace"]


# ---------------------------------------------------------------- side effects
def test_counter_buffer_update_survives():
    def forward(self, x):
        w, ids = self.route(x)
        self.load.add_(torch.bincount(ids.flatten(), minlength=E))
        return self.loop(x, w, ids)

    c = Compared(block(forward, load=torch.zeros(E)), tokens())
    assert c.rewritten == 1
    c(tokens(4))
    assert c.module.load.sum() == 2 * T * K


def test_counter_updated_inside_the_loop_survives():
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            self.load[e] += tok.shape[0]
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out

    Compared(block(forward, load=torch.zeros(E)), tokens())


def test_rng_ops_survive():
    """A dropped random op would shift every random number after it."""

    def forward(self, x):
        w, ids = self.route(x)
        noise = torch.rand_like(w)
        out = self.loop(x, w, ids)
        return out + 0 * noise.sum(), torch.rand(3)

    assert Compared(block(forward), tokens()).rewritten == 1


def test_unused_rng_ops_survive():
    def forward(self, x):
        w, ids = self.route(x)
        torch.rand_like(w)
        out = self.loop(x, w, ids)
        return out, torch.rand(3)

    assert Compared(block(forward), tokens()).rewritten == 1


def test_batch_norm_statistics_survive():
    def forward(self, x):
        w, ids = self.route(x)
        F.batch_norm(x, self.mean, self.var, training=True)
        return self.loop(x, w, ids)

    assert Compared(block(forward, mean=torch.zeros(H), var=torch.ones(H)), tokens()).rewritten == 1


def test_mask_used_by_auxiliary_loss_stays():
    def forward(self, x):
        w, ids = self.route(x)
        mask = F.one_hot(ids, E)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(mask[..., e].bool())
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out, mask.float().mean((0, 1))

    c = Compared(block(forward), tokens())
    assert c.rewritten == 1
    assert calls(c.inner.graphs[0], "one_hot") == ["one_hot"]


def test_rows_of_one_expert_returned_stay():
    def forward(self, x):
        w, ids = self.route(x)
        out, seen = torch.zeros_like(x), []
        for e in range(E):
            tok, slot = torch.where(ids == e)
            y = self.expert(x[tok], e)
            seen.append(y.sum())
            out.index_add_(0, tok, y * w[tok, slot, None])
        return out, torch.stack(seen)

    Compared(block(forward), tokens())


# ---------------------------------------------------------------- memory written in place
def test_a_view_changed_in_place_between_routing_and_experts_is_refused():
    def forward(self, x):
        x = x * 1
        view = x.view(-1)
        w, ids = self.route(x)
        view.mul_(2)
        return self.loop(x, w, ids)

    c = Compared(block(forward), tokens())
    assert c.rewritten == 0 or stages(c.inner.graphs[0]) == 1  # values were compared; if it is rewritten, then by the changed rows


@pytest.mark.parametrize("seen_outside", [True, False])
def test_rows_changed_in_place_after_the_experts_read_them(seen_outside):
    """The new code reads the rows after the old in-place op, which must then be gone or refused."""

    def forward(self, x):
        out, h = ReadBeforeWrite.forward(self, x)
        return (out, h) if seen_outside else out

    Compared(block(forward), tokens())


def test_weights_changed_in_place_after_the_experts_read_them():
    def forward(self, x):
        w, ids = self.route(x)
        w = w.cumsum(-1)
        parts = [(self.expert(x, e) * (w * (ids == e)).sum(-1, keepdim=True)) for e in range(E)]
        w.zero_()
        return parts[0] + parts[1] + parts[2], w

    Compared(block(forward), tokens())


def test_ids_changed_in_place_after_the_masks_were_made():
    def forward(self, x):
        w, ids = self.route(x)
        masks = F.one_hot(ids, E).bool()
        ids.add_(1)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(masks[..., e])
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out, ids

    Compared(block(forward), tokens())


@torch.library.custom_op("moe_compile_tests::bump", mutates_args={"h"})
def bump(y: torch.Tensor, h: torch.Tensor) -> None:
    """Writes its second argument; nothing in its name says so."""
    h.add_(1)


bump.register_fake(lambda y, h: None)


WRITES = {
    "custom_op": lambda x, h: bump(x, h),
    "foreach": lambda x, h: torch._foreach_add_([h], 1),
    "inplace_argument": lambda x, h: F.relu(h, inplace=True),
    "inplace_position": lambda x, h: F.silu(h, True),
    "out": lambda x, h: torch.add(h, 1, out=h),
    "view": lambda x, h: h.view(-1)[::2].zero_(),
    "dunder": lambda x, h: h.__iadd__(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_rows_changed_by_any_spelling_after_the_experts_read_them(write):
    """Without validation, which would hide a rewrite that reads them too late."""

    def forward(self, x):
        h = x * 1
        w, ids = self.route(x)
        at = [torch.where(ids == e) for e in range(E)]
        rows = [h[tok] for tok, _ in at]
        WRITES[write](x, h)
        out = torch.zeros_like(x)
        for e, (tok, slot) in enumerate(at):
            out.index_add_(0, tok, self.expert(rows[e], e) * w[tok, slot, None])
        return out, h

    Compared(block(forward), tokens(), validate="off")


def test_ids_of_another_decision_changed_in_place_are_not_distinct_any_more():
    """Facts hold for what topk returned, not for what somebody wrote over it."""

    def forward(self, x):
        p = F.linear(x, self.gate).softmax(-1)
        ids = (-p).topk(K, dim=-1).indices
        ids[:, 1] = ids[:, 0]
        return self.loop(x, p.gather(1, p.topk(K, dim=-1).indices), ids)

    for validate in ("always", "off"):
        Compared(block(forward, base=Dense), tokens(), validate=validate)


def test_ids_changed_by_a_custom_op_are_not_distinct_any_more():
    def forward(self, x):
        p = F.linear(x, self.gate).softmax(-1)
        ids = (-p).topk(K, dim=-1).indices
        repeat_first(x, ids)
        return self.loop(x, p.gather(1, p.topk(K, dim=-1).indices), ids)

    Compared(block(forward, base=Dense), tokens())


def test_ids_changed_by_a_foreach_op_are_not_distinct_any_more():
    def forward(self, x):
        p = F.linear(x, self.gate).softmax(-1)
        ids = (-p).topk(K, dim=-1).indices
        torch._foreach_minimum_([ids], 1)
        return self.loop(x, p.gather(1, p.topk(K, dim=-1).indices), ids)

    Compared(block(forward, base=Dense), tokens())


@torch.library.custom_op("moe_compile_tests::repeat_first", mutates_args={"h"})
def repeat_first(y: torch.Tensor, h: torch.Tensor) -> None:
    h[:, 1] = h[:, 0]


repeat_first.register_fake(lambda y, h: None)


def test_inplace_root_with_alias_outside():
    """The accumulator has another name outside; both must show the result."""

    def forward(self, x):
        out = torch.zeros_like(x)
        alias = out.view(-1)
        self.loop(x, *self.route(x), out=out)
        return out, alias[::2] * 2

    Compared(block(forward), tokens())


def test_inplace_root_seen_through_a_view_made_after_it():
    def forward(self, x):
        out = self.loop(x, *self.route(x))
        out.view(-1)[0] = 7
        return out

    assert Compared(block(forward), tokens()).rewritten == 1


def test_accumulator_that_starts_with_a_residual():
    def forward(self, x):
        return self.loop(x, *self.route(x), out=x * 2)

    assert Compared(block(forward), tokens()).rewritten == 1


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_a_partial_sum_that_is_looked_at(start):
    """The accumulator after the first expert is returned as well, so that its first write stays."""

    def forward(self, x):
        w, ids = self.route(x)
        out, partial = x * start, []
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
            partial.append(out.sum(-1))
        return out, partial[0]

    Compared(block(forward), tokens(), validate="off")


def test_the_accumulator_is_looked_at_in_place_before_the_last_expert():
    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
            self.load[e] = out.abs().sum()
        return out

    Compared(block(forward, load=torch.zeros(E)), tokens(), validate="off")


def test_two_accumulators_at_once():
    def forward(self, x):
        w, ids = self.route(x)
        out, raw = torch.zeros_like(x), torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            y = self.expert(x[tok], e)
            raw.index_add_(0, tok, y)
            out.index_add_(0, tok, y * w[tok, slot, None])
        return out, raw

    Compared(block(forward), tokens(), validate="off")


def test_the_callers_tensor_as_accumulator_is_written():
    def forward(self, x, out):
        self.loop(x, *self.route(x), out=out)

    Compared(block(forward), tokens(), tokens(5))


def test_accumulating_onto_the_rows_that_are_read_is_refused():
    def forward(self, x):
        y = x * 1
        return self.loop(y, *self.route(y), out=y.view(-1, H))

    c = Compared(block(forward), tokens())
    assert c.rewritten == 0


def test_a_slice_of_a_larger_buffer_as_accumulator():
    def forward(self, x):
        buffer = torch.ones(2 * T, H)
        self.loop(x, *self.route(x), out=buffer[:T])
        return buffer

    Compared(block(forward), tokens())


# ---------------------------------------------------------------- gradients, autocast, checkpoints
@pytest.mark.parametrize("base", [Block, Dense])
def test_gradients_of_a_plain_block(base):
    assert Compared(base(), tokens(), grad=True).rewritten == 1


def test_no_grad_expert():
    """Experts without gradients, weights with them."""

    def expert(self, x, e):
        with torch.no_grad():
            return Block.expert(self, x, e)

    Compared(block(Block.forward, expert=expert), tokens(), grad=True)


def test_detached_routing_weights_get_no_gradient():
    def forward(self, x):
        w, ids = self.route(x)
        return self.loop(x, w.detach(), ids)

    assert Compared(block(forward), tokens(), grad=True).rewritten == 1


def test_no_grad_around_the_accumulation_only():
    def forward(self, x):
        w, ids = self.route(x)
        parts = [(self.expert(x, e), (w * (ids == e)).sum(-1, keepdim=True)) for e in range(E)]
        with torch.no_grad():
            total = parts[0][0] * parts[0][1] + parts[1][0] * parts[1][1] + parts[2][0] * parts[2][1]
        return total + x

    Compared(block(forward), tokens(), grad=True)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_region_around_the_experts(grad):
    def forward(self, x):
        w, ids = self.route(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.loop(x, w, ids, out=torch.zeros_like(x, dtype=torch.bfloat16)).float()

    def loop(self, x, w, ids, out):
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, (self.expert(x[tok], e) * w[tok, slot, None]).to(out.dtype))
        return out

    module, x = block(forward, loop=loop), tokens()
    torch._dynamo.reset()
    c = _loosely(module, x, grad)
    assert [r.rewritten for r in c.regions] == [True], c


def _loosely(module, x, grad):
    """bfloat16 rounds each slot in the original and once in the rewrite."""
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(module, inner="eager", report=report)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), module(x), rtol=5e-2, atol=5e-2)
    return report


def test_autocast_region_that_ends_before_the_sum():
    def forward(self, x):
        w, ids = self.route(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ys = [self.expert(x, e) for e in range(E)]
        gates = torch.zeros(T, E).scatter(1, ids, w)
        return ys[0] * gates[:, :1] + ys[1] * gates[:, 1:2] + ys[2] * gates[:, 2:]

    _loosely(block(forward), tokens(), False)


def test_checkpointed_block_body_is_rewritten():
    def forward(self, x):
        return checkpoint(lambda y: Block.forward(self, y), x, use_reentrant=False) + x

    c = Compared(block(forward), tokens(), grad=True)
    assert c.rewritten == 1


# ---------------------------------------------------------------- all or nothing
def test_a_refused_splice_leaves_the_graph_as_it_was(monkeypatch):
    gm = graph_of(Block(), tokens())
    before = normal_form(gm)

    def refuse(self, p, order):
        raise Refused("no layout of ours")

    monkeypatch.setattr(Emitter, "parameter", refuse)
    report = rewrite(gm)
    assert [r.reason for r in report.regions] == ["no layout of ours"]
    assert normal_form(gm) == before


@pytest.mark.parametrize("where", ["find_region", "choose_for", "validate", "splice"])
def test_exception_in_a_pass_leaves_the_graph_runnable(monkeypatch, where):
    def fail(*args, **kwargs):
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(sys.modules["moe_compile.passes.run"], where, fail)
    c = Compared(Block(), tokens())
    assert c.rewritten == 0
    assert "a defect of ours" in str(c.reasons)


def test_one_of_two_blocks_refused_leaves_the_other_rewritten():
    def forward(self, x):
        y = self.loop(x, *self.route(x))
        w, ids = self.route(y)
        return self.loop(y, w, ids.clamp(max=E - 2))  # nobody goes to the last expert

    c = Compared(block(forward), tokens())
    assert [r.rewritten for r in c.report.regions].count(True) >= 1


def test_what_is_read_behind_the_block_alone_is_no_input_of_it():
    """Of a size that only the data tells, say: no random input of it can be made to check the rewrite with."""

    def forward(self, x):
        table = torch.arange(x.argmax().item() + 1).unsqueeze(-1) * torch.ones(H)
        w, ids = self.route(x)
        return self.loop(x, w, ids) + table.sum(0).tanh()

    report = rewrite(graph_of(block(forward), tokens()))
    assert [r.reason for r in report.regions] == [None]


def test_a_block_in_a_branch_that_is_not_used_changes_nothing():
    def forward(self, x):
        self.loop(x, *self.route(x))
        return x * 2

    Compared(block(forward), tokens())


def test_a_count_of_one_is_a_mask():
    def slots(self, x):
        w, ids = self.route(x)
        chosen, out = F.one_hot(ids, E), torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(chosen[..., e] == 1)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out

    def of_tokens(self, x):
        w, ids = self.route(x)
        chosen, out = F.one_hot(ids, E).sum(1), torch.zeros_like(x)
        for e in range(E):
            (tok,) = torch.where(chosen[:, e] == 1)
            out.index_add_(0, tok, self.expert(x[tok], e) * (w * (ids == e)).sum(-1)[tok, None])
        return out

    def not_chosen(self, x):
        w, ids = self.route(x)
        chosen, out = F.one_hot(ids, E), torch.zeros_like(x)
        for e in range(E):
            tok, slot = torch.where(chosen[..., e] == 0)
            out.index_add_(0, tok, self.expert(x[tok], e) * w[tok, slot, None])
        return out

    assert [Compared(block(f), tokens()).rewritten for f in (slots, of_tokens, not_chosen)] == [1, 1, 0]


# ---------------------------------------------------------------- what providers are asked
@pytest.mark.parametrize("sum_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_providers_are_asked_for_the_rows_dtype_whatever_the_sums_is(monkeypatch, weight_dtype, sum_dtype):
    """Routing weights in float32 make the sum float32, while the experts multiply bfloat16."""
    asked = []
    choose = select.choose
    monkeypatch.setattr(select, "choose", lambda problem, *args, **kw: asked.append(problem) or choose(problem, *args, **kw))

    def route(self, x):
        w, ids = F.linear(x.float(), self.gate.float()).softmax(-1).topk(K, dim=-1)
        return w.to(weight_dtype), ids

    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x, dtype=sum_dtype)
        for e in range(E):
            tok, slot = torch.where(ids == e)
            out.index_add_(0, tok, (self.expert(x[tok], e) * w[tok, slot, None]).to(sum_dtype))
        return out

    gm = graph_of(block(forward, route=route).bfloat16(), tokens().bfloat16())
    assert [r.rewritten for r in rewrite(gm).regions] == [True]
    assert [problem.dtype for problem in asked] == [torch.bfloat16]
