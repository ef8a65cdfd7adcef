"""Tune and the searcher together: real Ray, fake training."""

import math
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from optuna.trial import TrialState
from ray import tune
from tqdm import tqdm

from cbnerf.search import driver
from cbnerf.search.mlflow_store import tracking_uri
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.searcher import Recorder, TuneSearcher
from cbnerf.search.state import StudyState
from cbnerf.search.status import StatusLine
from cbnerf.search.tracking import Tracker

pytestmark = [pytest.mark.search, pytest.mark.usefixtures("quiet")]

NO_STOPPING = {"rule": "none", "rungs": 1}


def states(state: StudyState) -> list[TrialState]:
    return [trial.state for trial in state.study.get_trials()]


@pytest.fixture(scope="module")
def connected(ray_address: str) -> Iterator[None]:
    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.parametrize("walk", [False, True])
def test_tune_runs_every_unit_and_books_its_last_report(tiny_plan, connected, walk: bool):
    plan = tiny_plan("arcade,blinds", trials=4, stopping=NO_STOPPING)
    state = StudyState(plan)
    ended: list[tuple[int, str]] = []

    def quadratic(config: dict[str, Any]) -> None:
        for index, unit in enumerate(config["units"]):
            if unit["configuration"] == 2:
                raise RuntimeError("this one breaks")
            tune.report({"metrics": {"val/psnr": -100.0}, "unit": index, "step": 1})
            loss = (math.log(unit["overrides"]["codebook.beta"]) - 0.3) ** 2
            tune.report({"metrics": {"val/psnr": -loss}, "unit": index, "ended": True})

    def record(unit: Unit, metrics: Metrics | None) -> None:
        state.record(unit, metrics)
        ended.append(unit[:2])

    results = tune.Tuner(
        quadratic,
        tune_config=tune.TuneConfig(
            search_alg=TuneSearcher(state, record, limit=lambda: 2, walk=walk),
            num_samples=8,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(plan.folder), verbose=0),
    ).fit()
    assert all("this one breaks" in str(error) for error in results.errors), results.errors
    whole = [(n, scene) for n in (0, 1, 3) for scene in plan.scenes]
    assert sorted(pair for pair in ended if pair[0] != 2) == whole
    assert len(ended) == len(set(ended)) and (2, "arcade") in ended
    for trial in state.study.get_trials():
        if trial.number == 2:
            assert trial.state == TrialState.FAIL
        else:
            expected = -((math.log(trial.params["codebook.beta"]) - 0.3) ** 2)
            assert trial.value == pytest.approx(expected)


def test_pending_trials_stay_within_the_current_limit(tiny_plan):
    plan = tiny_plan("arcade,blinds", trials=6, stopping=NO_STOPPING)
    state, limit = StudyState(plan), 1
    searcher = TuneSearcher(state, state.record, limit=lambda: limit)
    assert searcher.suggest("a") and searcher.suggest("b") is None
    limit = 3
    assert searcher.suggest("b") and searcher.suggest("c") and searcher.suggest("d") is None
    searcher.on_trial_complete("a", {"metrics/val/psnr": 20.0, "unit": 0, "ended": True})
    assert searcher.suggest("d") and searcher.suggest("e") is None


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's
def test_a_failed_unit_records_its_reason_and_the_search_continues(
    tiny_plan, leave_unit, empty_store: Path, connected, monkeypatch, capfd
):
    plan = tiny_plan("arcade,blinds", trials=2, stopping=NO_STOPPING)
    plan.storage.mkdir()
    shutil.copy(empty_store, plan.storage / "mlflow.db")

    def run_units(about: dict[str, Any], plan: Plan) -> None:
        (unit,) = about["units"]
        if unit["configuration"] == 0 and unit["scene"] == "arcade":
            tune.report({"failure": "train/loss not finite"})
        elif unit["configuration"] == 0:
            raise RuntimeError("out of luck")
        else:
            number, scene, overrides = unit["configuration"], unit["scene"], unit["overrides"]
            metrics = leave_unit(plan, number, scene, overrides, 20.0)
            tune.report({"metrics": metrics, "unit": 0, "ended": True})

    monkeypatch.setattr(driver, "UnitTrainable", run_units)
    monkeypatch.setattr(driver, "MAX_FAILURES", 0)
    monkeypatch.setattr(driver, "StatusLine", partial(StatusLine, interval=0.0))
    state = StudyState(plan)
    driver._search(plan, state, concurrency=2)
    Tracker(StudyState(plan)).sync()
    output, errors = capfd.readouterr()
    assert "#00  arcade failed: train/loss not finite\n" in output
    assert "#00  blinds failed: RuntimeError: out of luck\n" in output
    assert re.search(r"^none finished yet \| \d/2 ended \| ", output, re.MULTILINE)
    assert "#01  20.000 *" in output and "Traceback" not in output + errors
    assert states(state) == [TrialState.FAIL, TrialState.COMPLETE]
    client = MlflowClient(tracking_uri(plan.storage))
    experiment = client.get_experiment_by_name(plan.name)
    assert experiment is not None
    notes = {
        run.data.tags["cbnerf.key"]: run.data.tags.get("mlflow.note.content")
        for run in client.search_runs([experiment.experiment_id], "attributes.status = 'FAILED'")
    }
    assert notes == {
        "configuration/0": None, "unit/0/arcade": "train/loss not finite",
        "unit/0/blinds": "RuntimeError: out of luck",
    }  # fmt: skip


def test_units_are_matched_to_the_processes_that_an_error_names(tiny_plan):
    plan = tiny_plan("arcade,blinds", trials=6, stopping=NO_STOPPING)
    state = StudyState(plan)
    searcher = TuneSearcher(state, state.record, limit=lambda: 9)
    units = {}
    for pid, trial_id in enumerate("abc", start=70):
        about = searcher.suggest(trial_id)
        assert isinstance(about, dict)
        units[trial_id] = Unit(**about["units"][0])
        searcher.on_trial_result(trial_id, {"begun": True, "pid": pid, "node_ip": "10.0.0.1"})
    a, b, c = units["a"], units["b"], units["c"]
    assert searcher.unfinished("IP: 10.0.0.1 ... pid=71, actual memory") == ([b], [a, c])
    assert searcher.unfinished("IP: 10.0.0.2 ... pid=71, actual memory") == ([a, b, c], [])
    assert searcher.unfinished("IP: 10.0.0.1 ... pid=7, pid=710, ") == ([a, b, c], [])
    scores = {"metrics/val/psnr": 20.0, "metrics/val/ssim": 0.5}
    searcher.on_trial_complete("b", scores | {"unit": 0, "ended": True})
    assert searcher.unfinished("IP: 10.0.0.1 ... pid=70, pid=71, ") == ([a], [c])


def trial_of(unit: Unit, **about: Any) -> Any:
    """What Tune would show of a trial of this unit."""
    return SimpleNamespace(config={"units": [unit._asdict()]}, last_result={}, **about)


def test_a_unit_whose_process_dies_before_it_begins_is_handed_out_again(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds", stopping=NO_STOPPING))
    recorder = Recorder(state, tqdm(disable=True))
    first = state.next_unit()
    assert first is not None
    recorder.end_unit(first, None)
    again = state.next_unit()
    assert again == first and not state.recorded
    # Begun, it died, and died again when it was to begin once more.
    recorder.on_trial_start(0, [], trial_of(again))
    recorder.on_trial_recover(0, [], trial_of(again))
    recorder.end_unit(again, None)
    assert state.next_unit() == first and not state.recorded
    recorder.on_trial_start(0, [], trial_of(again))
    recorder.end_unit(again, None)
    assert state.results(0) == {(first.scene, 0): None}


def test_a_unit_that_can_never_begin_fails_in_the_end(tiny_plan, tmp_path: Path):
    state = StudyState(tiny_plan("arcade,blinds", stopping=NO_STOPPING))
    recorder = Recorder(state, tqdm(disable=True))
    trouble = tmp_path / "error.txt"
    trouble.write_text("Traceback\nOSError: no such machine", encoding="utf-8")
    for _ in range(20):
        unit = state.next_unit()
        assert unit is not None
        recorder.end_unit(unit, None)
        recorder.on_trial_error(0, [], trial_of(unit, error_file=str(trouble)))
        if state.recorded:
            break
    assert state.results(0) == {(unit.scene, 0): None}
    assert state.failures == [(unit, "OSError: no such machine")]
    assert StudyState(state.plan).failures == state.failures
