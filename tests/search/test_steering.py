"""Queueing configurations in a study and looking at what is next, from outside its driver."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from cbnerf.cli import main
from cbnerf.search import driver
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics, Racing
from cbnerf.search.request import Request
from cbnerf.search.state import StudyState
from cbnerf.search.steering import Queued, enqueue, suggestions

pytestmark = pytest.mark.search

SPACE = {
    "codebook.size": {"choices": [64, 128, 1024]},
    "codebook.beta": {"low": 0.05, "high": 2.0, "log": True},
    "loss.lambda_recon": {"low": 0.001, "high": 30.0, "log": True},
}
NOTHING = {"rule": "none", "rungs": 1}
MINE = ["codebook.size=128", "codebook.beta=.5"]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    driver.quieten_libraries()


@pytest.fixture
def begun(tiny_plan) -> Callable[..., Plan]:
    """The plan of a study whose request is on the disk, as its driver leaves it."""

    def make(**about) -> Plan:
        spec = {"resolution": "tiny", "trials": 3, "space": SPACE, "stopping": NOTHING} | about
        plan = tiny_plan(**spec)
        plan.folder.mkdir(parents=True)
        scenes = list(plan.scenes)
        Request(scenes="all", data=None, spec=spec, scene_names=scenes).write(plan.folder)
        return plan

    return make


def score(unit: Unit) -> Metrics:
    """Best where beta is 1."""
    psnr = 30 - math.log(unit.overrides["codebook.beta"]) ** 2 + len(unit.scene) + unit.rung
    return {"val/psnr": psnr, "seconds": 1.0}


def run(state: StudyState, units: int = 10**6) -> list[Unit]:
    done: list[Unit] = []
    while len(done) < units and (unit := state.next_unit()):
        state.record(unit, score(unit))
        done.append(unit)
    return done


def test_a_running_study_tries_what_was_queued_next_and_proposes_the_other_knobs(begun):
    plan = begun(trials=4)
    state = StudyState(plan)
    run(state, 3)  # One configuration is under way.
    assert enqueue(plan.storage, plan.name, MINE) == Queued(2, 0, 2)
    assert enqueue(plan.storage, plan.name, ["codebook.size=64"]) == Queued(3, 1, 2)
    tried = {unit.configuration: unit.overrides for unit in run(state)}
    assert tried[2].items() >= {"codebook.size": 128, "codebook.beta": 0.5}.items()
    assert tried[2]["loss.lambda_recon"] in plan.spec.space["loss.lambda_recon"]
    assert tried[3]["codebook.size"] == 64
    assert state.is_over and set(tried) == {1, 2, 3}


def test_what_was_queued_survives_a_killed_driver(begun):
    plan = begun(trials=3)
    run(StudyState(plan), 2)
    journal = plan.folder / "optuna.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "wor')  # A killed driver has left half a line.
    enqueue(plan.storage, plan.name, MINE)
    tried = {unit.configuration: unit.overrides for unit in run(StudyState(plan))}
    assert tried[1]["codebook.beta"] == 0.5 and set(tried) == {1, 2}


def test_what_does_not_fit_into_the_budget_waits_for_a_larger_one(begun):
    plan = begun(trials=2)
    state = StudyState(plan)
    run(state)
    assert enqueue(plan.storage, plan.name, MINE) == Queued(2, 0, 0)
    assert state.next_unit() is None
    more = replace(plan, spec=replace(plan.spec, trials=3))
    assert {unit.overrides["codebook.beta"] for unit in run(StudyState(more))} == {0.5}


def test_many_may_queue_while_the_driver_asks(begun):
    plan = begun(trials=12)
    state = StudyState(plan)
    run(state, 1)
    betas = [round(0.1 * n, 1) for n in range(1, 9)]

    def queue(some: list[float]) -> None:
        for beta in some:
            enqueue(plan.storage, plan.name, [f"codebook.beta={beta}"])

    threads = [threading.Thread(target=queue, args=(betas[n::2],)) for n in range(2)]
    with FileLock(plan.lock_file):  # as the driver of a running study holds it
        for thread in threads:
            thread.start()
        done = run(state, 6)
        for thread in threads:
            thread.join()
        done += run(state)
    tried = {unit.configuration: unit.overrides for unit in done}
    assert len(done) == 23 and set(tried) | {0} == set(range(12))
    assert {tried[n]["codebook.beta"] for n in tried} >= set(betas)
    again = StudyState(plan, adopt=False)
    assert again.is_over and again.best().number == state.best().number


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["codebook.sice=64"], "unknown knob 'codebook.sice'; did you mean codebook.size"),
        (["refiner.optim.lr=1e-3"], "study test does not search refiner.optim.lr, but codebook.si"),
        (["codebook.size=65"], "codebook.size = 65 is not in the space: one of 64, 128, 1024"),
        (["codebook.size=much"], "codebook.size = 'much' is not an integer"),
        (["codebook.beta=3"], "codebook.beta = 3.0 is not in the space: between 0.05 and 2"),
        (["codebook.beta=nan"], "codebook.beta"),
        (["codebook.beta"], "'codebook.beta' is not of the form knob=value"),
        (["codebook.beta=1", "codebook.beta=.5"], "'codebook.beta=.5' is named twice"),
        ([], "name a knob"),
        (["codebook.size=128", "codebook.beta=0.5"], "it holds this configuration already"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_queues_nothing(
    begun, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
):
    plan = begun()
    StudyState(plan)
    enqueue(plan.storage, plan.name, MINE)
    with pytest.raises(SystemExit) as stop:
        main(["enqueue", "test", *settings, f"--storage={plan.storage}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    queued = [t for t in StudyState(plan, adopt=False).study.get_trials() if not t.params]
    assert len(queued) == 2  # the preset, and the one above


@pytest.mark.parametrize(
    ("limits", "settings", "message"),
    [
        ({"codebook.size": 128}, ["codebook.size=1024"], r"codebook\.size = 1024 has at least 1024 "
         r"codes, more than the study's limits: codebook\.size: 128"),
        ({"parameters": 60_000}, ["codebook.size=1024", "codebook.beta=1"],
         r"codebook\.size = 1024, codebook\.beta = 1 has at least \d+ parameters, .*: 60000"),
        ({"parameters": 10_000}, ["codebook.beta=1"], r"beta = 1 has at least \d+ parameters"),
    ],
)  # fmt: skip
def test_what_exceeds_a_limit_is_refused_and_what_may_keep_within_it_is_not(
    begun, limits: dict[str, int], settings: list[str], message: str
):
    plan = begun(limits=limits)
    state = StudyState(plan)
    before = len(state.study.get_trials())
    with pytest.raises(ValueError, match=message):
        enqueue(plan.storage, plan.name, settings)
    assert len(state.study.get_trials()) == before
    if limits != {"parameters": 10_000}:  # beyond which all configurations lie
        assert enqueue(plan.storage, plan.name, ["codebook.size=64"]).number == before


def test_suggestions_leave_out_what_lies_beyond_a_limit(begun):
    plan = begun(trials=12, limits={"codebook.size": 64})
    state = StudyState(plan)
    found = suggestions(plan.storage, plan.name, 3)["next"]
    asked = [state.next_unit() for _ in range(6)]
    tried = {unit.configuration: unit.overrides for unit in asked if unit}
    assert [tried[number] for number in sorted(tried)] == found
    assert len(tried) == 3 and max(tried) > 2  # others lay beyond it


def test_a_study_that_has_not_begun_is_not_begun(begun):
    plan = begun()
    with pytest.raises(ValueError, match="study test: it has not begun yet"):
        enqueue(plan.storage, plan.name, MINE)
    with pytest.raises(ValueError, match="no study 'other' in .*; there are test"):
        suggestions(plan.storage, "other", 1)
    assert not (plan.folder / "optuna.journal").exists()


@pytest.mark.parametrize("sampler", ["sobol-tpe", "tpe"])
def test_suggestions_are_what_the_driver_tries_next(begun, sampler: str):
    plan = begun(trials=9, sampler=sampler)
    state = StudyState(plan)
    run(state, 10)  # Five configurations have ended.
    enqueue(plan.storage, plan.name, ["codebook.beta=1.5"])
    journal = (plan.folder / "optuna.journal").read_bytes()
    found = suggestions(plan.storage, plan.name, 20)
    assert (plan.folder / "optuna.journal").read_bytes() == journal
    assert [one["codebook.beta"] for one in found["next"]][0] == 1.5
    assert len(found["next"]) == 4  # as many as the budget allows
    assert (found["ended"], found["trials"]) == (5, 9)
    asked = [state.next_unit() for _ in range(7)]  # A unit is left out for each scene.
    tried = {unit.configuration: unit.overrides for unit in asked if unit}
    assert [tried[number] for number in sorted(tried)][:2] == found["next"][:2]


def test_the_race_tells_good_configurations_from_bad_ones(begun):
    plan = begun(trials=6, stopping={"rule": "race", "rungs": 2, "grace_period": 1})
    state = StudyState(plan)
    for beta in ("1.9", "0.06"):
        enqueue(plan.storage, plan.name, [f"codebook.beta={beta}"])
    while state.best() is None:
        run(state, 1)
    run(state, 3)
    found = suggestions(plan.storage, plan.name, 0)
    known = {one["number"]: one for one in found["configurations"]}
    assert found["incumbent"] == state.best().number
    assert known[found["incumbent"]]["chance"] is None
    judged = [one for one in known.values() if one["chance"] is not None]
    assert judged and all(0 <= one["chance"] <= 1 for one in judged)
    by_score = sorted(judged, key=lambda one: math.log(one["knobs"]["codebook.beta"]) ** 2)
    chances = [one["chance"] for one in by_score]
    assert chances == sorted(chances, reverse=True)
    for number, one in known.items():
        assert one["units"] == len(state.results(number))


def test_the_commands_print_tables_and_json(
    begun, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    plan = begun(trials=2)
    run(StudyState(plan))
    capsys.readouterr()
    main(["enqueue", "test", *MINE, f"--storage={plan.storage}"])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "configuration 2 of study test is next"
    assert "`tune.py --resume --name test --trials NUMBER`" in told[1]
    main(["suggest", "test", "--json", f"--storage={plan.storage}"])
    found = json.loads(capsys.readouterr().out)
    assert [one["end"] for one in found["configurations"]] == ["finished", "finished"]
    main(["suggest", "test", f"--storage={plan.storage}"])
    text = capsys.readouterr().out
    assert "codebook.beta" in text and "| finished |" in text


def test_a_race_accepts_numbers_beyond_those_that_were_planned(tiny_plan):
    plan = tiny_plan(trials=2)
    racing = Racing(plan, 2)
    racing.make_room(4)
    racing.make_room(1)
    for scene in plan.trainings:
        for rung in range(plan.rungs):
            racing.add(4, (scene, rung), {"val/psnr": 30.0, "seconds": 1.0})
    assert racing.finish(4, {}) == [30.0] and racing.best() == 4
