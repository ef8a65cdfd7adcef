"""Machines of the cluster: how many training runs they hold, and where the workers of one run.

A training run is one process or, with `resources.workers` of at least 2, a group of processes that
train together through Ray Train.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.train import ScalingConfig, get_preemption_info
from ray.train.torch import TorchConfig, get_device

from cbnerf.search.plan import Plan
from cbnerf.training.preemption import leave, note_sigterm

SECONDS_BETWEEN_RESIZES = 60
"""An elastic group trains for so long, at least, before it takes in machines that have joined."""
_SECONDS_TO_LEAVE = 10
"""It has so long to write a checkpoint before."""


def num_slots(plan: Plan) -> int:
    """Number of training runs that the present machines of the cluster hold at the same time."""
    resources, room = plan.spec.resources, _room(plan)
    if resources.is_elastic:
        whole, rest = divmod(sum(room), resources.max_workers)
        return whole + (rest >= resources.min_workers)
    if on_one_machine(plan):
        return sum(count // resources.max_workers for count in room)
    return sum(room) // resources.max_workers


def on_one_machine(plan: Plan) -> bool:
    """Whether one machine can hold all workers of a training run. If so, they wait until one is
    free; otherwise, and if their number may change, they are spread over as few machines as
    possible."""
    resources = plan.spec.resources
    return not resources.is_elastic and max(_room(plan), default=0) >= resources.max_workers


def worker_resources(plan: Plan) -> dict[str, int | float]:
    """Resources that Ray reserves for each training process."""
    resources = {"CPU": plan.spec.resources.cpus_per_worker, "GPU": plan.gpus_per_worker}
    return {name: amount for name, amount in resources.items() if amount}


def worker_group(plan: Plan) -> ScalingConfig:
    """Ray Train's description of the workers of a training run."""
    return ScalingConfig(
        num_workers=plan.spec.resources.workers,
        use_gpu=plan.gpus_per_worker > 0,
        resources_per_worker=worker_resources(plan),
        placement_strategy="STRICT_PACK" if on_one_machine(plan) else "PACK",
        elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
    )


def _room(plan: Plan) -> list[int]:
    """Number of processes that each present machine holds when idle."""
    needed = worker_resources(plan)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [processes_on(machine, needed) for machine in machines]


def processes_on(machine: Mapping[str, int | float], needed: Mapping[str, int | float]) -> int:
    """Number of processes that fit on a machine with these resources."""
    return min(int(machine.get(name, 0) / amount + 1e-6) for name, amount in needed.items())


def device_of_worker() -> torch.device:
    """The device of this process of a worker group."""
    # Ray Train returns a GPU if Ray has one as a resource, even if torch sees none.
    return get_device() if torch.cuda.is_available() else torch.device("cpu")


def _is_announced() -> bool:
    """Whether Ray has been told that a machine of this group goes (alpha in Ray 2.60)."""
    return get_preemption_info() is not None


@dataclass
class TorchGroup(TorchConfig):
    """Workers that see one GPU each, use NCCL if all of them have one, else gloo, and write a
    checkpoint before one of their machines goes."""

    is_elastic: bool = False

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(TorchConfig().backend_cls):
    share_cuda_visible_devices = False
    """If true, `cuda` could be the GPU of another worker of the same machine."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        have_gpus = worker_group.execute(torch.cuda.is_available)
        backend = "nccl" if all(have_gpus) else "gloo"
        # They train in a thread of their own, where no signals arrive.
        worker_group.execute(note_sigterm, _is_announced)
        super().on_start(worker_group, replace(backend_config, backend=backend))

    def on_shutdown(self, worker_group: Any, backend_config: TorchGroup) -> None:
        try:
            if backend_config.is_elastic:  # It may be in the middle of a training.
                worker_group.execute(leave, _SECONDS_TO_LEAVE)
        finally:
            super().on_shutdown(worker_group, backend_config)
