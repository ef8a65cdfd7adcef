"""Run a study: stage 1 of every scene, then the search, then the report."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from traceback import format_exception
from typing import Any, NamedTuple

import optuna
import torch
from mlflow.exceptions import MlflowException
from ray import tune
from tqdm import tqdm

from cbnerf.nerf.model import AUTO_PRECISION, Precision
from cbnerf.overrides import with_overrides
from cbnerf.search.estimate import measure_share, part_of_gpu
from cbnerf.search.machines import num_slots, worker_resources
from cbnerf.search.periodic import repeated
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.report import SceneScores, score_once, write_report
from cbnerf.search.searcher import Recorder, TuneSearcher
from cbnerf.search.standing import find_standing
from cbnerf.search.state import StudyState
from cbnerf.search.status import StatusLine
from cbnerf.search.tasks import call, for_each, for_each_scene, is_of_memory, reason
from cbnerf.search.tracking import Tracker
from cbnerf.search.worker import (
    MAX_FAILURES,
    UnitTrainable,
    find_precision_here,
    retrain,
    run_base_field,
    run_units_together,
)
from cbnerf.training.checkpoint import Stage

_FIRST_WAITING = 8
"""Training runs that are submitted while no machine has joined."""


class Outcome(NamedTuple):
    """Result of a study."""

    best: int
    """Number of the best configuration."""
    standing: str
    """Its lead and its ties, in words."""
    scores: SceneScores
    """Scores of the best configuration."""
    seconds: dict[str, float]
    """Wall-clock seconds of each phase of this run."""
    experiment_id: str
    """MLflow experiment."""
    model: str | None
    """Address of the best configuration in MLflow's registry of models."""


def run_study(
    plan: Plan, say: Callable[[str], None], concurrency: int | None = None, confirm: int = 0
) -> Outcome | None:
    """Run the remaining units of a study on the initialised Ray; None if all configurations failed.

    At most `concurrency` training runs are submitted at a time; by default twice as many as the
    machines hold, so that an autoscaler adds machines for those that wait. The leaders are trained
    again with `confirm` other seeds. `say` prints a line.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "storage"):
        state = StudyState(plan)
        tracker = Tracker(state)
    try:
        with repeated(tracker.sync):
            if state.is_over:
                say("all configurations of this study are done; nothing is trained again")
            else:
                _train(plan, state, seconds, concurrency)
            if missing := state.confirmation.missing(state.leaders(), confirm):
                with _timed(seconds, "confirmation"):
                    _confirm(_sharing_gpus(plan, (plan.stage,)), state, missing)
        best, standing = state.best(), find_standing(state)
        if best is None or standing is None:
            return None
        since = time.time()
        with _timed(seconds, "scoring and report"):
            config = with_overrides(plan.base, best.params)
            scores = score_once(plan, config, best.number)
            files = write_report(state, config, best.number, scores)
            reached: Metrics = dict(zip(plan.spec.objectives, best.values, strict=True))
            tracker.log_report(files, reached, since)
            model = tracker.register_champion(best.number)
        return Outcome(
            best.number, standing.describe(), scores, seconds, tracker.experiment_id, model
        )
    except BaseException:
        with suppress(MlflowException):  # MLflow may have failed for the same reason.
            tracker.interrupt()
        raise


def _train(
    plan: Plan, state: StudyState, seconds: dict[str, float], concurrency: int | None
) -> None:
    """Stage 1 if the configurations share it, then the search."""
    own: tuple[Stage, ...] = ("field",)
    if plan.shares_fields:
        own = ()
        with _timed(seconds, "stage 1"):
            _train_fields(_sharing_gpus(plan, ("field",)), state)
    with _timed(seconds, "search"):
        _search(_sharing_gpus(plan, (*own, plan.stage)), state, concurrency)


def _confirm(plan: Plan, state: StudyState, missing: list[tuple[Unit, int]]) -> None:
    """Train units again with other seeds."""
    calls = {f"{unit.key}, seed {seed}": (unit, seed) for unit, seed in missing}
    results = for_each(plan, retrain, calls, trains=True)
    for name, metrics in tqdm(results, "confirmation", len(calls), disable=None):
        state.confirmation.record(*calls[name], metrics)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started


def _sharing_gpus(plan: Plan, stages: Sequence[Stage]) -> Plan:
    """With `gpus_per_worker: auto`, the plan with the part of a GPU that training these stages was
    measured to need; unchanged (a quarter) if no GPU can be measured."""
    resources = plan.spec.resources
    if not plan.gpus_per_worker or resources.together or resources.gpus_per_worker != "auto":
        return plan
    try:
        share = call(replace(plan, gpus_per_worker=1), measure_share, stages)
    except torch.OutOfMemoryError:
        share = 1.0  # A whole GPU does not suffice either; training will fail with the reason.
    return plan if share is None else replace(plan, gpus_per_worker=part_of_gpu(share))


def find_precision(plan: Plan) -> Precision:
    """The precision that `field.precision` means on a training machine. A study keeps it on all
    machines, so that its configurations refine the same renders."""
    if plan.base.field.precision != "auto" or AUTO_PRECISION in os.environ:
        return find_precision_here(plan)
    return call(plan, find_precision_here)


def _train_fields(plan: Plan, state: StudyState) -> None:
    with _progress(len(plan.scenes), "stage 1", "scene") as bar:
        for scene, (folder, metrics) in for_each_scene(plan, run_base_field, trains=True):
            state.record_field(scene, folder.name, metrics["seconds"])
            bar.update()
            if "val/psnr" in metrics:
                bar.write(f"  stage 1  {scene:<12} val {metrics['val/psnr']:.2f} dB")


def _search(plan: Plan, state: StudyState, concurrency: int | None) -> None:
    limit = _Capacity(plan) if concurrency is None else lambda: concurrency
    bar = _progress(plan.spec.trials, "search", "configuration", done=state.num_ended)
    with bar, StatusLine(state, plan) as line:
        recorder = Recorder(state, bar)
        while True:
            walks = plan.spec.resources.together
            searcher = TuneSearcher(state, recorder.end_unit, limit=limit, walk=walks)
            try:
                return _tune(plan, searcher, [recorder, line])
            except Exception as error:
                # If Ray kills the process of a trial for memory, Tune ends with a RuntimeError.
                trouble = "".join(format_exception(error))
                if not is_of_memory(trouble):
                    raise
                named, others = searcher.unfinished(trouble)
                for unit in others:
                    state.release(unit)
                again = not searcher.was_alone(trouble)  # others may have taken the memory
                for unit in named:
                    recorder.lose_unit(unit, reason(trouble), again=again)


def _tune(plan: Plan, searcher: TuneSearcher, callbacks: list[tune.Callback]) -> None:
    trainable = run_units_together if plan.spec.resources.together else UnitTrainable
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, plan=plan), _trial_resources(plan)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,  # The searcher ends the search.
            reuse_actors=not plan.spec.resources.together,
        ),
        run_config=tune.RunConfig(
            name="ray_tune",
            storage_path=str(plan.folder),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            # Units keep checkpoints of their own in the trial folders.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    tuner.fit()


class _Capacity:
    """Twice the number of training runs that the machines hold, cached for some seconds because
    Tune calls it in every iteration of its loop."""

    def __init__(self, plan: Plan):
        self._plan, self._size, self._until = plan, 0, 0.0

    def __call__(self) -> int:
        if time.monotonic() > self._until:
            self._size = max(2 * num_slots(self._plan), _FIRST_WAITING)
            self._until = time.monotonic() + 10
        return self._size


def _trial_resources(plan: Plan) -> dict[str, float]:
    if plan.spec.resources.together:
        # The trainer opens its own placement group; a CPU reserved here could starve it. Ray
        # refuses {"CPU": 0}.
        return {"node:__internal_head__": 0.001}
    return {name.lower(): float(amount) for name, amount in worker_resources(plan).items()}


def _progress(total: int, label: str, unit: str, *, done: int = 0) -> "tqdm[Any]":
    """A bar in a terminal; `StatusLine` shows the remaining time."""
    return tqdm(
        total=total, initial=done, desc=label, unit=f" {unit}s", dynamic_ncols=True, disable=None,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}]",
    )  # fmt: skip


def quieten_libraries() -> None:
    """Silence Ray, Optuna and MLflow; the study prints what concerns its user."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # These log tracebacks. The study prints their last line; Tune keeps them in error.txt.
    for library in ("mlflow", "ray.tune"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # The searcher limits the number of pending trials.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "100000")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
