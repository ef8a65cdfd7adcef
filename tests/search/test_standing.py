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
def study(tiny_plan: Callable[..., Plan]) -> Callable[..., Standing | None]:
    """The standing after configurations with these values, the same on all scenes but for `tilt`,
    and these training seconds a scene."""

    def run(
        values: list[float], seconds: list[float], tilt: Callable[[Unit], float] = lambda _: 0.0,
        scenes: tuple[str, ...] = SCENES, **spec: Any,
    ) -> Standing | None:  # fmt: skip
        plan = tiny_plan(
            ",".join(scenes), trials=len(values), **{"stopping": {"rule": "none"}} | spec
        )
        study = optuna.create_study(direction="maximize")
        state = StudyState(plan, study)
        while unit := state.next_unit():
            number = unit.configuration
            psnr = values[number] + tilt(unit)
            metrics = {"val/psnr": psnr, "val/ssim": psnr / 30, "seconds": seconds[number]}
            state.record(unit, None if math.isnan(values[number]) else metrics)
        return find_standing(state)

    return run


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


def test_one_scene_is_judged_by_the_spread_between_seeds(study):
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
