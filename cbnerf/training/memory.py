"""GPU memory of this process."""

import gc

import torch

_CONTEXT = 600_000_000
"""Bytes of the CUDA context of a process, which torch does not count."""


def gpu_share() -> float | None:
    """Peak share of its GPU's memory that this process has reserved; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    held = torch.cuda.max_memory_reserved() + _CONTEXT
    return held / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def free_gpu_memory() -> None:
    """Release unreferenced memory to other processes."""
    gc.collect()  # cycles hold tensors, too
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
