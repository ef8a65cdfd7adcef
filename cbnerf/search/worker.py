"""The work of a study on any machine: train fields and units, score the best configuration.

One worker trains in the calling process; several train through Ray Train's `TorchTrainer`. Results
are folders on the shared storage, so that a killed job resumes from its last checkpoint.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from ray import train, tune
from ray.train import FailureConfig, RunConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from cbnerf.config import Config, KnobError
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.nerf.model import Precision, resolve_precision, settle_precision
from cbnerf.search.curves import append_point, begin_curves
from cbnerf.search.machines import TorchGroup, device_of_worker, worker_group
from cbnerf.search.plan import Plan, Unit
from cbnerf.training.checkpoint import REFINER_FILE, Checkpoint
from cbnerf.training.distributed import choose_device, from_rank_0, process_rank
from cbnerf.training.evaluation import mean_scores, refine_views
from cbnerf.training.memory import free_gpu_memory, gpu_share
from cbnerf.training.models import load_refiner
from cbnerf.training.preemption import Preempted, heeding, leaving_at_sigterm
from cbnerf.training.stages import RENDERS_FILE, read_metrics, run_field, run_refiner
from cbnerf.training.store import is_complete

MAX_FAILURES = 2
"""A training run is retried this many times after accidents, then its configuration fails."""
_SECONDS_TO_SEE = 120
"""Twice the default time that NFS caches the listing of a folder."""
_LASTING = (FloatingPointError, KnobError)
"""Raised by divergence and incompatible knobs; other errors may be the fault of a machine."""


class UnitTrainable(tune.Trainable):
    """Trains the units of one configuration in this process, one after the other.

    A step reports the start of one as `{unit, begun}` or its end as `{unit, ended, metrics}`; an
    error that a retry would repeat is `{failure, out_of_memory}`. Tune calls it in the main thread,
    where SIGTERM can be handled: a machine that goes lets a unit write the checkpoint of its last
    step.
    """

    def setup(self, config: dict[str, Any], plan: Plan) -> None:
        self._plan = plan
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the units of another configuration; processes are reused."""
        self._results = run_units(new_config["units"], self._plan)
        return True

    def step(self) -> dict[str, Any]:
        with leaving_at_sigterm():
            return next(self._results)


def run_units(units: Sequence[Mapping[str, Any]], plan: Plan) -> Iterator[dict[str, Any]]:
    """Train units; yields what `UnitTrainable` reports. Curves are appended to a file in the trial
    folder."""
    try:
        for index, unit in enumerate(units):
            yield {"unit": index, "begun": True}  # Tune adds the process.
            metrics = _run_unit(plan, Unit(**unit), choose_device())
            free_gpu_memory()  # The process is reused, and others share its GPU.
            is_last = index == len(units) - 1
            yield {"unit": index, "ended": True, "metrics": metrics, "done": is_last}
    except _LASTING as error:
        yield _failure(error) | {"done": True}
    except torch.OutOfMemoryError as error:
        if not _has_its_share(plan):
            raise  # Another machine, or a later time, has the memory.
        yield _failure(error) | {"done": True}


def _failure(error: Exception) -> dict[str, Any]:
    """What is reported of an error that a retry would repeat."""
    short = ". ".join(str(error).split(". ")[:2])  # then come figures and advice of torch
    return {"failure": short, "out_of_memory": isinstance(error, torch.OutOfMemoryError)}


def _has_its_share(plan: Plan) -> bool:
    """Whether this process has got all of the GPU's memory that is reserved for it, so that none of
    the processes on the same GPU has taken it away."""
    share, reserved = gpu_share(), plan.gpus_per_worker
    return share is None or reserved >= 1 or share >= reserved


def run_units_together(about: Mapping[str, Any], plan: Plan) -> None:
    """As `UnitTrainable`, with a group of workers; reports ends and failures alone."""
    try:
        for unit in about["units"] if plan.stage == "refiner" else ():
            for scene in plan.scenes_of(unit["scene"]):
                _complete_field(plan, plan.config_of(Unit(**unit)), scene)
        callbacks = [TuneReportCallback()]
        _train_together(plan, "units", _walk_in_worker, {"units": about["units"]}, callbacks)
    except (*_LASTING, torch.OutOfMemoryError) as error:  # They have whole GPUs.
        tune.report(_failure(error))


def retrain(plan: Plan, unit: Unit, seed: int) -> dict[str, float] | None:
    """The metrics of a unit that is trained with another seed, on the same field if all
    configurations share it; None if it failed in a way that a retry would repeat."""
    try:
        if not plan.spec.resources.together:
            return _run_unit(plan, unit, choose_device(), seed)
        about = {"unit": unit, "seed": seed}
        _train_together(plan, "confirmation", _retrain_in_worker, about, [])
    except _LASTING:
        return None
    folder = plan.confirmation_folder(unit.configuration, seed, unit.scene)
    _wait_to_see(folder)
    return read_metrics(folder)


def run_base_field(plan: Plan, scene_name: str) -> tuple[Path, dict[str, float]]:
    """The entry of the field that all configurations share, and its metrics."""
    with leaving_at_sigterm():
        entry = _complete_field(plan, plan.base, scene_name)
    return entry, read_metrics(entry) or {}


def find_precision_here(plan: Plan) -> Precision:
    """The precision that `field.precision` means on this machine."""
    return resolve_precision(plan.base.field, choose_device())


def score_best(
    plan: Plan, config: Config, configuration: int, scene_name: str
) -> dict[str, dict[str, float]]:
    """Validation and test metrics of stage 1 and of a trained configuration on one scene."""
    scene, device = plan.load_scene(scene_name, config.data), choose_device()
    trained = plan.trial_folder(configuration, plan.training_of(scene_name, config))
    if plan.stage == "field":
        renders, refiner = load_renders(trained / RENDERS_FILE), None
    else:  # The entry may have been removed from the cache.
        renders = load_renders(_complete_field(plan, config, scene_name) / RENDERS_FILE)
        refiner = load_refiner(trained / REFINER_FILE, device)
    split = split_views(scene.num_views, config.data)
    scores: dict[str, dict[str, float]] = {"stage 1": {}}
    for prefix, views in (("val", split.val), ("test", split.test)):
        if views:
            before = renders.of(views)
            scores["stage 1"] |= mean_scores(before.rgb, scene.images[views], prefix)
            if refiner is not None:
                references = find_references(config, scene, renders, views)
                refined = refine_views(refiner, before, device, references)
                after = mean_scores(refined, scene.images[views], prefix)
                scores["refined"] = scores.get("refined", {}) | after
    return scores


def _run_unit(
    plan: Plan, unit: Unit, device: torch.device, seed: int | None = None
) -> dict[str, float]:
    """The metrics of a trained unit; with a `seed`, of one that is trained to confirm it."""
    config, folder = plan.config_of(unit), plan.trial_folder(unit.configuration, unit.scene)
    trained, part = config, plan.part(unit.rung)
    if seed is not None:
        trained = replace(config, seed=seed)
        folder = plan.confirmation_folder(unit.configuration, seed, unit.scene)

    def report(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        if process_rank() == 0:
            append_point(folder, step, metrics)

    if process_rank() == 0:
        begin_curves(folder)
    if plan.stage == "field":
        scene = from_rank_0(lambda: plan.load_scene(unit.scene, config.data))
        return run_field(trained, scene, folder, device=device, report=report, part=part)
    (scene, renders), *joint = from_rank_0(
        lambda: [_load_pair(plan, config, name) for name in plan.scenes_of(unit.scene)]
    )
    return run_refiner(
        trained, scene, renders, folder, device=device, report=report, joint=joint, part=part
    )


def _load_pair(plan: Plan, config: Config, scene_name: str) -> tuple[Scene, Renders]:
    """A scene and the renders of its field."""
    entry = _complete_field(plan, config, scene_name)
    return plan.load_scene(scene_name, config.data), _load_renders(entry / RENDERS_FILE)


def _complete_field(plan: Plan, config: Config, scene_name: str) -> Path:
    """The cache entry of a field, trained now if it is not there."""
    config = settle_precision(config, choose_device())

    def train(folder: Path) -> None:
        if not plan.spec.resources.together:
            scene = plan.load_scene(scene_name, config.data)
            run_field(config, scene, folder, device=choose_device())
        else:
            about = {"config": config, "scene": scene_name, "folder": folder}
            _train_together(plan, "field", _field_in_worker, about, [])
            _wait_to_see(folder)

    return plan.cache.complete(plan.field_folder(config, scene_name), train)


def _wait_to_see(folder: Path) -> None:
    """Wait until this machine sees all files of a folder that another one has completed."""
    for _ in range(_SECONDS_TO_SEE):
        if is_complete(folder):
            return
        time.sleep(1)
    raise OSError(f"{folder}: trained by another machine, and this one does not see its files; "
                  "--storage must be a folder that all machines share")  # fmt: skip


def _train_together(
    plan: Plan,
    what: str,
    function: Callable[..., None],
    about: dict[str, Any],
    callbacks: list[Any],
) -> None:
    """Run a function on all workers of a group through Ray Train; again when they have left with a
    checkpoint, which is no failure."""
    # Reports wait for the controller's next poll of its workers, every 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

    def fit() -> None:
        TorchTrainer(
            _call_in_worker,
            train_loop_config={"function": function, "plan": plan, **about},
            torch_config=TorchGroup(is_elastic=plan.spec.resources.is_elastic),
            scaling_config=worker_group(plan),
            run_config=RunConfig(
                name=f"{what}-{uuid.uuid4().hex[:8]}",
                storage_path=str(plan.folder / "ray_train"),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                callbacks=callbacks,
            ),
        ).fit()

    while True:
        try:
            return fit()
        except WorkerGroupError as error:
            causes = list(error.worker_failures.values())
            for cause in causes:
                if isinstance(cause, (*_LASTING, torch.OutOfMemoryError)):
                    raise cause from None
            if not any(isinstance(cause, Preempted) for cause in causes):
                raise


def _call_in_worker(about: dict[str, Any]) -> None:
    with heeding():
        about["function"](about)


def _walk_in_worker(about: dict[str, Any]) -> None:
    """Train all units with one group of workers, which starts once."""
    for index, unit in enumerate(about["units"]):
        metrics = _run_unit(about["plan"], Unit(**unit), device_of_worker())
        train.report({"unit": index, "ended": True, "metrics": metrics})


def _retrain_in_worker(about: dict[str, Any]) -> None:
    _run_unit(about["plan"], about["unit"], device_of_worker(), about["seed"])


def _field_in_worker(about: dict[str, Any]) -> None:
    plan, config = about["plan"], about["config"]
    scene = from_rank_0(lambda: plan.load_scene(about["scene"], config.data))
    run_field(config, scene, about["folder"], device=device_of_worker())


_load_renders = lru_cache(maxsize=16)(load_renders)
"""Kept in memory, because a process trains on the same few scenes again and again."""
