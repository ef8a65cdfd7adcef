"""What happens to a study when machines, servers and disks fail: real Ray with several nodes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from drivers import finish, plan_of, rays_processes, search_without_ray, wait_for
from mlflow import MlflowClient
from mlflow_server import free_address, serve_mlflow, stop
from ray.cluster_utils import Cluster

from cbnerf.search.plan import make_plan
from cbnerf.search.spec import parse_spec
from cbnerf.search.state import StudyState
from cbnerf.strict_yaml import load_yaml

pytestmark = [pytest.mark.search, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCENES = ("arcade", "blinds")
SMOKE = ROOT / "tune_configs" / "smoke.yaml"
SEARCH = [
    sys.executable, str(ROOT / "tune.py"), "--config", str(SMOKE), "--scenes", ",".join(SCENES),
    "--trials", "3",
]  # fmt: skip
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
BOOKED = {(n, scene, 0) for n in range(3) for scene in SCENES}


class Study:
    """A `tune.py` under way, and what it has written so far."""

    def __init__(self, storage: Path, address: str, name: str = "faulty", **variables: str):
        self.storage, self.name = storage, name
        self.folder = storage / "studies" / name
        self._command = [*SEARCH, "--storage", str(storage), "--name", name, "--address", address]
        self._environment = {**os.environ, **variables}

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self._command, env=self._environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def state(self) -> StudyState:
        return StudyState(plan_of(self.storage, self.name), adopt=False)

    def num_recorded(self) -> int:
        journal = self.folder / "optuna.journal"
        return (
            len(re.findall(r'/0": ?{', journal.read_text(encoding="utf-8")))
            if journal.exists()
            else 0
        )

    def is_training(self) -> bool:
        """A field has been begun and none is whole."""
        cache = self.storage / "cache"
        begun = list(cache.glob("field-*/config.yaml"))
        return bool(begun) and not list(cache.glob("field-*/manifest.json"))

    def outcome(self) -> list[tuple[dict[str, Any], float]]:
        """Knobs and value of each configuration; all units are booked, each once."""
        journal = (self.folder / "optuna.journal").read_text(encoding="utf-8")
        assert all(journal.count(f'"{n}/{scene}/{rung}"') == 1 for n, scene, rung in BOOKED)
        return outcome(self.state())


def outcome(state: StudyState) -> list[tuple[dict[str, Any], float]]:
    """Knobs and value of each configuration; all units are booked."""
    trials = state.study.get_trials()
    assert {(n, *place) for n in range(len(trials)) for place in state.results(n)} == BOOKED
    assert all(trial.value is not None for trial in trials)
    return [(trial.params, float(trial.value or 0)) for trial in trials]


@contextmanager
def machines(*cpus: int) -> Iterator[Cluster]:
    """A head without CPUs and machines with some; nobody is at work there when a test has ended."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for count in cpus:
            cluster.add_node(num_cpus=count)
        yield cluster
        assert is_quiet()
    finally:
        cluster.shutdown()


def at_work() -> list[int]:
    """Those of Ray's processes that train or score."""
    return [number for number, title in rays_processes().items() if not title.startswith(RAYS_OWN)]


def kill_a_training() -> bool:
    """Whether there was one to kill."""
    for process in at_work():
        try:
            os.kill(process, signal.SIGKILL)
            return True
        except ProcessLookupError:  # It has ended by itself.
            continue
    return False


def is_quiet() -> bool:
    """Nobody is at work any more, after some patience."""
    for _ in range(300):
        if not at_work():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], float]]:
    plan = make_plan(
        parse_spec(load_yaml(SMOKE) | {"trials": 3}), scenes=",".join(SCENES), data=None,
        name="undisturbed", storage=tmp_path_factory.mktemp("undisturbed"), has_gpu=False,
    )  # fmt: skip
    return outcome(search_without_ray(plan))


def test_trainings_and_machines_die_and_others_join_late(tmp_path: Path, undisturbed):
    with machines(1) as cluster:
        (_, first) = cluster.list_all_nodes()
        study = Study(tmp_path / "runs", cluster.address)
        driver = study.start()
        wait_for(study.is_training, driver)
        cluster.remove_node(first, allow_graceful=False)
        time.sleep(3)  # For a while there is no machine at all.
        second = cluster.add_node(num_cpus=1)
        wait_for(lambda: study.num_recorded() >= 1 and kill_a_training(), driver)
        wait_for(lambda: study.num_recorded() >= 2, driver)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        finish(driver)
    assert study.outcome() == undisturbed


def test_two_studies_share_a_cluster_and_mlflows_server_is_gone_for_a_while(
    tmp_path: Path, undisturbed
):
    address, store = free_address(), f"sqlite:///{tmp_path}/mlflow.db"
    server = serve_mlflow(store, tmp_path, address)
    try:
        with machines(2) as cluster:
            studies = [
                Study(tmp_path / "runs", cluster.address, name, MLFLOW_TRACKING_URI=address)
                for name in ("one", "two")
            ]
            drivers = [study.start() for study in studies]
            wait_for(lambda: studies[0].num_recorded() >= 1, drivers[0])
            assert "under way in another process" in finish(studies[0].start(), status=2)
            stop(server)
            time.sleep(8)
            server = serve_mlflow(store, tmp_path, address)
            for driver in drivers:
                finish(driver)
        client = MlflowClient(address)
        for study in studies:
            assert study.outcome() == undisturbed
            experiment = client.get_experiment_by_name(study.name)
            assert experiment is not None
            runs = client.search_runs([experiment.experiment_id])
            assert {run.info.status for run in runs} == {"FINISHED"}
            keys = [run.data.tags["cbnerf.key"] for run in runs]
            assert len(keys) == len(set(keys)) == 3 + len(BOOKED) + len(SCENES) + 1
    finally:
        stop(server)
    assert len(list((tmp_path / "runs" / "cache").glob("field-*"))) == len(SCENES)


def test_a_full_disk_ends_the_study_and_room_lets_it_go_on(tmp_path: Path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with machines(1) as cluster:
            study = Study(disk / "runs", cluster.address)
            driver = study.start()
            wait_for(lambda: study.num_recorded() >= 1, driver)
            before = study.num_recorded()
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(65536))
            errors = finish(driver, status=2)
            assert "make room" in errors or "No space left" in errors
            assert "Traceback" not in errors
            filler.unlink()
            assert study.num_recorded() >= before
            finish(study.start())
        assert study.outcome() == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
