"""SIGTERM before a machine goes: real processes that train a unit, alone and in a group."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ranks import start_ranks
from ray import cloudpickle
from ray.cluster_utils import Cluster

from cbnerf.search import worker
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.worker import UnitTrainable, _run_unit, _train_together, run_base_field
from cbnerf.training import loop
from cbnerf.training.checkpoint import load_checkpoint
from cbnerf.training.distributed import process_rank
from cbnerf.training.preemption import Preempted, note_sigterm

pytestmark = pytest.mark.search
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file

DEADLINE = 10
"""Seconds from SIGTERM to the end of the machine."""
STEPS = 100
UNIT = Unit(0, "arcade", 0, {})
CPU = torch.device("cpu")


def plan_of_a_training(tiny_plan: Callable[..., Plan], stage: str) -> Plan:
    """A unit is one training of many small steps that is evaluated at its end alone."""
    knobs = {f"{stage}.optim.steps": STEPS, f"{stage}.optim.evaluations": 1}
    if stage == "refiner":
        plan = tiny_plan("arcade", stopping={"rule": "none"}, fixed=knobs)
        run_base_field(plan, "arcade")
        return plan
    space = {"field.optim.lr": {"low": 1e-3, "high": 1e-1}}
    return tiny_plan("arcade", method="nerf", stopping={"rule": "none"}, fixed=knobs, space=space)


def write_down_steps(log: Path) -> None:
    """Let this process note each step that it has trained."""
    must_end = loop._must_end

    def noted(step: int, device: torch.device) -> bool:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{step}\n")
        return must_end(step, device)

    loop._must_end = noted


def train_alone(rank: int, plan: Plan, log: Path) -> None:
    """As Ray's process of a unit, whose main thread trains."""
    write_down_steps(log / str(rank))
    trainable = UnitTrainable.__new__(UnitTrainable)
    trainable.setup({"units": [UNIT._asdict()]}, plan)
    assert trainable.step()["begun"]
    assert trainable.step()["done"]


def train_in_group(rank: int, plan: Plan, log: Path) -> None:
    """As one of Ray Train's processes, which train in another thread."""
    torch.set_num_threads(1)
    write_down_steps(log / str(rank))
    dist.init_process_group("gloo", init_method=f"file://{log}/store", rank=rank, world_size=2)
    note_sigterm(lambda: False)
    ends: list[BaseException | None] = []

    def train() -> None:
        try:
            _run_unit(plan, UNIT, CPU)
            dist.barrier()  # nobody leaves while another still talks
            ends.append(None)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    dist.destroy_process_group()
    if ends[0] is not None:
        raise ends[0]


def steps_in(file: Path) -> list[int]:
    return [int(line) for line in file.read_text(encoding="utf-8").split()] if file.exists() else []


Train = Callable[[int, Plan, Path], None]


def run(train: Train, count: int, plan: Plan, log: Path, *, terminate: bool) -> list[int]:
    """Exit codes of processes that train; with `terminate` the last one gets SIGTERM on its way."""
    log.mkdir()
    processes = start_ranks(count, train, plan, log)
    if terminate:
        while len(steps_in(log / str(count - 1))) < 10:
            assert all(process.is_alive() for process in processes)
            time.sleep(0.001)
        processes[-1].terminate()
    for process in processes:
        process.join(DEADLINE if terminate else None)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return [code for code in codes if code is not None]


def result(plan: Plan) -> tuple[dict[str, Any], dict[str, float]]:
    """The weights of the trained unit, and its metrics but for the time and the use of codes, which
    is counted since the process started."""
    file = plan.trial_folder(0, "arcade") / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8"))
    compared = {k: v for k, v in metrics.items() if k != "seconds" and k[:9] != "codebook/"}
    return load_checkpoint(checkpoint_of(plan), plan.stage, CPU).model, compared


def checkpoint_of(plan: Plan) -> Path:
    return plan.trial_folder(0, "arcade") / f"{plan.stage}.pt"


@pytest.mark.parametrize(
    ("stage", "train", "count"), [("field", train_alone, 1), ("refiner", train_in_group, 2)]
)
def test_sigterm_loses_no_step_and_the_result_is_that_of_an_unbroken_training(
    tiny_plan: Callable[..., Plan], tmp_path: Path, stage: str, train: Train, count: int
):
    plan = plan_of_a_training(tiny_plan, stage)
    whole = replace(plan, name="whole")
    assert run(train, count, whole, tmp_path / "whole", terminate=False) == [0] * count
    assert run(train, count, plan, tmp_path / "first", terminate=True) == [143] * count
    left = load_checkpoint(checkpoint_of(plan), plan.stage, CPU)
    done = [steps_in(tmp_path / "first" / str(rank)) for rank in range(count)]
    assert done == [[*range(1, left.step + 1)]] * count
    assert left.sums and 10 <= left.step < STEPS
    assert not (plan.trial_folder(0, "arcade") / "metrics.json").exists()
    assert run(train, count, plan, tmp_path / "second", terminate=False) == [0] * count
    assert steps_in(tmp_path / "second" / "0") == [*range(left.step + 1, STEPS + 1)]
    (weights, metrics), (expected, as_expected) = result(plan), result(whole)
    assert metrics == as_expected and weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_the_end_by_sigterm_reaches_another_process():
    end = cloudpickle.loads(cloudpickle.dumps(Preempted()))
    assert type(end) is Preempted and end.code == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def small_machines() -> Iterator[None]:
    """A Ray of three machines with a CPU each, beside the head."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


def train_and_lose_a_machine(about: dict[str, Any]) -> None:
    """In a group of Ray Train: in the first attempt the machine of rank 1 goes."""
    log, how = about["log"], about["how"]
    rank, must_end, attempts = process_rank(), loop._must_end, log / f"attempts-{process_rank()}"
    with attempts.open("a", encoding="utf-8") as file:
        file.write("1\n")
    is_first = len(steps_in(attempts)) == 1

    def noted(step: int, device: torch.device) -> bool:
        with (log / str(rank)).open("a", encoding="utf-8") as file:
            file.write(f"{step}\n")
        if is_first and step == 60 and rank == 1:
            how()
            time.sleep(2)  # until the main thread has handled the signal, or Ray has told of it
        return must_end(step, device)

    loop._must_end = noted
    try:
        _run_unit(about["plan"], UNIT, CPU)
    finally:
        loop._must_end = must_end


def end_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def announce_the_end_of_this_machine() -> None:
    command = [
        "drain-node", "--address", ray.get_runtime_context().gcs_address,
        "--node-id", ray.get_runtime_context().get_node_id(),
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
        "--deadline-remaining-seconds", "300",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [end_this_process, announce_the_end_of_this_machine])
def test_a_group_of_ray_train_goes_on_from_the_step_at_which_its_machine_went(
    tiny_plan: Callable[..., Plan], small_machines, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, how: Callable[[], None],
):  # fmt: skip
    monkeypatch.setattr(worker, "MAX_FAILURES", 1)
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
    knobs = {"field.optim.steps": 80, "field.optim.evaluations": 1}
    plan = tiny_plan("arcade", method="nerf", stopping={"rule": "none"}, fixed=knobs,
                     resources={"workers": 2, "gpus_per_worker": 0},
                     space={"field.optim.lr": {"low": 1e-3, "high": 1e-1}})  # fmt: skip
    log = tmp_path / "log"
    log.mkdir()
    _train_together(plan, "test", train_and_lose_a_machine, {"log": log, "how": how}, [])
    for rank in range(2):
        assert steps_in(log / str(rank)) == [*range(1, 65), *range(65, 81)]
        assert steps_in(log / f"attempts-{rank}") == [1, 1]
    assert result(plan)[1]["steps"] == 80
