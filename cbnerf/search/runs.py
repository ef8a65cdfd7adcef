"""Runs of MLflow with idempotent writing."""

import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag

_BATCH = 800


def find_runs(client: MlflowClient, experiment_id: str, study_id: str) -> "list[TrackedRun]":
    """All runs of a study."""
    runs: list[TrackedRun] = []
    token = None
    while token != "":
        page = client.search_runs(
            [experiment_id], f"tags.`cbnerf.study_id` = '{study_id}'", page_token=token
        )
        runs += [TrackedRun(client, run) for run in page]
        token = page.token or ""
    return runs


class TrackedRun:
    """A run and its content in MLflow as far as it is known; writes only what is new."""

    def __init__(self, client: MlflowClient, run: Run):
        self._client, self.id, self.status = client, run.info.run_id, run.info.status
        self.tags = dict(run.data.tags)
        self._params = set(run.data.params)
        self._metrics = list(run.data.metrics)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        self._inputs = {(one.dataset.name, one.dataset.digest) for one in inputs}
        self._points: dict[tuple[str, int], float] | None = None

    def write(
        self,
        points: Sequence[Metric] = (),
        *,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        """Add points, parameters and tags that have not been logged. A metric has one point per
        step; only a summary, at step 0, gets another one when it changes."""
        known = self._known_points() if points else {}
        points = [
            p for p in points
            if (p.key, p.step) not in known or (p.step == 0 and known[p.key, 0] != p.value)
        ]  # fmt: skip
        params = {k: str(v) for k, v in (params or {}).items() if k not in self._params}
        tags = {k: v for k, v in (tags or {}).items() if self.tags.get(k) != v}
        if points or params or tags:
            log_batch(self._client, self.id, points, params, tags)
            known.update({(p.key, p.step): p.value for p in points})
            self._params.update(params)
            self.tags.update(tags)

    def add_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        """Add datasets that have not been logged."""
        new = {(i.dataset.name, i.dataset.digest): i for i in inputs}
        new = {key: one for key, one in new.items() if key not in self._inputs}
        if new:
            self._client.log_inputs(self.id, list(new.values()))
            self._inputs.update(new)

    def remove_tag(self, name: str) -> None:
        if name in self.tags:
            self._client.delete_tag(self.id, name)
            del self.tags[name]

    def set_status(self, status: str, end_time: int | None = None) -> None:
        """Change the status; `end_time` of a run that ends is in milliseconds, by default now."""
        if status == self.status:
            return
        if status == "RUNNING":
            self._client.update_run(self.id, status=status)
        else:
            self._client.set_terminated(self.id, status, end_time)
        self.status = status

    def _known_points(self) -> dict[tuple[str, int], float]:
        if self._points is None:
            histories = [self._client.get_metric_history(self.id, name) for name in self._metrics]
            self._points = {(p.key, p.step): p.value for history in histories for p in history}
        return self._points


def log_batch(
    client: MlflowClient,
    run_id: str,
    metrics: Sequence[Metric],
    params: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log any number of metrics; MLflow takes 1000 values at a time."""
    client.log_batch(
        run_id,
        metrics[:_BATCH],
        [Param(name, value) for name, value in params.items()],
        [RunTag(name, value) for name, value in (tags or {}).items()],
    )
    for start in range(_BATCH, len(metrics), _BATCH):
        client.log_batch(run_id, metrics[start : start + _BATCH])


@cache
def git_commit() -> str | None:
    """The commit of this code; None outside of a repository."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # there is no git
        return None
    return answer.stdout.strip() or None
