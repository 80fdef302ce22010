"""Gradients of sharded experts, and who else must leave them alone: DDP, FSDP2, gradient clipping.

The backward of an exchange leaves on each rank the gradient of its experts summed over the tokens of all ranks of the ep
group. What is missing is the sum over the ranks that hold the same experts, and the factor with which DDP and FSDP2 turn
the sum over ranks into a mean: hooks on the parameters do both to each new gradient, before it is accumulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def data_ranks(parallel: Any) -> int:
    """How many ranks have different tokens."""
    return int(getattr(parallel, "data_ranks", parallel.ep * parallel.dp))


def with_replicas(parallel: Any) -> Any:
    """The configuration with its replica_group, which one of explicit groups may lack; a collective call where it does."""
    if getattr(parallel, "replica_group", None) is not None or parallel.tp == parallel.dp == 1:
        return parallel
    from moe_compile.groups import validate

    return validate(parallel)


def gradient_of(parallel: Any, gradients: str) -> tuple[float, str]:
    """(factor, name of the process group to sum over, "" for none) of the experts' gradients; gradients: "mean" or "sum"."""
    group = getattr(parallel, "replica_group", None)
    scale = 1.0 / data_ranks(parallel) if gradients == "mean" else 1.0
    return scale, "" if group is None else str(group.group_name)


class ExpertGradient:
    """The hook on one parameter. Replicas must run the same backward: each waits for the others, parameter by parameter."""

    def __init__(self, scale: float, replicas: str) -> None:
        self.scale, self.replicas = scale, replicas

    def __call__(self, grad: Any) -> Any:
        """The new gradient, scaled and summed over the replicas; `grad` itself is left alone."""
        grad = grad * self.scale
        if self.replicas:
            part = grad.to_local() if hasattr(grad, "to_local") else grad
            dist.all_reduce(part, group=dist.distributed_c10d._resolve_process_group(self.replicas))
        return grad


def attach(module: Any, shards: Mapping[str, Any]) -> None:
    """Puts the hook on each of the module's sharded parameters that wants a gradient and has none yet.

    Done by shard_experts, and where a model is moved, copied, unpickled or loaded with assign=True; call it through
    `attach_hooks` after unfreezing experts that were frozen when the model was sharded.
    """
    for name, shard in shards.items():
        p = module._parameters.get(name)
        if shard.scale == 1 and not shard.replicas:
            continue
        if p is not None and p.requires_grad and not any(isinstance(h, ExpertGradient) for h in (p._backward_hooks or {}).values()):
            p.register_hook(ExpertGradient(shard.scale, shard.replicas))


def attach_hooks(model: nn.Module) -> None:
    """`attach` for all modules of a sharded model."""
    for module in model.modules():
        attach(module, vars(module).get("_moe_compile_shards", {}))


def ignored_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The sharded parameters, for FSDP2:  fully_shard(module, mesh=..., ignored_params=ignored_parameters(model))."""
    from moe_compile.sharding import expert_parameters

    return set(expert_parameters(model).values())


def ddp(model: nn.Module, parallel: Any, **kwargs: Any) -> nn.parallel.DistributedDataParallel:
    """DistributedDataParallel over all ranks that averages everything but the sharded experts.

    Raises RuntimeError if parallel.ep > 1 and the model is not sharded: DDP would average what differs.
    """
    from moe_compile.ops.expert_shard import ANCHOR
    from moe_compile.sharding import is_sharded, shards

    if parallel.ep > 1 and not is_sharded(model):
        raise RuntimeError(
            f"ep is {parallel.ep} but this {type(model).__name__} is not sharded; call shard_experts(model, parallel) before ddp"
        )
    own = {f"{path}.{name}" for path, _, shard_name, _ in shards(model) for name in (shard_name, ANCHOR + shard_name)}
    # DDP writes parameters of the outermost module as ".name" in one place and as "name" in another.
    own |= {name.removeprefix(".") for name in own}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(own))
    return nn.parallel.DistributedDataParallel(model, **kwargs)


def clip_grad_norm_(model: nn.Module, max_norm: float, parallel: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Any:
    """torch.nn.utils.clip_grad_norm_ over the whole model: each expert counts once, wherever it is.

    Call it on every rank; gradients of the other parameters must be equal on all ranks, or DTensors (FSDP2). Returns the
    norm before clipping, a tensor of no dimensions, the same on all ranks. Raises RuntimeError for a norm that is not finite
    where error_if_nonfinite says so.
    """
    experts = ignored_parameters(model)
    grads: dict[bool, list[Any]] = {True: [], False: []}
    for p in model.parameters():
        if p.grad is not None:
            grads[p in experts].append(p.grad)
    device = next((g.device for g in (*grads[True], *grads[False])), torch.device("cpu"))
    held = _norm([g.to_local() if hasattr(g, "to_local") else g for g in grads[True]], norm_type, device)
    if parallel.ep > 1:
        held = _over_ranks(held, norm_type, parallel.ep_group)
    total = torch.linalg.vector_norm(torch.stack([held, _norm(grads[False], norm_type, device)]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the norm of the gradients is {total.item()}, not finite, so they cannot be clipped to {max_norm}")
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grad in (*grads[True], *grads[False]):
        (grad.to_local() if hasattr(grad, "to_local") else grad).mul_(factor.to(grad.device, grad.dtype))
    return total


def _norm(grads: list[Any], norm_type: float, device: Any) -> Any:
    """The norm of all, in float32 or wider."""
    norms = [torch.linalg.vector_norm(grad, norm_type, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if not whole:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack([norm.to(device, torch.float32) for norm in whole]), norm_type)


def _over_ranks(norm: Any, norm_type: float, group: Any) -> Any:
    if norm_type == float("inf"):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    powers = norm**norm_type
    dist.all_reduce(powers, group=group)
    return powers ** (1.0 / norm_type)
