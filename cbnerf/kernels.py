"""Kernels for CPUs, compiled by numba where it is installed.

Modules named `*_kernels` import numba and are imported inside functions, once `has_kernels` says
that there is one. Without numba, CPUs run the same operations of torch as GPUs, more slowly.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")

HAS_NUMBA = find_spec("numba") is not None


def has_kernels(tensor: Tensor) -> bool:
    """Whether there are kernels for the device of a tensor."""
    return HAS_NUMBA and tensor.device.type == "cpu"


def compiled(*fastmath: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function at its first call, with some of LLVM's flags for floating-point numbers,
    and keep the result on disk where a folder for it can be written."""
    from numba import njit

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, nogil=True, fastmath=set(fastmath))(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            return njit(nogil=True, fastmath=set(fastmath))(function)

    return decorate


def run_all(task: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Run a task, which must release Python's lock, on all items with as many threads as torch."""
    if torch.get_num_threads() == 1:
        for item in items:
            task(item)
    else:
        list(_threads(torch.get_num_threads()).map(task, items))


def split_for_threads(count: int) -> list[slice]:
    """Even parts of `count` items, one for each thread."""
    edges = np.linspace(0, count, torch.get_num_threads() + 1).astype(int).tolist()
    return [slice(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)
