"""What a killed search had booked reaches MLflow when the study goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from tqdm import tqdm

from cbnerf.overrides import save_config
from cbnerf.search.diary import Diary, catch_up
from cbnerf.search.mlflow_store import tracking_uri
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import Tracker
from cbnerf.search.writer import Writer
from cbnerf.training.checkpoint import Checkpoint, save_checkpoint

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]


@pytest.fixture
def plan(tiny_plan: Callable[..., Plan], empty_store: Path) -> Plan:
    plan = tiny_plan("arcade,blinds", stopping={"rule": "race", "rungs": 2, "grace_period": 1})
    plan.storage.mkdir()
    shutil.copy(empty_store, plan.storage / "mlflow.db")
    return plan


def book_all(plan: Plan, leave: Callable[..., Any], num_units: int) -> StudyState:
    """A search that books units and tells MLflow nothing; later configurations are worse."""
    state = StudyState(plan)
    for _ in range(num_units):
        unit = state.next_unit()
        assert unit is not None
        psnr = 20.0 - 3 * unit.configuration
        metrics = {"val/psnr": psnr, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.5}
        if unit.rung == plan.rungs - 1:
            metrics = leave(plan, unit.configuration, unit.scene, unit.overrides, psnr)
        state.record(unit, metrics)
    return state


def runs_of(plan: Plan) -> dict[str, dict[str, Any]]:
    client = MlflowClient(tracking_uri(plan.storage))
    experiment = client.get_experiment_by_name(plan.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {run.data.tags["cbnerf.key"]: run.to_dictionary() for run in runs}


def test_mlflow_catches_up_with_the_ledger(plan: Plan, leave_unit):
    state = book_all(plan, leave_unit, num_units=5)
    catch_up(state, Tracker(plan, state.id))
    runs = runs_of(plan)
    assert runs["configuration/0"]["info"]["status"] == "FINISHED"
    assert runs["configuration/0"]["data"]["metrics"]["arcade/psnr"] == 20.0
    for scene in plan.scenes:
        assert runs[f"unit/0/{scene}"]["info"]["status"] == "FINISHED"
        assert runs[f"unit/0/{scene}"]["data"]["metrics"]["val/psnr"] == 20.0
    (unit,) = [unit for unit, _ in state.recorded_units(1)]
    child = runs[f"unit/1/{unit.scene}"]
    assert child["data"]["metrics"]["val/psnr"] == 17.0
    assert child["data"]["params"]["codebook.size"] == str(unit.overrides["codebook.size"])


def test_catching_up_twice_changes_nothing(plan: Plan, leave_unit):
    state = book_all(plan, leave_unit, num_units=5)
    catch_up(state, Tracker(plan, state.id))
    client = MlflowClient(tracking_uri(plan.storage))

    def everything() -> list[Any]:
        runs = runs_of(plan)
        return [runs, *(
            (client.get_metric_history(run["info"]["run_id"], "val/psnr"),
             [file.path for file in client.list_artifacts(run["info"]["run_id"], "images")])
            for run in runs.values()
        )]  # fmt: skip

    before = str(everything())
    catch_up(StudyState(plan), Tracker(plan, state.id))
    assert str(everything()) == before


def test_fields_that_mlflow_had_not_heard_of_are_logged_once(plan: Plan):
    state = StudyState(plan)
    for scene in ("arcade", "blinds"):
        state.record_field(scene, f"field-{scene}", 3.0)
    folder = plan.cache.folder / "field-arcade"  # The other one was removed since.
    save_config(plan.base, folder / "config.yaml")
    weights = {"planes": torch.ones(2)}
    checkpoint = Checkpoint("field", "arcade", 20, plan.base, "float32", weights, {"state": {}}, {})
    save_checkpoint(checkpoint, folder / "field.pt")
    (folder / "metrics.json").write_text('{"val/psnr": 19.0, "seconds": 3.0}', encoding="utf-8")
    for _ in range(2):
        tracker = Tracker(plan, state.id)
        catch_up(state, tracker)
        tracker.log_field("arcade", folder, {"val/psnr": 19.0, "seconds": 3.0})
        (run,) = runs_of(plan).values()
        assert run["info"]["status"] == "FINISHED"
        client, number = MlflowClient(tracking_uri(plan.storage)), run["info"]["run_id"]
        assert {file.path for file in client.list_artifacts(number)} == {"config.yaml", "field.pt"}
        (folder / "field.pt").unlink(missing_ok=True)  # It is not read again.


def test_a_configuration_that_was_stopped_unheard_ends_as_killed(plan: Plan, leave_unit):
    state = book_all(plan, leave_unit, num_units=5)
    assert list(state.pruned) == [1]
    catch_up(state, Tracker(plan, state.id))
    runs = runs_of(plan)
    statuses = {key: run["info"]["status"] for key, run in runs.items() if "/1" in key}
    assert set(statuses.values()) == {"KILLED"} and len(statuses) == 2


def test_a_unit_whose_process_dies_before_it_begins_is_handed_out_again(plan: Plan):
    state = StudyState(plan)
    with Writer() as write, tqdm(disable=True) as bar:
        diary = Diary(state, Tracker(plan, state.id), write, bar)
        first = state.next_unit()
        assert first is not None
        diary.end_unit(first, None)
        again = state.next_unit()
        assert again == first and state.num_recorded == 0
        # Begun, it died, and died again when it was to begin once more.
        diary.on_trial_start(0, [], trial_of(again))
        diary.on_trial_recover(0, [], trial_of(again))
        diary.end_unit(again, None)
        assert state.next_unit() == first and state.num_recorded == 0
        diary.on_trial_start(0, [], trial_of(again))
        diary.end_unit(again, None)
    assert state.results(0) == {(first.scene, 0): None}


def test_a_unit_that_can_never_begin_fails_in_the_end(plan: Plan):
    state = StudyState(plan)
    with Writer() as write, tqdm(disable=True) as bar:
        diary = Diary(state, Tracker(plan, state.id), write, bar)
        for _ in range(20):
            unit = state.next_unit()
            assert unit is not None
            diary.end_unit(unit, None)
            if state.num_recorded:
                break
    assert state.results(0) == {(unit.scene, 0): None}
    assert runs_of(plan)[f"unit/0/{unit.scene}"]["info"]["status"] == "FAILED"


def trial_of(unit: Unit) -> Any:
    """What Tune would show of a trial of this unit."""
    return SimpleNamespace(config={"units": [unit._asdict()]}, last_result={})
