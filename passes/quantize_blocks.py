"""`quant="fp8"`: the float weights of rewritten blocks become e4m3 beside the model's own, where they can be computed from parameters.

Before:   y = permute_experts_unpermute(x, ..., [up, down], ..., "eoi,oi*8")
After:    y = permute_experts_unpermute(x, ..., [up_values, up_scales, down_values, down_scales], ..., "eoi:fp8_block,eoi:fp8_block")

Values and scales are buffers of the graph, which moe_compile/quantising.py keeps up to date. Runs when the graph is compiled, on the
tensors that Dynamo hands over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moe_compile.logs import warn_once
from moe_compile.ops import experts
from moe_compile.ops.comm import costs
from moe_compile.ops.layout import parse_layout, quantised
from moe_compile.ops.program import parse
from moe_compile.ops.quantize_dispatch import counting_sort
from moe_compile.ops.registry import get
from moe_compile.quantising import Held, Leaf, Reading, held, readings
from moe_compile.report import RegionReport

from .decisions import writes_in_place
from .select import Choice, choose

KIND = "fp8_block"
SLOWER = 2  # times that a provider may cost, by its own estimate, of what the one of the float weights costs
ROWS = 32  # random rows that the block's error is measured on
WEIGHTS, BIASES, PROGRAM, LAYOUT, BIAS_LAYOUT = range(4, 9)  # arguments of both ops
TRAINING = 'quant="fp8" is for inference: gradients are wanted, so experts stay in their own type (call the model under torch.no_grad())'


class Unfit(Exception):
    """Why a block's weights are not quantised."""


class Block(NamedTuple):
    """A rewritten block: its report, the nodes that its rewrite added, and what its providers were asked."""

    entry: RegionReport
    added: list[Node]
    choice: Choice


def quantize_blocks(gm: GraphModule, blocks: Sequence[Block], inputs: Sequence[Any], training: bool) -> None:
    """Quantises what can be, in place; every report gets the errors, or the reason why not."""
    graph = _Graph(gm, inputs)
    for block in blocks:
        try:
            if training:
                warn_once(TRAINING)
                raise Unfit(TRAINING)
            _quantize(graph, block)
        except Unfit as reason:
            block.entry.quant = f"not quantised: {reason}"


def _quantize(graph: _Graph, block: Block) -> None:
    ops = torch.ops.moe_compile
    stages = [n for n in block.added if n.target in (ops.permute_experts_unpermute.default, ops.permute_experts_combine.default)]
    if not stages:
        raise Unfit("its experts are in no stage op")
    first = stages[0]
    if quantised(str(first.args[LAYOUT])):
        raise Unfit(f"the model's own weights are quantised ({first.args[LAYOUT]})")
    if any(n.args[WEIGHTS:PROGRAM] != first.args[WEIGHTS:PROGRAM] for n in stages):
        raise Unfit("its parts read different weights")
    layout = ",".join(f"eoi:{KIND}" for _ in parse_layout(str(first.args[LAYOUT])))
    provider = _provider(block, layout)
    weights = list(_weights(graph, first))
    block.entry.quant_errors = _errors(graph, first, [reading.weight for reading in weights], layout, block)
    block.entry.quant = _text(block.entry.quant_errors)
    block.entry.providers = {**block.entry.providers, "experts": provider.providers["experts"]}
    block.entry.losers = {**block.entry.losers, **provider.losers}
    graph.rewrite(stages, weights, layout, provider.providers["experts"])


def _text(errors: dict[str, float]) -> str:
    return f"weights {KIND}, rows e4m3; relative error (RMS): " + ", ".join(f"{name} {error:.1%}" for name, error in errors.items())


def _provider(block: Block, layout: str) -> Choice:
    """The provider of the quantised experts. Raises Unfit where, on a GPU, there is none but such as dequantise weights in each call."""
    asked = block.choice.experts
    assert asked is not None
    problem = dataclasses.replace(asked, weight_layout=layout)
    try:
        found = choose(problem, ("experts",))
    except LookupError as error:
        raise Unfit(str(error)) from None
    name, old = found.providers["experts"], block.entry.providers["experts"]
    if asked.device != "cpu" and costs.cost(get("experts", name), problem)[0] > SLOWER * costs.cost(get("experts", old), asked)[0]:
        why = "; ".join(f"{each}: {reason}" for each, reason in found.losers["experts"].items())
        raise Unfit(f"{name} would take more than {SLOWER} times as long with them as {old} without ({why})")
    return found


# ---------------------------------------------------------------- the graph
class _Graph:
    """A graph whose weights are computed from parameters, and the tensors that it is compiled with."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self.gm = gm
        holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        known = len(holders) == len(inputs)  # the body of a higher-order op has others
        self.leaves = {n: Leaf(i) for i, n in enumerate(holders)} if known else {}
        self.tensors = dict(zip(holders, inputs, strict=True)) if known else {}

    def leaf(self, n: Node) -> Leaf:
        """Raises Unfit for what is no parameter, or has no values yet."""
        if n.op == "get_attr":
            return Leaf(-1, self._attribute(n))
        if n not in self.leaves:
            raise Unfit(f"{n.name} enters a part of the graph that is compiled without tensors")
        if not _is_parameter(n, self.tensors[n]):
            raise Unfit(f"{n.name} is no parameter or buffer of a module")
        if is_fake(self.tensors[n]):
            raise Unfit(f"{n.name} has no values when the graph is compiled")
        return self.leaves[n]

    def _attribute(self, n: Node) -> Any:
        found: Any = self.gm
        for name in str(n.target).split("."):
            found = getattr(found, name)
        if not isinstance(found, torch.Tensor) or is_fake(found):
            raise Unfit(f"{n.name} is no tensor with values")
        return found

    def tensor(self, n: Node) -> Any:
        return self.leaf(n).of(list(self.tensors.values()))

    def rewrite(self, stages: list[Node], weights: list[Reading], layout: str, provider: str) -> None:
        """The stages read buffers in the place of their weights."""
        readings(self.gm).extend(weights)
        names = [(self._buffer(r.weight.weight.values), self._buffer(r.weight.weight.scales)) for r in weights]
        for n in stages:
            old = n.all_input_nodes
            with self.gm.graph.inserting_before(n):
                nodes = [self.gm.graph.get_attr(name) for pair in names for name in pair]
            args = list(n.args)
            args[WEIGHTS], args[LAYOUT], args[-1] = nodes, layout, provider
            n.args = tuple(args)
            for each in nodes:
                each.meta["example_value"] = getattr(self.gm, str(each.target))
            _drop(self.gm, old)

    def _buffer(self, tensor: Any) -> str:
        """The name of a buffer of the graph, as if Dynamo had lifted it."""
        from torch._dynamo.source import ConstantSource

        for name, own in self.gm.named_buffers(recurse=False):
            if own is tensor:
                return str(name)
        name = next(each for i in range(1 << 30) if not hasattr(self.gm, each := f"moe_quantised_{i}"))
        self.gm.register_buffer(name, tensor, persistent=False)
        if hasattr(self.gm, "_param_name_to_source"):
            self.gm._param_name_to_source[name] = ConstantSource(name)
        return name


def _is_parameter(n: Node, tensor: Any) -> bool:
    static = n.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return isinstance(tensor, torch.nn.Parameter) or (isinstance(tensor, torch.Tensor) and static is not None)


def _drop(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Nodes that nobody reads any more, and what only they read."""
    for n in nodes:
        if not n.users and n.op in ("call_function", "call_method", "get_attr") and not writes_in_place(n) and n in gm.graph.nodes:
            below = n.all_input_nodes
            gm.graph.erase_node(n)
            _drop(gm, below)


# ---------------------------------------------------------------- values
class _Recipe:
    """How a tensor is computed from leaves: nodes in order, each a call of others."""

    def __init__(self, graph: _Graph, results: Sequence[Node]) -> None:
        self.results, self.leaves, self.steps = list(results), [], []  # type: tuple[list[Node], list[Node], list[Node]]
        for n in results:
            self._visit(graph, n)

    def _visit(self, graph: _Graph, n: Node) -> None:
        if n in self.leaves or n in self.steps:
            return
        if n.op in ("placeholder", "get_attr"):
            graph.leaf(n)
            self.leaves.append(n)
            return
        if n.op not in ("call_function", "call_method") or writes_in_place(n) or any(writes_in_place(u) for u in n.users):
            raise Unfit(f"{n.name} is not computed from parameters alone")
        for each in n.all_input_nodes:
            self._visit(graph, each)
        self.steps.append(n)

    @property
    def text(self) -> str:
        """The same for the same computation of other leaves."""
        names = {n: f"%{i}" for i, n in enumerate((*self.leaves, *self.steps))}
        calls = (f"{n.op} {n.target} {map_arg(n.args, names.get)} {map_arg(n.kwargs, names.get)}" for n in self.steps)
        return "\n".join((*calls, " ".join(names[n] for n in self.results)))

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        env: dict[Node, Any] = dict(zip(self.leaves, leaves, strict=True))
        with torch.no_grad():
            for n in self.steps:
                args, kwargs = map_arg(n.args, env.__getitem__), map_arg(n.kwargs, env.__getitem__)
                env[n] = n.target(*args, **kwargs) if callable(n.target) else getattr(args[0], str(n.target))(*args[1:], **kwargs)
        return [env[n] for n in self.results]


def _weights(graph: _Graph, stage: Node) -> Iterator[Reading]:
    """Each weight of a stage, quantised."""
    nodes: Any = stage.args[WEIGHTS]
    for slot in parse_layout(str(stage.args[LAYOUT])):
        recipe = _Recipe(graph, nodes[slot.first : slot.first + slot.num])

        def make(leaves: Sequence[Any], slot: Any = slot, recipe: _Recipe = recipe) -> list[Any]:
            found = recipe(leaves)
            own = list(found[0].unbind(0)) if slot.stacked else found
            return [each.t() for each in own] if slot.axes == "io" else own

        leaves = [graph.tensor(n) for n in recipe.leaves]
        sample = make(leaves)[0]
        if not sample.dtype.is_floating_point or sample.dtype.itemsize < 2:
            raise Unfit(f"a weight is {sample.dtype}, only weights of a float type are quantised")
        weight: Held = held(leaves, f"{slot.stacked} {slot.axes}\n{recipe.text}", make, KIND)
        yield Reading(weight, tuple(graph.leaf(n) for n in recipe.leaves))


# ---------------------------------------------------------------- errors
def _errors(graph: _Graph, stage: Node, weights: Sequence[Held], layout: str, block: Block) -> dict[str, float]:
    """Of each weight, and of the experts' results for random rows, by the loop over experts."""
    found = {f"weight {j}": weight.error for j, weight in enumerate(weights)}
    asked = block.choice.experts
    assert asked is not None
    nodes: Any = [*stage.args[WEIGHTS], *stage.args[BIASES]]  # type: ignore[misc, list-item, operator]
    recipe = _Recipe(graph, nodes)
    tensors = recipe([graph.tensor(n) for n in recipe.leaves])
    own, biases = tensors[: len(stage.args[WEIGHTS])], tensors[len(stage.args[WEIGHTS]) :]  # type: ignore[arg-type]
    flat = [t for weight in weights for t in (weight.weight.values, weight.weight.scales)]
    quiet = torch.no_grad(), torch.amp.autocast_mode.autocast(own[0].device.type, enabled=False)
    with quiet[0], quiet[1]:
        rows = _random_rows(asked, weights[0].weight.experts, own[0].device)
        texts = (str(stage.args[PROGRAM]), str(stage.args[BIAS_LAYOUT]), asked.top_k)
        a, b = (
            experts.OP.overload(*rows, each, biases, texts[0], text, *texts[1:], "reference").float()
            for each, text in ((own, str(stage.args[LAYOUT])), (flat, layout))
        )
    found["output"] = float((a - b).norm() / a.norm().clamp(min=1e-30))
    return found


def _random_rows(asked: Any, num_experts: int, device: Any) -> tuple[Any, ...]:
    """x, order, offsets and routing weights of ROWS tokens."""
    g = torch.Generator().manual_seed(0x5EED)
    top_k = asked.top_k
    ids = torch.rand((ROWS, num_experts), generator=g).argsort(1)[:, : min(top_k, num_experts)]
    ids = torch.nn.functional.pad(ids, (0, top_k - ids.shape[1]), value=-1)
    w = torch.rand((ROWS, top_k), generator=g).to(device) if parse(asked.program).uses_w else None
    x = torch.randn((ROWS, asked.hidden), generator=g).to(device, asked.dtype)
    return x, *counting_sort(ids.to(device), num_experts), w
