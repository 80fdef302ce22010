"""The ways into the compiler: the backend by name, `moe_compile.compile`, their options, and failures."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import textwrap

import fakes
import pytest
import torch
from torch._dynamo import config as dynamo_config

import moe_compile
from moe_compile import ParallelConfig, RewriteReport, logs, passes
from moe_compile.capture import FLAGS, data_dependent, flags_active
from moe_compile.options import Options

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def model():
    return fakes.Model()


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rewrites(monkeypatch):
    monkeypatch.setattr(passes, "run", fakes.rewrite_relu, raising=False)


@pytest.fixture
def refuses(monkeypatch):
    monkeypatch.setattr(passes, "run", fakes.refuse_all, raising=False)


class Inner:
    """An inner compiler that runs graphs eagerly and remembers them, and how they were captured."""

    def __init__(self):
        self.graphs, self.flags = [], []

    def __call__(self, gm, inputs):
        self.graphs.append(gm)
        self.flags.append(tuple(getattr(dynamo_config, flag) for flag in FLAGS))
        return gm.forward


def count_positive(x):
    """Its graph breaks at `nonzero` unless the capture flags are on."""
    return torch.relu(x)[torch.nonzero(x[:, 0] > 0)[:, 0]] * 2


def run_python(code, **env):
    import os

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    assert result.returncode == 0, result.stderr
    return result


# ---------------------------------------------------------------- the package


def test_import_adds_less_than_300_ms_to_torch():
    code = """
        import time, torch
        started = time.perf_counter()
        import moe_compile
        print(time.perf_counter() - started)
    """
    assert float(run_python(code).stdout) < 0.3


def test_import_alone_loads_neither_torch_nor_our_modules():
    code = """
        import sys, moe_compile
        print([name for name in sys.modules if name == "torch" or name.startswith("moe_compile.")])
    """
    assert run_python(code).stdout.strip() == "[]"


def test_every_exported_name_resolves():
    for name in moe_compile.__all__:
        assert getattr(moe_compile, name) is not None
        assert name in dir(moe_compile)
    with pytest.raises(AttributeError, match="no_such_name"):
        moe_compile.no_such_name  # noqa: B018


# ---------------------------------------------------------------- the backend by its name


def test_dynamo_finds_the_backend_by_its_entry_point():
    assert "moe_compile" in torch._dynamo.list_backends()


def test_backend_name_rewrites_and_keeps_the_result(rewrites, model, x):
    compiled = torch.compile(model, backend="moe_compile", options={"inner": "eager"})
    torch.testing.assert_close(compiled(x), model(x))


def test_backend_name_fills_a_report_given_as_an_option(rewrites, model, x):
    report = RewriteReport()
    torch.compile(model, backend="moe_compile", options={"inner": "eager", "report": report})(x)
    assert len(report.rewritten) == 2


def test_unknown_option_names_the_key_and_the_nearest(rewrites, model, x):
    compiled = torch.compile(model, backend="moe_compile", options={"validat": "off"})
    with pytest.raises(Exception, match=r"unknown option 'validat' \(did you mean 'validate'"):
        compiled(x)


def test_backend_name_takes_mode(rewrites, model, x, monkeypatch):
    seen = []
    monkeypatch.setattr("moe_compile.inner.compile_graph", lambda gm, i, options, name: seen.append(options) or gm.forward)
    torch.compile(model, backend="moe_compile", mode="max-autotune-no-cudagraphs")(x)
    assert seen == [Options(mode="max-autotune-no-cudagraphs")]


def test_backend_name_leaves_the_capture_flags_alone(rewrites, x):
    inner = Inner()
    torch.compile(count_positive, backend="moe_compile", options={"inner": inner})(x)
    assert set(inner.flags) == {(False, False)}
    assert len(inner.graphs) == 2


# ---------------------------------------------------------------- options


def test_keywords_and_options_are_one_thing():
    typed = Options.parse("max-autotune", None, inner="inductor", validate="off")
    flat = Options.parse("max-autotune", {"validate": "off"})
    assert typed == flat == Options(mode="max-autotune", validate="off")


def test_inductor_keys_stand_beside_ours():
    options = Options.parse(None, {"triton.cudagraphs": True, "epilogue-fusion": False, "validate": "always"})
    assert options.inner_options == {"triton.cudagraphs": True, "epilogue_fusion": False}
    assert options.validate == "always"


def test_misspelt_inductor_key_is_named():
    with pytest.raises(ValueError, match=r"'max_autotun' \(did you mean 'max_autotune'"):
        Options.parse(None, {"max_autotun": True})


def test_options_of_another_inner_compiler_go_into_inner_options():
    assert Options.parse(None, {"inner": "eager", "inner_options": {"a": 1}}).inner_options == {"a": 1}
    with pytest.raises(ValueError, match="inner_options"):
        Options.parse(None, {"inner": "eager", "max_autotune": True})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(validate="sometimes"), ValueError, "'sometimes'; allowed: 'auto', 'always', 'off'"),
        (dict(quant="int3"), ValueError, "'int3'; allowed: 'none'"),
        (dict(inner=3), TypeError, "inner is 3"),
        (dict(inner="moe_compile"), ValueError, "would call itself"),
        (dict(parallel="ep8"), TypeError, "ParallelConfig or None"),
    ],
)
def test_options_that_cannot_be_meant(kwargs, error, message):
    with pytest.raises(error, match=message):
        Options(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(ep=0), ValueError, r"ParallelConfig\.ep is 0; give at least 1"),
        (dict(tp=2.0), TypeError, r"ParallelConfig\.tp is 2\.0; give a whole number"),
        (dict(dp=True), TypeError, r"ParallelConfig\.dp is True"),
        (dict(ep=8), ValueError, "ep is 8 but ep_group is None"),
        (dict(comm=""), TypeError, r"comm is ''; give a provider's name"),
        (dict(max_tokens_per_rank=0), ValueError, "max_tokens_per_rank is 0"),
        (dict(quant="fp3"), ValueError, "quant is 'fp3'; allowed"),
        (dict(tp_dispatch="both"), ValueError, "'both'; allowed: 'slice', 'leader'"),
    ],
)
def test_parallel_config_that_cannot_be_meant(kwargs, error, message):
    with pytest.raises(error, match=message):
        ParallelConfig(**kwargs)


class Group:
    def __init__(self, ranks):
        self.ranks = ranks

    def size(self):
        return self.ranks


def test_parallel_config_checks_groups_against_sizes():
    with pytest.raises(ValueError, match="ep is 8 but ep_group has 4 ranks"):
        ParallelConfig(ep=8, ep_group=Group(4))
    assert not ParallelConfig(ep=8, ep_group=Group(8)).single_process


def test_one_rank_is_accepted(rewrites, model, x):
    compiled = moe_compile.compile(model, inner="eager", parallel=ParallelConfig())
    torch.testing.assert_close(compiled(x), model(x))


# ---------------------------------------------------------------- moe_compile.compile


def test_compile_module_gives_what_torch_compile_gives(rewrites, model, x):
    compiled = moe_compile.compile(model, inner="eager")
    assert type(compiled) is type(torch.compile(model))
    assert list(dict(compiled._orig_mod.named_parameters())) == list(dict(model.named_parameters()))
    torch.testing.assert_close(compiled(x), model(x))


def test_compile_function_and_decorator(rewrites, x):
    @moe_compile.compile(inner="eager")
    def decorated(x):
        return count_positive(x)

    plain = moe_compile.compile(count_positive, inner="eager")
    torch.testing.assert_close(plain(x), count_positive(x))
    torch.testing.assert_close(decorated(x), count_positive(x))


def test_compile_fills_the_report(rewrites, model, x):
    report = RewriteReport()
    moe_compile.compile(model, inner="eager", report=report)(x)
    assert [region.formula for region in report.regions] == ["max(x, 0)"] * 2
    assert report.compile_seconds > 0
    assert "+clamp_min = clamp_min(linear, 0)" in report.diff()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_every_inner_compiler_trains(rewrites, model, x, inner):
    other = copy.deepcopy(model)
    model(x).square().sum().backward()
    moe_compile.compile(other, inner=inner)(x).square().sum().backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_compile_dynamic_serves_all_sizes_with_one_graph(rewrites, model):
    inner = Inner()
    compiled = moe_compile.compile(model, inner=inner, dynamic=True)
    for tokens in (2, 3, 17, 64):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(inner.graphs) == 1


def test_compile_fullgraph_captures_data_dependent_sizes(rewrites, x):
    inner = Inner()
    compiled = moe_compile.compile(count_positive, inner=inner, fullgraph=True)
    torch.testing.assert_close(compiled(x), count_positive(x))
    assert len(inner.graphs) == 1


def test_compile_takes_mode_and_options_together(rewrites, model, x, monkeypatch):
    seen = []
    monkeypatch.setattr("moe_compile.inner.compile_graph", lambda gm, i, options, name: seen.append(options) or gm.forward)
    moe_compile.compile(model, mode="reduce-overhead", options={"max_autotune": True, "validate": "off"})(x)
    assert seen == [Options(mode="reduce-overhead", inner_options={"max_autotune": True}, validate="off")]


def test_mode_and_options_reach_inductor():
    from moe_compile import inductor

    options = Options.parse("reduce-overhead", {"max_autotune": True})
    assert inductor.configuration(options) == {"triton.cudagraphs": True, "max_autotune": True}
    with pytest.raises(RuntimeError, match="Unexpected type"):
        inductor.configuration(Options.parse(None, {"max_autotune": "yes"}))


def test_compile_disable_is_the_model_itself(model, x):
    assert moe_compile.compile(model, disable=True) is model


def test_compile_unknown_keyword_and_backend_are_errors(model):
    with pytest.raises(TypeError, match=r"unexpected keywords fullgrap.*fullgraph"):
        moe_compile.compile(model, fullgrap=True)
    with pytest.raises(TypeError, match="`inner`"):
        moe_compile.compile(model, backend="inductor")


@pytest.mark.parametrize("stance", ["force_eager", "eager_then_compile", "aot_eager_then_compile"])
def test_compiler_stances_work(rewrites, model, x, stance):
    compiled = moe_compile.compile(model, inner="eager")
    with torch.compiler.set_stance(stance):
        for tokens in (5, 4, 3):
            torch.testing.assert_close(compiled(x[:tokens]), model(x[:tokens]))


def test_compiled_module_can_be_copied(rewrites, model, x):
    compiled = copy.deepcopy(moe_compile.compile(model, inner="eager"))
    torch.testing.assert_close(compiled(x), model(x))


def test_models_compiled_alike_share_what_was_compiled(rewrites, x):
    inner = Inner()
    for _ in range(12):  # Dynamo's limit for one code object is 8
        model = fakes.Model()
        torch.testing.assert_close(moe_compile.compile(model, inner=inner)(x), model(x))
    assert len(inner.graphs) == 1


# ---------------------------------------------------------------- capture flags


def test_compile_captures_data_dependent_sizes_in_one_graph(rewrites, x):
    inner = Inner()
    compiled = moe_compile.compile(count_positive, inner=inner)
    for tokens in (5, 3):
        torch.testing.assert_close(compiled(x[:tokens]), count_positive(x[:tokens]))
    assert len(inner.graphs) <= 2  # the second with a dynamic number of tokens
    assert set(inner.flags) == {(True, True)}


def test_flags_are_on_for_our_compilations_only(rewrites, x):
    ours, theirs, at_runtime = Inner(), Inner(), []
    compiled = moe_compile.compile(count_positive, inner=ours)

    @torch.compiler.disable
    def watch():
        at_runtime.append((flags_active(), *(getattr(dynamo_config, flag) for flag in FLAGS)))

    def outer(x):
        watch()
        return compiled(x)

    outer(x)
    torch.compile(lambda x: count_positive(x) + 1, backend=theirs)(x)
    assert set(ours.flags) == {(True, True)}
    assert set(theirs.flags) == {(False, False)}
    assert at_runtime == [(False, False, False)]


def test_graph_without_rewrite_is_captured_again_without_flags(refuses, x, caplog):
    inner, report = Inner(), RewriteReport()
    compiled = moe_compile.compile(count_positive, inner=inner, report=report)
    torch.testing.assert_close(compiled(x), count_positive(x))
    assert not any(data_dependent(gm) for gm in inner.graphs)
    assert len(report.graphs) == len(inner.graphs) == 2
    assert "no MoE block was rewritten (the gate is not a gate)" in report.notes[0]
    assert [record.message for record in caplog.records].count(report.notes[0]) == 1


def test_frame_that_raises_with_flags_is_compiled_without_and_says_so_once(rewrites, x, caplog):
    def picky(gm, inputs):
        if data_dependent(gm):
            raise NotImplementedError("sizes must be known")
        return gm.forward

    for _ in range(2):
        torch._dynamo.reset()
        report = RewriteReport()
        compiled = moe_compile.compile(count_positive, inner=picky, report=report)
        torch.testing.assert_close(compiled(x), count_positive(x))
    told = [record.message for record in caplog.records if "capture flags" in record.message]
    assert len(told) == 1
    assert "count_positive" in told[0]
    assert "NotImplementedError: sizes must be known" in told[0]
    assert "NotImplementedError" in report.notes[0]


@pytest.mark.parametrize("data_tells", [True, False])
def test_backward_is_compiled_at_once_where_it_could_still_fail(monkeypatch, data_tells):
    from torch._functorch import config as functorch_config

    from moe_compile import inductor

    monkeypatch.setattr(inductor, "flags_active", lambda: True)
    monkeypatch.setattr(inductor, "data_dependent", lambda gm: data_tells)
    patch = inductor._backward_now(torch.fx.GraphModule({}, torch.fx.Graph()))
    assert bool(patch) == data_tells
    assert all(hasattr(functorch_config, key) for key in patch)


def test_keyboard_interrupt_while_compiling_is_not_caught(rewrites, x):
    def interrupted(gm, inputs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moe_compile.compile(count_positive, inner=interrupted)(x)


def test_error_of_the_model_itself_reaches_the_user(rewrites, x):
    def wrong(x):
        return x @ torch.zeros(3, 3)

    with pytest.raises(Exception, match=r"shapes|size"):
        moe_compile.compile(wrong, inner="eager")(x)


# ---------------------------------------------------------------- failures


def test_failing_pass_leaves_the_graph_as_it_was(monkeypatch, model, x, caplog):
    monkeypatch.setattr(passes, "run", fakes.break_after_editing, raising=False)
    report = RewriteReport()
    for _ in range(2):
        torch._dynamo.reset()
        compiled = moe_compile.compile(model, inner="eager", report=report)
        torch.testing.assert_close(compiled(x), model(x))
    assert report.graphs[0].before == report.graphs[0].after
    assert "a defect of ours" in report.graphs[0].notes[0]
    assert len([record for record in caplog.records if "a defect of ours" in record.message]) == 1


def test_failing_pass_leaves_nested_graphs_as_they_were(monkeypatch, model, x):
    from torch.utils.checkpoint import checkpoint

    def damage_nested(gm, options, inputs=()):
        for module in gm.modules():
            if isinstance(module, torch.fx.GraphModule) and module is not gm:
                fakes.rewrite_relu(module, options)
                next(iter(reversed(module.graph.nodes))).args = ((None,),)
                module.recompile()
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(passes, "run", damage_nested, raising=False)

    def step(x):
        return checkpoint(model, x, use_reentrant=False)

    x.requires_grad_()
    compiled = moe_compile.compile(step, inner="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_inner_compiler_failing_on_the_rewrite_gets_the_original(rewrites, model, x, caplog):
    def knows_no_clamp(gm, inputs):
        if any(getattr(node.target, "__name__", "") == "clamp_min" for node in gm.graph.nodes):
            raise NotImplementedError("clamp_min")
        return gm.forward

    report = RewriteReport()
    compiled = moe_compile.compile(model, inner=knows_no_clamp, report=report)
    torch.testing.assert_close(compiled(x), model(x))
    assert not report.rewritten
    assert "NotImplementedError: clamp_min" in report.refused[0].reason
    assert len([record for record in caplog.records if "clamp_min" in record.message]) >= 1


def test_inner_compiler_may_ask_dynamo_to_trace_again(rewrites, model, x, caplog):
    asked = []

    def asks_once(gm, inputs):
        if not asked:
            asked.append(gm)
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason="a float was specialised")
        return gm.forward

    report = RewriteReport()
    compiled = moe_compile.compile(model, inner=asks_once, report=report)
    torch.testing.assert_close(compiled(x), model(x))
    assert len(report.graphs) == 1
    assert len(report.rewritten) == 2
    assert not [record for record in caplog.records if record.name == "moe_compile"]


def test_inner_compiler_failing_on_the_original_is_the_users_to_see(refuses, model, x):
    def fails(gm, inputs):
        raise NotImplementedError("nothing works")

    with pytest.raises(Exception, match="nothing works"):
        moe_compile.compile(model, inner=fails)(x)


def test_refusal_is_told_once_with_the_way_out(refuses, model, x, caplog):
    torch.compile(model, backend="moe_compile", options={"inner": "eager"})(x)
    told = [record for record in caplog.records if record.name.startswith("moe_compile")]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert "model.py:1: MoE block left as it was: the gate is not a gate. moe_compile.explain" in told[0].message


# ---------------------------------------------------------------- logs


def test_torch_logs_sets_our_level():
    code = """
        import logging, torch, moe_compile.ops, moe_compile.passes
        print(logging.getLogger("moe_compile").getEffectiveLevel())
    """
    assert run_python(code, TORCH_LOGS="+moe_compile").stdout.strip() == str(logging.DEBUG)
    assert run_python(code, TORCH_LOGS="moe_compile").stdout.strip() == str(logging.INFO)


def test_tlparse_gets_the_graphs(tmp_path):
    code = """
        import torch, moe_compile
        moe_compile.compile(lambda x: torch.relu(x) + 1, inner="eager")(torch.ones(3))
    """
    run_python(code, TORCH_TRACE=str(tmp_path))
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    for name in ("moe_compile_before", "moe_compile_after", "moe_compile_report"):
        assert name in trace


def test_warn_once_gives_the_traceback_to_debug(caplog):
    with caplog.at_level(logging.DEBUG, "moe_compile"):
        for _ in range(2):
            logs.warn_once("it broke", details=ValueError("why"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.DEBUG]
    assert caplog.records[1].exc_info[1].args == ("why",)
