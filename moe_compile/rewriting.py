"""`moe_compile.rewrite`: the passes on a torch.export program or an FX graph, without Dynamo and without a compiler behind."""

from __future__ import annotations

import contextlib
import copy
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from moe_compile import passes
from moe_compile.backend import Backend, _Drawing
from moe_compile.config import ParallelConfig
from moe_compile.errors import ParallelError
from moe_compile.logs import warn_once
from moe_compile.opening import open_exchanges
from moe_compile.options import Options
from moe_compile.passes import aten
from moe_compile.report import GraphReport, RewriteReport
from moe_compile.rewriting_graphs import copy_of, hoist_attributes, note_gradients, open_modules, propagated


def rewrite(
    program: ExportedProgram | GraphModule,
    *,
    example_inputs: Sequence[Any] | None = None,
    parallel: ParallelConfig | None = None,
    quant: str = "none",
    validate: str = "auto",
    report: RewriteReport | None = None,
) -> Any:
    """A program of the same kind whose MoE blocks are stage ops; the one that was given stays as it is, and they share parameters.

    program: from torch.export.export, as it is or after run_decompositions; or a GraphModule of torch.fx.symbolic_trace, make_fx, Dynamo.
    example_inputs: of a GraphModule whose nodes have no fake tensors. Dimensions of them that are 0 or 1, and those that the code makes
        equal, are then what the new graph insists on; all others it takes from 2 on.
    parallel, quant, validate: see Options. Weights of quant="fp8" are quantised once, now: they do not follow later changes.
    report: gets a GraphReport. Where nothing was rewritten it says why, and the result is a copy.

    Gradients are kept where a graph may be trained: one whose parameters require them, unless it was decomposed, or under no_grad.
    Raises TypeError or ValueError for what cannot be meant.
    """
    _check(program, example_inputs)
    options = _options(parallel, quant, validate)
    started = time.perf_counter()
    new: Any
    if isinstance(program, ExportedProgram):
        new, done = _rewrite_exported(program, options)
    else:
        new, done = _rewrite_graph(program, example_inputs, options)
    if report is not None:
        report.add(done, time.perf_counter() - started)
    return new


def _check(program: Any, example_inputs: Any) -> None:
    if not isinstance(program, ExportedProgram | GraphModule):
        raise TypeError(
            f"program is {type(program).__name__}; moe_compile.rewrite takes a torch.export.ExportedProgram or a torch.fx.GraphModule. "
            "Give torch.export.export(model, inputs), or compile the model with moe_compile.compile(model)"
        )
    if example_inputs is not None and isinstance(program, ExportedProgram):
        raise ValueError("example_inputs is for a GraphModule; an ExportedProgram has its shapes, leave it out")


def _options(parallel: ParallelConfig | None, quant: str, validate: str) -> Options:
    """Checked, over ranks as well; `inner` is "eager", as providers that are torch code for Inductor have no place here."""
    return Backend(Options(inner="eager", parallel=parallel, quant=quant, validate=validate)).options


def _run(gm: GraphModule, options: Options, inputs: Sequence[Any], finish: Callable[[], Any]) -> tuple[Any, GraphReport]:
    """The passes over `gm` in place, then `finish`. None in the place of its result: `gm` is of no use, the program stays as it was."""
    drawing = _Drawing(gm, wanted=True)
    result: Any = None
    try:
        report = passes.run(gm, options, inputs)
        drawing.finish(report)
        if any(region.rewritten for region in report.regions):
            result = finish()
            open_exchanges(gm)
    except ParallelError:
        raise
    except Exception as error:  # noqa: BLE001  a defect of ours must never cost the user the program
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        warn_once(f"rewriting failed with {text}. The program is returned as it was; please report this", details=error)
        report = GraphReport(notes=[f"the passes failed with {text}; the program was left as it was"])
        drawing.finish(report)
    if not report.regions and not report.notes:
        report.notes.append("no routing decision was found: no top-k, max, argmax or sort of scores over a number of choices that is fixed")
    return result, report


# ---------------------------------------------------------------- exported programs
def _rewrite_exported(program: ExportedProgram, options: Options) -> tuple[ExportedProgram, GraphReport]:
    gm, mode = aten.copy_with_names(program.graph_module), aten.fake_mode(program.graph_module)
    if mode is None:
        raise ValueError("the program's nodes carry no fake tensors of one mode; export the model again with torch.export.export")
    training = program.dialect == "TRAINING" and torch.is_grad_enabled()
    outputs = _output_names(gm)
    with torch.set_grad_enabled(training), _clean(mode):
        aten.open_regions(gm)
        aten.note_examples(gm)
        aten.gather_items(gm)
        before = aten.kept(gm)

        def finish() -> ExportedProgram:
            aten.lower(gm, before, mode, pre_dispatch=program.dialect == "TRAINING")
            aten.forget_examples(gm)
            return _assembled(program, gm, outputs)

        new, report = _run(gm, options, _tensors_of(program), finish)
    return _copy_of_program(program) if new is None else new, report


def _tensors_of(program: ExportedProgram) -> list[Any]:
    """What each placeholder of the program's graph is called with, None for the user's inputs."""
    specs = program.graph_signature.input_specs
    return [program.state_dict.get(spec.target, program.constants.get(spec.target)) if spec.target else None for spec in specs]


def _copy_of_program(program: ExportedProgram) -> ExportedProgram:
    return _updated(program, aten.copy_with_names(program.graph_module), copy.deepcopy(program.graph_signature), {}, {})


def _assembled(program: ExportedProgram, gm: GraphModule, outputs: list[str | None]) -> ExportedProgram:
    """The program with another graph: weights that the rewrite made are its constants, its outputs have other names."""
    from torch._export.passes.lift_constants_pass import ConstantAttrMap, lift_constants_pass

    signature = copy.deepcopy(program.graph_signature)
    made = ConstantAttrMap()
    for n in gm.graph.nodes:
        if n.op == "get_attr" and "val" in n.meta:
            n.meta.setdefault("nn_module_stack", {})
            made.add(operator.attrgetter(str(n.target))(gm), str(n.target))
    gm = aten.close_regions(gm)
    constants = lift_constants_pass(gm, signature, made)
    renamed = aten.rename_items(gm)
    renamed |= {old: new for old, new in zip(outputs, _output_names(gm), strict=True) if old and new and old != new}
    for old, new in renamed.items():
        signature.replace_all_uses(old, new)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return _updated(program, gm, signature, constants, renamed)


def _output_names(gm: GraphModule) -> list[str | None]:
    return [n.name if isinstance(n, Node) else None for n in gm.graph.output_node().args[0]]  # type: ignore[union-attr]


def _updated(
    program: ExportedProgram, gm: GraphModule, signature: Any, constants: dict[str, Any], renamed: dict[str, str]
) -> ExportedProgram:
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=dict(program.state_dict),
        range_constraints=_ranges(program, gm),
        module_call_graph=_module_calls(program, gm, renamed),
        example_inputs=program.example_inputs,
        constants={**program.constants, **constants},
        verifiers=program.verifiers,
    )


def _ranges(program: ExportedProgram, gm: GraphModule) -> dict[Any, Any]:
    """Of the symbols that are still there, and of new ones: sizes that an exchange between ranks tells."""
    values = [v for n in gm.graph.nodes for v in tree_leaves(n.meta.get("val")) if isinstance(v, torch.Tensor | torch.SymInt)]
    mode: Any = aten.fake_mode(program.graph_module)
    there, env = free_symbols(values), mode.shape_env
    known = {symbol: limits for symbol, limits in program.range_constraints.items() if symbol in there}
    return {**{u: env.var_to_range[u] for u in free_unbacked_symbols(values)}, **known}


def _module_calls(program: ExportedProgram, gm: GraphModule, renamed: dict[str, str]) -> list[Any]:
    """Signatures of modules that the program keeps, but for those that read or return what is inside of a rewritten block."""
    calls, names = copy.deepcopy(program.module_call_graph), {n.name for n in gm.graph.nodes}
    for call in calls:
        arguments = [*call.signature.inputs, *call.signature.outputs] if call.signature is not None else []
        for argument in arguments:
            if getattr(argument, "name", None) in renamed:
                argument.name = renamed[argument.name]
        if any(name not in names for a in arguments if (name := getattr(a, "name", None))):
            call.signature = None
    return calls


@contextlib.contextmanager
def _clean(mode: Any) -> Iterator[None]:
    """What is traced for analysis leaves nothing behind in the shape environment that the given program shares."""
    env = mode.shape_env
    if env is None:
        yield
        return
    asserts, count = dict(env.deferred_runtime_asserts), env.num_deferred_runtime_asserts
    lists = {symbol: list(each) for symbol, each in asserts.items()}
    try:
        yield
    finally:
        env.deferred_runtime_asserts.clear()
        env.deferred_runtime_asserts.update(lists)
        env.num_deferred_runtime_asserts = count


# ---------------------------------------------------------------- graphs
def _rewrite_graph(gm: GraphModule, example_inputs: Sequence[Any] | None, options: Options) -> tuple[GraphModule, GraphReport]:
    new = copy_of(gm)
    with contextlib.ExitStack() as stack:
        mode = aten.fake_mode(new) if example_inputs is None else None
        if mode is None:
            open_modules(new)
            hoist_attributes(new)
            shapes = propagated(new, example_inputs)
            mode = shapes.mode
        else:
            shapes = None
            hoist_attributes(new)
            stack.enter_context(_clean(mode))
            aten.open_regions(new)
            aten.note_examples(new)
        aten.gather_items(new)
        note_gradients(new)
        before, lowered = aten.kept(new), aten.is_aten(new)

        def finish() -> GraphModule:
            if lowered:
                aten.lower(new, before, mode, pre_dispatch=False)
            if shapes is not None:
                shapes.insist(new)
            aten.forget_examples(new)
            new.recompile()
            return new

        result, report = _run(new, options, _holders(new), finish)
    return copy_of(gm) if result is None else result, report


def _holders(gm: GraphModule) -> list[Any]:
    """No placeholder of a plain graph is known to be a parameter."""
    return [None for n in gm.graph.nodes if n.op == "placeholder"]
