"""The race on drawn configurations, against closed forms and its stated probabilities."""

import numpy as np
import pytest
from numpy.random import default_rng

from cbnerf.search.paired_race import PairedRace

NUM_SCENES, NUM_RUNGS = 8, 3


def draw(seed: int, worse: np.ndarray, noise: float = 0.1) -> np.ndarray:
    """Configurations that are `worse` than the best by so much on average over scenes."""
    rng = default_rng(seed)
    scenes = 20 + 3 * rng.normal(size=(1, NUM_SCENES, 1))
    rungs = np.array([-0.6, -0.2, 0.0])
    interaction = noise * rng.normal(size=(len(worse), NUM_SCENES, 1))
    interaction -= interaction.mean(axis=1, keepdims=True)
    late = 0.2 * noise * rng.normal(size=(len(worse), NUM_SCENES, NUM_RUNGS))
    late -= late.mean(axis=1, keepdims=True)
    return scenes + rungs - worse[:, None, None] + interaction + late


def hidden(values: np.ndarray, configuration: int, known: int) -> np.ndarray:
    """All but the first `known` units of a configuration unknown, rung by rung."""
    values = values.copy()
    by_rung = values[configuration].T.ravel()
    by_rung[known:] = np.nan
    values[configuration] = by_rung.reshape(NUM_RUNGS, NUM_SCENES).T
    return values


def test_nothing_known_is_an_even_chance_at_the_start():
    values = np.full((2, NUM_SCENES, NUM_RUNGS), np.nan)
    values[0] = draw(0, np.zeros(1))[0]
    verdict = PairedRace(values[1:], values[0], scale=0.3).verdict(values[1])
    assert verdict.chance == pytest.approx(0.5)
    assert verdict.expected == pytest.approx(values[0, :, -1].mean())


def test_everything_known_gives_certainty():
    values = draw(0, np.array([0.0, 0.05, -0.05]))
    race = PairedRace(values[1:], values[0], scale=0.3)
    for configuration, chance in ((1, 0.0), (2, 1.0)):
        verdict = race.verdict(values[configuration])
        assert verdict.chance == pytest.approx(chance, abs=1e-6)
        assert verdict.expected == pytest.approx(values[configuration, :, -1].mean(), abs=1e-6)


def test_a_margin_counts_in_standard_deviations_of_the_prior():
    values = np.array([[[20.0]], [[np.nan]]])
    verdict = PairedRace(values[1:], values[0], scale=0.3).verdict(values[1])
    # The prior of a difference: variance scale^2 of the effect, a quarter of it for interactions.
    assert verdict.chance == pytest.approx(0.5)
    margin = PairedRace(values[1:], values[0], scale=0.3).verdict(values[1], margin=0.3 * 1.25**0.5)
    # Student's t with two degrees of freedom, beyond one.
    assert margin.chance == pytest.approx(0.5 - 0.5 / 3**0.5)


def test_more_of_a_bad_configuration_makes_it_less_likely():
    values = draw(1, np.array([0.0, 0.2, 0.3, 0.1, 0.4, 0.15]))
    chances = []
    for known in (0, 1, 4, 8, 16, 23):
        seen = hidden(values, 2, known)
        chances.append(PairedRace(seen[1:], seen[0], scale=0.3).verdict(seen[2]).chance)
    assert chances[-1] < 1e-3 < chances[0]
    assert all(late < early + 0.05 for early, late in zip(chances, chances[1:], strict=False))


def test_scenes_need_not_be_equally_hard_nor_rungs_equally_high():
    """Only differences count: adding a number to a scene or a rung changes no verdict."""
    values = hidden(draw(2, np.array([0.0, 0.1, 0.2, 0.3])), 3, 5)
    moved = values + default_rng(0).normal(size=(1, NUM_SCENES, NUM_RUNGS))
    ours = PairedRace(values[1:], values[0], scale=0.3).verdict(values[3])
    theirs = PairedRace(moved[1:], moved[0], scale=0.3).verdict(moved[3])
    assert ours.chance == pytest.approx(theirs.chance, rel=1e-6)


@pytest.mark.parametrize("spread", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("known", [2, 8])
def test_stated_probabilities_are_calibrated(known: int, spread: float):
    """Of configurations with a chance of p, p are better: calibration over many draws, also where
    configurations differ by far more or less than `scale`."""
    stated, came_true = [], []
    for seed in range(150):
        rng = default_rng(1000 + seed)
        worse = np.concatenate([[0.0], spread * rng.normal(size=20)])
        values = draw(seed, worse, noise=spread / 2)
        seen = hidden(values, 20, known)
        stated.append(PairedRace(seen[1:], seen[0], scale=0.3).verdict(seen[20]).chance)
        came_true.append(values[20, :, -1].mean() > values[0, :, -1].mean())
    assert np.mean(stated) == pytest.approx(np.mean(came_true), abs=0.05)
    doubtful = np.array(stated) < 0.05
    assert doubtful.sum() > 10
    assert np.mean(np.array(came_true)[doubtful]) < 0.08


def test_variance_reduction_in_closed_form_before_any_measurement():
    """Of a value with variance v and covariance c with the worth: c^2 / v."""
    values = draw(0, np.zeros(1))
    race = PairedRace(values[1:], values[0], scale=0.3)
    nothing = np.zeros((NUM_SCENES, NUM_RUNGS), bool)
    covariance = 0.3**2 * (1 + 0.25 / NUM_SCENES) * 0.7 ** np.arange(NUM_RUNGS)[::-1]
    told = covariance**2 / (0.3**2 * 1.25)
    np.testing.assert_allclose(race.variance_reduction(nothing), np.tile(told, (NUM_SCENES, 1)))


def test_known_entries_reduce_no_variance():
    values = draw(3, np.array([0.0, 0.1, 0.2, 0.3]))
    race = PairedRace(values[1:], values[0], scale=0.3)
    known = np.zeros((NUM_SCENES, NUM_RUNGS), bool)
    known[2, 0] = known[5, 2] = True
    telling = race.variance_reduction(known)
    assert telling[known].max() < 1e-9 < telling[~known].min()
    assert telling.sum() < race.variance_reduction(np.zeros_like(known)).sum()


def test_a_race_learns_which_scene_is_most_informative():
    """Configurations differ on one scene by twice as much as on the others, which add noise."""
    rng = default_rng(0)
    worse = abs(rng.normal(size=12))
    worse[0] = 0
    values = 20 - worse[:, None, None] + 0.5 * rng.normal(size=(12, NUM_SCENES, 1))
    values[:, 6] = 20 - 2 * worse[:, None]
    race = PairedRace(values[1:], values[0], scale=0.3)
    telling = race.variance_reduction(np.zeros((NUM_SCENES, 1), bool))
    assert telling.argmax() == 6
