"""MLflow: an experiment per study, a run per configuration, a child run per scene.

One writer, on the driver, with explicit run ids. Runs are found again by their tags, so a restarted
study adds to its runs instead of making new ones. Stage-1 runs stand beside, linked by a tag.
"""

import subprocess
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imageio.v3 as iio
from mlflow.entities import Metric, Param, Run, RunTag

from cbnerf.config import flatten_field
from cbnerf.overrides import with_overrides
from cbnerf.search.mlflow_store import legal_key, open_client, open_experiment
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics
from cbnerf.training.checkpoint import CHECKPOINT_FILES, Stage, save_weights
from cbnerf.training.stages import CONFIG_FILE, STRIP_FILE

_ENDED = "cbnerf.ended"
"""Tag of a configuration's run: `finished`, `stopped` or `failed`."""
NOT_COMPARABLE = "built-in scenes: not comparable with the paper"


class Tracker:
    """Writes what happens in a study into its MLflow experiment."""

    def __init__(self, plan: Plan, study_id: str):
        self._plan = plan
        self._study_id = study_id
        self._client = open_client(plan.storage)
        self.experiment_id = open_experiment(
            self._client, plan.name, plan.storage, {"cbnerf.data": plan.source}
        )
        self._fields: dict[str, str] = {}
        self._opened: set[str] = set()
        self._ended: set[str] = set()
        """Keys of fields and units trained to their end and of configurations that are closed."""
        self._runs: dict[str, str] = {}
        """Run ids by key."""
        self._latest: dict[str, dict[str, float]] = {}
        """Last value of each metric, by run id."""
        for run in self._existing_runs():
            key, tags = run.data.tags["cbnerf.key"], run.data.tags
            self._runs[key], self._latest[run.info.run_id] = run.info.run_id, run.data.metrics
            of_training = key.startswith(("field/", "unit/"))
            if _ENDED in tags or (of_training and run.info.status == "FINISHED"):
                self._ended.add(key)

    def log_field(self, scene: str, folder: Path, metrics: dict[str, float]) -> None:
        """A finished stage-1 run, once."""
        key = f"field/{folder.name}"
        if key in self._ended:
            self._fields[scene] = self._runs[key]
            return
        run = self._run(key, f"stage 1 {scene}", {"cbnerf.kind": "field", "cbnerf.scene": scene,
                        "cbnerf.field": folder.name})  # fmt: skip
        self._fields[scene] = run
        stage_1 = flatten_field(self._plan.base)
        precision = {"precision": stage_1["field.precision"]}
        self._log(run, {}, params={"scene": scene, **stage_1, **precision})
        self._log_once(run, metrics, self._plan.base.field.optim.steps)
        self._log_stage(run, folder, "field")
        self._client.set_terminated(run)
        self._ended.add(key)

    def start_unit(self, unit: Unit) -> None:
        """Open the runs of a unit's configuration and scene."""
        number = unit.configuration
        plan = self._plan
        key = _configuration_key(number)
        if key not in self._opened:
            run = self._run(key, f"configuration {number:02d}", {"cbnerf.kind": "configuration"})
            precision = with_overrides(plan.base, unit.overrides).field.precision
            about = {"method": plan.method, "resolution": plan.resolution, "precision": precision}
            self._log(run, {}, params=about | dict(plan.spec.fixed) | unit.overrides)
        if _unit_key(unit) not in self._opened and _unit_key(unit) not in self._ended:
            child = self._run(
                _unit_key(unit), f"{number:02d} {unit.scene}",
                {"cbnerf.kind": "scene", "cbnerf.scene": unit.scene,
                 "cbnerf.field_run": self._fields.get(unit.scene, ""),
                 "mlflow.parentRunId": self._runs[key]},
            )  # fmt: skip
            self._log(child, {}, params={"scene": unit.scene, **unit.overrides})

    def log_step(self, unit: Unit, metrics: Metrics, step: int, node: str = "") -> None:
        """One point of a unit's curves, and the machine that it comes from."""
        tags = {"cbnerf.node": node} if node else {}
        self._log(self._runs[_unit_key(unit)], metrics, step=step, tags=tags)

    def end_unit(self, unit: Unit, metrics: Metrics | None) -> None:
        """Closing values; of a whole training also images and checkpoint. None marks it failed."""
        key = _unit_key(unit)
        run = self._runs[key]
        if metrics is None:
            self._client.set_terminated(run, "FAILED")
            return
        if key in self._ended:
            return
        config = with_overrides(self._plan.base, unit.overrides)
        self._log_once(run, metrics, self._plan.steps(config, unit.rung))
        if unit.rung < self._plan.rungs - 1:
            return
        folder = self._plan.trial_folder(unit.configuration, unit.scene)
        parent, scene = self._runs[_configuration_key(unit.configuration)], legal_key(unit.scene)
        if (folder / STRIP_FILE).exists():  # stage 2 alone makes one
            strip = iio.imread(folder / STRIP_FILE)
            self._client.log_image(run, strip, key=f"{scene}/strip", step=0)
            self._client.log_image(parent, strip, key=f"{scene}/strip", step=0)
        about = {f"{scene}/{name}": metrics[f"val/{name}"]
                 for name in ("psnr", "gain") if f"val/{name}" in metrics}  # fmt: skip
        self._log_once(parent, about, 0)
        self._log_stage(run, folder, self._plan.stage)
        self._client.set_terminated(run)
        self._ended.add(key)

    def explain_failure(self, unit: Unit, reason: str) -> None:
        """Why a unit failed, as the description of its run."""
        self._client.set_tag(self._runs[_unit_key(unit)], "mlflow.note.content", reason)

    def end_configuration(self, number: int, results: dict[str, Metrics | None]) -> None:
        """Mean metrics over the scenes of whole trainings; one that failed on a scene has none."""
        run = self._runs[_configuration_key(number)]
        finished = [metrics for metrics in results.values() if metrics is not None]
        if len(finished) < len(self._plan.trainings):
            self._close(number, "failed", "FAILED")
            return
        means = {name: sum(m[name] for m in finished) / len(finished) for name in finished[0]}
        self._log_once(run, means, 0)
        self._close(number, "finished", "FINISHED")

    def prune_configuration(self, number: int, reason: str) -> None:
        """A configuration that was given up: its open runs end as killed, with the reason."""
        run = self._runs[_configuration_key(number)]
        self._client.set_tag(run, "mlflow.note.content", f"stopped: {reason}")
        for scene in self._plan.trainings:
            key = _unit_key(Unit(number, scene, 0, {}))
            if key in self._runs and key not in self._ended:
                self._client.set_terminated(self._runs[key], "KILLED")
        self._close(number, "stopped", "KILLED")

    def is_closed(self, number: int) -> bool:
        """Whether the end of a configuration has been written down."""
        return _configuration_key(number) in self._ended

    def _close(self, number: int, how: str, status: str) -> None:
        key = _configuration_key(number)
        self._client.set_tag(self._runs[key], _ENDED, how)
        self._client.set_terminated(self._runs[key], status)
        self._ended.add(key)

    def log_report(self, files: list[Path], metrics: dict[str, float]) -> None:
        """The study's closing report."""
        run = self._run("report", "report", {"cbnerf.kind": "report"})
        self._log_once(run, metrics, 0)
        for file in files:
            self._client.log_artifact(run, str(file))
        self._client.set_terminated(run)

    def interrupt(self) -> None:
        """Mark the runs still open as killed; they are opened again when the study goes on."""
        for run in self._existing_runs():
            if run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _run(self, key: str, name: str, tags: dict[str, str]) -> str:
        """The run with this key, opened (again)."""
        self._opened.add(key)
        if key in self._runs:
            self._client.update_run(self._runs[key], status="RUNNING")
            return self._runs[key]
        plan = self._plan
        about = {"cbnerf.key": key, "cbnerf.study": plan.name, "cbnerf.data": plan.source,
                 "cbnerf.study_id": self._study_id}  # fmt: skip
        if plan.data is None:
            about["cbnerf.warning"] = NOT_COMPARABLE
        if commit := _git_commit():
            about["mlflow.source.git.commit"] = commit
        created = self._client.create_run(self.experiment_id, run_name=name, tags=about | tags)
        self._runs[key] = created.info.run_id
        return created.info.run_id

    def _log(
        self,
        run: str,
        metrics: dict[str, float],
        *,
        step: int = 0,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        now = int(time.time() * 1000)
        self._latest.setdefault(run, {}).update(metrics)
        self._client.log_batch(
            run,
            metrics=[Metric(name, value, now, step) for name, value in metrics.items()],
            params=[Param(name, str(value)) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def _log_stage(self, run: str, folder: Path, stage: Stage) -> None:
        """Configuration and weights of a trained stage; Adam's state is twice as large and stays in
        the storage."""
        self._client.log_artifact(run, str(folder / CONFIG_FILE))
        with TemporaryDirectory() as temporary:
            weights = Path(temporary) / CHECKPOINT_FILES[stage]
            save_weights(folder / CHECKPOINT_FILES[stage], stage, weights)
            self._client.log_artifact(run, str(weights))

    def _log_once(self, run: str, metrics: dict[str, float], step: int) -> None:
        """Closing values, which a killed study may have logged in its first life already."""
        logged = self._latest.get(run, {})
        self._log(run, {k: v for k, v in metrics.items() if logged.get(k) != v}, step=step)

    def _existing_runs(self) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id],
                f"tags.`cbnerf.study_id` = '{self._study_id}'",
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs


def _configuration_key(number: int) -> str:
    return f"configuration/{number}"


def _unit_key(unit: Unit) -> str:
    return f"unit/{unit.configuration}/{unit.scene}"


@cache
def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # there is no git
        return None
    return answer.stdout.strip() or None
