"""Two processes a training run: Ray Train inside Tune, gloo between them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
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
stopping: {rule: race}
fixed: {refiner.optim.batch_size: 4}
space: {codebook.size: {choices: [64, 1024]}}
resources: {workers: 2, cpus_per_worker: 1}
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a study with two processes a run leaves; a hang ends the test."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "two.yaml").write_text(SPEC)
    answer = subprocess.run(
        [sys.executable, ROOT / "tune.py", "--config", "two.yaml", "--scenes", "arcade"]
        + ["--name", "two"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, text=True,
        capture_output=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "Warning" not in answer.stderr and "Traceback" not in answer.stderr
    yield folder / "runs"


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
    assert [point.step for point in curve] == [1, 3, 5, 8, 10]  # with the lowest rung
    assert curve[-1].value == metrics_of(unit)["val/psnr"]
    assert {"train/loss", "codebook/perplexity"} <= run.data.metrics.keys()


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
