"""Worker groups on real Ray: two machines that say they have two GPUs each. No card is needed: Ray
hands out numbers, torch finds nothing behind them and trains on the CPU."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.cluster_utils import Cluster

from cbnerf.search.driver import _sharing_gpus
from cbnerf.search.machines import (
    device_of_worker,
    num_slots,
    on_one_machine,
    processes_on,
    worker_group,
)
from cbnerf.search.plan import Plan
from cbnerf.search.tasks import _remote
from cbnerf.search.worker import _train_together

pytestmark = pytest.mark.search
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
CARDS = 4
PATIENCE = 300
"""Seconds to wait for another group."""


@pytest.fixture(scope="module")
def two_machines() -> Iterator[None]:
    head = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=4, num_gpus=2)
        cluster.wait_for_nodes()
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def where_am_i() -> dict[str, Any]:
    """What a process has been given."""
    context = ray.get_runtime_context()
    return {
        "node": context.get_node_id(),
        "cards": os.environ["CUDA_VISIBLE_DEVICES"],
        "given": context.get_accelerator_ids()["GPU"],
    }


def look_around(about: dict[str, Any]) -> None:
    """In each worker: write down what it has, wait until all groups are at it, talk to the rest."""
    folder, rank = Path(about["folder"]), dist.get_rank()
    ranks = torch.tensor([rank])
    dist.all_reduce(ranks)
    found = where_am_i() | {
        "group": about["group"], "sum": int(ranks), "backend": dist.get_backend(),
        "device": str(device_of_worker()),
    }  # fmt: skip
    (folder / f"{about['group']}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    deadline = time.monotonic() + PATIENCE
    while len(list(folder.glob("*.json"))) < about["processes"]:
        assert time.monotonic() < deadline, "the other groups never came"
        time.sleep(0.1)


def train_groups(plan: Plan, folder: Path, groups: int) -> list[dict[str, Any]]:
    """What each process of groups that train at the same time has found."""
    folder.mkdir()
    processes = groups * plan.spec.resources.max_workers

    def train(group: int) -> None:
        about = {"folder": str(folder), "group": group, "processes": processes}
        _train_together(plan, "look", look_around, about, [])

    with ThreadPoolExecutor(groups) as pool:
        list(pool.map(train, range(groups)))
    return [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]


def places(found: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Cards of the processes; each has one, and sees no other."""
    assert all([one["cards"]] == one["given"] for one in found)
    return {(one["node"], one["cards"]) for one in found}


@pytest.fixture
def gpu_plan(tiny_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    def make(workers: int | list[int], **resources: Any) -> Plan:
        about = {"workers": workers, "cpus_per_worker": 1, **resources}
        return tiny_plan(has_gpu=True, resources=about, fixed={"refiner.optim.batch_size": 8})

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("two_machines")
def test_groups_at_a_time_have_a_card_for_each_process_and_a_machine_for_each_group(
    gpu_plan: Callable[..., Plan], tmp_path: Path
):
    plan = gpu_plan(2)
    assert num_slots(plan) == 2 and on_one_machine(plan)
    assert worker_group(plan).placement_strategy == "STRICT_PACK"
    found = train_groups(plan, tmp_path / "found", groups=2)
    assert len(places(found)) == len(found) == CARDS
    for group in range(2):
        assert len({one["node"] for one in found if one["group"] == group}) == 1
    assert {(one["backend"], one["device"], one["sum"]) for one in found} == {("gloo", "cpu", 1)}


@pytest.mark.slow
@pytest.mark.usefixtures("two_machines")
def test_a_group_that_no_machine_holds_lies_on_several(
    gpu_plan: Callable[..., Plan], tmp_path: Path
):
    plan = gpu_plan(CARDS)
    assert num_slots(plan) == 1 and not on_one_machine(plan)
    found = train_groups(plan, tmp_path / "found", groups=1)
    assert len(places(found)) == len(found) == CARDS
    assert {one["sum"] for one in found} == {0 + 1 + 2 + 3}


@pytest.mark.usefixtures("two_machines")
def test_an_elastic_group_takes_what_there_is_on_any_machines(gpu_plan: Callable[..., Plan]):
    plan = gpu_plan([1, 2])
    assert num_slots(plan) == 2 and not on_one_machine(plan)
    group = worker_group(plan)
    assert (group.num_workers, group.placement_strategy) == ((1, 2), "PACK")
    assert num_slots(gpu_plan([1, 2], cpus_per_worker=3)) == 1


@pytest.mark.usefixtures("two_machines")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to measure")
def test_where_nothing_can_be_measured_a_single_worker_has_a_quarter(
    gpu_plan: Callable[..., Plan],
):
    plan = gpu_plan(1)
    assert _sharing_gpus(plan, ("field", "refiner")) == plan and plan.gpus_per_worker == 0.25


@pytest.mark.usefixtures("two_machines")
def test_single_workers_share_a_card(gpu_plan: Callable[..., Plan], tmp_path: Path):
    plan = gpu_plan(1, cpus_per_worker=0.5)
    assert plan.gpus_per_worker == 0.25 and num_slots(plan) == 4 * CARDS
    met = tmp_path / "met"
    met.mkdir()

    def meet(number: int) -> dict[str, Any]:
        (met / str(number)).touch()
        deadline = time.monotonic() + PATIENCE
        while len(list(met.iterdir())) < 6:
            assert time.monotonic() < deadline, "they are not at work at the same time"
            time.sleep(0.1)
        return where_am_i()

    task = _remote(plan, meet, trains=True)
    found = ray.get([task.remote(number) for number in range(6)])
    uses = Counter((one["node"], one["cards"]) for one in found)
    assert max(uses.values()) <= 4 and len(uses) < 6
    assert all([one["cards"]] == one["given"] for one in found)


def test_a_machine_holds_what_its_scarcest_resource_holds():
    machine = {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}
    assert processes_on(machine, {"CPU": 1}) == 8
    assert processes_on(machine, {"CPU": 1, "GPU": 0.25}) == 4
    assert processes_on(machine, {"CPU": 3, "GPU": 0.25}) == 2
    assert processes_on(machine, {"CPU": 1, "GPU": 1}) == 1
    assert processes_on({"CPU": 8.0}, {"CPU": 1, "GPU": 1}) == 0
    for share in range(1, 50):
        assert processes_on(machine, {"GPU": 1 / share}) == share
