"""Training with experts spread over ranks and data over all of them, a checkpoint, and going on with the experts spread otherwise.

    python -m torch.distributed.run --standalone --nproc-per-node 4 examples/train_expert_parallel.py
    python -m torch.distributed.run --standalone --nproc-per-node 4 examples/train_expert_parallel.py --ep 4 --then-ep 1

A tiny Qwen3-MoE model of transformers with random weights. First ep ranks share the experts, and world / ep groups of them hold all
(EP x DP); then save_sharded, a new model, load_sharded over then_ep ranks, and more steps. The router, attention and embeddings are on
every rank, averaged by DDP. Each step is compared with that of one process that has all ranks' batches. Exits with 1 if they differ.
(The optimizer starts anew after the checkpoint, here and there: save_sharded writes parameters and buffers.)
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import transformers

import moe_compile

VOCABULARY, LINES, LENGTH = 64, 4, 16
MAX_NORM, LIMIT = 1.0, 1e-4
Step = Callable[[int], tuple[float, float]]  # number of the step -> loss, norm of the gradients


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ep", type=int, default=2, help="ranks that share the experts at first")
    parser.add_argument("--then-ep", type=int, help="and after the checkpoint (default: all ranks, or 1 where they were all)")
    parser.add_argument("--steps", type=int, default=5, help="before the checkpoint, and after it")
    parser.add_argument("--comm", default="auto", help="the provider of the exchange")
    parser.add_argument("--inner", default="inductor", help="the compiler behind moe_compile, for example eager")
    parser.add_argument("--checkpoint", help="a folder that all ranks see (default: a temporary one of this host)")
    return parser.parse_args()


def build(device: Any) -> Any:
    """The whole model, the same on every rank."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2, num_experts=8,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, norm_topk_prob=True, use_cache=False,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).to(device).train()


def batch_of(who: int, step: int, device: Any) -> torch.Tensor:
    """Lines that count upwards from random numbers: the task is to go on counting."""
    first = torch.randint(VOCABULARY, (LINES, 1), generator=torch.Generator().manual_seed(1000 * step + who))
    return ((first + torch.arange(LENGTH)) % VOCABULARY).to(device)


def config(ep: int, args: argparse.Namespace) -> moe_compile.ParallelConfig:
    """All ranks of torchrun: groups of ep that share the experts, as many as there are."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return moe_compile.ParallelConfig.from_torchrun(ep=ep, dp=world // ep, comm=args.comm, max_tokens_per_rank=LINES * LENGTH)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """No Adam: its first steps are the signs of the gradients, so that rounding alone makes two runs differ."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step_over_ranks(model: Any, parallel: moe_compile.ParallelConfig, args: argparse.Namespace, device: Any) -> Step:
    """A training step of this rank; `model` is sharded already."""
    compiled = moe_compile.compile(model, parallel=parallel, inner=args.inner)
    wrapped = moe_compile.ddp(compiled, parallel)  # averages all but the sharded experts, whose own hooks do it
    optimizer = optimizer_of(model)

    def step(number: int) -> tuple[float, float]:
        ids = batch_of(dist.get_rank(), number, device)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = moe_compile.clip_grad_norm_(model, MAX_NORM, parallel)  # each expert counts once, wherever it is
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size(), norm.item()

    return step


def step_of_one_process(model: Any, ranks: int, device: Any) -> Step:
    """What it must be equal to: the mean loss of all ranks' batches, eagerly."""
    optimizer = optimizer_of(model)

    def step(number: int) -> tuple[float, float]:
        batches = [batch_of(who, number, device) for who in range(ranks)]
        loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def train(model: Any, whole: Any, parallel: moe_compile.ParallelConfig, numbers: range, args: argparse.Namespace) -> float:
    """Steps of the sharded model beside those of the whole one; returns the largest difference of loss or norm."""
    device = next(whole.parameters()).device
    held = sum(p.numel() for p in model.parameters())
    say(f"ep {parallel.ep} x dp {parallel.dp}: {held} parameters on rank 0, experts on {parallel.replicas} ranks each")
    step, reference = step_over_ranks(model, parallel, args, device), step_of_one_process(whole, dist.get_world_size(), device)
    worst = 0.0
    for number in numbers:
        (loss, norm), (wanted, wanted_norm) = step(number), reference(number)
        worst = max(worst, abs(loss - wanted), abs(norm - wanted_norm))
        say(f"  step {number}: loss {loss:.4f} ({wanted:.4f} in one process), gradient norm {norm:.4f} ({wanted_norm:.4f})")
    return worst


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def shared_folder() -> str:
    """A new folder, the same on every rank of the host."""
    name = [tempfile.mkdtemp(prefix="moe_compile_") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name, src=0)
    return name[0]


def same_weights(model: Any, whole: Any, parallel: moe_compile.ParallelConfig) -> float:
    """The largest difference of a weight, on rank 0."""
    state = moe_compile.gather_state_dict(model, parallel)
    if state is None:
        return 0.0
    return max(float((state[name] - value.cpu()).abs().max()) for name, value in whole.state_dict().items())


def saved_and_loaded(model: Any, parallel: moe_compile.ParallelConfig, args: argparse.Namespace) -> tuple[Any, Any]:
    """A new model with its experts over another number of ranks, and that configuration."""
    folder, device, world = args.checkpoint or shared_folder(), next(model.parameters()).device, dist.get_world_size()
    moe_compile.save_sharded(model, folder, parallel)
    say("saved: " + ", ".join(sorted(os.listdir(folder))))
    then = config(args.then_ep or (1 if args.ep == world else world), args)
    fresh = moe_compile.shard_experts(build(device), then)
    loaded = moe_compile.load_sharded(fresh, folder, then)
    say(f"loaded: {loaded.bytes_read} bytes on rank 0")
    dist.barrier()
    if args.checkpoint is None and dist.get_rank() == 0:
        shutil.rmtree(folder)
    return fresh, then


def main() -> int:
    args = arguments()
    parallel = config(args.ep, args)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    whole, model = build(device), moe_compile.shard_experts(build(device), parallel)
    off = train(model, whole, parallel, range(args.steps), args)
    model, parallel = saved_and_loaded(model, parallel, args)
    off = max(off, train(model, whole, parallel, range(args.steps, 2 * args.steps), args))
    weights = same_weights(model, whole, parallel)
    say(f"largest difference from one process: loss and gradient norm {off:.1e}, weights {weights:.1e} (limit {LIMIT:.0e})")
    moe_compile.destroy_exchanges()
    dist.destroy_process_group()
    return 0 if max(off, weights) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
