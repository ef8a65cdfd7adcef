"""The work of a study: train a field, train a refiner, score the best. Runs on any machine.

One worker trains in the calling process; several train through Ray Train's `TorchTrainer`. Results
stand in folders of the shared storage, so a killed job goes on where its last checkpoint was.
"""

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from ray import train, tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback

from cbnerf.config import Config, DataConfig, with_overrides
from cbnerf.data.library import read_scene
from cbnerf.data.references import find_references
from cbnerf.data.renders import load_renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.search.plan import Plan
from cbnerf.training.cache import field_folder
from cbnerf.training.checkpoint import Checkpoint
from cbnerf.training.evaluation import mean_scores, refine_views
from cbnerf.training.loop import Report
from cbnerf.training.processes import choose_device
from cbnerf.training.refiner import load_refiner
from cbnerf.training.stages import (
    REFINER_FILE,
    RENDERS_FILE,
    ignore,
    read_metrics,
    run_field,
    run_refiner,
)

_LASTING = (FloatingPointError, ValueError)
"""What divergence and knobs that do not fit each other raise; no accidents."""


@dataclass(frozen=True)
class Job:
    """One training run on one scene."""

    stage: Literal["field", "refiner"]
    scene: str
    config: Config
    folder: Path | None = None
    """Where a refiner leaves its results; a field's place is in the cache."""


def run_unit(unit: Mapping[str, Any], plan: Plan) -> None:
    """Tune's trainable: one configuration on one scene; reports its metrics step by step."""
    config = with_overrides(plan.base, unit["overrides"])
    folder = plan.trial_folder(unit["configuration"], unit["scene"])
    try:
        run_job(plan, Job("field", unit["scene"], config), in_tune=True)
        metrics = run_job(plan, Job("refiner", unit["scene"], config, folder), in_tune=True)
    except _LASTING as error:
        # Trying again would fail again.
        tune.report({"failure": str(error)})
        return
    tune.report({**metrics, "folder": str(folder)})


def run_job(plan: Plan, job: Job, *, in_tune: bool = False) -> dict[str, float]:
    """Train unless the job's folder is finished; the metrics of its end."""
    folder = job_folder(plan, job)
    finished = read_metrics(folder)
    if finished is not None:
        return finished
    if plan.spec.resources.workers == 1:
        device = choose_device()
        report = _tune_report if in_tune and job.stage == "refiner" else ignore
        return _train(plan, job, device, report)
    # Reports wait for the controller's next look at its workers, every 2 s unless told.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    callbacks: list[Any] = [TuneReportCallback()] if in_tune and job.stage == "refiner" else []
    trainer = TorchTrainer(
        _train_in_worker,
        train_loop_config={"plan": plan, "job": job},
        scaling_config=worker_group(plan),
        run_config=RunConfig(
            name=f"{job.stage}-{job.scene}-{uuid.uuid4().hex[:8]}",
            storage_path=str(plan.folder / "ray_train"),
            failure_config=FailureConfig(max_failures=2),
            callbacks=callbacks,
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for cause in error.worker_failures.values():
            if isinstance(cause, _LASTING):
                raise cause from None
        raise
    finished = read_metrics(folder)
    assert finished is not None, folder
    return finished


def score_best(
    plan: Plan, config: Config, configuration: int, scene_name: str
) -> dict[str, dict[str, float]]:
    """Validation and test metrics of stage 1 and of a trained configuration on one scene."""
    run_job(plan, Job("field", scene_name, config))  # The cache may have been emptied since.
    scene = load_scene(plan, scene_name, config.data)
    renders = load_renders(field_folder(plan.storage, config, scene) / RENDERS_FILE)
    device = choose_device()
    refiner = load_refiner(plan.trial_folder(configuration, scene_name) / REFINER_FILE, device)
    split = split_views(scene.num_views, config.data)
    scores: dict[str, dict[str, float]] = {"stage 1": {}, "refined": {}}
    for prefix, views in (("val", split.val), ("test", split.test)):
        if views:
            before = renders.rgb[views]
            scores["stage 1"] |= mean_scores(before, scene.images[views], prefix)
            references = find_references(config, scene, renders, views)
            refined = refine_views(refiner, before, device, references)
            scores["refined"] |= mean_scores(refined, scene.images[views], prefix)
    return scores


def load_scene(plan: Plan, name: str, data: DataConfig) -> Scene:
    """A scene of the plan; a built-in one is drawn and written as a folder when first used."""
    return read_scene(name, plan.data, plan.storage, data)


def worker_group(plan: Plan) -> ScalingConfig:
    """Ray Train's description of the processes that train together."""
    resources = {"CPU": plan.spec.resources.cpus_per_worker}
    if plan.gpus_per_worker:
        resources["GPU"] = plan.gpus_per_worker
    return ScalingConfig(
        num_workers=plan.spec.resources.workers,
        use_gpu=plan.gpus_per_worker > 0,
        resources_per_worker=resources,
    )


def job_folder(plan: Plan, job: Job) -> Path:
    """Where a job leaves its results."""
    if job.folder is not None:
        return job.folder
    scene = load_scene(plan, job.scene, job.config.data)
    return field_folder(plan.storage, job.config, scene)


def _train(plan: Plan, job: Job, device: torch.device, report: Report) -> dict[str, float]:
    scene = load_scene(plan, job.scene, job.config.data)
    entry = field_folder(plan.storage, job.config, scene)
    if job.stage == "field":
        return run_field(job.config, scene, entry, device=device, report=report)
    assert job.folder is not None
    renders = load_renders(entry / RENDERS_FILE)
    return run_refiner(job.config, scene, renders, job.folder, device=device, report=report)


def _train_in_worker(loop_config: dict[str, Any]) -> None:
    _train(loop_config["plan"], loop_config["job"], get_device(), _train_report)


def _tune_report(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
    tune.report({**metrics, "step": step})


def _train_report(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
    train.report({**metrics, "step": step})
