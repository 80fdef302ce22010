"""Ways to compute one MoE layer with its routing given: ours, transformers', hand-written ones, and libraries by their public module names.

A peer is made for one case: `make(layer, case)` returns it, raises Unsupported with the reason why it cannot take the case, or ImportError.
Its call takes (x, ids, weights) and what its `prepare` made of them, which is not timed: only a peer that says so in its name uses that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from ep_layer import grouped_experts, swiglu
from layer_case import Case, Layer, uninterleave

import moe_compile.ops  # noqa: F401  registers torch.ops.moe_compile
from moe_compile.ops import registry

BATCHED_BYTES = 16 << 30  # of weights that transformers' batched_mm may copy, a copy for each slot
DENSE_ELEMENTS = 1 << 28  # E * M * I up to which all experts for all tokens are measured
OURS = "ours"
LIBRARIES = {
    "transformers": "transformers", "vllm": "vllm", "triton_kernels": "triton_kernels", "sonic-moe": "sonicmoe", "scattermoe": "scattermoe",
    "deep_gemm": "deep_gemm",
}  # fmt: skip


class Unsupported(Exception):
    """This peer cannot take this case; says why."""


def nothing(x: Any, ids: Any, weights: Any) -> tuple[Any, ...]:
    return ()


class Peer(NamedTuple):
    """call(x, ids, weights, *extras) -> out. parameters: leaves for the gradients of w13 and w2; standard: the former in our order."""

    call: Callable[..., Any]
    parameters: list[Any]
    prepare: Callable[..., tuple[Any, ...]] = nothing
    standard: Callable[[Any], Any] = lambda w13: w13
    note: str = ""


Maker = Callable[[Layer, Case], Peer]


# ---------------------------------------------------------------- ours
def program_of(case: Case) -> str:
    i = case.shape.inter
    return f"mm(1, silu(cols(mm(0, x), 0, {i}, 1)) * cols(mm(0, x), {i}, {2 * i}, 1))"


def problem_of(layer: Layer, case: Case) -> registry.Problem:
    shape = case.shape
    return registry.Problem(
        "experts", device=layer.device.type, dtype=layer.dtype, hidden=shape.hidden, intermediate=shape.inter, num_experts=shape.experts,
        top_k=shape.top_k, tokens=case.tokens, program=program_of(case), weight_layout=layer.layout, training=case.train,
        cuda_graphs=layer.device.type == "cuda" and not case.train, ids_valid=True,
    )  # fmt: skip


def stages(provider: str) -> Maker:
    """Our ops by stage: dispatch, then experts with combine, by one provider of the experts."""

    def make(layer: Layer, case: Case) -> Peer:
        why = registry.get("experts", provider).supports(problem_of(layer, case))
        if why is not None:
            raise Unsupported(why)
        ops, program, shape = torch.ops.moe_compile, program_of(case), case.shape
        params, layout = layer.params, layer.layout

        def call(x: Any, ids: Any, weights: Any) -> Any:
            _, _, order, offsets, _, _ = ops.quantize_dispatch.default(x, ids, shape.experts, "none", "local")
            return ops.permute_experts_combine.default(
                x, order, offsets, None, params, [], program, layout, "", shape.top_k, weights, x.dtype, provider
            )

        return Peer(call, params)

    return make


def in_one(layer: Layer, case: Case) -> Peer:
    """Our op for the whole layer, by the provider that estimates the least time."""
    if not hasattr(torch.ops.moe_compile, "local_experts"):
        raise Unsupported("there is no op local_experts")
    if case.train:
        raise Unsupported("local_experts is for inference")
    problem = problem_of(layer, case)
    found = [each for each in registry.providers("experts") if "local_experts" in each.kernels and each.supports(problem) is None]
    if not found:
        raise Unsupported(f"no provider has local_experts for this on {layer.device.type}")
    provider = min(found, key=lambda each: each.cost(problem)).name
    fixed = dict(
        num_experts=case.shape.experts, topk_weights_TK=None, weights=layer.params, biases=[], program=program_of(case),
        weight_layout=layer.layout, bias_layout="", out_dtype=layer.dtype, provider=provider,
    )  # fmt: skip

    def call(x: Any, ids: Any, weights: Any) -> Any:
        return torch.ops.moe_compile.local_experts.default(x_TH=x, ids_TK=ids, combine_weights_TK=weights, **fixed)

    return Peer(call, layer.params, note=provider)


# ---------------------------------------------------------------- torch
def by_hand(layer: Layer, case: Case) -> Peer:
    """What is written by hand today: sort, gather, grouped_mm twice, gather back, one weighted sum. Of quantised weights on a copy."""
    shape, (w13, w2) = case.shape, layer.dense()
    experts = torch.arange(shape.experts, device=layer.device)

    def call(x: Any, ids: Any, weights: Any) -> Any:
        by_expert, order = ids.flatten().sort()
        offsets = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
        y = grouped_experts(x[order // shape.top_k], w13, w2, offsets)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), y[back].view(-1, shape.top_k, shape.hidden)).squeeze(1)

    return Peer(call, [w13, w2])


def dense(layer: Layer, case: Case) -> Peer:
    """Every expert for every token, and weights of zero."""
    size = case.shape.experts * case.tokens * case.shape.inter
    if size > DENSE_ELEMENTS:
        raise Unsupported(f"E*M*I is {size}, measured up to {DENSE_ELEMENTS}")

    def call(x: Any, ids: Any, weights: Any) -> Any:
        all_TE = x.new_zeros((x.shape[0], case.shape.experts)).scatter(1, ids, weights.to(x.dtype))
        h = swiglu(torch.bmm(x.expand(case.shape.experts, *x.shape), layer.w13.transpose(1, 2)))
        return torch.bmm(h * all_TE.t().unsqueeze(-1), layer.w2.transpose(1, 2)).sum(0)

    return Peer(call, [layer.w13, layer.w2])


# ---------------------------------------------------------------- transformers
def transformers_experts(layer: Layer, implementation: str) -> Any:
    """MixtralExperts, whose function is this layer's, on these weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def make() -> Any:
        shape = layer.shape
        config = MixtralConfig(
            hidden_size=shape.hidden, intermediate_size=shape.inter, num_local_experts=shape.experts, num_experts_per_tok=shape.top_k
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w, requires_grad=layer.train) for w in (layer.w13, layer.w2))
        return experts

    return layer.once(f"transformers {implementation}", make)


def transformers(implementation: str, compiled: str = "") -> Maker:
    """Its experts, eager or compiled in a mode of torch.compile; weights come rounded, as its routers return them."""

    def make(layer: Layer, case: Case) -> Peer:
        copied = case.tokens * case.shape.top_k * 3 * case.shape.hidden * case.shape.inter * layer.dtype.itemsize
        if implementation == "batched_mm" and copied > BATCHED_BYTES:
            raise Unsupported(f"copies the weights for each slot, {copied >> 30} GiB, measured up to {BATCHED_BYTES >> 30} GiB")
        experts = transformers_experts(layer, implementation)
        run = torch.compile(experts, dynamic=False, mode=compiled) if compiled else experts
        return Peer(lambda x, ids, weights: run(x, ids, weights.to(x.dtype)), [experts.gate_up_proj, experts.down_proj])

    return make


# ---------------------------------------------------------------- libraries
def vllm(layer: Layer, case: Case) -> Peer:
    """fused_experts: vLLM's Triton kernel with the configurations that it ships for this device."""
    cuda_forward("vLLM's fused_experts", layer, case, train=False)
    from vllm.model_executor.layers.fused_moe import fused_moe  # type: ignore[import-not-found]

    tuned = fused_moe.get_moe_configs(case.shape.experts, case.shape.inter, None) is not None
    note = "tuned" if tuned else "no tuned configuration for this shape: its default"
    return Peer(lambda x, ids, weights: fused_moe.fused_experts(x, layer.w13, layer.w2, weights, ids), [layer.w13, layer.w2], note=note)


def matrices(layer: Layer) -> list[tuple[Any, Any]]:
    """w13 and w2 as triton_kernels takes them, [E, in, out], and what it wants to know of their precision."""
    return [(layer.interleaved().transpose(1, 2), None), (layer.w2.transpose(1, 2), None)]


def triton_kernels(packed_before: bool, matrices: Callable[[Layer], list[tuple[Any, Any]]] = matrices) -> Maker:
    """OpenAI's matmul_ogs twice. It takes routing as a bit matrix, which its own top-k kernel makes; packed_before: not timed."""

    def make(layer: Layer, case: Case) -> Peer:
        cuda_forward("triton_kernels", layer, case, train=False)
        from layer_triton import plain_swiglu
        from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs  # type: ignore[import-not-found]

        gate = FusedActivation(FnSpecs("plain_swiglu", plain_swiglu, ()), (), 2)
        (w13, precision13), (w2, precision2) = matrices(layer)

        def call(x: Any, ids: Any, weights: Any, *packed: Any) -> Any:
            routing, gather, scatter = route(packed or bit_matrix(ids, case), weights, case)
            h = matmul_ogs(x, w13, None, routing, gather_indx=gather, precision_config=precision13, fused_activation=gate)
            return matmul_ogs(h, w2, None, routing, scatter_indx=scatter, precision_config=precision2, gammas=routing.gate_scal)

        def before(x: Any, ids: Any, weights: Any) -> tuple[Any, ...]:
            return bit_matrix(ids, case)

        return Peer(call, [], before if packed_before else nothing)

    return make


def bit_matrix(ids: Any, case: Case) -> tuple[Any, ...]:
    """What triton_kernels' top-k kernel returns beside the values: ids, their bits, and cleared sums."""
    from layer_triton import pack

    tokens, words = case.tokens, -(-case.shape.experts // 32)
    bits = torch.empty((words, -(-tokens // 32) * 32), dtype=torch.uint32, device=ids.device)
    small = torch.empty_like(ids, dtype=torch.int16)
    pack(ids, bits, small)
    return small, bits, torch.zeros(-(-words * 32 // 512) * 512, dtype=torch.int32, device=ids.device)


def route(packed: tuple[Any, ...], weights: Any, case: Case) -> Any:
    """triton_kernels' routing data, gather and scatter indices."""
    from triton_kernels.routing import routing_from_bitmatrix  # type: ignore[import-not-found]
    from triton_kernels.tensor import Bitmatrix  # type: ignore[import-not-found]

    tokens, experts = case.tokens, case.shape.experts
    small, bits, sums = packed
    matrix = Bitmatrix(bits.t()[:tokens], shape=[tokens, bits.shape[0] * 32], shape_max=[tokens, None], scratchpad=sums)
    return routing_from_bitmatrix(matrix, weights, small, experts, case.shape.top_k)


def scattermoe(layer: Layer, case: Case) -> Peer:
    """ParallelLinear twice; in a forward its sort is replaced by one that a CUDA graph can hold (its bincount reads back to the host)."""
    cuda_forward("ScatterMoE", layer, case, train=True)
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear  # type: ignore[import-not-found]

    shape = case.shape

    def call(x: Any, ids: Any, weights: Any) -> Any:
        sort = flatten_sort_count(ids, num_experts=shape.experts) if case.train else (*ids.flatten().sort(), None)
        h = parallel_linear(x, layer.w13.transpose(1, 2), shape.top_k, *sort, grouped_out=True)
        return parallel_linear(swiglu(h), layer.w2.transpose(1, 2), 1, *sort, grouped_in=True, gates=weights.to(x.dtype))

    return Peer(call, [layer.w13, layer.w2])


def sonicmoe(layer: Layer, case: Case) -> Peer:
    """Its layer behind the router: the metadata of its own top-k path, up projection with SwiGLU, down projection with the sum.

    Its counting kernel runs on the default stream, which no CUDA graph can hold: in a forward, torch counts.
    """
    cuda_forward("SonicMoE", layer, case, train=True)
    from sonicmoe import functional  # type: ignore[import-not-found]
    from sonicmoe.count_cumsum import count_cumsum  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    shape, w13, w2 = case.shape, layer.interleaved(), layer.w2
    ones = torch.ones(case.tokens * shape.top_k, dtype=torch.int32, device=layer.device)

    def ends(ids: Any) -> Any:
        if case.train:
            return count_cumsum(ids, shape.experts, do_cumsum=True)[1]
        return ones.new_zeros(shape.experts).scatter_add_(0, ids, ones).cumsum(0, dtype=torch.int32)

    def call(x: Any, ids: Any, weights: Any) -> Any:
        (tokens, top_k), stream, gate = ids.shape, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU
        with torch.no_grad():
            offsets, *where = functional.TC_topk_router_metadata(ids.int(), ends(ids.flatten()), top_k)
        up = (x, w13.permute(1, 2, 0), None, offsets, tokens * top_k, top_k, stream, *where, False, gate, not case.train)
        y1, z = functional._UpProjection.apply(*up)
        down = (y1, z, w2.permute(1, 2, 0), None, weights, offsets, tokens, top_k, stream, *where, False, gate)
        return functional._DownProjection.apply(*down)

    return Peer(call, [w13, w2], standard=uninterleave)


def cuda_forward(name: str, layer: Layer, case: Case, train: bool) -> None:
    """Raises Unsupported where a library needs a GPU, or has no backward."""
    if layer.device.type != "cuda":
        raise Unsupported(f"{name} runs on cuda, device is {layer.device.type}")
    if case.train and not train:
        raise Unsupported(f"{name} has no backward")


# ---------------------------------------------------------------- all of them
def makers(quant: str = "") -> dict[str, Maker]:
    """By name, in the order of tables. Ours are those whose name begins so."""
    found: dict[str, Maker] = {OURS: in_one}
    found |= {f"{OURS} {provider.name}": stages(provider.name) for provider in registry.providers("experts")}
    if quant:
        import layer_quantized

        return found | layer_quantized.MAKERS
    return found | {
        "vLLM": vllm,
        "triton_kernels": triton_kernels(packed_before=False),
        "triton_kernels, ids packed before": triton_kernels(packed_before=True),
        "SonicMoE": sonicmoe,
        "ScatterMoE": scattermoe,
        "transformers grouped_mm": transformers("grouped_mm"),
        "transformers grouped_mm compiled": transformers("grouped_mm", "default"),
        "transformers grouped_mm max-autotune": transformers("grouped_mm", "max-autotune-no-cudagraphs"),
        "transformers batched_mm": transformers("batched_mm"),
        "hand grouped_mm": by_hand,
        "dense bmm": dense,
    }


NOT_BY_DEFAULT = ("transformers grouped_mm max-autotune",)  # 30 to 50 s of compilation for each shape and number of tokens


def is_ours(name: str) -> bool:
    return name.split()[0] == OURS


def versions() -> str:
    """Of the libraries that are there."""
    found = []
    for package, module in LIBRARIES.items():
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found += [f"{package} {version}"] if (version := _unpackaged(module)) else []
    return ", ".join(found)


def _unpackaged(module: str) -> str:
    """What a module that was not installed as a package says of itself."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return ""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))
    except Exception:  # noqa: BLE001  a library may fail with anything where its needs are missing
        return ""
