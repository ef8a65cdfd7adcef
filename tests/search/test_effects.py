"""Effects of knobs, on planted values whose effects are known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from objectives import train_units

from cbnerf.search.effects import Effect, estimate_effects, study_effects
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.spec import Choices, Range
from cbnerf.search.state import StudyState

pytestmark = pytest.mark.search

SPACE: dict[str, Range | Choices] = {
    "slope": Range(low=0.01, high=1.0, log=True),
    "order": Choices(choices=(64, 256, 1024)),
    "word": Choices(choices=("a", "b", "c")),
    "idle": Range(low=1, high=9),
    "switch": Choices(choices=(True, False)),
}


def draw_knobs(count: int, seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "slope": list(np.exp(rng.uniform(np.log(0.01), 0, count))),
        "order": [(64, 256, 1024)[i] for i in rng.integers(3, size=count)],
        "word": ["abc"[i] for i in rng.integers(3, size=count)],
        "idle": [int(i) for i in rng.integers(1, 10, count)],
        "switch": [bool(i) for i in rng.integers(2, size=count)],
    }


SCALES = np.array([0.5, 1.5, 0.8, 1.2])
"""How far each scene tells configurations apart after a full training."""


def measure(worth: np.ndarray, *, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """Values on four scenes, which differ by 1 dB and tell configurations apart more or less well,
    at three rungs. The worse half has been pruned after two units."""
    rng = np.random.default_rng(seed)
    scales = SCALES[:, None] * np.array([0.7, 0.9, 1.0])
    values = 25 + rng.normal(size=(4, 3)) + worth[:, None, None] * scales
    values += rng.normal(0, noise, values.shape)
    is_worse = worth < np.sort(worth)[len(worth) // 2]
    values[is_worse, :, 1:] = values[is_worse, 2:] = np.nan
    return values


def estimate(count: int, worth: Callable[[dict[str, np.ndarray]], Any]) -> dict[str, Effect]:
    knobs = draw_knobs(count, seed=count)
    given = {name: np.array(values) for name, values in knobs.items()}
    values = measure(worth(given) + np.zeros(count))
    return {effect.knob: effect for effect in estimate_effects(values, knobs, SPACE)}


def test_effects_lie_in_their_intervals_and_idle_knobs_show_none():
    # From .01 to 1 the logarithm rises by 4.6.
    effects = estimate(
        32, lambda k: 0.1 * np.log(k["slope"]) + 0.2 * (k["word"] == "b") - 0.3 * (k["order"] == 64)
    )
    truth = {"slope": 0.46, "order": 0.3, "word": 0.2, "idle": 0.0, "switch": 0.0}
    assert list(effects)[:3] == ["slope", "order", "word"]
    for name, effect in effects.items():
        assert effect.low <= truth[name] <= effect.high
        assert effect.is_seen == (truth[name] > 0)
    assert effects["word"].best == "b" and effects["slope"].best > 0.5
    assert effects["order"].best in (256, 1024)
    assert all(effects[name].is_bounded and effects[name].high < 0.1 for name in ("idle", "switch"))
    for scale, bounds in zip(SCALES, effects["slope"].by_scene, strict=True):
        assert bounds.low <= 0.46 * scale <= bounds.high < 0.46 * scale * 1.3


def test_an_effect_in_the_middle_of_the_range_is_one():
    effects = estimate(32, lambda k: -0.4 * (k["idle"] - 5) ** 2 / 16)
    assert effects["idle"].is_seen and effects["idle"].best == pytest.approx(5, abs=0.5)
    assert effects["idle"].low <= 0.4 <= effects["idle"].high


def test_the_best_value_is_one_that_was_trained():
    knobs = draw_knobs(12, seed=3)
    for name, least, greatest in (("order", 64, 1024), ("slope", 0.01, 1.0)):
        ends = knobs | {name: [least, greatest] * 6}
        values = measure(0.01 * np.log(ends[name]))
        best = {effect.knob: effect.best for effect in estimate_effects(values, ends, SPACE)}
        assert best[name] in (least, greatest)
        assert all(best[knob] in tried for knob, tried in ends.items())


def test_few_configurations_leave_the_question_open():
    effects = estimate(5, lambda k: 0.2 * np.log(k["slope"]) + 0.3 * (k["word"] == "b"))
    texts = [effect.describe("val/psnr") for effect in effects.values()]
    assert any(text.startswith("too few configurations (within +-") for text in texts)
    assert estimate(3, lambda k: k["slope"]) == {}


def test_what_never_differs_has_no_effects():
    knobs = draw_knobs(6, seed=0)
    assert estimate_effects(np.full((6, 2, 1), 20.0), knobs, SPACE) == []
    assert estimate_effects(np.full((6, 2, 1), np.nan), knobs, SPACE) == []


def test_a_diverged_training_does_not_hide_an_effect():
    knobs = draw_knobs(24, seed=1)
    values = measure(0.1 * np.log(knobs["slope"]), noise=0.01)
    values[3] -= 15
    first, *_ = estimate_effects(values, knobs, SPACE)
    assert first.knob == "slope" and first.low <= 0.46 <= first.high


def test_the_same_results_give_the_same_effects():
    knobs = draw_knobs(8, seed=2)
    values = measure(np.array(knobs["slope"]))
    assert estimate_effects(values, knobs, SPACE) == estimate_effects(values, knobs, SPACE)


def test_effects_of_a_raced_study_come_from_trained_units_alone(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
):
    space = {
        "codebook.beta": {"low": 0.05, "high": 2.0, "log": True},
        "codebook.ema_decay": {"low": 0.1, "high": 0.9},
    }
    stopping = {"rule": "race", "rungs": 2, "grace_period": 1}
    plan = tiny_plan("arcade,blinds,coral", trials=16, stopping=stopping, space=space)
    state = StudyState(plan, optuna.create_study(direction="maximize"))
    rng = np.random.default_rng(0)

    def score(unit: Unit) -> Metrics:
        # From .05 to 2 the logarithm rises by 3.69.
        worth = 0.1 * np.log(unit.overrides["codebook.beta"])
        psnr = 20 + len(unit.scene) + unit.rung + worth + rng.normal(0, 0.005)
        return {"val/psnr": psnr, "val/ssim": psnr / 40, "seconds": 1.0}

    train_units(state, score)
    assert state.pruned
    beta, decay = study_effects(state)
    assert beta.knob == "codebook.beta" and beta.low <= 0.369 <= beta.high
    assert "dB, best at" in beta.describe("val/psnr")
    assert not decay.is_seen
    # Optuna holds imputed values of pruned configurations; they are not read.
    monkeypatch.setattr(optuna.trial.FrozenTrial, "values", property(lambda _: 1 / 0))
    assert study_effects(state) == [beta, decay]
