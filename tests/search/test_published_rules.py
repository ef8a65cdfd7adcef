"""The published pruning rules, Wilcoxon's against Optuna's pruner."""

import warnings

import numpy as np
import optuna
import pytest
from numpy.random import default_rng
from optuna.exceptions import ExperimentalWarning

from cbnerf.search.published_rules import halving_keeps, signed_ranks_keep


def test_halving_keeps_a_share_of_those_that_came_as_far():
    values = np.full((6, 2, 2), np.nan)
    values[:, :, 0] = np.arange(6)[:, None]
    values[5, :, 1] = 9
    keeps = [halving_keeps(values, configuration, 3) for configuration in range(6)]
    assert keeps == [False, False, False, False, True, True]
    values[0, 1, 0] = np.nan  # not through the rung yet
    assert halving_keeps(values, 0, 3)


def test_signed_ranks_need_four_scenes_at_the_usual_level():
    values = np.zeros((2, 8, 1))
    values[1] = np.nan
    for known in range(1, 6):
        values[1, :known, 0] = -np.arange(1, known + 1)
        assert signed_ranks_keep(values, 1, 0, threshold=0.1) == (known < 4)


def optuna_prunes(reached: np.ndarray, best: np.ndarray, threshold: float) -> bool:
    """What Optuna's own pruner decides of a trial that reports what it reached, by scene."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=threshold)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    whole = {scene: float(value) for scene, value in enumerate(best)}
    study.add_trial(optuna.create_trial(value=float(best.mean()), intermediate_values=whole))
    trial = study.ask()
    for scene, value in enumerate(reached):
        if not np.isnan(value):
            trial.report(float(value), scene)
    return trial.should_prune()


def test_signed_ranks_are_those_of_optuna():
    """Of random values with ties and zeros among the differences, seen in part."""
    rng, pruned = default_rng(0), 0
    for _ in range(400):
        num_scenes, grain = rng.integers(2, 10), rng.choice([0.0, 0.5])
        values = rng.normal(size=(2, num_scenes, 1)) - [[[0.0]], [[rng.choice([0.0, 1.0])]]]
        values = np.round(values / grain) * grain if grain else values
        values[1, rng.random(num_scenes) < 0.3] = np.nan
        threshold = rng.choice([0.05, 0.1, 0.3, 0.49])
        prunes = optuna_prunes(values[1, :, 0], values[0, :, 0], threshold)
        assert signed_ranks_keep(values, 1, 0, threshold) != prunes
        pruned += prunes
    assert 20 < pruned < 380


@pytest.mark.filterwarnings("ignore:The intermediate values:UserWarning")  # Optuna's
@pytest.mark.parametrize("scene, reached", [(0, 1.0), (5, np.nan), (0, np.inf)])
def test_a_rival_that_is_perfect_on_a_scene_prunes_nothing(scene: int, reached: float):
    """The PSNR of two equal images is infinite."""
    values = np.stack([np.arange(3.0, 9.0), np.arange(1.0, 7.0)])[..., None]
    assert not signed_ranks_keep(values, 1, 0, threshold=0.1)
    values[0, scene], values[1, scene] = np.inf, reached
    assert signed_ranks_keep(values, 1, 0, threshold=0.1)
    assert not optuna_prunes(values[1, :, 0], values[0, :, 0], 0.1)


@pytest.mark.parametrize("differences", [[0, 0, 0, 0], [0, 0, 0, -1], [-1, -1, -1, 0, 0, 9]])
def test_equal_scenes_and_a_better_mean_keep_a_configuration(differences: list[float]):
    values = np.zeros((2, len(differences), 1))
    values[1, :, 0] = differences
    assert signed_ranks_keep(values, 1, 0, threshold=0.1)
    assert not optuna_prunes(values[1, :, 0], values[0, :, 0], 0.1)
