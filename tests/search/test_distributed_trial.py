"""Two processes a training run: Ray Train inside Tune, gloo between them. Each stage loses one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drivers import finish, rays_processes, wait_for
from mlflow import MlflowClient

from cbnerf.config import load_config
from cbnerf.data.llff import read_capture
from cbnerf.data.renders import load_renders
from cbnerf.data.scene import make_scene
from cbnerf.training.stages import run_field, run_refiner

pytestmark = [
    pytest.mark.search,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPEC = """
resolution: tiny
trials: 1
stopping: {rule: race, rungs: 2, grace_period: 1}
fixed: {refiner.optim.batch_size: 4}
space: {codebook.size: {choices: [64, 1024]}}
resources: {workers: 2, cpus_per_worker: 1}
"""
PLACES = {"cache/field-*": "field.pt", "studies/two/trials/0000/arcade": "refiner.pt"}
"""Where results stand, and the checkpoint that is written there time and again."""


def start(folder: Path) -> "subprocess.Popen[str]":
    """The study with two processes a run, in a folder."""
    (folder / "two.yaml").write_text(SPEC)
    command = [str(ROOT / "tune.py"), "--config", "two.yaml", "--scenes", "arcade", "--name", "two"]
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study with two processes a run leaves, though one of them is killed in each stage."""
    folder = tmp_path_factory.mktemp("distributed")
    study = start(folder)
    for place, checkpoint in PLACES.items():
        # Not sooner: Ray Train gives up where a process dies while its group still starts.
        written = f"{place}/{checkpoint}"
        wait_for(lambda w=written: bool(list((folder / "runs").glob(w))), study)
        os.kill(workers()[-1], signal.SIGKILL)
        # It was in the middle.
        assert not list((folder / "runs").glob(f"{place}/metrics.json"))
    errors = finish(study)
    assert "Warning" not in errors and "Traceback" not in errors
    return folder / "runs"


def workers() -> list[int]:
    """The processes that train together, the latest last."""
    titles = rays_processes()
    return sorted(number for number in titles if titles[number].startswith("ray::RayTrainWorker"))


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def test_results_and_curves_of_two_processes_arrive(storage: Path):
    (cached,) = (storage / "cache").glob("field-*")
    unit = storage / "studies" / "two" / "trials" / "0000" / "arcade"
    for folder, files in (
        (cached, {"field.pt", "renders.npz", "manifest.json"}),
        (unit, {"refiner.pt", "strip.png"}),
    ):
        assert files | {"config.yaml", "metrics.json"} == {file.name for file in folder.iterdir()}
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("two")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`cbnerf.kind` = 'scene'")
    assert run.info.status == "FINISHED"
    curve = client.get_metric_history(run.info.run_id, "val/psnr")
    assert [point.step for point in curve] == [3, 5, 10]
    assert curve[-1].value == metrics_of(unit)["val/psnr"]
    assert {"train/loss", "codebook/perplexity"} <= run.data.metrics.keys()
    journal = (storage / "studies" / "two" / "optuna.journal").read_text()
    assert all(journal.count(f'"0/arcade/{rung}"') == 1 for rung in range(2))


def test_two_processes_train_what_one_trains(storage: Path, tmp_path: Path):
    """Same seed, same global batch; only the order of floating-point sums differs."""
    (cached,) = (storage / "cache").glob("field-*")
    unit = storage / "studies" / "two" / "trials" / "0000" / "arcade"
    config = load_config(unit / "config.yaml")
    capture = read_capture(storage / "scenes" / "64" / "arcade", 64)
    scene = make_scene(capture, config.data)
    field = run_field(config, scene, tmp_path / "field", device=CPU)
    for name in ("val/psnr", "val/ssim"):
        assert field[name] == pytest.approx(metrics_of(cached)[name], rel=1e-3)
    renders = load_renders(cached / "renders.npz")
    refiner = run_refiner(config, scene, renders, tmp_path / "refiner", device=CPU)
    for name in ("val/psnr", "val/ssim"):
        assert refiner[name] == pytest.approx(metrics_of(unit)[name], rel=1e-3)
