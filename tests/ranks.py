"""Functions that other processes run, alone or together."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from torch.multiprocessing.spawn import start_processes

# A new process imports these for seconds; a fork of one that has done so starts at once.
multiprocessing.set_forkserver_preload(["pytest", "cbnerf.training.stages", "cbnerf.search.worker"])


def on_two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in two processes, and raise what one of them raises."""
    start_processes(function, arguments, nprocs=2, start_method="forkserver")


def start_ranks(count: int, function: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """Processes that have begun with `function(rank, *arguments)`."""
    context = start_processes(
        function, arguments, nprocs=count, join=False, start_method="forkserver"
    )
    assert context is not None
    return context.processes
