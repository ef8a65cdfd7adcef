"""Run a study: stage 1 of every scene, then the search, then the report."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from traceback import format_exception
from typing import Any, NamedTuple

import optuna
import torch
from mlflow.exceptions import MlflowException
from ray import tune
from tqdm import tqdm

from cbnerf.config import Config
from cbnerf.files import atomic_write_text
from cbnerf.nerf.model import AUTO_PRECISION, Precision
from cbnerf.overrides import with_overrides
from cbnerf.search.diary import Diary, catch_up
from cbnerf.search.estimate import measure_share, part_of_gpu
from cbnerf.search.machines import num_slots, worker_resources
from cbnerf.search.plan import Plan
from cbnerf.search.report import SceneScores, write_report
from cbnerf.search.searcher import TuneSearcher
from cbnerf.search.spec import QUALITIES
from cbnerf.search.state import StudyState
from cbnerf.search.tasks import call, for_each_scene, is_of_memory, reason
from cbnerf.search.tracking import Tracker
from cbnerf.search.worker import (
    MAX_FAILURES,
    find_precision_here,
    run_base_field,
    run_units,
    score_best,
)
from cbnerf.search.writer import Writer
from cbnerf.training.checkpoint import Stage

_FIRST_WAITING = 8
"""Training runs that wait while no machine has joined."""


class Outcome(NamedTuple):
    """How a study ended."""

    best: int
    """Number of the best configuration."""
    scores: SceneScores
    """Of the best configuration."""
    seconds: dict[str, float]
    """Wall-clock of each phase of this run."""
    experiment_id: str
    """Of MLflow."""


def run_study(
    plan: Plan, say: Callable[[str], None], concurrency: int | None = None
) -> Outcome | None:
    """Run what is left of a study on the Ray that is initialised; None if all of it failed.

    At most `concurrency` training runs stand at a time; without, as many as there is room for, and
    as many again wait, so that an autoscaler sees that there is work for more machines.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "storage"):
        state = StudyState(plan)
        tracker = Tracker(plan, state.id)
    try:
        catch_up(state, tracker)
        if not state.is_over:
            with Writer() as write:
                if plan.shares_fields:
                    with _timed(seconds, "stage 1"):
                        _train_fields(_sharing_gpus(plan, ("field",)), state, tracker, write)
                own: tuple[Stage, ...] = () if plan.shares_fields else ("field",)
                with _timed(seconds, "search"):
                    shared = _sharing_gpus(plan, (*own, plan.stage))
                    _search(shared, state, tracker, write, concurrency)
                    write.wait()
        else:
            say("all configurations of this study are done; nothing is trained again")
        best = state.best()
        if best is None:
            return None
        with _timed(seconds, "scoring and report"):
            config = with_overrides(plan.base, best.params)
            scores = _score_once(plan, config, best.number)
            files = write_report(state, config, best.number, scores)
            tracker.log_report(files, dict(zip(plan.spec.objectives, best.values, strict=True)))
        return Outcome(best.number, scores, seconds, tracker.experiment_id)
    except BaseException:
        with suppress(MlflowException):  # What ended the study may have ended MLflow, too.
            tracker.interrupt()
        raise


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started


def _sharing_gpus(plan: Plan, stages: Sequence[Stage]) -> Plan:
    """The plan with as much of a GPU for a training of these stages as one was measured to need,
    where the specification leaves that open; a quarter stays where there is nothing to measure."""
    resources = plan.spec.resources
    if not plan.gpus_per_worker or resources.workers > 1 or resources.gpus_per_worker != "auto":
        return plan
    try:
        share = call(replace(plan, gpus_per_worker=1), measure_share, stages)
    except torch.OutOfMemoryError:
        share = 1.0  # Of a whole GPU, and more: its trainings will say so.
    return plan if share is None else replace(plan, gpus_per_worker=part_of_gpu(share))


def find_precision(plan: Plan) -> Precision:
    """What `field.precision` is where trainings run. A study keeps to it on whatever machine: else
    its configurations would not refine the same renders."""
    if plan.base.field.precision != "auto" or AUTO_PRECISION in os.environ:
        return find_precision_here(plan)
    return call(plan, find_precision_here)


def _train_fields(plan: Plan, state: StudyState, tracker: Tracker, write: Writer) -> None:
    with _progress(len(plan.scenes), "stage 1", "scene") as bar:
        for scene, (folder, metrics) in for_each_scene(plan, run_base_field, trains=True):
            state.record_field(scene, folder.name, metrics["seconds"])
            write(tracker.log_field, scene, folder, metrics)
            bar.update()
            if "val/psnr" in metrics:
                bar.write(f"  stage 1  {scene:<12} val {metrics['val/psnr']:.2f} dB")


def _search(
    plan: Plan, state: StudyState, tracker: Tracker, write: Writer, concurrency: int | None
) -> None:
    limit = _Room(plan) if concurrency is None else lambda: concurrency
    bar = _progress(plan.spec.trials, "search", "configuration", done=state.num_ended)
    with bar:
        diary = Diary(state, tracker, write, bar)
        while True:
            walks = plan.spec.resources.workers > 1
            searcher = TuneSearcher(state, diary.end_unit, limit=limit, walk=walks)
            try:
                return _tune(plan, searcher, diary)
            except Exception as error:
                # Where Ray ends a trial's process for memory, Tune itself ends: with RuntimeError.
                trouble = "".join(format_exception(error))
                if not is_of_memory(trouble):
                    raise
                named, others = searcher.left(trouble)
                for unit in others:
                    state.release(unit)
                for unit in named:
                    diary.lose_unit(unit, reason(trouble))


def _tune(plan: Plan, searcher: TuneSearcher, diary: Diary) -> None:
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_units, plan=plan), _trial_resources(plan)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,  # The searcher ends it.
            reuse_actors=plan.spec.resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="ray_tune",
            storage_path=str(plan.folder),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[diary],
            verbose=0,
        ),
    )
    tuner.fit()


class _Room:
    """Twice as many training runs as the machines hold, looked up every few seconds: Tune asks at
    every turn of its loop, while machines join and go in minutes."""

    def __init__(self, plan: Plan):
        self._plan, self._size, self._until = plan, 0, 0.0

    def __call__(self) -> int:
        if time.monotonic() > self._until:
            self._size = max(2 * num_slots(self._plan), _FIRST_WAITING)
            self._until = time.monotonic() + 10
        return self._size


def _trial_resources(plan: Plan) -> dict[str, float]:
    if plan.spec.resources.workers > 1:
        # The trainer inside opens a placement group of its own; the trial itself needs none, and
        # a CPU held here could starve it. Ray refuses {"CPU": 0}.
        return {"node:__internal_head__": 0.001}
    return {name.lower(): float(amount) for name, amount in worker_resources(plan).items()}


def _score_once(plan: Plan, config: Config, number: int) -> SceneScores:
    """Scores of the best configuration; the test views of a configuration are scored once."""
    file = _scores_file(plan, number)
    if not file.exists():
        scores = dict(for_each_scene(plan, score_best, config, number, trains=False))
        scores = {scene: scores[scene] for scene in plan.scenes}
        atomic_write_text(file, json.dumps(scores, indent=1))
    return json.loads(file.read_text(encoding="utf-8"))


def known_scores(state: StudyState, number: int) -> SceneScores:
    """Scores of a configuration; before the end of its study those of the validation views."""
    file = _scores_file(state.plan, number)
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    scores: SceneScores = {}
    for scene, metrics in state.full_results(number).items():
        metrics = metrics or {}
        values = {name: metrics[name] for name in QUALITIES}
        if "val/gain" in metrics:
            before = {"val/psnr": metrics["val/psnr"] - metrics["val/gain"]}
            scores[scene] = {"stage 1": before, "refined": values}
        else:
            scores[scene] = {"stage 1": values}
    return scores


def _scores_file(plan: Plan, number: int) -> Path:
    return plan.folder / f"scores-{number:04d}.json"


def _progress(total: int, label: str, unit: str, *, done: int = 0) -> "tqdm[Any]":
    return tqdm(total=total, initial=done, desc=label, unit=unit, smoothing=0.1, dynamic_ncols=True)


def quieten_libraries() -> None:
    """Ray, Optuna and MLflow say nothing on the screen that the study does not say itself."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Tracebacks: the study tells their last line; of a failed unit error.txt holds the whole.
    for library in ("mlflow", "ray.tune"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # How many trials may wait is up to the searcher.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "100000")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
