"""Two processes a training run: Ray Train inside Tune, gloo between them. Each stage loses one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from drivers import finish, rays_processes, wait_for
from mlflow import MlflowClient
from ranks import on_two_ranks

from cbnerf.config import Config
from cbnerf.data.captures import read_capture
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene, make_scene
from cbnerf.overrides import load_config
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
FIELD, REFINER = "cache/field-*", "studies/two/trials/0000/arcade"
"""Where results stand."""


def start(folder: Path) -> "subprocess.Popen[str]":
    """The study with two processes a run, in a folder."""
    (folder / "two.yaml").write_text(SPEC, encoding="utf-8")
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
    for place, checkpoint in ((FIELD, "field.pt"), (REFINER, "refiner.pt")):
        # Not sooner: Ray Train gives up where a process dies while its group still starts.
        written = f"{place}/{checkpoint}"
        wait_for(lambda w=written: bool(list((folder / "runs").glob(w))), study)
        os.kill(workers()[-1], signal.SIGKILL)
        # It was in the middle.
        assert not list((folder / "runs").glob(f"{place}/manifest.json"))
    errors = finish(study)
    assert "Warning" not in errors and "Traceback" not in errors
    return folder / "runs"


def workers() -> list[int]:
    """The processes that train together, the latest last."""
    titles = rays_processes()
    return sorted(number for number in titles if titles[number].startswith("ray::RayTrainWorker"))


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_results_and_curves_of_two_processes_arrive(storage: Path):
    (cached,), unit = storage.glob(FIELD), storage / REFINER
    for folder, files in (
        (cached, {"field.pt", "renders.npz", "strip.png"}),
        (unit, {"refiner.pt", "strip.png", "metrics.jsonl"}),
    ):
        files |= {"config.yaml", "metrics.json", "manifest.json"}
        assert files == {file.name for file in folder.iterdir()}
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("two")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`cbnerf.kind` = 'scene'")
    assert run.info.status == "FINISHED"
    curve = client.get_metric_history(run.info.run_id, "val/psnr")
    assert [point.step for point in curve] == [3, 5, 10]
    assert curve[-1].value == metrics_of(unit)["val/psnr"]
    assert {"train/loss", "codebook/perplexity"} <= run.data.metrics.keys()
    journal = (storage / "studies" / "two" / "optuna.journal").read_text(encoding="utf-8")
    assert all(journal.count(f'"0/arcade/{rung}"') == 1 for rung in range(2))


class Job(NamedTuple):
    """What the study has trained, for others to train again."""

    config: Config
    scene: Scene
    renders: Renders

    def train(self, folder: Path) -> None:
        """Both stages, into folders of their names."""
        config, scene, renders = self
        run_field(config, scene, folder / "field", device=CPU)
        run_refiner(config, scene, renders, folder / "refiner", device=CPU)


@pytest.fixture
def job(storage: Path) -> Job:
    (cached,) = storage.glob(FIELD)
    config = load_config(storage / REFINER / "config.yaml")
    capture = read_capture(storage / "scenes" / "64" / "arcade", 64)
    return Job(config, make_scene(capture, config.data), load_renders(cached / "renders.npz"))


def scores(field: Path, refiner: Path) -> list[float]:
    return [metrics_of(x)[name] for x in (field, refiner) for name in ("val/psnr", "val/ssim")]


def test_two_processes_train_what_one_trains(storage: Path, job: Job, tmp_path: Path):
    """Same seed, same global batch; only the order of floating-point sums differs."""
    job.train(tmp_path)
    (cached,) = storage.glob(FIELD)
    alone = scores(tmp_path / "field", tmp_path / "refiner")
    assert alone == pytest.approx(scores(cached, storage / REFINER), rel=1e-3)


def train_on_rank(rank: int, folder: Path, job: Job) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    job.train(folder)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def test_a_group_that_loses_processes_ends_as_one_that_does_not(
    storage: Path, job: Job, tmp_path: Path
):
    """Bit for bit as two processes without Ray."""
    on_two_ranks(train_on_rank, tmp_path, job)
    (cached,) = storage.glob(FIELD)
    quiet = scores(tmp_path / "field", tmp_path / "refiner")
    assert quiet == scores(cached, storage / REFINER)
