"""SIGTERM before a machine goes: real processes that train a unit, alone and in a group."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from drivers import PATIENCE, wait_for
from ranks import start_ranks
from ray import cloudpickle
from ray.cluster_utils import Cluster

from cbnerf.search import machines, worker
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
STEPS, STEPS_OF_GROUP = 100, 400
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


def write_down_steps(log: Path, then: Callable[[int], None] = lambda step: None) -> None:
    """Let this process note each step that it has trained, and do something with its number."""
    must_end = loop._must_end

    def noted(step: int, device: torch.device) -> bool:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{step}\n")
        then(step)
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
def small_machines() -> Iterator[Cluster]:
    """A Ray of three machines with a CPU each, beside the head; the last test takes one away."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def plan_of_a_group(
    tiny_plan: Callable[..., Plan], optim: dict[str, int], workers: int | list[int]
) -> Plan:
    return tiny_plan(
        "arcade", method="nerf", stopping={"rule": "none"},
        fixed={f"field.optim.{knob}": value for knob, value in optim.items()},
        space={"field.optim.lr": {"low": 1e-3, "high": 1e-1}},
        resources={"workers": workers, "gpus_per_worker": 0},
    )  # fmt: skip


def train_while_machines_come_and_go(about: dict[str, Any]) -> None:
    """In an elastic group: note the steps of each attempt. The first waits at step 50 for rank 2,
    whose machine ends; the second trains slowly until it is told to leave."""
    log, rank = about["log"], process_rank()
    attempt = len(list(log.glob("*-0")))
    dist.barrier()  # before rank 0 begins another file

    def wait(step: int) -> None:
        if (attempt, rank, step) == (0, 2, 50):
            here = ray.get_runtime_context().get_node_id()
            (log / "here").write_text(here, encoding="utf-8")
            time.sleep(PATIENCE)
        if attempt == 1 and step > 60:
            time.sleep(0.2)

    write_down_steps(log / f"{attempt}-{rank}", wait)
    _run_unit(about["plan"], UNIT, CPU)


@pytest.mark.slow
def test_an_elastic_group_shrinks_and_grows_with_its_machines_and_trains_what_one_process_trains(
    tiny_plan: Callable[..., Plan], small_machines: Cluster, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(machines, "SECONDS_BETWEEN_RESIZES", 1)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    small = {"steps": STEPS_OF_GROUP, "evaluations": 10, "batch_size": 66}
    plan = plan_of_a_group(tiny_plan, small, workers=[2, 3])
    log = tmp_path / "log"
    log.mkdir()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            _train_together, plan, "test", train_while_machines_come_and_go, {"log": log}, []
        )
        wait_for((log / "here").exists, training)
        here = (log / "here").read_text(encoding="utf-8")
        (machine,) = [node for node in small_machines.worker_nodes if node.node_id == here]
        small_machines.remove_node(machine, allow_graceful=False)
        wait_for(lambda: max(steps_in(log / "1-0"), default=0) > 60, training)
        small_machines.add_node(num_cpus=1)
        training.result(PATIENCE)
    steps = [[steps_in(log / f"{n}-{rank}") for rank in range(3)] for n in range(3)]
    left = steps[1][0][-1]  # no step is lost when the group grows
    assert steps[0] == [[*range(1, 51)]] * 3
    assert steps[1] == [[*range(41, left + 1)]] * 2 + [[]]
    assert steps[2] == [[*range(left + 1, STEPS_OF_GROUP + 1)]] * 3
    alone = replace(plan, name="alone")
    _run_unit(alone, UNIT, CPU)
    (_, together), (_, expected) = result(plan), result(alone)
    for name, tolerance in {"val/psnr": 1e-3, "val/ssim": 5e-3}.items():
        assert together[name] == pytest.approx(expected[name], rel=tolerance)


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


ENDS = {60: end_this_process, 124: announce_the_end_of_this_machine}
"""What the process of rank 1 does at which step."""


def train_and_lose_machines(about: dict[str, Any]) -> None:
    """In a group of Ray Train: note the steps, and end in the ways of `ENDS`."""
    log, rank = about["log"], process_rank()

    def end(step: int) -> None:
        if rank == 1 and step in ENDS:
            ENDS[step]()
            time.sleep(2)  # until the main thread has handled the signal, or Ray has told of it

    with (log / f"attempts-{rank}").open("a", encoding="utf-8") as file:
        file.write("1\n")
    write_down_steps(log / str(rank), end)
    _run_unit(about["plan"], UNIT, CPU)


@pytest.mark.slow
def test_a_group_of_ray_train_goes_on_from_the_step_at_which_its_machine_went(
    tiny_plan: Callable[..., Plan], small_machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "MAX_FAILURES", 0)  # The end of a machine does not count.
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
    plan = plan_of_a_group(tiny_plan, {"steps": 144, "evaluations": 1}, workers=2)
    log = tmp_path / "log"
    log.mkdir()
    _train_together(plan, "test", train_and_lose_machines, {"log": log}, [])
    for rank in range(2):
        assert steps_in(log / str(rank)) == [*range(1, 145)]  # each once
        assert steps_in(log / f"attempts-{rank}") == [1, 1, 1]
    assert result(plan)[1]["steps"] == 144
