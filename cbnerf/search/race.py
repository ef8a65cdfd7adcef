"""When to give a configuration up: pure decisions on an array of values, without Ray or Optuna.

Names of this file: `values[c, s, r]` is what configuration `c` reached on scene `s` at rung `r`,
NaN where it has not been; larger is better; the last rung is a whole training. A configuration is
worth the mean over scenes of its last rung. All configurations train with the same random numbers,
so their differences are less noisy than their values.
"""

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from scipy.stats import wilcoxon

Array = NDArray[np.floating]

_PRIOR_WEIGHT = 2.0
"""Configurations that the prior counts for."""
_ALIKE_WEIGHT = 8.0
"""Configurations that the likeness of all scenes counts for."""
_PRIOR_CORRELATION = 0.7
"""Between the effects at a rung and at the next, before any have been seen."""
_LEARN_FROM = 200
"""Latest configurations that mean and covariance are learned from."""
_BOUND = 4.0
"""Differences count up to so many spreads from their median."""
_ITERATIONS = 4
"""Of expectation maximisation."""


class Verdict(NamedTuple):
    """What is expected of a configuration."""

    chance: float
    """Probability that it will be better than its rival by more than the margin."""
    expected: float
    """Its expected value when it would be finished."""


class Race:
    """A paired Bayesian race against a finished rival.

    The differences of a configuration to its rival, of all scenes and rungs, are Gaussian. Their
    mean and covariance are learned from all configurations, unfinished ones among them, by
    expectation maximisation, and shrunk twice: towards scenes that are all alike, with one
    covariance of rungs within a scene and another between scenes, and these towards a prior.
    Conditioned on what has been seen they tell the rest. As a covariance learned from few is
    uncertain, chances are those of Student's t.
    """

    def __init__(self, values: Array, rival: Array, *, scale: float):
        """`values` are those of the configurations to learn from, `rival` [s, r] is complete;
        `scale` is a typical difference of two configurations, before any have been seen."""
        self._rival = rival
        self._num_scenes, self._num_rungs = rival.shape
        differences = values - rival
        started = ~np.isnan(differences).all(axis=(1, 2))
        behind = started & (differences != 0).any(axis=(1, 2))  # without the rival itself
        differences = differences[behind][-_LEARN_FROM:]
        self._degrees = _PRIOR_WEIGHT + len(differences)
        self._last = np.arange(self._num_rungs - 1, rival.size, self._num_rungs)
        spread, self._bounds = _typical(differences, scale)
        steps = np.subtract.outer(np.arange(self._num_rungs), np.arange(self._num_rungs))
        rungs = spread**2 * _PRIOR_CORRELATION ** abs(steps)
        self._mean = np.zeros(rival.size)
        self._covariance = prior = np.kron(
            np.ones((self._num_scenes, self._num_scenes)) + np.eye(self._num_scenes) / 4, rungs
        )
        if len(differences):
            self._learn(self._bounded(differences), prior)

    def verdict(self, values: Array, margin: float = 0.0) -> Verdict:
        """Expectation for a configuration, given its values so far."""
        difference = self._bounded(values[None] - self._rival)
        gain, left = self._conditioning(~np.isnan(difference[0]))
        expected = self._expected(difference, gain)[0, self._last].mean()
        spread = np.sqrt(max(left[np.ix_(self._last, self._last)].mean(), 1e-18))
        chance = student.sf((margin - expected) / spread, self._degrees)
        return Verdict(float(chance), float(self._rival[:, -1].mean() + expected))

    def telling(self, known: NDArray[np.bool_]) -> Array:
        """[s, r]: by how much each value would lessen the variance of what a configuration is
        worth, of which the values `known` [s, r] have been seen."""
        _, left = self._conditioning(known.ravel())
        shared = left[:, self._last].mean(axis=1)
        return (shared**2 / (left.diagonal() + 1e-12)).reshape(known.shape)

    def _bounded(self, differences: Array) -> Array:
        """[configurations, entries]: how far a diverged training lies behind tells nothing, and
        would drown what the others tell."""
        return differences.clip(*self._bounds).reshape(len(differences), self._rival.size)

    def _conditioning(self, known: NDArray[np.bool_]) -> tuple[Array, Array]:
        """What known entries tell of all: gain [all, known] and the covariance that is left."""
        covariance = self._covariance
        between = covariance[np.ix_(known, known)] + 1e-12 * np.eye(known.sum())
        gain = np.linalg.solve(between, covariance[known]).T
        return gain, covariance - gain @ covariance[known]

    def _expected(self, differences: Array, gain: Array) -> Array:
        """All entries of differences that have the same entries known."""
        known = ~np.isnan(differences[0])
        return self._mean + (differences[:, known] - self._mean[known]) @ gain.T

    def _learn(self, differences: Array, prior: Array) -> None:
        """Expectation maximisation of mean and covariance."""
        count = len(differences)
        patterns, members = np.unique(~np.isnan(differences), axis=0, return_inverse=True)
        for _ in range(_ITERATIONS):
            total, second = np.zeros_like(self._mean), np.zeros_like(prior)
            for index, known in enumerate(patterns):
                chosen = differences[members == index]
                gain, left = self._conditioning(known)
                expected = self._expected(chosen, gain)
                centred = expected - self._mean
                total += expected.sum(axis=0)
                second += len(chosen) * left + centred.T @ centred
            alike = (_PRIOR_WEIGHT * prior + self._alike(second)) / (_PRIOR_WEIGHT + count)
            rungs = total.reshape(self._rival.shape).mean(axis=0) / (_PRIOR_WEIGHT + count)
            mean = np.tile(rungs, self._num_scenes)
            self._mean = (_ALIKE_WEIGHT * mean + total) / (_ALIKE_WEIGHT + count)
            self._covariance = (_ALIKE_WEIGHT * alike + second) / (_ALIKE_WEIGHT + count)

    def _alike(self, matrix: Array) -> Array:
        """A covariance averaged over all orders of the scenes."""
        scenes, rungs = self._num_scenes, self._num_rungs
        blocks = matrix.reshape(scenes, rungs, scenes, rungs)
        within = np.einsum("srsq->rq", blocks)
        between = (blocks.sum(axis=(0, 2)) - within) / max(scenes * (scenes - 1), 1)
        one, eye = np.ones((scenes, scenes)), np.eye(scenes)
        return np.kron(one, between) + np.kron(eye, within / scenes - between)


def _typical(differences: Array, scale: float) -> tuple[float, tuple[Array, Array]]:
    """Spread of configurations at the first rung, and bounds of differences at each rung.

    Medians, as some configurations diverge; `scale` counts for as many as the prior does.
    """
    weight, num_rungs = _PRIOR_WEIGHT / (_PRIOR_WEIGHT + len(differences)), differences.shape[-1]
    middle, reach = np.zeros(num_rungs), np.full(num_rungs, scale)
    effect: float = scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rungs that nobody has reached
        if len(differences):
            firsts = np.nanmean(differences[:, :, 0], axis=1)
            effect = float(_deviation(firsts, axis=0))
            middle = np.nan_to_num(np.nanmedian(differences, axis=(0, 1)))
            reach = np.fmax(_deviation(differences, axis=(0, 1)), scale)
    spread = scale**weight * max(effect, scale / 100) ** (1 - weight)
    return spread, (middle - _BOUND * reach, middle + _BOUND * reach)


def _deviation(values: Array, axis: int | tuple[int, ...]) -> Array:
    """Standard deviation of a Gaussian with the values' median absolute deviation."""
    middle = np.nanmedian(values, axis=axis, keepdims=True)
    return np.asarray(1.4826 * np.nanmedian(abs(values - middle), axis=axis))


def halving_keeps(values: Array, challenger: int, eta: int) -> bool:
    """Asynchronous successive halving, stopping variant: whether a configuration is among the best
    1 / `eta` of those that have come through the highest rung that it has come through.

    A rung counts once all scenes have been through it, by their mean, and a configuration is judged
    anew whenever it has a value more, as others may have overtaken it. Ray's `ASHAScheduler` judges
    a trial, here that would be one scene, once at each rung, and keeps what reaches the
    (1 - 1 / `eta`) quantile of the trials recorded there before it.
    """
    means = values.mean(axis=1)  # NaN unless all scenes are there
    rungs = np.flatnonzero(~np.isnan(means[challenger]))
    if not len(rungs):
        return True
    peers = means[~np.isnan(means[:, rungs[-1]]), rungs[-1]]
    keep = max(len(peers) // eta, 1)
    return bool(means[challenger, rungs[-1]] >= np.sort(peers)[-keep])


def signed_ranks_keep(values: Array, challenger: int, rival: int, threshold: float) -> bool:
    """Wilcoxon's signed-rank test of the scenes of the last rung, by the rule of Optuna's
    `WilcoxonPruner`: at least two scenes, scenes without a difference count half for either, and
    what is on average no worse than the rival's mean over all scenes is kept whatever the ranks."""
    reached, best = values[challenger, :, -1], values[rival, :, -1]
    seen = ~np.isnan(reached)
    if seen.sum() < 2 or reached[seen].mean() >= best.mean():
        return True
    differences = reached[seen] - best[seen]
    p_value = np.asarray(wilcoxon(differences, alternative="less", zero_method="zsplit"))[1]
    return bool(p_value >= threshold)
