import io
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from objectives import train_units

from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.state import StudyState
from cbnerf.search.status import Status, StatusLine, describe, find_status, settled

pytestmark = pytest.mark.search

HALF_WAY = Status(
    ended=5, trials=12, objective="val/psnr", ranking=[(7, 27.418), (3, 27.3664)], running=2,
    done=31, pruned=20, seconds_left=720.0, spent=1530.0, price=7920.0, has_gpus=True,
)  # fmt: skip


def test_a_status_is_one_line():
    assert describe(HALF_WAY) == (
        "best #07 val/psnr 27.418, +0.052 to #03 | 5/12 ended | 12 min left | "
        "units: 2 running, 31 done, 20 pruned | GPU time 26 min of 2.2 h unpruned"
    )
    alone = HALF_WAY._replace(ranking=[(0, -3.0)], has_gpus=False)
    assert describe(alone).startswith("best #00 val/psnr -3.000 | 5/12")
    assert describe(alone).endswith("| training time 26 min of 2.2 h unpruned")
    fresh = HALF_WAY._replace(ended=0, ranking=[], running=1, done=0, pruned=0, seconds_left=None,
                              spent=10.0, price=None)  # fmt: skip
    assert describe(fresh) == (
        "none finished yet | 0/12 ended | units: 1 running, 0 done, 0 pruned | GPU time 10 s"
    )


def race(plan: Plan, values: list[float]) -> StudyState:
    """A finished race: a unit takes 9 s per full training, and reaches the value of its
    configuration less 1 dB for each rung that is missing."""
    state = StudyState(plan)
    state.record_field("arcade", "entry", 40.0)

    def score(unit: Unit) -> Metrics:
        value = values[unit.configuration] - (plan.rungs - 1 - unit.rung)
        return {"val/psnr": value, "val/ssim": 0.5, "seconds": 9.0 / plan.part(unit.rung)}

    train_units(state, score)
    return state


def test_pruned_units_and_the_cost_with_and_without_pruning_are_counted(
    tiny_plan: Callable[..., Plan],
):
    plan = tiny_plan("arcade,blinds", trials=3, stopping={"rule": "race", "grace_period": 1})
    assert plan.rungs == 3
    state = race(plan, [25.0, 10.0, 26.0])
    assert set(state.pruned) == {1} and settled(state) == 6.0
    trained = len(state.results(1))
    status = find_status(state, plan, running=0, pace=5.0)
    assert status._replace(spent=0.0) == Status(
        ended=3, trials=3, objective="val/psnr", ranking=[(2, 26.0), (0, 25.0)], running=0,
        done=12 + trained, pruned=6 - trained, seconds_left=0.0, spent=0.0,
        price=pytest.approx(40 + 3 * 2 * 9), has_gpus=False,
    )  # fmt: skip
    of_pruned = {scene: max(r for s, r in state.results(1) if s == scene)
                 for scene, _ in state.results(1)}  # fmt: skip
    spent = 40 + 4 * 9 + sum(9 / plan.part(rung) for rung in of_pruned.values())
    assert status.spent == pytest.approx(spent)


def test_the_price_counts_gpus_and_full_trainings_before_one_has_ended(
    tiny_plan: Callable[..., Plan],
):
    resources = {"gpus_per_worker": 0.5}
    stopping = {"rule": "race", "grace_period": 1}
    plan = tiny_plan("arcade", trials=4, has_gpu=True, resources=resources, stopping=stopping)
    state = StudyState(plan)
    assert find_status(state, plan, running=1, pace=None).price is None and settled(state) == 0
    unit = state.next_unit()
    assert unit is not None and plan.part(unit.rung) == 9
    state.record(unit, {"val/psnr": 20.0, "val/ssim": 0.5, "seconds": 2.0})
    status = find_status(state, plan, running=1, pace=18.0)
    assert status.has_gpus and status.ended == 0
    assert status.spent == pytest.approx(2 * 0.5) and status.price == pytest.approx(4 * 9 * 2 * 0.5)
    assert settled(state) == pytest.approx(1 / 9)
    assert status.seconds_left == pytest.approx(18 * (4 - 1 / 9))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TRIALS = [SimpleNamespace(status=status) for status in ("RUNNING", "RUNNING", "PENDING")]


@pytest.mark.parametrize("interval, lines", [(30.0, 0), (0.0, 2)])
def test_without_a_terminal_a_line_is_printed_at_intervals(
    tiny_plan: Callable[..., Plan], capsys, interval: float, lines: int
):
    plan = tiny_plan("arcade", trials=4)
    with StatusLine(StudyState(plan), plan, interval=interval) as line:
        for step in range(2):
            line.on_step_end(step, TRIALS)
    told = capsys.readouterr()
    expected = "none finished yet | 0/4 ended | units: 2 running, 0 done"
    assert told.out.count(expected) == len(told.out.splitlines()) == lines and told.err == ""


def test_in_a_terminal_the_line_is_written_over(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, capsys
):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    plan, now = tiny_plan("arcade", trials=4), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with StatusLine(StudyState(plan), plan) as line:
        for seconds in (0.5, 2.0):
            now[0] = seconds
            line.on_step_end(0, TRIALS)
    assert len(re.findall(r"none finished yet", terminal.getvalue())) == 1
    assert capsys.readouterr().out == ""
