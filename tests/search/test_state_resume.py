"""Searches that are killed and resumed, on a fake objective."""

from dataclasses import replace

import numpy as np
import pytest
from objectives import first_is_best, train_units, trial_states
from optuna.trial import TrialState

from cbnerf.search.plan import Unit
from cbnerf.search.sampler import initial_points, open_study
from cbnerf.search.state import StudyState

pytestmark = [pytest.mark.search, pytest.mark.usefixtures("quiet")]


def pairs(units: list[Unit]) -> list[tuple[int, str]]:
    return [(unit.configuration, unit.scene) for unit in units]


@pytest.mark.parametrize("in_flight", [0, 1, 3])
@pytest.mark.parametrize("recorded", [0, 1, 2, 3, 5, 6])
def test_a_killed_search_resumes_where_it_stopped(unpruned_plan, recorded: int, in_flight: int):
    """Wherever the first process ends, both together record each pair once."""
    plan = unpruned_plan("arcade,blinds", trials=3)
    first = StudyState(plan)
    before = train_units(first, most=recorded)
    for _ in range(in_flight):
        first.next_unit()
    second = StudyState(plan)
    assert len(second.recorded) == recorded
    after = train_units(second)
    every = [(number, scene) for number in range(3) for scene in plan.scenes]
    assert sorted(pairs(before) + pairs(after)) == every
    assert trial_states(second) == [TrialState.COMPLETE] * 3
    knobs = {}
    for unit in before + after:
        assert knobs.setdefault(unit.configuration, unit.overrides) == unit.overrides


def test_a_search_resumes_from_any_line_of_its_journal(unpruned_plan):
    """A kill may fall between any two writes to the journal."""
    plan = unpruned_plan("arcade,blinds", trials=3)
    state = StudyState(plan)
    train_units(state)
    points = initial_points(plan)
    journal = plan.folder / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in range(len(lines)):
        # Every other time a full disk has left half a line.
        journal.write_bytes(b"".join(lines[:cut]) + lines[cut][: cut % 2 * 9])
        again = StudyState(plan)
        known = len(again.recorded)
        units = train_units(again)
        assert known + len(units) == 6, cut
        assert trial_states(again) == [TrialState.COMPLETE] * 3, cut
        trials = again.study.get_trials()
        assert all(trial.params.keys() == plan.spec.space.keys() for trial in trials), cut
        assert trials[0].params.items() >= points[0].items(), cut


def test_more_trials_extend_a_finished_search(unpruned_plan):
    plan = unpruned_plan("arcade", trials=2)
    train_units(StudyState(plan))
    more = replace(plan, spec=replace(plan.spec, trials=5))
    assert pairs(train_units(StudyState(more))) == [(2, "arcade"), (3, "arcade"), (4, "arcade")]
    assert not train_units(StudyState(more))
    assert not train_units(StudyState(plan))


def test_a_restarted_sampler_does_not_repeat_its_proposals(unpruned_plan):
    plan = unpruned_plan("arcade", trials=3)
    proposed = []
    for trials in (3, 5, 7, 9):
        more = replace(plan, spec=replace(plan.spec, trials=trials))
        units = train_units(StudyState(more))
        proposed += [unit.overrides["codebook.beta"] for unit in units]
    assert len(set(proposed)) == 9


def test_a_study_with_a_new_journal_has_another_id(unpruned_plan):
    plan = unpruned_plan("arcade")
    first, again = StudyState(plan).id, StudyState(plan).id
    (plan.folder / "optuna.journal").unlink()
    assert again == first != StudyState(plan).id
    assert open_study(plan).study_name == "test"


def test_a_race_resumes_from_any_line_of_its_journal(unpruned_plan):
    """A resumed search ends as the first did: same knobs, same verdicts, no unit trained twice."""
    stopping = {"rule": "race", "rungs": 2, "grace_period": 1, "threshold": 0.2}
    plan = unpruned_plan("arcade,blinds,coral,mosaic", trials=5, stopping=stopping)
    first = StudyState(plan)
    done = train_units(first, first_is_best)
    ends = trial_states(first)
    assert first.pruned
    journal = plan.folder / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in range(5, len(lines), 3):
        journal.write_bytes(b"".join(lines[:cut]))
        trials = open_study(plan).get_trials()
        if trials and 0 < len(trials[-1].params) < len(plan.spec.space):
            continue  # killed while it asked: the other knobs are drawn again
        again = StudyState(plan)
        known = len(again.recorded)
        units = train_units(again, first_is_best)
        assert known + len(units) == len(done), cut
        assert units == done[known:], cut
        assert again.pruned == first.pruned, cut
        assert trial_states(again) == ends, cut


def test_a_resumed_search_prunes_by_all_results_of_the_first(unpruned_plan):
    """Configurations with lower numbers, too, are compared with those that have higher ones."""
    stopping = {"rule": "race", "rungs": 2, "grace_period": 1, "threshold": 0.2}
    plan = unpruned_plan("arcade,blinds,coral,mosaic", trials=8, stopping=stopping)
    journal = plan.folder / "optuna.journal"
    num_to_prune = 0
    for seed in range(3):
        journal.unlink(missing_ok=True)
        order, first = np.random.default_rng(seed), StudyState(plan)
        running = [unit for _ in range(8) if (unit := first.next_unit())]
        while running:
            unit = running.pop(order.integers(len(running)))
            first.record(unit, first_is_best(unit))
            under_way = [number for number in first.started if number not in first.ended]
            to_prune = {n: stop for n in under_way if (stop := first._racing.prune(n, {}))}
            left = journal.read_bytes()
            assert StudyState(plan).pruned == first.pruned | to_prune
            journal.write_bytes(left)
            num_to_prune += len(to_prune)
            if unit := first.next_unit():
                running.append(unit)
    assert num_to_prune


def test_a_look_at_a_running_search_counts_what_has_ended(unpruned_plan):
    plan = unpruned_plan("arcade,blinds", trials=3)
    running = StudyState(plan)
    train_units(running, most=3)
    seen = StudyState(plan, adopt=False)
    assert (seen.ended, seen.started, seen.num_ended) == (running.ended, running.started, 1)
    assert seen.ended == [0] and seen.started == [0, 1]
