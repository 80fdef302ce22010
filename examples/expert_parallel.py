"""Inference with a model's experts spread over the processes of one host, checked against the whole model in one process.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/expert_parallel.py
    python -m torch.distributed.run --standalone --nproc-per-node 4 examples/expert_parallel.py --ep 2 --tp 2
    python -m torch.distributed.run --standalone --nproc-per-node 8 examples/expert_parallel.py --model 30b --batch 8 --sequence 512

A Qwen3-MoE model of transformers with random weights: tiny on CPUs (gloo), or with --model the layers of a real one on GPUs. Each rank
has prompts of its own, of another number than its neighbours. Shows where the experts are, which provider moves the rows, and why the
others do not. Exits with 1 if an MoE block was not rewritten or the logits differ from the whole model's.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import transformers

import moe_compile

Prompts = list[torch.Tensor]
TINY: dict[str, Any] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # with the sizes of Qwen3-30B-A3B's and Qwen3-235B-A22B's layers
    "tiny": TINY,
    "30b": dict(TINY, vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
                num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128),
    "235b": dict(TINY, vocab_size=151936, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_experts=128,
                 num_experts_per_tok=8, num_attention_heads=64, num_key_value_heads=4, head_dim=128),
}  # fmt: skip
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the relative error; in bfloat16 a near tie may choose another expert


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (each rank first holds all experts of all layers)")
    parser.add_argument("--batch", type=int, default=2, help="the most prompts of a rank")
    parser.add_argument("--sequence", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--ep", type=int, help="ranks that share the experts (default: all, over tp and dp)")
    parser.add_argument("--tp", type=int, default=1, help="ranks that hold the same tokens")
    parser.add_argument("--dp", type=int, default=1, help="groups of ranks that hold all experts each")
    parser.add_argument("--comm", default="auto", help="the provider of the exchange")
    parser.add_argument("--quant", choices=("none", "fp8"), default="none", help="of the rows that travel")
    parser.add_argument("--inner", default="inductor", help="the compiler behind moe_compile, for example eager")
    return parser.parse_args()


def build(args: argparse.Namespace, device: torch.device) -> Any:
    """The whole model, the same on every rank."""
    config = transformers.Qwen3MoeConfig(**MODELS[args.model], num_hidden_layers=args.layers, norm_topk_prob=True, use_cache=False)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.eval().requires_grad_(False)


def prompts_of(who: int, args: argparse.Namespace, device: torch.device) -> Prompts:
    """Two calls' prompts of one holder of data: other tokens and other numbers of them than the others have."""
    random = torch.Generator().manual_seed(who)
    counts = [1 + (who + call) % args.batch for call in range(2)]
    return [torch.randint(MODELS[args.model]["vocab_size"], (count, args.sequence), generator=random).to(device) for count in counts]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def spread_and_run(model: Any, prompts: Prompts, parallel: moe_compile.ParallelConfig, inner: str) -> tuple[Prompts, Any]:
    """The logits of each call, and the report of what was compiled."""
    moe_compile.shard_experts(model, parallel)
    report = moe_compile.RewriteReport()
    compiled = moe_compile.compile(model, parallel=parallel, inner=inner, report=report)
    return [compiled(ids).logits for ids in prompts], report


def worst_of_all(value: float, device: torch.device) -> float:
    found = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def show(parallel: moe_compile.ParallelConfig, report: moe_compile.RewriteReport, before: int, after: int) -> None:
    ranks = dist.get_world_size()
    print(f"ep {parallel.ep}, tp {parallel.tp}, dp {parallel.dp} on {ranks} ranks; {parallel.replicas} of them have each expert")
    print(f"MoE blocks in {len(report.graphs)} graphs: {len(report.rewritten)} rewritten, {len(report.refused)} left as they were")
    print(f"parameters of rank 0: {before / 1e6:.2f} MB before shard_experts, {after / 1e6:.2f} MB after")
    for region in report.regions[:1]:
        print(region.ranks or region.reason)
        for stage, provider in region.providers.items():
            print(f"  {stage:8s} {provider}")
            for name, why in region.losers.get(stage, {}).items():
                print(f"           not {name}: {why}")
        print(f"validation {region.validation}")


def bytes_of(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> int:
    args = arguments()
    ep = args.ep or int(os.environ.get("WORLD_SIZE", "1")) // (args.tp * args.dp)
    parallel = moe_compile.ParallelConfig.from_torchrun(
        ep, args.tp, args.dp, comm=args.comm, quant=args.quant, max_tokens_per_rank=args.batch * args.sequence
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = build(args, device)
    prompts = prompts_of(dist.get_rank() // args.tp, args, device)  # tensor-parallel ranks, which are neighbours, have the same
    with torch.no_grad():
        wanted, before = [model(ids).logits for ids in prompts], bytes_of(model)
        logits, report = spread_and_run(model, prompts, parallel, args.inner)
    limit = 0.1 if args.quant == "fp8" else LIMIT[logits[0].dtype]
    error = worst_of_all(max(map(relative_error, logits, wanted)), device)
    if dist.get_rank() == 0:
        show(parallel, report, before, bytes_of(model))
        print(f"relative error against the whole model in one process, of the worst rank: {error:.1e} (limit {limit:.0e})")
    moe_compile.destroy_exchanges()
    dist.destroy_process_group()
    return 0 if error <= limit and not report.refused and len(report.rewritten) >= args.layers else 1


if __name__ == "__main__":
    sys.exit(main())
