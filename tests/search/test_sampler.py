"""The even start of a search, and what follows it; no training."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from cbnerf.config import flatten
from cbnerf.search.sampler import (
    initial_points,
    make_study,
    open_study,
    propose,
    quasi_random_point,
    read_study,
    suggest,
)

pytestmark = pytest.mark.search

SPACE = {
    "codebook.size": {"choices": [64, 128, 256, 512]},
    "codebook.beta": {"low": 0.05, "high": 2.0, "log": True},
    "codebook.dim": {"low": 4, "high": 32, "step": 4},
    "refiner.blocks": {"low": 1, "high": 8},
    "loss.lambda_vq": {"low": 0.0, "high": 8.0},
}


@pytest.mark.parametrize("seed", [0, 1])
def test_points_of_the_start_lie_evenly_on_every_axis(tiny_plan, seed: int):
    """Each half, quarter and eighth of a domain has its share of eight points."""
    plan = tiny_plan(space=SPACE, seed=seed)
    points = [quasi_random_point(plan, number) for number in range(8)]
    sizes = [point["codebook.size"] for point in points]
    assert sorted(sizes) == [64, 64, 128, 128, 256, 256, 512, 512]
    assert sorted(point["codebook.dim"] for point in points) == [*range(4, 33, 4)]
    assert sorted(int(point["loss.lambda_vq"]) for point in points) == [*range(8)]
    shares = np.log([point["codebook.beta"] / 0.05 for point in points]) / np.log(2.0 / 0.05)
    assert sorted(np.floor(8 * shares)) == [*range(8)]
    assert all(type(p["refiner.blocks"]) is int and 1 <= p["refiner.blocks"] <= 8 for p in points)


def test_points_lie_evenly_between_bounds_whose_ratio_overflows(tiny_plan):
    space = {"loss.lambda_vq": {"low": 1e-310, "high": 1e18, "log": True}}
    plan = tiny_plan(space=space)
    points = [quasi_random_point(plan, number)["loss.lambda_vq"] for number in range(4)]
    assert sorted(np.floor(4 * (np.log10(points) + 310) / 328)) == [0, 1, 2, 3]
    assert all(point in plan.spec.space["loss.lambda_vq"] for point in points)


def test_points_of_the_start_depend_on_seed_and_number_alone(tiny_plan):
    plan = tiny_plan(space=SPACE, trials=4)
    more = tiny_plan(space=SPACE, trials=40)
    other = tiny_plan(space=SPACE, trials=4, seed=1)
    assert quasi_random_point(plan, 3) == quasi_random_point(more, 3)
    assert quasi_random_point(plan, 3) != quasi_random_point(other, 3)
    assert quasi_random_point(plan, 3) != quasi_random_point(plan, 2)


@pytest.mark.parametrize("sampler", ["sobol-tpe", "tpe", "random"])
def test_a_search_starts_from_the_points_to_try_first_and_then_evenly(tiny_plan, sampler: str):
    initial = [{"codebook.size": 512}]
    plan = tiny_plan(space=SPACE, trials=16, initial=initial, sampler=sampler)
    study = make_study(plan)
    proposed = []
    for number in range(8):
        trial = propose(plan, study, number)
        proposed.append(suggest(trial, plan))
        study.tell(trial, float(number))
    assert proposed[0]["codebook.size"] == plan.base.codebook.size
    assert proposed[1] == proposed[0] | {"codebook.size": 512}
    even = [proposed[number] == quasi_random_point(plan, number) for number in range(8)]
    # A quarter of sixteen ends before TPE learns from them.
    assert even == [False, False, *([sampler == "sobol-tpe"] * 2), *([False] * 4)]


def test_a_preset_between_the_points_of_a_grid_is_not_tried(tiny_plan):
    space = {"codebook.size": {"low": 50, "high": 100, "step": 25}, "codebook.dim": SPACE[
        "codebook.dim"]}  # fmt: skip
    plan = tiny_plan(space=space)
    assert plan.base.codebook.size == 64  # between the bounds, but not on the grid
    assert initial_points(plan) == [{"codebook.dim": plan.base.codebook.dim}]


def test_points_beyond_a_limit_are_not_tried_first(tiny_plan):
    limits = {"codebook.size": 128}
    assert tiny_plan(space=SPACE).base.codebook.size == 64
    plan = tiny_plan(space=SPACE, limits=limits, initial=[{"codebook.size": 128}])
    assert [point["codebook.size"] for point in initial_points(plan)] == [64, 128]
    with pytest.raises(ValueError, match=r"^initial: .*codebook\.size = 256.* limits: codebook"):
        tiny_plan(space=SPACE, limits=limits, initial=[{"codebook.size": 256}])
    without = tiny_plan(space=SPACE, limits={"codebook.size": 63})
    assert initial_points(without) == []


def test_costs_of_stage_2_are_not_asked_of_a_method_without_it(tiny_plan):
    space = {"field.optim.lr": {"low": 1e-3, "high": 1e-1}}
    for costs in ({"limits": {"parameters": 9}}, {"objectives": ["val/psnr", "codebook.size"]}):
        with pytest.raises(ValueError, match="is a cost of stage 2, and nerf ends with stage 1"):
            tiny_plan(method="nerf", space=space, **costs)


def test_many_that_start_at_once_lie_evenly(tiny_plan):
    plan = tiny_plan(space=SPACE, trials=16)
    study = make_study(plan)
    for number in range(9):
        suggest(propose(plan, study, number), plan)
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.RUNNING] * 9
    assert [t.params for t in trials[1:]] == [
        quasi_random_point(plan, number) for number in range(1, 9)
    ]


@pytest.mark.parametrize("left", ["file", "link", "link to where it was"])
def test_a_lock_that_a_killed_driver_has_left_is_not_waited_for(
    left: str, tiny_plan, monkeypatch: pytest.MonkeyPatch
):
    plan = tiny_plan("arcade")
    study = open_study(plan)
    lock = plan.folder / "optuna.journal.lock"
    if left == "file":
        lock.touch()
    else:  # Optuna's other kind of lock, as this study or one that was moved has left it
        lock.symlink_to(plan.folder / ("optuna.journal" if left == "link" else "elsewhere"))
    # Whoever waits for a lock looks at its age or sleeps.
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits for a lock"))
    monkeypatch.setattr(os, "stat", refuse(os.stat, lock))
    again = open_study(plan)
    again.set_user_attr("written", True)
    assert again.user_attrs == study.user_attrs | {"written": True}
    monkeypatch.undo()
    assert [entry.name for entry in plan.folder.iterdir()] == ["optuna.journal"]


def refuse(stat: Callable[..., os.stat_result], file: Path) -> Callable[..., os.stat_result]:
    """`stat`, which ends a test that asks for this file."""

    def look(path: Any, **options: Any) -> os.stat_result:
        assert str(path) != str(file), "waits for a lock"
        return stat(path, **options)

    return look


def test_reading_begins_no_study_and_changes_none(tiny_plan, tmp_path: Path):
    plan = tiny_plan("arcade")
    with pytest.raises(ValueError, match="study test: it has not begun yet"):
        read_study(plan)
    assert not list(tmp_path.iterdir())
    plan.folder.mkdir(parents=True)
    journal = plan.folder / "optuna.journal"
    journal.touch()  # The driver has just made it.
    with pytest.raises(ValueError, match="it has not begun yet"):
        read_study(plan)
    assert journal.read_bytes() == b""
    study = open_study(plan)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    for cut in range(1, len(lines) + 1):  # The driver is at its first lines.
        journal.write_bytes(b"".join(lines[:cut]) + b'{"op_code": 4, "torn')
        before = journal.read_bytes()
        read_study(plan).get_trials()
        assert journal.read_bytes() == before
    assert [entry.name for entry in plan.folder.iterdir()] == ["optuna.journal"]
    journal.write_bytes(b"".join(lines))
    assert [trial.state for trial in read_study(plan).trials] == [t.state for t in study.trials]


def test_a_damaged_journal_is_named(tiny_plan):
    plan = tiny_plan("arcade")
    open_study(plan)
    journal = plan.folder / "optuna.journal"
    journal.write_bytes(b"nonsense\n" + journal.read_bytes())
    for look in (read_study, open_study):
        with pytest.raises(ValueError, match="optuna.journal: damaged"):
            look(plan)


@pytest.mark.parametrize(
    "name, domain, own",
    [
        ("codebook.dim", {"low": 4, "high": 64, "step": 5}, 32),  # 4, 9, ..., 64
        ("refiner.optim.lr", {"low": 1e-3, "high": 1e-2, "step": 3e-3}, 2e-3),
        ("codebook.size", {"choices": [128, 256]}, 64),
    ],
)
def test_a_preset_outside_the_space_is_not_tried(tiny_plan, name: str, domain: dict, own: float):
    plan = tiny_plan(space={name: domain})
    assert flatten(plan.base)[name] == own
    assert initial_points(plan) == []
    trial = propose(plan, make_study(plan), 0)
    assert suggest(trial, plan)[name] in plan.spec.space[name]
