"""`moe_compile.compile(model, probe=True)`: blocks that Dynamo cannot capture keep their meaning, and are rewritten."""

from __future__ import annotations

import copy
import pickle

import probed_blocks
import pytest
import torch
from corpus import styles
from corpus.harness import error, observe, worst
from probed_blocks import REWRITTEN, TRAPS, E, H, K, Model, build
from torch import nn

import moe_compile
from moe_compile.probing.errors import NotProbed
from moe_compile.probing.install import marked, programs
from moe_compile.probing.probe import program_for
from moe_compile.probing.ranges import Ranges


def compiled(module: nn.Module, x: torch.Tensor) -> tuple[nn.Module, moe_compile.RewriteReport]:
    """The module compiled behind its first, uncompiled call."""
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    out = moe_compile.compile(module, inner="eager", report=report)
    with torch.no_grad():
        assert error(first(out(x)), first(module(x))) < 1e-6
    return out, report


def first(out: object) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def assert_same(fast: nn.Module, module: nn.Module, x: torch.Tensor, grad: bool = True) -> None:
    want = observe(module, module, x, grad=grad)
    got = observe(fast, module, x, grad=grad)
    assert worst(got, want)[0] < 1e-4, worst(got, want)


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(seed))


CORPUS = ["ds_remote_moe_infer_numpy"]


@pytest.mark.parametrize("name", CORPUS)
def test_style_is_rewritten_and_keeps_values_and_gradients(name):
    case = styles.CASES[name]
    module, (x,) = case.factory(), case.inputs()
    fast, report = compiled(module, x)
    assert_same(fast, module, torch.randn(3, 3, x.shape[-1], generator=torch.Generator().manual_seed(3)))
    assert report.rewritten, str(report)
    assert not report.refused, str(report)


@pytest.mark.parametrize("name", REWRITTEN)
def test_block_is_rewritten(name):
    module = build(name)
    fast, report = compiled(module, tokens(12))
    assert_same(fast, module, tokens(5, seed=5), grad=name == "any_mask")
    assert report.rewritten, str(report)
    assert any("captured from a recording" in note for note in report.notes)


@pytest.mark.parametrize("name", TRAPS)
def test_trap_is_refused_with_its_reason(name):
    """What Python decides by the data matters: no program takes the forward's place."""
    with pytest.raises(NotProbed, match=TRAPS[name]):
        program_for(build(name), (tokens(12),), {})


def test_refused_block_stays_as_it_is():
    module = build("skip_small")
    fast, report = compiled(module, tokens(12))
    assert not marked(module)
    assert "SkipSmall stays as it is" in "; ".join(report.notes)
    assert_same(fast, module, tokens(3), grad=False)


def test_python_by_length_holds_for_such_lengths():
    module = build("by_length")
    program = program_for(module, (tokens(12),), {})
    assert program.fits(module, (tokens(20),), {})
    assert not program.fits(module, (tokens(21),), {})
    assert not program.fits(module, (tokens(12).double(),), {})
    assert program.fits(module.train(), (tokens(12),), {})  # its code does not ask for the mode


def test_other_configuration_of_the_same_class():
    """A program belongs to modules like the one that was recorded, and goes when a setting changes."""
    one, two = build("hit_loop"), build("hit_loop")
    two.scale = 3.0
    for module in (one, two):
        fast, report = compiled(module, tokens(12))
        assert_same(fast, module, tokens(12, seed=5), grad=False)
        assert report.rewritten
    two.scale = 5.0
    assert_same(fast, two, tokens(12, seed=6), grad=False)


def test_a_block_refused_by_its_configuration_says_nothing_of_others():
    blocks = [probed_blocks.Configured(how).eval() for how in ("odd", "plain")]
    notes = [" ".join(compiled(block, tokens(12))[1].notes) for block in blocks]
    assert "Configured stays as it is" in notes[0]
    assert "Configured is captured from a recording" in notes[1]


def test_layers_share_one_recording():
    model = Model([build("hit_loop", seed) for seed in range(2)])
    before = len(programs(type(model.layers[0])))
    _, report = compiled(model, tokens(12))
    assert len(report.rewritten) == 2, str(report)
    assert len(report.graphs) == 1
    assert len(programs(type(model.layers[0]))) <= before + 1
    assert all(map(marked, model.layers))


def test_model_stays_what_it_was():
    module = build("hit_loop")
    names, state = [n for n, _ in module.named_parameters()], {n: t.clone() for n, t in module.state_dict().items()}
    compiled(module, tokens(12))
    assert [n for n, _ in module.named_parameters()] == names
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    assert set(module.state_dict()) == set(state)
    other = pickle.loads(pickle.dumps(module))
    for again in (other, copy.deepcopy(module)):
        assert error(again(tokens(7)), module(tokens(7))) == 0


def test_parameters_hooks_and_modes_after_compile():
    module = build("hit_loop")
    fast, _ = compiled(module, tokens(12))
    seen = []
    module.gate.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape)))
    module.experts[1].up = nn.Linear(H, H)
    with torch.no_grad():
        module.experts[0].down.weight.mul_(2)
    torch._dynamo.reset()
    assert_same(fast, module, tokens(9, seed=2))
    assert seen
    for mode in (True, False):
        module.train(mode)
        assert_same(fast, module, tokens(9, seed=3))


def test_restore():
    class Own(probed_blocks.HitLoop):
        pass

    module = Own().eval()
    fast, report = compiled(module, tokens(12))
    assert report.rewritten
    before = len(report.rewritten)
    moe_compile.restore(fast)
    assert not marked(module)
    torch._dynamo.reset()
    assert_same(fast, module, tokens(12, seed=1), grad=False)
    assert len(report.rewritten) == before
    assert "forward" not in vars(module)
    assert "forward" not in vars(Own)


def test_buffers_count_in_the_program_too():
    module = build("counter")
    fast, report = compiled(module, tokens(12))
    module.seen.zero_()
    with torch.no_grad():
        fast(tokens(10, seed=1))
    assert report.rewritten
    assert int(module.seen.sum()) == 20
    assert module.calls == 0


@pytest.mark.parametrize("name", ["python_capacity", "hits_counted", "jitter", "training"])
def test_other_blocks_keep_their_values(name):
    """The program as it is: in both modes, for few tokens and many, gradients and random numbers included."""
    module = build(name)
    for mode in (False, True):
        program = program_for(module.train(mode), (tokens(12),), {})
        for n in (2, 90):
            assert program.fits(module, (tokens(n),), {})
            assert_same(lambda x, run=program.run: run(module, (x,), {}), module, tokens(n, seed=n))


def test_grad_mode_that_the_code_asks_for():
    module = build("grad_mode")
    program = program_for(module, (tokens(12),), {})
    assert program.fits(module, (tokens(12),), {})
    with torch.no_grad():
        assert not program.fits(module, (tokens(12),), {})


def test_what_the_code_reads_may_change_later(monkeypatch):
    """A function of the module, a constant of its file, the number of experts: what was recorded holds no more."""
    module = build("function")
    fast, report = compiled(module, tokens(12))
    assert report.rewritten
    module.last = torch.sigmoid
    assert_same(fast, module, tokens(9, seed=1), grad=False)
    monkeypatch.setattr(probed_blocks, "FACTOR", 3.0)
    assert_same(fast, module, tokens(9, seed=2), grad=False)
    module.experts[1] = probed_blocks.Expert().requires_grad_(False)
    assert_same(fast, module, tokens(9, seed=3), grad=False)
    module.experts[1] = nn.Identity()
    assert_same(fast, module, tokens(9, seed=3), grad=False)


def outer():
    """A class of blocks whose code reads variables of this function, and how to change them."""
    factor, ends = 2.0, (1.0, 0.5)

    def weigh(y):
        return y * ends[0] + ends[1]

    class Block(probed_blocks.HitLoop):
        def forward(self, x):
            return weigh(super().forward(x) * factor)

    def change(*values):
        nonlocal factor, ends
        factor, ends = values

    return Block, change


def test_what_the_code_reads_of_outer_functions_may_change_later():
    cls, change = outer()
    torch.manual_seed(0)
    module = cls().eval()
    fast, report = compiled(module, tokens(6))
    assert report.rewritten
    for values in ((3.0, (1.0, 0.5)), (3.0, (-1.0, 0.25)), (2.0, (1.0, 0.5))):
        change(*values)
        assert_same(fast, module, tokens(6, 1))


def test_ids_are_known_to_be_below_the_number_of_experts():
    """Parts and arrangements of chosen ids are; what is written into is not any more, nor what shares its memory."""
    ranges, scores = Ranges(), torch.rand(5, E)
    top = scores.topk(K)
    ranges.note("topk", (scores, K), {}, top)
    ids, other = top.indices, top.indices.clone()
    ranges.note("clone", (ids,), {}, other)
    part, both = ids[:, :1], torch.stack([ids, other])
    ranges.note("__getitem__", (ids, (slice(None), slice(1))), {}, part)
    ranges.note("stack", ([ids, other],), {}, both)
    assert [ranges.below(t) for t in (ids, other, part, both)] == [E, E, E, E]
    joined = torch.stack([ids, torch.full_like(ids, 99)])
    ranges.note("stack", ([ids, joined[1]],), {}, joined)
    assert ranges.below(joined) is None
    part += 1
    ranges.note("__iadd__", (part, 1), {}, part)
    assert [ranges.below(t) for t in (ids, other, part, both)] == [None, E, None, E]


def test_arguments_outputs_and_keywords():
    """More arguments than the tokens, a dict beside the sum: all that the module returns, for each way to call it."""
    module = build("tuple")
    fast, report = compiled(module, tokens(12))
    assert report.rewritten
    for args, kwargs in (((), {}), ((2.0,), {}), ((2,), {"residual": tokens(9, seed=4)}), ((), {"scale": 0.5})):
        with torch.no_grad():
            got, want = fast(tokens(9, seed=4), *args, **kwargs), module(tokens(9, seed=4), *args, **kwargs)
        assert error(got[0], want[0]) < 1e-5
        assert torch.equal(got[1]["ids"], want[1]["ids"])
        assert error(got[1]["weights"], want[1]["weights"]) < 1e-6


def test_autocast_of_the_caller():
    """Recorded without autocast, a program is not for calls within, where torch gives other dtypes: those have their own."""
    module = build("hit_loop")
    fast, report = compiled(module, tokens(12))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            got, want = fast(tokens(9, seed=1)), module(tokens(9, seed=1))
        assert error(got, want) < 2e-2
        assert len(report.rewritten) >= 2
        assert_same(fast, module, tokens(9, seed=2), grad=False)


def test_one_row_first_in_inference_mode():
    """A first call with one token, of tensors without gradients, records for any number and for training."""
    module = build("hit_loop")
    torch._dynamo.reset()
    report = moe_compile.RewriteReport()
    fast = moe_compile.compile(module, inner="eager", report=report)
    with torch.inference_mode():
        assert error(fast(tokens(1)), module(tokens(1))) < 1e-6
    assert_same(fast, module, tokens(20, seed=1))
    assert len(report.rewritten) >= 2


def test_the_first_call_leaves_nothing_behind():
    """The copy that is called to find blocks: no hook hears of it, no buffer counts it, random numbers are drawn once."""
    module, other, heard = build("counter"), build("counter"), []
    module.register_forward_hook(lambda *a: heard.append(1))
    fast = moe_compile.compile(module, inner="eager")
    torch._dynamo.reset()
    torch.manual_seed(3)
    with torch.no_grad():
        fast(tokens(10))
    assert torch.initial_seed() == 3
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert len(heard) == 1
    with torch.no_grad():
        other(tokens(10))
    assert torch.equal(module.seen, other.seen)


def test_what_a_search_must_not_touch():
    """A forward that writes to its parameters is not called for the search; nor are hooks of submodules."""
    module, heard = build("writes_parameters"), []
    bias, report = module.gate.bias.clone(), moe_compile.RewriteReport()
    torch._dynamo.reset()
    with torch.no_grad():
        moe_compile.compile(module, inner="eager", report=report)(tokens(12))
    assert torch.equal(module.gate.bias, bias / 2)
    assert "writes to its parameters" in "; ".join(report.notes)
    module = build("hit_loop")
    module.gate.register_forward_hook(lambda *a: heard.append(1))
    fast, report = compiled(module, tokens(12))
    assert len(heard) == 2
    assert "its submodules have hooks" in "; ".join(report.notes)
    assert_same(fast, module, tokens(9), grad=False)


def test_a_model_that_cannot_be_copied_is_compiled_as_it_is():
    class Stubborn(probed_blocks.HitLoop):
        def __deepcopy__(self, memo):
            raise RuntimeError("one of a kind")

    module = Stubborn().eval()
    fast, report = compiled(module, tokens(12))
    assert not report.rewritten
    assert "was not searched" in "; ".join(report.notes)
    assert_same(fast, module, tokens(3), grad=False)


def test_probe_false():
    module = build("hit_loop")
    torch._dynamo.reset()
    moe_compile.compile(module, inner="eager", probe=False)(tokens(12))
    assert not marked(module)


def test_copies_do_not_share_programs():
    """What a copy changes is its own: it comes without, and finds its own program when it is compiled."""
    module = build("hit_loop")
    compiled(module, tokens(12))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not marked(other)
        other.scale = 4.0
        assert not any(p.fits(other, (tokens(9),), {}) and p.fits(module, (tokens(9),), {}) for p in programs(type(other)))
    assert marked(module)


def test_marked_module_probes_itself():
    """`moe_compile.moe`: the first call of a module finds out, and restore undoes it."""

    class Marked(probed_blocks.HitLoop):
        pass

    report = moe_compile.RewriteReport()
    moe_compile.moe(Marked, inner="eager", report=report)
    module, plain = Marked().eval(), build("hit_loop")
    plain.load_state_dict(module.state_dict())
    torch._dynamo.reset()
    for n in (12, 9):
        with torch.no_grad():
            assert error(module(tokens(n)), plain(tokens(n))) < 1e-6
    assert report.rewritten
    assert marked(module)
    before = len(report.rewritten)
    moe_compile.restore(module)
    torch._dynamo.reset()
    with torch.no_grad():
        assert error(module(tokens(9)), plain(tokens(9))) == 0
    assert len(report.rewritten) == before


def test_fullgraph():
    module = build("any_mask")
    torch._dynamo.reset()
    fast = moe_compile.compile(module, inner="eager", fullgraph=True)
    with torch.no_grad():
        assert error(fast(tokens(12)), module(tokens(12))) < 1e-6


def test_a_function_has_no_blocks_to_probe():
    with pytest.raises(TypeError, match=r"takes an nn\.Module"):
        moe_compile.compile(lambda x: x, probe=True)
