"""Triton kernels of one GPU."""
