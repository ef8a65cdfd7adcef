"""What the runs of MLflow hold of a study, in a real SQLite store; no training."""

import json
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
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

from cbnerf.overrides import save_config
from cbnerf.search.curves import CURVES_FILE, Point, append_point, begin_curves
from cbnerf.search.mlflow_store import legal_key, tracking_uri
from cbnerf.search.plan import Plan
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import NOT_COMPARABLE, Tracker
from cbnerf.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]


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


@pytest.mark.parametrize("name", ["garden(1)", "küche", "street, north", "val"])
def test_a_scene_of_any_name_has_metrics_and_images(plan: Plan, leave_unit: Leave, name: str):
    plan = replace(plan, scenes=(name,))
    Tracker(finished(plan, leave_unit)).sync()
    run = runs_of(plan)["configuration/0"]
    assert run.data.metrics[f"val_{legal_key(name)}/psnr"] == 20.0
    assert run.data.metrics["val/ssim"] == 0.5 and "val/gain" in run.data.metrics
    assert any(legal_key(name) in file for file in files_of(plan, run, "images"))
