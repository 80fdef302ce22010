"""Exchanges by kernels that write into the memory of other GPUs of the host: the engine of the providers nvlink and nvlink_batched."""
