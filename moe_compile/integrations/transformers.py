"""Experts of transformers' models by our ops, without compiling the model: experts_implementation="moe_compile".

    import moe_compile.integrations.transformers
    model.set_experts_implementation("moe_compile")       # or from_pretrained(..., experts_implementation="moe_compile")

What an experts module computes is lifted from transformers' own formula for it (`batched_mm`: its weights' layout, biases, gate and
activation), once for all modules alike. Under torch.compile with our backend the compiler sees that formula as ever; with other backends
the ops stand in the graph.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, guard_scalar
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward, grouped_mm_experts_forward

from moe_compile import passes
from moe_compile.options import Options
from moe_compile.passes import aten
from moe_compile.passes.decisions import callee
from moe_compile.passes.fuse import fuse
from moe_compile.report import RegionReport
from moe_compile.rewriting_graphs import note_gradients

from .ours import compiling_for_us

NAME = "moe_compile"
TOKENS = 13  # of the inputs that stand for any number
_PASSING = {"permute_experts_unpermute", "combine", "getitem", "reshape", "view", "to", "_to_copy", "contiguous", "clone"}
_PLAIN = (int, float, str, bool, type(None), torch.dtype)


class UnknownExperts(NotImplementedError):
    """The experts of a class have no form that our ops compute; the message says why."""


class Setting(NamedTuple):
    """What else than the module a form depends on."""

    top_k: int
    hidden: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    device: str
    training: bool
    autocast: torch.dtype | None


class Form(NamedTuple):
    """A function (x [T, H], ids [T, K], weights [T, K], *tensors) -> out [T, H], and its name among `_functions`."""

    function: GraphModule
    name: str
    region: RegionReport


class _Functions:
    """Each form's function as an attribute: Dynamo guards the one that it reads, not how many there are."""


_forms: dict[Any, Form] = {}
_functions = _Functions()


def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """out [T, H] of hidden_states [T, H], top_k_index [T, K] (ids beyond the experts add nothing) and top_k_weights [T, K]."""
    if compiling_for_us():
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    compiling = torch.compiler.is_dynamo_compiling()
    facts, names = _constant_names(self) if compiling else names_of(self)
    setting = _setting(self, names, hidden_states, top_k_index, top_k_weights)
    form = _constant_form(self, setting, _fixed(_read(self, facts))) if compiling else form_of(self, setting).name
    return getattr(_functions, form)(hidden_states, top_k_index.long(), top_k_weights, *_read(self, names))


def form_of(module: Any, values: tuple[Any, ...]) -> Form:
    """The form of an experts module, found once for all modules with the same code, attributes and kinds of tensors."""
    setting = Setting(*values)
    facts, names = names_of(module)
    key = (type(module), setting, facts, *(_read(module, facts)), *(_kind(_named(module, name)) for name in names), *_objects(module))
    if key not in _forms:
        with _disable_current_modes():
            _forms[key] = _derived(module, setting, names)
    return _forms[key]


# ---------------------------------------------------------------- what a form depends on
def names_of(module: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(attributes that are plain values, tensors) of a module and those in it, as dotted names."""
    facts, tensors = [], []
    for path, each in module.named_modules():
        prefix = f"{path}." if path else ""
        facts += [prefix + name for name, value in vars(each).items() if not name.startswith("_") and isinstance(value, _PLAIN)]
        tensors += [prefix + name for own in (each._parameters, each._buffers) for name, value in own.items() if value is not None]
    return tuple(facts), tuple(tensors)


def _objects(module: Any) -> list[Any]:
    """Types of the modules inside, and other objects that their code may read. The key keeps these alive, so no other takes their place."""
    values = (value for each in module.modules() for name, value in vars(each).items() if not name.startswith("_"))
    return [*map(type, module.modules()), *(_Same(value) for value in values if not isinstance(value, _PLAIN))]


class _Same:
    """An object as a key, by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _named(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = getattr(module, step)
    return module


def _read(module: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple([_named(module, name) for name in names])


def _fixed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers that Dynamo made symbols of, as it saw them change, are what this code is for."""
    return tuple([guard_scalar(value) if type(value) in (int, float) else value for value in values])


def _kind(tensor: Any) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


def _setting(module: Any, names: tuple[str, ...], x_TH: Any, ids_TK: Any, weights_TK: Any) -> tuple[Any, ...]:
    """What Setting is made of; a plain tuple is what Dynamo hands on whole."""
    if x_TH.dim() != 2 or ids_TK.dim() != 2 or weights_TK.shape != ids_TK.shape:
        raise ValueError(
            f"hidden_states, top_k_index and top_k_weights are {tuple(x_TH.shape)}, {tuple(ids_TK.shape)} and {tuple(weights_TK.shape)}; "
            f"experts_implementation={NAME!r} takes [tokens, hidden] and twice [tokens, k]"
        )
    device = x_TH.device.type
    tensors = [x_TH, weights_TK, *_read(module, names)]
    return (
        int(ids_TK.shape[1]),
        int(x_TH.shape[1]),
        x_TH.dtype,
        weights_TK.dtype,
        device,
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )


# ---------------------------------------------------------------- under Dynamo
@torch.compiler.assume_constant_result
def _constant_names(module: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return names_of(module)


@torch.compiler.assume_constant_result
def _constant_form(module: Any, setting: tuple[Any, ...], facts: tuple[Any, ...]) -> str:
    """facts: read where Dynamo guards them, as it guards nothing that is done here."""
    return form_of(module, setting).name


# ---------------------------------------------------------------- deriving
def _derived(module: Any, setting: Setting, names: tuple[str, ...]) -> Form:
    with torch.set_grad_enabled(setting.training):
        gm = _traced(module, setting, names)
        aten.note_examples(gm)
        note_gradients(gm)
        report = passes.run(gm, Options(inner="eager"))
        done = [region for region in report.regions if region.rewritten]
        if not done or (left := _behind_the_experts(gm)):
            reason = f"`{left[0]}` works on what the experts put out, row by row or not" if done else ""
            reason = reason or "; ".join(r.reason or "" for r in report.regions) or "no experts were found in it"
            raise UnknownExperts(
                f"{type(module).__name__}: {reason}. "
                f'experts_implementation={NAME!r} does not know this form; call model.set_experts_implementation("grouped_mm")'
            )
        fuse(gm)
    form = Form(_from_ids(gm), f"form_{len(_forms)}", done[0])
    setattr(_functions, form.name, form.function)
    return form


def _behind_the_experts(gm: GraphModule) -> list[str]:
    """Calls that compute something of the experts' results: what follows may mix rows, which transformers' forms order differently."""
    behind: dict[Any, None] = {}
    for n in gm.graph.nodes:
        if callee(n) == "permute_experts_unpermute" or any(a in behind for a in n.all_input_nodes):
            behind[n] = None
    return [callee(n) for n in behind if n.op.startswith("call") and callee(n) not in _PASSING]


def _traced(module: Any, setting: Setting, names: tuple[str, ...]) -> GraphModule:
    """(x, scores, weights, *parameters) -> out as ATen, where the ids are the largest of scores [T, K, E]: any, and not distinct."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    tokens = [(setting.hidden,), (setting.top_k, module.num_experts), (setting.top_k,)]
    dtypes = [setting.dtype, setting.dtype, setting.weight_dtype]
    plain = [torch.zeros(TOKENS, *shape, dtype=dtype, device=setting.device) for shape, dtype in zip(tokens, dtypes)]
    inputs = [_symbolic(mode, tensor, f"input_{i}") for i, tensor in enumerate(plain)]
    with mode:
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in _read(module, names)]

    def call(x_TH: Any, scores_TKE: Any, weights_TK: Any, *parameters: Any) -> Any:
        alike = _with_tensors(module, dict(zip(names, parameters)))
        with torch.autocast(setting.device, dtype=setting.autocast, enabled=setting.autocast is not None):
            return batched_mm_experts_forward(alike, x_TH, scores_TKE.argmax(-1), weights_TK)

    with torch.no_grad():
        gm = make_fx(call, tracing_mode="real")(*inputs, *fakes)
    return gm


def _symbolic(mode: FakeTensorMode, tensor: Any, name: str) -> Any:
    """A fake of any number of tokens."""
    sizes: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (tensor.dim() - 1)])
    return mode.from_tensor(tensor, source=ConstantSource(name), symbolic_context=sizes)


def _with_tensors(module: Any, tensors: dict[str, Any], prefix: str = "") -> Any:
    """The module with other parameters and buffers; the one that was given keeps its own."""
    alike = copy.copy(module)
    alike._parameters, alike._buffers = (
        {name: tensors.get(prefix + name) for name in own} for own in (module._parameters, module._buffers)
    )
    alike._modules = {name: child and _with_tensors(child, tensors, f"{prefix}{name}.") for name, child in module._modules.items()}
    return alike


def _from_ids(gm: GraphModule) -> GraphModule:
    """The same graph, its second input the ids."""
    chosen = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.argmax.default)
    scores = chosen.args[0]
    with gm.graph.inserting_before(scores):
        chosen.replace_all_uses_with(gm.graph.placeholder("ids_TK"))
    gm.graph.erase_node(chosen)
    gm.graph.erase_node(scores)
    gm.graph.eliminate_dead_code()
    for n in gm.graph.nodes:
        n.meta.clear()
    return GraphModule(gm, gm.graph)


ExpertsInterface.register(NAME, forward)
