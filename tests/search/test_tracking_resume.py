"""Tracking of studies that are interrupted, fail or prune, in a real SQLite store; no training."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tracked import (
    Leave,
    begin,
    files_of,
    finished,
    runs_of,
    statuses_of,
    steps_of,
    train,
)

from cbnerf.search.mlflow_store import tracking_uri
from cbnerf.search.plan import Plan
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import Tracker

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]


def everything(plan: Plan) -> list[Any]:
    return [
        (run.to_dictionary(), files_of(plan, run), files_of(plan, run, "images"),
         [steps_of(plan, run, name) for name in run.data.metrics])
        for run in runs_of(plan).values()
    ]  # fmt: skip


def test_a_restarted_study_adds_to_its_runs(plan: Plan, leave_unit: Leave):
    first = finished(plan, leave_unit)
    begin(first, {5: 5.0})
    Tracker(first).sync()
    before = runs_of(plan)
    # A killed process has left half a line; the next one repeats a step.
    folder = plan.trial_folder(1, "arcade")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"node": "left", "ti')
    second = StudyState(plan)
    tracker = Tracker(second)
    begin(second, {5: 6.0, 10: 9.0})
    tracker.sync()
    after = runs_of(plan)
    assert {key: run.info.run_id for key, run in after.items()} == {
        key: run.info.run_id for key, run in before.items()
    }
    assert steps_of(plan, after["unit/1/arcade"], "val/psnr") == [(5, 5.0), (10, 9.0)]
    assert after["configuration/0"].info.status == "FINISHED"


def test_what_a_killed_driver_missed_is_written_once(race: Plan, leave_unit: Leave):
    state = StudyState(race)
    for _ in range(5):  # The second configuration is pruned after one unit.
        worse = 3 * len(state.ended)
        train(state, leave_unit, 20.0 - worse)
    begin(state, {1: 3.0})
    Tracker(state).sync()
    before = everything(race)
    runs = runs_of(race)
    assert runs["configuration/0"].info.status == "FINISHED"
    assert runs["configuration/0"].data.metrics["val_arcade/psnr"] == 20.0
    for scene in race.scenes:
        assert runs[f"unit/0/{scene}"].info.status == "FINISHED"
        assert runs[f"unit/0/{scene}"].data.metrics["val/psnr"] == 20.0
    assert list(state.pruned) == [1]
    (pruned,) = [unit for unit, _ in state.recorded if unit.configuration == 1]
    child = runs[f"unit/1/{pruned.scene}"]
    assert child.data.metrics["val/psnr"] == 17.0
    assert child.data.params["codebook.size"] == str(pruned.overrides["codebook.size"])
    ends = {(r.info.status, r.data.tags["outcome"]) for key, r in runs.items() if "/1" in key}
    assert ends == {("FINISHED", "pruned")}
    again = StudyState(race)
    again.next_unit()
    Tracker(again).sync()
    assert str(everything(race)) == str(before)


def test_a_new_study_leaves_the_runs_of_its_namesake_alone(make_tracked_plan, leave_unit: Leave):
    plan = make_tracked_plan()
    Tracker(finished(plan, leave_unit)).sync()
    shutil.rmtree(plan.folder)
    space = {"codebook.size": {"choices": [1024]}, "codebook.beta": {"choices": [0.5]}}
    state = StudyState(make_tracked_plan(space=space))
    begin(state)
    tracker = Tracker(state)
    tracker.sync()
    client = MlflowClient(tracking_uri(plan.storage))
    runs = client.search_runs([tracker.experiment_id], "tags.`cbnerf.key` = 'configuration/0'")
    assert {run.data.params["codebook.size"] for run in runs} == {"64", "1024"}


def test_an_interrupt_marks_open_runs_as_killed(plan: Plan, leave_unit: Leave):
    state = finished(plan, leave_unit)
    begin(state)
    tracker = Tracker(state)
    tracker.sync()
    tracker.interrupt()
    assert statuses_of(plan) == {
        "configuration/0": "FINISHED", "unit/0/arcade": "FINISHED", "unit/0/blinds": "FINISHED",
        "configuration/1": "KILLED", "unit/1/arcade": "KILLED",
    }  # fmt: skip
    again = StudyState(plan)
    begin(again)
    Tracker(again).sync()
    statuses = statuses_of(plan)
    assert {statuses[key] for key in ("configuration/1", "unit/1/arcade")} == {"RUNNING"}


def test_a_failed_unit_fails_its_configuration_with_its_reason(plan: Plan, leave_unit: Leave):
    state = StudyState(plan)
    train(state, leave_unit)
    unit = begin(state, {5: 1.0})
    tracker = Tracker(state)
    tracker.sync()
    state.record(unit, None)
    tracker.sync()  # Its reason may come later.
    state.explain(unit, "train/loss not finite")
    Tracker(StudyState(plan)).sync()
    runs = runs_of(plan)
    assert runs["unit/0/arcade"].info.status == "FINISHED"
    assert runs["unit/0/blinds"].info.status == "FAILED"
    assert runs["unit/0/blinds"].data.tags["mlflow.note.content"] == "train/loss not finite"
    assert steps_of(plan, runs["unit/0/blinds"], "val/psnr") == [(5, 1.0)]
    assert runs["configuration/0"].info.status == "FAILED"
    outcomes = {key: run.data.tags["outcome"] for key, run in runs.items()}
    assert outcomes == {
        "configuration/0": "failed", "unit/0/arcade": "finished", "unit/0/blinds": "failed",
    }  # fmt: skip
    assert runs["unit/0/blinds"].data.tags["outcome_reason"] == "train/loss not finite"
    assert "val/psnr" not in runs["configuration/0"].data.metrics


def test_only_what_failed_looks_like_a_failure(race: Plan, leave_unit: Leave):
    state = StudyState(race)
    train(state, leave_unit)
    state.record(begin(state), None)
    Tracker(state).sync()
    assert statuses_of(race) == {
        "configuration/0": "FAILED", "unit/0/arcade": "FINISHED", "unit/0/blinds": "FAILED",
    }  # fmt: skip
    assert runs_of(race)["unit/0/arcade"].data.tags["outcome"] == "stopped"


def test_a_pruned_configuration_is_no_failure_and_a_late_unit_opens_nothing(
    race: Plan, leave_unit: Leave
):
    state = StudyState(race)
    for _ in range(4):
        train(state, leave_unit, 20.0)
    tracker = Tracker(state)
    metrics = {"val/psnr": 1.0, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.0, "steps": 10}
    early, late = begin(state), begin(state)
    while late.configuration != early.configuration:
        late = begin(state)
    tracker.sync()
    state.record(early, metrics)
    tracker.sync()
    runs = runs_of(race)
    assert {runs[key].info.status for key in ("configuration/1", "unit/1/arcade")} == {"FINISHED"}
    tags = runs["configuration/1"].data.tags
    assert tags["outcome"] == runs["unit/1/arcade"].data.tags["outcome"] == "pruned"
    assert "to beat #00" in tags["outcome_reason"] and "pruned: " in tags["mlflow.note.content"]
    state.record(late, metrics | {"val/psnr": 2.0})
    tracker.sync()
    run = runs_of(race)[f"unit/1/{late.scene}"]
    assert run.info.status == "FINISHED" and run.data.metrics["val/psnr"] == 2.0
    assert run.data.tags["outcome"] == "pruned"


def test_a_configuration_that_ends_during_a_sync_is_closed_with_all_its_units(
    plan: Plan, leave_unit: Leave, monkeypatch: pytest.MonkeyPatch
):
    state = StudyState(plan)
    train(state, leave_unit)
    tracker = Tracker(state)
    write_unit = tracker._write_unit

    def write_while_the_search_goes_on(*about: Any) -> None:
        write_unit(*about)
        if len(state.recorded) == 1:
            train(state, leave_unit)

    monkeypatch.setattr(tracker, "_write_unit", write_while_the_search_goes_on)
    tracker.sync()
    assert statuses_of(plan) == {"configuration/0": "RUNNING", "unit/0/arcade": "FINISHED"}
    tracker.sync()
    assert set(statuses_of(plan).values()) == {"FINISHED"} and len(statuses_of(plan)) == 3


def test_a_sync_that_fails_at_any_call_is_completed_by_the_next(
    plan: Plan, leave_unit: Leave, monkeypatch: pytest.MonkeyPatch
):
    """Whether a failed call was carried out or not, nothing is missing and nothing is doubled."""
    state = finished(plan, leave_unit)
    begin(state, {5: 5.0})
    tracker, calls = Tracker(state), 0

    def failing(name: str, carried_out: bool) -> Callable[..., Any]:
        real = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 2:
                return real(*args, **kwargs)
            if carried_out:
                real(*args, **kwargs)
            raise MlflowException("no server answers")

        return call

    with monkeypatch.context() as patched:
        for name, done in (("create_run", True), ("log_batch", True), ("set_terminated", False)):
            patched.setattr(MlflowClient, name, failing(name, done))
        for _ in range(100):
            try:
                tracker.sync()
                break
            except MlflowException:
                continue
    Tracker(state).sync()
    assert statuses_of(plan) == {
        "configuration/0": "FINISHED", "unit/0/arcade": "FINISHED", "unit/0/blinds": "FINISHED",
        "configuration/1": "RUNNING", "unit/1/arcade": "RUNNING",
    }  # fmt: skip
    runs = runs_of(plan)
    assert steps_of(plan, runs["unit/0/arcade"], "val/psnr") == [(5, 10.0), (10, 20.0)]
    assert steps_of(plan, runs["unit/1/arcade"], "val/psnr") == [(5, 5.0)]
    assert steps_of(plan, runs["configuration/0"], "val/psnr") == [(0, 21.0)]


def test_a_sync_without_changes_calls_nothing(
    plan: Plan, leave_unit: Leave, monkeypatch: pytest.MonkeyPatch
):
    state = finished(plan, leave_unit)
    begin(state, {5: 5.0})
    tracker = Tracker(state)
    tracker.sync()
    monkeypatch.setattr(tracker, "_client", None)
    for run in tracker._runs.values():
        monkeypatch.setattr(run, "_client", None)
    tracker.sync()
