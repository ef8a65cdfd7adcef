"""The ledger against a fake objective; no training. A *life* is one process of a search."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from optuna.trial import TrialState
from ray import tune

from cbnerf.search import study
from cbnerf.search.plan import Plan
from cbnerf.search.searcher import Ledger, TuneSearcher, Unit, initial_points, open_study
from cbnerf.search.tracking import Tracker, tracking_uri

pytestmark = pytest.mark.search

Metrics = dict[str, float] | None


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    study.quieten_libraries()


def score(unit: Unit) -> Metrics:
    """Best where beta is 1, in any scene."""
    return {"val/psnr": 30 - math.log(unit.overrides["codebook.beta"]) ** 2 + len(unit.scene)}


def live(
    ledger: Ledger, *, units: int | None = None, objective: Callable[[Unit], Metrics] = score
) -> list[Unit]:
    """Run `units` units, or all that are left; returns those that were booked."""
    done: list[Unit] = []
    while units is None or len(done) < units:
        unit = ledger.next_unit()
        if unit is None:
            break
        ledger.book(unit, objective(unit))
        done.append(unit)
    return done


def pairs(units: list[Unit]) -> list[tuple[int, str]]:
    return [(unit.configuration, unit.scene) for unit in units]


def states(ledger: Ledger) -> list[TrialState]:
    return [trial.state for trial in ledger.study.get_trials()]


def test_each_pair_of_configuration_and_scene_is_handed_out_once(tiny_plan):
    ledger = Ledger(tiny_plan("arcade,blinds", trials=4))
    units = live(ledger)
    assert pairs(units) == [(n, scene) for n in range(4) for scene in ("arcade", "blinds")]
    assert ledger.next_unit() is None
    assert ledger.num_booked == 8
    assert all(unit.overrides.keys() == ledger.plan.spec.space.keys() for unit in units)


def test_the_scenes_of_a_configuration_share_its_knobs(tiny_plan):
    units = live(Ledger(tiny_plan("arcade,blinds", trials=4)))
    for first, second in zip(units[::2], units[1::2], strict=True):
        assert first.overrides == second.overrides


def test_optuna_is_told_the_mean_over_scenes(tiny_plan):
    ledger = Ledger(tiny_plan("arcade,blinds", trials=3))
    values = {"arcade": 20.0, "blinds": 23.0}
    live(ledger, objective=lambda u: {"val/psnr": values[u.scene] + u.configuration})
    assert [trial.value for trial in ledger.study.get_trials()] == [21.5, 22.5, 23.5]
    best = ledger.best()
    assert best is not None and best.number == 2


def test_the_chosen_metric_is_what_counts(tiny_plan):
    ledger = Ledger(tiny_plan("arcade", trials=2, metric="val/ssim"))

    def contrary(unit: Unit) -> Metrics:
        return {"val/psnr": 1.0 * unit.configuration, "val/ssim": -1.0 * unit.configuration}

    live(ledger, objective=contrary)
    best = ledger.best()
    assert best is not None and best.number == 0


@pytest.mark.parametrize("broken", [None, {"val/psnr": math.nan}, {"val/psnr": math.inf}])
def test_a_configuration_that_fails_on_a_scene_is_never_the_best(tiny_plan, broken: Metrics):
    ledger = Ledger(tiny_plan("arcade,blinds", trials=3))
    fails = {(1, "arcade"), (2, "blinds")}
    live(ledger, objective=lambda u: broken if u[:2] in fails else {"val/psnr": 9.0 + u[0]})
    assert states(ledger) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    best = ledger.best()
    assert best is not None and best.number == 0
    assert not live(Ledger(ledger.plan))


def test_without_a_complete_configuration_there_is_no_best(tiny_plan):
    ledger = Ledger(tiny_plan("arcade", trials=2))
    assert ledger.best() is None
    live(ledger, objective=lambda u: None)
    assert ledger.best() is None


@pytest.mark.parametrize("in_flight", [0, 1, 3])
@pytest.mark.parametrize("booked", [0, 1, 2, 3, 5, 6])
def test_a_killed_search_goes_on_where_it_stopped(tiny_plan, booked: int, in_flight: int):
    """Wherever the first life ends, both lives together book each pair once."""
    plan = tiny_plan("arcade,blinds", trials=3)
    first = Ledger(plan)
    before = live(first, units=booked)
    for _ in range(in_flight):
        first.next_unit()
    second = Ledger(plan)
    assert second.num_booked == booked
    after = live(second)
    every = [(number, scene) for number in range(3) for scene in plan.scenes]
    assert sorted(pairs(before) + pairs(after)) == every
    assert states(second) == [TrialState.COMPLETE] * 3
    knobs = {}
    for unit in before + after:
        assert knobs.setdefault(unit.configuration, unit.overrides) == unit.overrides


def test_a_search_goes_on_from_any_line_of_its_journal(tiny_plan):
    """A kill may fall between any two writes: in the middle of asking, booking or telling."""
    plan = tiny_plan("arcade,blinds", trials=3)
    ledger = Ledger(plan)
    live(ledger)
    points = initial_points(plan)
    journal = plan.folder / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in range(len(lines)):
        journal.write_bytes(b"".join(lines[:cut]))
        again = Ledger(plan)
        known = again.num_booked
        units = live(again)
        assert known + len(units) == 6, cut
        assert states(again) == [TrialState.COMPLETE] * 3, cut
        trials = again.study.get_trials()
        assert all(trial.params.keys() == plan.spec.space.keys() for trial in trials), cut
        assert trials[0].params.items() >= points[0].items(), cut


def test_more_trials_extend_a_finished_search(tiny_plan):
    plan = tiny_plan("arcade", trials=2)
    live(Ledger(plan))
    more = replace(plan, spec=replace(plan.spec, trials=5))
    assert pairs(live(Ledger(more))) == [(2, "arcade"), (3, "arcade"), (4, "arcade")]
    assert not live(Ledger(more))
    assert not live(Ledger(plan))


def test_the_preset_comes_first_then_the_initial_points(tiny_plan):
    plan = tiny_plan("arcade", trials=3, initial=[{"codebook.size": 64}, {"codebook.beta": 0.25}])
    units = live(Ledger(plan))
    base = {"codebook.size": 1024, "codebook.beta": 0.25, "loss.lambda_recon": 10.0}
    assert units[0].overrides == base
    assert units[1].overrides == base | {"codebook.size": 64}
    # The second point of the file is the preset again, so the third is the sampler's.
    assert units[2].overrides not in (base, base | {"codebook.size": 64})


def test_a_preset_outside_the_space_is_not_forced_into_it(tiny_plan):
    space = {"codebook.size": {"choices": [64, 128]}, "codebook.beta": {"low": 0.1, "high": 0.3}}
    plan = tiny_plan("arcade", trials=1, space=space)
    (unit,) = live(Ledger(plan))
    assert unit.overrides["codebook.size"] in (64, 128)
    assert unit.overrides["codebook.beta"] == 0.25


def test_proposals_stay_in_the_space_and_have_the_types_of_the_knobs(tiny_plan):
    space = {
        "codebook.dim": {"low": 4, "high": 64, "step": 4},
        "codebook.size": {"low": 64, "high": 4096, "log": True},
        "codebook.beta": {"low": 0.5, "high": 1.0, "step": 0.25},
        "codebook.imitation": {"choices": ["vq", "ce"]},
        "codebook.ema": {"choices": [True, False]},
    }
    for unit in live(Ledger(tiny_plan("arcade", trials=12, space=space)), objective=lambda u: None):
        knobs = unit.overrides
        assert type(knobs["codebook.dim"]) is int and knobs["codebook.dim"] in range(4, 65, 4)
        assert type(knobs["codebook.size"]) is int and 64 <= knobs["codebook.size"] <= 4096
        assert knobs["codebook.beta"] in (0.5, 0.75, 1.0)
        assert knobs["codebook.imitation"] in ("vq", "ce") and type(knobs["codebook.ema"]) is bool


def proposals(units: list[Unit]) -> list[float]:
    return [unit.overrides["codebook.beta"] for unit in units]


def test_the_seed_decides_the_proposals(tiny_plan, tmp_path: Path):
    def run(folder: str, seed: int) -> list[float]:
        plan = replace(tiny_plan("arcade", trials=8, seed=seed), storage=tmp_path / folder)
        return proposals(live(Ledger(plan)))

    first = run("a", 1)
    assert run("b", 1) == first
    assert run("c", 2) != first
    assert len(set(first)) == 8


def test_a_restarted_sampler_does_not_repeat_its_first_life(tiny_plan):
    plan = tiny_plan("arcade", trials=3)
    proposed = proposals(live(Ledger(plan)))
    for trials in (5, 7, 9):
        more = replace(plan, spec=replace(plan.spec, trials=trials))
        proposed += proposals(live(Ledger(more)))
    assert len(set(proposed)) == 9


def test_a_search_finds_better_than_its_start(tiny_plan):
    ledger = Ledger(tiny_plan("arcade", trials=30))
    live(ledger)
    best, start = ledger.best(), ledger.study.get_trials()[0].value
    assert best is not None and best.value is not None and start is not None
    assert best.value > start and abs(math.log(best.params["codebook.beta"])) < 0.5


def test_a_study_made_anew_is_another_study(tiny_plan):
    plan = tiny_plan("arcade")
    first, again = Ledger(plan).id, Ledger(plan).id
    (plan.folder / "optuna.journal").unlink()
    assert again == first != Ledger(plan).id
    assert open_study(plan).study_name == "test"


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


def test_tune_runs_every_unit_and_books_its_last_report(tiny_plan, local_ray):
    plan = tiny_plan("arcade,blinds", trials=4)
    ledger = Ledger(plan)
    ended: list[tuple[int, str]] = []

    def quadratic(config: dict[str, Any]) -> None:
        if config["configuration"] == 2:
            raise RuntimeError("this one breaks")
        tune.report({"val/psnr": -100.0})
        tune.report({"val/psnr": -((math.log(config["overrides"]["codebook.beta"]) - 0.3) ** 2)})

    def book(unit: Unit, metrics: Metrics) -> None:
        ledger.book(unit, metrics)
        ended.append(unit[:2])

    tune.Tuner(
        quadratic,
        tune_config=tune.TuneConfig(
            search_alg=TuneSearcher(ledger, book), num_samples=8, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(plan.folder), verbose=0),
    ).fit()
    assert sorted(ended) == [(n, scene) for n in range(4) for scene in plan.scenes]
    for trial in ledger.study.get_trials():
        if trial.number == 2:
            assert trial.state == TrialState.FAIL
        else:
            expected = -((math.log(trial.params["codebook.beta"]) - 0.3) ** 2)
            assert trial.value == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's
def test_a_failed_unit_tells_why_and_the_search_goes_on(
    tiny_plan, leave_unit, empty_store: Path, local_ray, monkeypatch, capfd
):
    plan = tiny_plan("arcade,blinds", trials=2)
    plan.storage.mkdir()
    shutil.copy(empty_store, plan.storage / "mlflow.db")

    def run_unit(unit: dict[str, Any], plan: Plan) -> None:
        if unit["configuration"] == 0 and unit["scene"] == "arcade":
            tune.report({"failure": "train/loss not finite"})
        elif unit["configuration"] == 0:
            raise RuntimeError("out of luck")
        else:
            number, scene, overrides = unit["configuration"], unit["scene"], unit["overrides"]
            tune.report(leave_unit(plan, number, scene, overrides, 20.0))

    monkeypatch.setattr(study, "run_unit", run_unit)
    ledger = Ledger(plan)
    study._search(plan, ledger, Tracker(plan, ledger.id))
    output, errors = capfd.readouterr()
    assert "#00  arcade failed: train/loss not finite\n" in output
    assert "#00  blinds failed: RuntimeError: out of luck\n" in output
    assert "#01  20.000 *" in output and "Traceback" not in output + errors
    assert states(ledger) == [TrialState.FAIL, TrialState.COMPLETE]
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
