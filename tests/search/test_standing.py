"""The standing of the best configuration, on planted results."""

import math
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from cbnerf.search.plan import Plan, Unit
from cbnerf.search.standing import Standing, find_standing
from cbnerf.search.state import StudyState

pytestmark = pytest.mark.search

SCENES = ("arcade", "blinds", "coral", "mosaic")


@pytest.fixture
def state_of(tiny_plan: Callable[..., Plan]) -> Callable[..., StudyState]:
    """A study of configurations with these values, the same on all scenes but for `tilt`, and these
    training seconds a scene."""

    def run(
        values: list[float], seconds: list[float] | None = None,
        tilt: Callable[[Unit], float] = lambda _: 0.0,
        scenes: tuple[str, ...] = SCENES, **spec: Any,
    ) -> StudyState:  # fmt: skip
        plan = tiny_plan(
            ",".join(scenes), trials=len(values), **{"stopping": {"rule": "none"}} | spec
        )
        state = StudyState(plan, optuna.create_study(direction="maximize"))
        while unit := state.next_unit():
            number = unit.configuration
            psnr = values[number] + tilt(unit)
            spent = seconds[number] if seconds else 1.0
            metrics = {"val/psnr": psnr, "val/ssim": psnr / 30, "seconds": spent}
            state.record(unit, None if math.isnan(values[number]) else metrics)
        return state

    return run


@pytest.fixture
def study(state_of: Callable[..., StudyState]) -> Callable[..., Standing | None]:
    return lambda *arguments, **spec: find_standing(state_of(*arguments, **spec))


def confirm(state: StudyState, values: dict[int, float | None], num_seeds: int = 2) -> None:
    for unit, seed in state.confirmation.missing(state.leaders(), num_seeds):
        value = values[unit.configuration]
        tilt = 0.001 if seed % 2 else -0.001
        metrics = None if value is None else {"val/psnr": value + tilt}
        state.confirmation.record(unit, seed, metrics)


def test_other_seeds_settle_which_leader_is_best(state_of):
    state = state_of([25.0, 25.5, 25.49, 25.48])
    missing = state.confirmation.missing(state.leaders(), 2)
    assert {unit.configuration for unit, _ in missing} == {1, 2, 3}
    assert len(missing) == 3 * len(SCENES) * 2 and {seed for _, seed in missing} == {1, 2}
    confirm(state, {1: 25.2, 2: 25.6, 3: None})
    assert state.confirmation.missing(state.leaders(), 2) == []
    assert len(state.confirmation.missing(state.leaders(), 3)) == 3 * len(SCENES)
    assert state.ranking() == [2, 1, 3, 0] and state.best().number == 2
    standing = find_standing(state)
    assert (standing.best, standing.runner_up, standing.num_seeds) == (2, 1, 2)
    assert standing.lead == pytest.approx(0.4)
    assert "0.400 dB ahead of number 1, more than the noise" in standing.describe()
    assert "over other seeds (2)" in standing.describe()
    again = StudyState(state.plan, state.study, adopt=False)
    assert again.ranking() == state.ranking() and again.confirmed() == state.confirmed()


def test_what_is_half_confirmed_changes_nothing(state_of):
    state = state_of([25.0, 25.5, 25.49])
    *missing, (unit, seed) = state.confirmation.missing(state.leaders(), 1)
    for other, its in missing:
        state.confirmation.record(other, its, {"val/psnr": float(other.configuration == 0)})
    assert state.confirmed() == {} and state.ranking() == [1, 2, 0]
    state.confirmation.record(unit, seed, {"val/psnr": 0.0})
    assert state.ranking()[0] == 0


def test_a_lead_beyond_the_noise_is_no_tie(study):
    standing = study([25.0, 25.5, 25.2], [1.0, 1.0, 1.0])
    assert (standing.best, standing.runner_up, standing.ties) == (1, 2, [])
    assert standing.lead == pytest.approx(0.3) and standing.noise < 0.1
    assert standing.describe().startswith("0.300 dB ahead of number 2, more than")


def test_ties_are_named_and_the_cheapest_of_them_is_marked(study):
    standing = study([25.0, 25.5, 25.49, 25.495], [1.0, 9.0, 4.0, 7.0])
    assert standing.best == 1 and standing.ties == [3, 2] and standing.cheapest == 2
    assert standing.seconds == {1: 36.0, 2: 16.0, 3: 28.0}
    text = standing.describe()
    assert text.endswith("ties: 3, 2; the cheapest is number 2 (16 s instead of 36 s)")
    assert study([25.5, 25.49], [1.0, 2.0]).describe().endswith("the cheapest is the best itself")


def test_differences_are_paired_by_scene_in_any_order_of_training(tiny_plan):
    plan = tiny_plan(",".join(SCENES), trials=2, stopping={"rule": "none"})
    state, units = StudyState(plan, optuna.create_study(direction="maximize")), []
    while unit := state.next_unit():
        units.append(unit)
    assert len(units) == 2 * len(SCENES)
    for unit in units[: len(SCENES)] + units[: len(SCENES) - 1 : -1]:
        psnr = 20.0 + 3 * SCENES.index(unit.scene) + 0.3 * unit.configuration
        state.record(unit, {"val/psnr": psnr, "val/ssim": 0.5, "seconds": 1.0})
    standing = find_standing(state)
    assert standing is not None and standing.best == 1 and standing.ties == []
    assert standing.lead == pytest.approx(0.3) and standing.noise < 0.1


def test_a_lead_that_changes_from_scene_to_scene_needs_to_be_larger(study):
    def tilt(unit: Unit) -> float:
        return unit.configuration * (SCENES.index(unit.scene) - 1.5)

    values = [25.3, 25.0]
    assert not study(values, [1.0, 1.0]).ties
    assert study(values, [1.0, 1.0], tilt).ties == [1]


def test_the_runner_up_can_be_clear_while_a_farther_one_is_uncertain(study):
    def tilt(unit: Unit) -> float:
        return 4 * (unit.configuration == 2) * (SCENES.index(unit.scene) - 1.5)

    standing = study([25.5, 25.3, 25.2], [1.0, 1.0, 1.0], tilt)
    assert standing.runner_up == 1 and standing.lead > standing.noise and standing.ties == [2]
    assert "more than the noise" in standing.describe() and "ties: 2" in standing.describe()


def test_one_scene_is_compared_by_the_spread_between_seeds(study):
    assert study([25.0, 25.1], [1.0, 1.0], scenes=("arcade",)).ties == [0]
    assert not study([25.0, 25.2], [1.0, 1.0], scenes=("arcade",)).ties


def test_only_fully_trained_configurations_are_compared(study):
    standing = study([25.0, math.nan], [1.0, 1.0])
    assert standing.runner_up is None
    assert standing.describe() == "the only one that was trained to its end"
    assert study([math.nan], [1.0]) is None


def test_ssim_has_a_noise_of_its_own(study):
    standing = study([25.0, 25.5], [1.0, 1.0], objectives=["val/ssim"])
    assert standing.lead == pytest.approx(0.5 / 30) and standing.noise < 0.01
    assert "0.0167 SSIM ahead" in standing.describe()
