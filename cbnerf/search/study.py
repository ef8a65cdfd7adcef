"""Run a study: stage 1 of every scene, then the search, then the report."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray
from ray import tune
from tqdm import tqdm

from cbnerf.config import Config, with_overrides
from cbnerf.search.judge import Metrics
from cbnerf.search.ledger import Ledger, Unit
from cbnerf.search.plan import Plan
from cbnerf.search.report import SceneScores, write_report
from cbnerf.search.searcher import TuneSearcher, unit_metrics
from cbnerf.search.spec import QUALITIES
from cbnerf.search.tracking import Tracker
from cbnerf.search.trial import run_base_field, run_units, score_best

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
        ledger = Ledger(plan)
        tracker = Tracker(plan, ledger.id)
    try:
        _close_runs(ledger, tracker)
        if not ledger.is_over:
            if plan.shares_fields:
                with _timed(seconds, "stage 1"):
                    _train_fields(plan, ledger, tracker)
            with _timed(seconds, "search"):
                _search(plan, ledger, tracker, concurrency)
        else:
            say("all configurations of this study are done; nothing is trained again")
        best = ledger.best()
        if best is None:
            return None
        with _timed(seconds, "scoring and report"):
            config = with_overrides(plan.base, best.params)
            scores = _score_once(plan, config, best.number)
            files = write_report(ledger, config, best.number, scores)
            tracker.log_report(files, dict(zip(plan.spec.objectives, best.values, strict=True)))
        return Outcome(best.number, scores, seconds, tracker.experiment_id)
    except BaseException:
        tracker.interrupt()
        raise


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started


def num_slots(plan: Plan) -> int:
    """Training runs that the cluster's present machines hold at the same time."""
    resources, spec = ray.cluster_resources(), plan.spec.resources
    slots = resources.get("CPU", 0) / (spec.cpus_per_worker * spec.workers)
    if plan.gpus_per_worker:
        slots = min(slots, resources.get("GPU", 0) / (plan.gpus_per_worker * spec.workers))
    return int(slots)


def _train_fields(plan: Plan, ledger: Ledger, tracker: Tracker) -> None:
    run = _remote(plan, run_base_field)
    pending = {run.remote(plan, scene): scene for scene in plan.scenes}
    with _progress(len(pending), "stage 1", "scene") as bar:
        while pending:
            (done,), _ = ray.wait(list(pending))
            folder, metrics = ray.get(done)
            scene = pending.pop(done)
            tracker.log_field(scene, folder, metrics)
            ledger.note_field(scene, metrics["seconds"])
            bar.update()
            if "val/psnr" in metrics:
                bar.write(f"  stage 1  {scene:<12} val {metrics['val/psnr']:.2f} dB")


def _close_runs(ledger: Ledger, tracker: Tracker) -> None:
    """Runs of configurations that had ended when a study was killed before it could say so."""
    for number in ledger.told:
        if not tracker.is_closed(number):
            _close_run(ledger, tracker, number)


def _close_run(ledger: Ledger, tracker: Tracker, number: int) -> None:
    if (stop := ledger.stopped.get(number)) is not None:
        tracker.stop_configuration(number, stop.reason)
    else:
        tracker.end_configuration(number, ledger.whole_results(number))


def _search(plan: Plan, ledger: Ledger, tracker: Tracker, concurrency: int | None) -> None:
    workers = plan.spec.resources.workers
    limit = _Room(plan) if concurrency is None else lambda: concurrency
    with _progress(plan.spec.trials, "search", "configuration", done=ledger.num_told) as bar:
        diary = _Diary(plan, ledger, tracker, bar)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_units, plan=plan), _trial_resources(plan)),
            tune_config=tune.TuneConfig(
                search_alg=TuneSearcher(ledger, diary.end_unit, limit=limit, walk=workers > 1),
                num_samples=plan.num_units - ledger.num_booked,  # At most; the searcher ends it.
                reuse_actors=workers == 1,
            ),
            run_config=tune.RunConfig(
                name="ray_tune",
                storage_path=str(plan.folder),
                failure_config=tune.FailureConfig(max_failures=2),
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
    spec = plan.spec.resources
    if spec.workers > 1:
        # The trainer inside opens a placement group of its own; the trial itself needs none, and
        # a CPU held here could starve it. Ray refuses {"CPU": 0}.
        return {"node:__internal_head__": 0.001}
    resources = {"cpu": float(spec.cpus_per_worker)}
    return resources | ({"gpu": plan.gpus_per_worker} if plan.gpus_per_worker else {})


def _remote(plan: Plan, function: Callable[..., Any]) -> Any:
    """The function as a Ray task with the resources of one training run."""
    spec = plan.spec.resources
    alone = spec.workers == 1
    return ray.remote(function).options(
        num_cpus=spec.cpus_per_worker if alone else 0,
        num_gpus=plan.gpus_per_worker if alone else 0,
        max_retries=2,
    )


def _score_once(plan: Plan, config: Config, number: int) -> SceneScores:
    """Scores of the best configuration; the test views of a configuration are scored once."""
    file = _scores_file(plan, number)
    if not file.exists():
        score = _remote(plan, score_best)
        answers = [score.remote(plan, config, number, scene) for scene in plan.scenes]
        scores = dict(zip(plan.scenes, ray.get(answers), strict=True))
        file.write_text(json.dumps(scores, indent=1))
    return json.loads(file.read_text())


def known_scores(ledger: Ledger, number: int) -> SceneScores:
    """Scores of a configuration; before the end of its study those of the validation views."""
    file = _scores_file(ledger.plan, number)
    if file.exists():
        return json.loads(file.read_text())
    scores: SceneScores = {}
    for scene, metrics in ledger.whole_results(number).items():
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


class _Diary(tune.Callback):
    """Follows the units of a study: progress on the screen, runs in MLflow."""

    def __init__(self, plan: Plan, ledger: Ledger, tracker: Tracker, bar: "tqdm[Any]"):
        self._plan = plan
        self._ledger = ledger
        self._tracker = tracker
        self._bar = bar

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks; this one lives on the driver only.

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for unit in _units(trial):
            self._tracker.start_unit(unit)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "step" in result:
            unit = _units(trial)[result["unit"]]
            self._tracker.note_node(unit, result["hostname"])
            self._tracker.log_step(unit, unit_metrics(result), result["step"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "failure" in trial.last_result:
            self._explain(_units(trial), trial.last_result["failure"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # `trial.get_error` reads a copy in the storage, which Tune makes later.
        *_, last_line = Path(trial.error_file).read_text().strip().splitlines()
        self._explain(_units(trial), last_line)

    def end_unit(self, unit: Unit, metrics: Metrics | None) -> None:
        """Book a unit, in MLflow first: what the ledger has booked is never done again."""
        self._tracker.end_unit(unit, metrics)
        told = self._ledger.num_told
        self._ledger.book(unit, metrics)
        if self._ledger.num_told > told:
            self._end_configuration(unit)

    def _end_configuration(self, unit: Unit) -> None:
        number = unit.configuration
        _close_run(self._ledger, self._tracker, number)
        self._bar.update(self._ledger.num_told - self._bar.n)
        self._announce(unit)

    def _explain(self, units: list[Unit], reason: str) -> None:
        reason = " ".join(reason.split())[-300:]
        for unit in units:
            self._tracker.explain_failure(unit, reason)
        scenes = ", ".join(unit.scene for unit in units)
        self._bar.write(f"  #{units[0].configuration:02d}  {scenes} failed: {reason}")

    def _announce(self, unit: Unit) -> None:
        best, stop = self._ledger.best(), self._ledger.stopped.get(unit.configuration)
        trial = self._ledger.study.get_trials(deepcopy=False)[unit.configuration]
        if stop is not None:
            value = f"stopped, {stop.reason}"
        elif trial.values is None:
            value = "failed"
        else:
            value = " ".join(f"{value:.3f}" for value in trial.values)
        mark = " *" if best is not None and best.number == trial.number else ""
        knobs = " ".join(
            f"{name.split('.')[-1]}={setting:.3g}" if isinstance(setting, float)
            else f"{name.split('.')[-1]}={setting}"
            for name, setting in unit.overrides.items()
        )  # fmt: skip
        self._bar.write(f"  #{unit.configuration:02d}  {value}{mark}  {knobs}")


def _units(trial: Any) -> list[Unit]:
    """The units of a Tune trial."""
    return [Unit(**unit) for unit in trial.config["units"]]


def _progress(total: int, label: str, unit: str, *, done: int = 0) -> "tqdm[Any]":
    return tqdm(total=total, initial=done, desc=label, unit=unit, smoothing=0.1, dynamic_ncols=True)


def check_space(storage: Path, needed: int) -> None:
    """Refuse to start on a disk that cannot hold the results; `needed` in bytes."""
    storage.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(storage).free
    if free < needed:
        raise ValueError(
            f"{storage}: {free / 1e6:.0f} MB free, the study needs about {needed / 1e6:.0f} MB; "
            "make room or give another --storage"
        )


def quieten_libraries() -> None:
    """Ray, Optuna and MLflow say nothing on the screen that the study does not say itself."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Tracebacks of failed units: the study tells their last line, error.txt holds the whole.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # How many trials may wait is up to the searcher.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "100000")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
