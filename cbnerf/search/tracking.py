"""MLflow: an experiment per study, a run per configuration, a child run per scene.

The state of the search and the trial folders determine the content of the runs; `Tracker.sync`
writes what is missing. Runs are found by the tag `cbnerf.key`:

    report                       the closing report
    field/ENTRY                  stage 1 of a scene, by its cache entry
    configuration/NUMBER         closed once it has the tag `outcome`
    unit/NUMBER/SCENE            all rungs of a configuration on a scene; a child of the former

Start and end of a run are those of the training. Only failures are FAILED: pruned configurations
are FINISHED, with the tag `outcome` set to `pruned`.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imageio.v3 as iio
from mlflow.entities import Metric

from cbnerf.config import flatten_field
from cbnerf.search.champion import register_champion
from cbnerf.search.curves import Point, first_and_last, read_curves
from cbnerf.search.dataset_inputs import SCORING, TRAINING, scene_inputs
from cbnerf.search.mlflow_store import legal_key, open_client, open_experiment
from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.runs import TrackedRun, find_runs, git_commit
from cbnerf.search.state import StudyState
from cbnerf.training.checkpoint import CHECKPOINT_FILES, Stage, save_weights
from cbnerf.training.stages import CONFIG_FILE, METRICS_FILE, STRIP_FILE, read_metrics

_OUTCOME, _REASON = "outcome", "outcome_reason"
"""Tags of a configuration or a unit: `finished`, `pruned`, `failed`, or `stopped` if the
configuration failed on another scene; and the reason."""
_BEST = "best"
"""Tag of the run of the best configuration."""
_PROGRAM = "tune.py"
_NOTE = "mlflow.note.content"
NOT_COMPARABLE = "built-in scenes: not comparable with the paper"


class Tracker:
    """Keeps the MLflow experiment of a study up to date."""

    def __init__(self, state: StudyState):
        """Raises ValueError if MLflow does not answer."""
        self._state, self._plan = state, state.plan
        self._client = open_client(self._plan.storage)
        self.experiment_id = open_experiment(
            self._client, self._plan.name, self._plan.storage, {"cbnerf.data": self._plan.source}
        )
        self._runs: dict[str, TrackedRun] = {}
        self._is_loaded = False
        self._opened: set[str] = set()
        """Keys of the units whose runs have been opened since the runs were loaded."""
        self._open: set[int] = set()
        """Configurations with a run that is not closed."""
        self._num_restored = len(state.recorded)
        self.num_written = 0
        """Number of the state's recorded units that MLflow has received."""
        self._num_failures = 0

    def sync(self) -> None:
        """Write what is missing in MLflow. After an error the next call completes the work.

        May run in another thread than the search. The number of calls of MLflow grows with the
        changes since the last sync, not with the size of the study.
        """
        try:
            self._load()
            self._sync()
        except BaseException:
            self._is_loaded = False  # MLflow may have carried out a call that failed.
            raise

    def log_report(self, files: list[Path], metrics: Metrics, since: float) -> None:
        """Write the closing report of the study, begun `since` (seconds since 1970)."""
        self._load()
        run = self._run("report", "report", {"cbnerf.kind": "report"}, {}, int(since * 1000))
        for training in self._plan.trainings:
            run.add_inputs(scene_inputs(self._plan, training, SCORING))
        run.write(_metrics(metrics, 0))
        for file in files:
            self._client.log_artifact(run.id, str(file))
        run.set_status("FINISHED")

    def register_champion(self, number: int) -> str | None:
        """`champion.register_champion` of a configuration."""
        self._load()
        run = self._runs[_configuration_key(number)]
        return register_champion(self._client, self._state, number, run.id)

    def interrupt(self) -> None:
        """Mark open runs as killed; `sync` reopens them when the study resumes."""
        for run in find_runs(self._client, self.experiment_id, self._state.id):
            if run.status == "RUNNING":
                run.set_status("KILLED")

    def _load(self) -> None:
        if not self._is_loaded:
            runs = find_runs(self._client, self.experiment_id, self._state.id)
            self._runs = {run.tags["cbnerf.key"]: run for run in runs}
            self._opened, self._is_loaded = set(), True

    def _sync(self) -> None:
        for scene, entry in self._state.fields.items():
            self._write_field(scene, entry)
        for unit in self._state.in_flight():
            if points := self._curves(unit):
                _write_curves(self._open_unit(unit), points)
        for unit, metrics in self._state.recorded[self.num_written :]:
            is_new = self.num_written >= self._num_restored
            if is_new or not self._is_closed(unit.configuration):
                self._write_unit(unit, metrics)
            self.num_written += 1
        for unit, reason in self._state.failures[self._num_failures :]:
            self._open_unit(unit).write(tags={_NOTE: reason, _REASON: reason})
            self._num_failures += 1
        ended = [number for number in sorted(self._open) if self._state.has_ended(number)]
        # The search continues in another thread; a configuration with a new unit is closed later.
        pending = {unit.configuration for unit, _ in self._state.recorded[self.num_written :]}
        for number in ended:
            if number not in pending:
                self._close(number)
        self._mark_best()

    def _write_field(self, scene: str, entry: str) -> None:
        folder, key = self._plan.cache.folder / entry, f"field/{entry}"
        known = self._runs.get(key)
        if known is not None and known.status == "FINISHED":
            return
        if (metrics := read_metrics(folder)) is None:
            return  # The entry was removed from the cache.
        tags = {"cbnerf.kind": "field", "cbnerf.scene": scene, "cbnerf.field": entry}
        knobs = flatten_field(self._plan.base)
        params = {"scene": scene, **knobs, "precision": knobs["field.precision"]}
        ended = int((folder / METRICS_FILE).stat().st_mtime * 1000)
        started = ended - int(metrics["seconds"] * 1000)
        run = self._run(key, f"stage 1 {scene}", tags, params, started)
        run.add_inputs(scene_inputs(self._plan, scene, TRAINING))
        run.write(_metrics(metrics, int(metrics["steps"])))
        self._log_stage(run, folder, "field")
        run.set_status("FINISHED", ended)

    def _open_unit(self, unit: Unit) -> TrackedRun:
        """The run of a unit, and of its configuration; RUNNING unless the latter is closed."""
        plan, number = self._plan, unit.configuration
        key = _unit_key(number, unit.scene)
        if key in self._opened:
            return self._runs[key]
        precision = plan.config_of(unit).field.precision
        about = {"method": plan.method, "resolution": plan.resolution, "precision": precision}
        started, _ = first_and_last(self._curves(unit))
        parent = self._run(
            _configuration_key(number), f"configuration {number:02d}",
            {"cbnerf.kind": "configuration"}, about | dict(plan.spec.fixed) | unit.overrides,
            started,
        )  # fmt: skip
        field = self._runs.get(f"field/{self._state.fields.get(unit.scene)}")
        child = self._run(
            key, f"{number:02d} {unit.scene}",
            {"cbnerf.kind": "scene", "cbnerf.scene": unit.scene, "mlflow.parentRunId": parent.id,
             "cbnerf.field_run": field.id if field else ""},
            {"scene": unit.scene, **unit.overrides}, started,
        )  # fmt: skip
        for run in (parent, child):
            run.add_inputs(scene_inputs(plan, unit.scene, TRAINING))
        if not self._is_closed(number):
            self._open.add(number)
            for run in (parent, child):
                if run.status == "KILLED":
                    run.set_status("RUNNING")
        self._opened.add(key)
        return child

    def _write_unit(self, unit: Unit, metrics: Metrics | None) -> None:
        """Write curves and metrics of a recorded unit; of a full training also its files."""
        run = self._open_unit(unit)
        if run.tags.get(_OUTCOME) == "finished":
            return
        points = self._curves(unit)
        _, ended = first_and_last(points)
        _write_curves(run, points)
        if metrics is None:
            run.set_status("FAILED", ended)
            run.write(tags={_OUTCOME: "failed"})
            return
        run.write(_metrics(metrics, int(metrics["steps"])))
        if unit.rung == self._plan.rungs - 1:
            self._write_results(run, unit, metrics)
            run.set_status("FINISHED", ended)
            run.write(tags={_OUTCOME: "finished"})
        elif self._is_closed(unit.configuration):
            self._stop(run, unit.configuration, ended)

    def _write_results(self, run: TrackedRun, unit: Unit, metrics: Metrics) -> None:
        folder = self._plan.trial_folder(unit.configuration, unit.scene)
        parent, scene = self._runs[_configuration_key(unit.configuration)], legal_key(unit.scene)
        if (folder / STRIP_FILE).exists():  # not of fields of earlier versions
            strip = iio.imread(folder / STRIP_FILE)
            for target in (run, parent):
                self._client.log_image(target.id, strip, key=f"val_{scene}/strip", step=0)
        names = [name for name in ("psnr", "gain") if f"val/{name}" in metrics]
        parent.write(_metrics({f"val_{scene}/{name}": metrics[f"val/{name}"] for name in names}, 0))
        self._log_stage(run, folder, self._plan.stage)

    def _close(self, number: int) -> None:
        """Write the end of a configuration, with the means over its scenes if all have finished."""
        parent = self._runs[_configuration_key(number)]
        finished = [m for m in self._state.full_results(number).values() if m is not None]
        tags, status = {_OUTCOME: "finished"}, "FINISHED"
        if (pruned := self._state.pruned.get(number)) is not None:
            tags = {_OUTCOME: "pruned", _REASON: pruned.reason, _NOTE: f"pruned: {pruned.reason}"}
        elif len(finished) < len(self._plan.trainings):
            tags, status = {_OUTCOME: "failed"}, "FAILED"
        else:
            means = {
                name: sum(metrics[name] for metrics in finished) / len(finished)
                for name in finished[0]
                if name.startswith("val/") or "/" not in name  # a child has all of a training
            }
            parent.write(_metrics(means, 0))
        ends = []
        for training in self._plan.trainings:
            if child := self._runs.get(_unit_key(number, training)):
                _, ended = first_and_last(read_curves(self._plan.trial_folder(number, training)))
                ends += [ended] if ended else []
                if child.status == "RUNNING":
                    self._stop(child, number, ended)
        parent.set_status(status, max(ends, default=None))
        parent.write(tags=tags)  # Last: it marks the run as complete.
        self._open.discard(number)

    def _stop(self, run: TrackedRun, number: int, ended: int | None) -> None:
        """End the run of a unit that is not trained further because its configuration has ended."""
        run.set_status("FINISHED", ended)
        run.write(tags={_OUTCOME: "pruned" if number in self._state.pruned else "stopped"})

    def _mark_best(self) -> None:
        """Move the tag `best` to the best configuration once its run is closed."""
        best = self._state.best()
        if best is None or not self._is_closed(best.number):
            return
        chosen = _configuration_key(best.number)
        for key, run in self._runs.items():
            if key != chosen:
                run.remove_tag(_BEST)
        self._runs[chosen].write(tags={_BEST: "true"})

    def _is_closed(self, number: int) -> bool:
        run = self._runs.get(_configuration_key(number))
        return run is not None and _OUTCOME in run.tags

    def _curves(self, unit: Unit) -> list[Point]:
        return read_curves(self._plan.trial_folder(unit.configuration, unit.scene))

    def _run(
        self, key: str, name: str, tags: dict[str, str], params: dict[str, Any], start: int | None
    ) -> TrackedRun:
        """The run with this key; a new one begins at `start` (milliseconds since 1970)."""
        if key not in self._runs:
            plan = self._plan
            tags |= {"cbnerf.key": key, "cbnerf.study": plan.name, "cbnerf.data": plan.source}
            tags |= {"cbnerf.study_id": self._state.id, "mlflow.source.name": _PROGRAM}
            if plan.data is None:
                tags["cbnerf.warning"] = NOT_COMPARABLE
            if commit := git_commit():
                tags["mlflow.source.git.commit"] = commit
            created = self._client.create_run(self.experiment_id, start, tags, name)
            self._runs[key] = TrackedRun(self._client, created)
        self._runs[key].write(params=params)
        return self._runs[key]

    def _log_stage(self, run: TrackedRun, folder: Path, stage: Stage) -> None:
        """Log configuration and weights of a trained stage, without the optimizer's state, which is
        twice as large."""
        self._client.log_artifact(run.id, str(folder / CONFIG_FILE))
        with TemporaryDirectory() as temporary:
            weights = Path(temporary) / CHECKPOINT_FILES[stage]
            save_weights(folder / CHECKPOINT_FILES[stage], stage, weights)
            self._client.log_artifact(run.id, str(weights))


def _write_curves(run: TrackedRun, points: list[Point]) -> None:
    metrics = [
        Metric(name, value, p.time, p.step) for p in points for name, value in p.metrics.items()
    ]
    run.write(
        metrics, tags={"cbnerf.node": max(points, key=lambda p: p.time).node} if points else {}
    )


def _metrics(metrics: Metrics, step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(name, value, now, step) for name, value in metrics.items()]


def _configuration_key(number: int) -> str:
    return f"configuration/{number}"


def _unit_key(number: int, scene: str) -> str:
    return f"unit/{number}/{scene}"
