"""The tracker against a real SQLite store; no training."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from cbnerf.overrides import save_config
from cbnerf.search.curves import CURVES_FILE, Point, append_point, begin_curves
from cbnerf.search.mlflow_store import legal_key, tracking_uri
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import NOT_COMPARABLE, Tracker, repeated
from cbnerf.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

KNOBS = {"codebook.size": 64, "codebook.beta": 0.5}
SPACE = {name: {"choices": [value]} for name, value in KNOBS.items()}
Leave = Callable[..., dict[str, float]]


@pytest.fixture
def make(tiny_plan: Callable[..., Plan], empty_store: Path) -> Callable[..., Plan]:
    """A plan whose space holds the `KNOBS` only, with an empty MLflow; one rung unless told."""

    def make_plan(**spec: Any) -> Plan:
        defaults = {"stopping": {"rule": "none"}, "space": SPACE, "fixed": {"codebook.dim": 8}}
        plan = tiny_plan("arcade,blinds", **defaults | spec).with_precision("bfloat16")
        if not plan.storage.exists():
            plan.storage.mkdir()
            shutil.copy(empty_store, plan.storage / "mlflow.db")
        return plan

    return make_plan


@pytest.fixture
def plan(make: Callable[..., Plan]) -> Plan:
    return make()


@pytest.fixture
def race(make: Callable[..., Plan]) -> Plan:
    """A plan with two rungs."""
    return make(stopping={"rule": "race", "rungs": 2, "grace_period": 1})


def runs_of(plan: Plan) -> dict[str, Run]:
    """Every run of the study's experiment by its key; a key must not stand twice."""
    client = MlflowClient(tracking_uri(plan.storage))
    experiment = client.get_experiment_by_name(plan.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    keyed = {run.data.tags["cbnerf.key"]: run for run in runs}
    assert len(keyed) == len(runs)
    return keyed


def statuses_of(plan: Plan) -> dict[str, str]:
    return {key: run.info.status for key, run in runs_of(plan).items()}


def steps_of(plan: Plan, run: Run, metric: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri(plan.storage)).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in history]


def files_of(plan: Plan, run: Run, folder: str = "") -> list[str]:
    client = MlflowClient(tracking_uri(plan.storage))
    return [file.path for file in client.list_artifacts(run.info.run_id, folder or None)]


def begin(state: StudyState, points: dict[int, float] | None = None) -> Unit:
    """The next unit, and the curves of a process that trains it."""
    unit = state.next_unit()
    assert unit is not None
    folder = state.plan.trial_folder(unit.configuration, unit.scene)
    begin_curves(folder)
    for step, psnr in (points or {}).items():
        append_point(folder, step, {"val/psnr": psnr, "train/loss": 1 / step})
    return unit


def train(state: StudyState, leave: Leave, psnr: float | None = None) -> Unit:
    """Train the next unit; of a full training also its files."""
    unit = state.next_unit()
    assert unit is not None
    folder = state.plan.trial_folder(unit.configuration, unit.scene)
    if psnr is None:
        psnr = 20.0 + 2 * state.plan.scenes.index(unit.scene)
    last = max(10 // state.plan.part(unit.rung), 1)  # the preset `tiny` has ten steps
    metrics = {"val/psnr": psnr, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.5, "steps": last}
    if unit.rung == state.plan.rungs - 1:
        metrics = leave(state.plan, unit.configuration, unit.scene, unit.overrides, psnr)
    begin_curves(folder)
    for step in (last // 2, last):
        append_point(folder, step, {"val/psnr": psnr * step / last, "train/loss": 1 / step})
    state.record(unit, metrics)
    return unit


def finished(plan: Plan, leave: Leave) -> StudyState:
    """A study whose first configuration has finished."""
    state = StudyState(plan)
    for _ in plan.scenes:
        train(state, leave)
    return state


def test_a_configuration_is_a_run_with_its_knobs_and_means(plan: Plan, leave_unit: Leave):
    Tracker(finished(plan, leave_unit)).sync()
    run = runs_of(plan)["configuration/0"]
    assert run.info.status == "FINISHED" and run.info.run_name == "configuration 00"
    assert run.data.params == {
        "method": "cb-nerf", "resolution": "tiny", "codebook.dim": "8", "codebook.size": "64",
        "codebook.beta": "0.5", "precision": "bfloat16",
    }  # fmt: skip
    assert run.data.metrics == {
        "val/psnr": 21.0, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.5, "steps": 10,
        "val_arcade/psnr": 20.0, "val_arcade/gain": 0.25,
        "val_blinds/psnr": 22.0, "val_blinds/gain": 0.25,
    }  # fmt: skip
    assert any("arcade" in file for file in files_of(plan, run, "images"))


def test_a_scene_is_a_child_with_curves_strip_and_weights(plan: Plan, leave_unit: Leave):
    Tracker(finished(plan, leave_unit)).sync()
    runs = runs_of(plan)
    child = runs["unit/0/arcade"]
    assert child.data.tags["mlflow.parentRunId"] == runs["configuration/0"].info.run_id
    assert child.info.status == "FINISHED" and child.data.tags["cbnerf.node"]
    assert child.data.params == {"scene": "arcade", "codebook.size": "64", "codebook.beta": "0.5"}
    # The last value stands at the last step and nowhere else.
    assert steps_of(plan, child, "val/psnr") == [(5, 10.0), (10, 20.0)]
    assert steps_of(plan, child, "train/loss") == [(5, 0.2), (10, 0.1)]
    assert steps_of(plan, child, "seconds") == [(10, 1.5)]
    assert {"config.yaml", "refiner.pt"} <= set(files_of(plan, child))
    assert any("strip" in file for file in files_of(plan, child, "images"))


def leave_field(plan: Plan, state: StudyState, scene: str) -> Path:
    """A trained field in the cache and in the state."""
    entry = plan.cache.folder / f"field-{scene}-0123"
    save_config(plan.base, entry / "config.yaml")
    weights, adam = {"planes": torch.ones(2)}, {"state": {0: {"exp_avg": torch.ones(2)}}}
    checkpoint = Checkpoint("field", scene, 20, plan.base, "float32", weights, adam, {})
    save_checkpoint(checkpoint, entry / "field.pt")
    metrics = {"val/psnr": 19.0, "seconds": 3.0, "steps": 20}
    (entry / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    state.record_field(scene, entry.name, 3.0)
    return entry


def test_stage_1_runs_are_linked_to_the_runs_that_use_them(plan: Plan, tmp_path: Path):
    state = StudyState(plan)
    leave_field(plan, state, "arcade")
    begin(state)
    Tracker(state).sync()
    runs = runs_of(plan)
    field = runs["field/field-arcade-0123"]
    assert runs["unit/0/arcade"].data.tags["cbnerf.field_run"] == field.info.run_id
    assert field.info.status == "FINISHED" and "mlflow.parentRunId" not in field.data.tags
    assert field.data.params["field.kind"] == "planes"
    assert field.info.end_time - field.info.start_time == 3000  # milliseconds
    assert field.data.params["precision"] == "bfloat16"
    assert not any(name.startswith("codebook.") for name in field.data.params)
    assert steps_of(plan, field, "val/psnr") == [(20, 19.0)]
    logged = MlflowClient(tracking_uri(plan.storage)).download_artifacts(
        field.info.run_id, "field.pt", str(tmp_path)
    )
    checkpoint = load_checkpoint(Path(logged), "field", torch.device("cpu"))
    assert torch.equal(checkpoint.model["planes"], torch.ones(2)) and not checkpoint.optimizer


def test_runs_last_as_long_as_their_training(race: Plan, leave_unit: Leave):
    state = StudyState(race)
    for unit in (begin(state), begin(state)):
        folder = race.trial_folder(0, unit.scene)
        late = 4000 * race.scenes.index(unit.scene)
        points = [Point(step, {}, "node", 1_000_000 + late + 500 * step) for step in (0, 2)]
        lines = [json.dumps(point._asdict()) + "\n" for point in points]
        (folder / CURVES_FILE).write_text("".join(lines), encoding="utf-8")
        state.record(unit, None)
    Tracker(state).sync()
    times = {k: (r.info.start_time, r.info.end_time) for k, r in runs_of(race).items()}
    assert times == {
        "configuration/0": (1_000_000, 1_005_000), "unit/0/arcade": (1_000_000, 1_001_000),
        "unit/0/blinds": (1_004_000, 1_005_000),
    }  # fmt: skip


def test_scenes_are_inputs_of_the_runs_that_see_them(plan: Plan, leave_unit: Leave):
    for scene in plan.scenes:
        plan.load_scene(scene, plan.base.data)  # draws it
    state = finished(plan, leave_unit)
    leave_field(plan, state, "arcade")
    tracker = Tracker(state)
    tracker.sync()
    tracker.log_report([], {"val/psnr": 21.0}, time.time())
    Tracker(StudyState(plan)).sync()
    seen = {
        key: sorted(
            (one.dataset.name, tag.value) for one in run.inputs.dataset_inputs for tag in one.tags
        )
        for key, run in runs_of(plan).items()
    }
    arcade, blinds = ([(name, part) for part in ("train", "val")] for name in plan.scenes)
    assert seen["unit/0/arcade"] == seen["field/field-arcade-0123"] == arcade
    assert seen["configuration/0"] == arcade + blinds
    assert seen["report"] == [(n, part) for n in plan.scenes for part in ("test", "val")]
    first, *_ = runs_of(plan)["unit/0/arcade"].inputs.dataset_inputs
    folder = plan.scene_folder("arcade", plan.base.data.width)
    assert mlflow.data.get_source(first).uri == str(folder)
    found = MlflowClient(tracking_uri(plan.storage)).search_runs(
        [tracker.experiment_id], "dataset.name = 'blinds' and dataset.context = 'test'"
    )
    assert [run.data.tags["cbnerf.key"] for run in found] == ["report"]


def test_photographs_that_cannot_be_read_here_are_no_inputs(plan: Plan, leave_unit: Leave):
    Tracker(finished(plan, leave_unit)).sync()
    assert not any(run.inputs.dataset_inputs for run in runs_of(plan).values())


def test_the_best_configuration_is_tagged_and_rows_are_tidy(plan: Plan, leave_unit: Leave):
    state = StudyState(plan)
    tracker = Tracker(state)
    for psnr, best in ((20.0, 0), (21.0, 1), (19.0, 1)):
        for _ in plan.scenes:
            train(state, leave_unit, psnr)
        tracker.sync()
        tagged = [k for k, run in runs_of(plan).items() if run.data.tags.get("best") == "true"]
        assert tagged == [f"configuration/{best}"]
    mlflow.set_tracking_uri(tracking_uri(plan.storage))
    try:
        rows = mlflow.search_runs(
            [tracker.experiment_id], "tags.`cbnerf.kind` = 'configuration'",
            order_by=["metrics.`val/psnr` DESC"],
        )  # fmt: skip
    finally:
        mlflow.set_tracking_uri(None)
    assert list(rows["metrics.val/psnr"]) == [21.0, 20.0, 19.0]
    assert list(rows["tags.outcome"]) == ["finished"] * 3
    assert list(rows["tags.mlflow.source.name"]) == ["tune.py"] * 3
    assert list(rows["metrics.val_blinds/psnr"]) == [21.0, 20.0, 19.0]


def test_fields_are_logged_once_and_not_read_again(plan: Plan):
    state = StudyState(plan)
    entry = leave_field(plan, state, "arcade")
    state.record_field("blinds", "field-blinds-4567", 3.0)  # It was removed since.
    for _ in range(2):
        Tracker(StudyState(plan)).sync()
        (run,) = runs_of(plan).values()
        assert run.info.status == "FINISHED"
        assert set(files_of(plan, run)) == {"config.yaml", "field.pt"}
        assert len(steps_of(plan, run, "val/psnr")) == 1
        (entry / "field.pt").unlink(missing_ok=True)


def test_runs_of_built_in_scenes_say_that_they_compare_with_nothing(plan: Plan, leave_unit: Leave):
    Tracker(finished(plan, leave_unit)).sync()
    for run in runs_of(plan).values():
        assert run.data.tags["cbnerf.warning"] == NOT_COMPARABLE
        assert run.data.tags["cbnerf.study"] == plan.name


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


def test_curves_are_written_while_a_unit_trains(plan: Plan):
    state = StudyState(plan)
    tracker = Tracker(state)
    tracker.sync()
    assert not runs_of(plan)
    unit = state.next_unit()
    assert unit is not None
    tracker.sync()
    assert not runs_of(plan), "it has not begun"
    folder = plan.trial_folder(0, unit.scene)
    begin_curves(folder)
    tracker.sync()
    assert statuses_of(plan) == {"configuration/0": "RUNNING", "unit/0/arcade": "RUNNING"}
    for step in (2, 4):
        append_point(folder, step, {"val/psnr": 10.0 * step})
        tracker.sync()
    assert steps_of(plan, runs_of(plan)["unit/0/arcade"], "val/psnr") == [(2, 20.0), (4, 40.0)]


def everything(plan: Plan) -> list[Any]:
    return [
        (run.to_dictionary(), files_of(plan, run), files_of(plan, run, "images"),
         [steps_of(plan, run, name) for name in run.data.metrics])
        for run in runs_of(plan).values()
    ]  # fmt: skip


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


def test_a_study_made_anew_leaves_the_runs_of_its_namesake_alone(make, leave_unit: Leave):
    plan = make()
    Tracker(finished(plan, leave_unit)).sync()
    shutil.rmtree(plan.folder)
    state = StudyState(make(space=SPACE | {"codebook.size": {"choices": [1024]}}))
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


def test_a_failed_unit_fails_its_configuration_and_says_why(plan: Plan, leave_unit: Leave):
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


def test_the_report_is_one_run_with_its_files(plan: Plan, tmp_path: Path):
    file = tmp_path / "report.md"
    file.write_text("# Study", encoding="utf-8")
    for psnr in (21.0, 21.0, 22.0):
        Tracker(StudyState(plan)).log_report([file], {"val/psnr": psnr}, time.time() - 10)
    run = runs_of(plan)["report"]
    assert run.info.end_time - run.info.start_time >= 10_000
    assert files_of(plan, run) == ["report.md"] and run.info.status == "FINISHED"
    assert steps_of(plan, run, "val/psnr") == [(0, 21.0), (0, 22.0)]


def test_a_lower_rung_leaves_its_curve_and_nothing_else(race: Plan, leave_unit: Leave):
    state = StudyState(race)
    train(state, leave_unit, 15.0)
    Tracker(state).sync()
    child = runs_of(race)["unit/0/arcade"]
    assert child.info.status == "RUNNING" and not files_of(race, child)
    last = 10 // race.part(0)
    assert steps_of(race, child, "val/psnr")[-1] == (last, 15.0)
    assert steps_of(race, child, "seconds") == [(last, 1.5)]


def test_a_pruned_configuration_is_no_failure_and_a_late_unit_opens_nothing(
    race: Plan, leave_unit: Leave
):
    state = StudyState(race)
    for _ in range(4):
        train(state, leave_unit, 20.0)
    tracker = Tracker(state)
    early, late = begin(state), begin(state)
    while late.configuration != early.configuration:
        late = begin(state)
    tracker.sync()
    state.record(
        early, {"val/psnr": 1.0, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.0, "steps": 10}
    )
    tracker.sync()
    runs = runs_of(race)
    assert {runs[key].info.status for key in ("configuration/1", "unit/1/arcade")} == {"FINISHED"}
    tags = runs["configuration/1"].data.tags
    assert tags["outcome"] == runs["unit/1/arcade"].data.tags["outcome"] == "pruned"
    assert "to beat #00" in tags["outcome_reason"] and "pruned: " in tags["mlflow.note.content"]
    state.record(
        late, {"val/psnr": 2.0, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.0, "steps": 10}
    )
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


@pytest.mark.parametrize("name", ["garden(1)", "küche", "street, north", "val"])
def test_a_scene_of_any_name_has_metrics_and_images(plan: Plan, leave_unit: Leave, name: str):
    plan = replace(plan, scenes=(name,))
    Tracker(finished(plan, leave_unit)).sync()
    run = runs_of(plan)["configuration/0"]
    assert run.data.metrics[f"val_{legal_key(name)}/psnr"] == 20.0
    assert run.data.metrics["val/ssim"] == 0.5 and "val/gain" in run.data.metrics
    assert any(legal_key(name) in file for file in files_of(plan, run, "images"))


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


def test_sync_is_repeated_in_another_thread_and_at_the_end():
    threads: list[int] = []
    with repeated(lambda: threads.append(threading.get_ident()), seconds=0.01):
        while len(threads) < 3:
            time.sleep(0.01)
        before = len(threads)
    assert len(threads) > before and threading.get_ident() not in threads


def test_an_error_that_passes_is_printed_and_one_that_stays_is_raised(
    capsys: pytest.CaptureFixture[str],
):
    calls: list[int] = []

    def sync() -> None:
        calls.append(1)
        if len(calls) < 4:
            raise MlflowException("no server at http://me:secret@host\nstatement")

    with repeated(sync, seconds=0.01):
        while len(calls) < 5:
            time.sleep(0.01)
    output = capsys.readouterr().out
    assert output == "  MLflow: no server at http://host; trying again\n"
    with pytest.raises(ZeroDivisionError), repeated(lambda: divmod(1, 0), seconds=60.0):
        pass


def test_a_failing_search_does_not_wait_for_a_sync_that_hangs():
    go = threading.Event()
    with pytest.raises(KeyboardInterrupt), repeated(go.wait, seconds=0.01, patience=0.1):
        time.sleep(0.05)
        raise KeyboardInterrupt
    go.set()
