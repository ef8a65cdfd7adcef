"""The state against a fake objective; no training. A *life* is one process of a search."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState

from cbnerf.search import driver
from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.sampler import initial_points, open_study
from cbnerf.search.state import StudyState

pytestmark = pytest.mark.search


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    driver.quieten_libraries()


def score(unit: Unit) -> Metrics | None:
    """Best where beta is 1, in any scene."""
    return {"val/psnr": 30 - math.log(unit.overrides["codebook.beta"]) ** 2 + len(unit.scene)}


def live(
    state: StudyState,
    *,
    units: int | None = None,
    objective: Callable[[Unit], Metrics | None] = score,
) -> list[Unit]:
    """Run `units` units, or all that are left; returns those that were booked."""
    done: list[Unit] = []
    while units is None or len(done) < units:
        unit = state.next_unit()
        if unit is None:
            break
        state.record(unit, objective(unit))
        done.append(unit)
    return done


@pytest.fixture
def tiny_plan(tiny_plan):
    """Plans that stop nothing and judge at the end, unless told."""

    def make(scenes: str = "arcade,blinds", **spec):
        return tiny_plan(scenes, **{"stopping": {"rule": "none", "rungs": 1}} | spec)

    return make


def pairs(units: list[Unit]) -> list[tuple[int, str]]:
    return [(unit.configuration, unit.scene) for unit in units]


def states(state: StudyState) -> list[TrialState]:
    return [trial.state for trial in state.study.get_trials()]


def test_each_pair_of_configuration_and_scene_is_handed_out_once(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds", trials=4))
    units = live(state)
    assert pairs(units) == [(n, scene) for n in range(4) for scene in ("arcade", "blinds")]
    assert state.next_unit() is None
    assert len(state.recorded) == 8
    assert all(unit.overrides.keys() == state.plan.spec.space.keys() for unit in units)


def test_the_scenes_of_a_configuration_share_its_knobs(tiny_plan):
    units = live(StudyState(tiny_plan("arcade,blinds", trials=4)))
    for first, second in zip(units[::2], units[1::2], strict=True):
        assert first.overrides == second.overrides


def test_optuna_is_told_the_mean_over_scenes(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds", trials=3))
    values = {"arcade": 20.0, "blinds": 23.0}
    live(state, objective=lambda u: {"val/psnr": values[u.scene] + u.configuration})
    assert [trial.value for trial in state.study.get_trials()] == [21.5, 22.5, 23.5]
    best = state.best()
    assert best is not None and best.number == 2


def test_the_chosen_metric_is_what_counts(tiny_plan):
    state = StudyState(tiny_plan("arcade", trials=2, objectives=["val/ssim"]))

    def contrary(unit: Unit) -> Metrics | None:
        return {"val/psnr": 1.0 * unit.configuration, "val/ssim": -1.0 * unit.configuration}

    live(state, objective=contrary)
    best = state.best()
    assert best is not None and best.number == 0


@pytest.mark.parametrize("broken", [None, {"val/psnr": math.nan}, {"val/psnr": math.inf}])
def test_a_configuration_that_fails_on_a_scene_is_never_the_best(tiny_plan, broken: Metrics | None):
    state = StudyState(tiny_plan("arcade,blinds", trials=3))
    fails = {(1, "arcade"), (2, "blinds")}
    live(state, objective=lambda u: broken if u[:2] in fails else {"val/psnr": 9.0 + u[0]})
    assert states(state) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    best = state.best()
    assert best is not None and best.number == 0
    assert not live(StudyState(state.plan))


def test_without_a_complete_configuration_there_is_no_best(tiny_plan):
    state = StudyState(tiny_plan("arcade", trials=2))
    assert state.best() is None
    live(state, objective=lambda u: None)
    assert state.best() is None


@pytest.mark.parametrize("in_flight", [0, 1, 3])
@pytest.mark.parametrize("booked", [0, 1, 2, 3, 5, 6])
def test_a_killed_search_goes_on_where_it_stopped(tiny_plan, booked: int, in_flight: int):
    """Wherever the first life ends, both lives together book each pair once."""
    plan = tiny_plan("arcade,blinds", trials=3)
    first = StudyState(plan)
    before = live(first, units=booked)
    for _ in range(in_flight):
        first.next_unit()
    second = StudyState(plan)
    assert len(second.recorded) == booked
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
    state = StudyState(plan)
    live(state)
    points = initial_points(plan)
    journal = plan.folder / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in range(len(lines)):
        # Every other time a full disk has left half a line.
        journal.write_bytes(b"".join(lines[:cut]) + lines[cut][: cut % 2 * 9])
        again = StudyState(plan)
        known = len(again.recorded)
        units = live(again)
        assert known + len(units) == 6, cut
        assert states(again) == [TrialState.COMPLETE] * 3, cut
        trials = again.study.get_trials()
        assert all(trial.params.keys() == plan.spec.space.keys() for trial in trials), cut
        assert trials[0].params.items() >= points[0].items(), cut


def test_more_trials_extend_a_finished_search(tiny_plan):
    plan = tiny_plan("arcade", trials=2)
    live(StudyState(plan))
    more = replace(plan, spec=replace(plan.spec, trials=5))
    assert pairs(live(StudyState(more))) == [(2, "arcade"), (3, "arcade"), (4, "arcade")]
    assert not live(StudyState(more))
    assert not live(StudyState(plan))


def test_the_preset_comes_first_then_the_initial_points(tiny_plan):
    plan = tiny_plan("arcade", trials=3, initial=[{"codebook.size": 128}, {"codebook.beta": 0.25}])
    units = live(StudyState(plan))
    base = {"codebook.size": 64, "codebook.beta": 0.25, "loss.lambda_recon": 0.01}
    assert units[0].overrides == base
    assert units[1].overrides == base | {"codebook.size": 128}
    # The second point of the file is the preset again, so the third is the sampler's.
    assert units[2].overrides not in (base, base | {"codebook.size": 128})


def test_a_preset_outside_the_space_is_not_forced_into_it(tiny_plan):
    space = {"codebook.size": {"choices": [128, 256]}, "codebook.beta": {"low": 0.1, "high": 0.3}}
    plan = tiny_plan("arcade", trials=1, space=space)
    (unit,) = live(StudyState(plan))
    assert unit.overrides["codebook.size"] in (128, 256)
    assert unit.overrides["codebook.beta"] == 0.25


def test_proposals_stay_in_the_space_and_have_the_types_of_the_knobs(tiny_plan):
    space = {
        "codebook.dim": {"low": 4, "high": 64, "step": 4},
        "codebook.size": {"low": 64, "high": 4096, "log": True},
        "codebook.beta": {"low": 0.5, "high": 1.0, "step": 0.25},
        "codebook.imitation": {"choices": ["vq", "ce"]},
        "codebook.ema": {"choices": [True, False]},
    }
    for unit in live(
        StudyState(tiny_plan("arcade", trials=12, space=space)), objective=lambda u: None
    ):
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
        return proposals(live(StudyState(plan)))

    first = run("a", 1)
    assert run("b", 1) == first
    assert run("c", 2) != first
    assert len(set(first)) == 8


def test_a_restarted_sampler_does_not_repeat_its_first_life(tiny_plan):
    plan = tiny_plan("arcade", trials=3)
    proposed = proposals(live(StudyState(plan)))
    for trials in (5, 7, 9):
        more = replace(plan, spec=replace(plan.spec, trials=trials))
        proposed += proposals(live(StudyState(more)))
    assert len(set(proposed)) == 9


def test_a_search_finds_better_than_its_start(tiny_plan):
    state = StudyState(tiny_plan("arcade", trials=30))
    live(state)
    best, start = state.best(), state.study.get_trials()[0].value
    assert best is not None and best.value is not None and start is not None
    assert best.value > start and abs(math.log(best.params["codebook.beta"])) < 0.5


def test_a_study_made_anew_is_another_study(tiny_plan):
    plan = tiny_plan("arcade")
    first, again = StudyState(plan).id, StudyState(plan).id
    (plan.folder / "optuna.journal").unlink()
    assert again == first != StudyState(plan).id
    assert open_study(plan).study_name == "test"


RACE = {"rule": "race", "rungs": 3, "grace_period": 1}
SCENES = ["arcade", "blinds", "coral", "lattice"]


def climb(unit: Unit) -> Metrics:
    """The preset is best by a decibel, and it shows from the first rung on."""
    worse = unit.configuration > 0
    return {"val/psnr": 20.0 + unit.rung - worse + len(unit.scene) / 10, "seconds": 3.0**unit.rung}


def test_a_configuration_climbs_rung_by_rung_through_the_scenes(tiny_plan):
    units = live(StudyState(tiny_plan("arcade,blinds", trials=1, stopping=RACE)), objective=climb)
    assert [(unit.rung, unit.scene) for unit in units] == [
        (rung, scene) for rung in range(3) for scene in ("arcade", "blinds")
    ]


def test_a_race_stops_what_is_behind_and_says_what_it_would_have_reached(tiny_plan):
    plan = tiny_plan("arcade,blinds,coral,lattice", trials=6, stopping=RACE)
    state = StudyState(plan)
    units = live(state, objective=climb)
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


def test_a_race_stops_nothing_that_is_ahead(tiny_plan):
    def better(unit: Unit) -> Metrics:
        return {"val/psnr": 20.0 + unit.rung + unit.configuration}

    state = StudyState(tiny_plan("arcade,blinds", trials=5, stopping=RACE))
    assert len(live(state, objective=better)) == 30 and not state.pruned


def test_a_race_learns_where_to_begin(tiny_plan):
    """Where one scene tells configurations apart and the others do not, it comes first."""

    def informative(unit: Unit) -> Metrics:
        shared, own = np.random.default_rng(unit.configuration), SCENES.index(unit.scene)
        worse = [0.02, 0.02, 0.4, 0.02][own] * abs(shared.normal()) * (unit.configuration > 0)
        return {"val/psnr": 20 - worse - 0.05 * shared.normal(size=4)[own]}

    plan = tiny_plan(",".join(SCENES), trials=16, stopping={"rule": "race"})
    units = live(StudyState(plan), objective=informative)
    begins = {unit.configuration: unit.scene for unit in reversed(units)}
    assert begins[0] == "arcade"
    assert {begins[number] for number in range(10, 16)} == {"coral"}


@pytest.mark.parametrize("rule", ["race", "asha", "wilcoxon"])
def test_any_rule_goes_on_from_any_line_of_its_journal(tiny_plan, rule: str):
    """The second life ends as the first did: same knobs, same verdicts, no unit done twice."""
    stopping = {"rule": rule, "rungs": 2, "grace_period": 1, "threshold": 0.2}
    plan = tiny_plan("arcade,blinds,coral,mosaic", trials=5, stopping=stopping)
    first = StudyState(plan)
    done = live(first, objective=climb)
    ends = states(first)
    assert first.pruned
    journal = plan.folder / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in range(5, len(lines), 3):
        journal.write_bytes(b"".join(lines[:cut]))
        asked = open_study(plan).get_trials()
        if asked and 0 < len(asked[-1].params) < len(plan.spec.space):
            continue  # in the middle of asking: the rest of the knobs is drawn anew
        again = StudyState(plan)
        known = len(again.recorded)
        units = live(again, objective=climb)
        assert known + len(units) == len(done), cut
        assert units == done[known:], cut
        assert again.pruned == first.pruned, cut
        assert states(again) == ends, cut


@pytest.mark.parametrize("rule", ["race", "asha"])
def test_a_second_life_judges_by_all_that_the_first_one_knew(tiny_plan, rule: str):
    """Configurations with lower numbers, too, are judged by what those with higher ones reached."""
    stopping = {"rule": rule, "rungs": 2, "grace_period": 1, "threshold": 0.2}
    plan = tiny_plan("arcade,blinds,coral,mosaic", trials=8, stopping=stopping)
    journal = plan.folder / "optuna.journal"
    num_judged = 0
    for seed in range(3):
        journal.unlink(missing_ok=True)
        order, first = np.random.default_rng(seed), StudyState(plan)
        at_work = [unit for _ in range(8) if (unit := first.next_unit())]
        while at_work:
            unit = at_work.pop(order.integers(len(at_work)))
            first.record(unit, climb(unit))
            under_way = [number for number in first.started if number not in first.ended]
            judged = {n: stop for n in under_way if (stop := first._racing.prune(n, {}))}
            left = journal.read_bytes()
            assert StudyState(plan).pruned == first.pruned | judged
            journal.write_bytes(left)
            num_judged += len(judged)
            if unit := first.next_unit():
                at_work.append(unit)
    assert num_judged


def test_a_look_at_a_running_search_counts_what_has_ended(tiny_plan):
    plan = tiny_plan("arcade,blinds", trials=3)
    running = StudyState(plan)
    live(running, units=3)
    seen = StudyState(plan, adopt=False)
    assert (seen.ended, seen.started, seen.num_ended) == (running.ended, running.started, 1)
    assert seen.ended == [0] and seen.started == [0, 1]


def test_what_stage_1_left_must_stay_the_same(tiny_plan):
    plan = tiny_plan("arcade,blinds")
    StudyState(plan).record_field("arcade", "field-arcade-1", 3.0)
    again = StudyState(plan)
    again.record_field("blinds", "field-blinds-1", 4.0)
    again.record_field("arcade", "field-arcade-1", 3.0)
    assert again.field_seconds == {"arcade": 3.0, "blinds": 4.0}
    with pytest.raises(ValueError, match="photographs of arcade, or the code of stage 1, have"):
        again.record_field("arcade", "field-arcade-2", 3.0)


def test_knobs_that_do_not_fit_each_other_fail_a_configuration_and_not_the_search(tiny_plan):
    space = {
        "codebook.kind": {"choices": ["vq", "fsq"]}, "codebook.size": {"choices": [100, 256]},
    }  # fmt: skip
    plan = tiny_plan("arcade", trials=12, space=space, objectives=["val/psnr", "parameters"])
    state = StudyState(plan)
    live(state, objective=lambda unit: {"val/psnr": 20.0})
    assert state.is_over and {*states(state)} == {TrialState.COMPLETE, TrialState.FAIL}
    failed = [t.params for t in state.study.get_trials() if t.state == TrialState.FAIL]
    assert all(knobs == {"codebook.kind": "fsq", "codebook.size": 100} for knobs in failed)


def test_a_lasting_failure_ends_a_configuration_at_once(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds", trials=3, stopping=RACE))
    fails = {"val/psnr": math.nan}
    units = live(state, objective=lambda unit: fails if unit.configuration == 1 else climb(unit))
    assert sum(unit.configuration == 1 for unit in units) == 1
    assert states(state)[1] == TrialState.FAIL and state.is_over


def test_a_unit_that_ends_after_its_configuration_was_stopped_changes_nothing(tiny_plan):
    state = StudyState(tiny_plan("arcade,blinds,coral,lattice", trials=2, stopping=RACE))
    while state.num_ended < 1:
        unit = state.next_unit()
        assert unit is not None
        state.record(unit, climb(unit))
    held = [state.next_unit() for _ in range(3)]  # of configuration 1: the rest of the search
    assert all(unit is not None and unit.configuration == 1 for unit in held)
    while not state.is_over:
        unit = state.next_unit()
        assert unit is not None
        state.record(unit, climb(unit))
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
        state.record(unit, climb(unit))
    while state.best() is None:
        unit = state.next_unit()
        assert unit is not None
        state.record(unit, climb(unit))
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
        state.record(unit, climb(unit))
    assert [(u.configuration, u.rung) for u in state.next_walk()] == [(0, 1), (0, 1)]


def test_what_lies_beyond_a_limit_is_told_and_never_trained(tiny_plan):
    plan = tiny_plan("arcade", trials=12, limits={"codebook.size": 100})
    state = StudyState(plan)
    units = live(state)
    assert units and all(unit.overrides["codebook.size"] == 64 for unit in units)
    assert len(units) < 12 and state.is_over
    trials = state.study.get_trials()
    beyond = [t for t in trials if t.params["codebook.size"] > 100]
    assert {t.state for t in beyond} == {TrialState.PRUNED}
    assert all(t.constraints["codebook.size"] > 0 for t in beyond)
    assert StudyState(plan).is_over


def test_several_objectives_give_a_front_and_stop_only_what_costs_as_much(tiny_plan):
    objectives = ["val/psnr", "codebook.size"]
    plan = tiny_plan("arcade,blinds", trials=12, stopping=RACE, objectives=objectives)

    def larger_is_better(unit: Unit) -> Metrics:
        size, beta = unit.overrides["codebook.size"], unit.overrides["codebook.beta"]
        return {"val/psnr": 20 + math.log2(size) / 5 - abs(math.log(beta)) + unit.rung}

    state = StudyState(plan)
    live(state, objective=larger_is_better)
    trials, front = state.study.get_trials(), state._racing.front()
    assert front == sorted(front) and set(front) == {t.number for t in state.study.best_trials}
    sizes = [trials[number].values[1] for number in front]
    assert len(set(sizes)) == len(sizes)
    for number, stop in state.pruned.items():
        rival = int(stop.reason.split("#")[1].split()[0])
        assert trials[rival].values[1] <= trials[number].values[1]
        assert trials[rival].values[0] > stop.values[0]
