"""A clock for benchmarks on busy machines."""

import time

import torch


class TimeIsUp(Exception):
    """A training has used its budget."""


def clock(device: torch.device) -> float:
    """Seconds; of the process's CPU time on a CPU with one thread, where other load would count."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
