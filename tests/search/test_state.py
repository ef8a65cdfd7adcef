"""The state of a search on a fake objective: units, ends of configurations and proposals."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from objectives import train_units, trial_states
from optuna.trial import TrialState

from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.state import StudyState

pytestmark = [pytest.mark.search, pytest.mark.usefixtures("quiet")]


def pairs(units: list[Unit]) -> list[tuple[int, str]]:
    return [(unit.configuration, unit.scene) for unit in units]


def test_each_pair_of_configuration_and_scene_is_handed_out_once(unpruned_plan):
    state = StudyState(unpruned_plan("arcade,blinds", trials=4))
    units = train_units(state)
    pairs = [(unit.configuration, unit.scene) for unit in units]
    assert pairs == [(n, scene) for n in range(4) for scene in ("arcade", "blinds")]
    assert state.next_unit() is None
    assert len(state.recorded) == 8
    assert all(unit.overrides.keys() == state.plan.spec.space.keys() for unit in units)


def test_the_scenes_of_a_configuration_share_its_knobs(unpruned_plan):
    units = train_units(StudyState(unpruned_plan("arcade,blinds", trials=4)))
    for first, second in zip(units[::2], units[1::2], strict=True):
        assert first.overrides == second.overrides


def test_optuna_is_told_the_mean_over_scenes(unpruned_plan):
    state = StudyState(unpruned_plan("arcade,blinds", trials=3))
    values = {"arcade": 20.0, "blinds": 23.0}
    train_units(state, lambda u: {"val/psnr": values[u.scene] + u.configuration})
    assert [trial.value for trial in state.study.get_trials()] == [21.5, 22.5, 23.5]
    best = state.best()
    assert best is not None and best.number == 2


def test_the_chosen_metric_is_what_counts(unpruned_plan):
    state = StudyState(unpruned_plan("arcade", trials=2, objectives=["val/ssim"]))

    def contrary(unit: Unit) -> Metrics | None:
        return {"val/psnr": 1.0 * unit.configuration, "val/ssim": -1.0 * unit.configuration}

    train_units(state, contrary)
    best = state.best()
    assert best is not None and best.number == 0


@pytest.mark.parametrize("broken", [None, {"val/psnr": math.nan}, {"val/psnr": math.inf}])
def test_a_configuration_that_fails_on_a_scene_is_never_the_best(
    unpruned_plan, broken: Metrics | None
):
    state = StudyState(unpruned_plan("arcade,blinds", trials=3))
    fails = {(1, "arcade"), (2, "blinds")}
    train_units(state, lambda u: broken if u[:2] in fails else {"val/psnr": 9.0 + u[0]})
    assert trial_states(state) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    best = state.best()
    assert best is not None and best.number == 0
    assert not train_units(StudyState(state.plan))


def test_without_a_complete_configuration_there_is_no_best(unpruned_plan):
    state = StudyState(unpruned_plan("arcade", trials=2))
    assert state.best() is None
    train_units(state, lambda u: None)
    assert state.best() is None


def test_the_preset_comes_first_then_the_initial_points(unpruned_plan):
    plan = unpruned_plan(
        "arcade", trials=3, initial=[{"codebook.size": 128}, {"codebook.beta": 0.25}]
    )
    units = train_units(StudyState(plan))
    base = {"codebook.size": 64, "codebook.beta": 0.25, "loss.lambda_recon": 0.01}
    assert units[0].overrides == base
    assert units[1].overrides == base | {"codebook.size": 128}
    # The second point of the file is the preset again, so the third is the sampler's.
    assert units[2].overrides not in (base, base | {"codebook.size": 128})


def test_a_preset_outside_the_space_is_not_forced_into_it(unpruned_plan):
    space = {"codebook.size": {"choices": [128, 256]}, "codebook.beta": {"low": 0.1, "high": 0.3}}
    plan = unpruned_plan("arcade", trials=1, space=space)
    (unit,) = train_units(StudyState(plan))
    assert unit.overrides["codebook.size"] in (128, 256)
    assert unit.overrides["codebook.beta"] == 0.25


def test_proposals_stay_in_the_space_and_have_the_types_of_the_knobs(unpruned_plan):
    space = {
        "codebook.dim": {"low": 4, "high": 64, "step": 4},
        "codebook.size": {"low": 64, "high": 4096, "log": True},
        "codebook.beta": {"low": 0.5, "high": 1.0, "step": 0.25},
        "codebook.imitation": {"choices": ["vq", "ce"]},
        "codebook.ema": {"choices": [True, False]},
    }
    for unit in train_units(
        StudyState(unpruned_plan("arcade", trials=12, space=space)), lambda u: None
    ):
        knobs = unit.overrides
        assert type(knobs["codebook.dim"]) is int and knobs["codebook.dim"] in range(4, 65, 4)
        assert type(knobs["codebook.size"]) is int and 64 <= knobs["codebook.size"] <= 4096
        assert knobs["codebook.beta"] in (0.5, 0.75, 1.0)
        assert knobs["codebook.imitation"] in ("vq", "ce") and type(knobs["codebook.ema"]) is bool


def test_the_seed_decides_the_proposals(unpruned_plan, tmp_path: Path):
    def run(folder: str, seed: int) -> list[float]:
        plan = replace(unpruned_plan("arcade", trials=8, seed=seed), storage=tmp_path / folder)
        return [unit.overrides["codebook.beta"] for unit in train_units(StudyState(plan))]

    first = run("a", 1)
    assert run("b", 1) == first
    assert run("c", 2) != first
    assert len(set(first)) == 8


def test_a_search_finds_better_than_its_start(unpruned_plan):
    state = StudyState(unpruned_plan("arcade", trials=30))
    train_units(state)
    best, start = state.best(), state.study.get_trials()[0].value
    assert best is not None and best.value is not None and start is not None
    assert best.value > start and abs(math.log(best.params["codebook.beta"])) < 0.5


def test_what_stage_1_left_must_stay_the_same(unpruned_plan):
    plan = unpruned_plan("arcade,blinds")
    StudyState(plan).record_field("arcade", "field-arcade-1", 3.0)
    again = StudyState(plan)
    again.record_field("blinds", "field-blinds-1", 4.0)
    again.record_field("arcade", "field-arcade-1", 3.0)
    assert again.field_seconds == {"arcade": 3.0, "blinds": 4.0}
    with pytest.raises(ValueError, match="photographs of arcade, or the code of stage 1, have"):
        again.record_field("arcade", "field-arcade-2", 3.0)


def test_knobs_that_do_not_fit_each_other_fail_a_configuration_and_not_the_search(unpruned_plan):
    space = {
        "codebook.kind": {"choices": ["vq", "fsq"]}, "codebook.size": {"choices": [100, 256]},
    }  # fmt: skip
    plan = unpruned_plan("arcade", trials=12, space=space, objectives=["val/psnr", "parameters"])
    state = StudyState(plan)
    train_units(state, lambda unit: {"val/psnr": 20.0})
    assert state.is_over and {*trial_states(state)} == {TrialState.COMPLETE, TrialState.FAIL}
    failed = [t.params for t in state.study.get_trials() if t.state == TrialState.FAIL]
    assert all(knobs == {"codebook.kind": "fsq", "codebook.size": 100} for knobs in failed)


def test_configurations_beyond_a_limit_are_pruned_untrained(unpruned_plan):
    plan = unpruned_plan("arcade", trials=12, limits={"codebook.size": 100})
    state = StudyState(plan)
    units = train_units(state)
    assert units and all(unit.overrides["codebook.size"] == 64 for unit in units)
    assert len(units) < 12 and state.is_over
    trials = state.study.get_trials()
    beyond = [t for t in trials if t.params["codebook.size"] > 100]
    assert {t.state for t in beyond} == {TrialState.PRUNED}
    assert all(t.constraints["codebook.size"] > 0 for t in beyond)
    assert StudyState(plan).is_over
