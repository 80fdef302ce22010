"""Experts spread over ranks: what is found, what a rank keeps, what the compiler sees, and how it trains."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import hf_zoo, styles
from corpus.variants import VARIANTS
from ranks import Ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from workers_sharding import INTER as I
from workers_sharding import Both, E, H, Listed, Stacked, build, world_of_four, world_of_two

from moe_compile.config import ParallelConfig
from moe_compile.finding import find_expert_parameters
from moe_compile.gradients import attach_hooks, ddp, ignored_parameters
from moe_compile.ops import expert_shard
from moe_compile.ops.expert_shard import Place
from moe_compile.sharding import expert_parameters, expert_range, is_sharded, shard_experts

# Flat slabs, embeddings, convolutions, buffers, tied or normalised experts, widths or counts that do not fit a router.
STYLES_WITHOUT = {"hf_doge_cdmoe"}
VARIANTS_WITHOUT = {
    "flat_slab_chunk", "flat_slab_view", "conv1x1_experts", "expert_norm_inside", "expert_tied", "expert_int8_weights", "parameter_list",
    "expert_other_width", "expert_on_shared_hidden", "low_rank_beside_a_layer",
}  # fmt: skip
ZOO_WITHOUT = {"dbrx", "doge_cdmoe_block", "longcat_flash", "vitpose_backbone", "zaya"}


def test_styles_are_found_with_all_their_experts():
    for name, case in styles.CASES.items():
        model = case.factory()
        groups = find_expert_parameters(model)
        assert (not groups) == (name in STYLES_WITHOUT), (name, groups)
        assert all(group.num_experts == styles.E for group in groups), (name, groups)
    assert find_expert_parameters(styles.CASES["hf_gptoss_517_loop"].factory())[0].names == ("gu", "gub", "dn", "dnb")
    assert find_expert_parameters(styles.CASES["tf5_eager_hit"].factory())[0].router == "weight"


def test_variants_are_found():
    for name, variant in VARIANTS.items():
        groups = find_expert_parameters(variant.build())
        assert len(groups) == (0 if name in VARIANTS_WITHOUT else 2 if name == "outside_two_layers" else 1), (name, groups)


def test_zoo_is_found_and_nothing_else():
    for name in hf_zoo.ZOO:
        with torch.device("meta"):
            model = _without_values(name)
        groups = find_expert_parameters(model)
        assert len(groups) == (0 if name in ZOO_WITHOUT else hf_zoo.MOE_LAYERS[name]), (name, groups)
        assert all(group.num_experts == hf_zoo.E for group in groups), (name, groups)


def _without_values(name: str) -> Any:
    """A zoo model on the device of the context."""
    spec = hf_zoo.SPECS[name]
    config, cls = hf_zoo.make_config(name), getattr(hf_zoo._module(spec, "modeling"), spec.cls)
    return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)


def module(**children: Any) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.register_parameter(name, child) if isinstance(child, nn.Parameter) else made.add_module(name, child)
    return made


def stack(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


def layer() -> nn.Module:
    return module(attention=nn.Linear(H, H), norm=nn.LayerNorm(H), mlp=nn.Linear(H, H))


NOT_EXPERTS = {
    "decoder layers, and as many classes": lambda: module(layers=nn.ModuleList(layer() for _ in range(4)), head=nn.Linear(H, 4)),
    "layers in a row, and as many classes": lambda: module(
        layers=nn.Sequential(*(nn.Linear(H, H) for _ in range(4))), head=nn.Linear(H, 4)
    ),
    "layers of another module": lambda: module(
        model=module(tokens=nn.Embedding(9, H), layers=nn.ModuleList(nn.Linear(H, H) for _ in range(4))), score=nn.Linear(H, 4)
    ),
    "one head a mask": lambda: module(
        heads=nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.Linear(H, 3)) for _ in range(4)), quality=nn.Linear(H, 4)
    ),
    "heads of attention": lambda: module(q=stack(4, H, 2), k=stack(4, H, 2), v=stack(4, H, 2), out=nn.Linear(H, H)),
    "attention over the width": lambda: module(
        attention=module(q=stack(16, 4, 2), k=stack(16, 4, 2), norm=nn.LayerNorm(16)), ff=nn.Linear(32, 16)
    ),
    "block-diagonal gates with biases": lambda: module(
        input_weight=stack(2, 4, 4), input_bias=stack(2, 4), other_weight=stack(2, 4, 4), other_bias=stack(2, 4), scale=stack(2, 4)
    ),
    "layer scales": lambda: module(a=stack(8, 1, 1), b=stack(8, 1, 1), wide=nn.Linear(4, 8)),
    "convolutions": lambda: module(a=nn.Conv1d(8, 4, 3), b=nn.Conv1d(8, 4, 3), gate=nn.Linear(4, 8)),
    "one stack": lambda: module(a=stack(8, 4, 4), gate=nn.Linear(4, 8)),
}


@pytest.mark.parametrize("name", NOT_EXPERTS)
def test_what_is_not_experts_is_left(name):
    assert find_expert_parameters(NOT_EXPERTS[name]()) == []


def test_a_router_of_another_block_is_no_evidence():
    heads = module(q=stack(4, 16, 2), k=stack(4, 16, 2))
    experts = module(up=stack(4, I, 16), down=stack(4, 16, I))
    model = module(attention=heads, mlp=module(experts=experts, gate=nn.Linear(16, 4)), more=nn.Linear(16, 3))
    assert [group.module for group in find_expert_parameters(model)] == ["mlp.experts"]


def test_biases_belong_to_their_stacks_and_routers_do_not():
    own = module(gate_up=stack(4, H, 2 * I), gate_up_bias=stack(4, 2 * I), down=stack(4, I, H), down_bias=stack(4, H))
    assert find_expert_parameters(module(experts=own, gate=nn.Linear(H, 4)))[0].names == ("gate_up", "gate_up_bias", "down", "down_bias")
    inside = module(router=stack(4, H), up=stack(4, H, I), b1=stack(4, I), down=stack(4, I, H), b2=stack(4, H))
    assert find_expert_parameters(inside)[0].names == ("up", "b1", "down", "b2")
    unclear = module(up=stack(4, H, I), down=stack(4, I, H), b1=stack(4, H), b2=stack(4, H))
    assert find_expert_parameters(unclear) == []
    assert find_expert_parameters(unclear, ["up", "down", "b?"])[0].names == ("up", "down", "b1", "b2")


def test_named_experts():
    model = build()
    (group,) = find_expert_parameters(model, ["layers.1.*n*", "layers.1.up*"])
    assert (group.module, group.names, group.num_experts) == ("layers.1", ("down", "up", "up_bias"), E)
    (group,) = find_expert_parameters(model, "*.experts")
    assert (group.module, group.kind, group.names) == ("layers.0.experts", "list", ("up.weight", "up.bias", "down.weight"))


def test_a_named_list_needs_no_evidence():
    for name in ("expert_other_width", "expert_on_shared_hidden", "expert_norm_inside"):
        (group,) = find_expert_parameters(VARIANTS[name].build(), ["experts"])
        assert (group.kind, group.num_experts) == ("list", 4)
    with pytest.raises(ValueError, match="children with parameters that are all different modules"):
        find_expert_parameters(VARIANTS["expert_tied"].build(), ["experts"])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layers.1.upp"], "'layers.1.upp' matches no parameter and no list of experts"),
        (["layers"], "layers is no list of experts: its children differ in class"),
        (["head.*"], r"head has {'weight': \(3, 8\), 'bias': \(3,\)}; parameters of experts are \[E, ...\]"),
        (["layers.1.up_bias"], "one of them with three dimensions"),
    ],
)
def test_a_name_that_names_no_experts_is_an_error(patterns, message):
    with pytest.raises(ValueError, match=message):
        find_expert_parameters(build(), patterns)


@pytest.mark.parametrize(("ep", "rank", "held"), [(2, 0, [0, 1, 2, 3]), (2, 1, [4, 5, 6]), (4, 3, [6])])
def test_a_rank_keeps_its_part_under_the_same_names(rank_of, ep, rank, held):
    want, model = build().state_dict(), build()
    assert shard_experts(model, rank_of(rank, ep)) is model
    assert is_sharded(model)
    assert expert_range(E, ep, rank) == (held[0], held[-1] + 1)
    state = model.state_dict()
    absent = {n for n in want if n.startswith("layers.0.experts.") and int(n.split(".")[3]) not in held}
    assert list(state) == [name for name in want if name not in absent]
    for name, value in state.items():
        part = want[name][held] if name in ("layers.1.up", "layers.1.up_bias", "layers.1.down") else want[name]
        assert torch.equal(value, part)
        assert value.untyped_storage().nbytes() == part.nbytes, "the whole is still held"
    own = {n for n in state if n.startswith(("layers.0.experts", "layers.1.up", "layers.1.down"))}
    assert set(expert_parameters(model)) == own
    assert ignored_parameters(model) == {p for n, p in model.named_parameters() if n in own}


def test_one_rank_changes_nothing():
    model = build()
    assert shard_experts(model, ParallelConfig()) is model
    assert not is_sharded(model)
    assert type(model.layers[1]) is Stacked


def test_a_model_on_the_meta_device(rank_of):
    with torch.device("meta"):
        model = shard_experts(build(), rank_of(1, 2))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert tuple(expert_parameters(model)["layers.1.up"].shape) == (3, I, H)


@pytest.mark.parametrize(
    ("ep", "change", "error", "message"),
    [
        (2, lambda m: shard_experts(m, ParallelConfig(ep=2, ep_group=dist.group.WORLD)), RuntimeError, "of this Both are sharded already"),
        (5, lambda m: None, ValueError, r"has 7 experts, in parts of 2: of ep=5 ranks the last would get none; ep could be 2 or 3 or 4"),
        (2, lambda m: setattr(m, "layers", nn.ModuleList()), ValueError, "no experts found in this Both"),
        (2, lambda m: m.head.register_parameter("tied", m.layers[1].up), ValueError, "layers.1.up and head.tied are one tensor"),
        (
            2,
            lambda m: setattr(m.layers[0].experts[1].up, "weight", m.layers[0].experts[0].up.weight),
            ValueError,
            "not all of the same expert",
        ),
    ],
)
def test_what_cannot_be_spread_is_an_error(rank_of, ep, change, error, message):
    model, parallel = build(), rank_of(0, ep)
    change(model)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        shard_experts(model, parallel)
    assert {name: p.shape for name, p in model.named_parameters()} == before, "changed in spite of the error"


def test_unknown_gradients_and_ddp_of_a_whole_model_are_errors(rank_of):
    with pytest.raises(ValueError, match='gradients is \'max\'; allowed: "mean", "sum"'):
        shard_experts(build(), rank_of(0, 2), gradients="max")
    with pytest.raises(RuntimeError, match="ep is 2 but this Both is not sharded"):
        ddp(build(), rank_of(0, 2))


def test_ties_inside_an_expert_and_of_whole_stacks_stay(rank_of):
    model = build()
    for expert in model.layers[0].experts:
        expert.up.weight = nn.Parameter(torch.randn(H, H))
        expert.down.weight = expert.up.weight
    second = Stacked()
    second.up = model.layers[1].up
    model.layers.append(second)
    shard_experts(model, rank_of(0, 2))
    assert model.layers[0].experts[0].down._parameters["weight"] is model.layers[0].experts[0].up._parameters["weight"]
    assert model.layers[2]._parameters["up"] is model.layers[1]._parameters["up"]
    assert model.layers[1]._parameters["up"].shape[0] == 4


def test_state_dicts_whole_local_and_assigned(rank_of):
    want, model = build().state_dict(), shard_experts(build(), rank_of(1, 2))
    for p in model.parameters():
        p.data.zero_()
    model.load_state_dict(want)
    assert torch.equal(expert_parameters(model)["layers.1.down"], want["layers.1.down"][4:])
    local = {name: value.clone() for name, value in model.state_dict().items()}
    for p in model.parameters():
        p.data.zero_()
    model.load_state_dict(local)
    assert torch.equal(expert_parameters(model)["layers.1.down"], want["layers.1.down"][4:])
    model.load_state_dict(want, assign=True)
    held = expert_parameters(model)["layers.1.down"]
    assert held.untyped_storage().nbytes() == held.nbytes
    assert len(held._backward_hooks) == 1
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers.0.experts.9.up.weight"):
        model.load_state_dict({**want, "layers.0.experts.9.up.weight": want["head.bias"]})
    with pytest.raises(RuntimeError, match=r"size mismatch for layers.1.up"):
        model.load_state_dict({**want, "layers.1.up": want["layers.1.up"][:5]})


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_sharded_too(rank_of, how):
    model = shard_experts(build(), rank_of(1, 2))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert is_sharded(other)
    assert type(other.layers[1]) is type(model.layers[1])
    for (name, p), (_, q) in zip(expert_parameters(model).items(), expert_parameters(other).items(), strict=True):
        assert torch.equal(p, q), name
        assert p is not q
        assert len(q._backward_hooks) == 1
    other.load_state_dict(build().state_dict())
    other.layers[0].experts[0].up.register_buffer("extra", torch.zeros(1))
    assert not hasattr(model.layers[0].experts[0].up, "extra")


def test_moves_are_followed(rank_of):
    model = shard_experts(build(), rank_of(1, 2)).to(torch.bfloat16)
    absent, present = model.layers[0].experts[0].up, model.layers[0].experts[5].up
    assert {absent.weight.dtype, present.weight.dtype, model.layers[1].up.dtype} == {torch.bfloat16}
    for p in expert_parameters(model.to_empty(device="cpu")).values():
        assert len(p._backward_hooks) == 1
    assert absent.weight.device.type == "cpu"


def test_frozen_experts_get_their_hook_when_unfrozen(rank_of):
    model = build(Stacked).requires_grad_(False)
    shard_experts(model, rank_of(0, 2)).requires_grad_(True)
    assert not model._parameters["up"]._backward_hooks
    attach_hooks(model)
    attach_hooks(model)
    assert len(model._parameters["up"]._backward_hooks) == 1
    model._parameters["up"].sum().backward()
    assert torch.equal(model._parameters["up"].grad, torch.full((4, I, H), 0.5))


def test_eager_code_may_look_but_not_compute(rank_of):
    model = shard_experts(build(), rank_of(1, 2))
    assert "Linear(in_features=8, out_features=6, bias=True)" in str(model)
    assert tuple(model.layers[1].up.shape) == (E, I, H)
    assert "all of up" in repr(model.layers[1].up)
    assert model.layers[0].experts[0].up.bias is not None
    with pytest.raises(RuntimeError, match=r"all of up is used by aten.index.Tensor in eager code: 7 experts are spread over 2 ranks"):
        model.layers[1](torch.randn(3, H))
    with pytest.raises(RuntimeError, match=r"weight of expert 0 .* moe_compile.compile\(model, parallel=...\)"):
        model.layers[0](torch.randn(3, H))
    with pytest.raises(KeyError, match="weight belongs to expert 0, which another of the 2 ranks holds"):
        model.layers[0].experts[0].up.weight = nn.Parameter(torch.ones(I, H))
    with pytest.raises(RuntimeError, match="expert 5"):
        model.layers[0].experts[5](torch.randn(3, H))


@pytest.mark.parametrize("cls", [Listed, Stacked])
def test_dynamo_sees_the_ops(rank_of, fresh_dynamo, cls):
    model, found = shard_experts(build(cls), rank_of(1, 2)), []

    def backend(gm: Any, inputs: Any) -> Any:
        nodes = [n for n in gm.graph.nodes if str(n.target).startswith("moe_compile.")]
        found.extend((n.target.__name__.split(".")[0], n.args, n.meta["example_value"]) for n in nodes)
        return gm.forward

    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True),
        pytest.raises(RuntimeError, match=r"moe_compile\.compile"),
    ):
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(5, H))
    if cls is Stacked:
        assert [(name, Place.parse(args[1])[:3], tuple(value.shape)) for name, args, value in found] == [
            ("expert_shard", (E, 4, 2), shape) for shape in ((E, I, H), (E, I), (E, H, I))
        ]
        assert all(value.requires_grad for *_, value in found)
        return
    names = [name for name, *_ in found]
    assert names == ["absent_expert"] * 12 + ["present_expert"] * 9
    assert [Place.parse(args[1]).first for _, args, _ in found] == [e for e in range(E) for _ in range(3)]
    assert {tuple(value.shape) for *_, value in found} == {(I, H), (I,), (H, I)}
    assert all(value.requires_grad for name, _, value in found if name == "present_expert")


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=op.name) for op, args in expert_shard.sample_inputs()])
def test_the_ops_have_shapes_and_no_values(op, args):
    with pytest.raises(RuntimeError, match="4 experts are spread over 2 ranks"):
        op.overload(*args)
    shape = {"expert_shard": (4, 3, 5), "present_expert": (3, 5), "absent_expert": (3, 5)}[op.name]
    with FakeTensorMode() as mode:
        held = mode.from_tensor(args[0]).requires_grad_()
        out = op.overload(held, *args[1:])
        assert (tuple(out.shape), out.dtype, out.requires_grad) == (shape, torch.float32, True)
        assert not op.overload(held.detach(), *args[1:]).requires_grad
        with pytest.raises(RuntimeError, match=r"the gradient of moe_compile"):
            out.sum().backward()


@pytest.mark.parametrize("function", [world_of_two, world_of_four])
def test_over_real_ranks(tmp_path, function):
    with Ranks(2 if function is world_of_two else 4) as ranks:
        ranks.run(function, str(tmp_path), timeout=60)


def test_the_shared_model_is_what_the_processes_train():
    assert [group.module for group in find_expert_parameters(Both())] == ["layers.0.experts", "layers.1"]
