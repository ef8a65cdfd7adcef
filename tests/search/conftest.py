"""Plans on the tiny preset, and folders that a finished unit would have left."""

import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from cbnerf.data.library import DATA_VARIABLE
from cbnerf.overrides import save_config, with_overrides
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import parse_spec
from cbnerf.training.checkpoint import Checkpoint, save_checkpoint

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Ray's workers inherit it.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of every Ray that tests start

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]  # needs cbnerf[search]

SPACE = {
    "codebook.size": {"choices": [64, 128, 1024]},
    "codebook.beta": {"low": 0.05, "high": 2.0, "log": True},
    "loss.lambda_recon": {"low": 0.001, "high": 30.0, "log": True},
}


@pytest.fixture(autouse=True)
def no_data_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither photographs nor settings of the machine reach a test."""
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_plan(tmp_path: Path) -> Callable[..., Plan]:
    """A plan in `tmp_path`: `tiny_plan("arcade,blinds", trials=5, fixed={...})`."""

    def make(scenes: str = "arcade,blinds", *, has_gpu: bool = False, **spec: Any) -> Plan:
        values = {"resolution": "tiny", "trials": 3, "space": SPACE} | spec
        return make_plan(
            parse_spec(values),
            scenes=scenes,
            data=None,
            name="test",
            storage=tmp_path / "runs",
            has_gpu=has_gpu,
        )

    return make


@pytest.fixture
def unpruned_plan(tiny_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """As `tiny_plan`, with one rung and no pruning unless told."""

    def make(scenes: str = "arcade,blinds", **spec: Any) -> Plan:
        return tiny_plan(scenes, **{"stopping": {"rule": "none", "rungs": 1}} | spec)

    return make


@pytest.fixture(scope="session")
def quiet() -> None:
    """Silence Ray, Optuna and MLflow as the driver does."""
    from cbnerf.search.driver import quieten_libraries

    quieten_libraries()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make a database, so tests copy this one."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def make_tracked_plan(tiny_plan: Callable[..., Plan], empty_store: Path) -> Callable[..., Plan]:
    """A plan with one value of each knob, and an empty MLflow; one rung unless told."""

    def make(**spec: Any) -> Plan:
        space = {"codebook.size": {"choices": [64]}, "codebook.beta": {"choices": [0.5]}}
        defaults = {"stopping": {"rule": "none"}, "space": space, "fixed": {"codebook.dim": 8}}
        plan = tiny_plan("arcade,blinds", **defaults | spec).with_precision("bfloat16")
        if not plan.storage.exists():
            plan.storage.mkdir()
            shutil.copy(empty_store, plan.storage / "mlflow.db")
        return plan

    return make


@pytest.fixture
def plan(make_tracked_plan: Callable[..., Plan]) -> Plan:
    return make_tracked_plan()


@pytest.fixture
def race(make_tracked_plan: Callable[..., Plan]) -> Plan:
    """As `plan`, with two rungs."""
    return make_tracked_plan(stopping={"rule": "race", "rungs": 2, "grace_period": 1})


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """The address of a Ray with two CPUs, which takes seconds to start, so the tests of a file
    share it. Those of several files cannot: a process that was connected to another Ray since the
    start of this one gets no actors here ("all references to the actor were removed")."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def leave_unit() -> Callable[..., dict[str, float]]:
    """Write what a finished unit leaves in its folder; returns its metrics."""

    def leave(plan: Plan, number: int, scene: str, overrides: dict[str, Any], psnr: float):
        folder = plan.trial_folder(number, scene)
        folder.mkdir(parents=True, exist_ok=True)
        metrics = {"val/psnr": psnr, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.5, "steps": 10}
        save_config(with_overrides(plan.base, overrides), folder / "config.yaml")
        weights = {"weight": torch.full((3,), float(number))}
        checkpoint = Checkpoint(
            "refiner",
            scene,
            10,
            plan.base,
            "float32",
            weights,
            {"state": {0: weights}},
            {},
            metrics,
        )
        save_checkpoint(checkpoint, folder / "refiner.pt")
        iio.imwrite(folder / "strip.png", np.full((8, 24, 3), 99, np.uint8))
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        return metrics

    return leave
