"""Naive MoE code to compile: `styles`, `hf_zoo`, `variants` (by family), and `traps` and `hazards` that must not."""
