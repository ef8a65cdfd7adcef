"""Data-parallel training: one process, or those of an initialised `torch.distributed`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Answer = TypeVar("Answer")


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_0(ask: Callable[[], Answer]) -> Answer:
    """Call `ask` on rank 0 and broadcast its result or exception; all processes must call this.

    File systems may show a new file to other machines a minute later, so only rank 0 reads shared
    state. Tensors should be on the CPU.
    """
    if num_processes() == 1:
        return ask()
    sent: list[Any] = [None, None]
    if process_rank() == 0:
        try:
            sent[0] = ask()
        except Exception as error:
            sent[1] = error
    dist.broadcast_object_list(sent)
    answer, error = sent
    if error is not None:
        raise error
    return answer


def any_process(answer: bool, device: torch.device) -> bool:
    """Whether any process answers with yes; all processes must call this."""
    votes = torch.tensor(int(answer), device=device)
    dist.all_reduce(votes)
    return bool(votes)


def choose_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def is_launched() -> bool:
    """Whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Join the process group of `torchrun`, if there is one; yields this process's device."""
    device = choose_device()
    if is_launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if is_launched():
            dist.destroy_process_group()
