"""The state of a race on a fake objective: what it trains next and what it prunes."""

import math

import numpy as np
import pytest
from objectives import RACE, first_is_best, train_units, trial_states
from optuna.trial import TrialState

from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.state import StudyState

pytestmark = [pytest.mark.search, pytest.mark.usefixtures("quiet")]


SCENES = ["arcade", "blinds", "coral", "lattice"]


def test_a_configuration_climbs_rung_by_rung_through_the_scenes(tiny_plan):
    units = train_units(
        StudyState(tiny_plan("arcade,blinds", trials=1, stopping=RACE)), first_is_best
    )
    assert [(unit.rung, unit.scene) for unit in units] == [
        (rung, scene) for rung in range(3) for scene in ("arcade", "blinds")
    ]


def test_a_race_prunes_worse_configurations_with_expected_objectives(tiny_plan):
    plan = tiny_plan("arcade,blinds,coral,lattice", trials=6, stopping=RACE)
    state = StudyState(plan)
    units = train_units(state, first_is_best)
    assert sum(unit.configuration == 0 for unit in units) == 12
    assert state.is_over and set(state.pruned) == {1, 2, 3, 4, 5}
    assert len(units) < 12 + 5 * 6
    best = state.best()
    assert best is not None and best.number == 0
    assert state.study.best_trial.number == 0
    for number, stop in state.pruned.items():
        trial = state.study.get_trials()[number]
        assert trial.state == TrialState.COMPLETE and trial.values == stop.values
        assert best.value is not None and stop.values[0] < best.value
        assert "to beat #00" in stop.reason
    # One decibel behind, of which the first units show only a part.
    assert 0.3 < best.value - state.pruned[5].values[0] < 1.1


def test_a_race_prunes_no_better_configuration(tiny_plan):
    def better(unit: Unit) -> Metrics:
        return {"val/psnr": 20.0 + unit.rung + unit.configuration}

    state = StudyState(tiny_plan("arcade,blinds", trials=5, stopping=RACE))
    assert len(train_units(state, better)) == 30 and not state.pruned


def test_a_race_begins_with_the_most_informative_scene(tiny_plan):
    """Where one scene tells configurations apart and the others do not, it comes first."""

    def informative(unit: Unit) -> Metrics:
        shared, own = np.random.default_rng(unit.configuration), SCENES.index(unit.scene)
        worse = [0.02, 0.02, 0.4, 0.02][own] * abs(shared.normal()) * (unit.configuration > 0)
        return {"val/psnr": 20 - worse - 0.05 * shared.normal(size=4)[own]}

    plan = tiny_plan(",".join(SCENES), trials=16, stopping={"rule": "race"})
    units = train_units(StudyState(plan), informative)
    begins = {unit.configuration: unit.scene for unit in reversed(units)}
    assert begins[0] == "arcade"
    assert {begins[number] for number in range(10, 16)} == {"coral"}


def test_a_unit_that_ends_after_its_configuration_was_pruned_changes_nothing(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds,coral,lattice", trials=2, stopping=RACE))
    while state.num_ended < 1:
        train_units(state, first_is_best, most=1)
    held = [state.next_unit() for _ in range(3)]  # of configuration 1: the rest of the search
    assert all(unit is not None and unit.configuration == 1 for unit in held)
    while not state.is_over:
        train_units(state, first_is_best, most=1)
    before = state.pruned[1]
    for unit in held:
        assert unit is not None
        state.record(unit, {"val/psnr": 99.0})
    assert state.pruned[1] == before
    best = state.best()
    assert best is not None and best.number == 0


def test_idle_workers_get_configurations_of_their_own_once_there_is_a_rival(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds", trials=9, stopping=RACE))
    at_first = [state.next_unit() for _ in range(4)]
    assert [u.configuration for u in at_first if u] == [0, 0, 1, 1]
    for unit in at_first[:2]:
        assert unit is not None
        state.record(unit, first_is_best(unit))
    while state.best() is None:
        train_units(state, first_is_best, most=1)
    later = [state.next_unit() for _ in range(3)]
    assert [u.configuration for u in later if u] == [2, 3, 4]


def test_a_walk_takes_a_rung_through_its_scenes(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds", trials=2, stopping=RACE))
    walk = state.next_walk()
    assert [(u.configuration, u.scene, u.rung) for u in walk] == [
        (0, "arcade", 0),
        (0, "blinds", 0),
    ]
    for unit in walk:
        state.record(unit, first_is_best(unit))
    assert [(u.configuration, u.rung) for u in state.next_walk()] == [(0, 1), (0, 1)]


def test_a_lasting_failure_ends_a_configuration_at_once(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds", trials=3, stopping=RACE))
    fails = {"val/psnr": math.nan}
    units = train_units(
        state, lambda unit: fails if unit.configuration == 1 else first_is_best(unit)
    )
    assert sum(unit.configuration == 1 for unit in units) == 1
    assert trial_states(state)[1] == TrialState.FAIL and state.is_over


def test_several_objectives_give_a_front_and_prune_only_by_rivals_that_cost_no_more(tiny_plan):
    objectives = ["val/psnr", "codebook.size"]
    plan = tiny_plan("arcade,blinds", trials=12, stopping=RACE, objectives=objectives)

    def larger_is_better(unit: Unit) -> Metrics:
        size, beta = unit.overrides["codebook.size"], unit.overrides["codebook.beta"]
        return {"val/psnr": 20 + math.log2(size) / 5 - abs(math.log(beta)) + unit.rung}

    state = StudyState(plan)
    train_units(state, larger_is_better)
    trials, front = state.study.get_trials(), state._racing.front()
    assert front == sorted(front) and set(front) == {t.number for t in state.study.best_trials}
    sizes = [trials[number].values[1] for number in front]
    assert len(set(sizes)) == len(sizes)
    for number, stop in state.pruned.items():
        rival = int(stop.reason.split("#")[1].split()[0])
        assert trials[rival].values[1] <= trials[number].values[1]
        assert trials[rival].values[0] > stop.values[0]
