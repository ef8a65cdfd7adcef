"""The tracker against a real SQLite store; no training."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from cbnerf.overrides import save_config
from cbnerf.search.mlflow_store import legal_key, tracking_uri
from cbnerf.search.plan import Plan
from cbnerf.search.state import Unit
from cbnerf.search.tracking import NOT_COMPARABLE, Tracker
from cbnerf.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

KNOBS = {"codebook.size": 64, "codebook.beta": 0.5}
LAST = 2
"""The rung of a whole training."""


@pytest.fixture
def plan(tiny_plan: Callable[..., Plan], empty_store: Path) -> Iterator[Plan]:
    stopping = {"rungs": LAST + 1, "grace_period": 1}
    plan = tiny_plan("arcade,blinds", fixed={"codebook.dim": 8}, stopping=stopping)
    plan = plan.with_precision("bfloat16")
    plan.storage.mkdir()
    shutil.copy(empty_store, plan.storage / "mlflow.db")
    yield plan


def runs_of(plan: Plan) -> dict[str, Run]:
    """Every run of the study's experiment by its key; a key must not stand twice."""
    client = MlflowClient(tracking_uri(plan.storage))
    experiment = client.get_experiment_by_name(plan.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    keyed = {run.data.tags["cbnerf.key"]: run for run in runs}
    assert len(keyed) == len(runs)
    return keyed


def steps_of(plan: Plan, run: Run, metric: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri(plan.storage)).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in history]


def files_of(plan: Plan, run: Run, folder: str = "") -> list[str]:
    client = MlflowClient(tracking_uri(plan.storage))
    return [file.path for file in client.list_artifacts(run.info.run_id, folder or None)]


def track_unit(tracker: Tracker, plan: Plan, leave: Callable[..., Any], unit: Unit, psnr: float):
    """What a study does for one unit."""
    tracker.start_unit(unit)
    for step in (5, 10):
        tracker.log_step(unit, {"val/psnr": psnr * step / 10, "train/loss": 1 / step}, step)
    metrics = leave(plan, unit.configuration, unit.scene, unit.overrides, psnr)
    tracker.end_unit(unit, metrics)
    return metrics


def track_configuration(tracker: Tracker, plan: Plan, leave: Callable[..., Any], number: int):
    results = {
        scene: track_unit(tracker, plan, leave, Unit(number, scene, LAST, KNOBS), 20.0 + 2 * place)
        for place, scene in enumerate(plan.scenes)
    }
    tracker.end_configuration(number, results)


def test_a_configuration_is_a_run_with_its_knobs_and_means(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    run = runs_of(plan)["configuration/0"]
    assert run.info.status == "FINISHED" and run.info.run_name == "configuration 00"
    assert run.data.params == {
        "method": "cb-nerf", "resolution": "tiny", "codebook.dim": "8", "codebook.size": "64",
        "codebook.beta": "0.5", "precision": "bfloat16",
    }  # fmt: skip
    assert run.data.metrics == {
        "val/psnr": 21.0, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.5,
        "arcade/psnr": 20.0, "arcade/gain": 0.25, "blinds/psnr": 22.0, "blinds/gain": 0.25,
    }  # fmt: skip
    assert any("arcade" in file for file in files_of(plan, run, "images"))


def test_a_scene_is_a_child_with_curves_strip_and_weights(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 3)
    runs = runs_of(plan)
    child = runs["unit/3/arcade"]
    assert child.data.tags["mlflow.parentRunId"] == runs["configuration/3"].info.run_id
    assert child.info.status == "FINISHED"
    assert child.data.params == {"scene": "arcade", "codebook.size": "64", "codebook.beta": "0.5"}
    # The last value stands at the last step and nowhere else.
    assert steps_of(plan, child, "val/psnr") == [(5, 10.0), (10, 20.0)]
    assert steps_of(plan, child, "seconds") == [(10, 1.5)]
    assert {"config.yaml", "refiner.pt"} <= set(files_of(plan, child))
    assert any("strip" in file for file in files_of(plan, child, "images"))


def test_stage_1_runs_are_linked_to_the_runs_that_use_them(plan: Plan, leave_unit, tmp_path: Path):
    tracker = Tracker(plan, "one")
    entry = tmp_path / "field-arcade-0123"
    entry.mkdir()
    save_config(plan.base, entry / "config.yaml")
    weights = {"planes": torch.ones(2)}
    adam = {"state": {0: {"exp_avg": torch.ones(2)}}}
    save_checkpoint(
        Checkpoint("field", "arcade", 20, plan.base, "float32", weights, adam, {}),
        entry / "field.pt",
    )
    for _ in range(2):  # A study that goes on logs the cached field again.
        tracker.log_field("arcade", entry, {"val/psnr": 19.0, "seconds": 3.0})
    tracker.start_unit(Unit(0, "arcade", LAST, KNOBS))
    runs = runs_of(plan)
    field = runs["field/field-arcade-0123"]
    assert runs["unit/0/arcade"].data.tags["cbnerf.field_run"] == field.info.run_id
    assert field.info.status == "FINISHED" and "mlflow.parentRunId" not in field.data.tags
    assert field.data.params["field.kind"] == "planes"
    assert field.data.params["precision"] == "bfloat16"
    assert not any(name.startswith("codebook.") for name in field.data.params)
    assert steps_of(plan, field, "val/psnr") == [(plan.base.field.optim.steps, 19.0)]
    logged = MlflowClient(tracking_uri(plan.storage)).download_artifacts(
        field.info.run_id, "field.pt", str(tmp_path)
    )
    checkpoint = load_checkpoint(Path(logged), "field", torch.device("cpu"))
    assert torch.equal(checkpoint.model["planes"], weights["planes"]) and not checkpoint.optimizer


def test_runs_of_built_in_scenes_say_that_they_compare_with_nothing(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    for run in runs_of(plan).values():
        assert run.data.tags["cbnerf.warning"] == NOT_COMPARABLE
        assert run.data.tags["cbnerf.study"] == plan.name


def test_a_restarted_study_adds_to_its_runs(plan: Plan, leave_unit):
    first = Tracker(plan, "one")
    track_configuration(first, plan, leave_unit, 0)
    first.start_unit(Unit(1, "arcade", LAST, KNOBS))
    first.log_step(Unit(1, "arcade", LAST, KNOBS), {"val/psnr": 5.0}, 5)
    before = runs_of(plan)
    second = Tracker(plan, "one")
    second.start_unit(Unit(1, "arcade", LAST, KNOBS))
    second.log_step(Unit(1, "arcade", LAST, KNOBS), {"val/psnr": 9.0}, 10)
    after = runs_of(plan)
    assert {key: run.info.run_id for key, run in after.items()} == {
        key: run.info.run_id for key, run in before.items()
    }
    assert steps_of(plan, after["unit/1/arcade"], "val/psnr") == [(5, 5.0), (10, 9.0)]
    assert after["configuration/0"].info.status == "FINISHED"


def test_ending_a_unit_twice_doubles_nothing(plan: Plan, leave_unit):
    """A kill between MLflow and the journal makes the next life end the unit once more."""
    unit = Unit(0, "arcade", LAST, KNOBS)
    metrics = track_unit(Tracker(plan, "one"), plan, leave_unit, unit, 20.0)
    second = Tracker(plan, "one")
    second.start_unit(unit)
    second.end_unit(unit, metrics)
    run = runs_of(plan)["unit/0/arcade"]
    assert run.info.status == "FINISHED"
    assert steps_of(plan, run, "val/psnr") == [(5, 10.0), (10, 20.0)]


def test_a_study_made_anew_leaves_the_runs_of_its_namesake_alone(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    other = Tracker(plan, "two")
    other.start_unit(Unit(0, "arcade", LAST, {"codebook.size": 1024}))
    client = MlflowClient(tracking_uri(plan.storage))
    runs = client.search_runs([other.experiment_id], "tags.`cbnerf.key` = 'configuration/0'")
    assert {run.data.params["codebook.size"] for run in runs} == {"64", "1024"}


def test_an_interrupt_marks_open_runs_as_killed(plan: Plan, leave_unit):
    tracker = Tracker(plan, "one")
    track_configuration(tracker, plan, leave_unit, 0)
    unit = Unit(1, "arcade", LAST, KNOBS)
    tracker.start_unit(unit)
    tracker.interrupt()
    statuses = {key: run.info.status for key, run in runs_of(plan).items()}
    assert statuses == {
        "configuration/0": "FINISHED", "unit/0/arcade": "FINISHED", "unit/0/blinds": "FINISHED",
        "configuration/1": "KILLED", "unit/1/arcade": "KILLED",
    }  # fmt: skip
    again = Tracker(plan, "one")
    again.start_unit(unit)
    opened = runs_of(plan)
    assert {opened[key].info.status for key in ("configuration/1", "unit/1/arcade")} == {"RUNNING"}


def test_a_failed_unit_fails_its_configuration_and_says_why(plan: Plan, leave_unit):
    tracker = Tracker(plan, "one")
    good = track_unit(tracker, plan, leave_unit, Unit(0, "arcade", LAST, KNOBS), 20.0)
    bad = Unit(0, "blinds", LAST, KNOBS)
    tracker.start_unit(bad)
    tracker.end_unit(bad, None)
    tracker.explain_failure(bad, "train/loss not finite")
    tracker.end_configuration(0, {"arcade": good, "blinds": None})
    runs = runs_of(plan)
    assert runs["unit/0/arcade"].info.status == "FINISHED"
    assert runs["unit/0/blinds"].info.status == "FAILED"
    assert runs["unit/0/blinds"].data.tags["mlflow.note.content"] == "train/loss not finite"
    assert runs["configuration/0"].info.status == "FAILED"
    assert "val/psnr" not in runs["configuration/0"].data.metrics


def test_the_report_is_one_run_with_its_files(plan: Plan, tmp_path: Path):
    file = tmp_path / "report.md"
    file.write_text("# Study", encoding="utf-8")
    for _ in range(2):
        Tracker(plan, "one").log_report([file], {"val/psnr": 21.0})
    run = runs_of(plan)["report"]
    assert files_of(plan, run) == ["report.md"]
    assert steps_of(plan, run, "val/psnr") == [(0, 21.0)]


def test_a_lower_rung_leaves_its_curve_and_nothing_else(plan: Plan):
    tracker = Tracker(plan, "one")
    unit = Unit(0, "arcade", 0, KNOBS)
    tracker.start_unit(unit)
    tracker.log_step(unit, {"val/psnr": 15.0}, 1)
    tracker.end_unit(unit, {"val/psnr": 15.0, "seconds": 1.0})
    child = runs_of(plan)["unit/0/arcade"]
    assert child.info.status == "RUNNING" and not files_of(plan, child)
    assert steps_of(plan, child, "val/psnr") == [(1, 15.0)]


def test_a_stopped_configuration_ends_as_killed_and_says_why(plan: Plan):
    tracker = Tracker(plan, "one")
    tracker.start_unit(Unit(0, "arcade", 0, KNOBS))
    assert not tracker.is_closed(0)
    tracker.prune_configuration(0, "1.2% to beat #00 after 1 units")
    runs = runs_of(plan)
    assert {runs[key].info.status for key in ("configuration/0", "unit/0/arcade")} == {"KILLED"}
    assert "1.2% to beat" in runs["configuration/0"].data.tags["mlflow.note.content"]
    assert Tracker(plan, "one").is_closed(0)


@pytest.mark.parametrize("name", ["garden(1)", "küche", "street, north", "val"])
def test_a_scene_of_any_name_has_metrics_and_images(plan: Plan, leave_unit, name: str):
    plan = replace(plan, scenes=(name,))
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    run = runs_of(plan)["configuration/0"]
    assert run.data.metrics[f"{legal_key(name)}/psnr"] == 20.0
    assert run.data.metrics["val/ssim"] == 0.5 and "val/gain" in run.data.metrics
    assert any(legal_key(name) in file for file in files_of(plan, run, "images"))
