"""GPU memory of this process."""

import gc

import torch

_CONTEXT = 600_000_000
"""Bytes of the CUDA context of a process, which torch does not count."""


PEAK = "gpu_bytes"
"""The metric of a training that says how much memory of a GPU it has reserved."""


def begin_peak() -> None:
    """From now on count the peak of `gpu_share` and `gpu_peak` anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> dict[str, float]:
    """Peak of the bytes that this process has reserved, as a metric; none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {PEAK: float(torch.cuda.max_memory_reserved() + _CONTEXT)}


def gpu_share() -> float | None:
    """Peak share of its GPU's memory that this process has reserved; None without a GPU."""
    if not (peak := gpu_peak()):
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return peak[PEAK] / device.total_memory


def free_gpu_memory() -> None:
    """Release unreferenced memory to other processes."""
    gc.collect()  # cycles hold tensors, too
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
