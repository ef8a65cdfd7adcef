"""The paired race: the probability that a configuration beats a finished one, from its first units.

Pure statistics on arrays; no Ray, no Optuna. Names in this file:

    values[c, s, r]      quality of configuration c on scene s at rung r (dB for PSNR); NaN where it
                         has not been measured. Larger is better; the last rung is a full training
    objective of c       mean over scenes of values[c, :, -1]
    rival                the finished configuration that c is compared with
    differences[c, e]    values of c minus those of the rival; an entry e is a scene and a rung
    mean[e]              expected differences of a new configuration
    covariance[e, e]     their covariance
    gain[e, k]           regression of all entries on the k known ones
    remaining[e, e]      covariance given the known entries

All configurations train with the same random numbers, so their differences have less noise than
their values.
"""

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.floating]

_PRIOR_WEIGHT = 2.0
"""Pseudo-count of the prior, in configurations."""
_EXCHANGEABLE_WEIGHT = 8.0
"""Pseudo-count, in configurations, shrinking mean and covariance towards exchangeable scenes."""
_PRIOR_CORRELATION = 0.7
"""Prior correlation between the effects at neighbouring rungs."""
_LEARN_FROM = 200
"""Mean and covariance are learned from this many of the latest configurations."""
_CLIP = 4.0
"""Differences are clipped to this many standard deviations around their median."""
_ITERATIONS = 4
"""Iterations of expectation maximisation."""


class Verdict(NamedTuple):
    """Prediction for a configuration."""

    chance: float
    """Posterior probability that it beats its rival by more than the margin."""
    expected: float
    """Expected objective after a full training."""


class PairedRace:
    """A paired Bayesian race against a finished rival.

    The differences between a configuration and its rival, over all scenes and rungs, are modelled
    as jointly Gaussian. Expectation maximisation learns their mean and covariance from all
    configurations, unfinished ones included. Two levels of shrinkage regularise them: towards
    exchangeable scenes (one covariance of rungs within a scene, another between scenes), and that
    estimate towards a prior. The posterior of a configuration conditions on its measured entries.
    A covariance learned from few configurations is uncertain, so probabilities come from Student's
    t distribution.
    """

    def __init__(self, values: Array, rival: Array, *, scale: float):
        """Learn from `values` [c, s, r]; `rival` [s, r] has no NaN.

        `scale` is the prior scale of a difference between two configurations.
        """
        self._rival = rival
        self._num_scenes, self._num_rungs = rival.shape
        differences = values - rival
        is_started = ~np.isnan(differences).all(axis=(1, 2))
        is_other = is_started & (differences != 0).any(axis=(1, 2))  # excludes the rival itself
        differences = differences[is_other][-_LEARN_FROM:]
        self._degrees = _PRIOR_WEIGHT + len(differences)
        self._last = np.arange(self._num_rungs - 1, rival.size, self._num_rungs)
        spread, self._bounds = _spread_and_bounds(differences, scale)
        steps = np.subtract.outer(np.arange(self._num_rungs), np.arange(self._num_rungs))
        rungs = spread**2 * _PRIOR_CORRELATION ** abs(steps)
        self._mean = np.zeros(rival.size)
        self._covariance = prior = np.kron(
            np.ones((self._num_scenes, self._num_scenes)) + np.eye(self._num_scenes) / 4, rungs
        )
        if len(differences):
            self._learn(self._clipped(differences), prior)

    def verdict(self, values: Array, margin: float = 0.0) -> Verdict:
        """Posterior of a configuration, given its `values` [s, r] so far."""
        difference = self._clipped(values[None] - self._rival)
        gain, remaining = self._conditioning(~np.isnan(difference[0]))
        expected = self._expected(difference, gain)[0, self._last].mean()
        variance = remaining[np.ix_(self._last, self._last)].mean()
        deviation = np.sqrt(max(variance, 1e-18))
        chance = student.sf((margin - expected) / deviation, self._degrees)
        return Verdict(float(chance), float(self._rival[:, -1].mean() + expected))

    def variance_reduction(self, known: NDArray[np.bool_]) -> Array:
        """Expected variance reduction [s, r]: by how much measuring each entry would reduce the
        posterior variance of a configuration's objective, given the entries `known` [s, r]."""
        _, remaining = self._conditioning(known.ravel())
        with_objective = remaining[:, self._last].mean(axis=1)
        return (with_objective**2 / (remaining.diagonal() + 1e-12)).reshape(known.shape)

    def _clipped(self, differences: Array) -> Array:
        """Clipped differences [c, e]: how far a diverged training falls behind carries no
        information and would dominate the covariance."""
        return differences.clip(*self._bounds).reshape(len(differences), self._rival.size)

    def _conditioning(self, known: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Gain [e, k] and remaining covariance [e, e] given the known entries."""
        covariance = self._covariance
        of_known = covariance[np.ix_(known, known)] + 1e-12 * np.eye(known.sum())
        gain = np.linalg.solve(of_known, covariance[known]).T
        return gain, covariance - gain @ covariance[known]

    def _expected(self, differences: Array, gain: Array) -> Array:
        """Conditional mean [c, e] of differences whose known entries are the same."""
        known = ~np.isnan(differences[0])
        return self._mean + (differences[:, known] - self._mean[known]) @ gain.T

    def _learn(self, differences: Array, prior: Array) -> None:
        """Estimate mean and covariance by expectation maximisation."""
        count = len(differences)
        patterns, members = np.unique(~np.isnan(differences), axis=0, return_inverse=True)
        for _ in range(_ITERATIONS):
            total, second = np.zeros_like(self._mean), np.zeros_like(prior)
            for index, known in enumerate(patterns):
                chosen = differences[members == index]
                gain, remaining = self._conditioning(known)
                expected = self._expected(chosen, gain)
                centred = expected - self._mean
                total += expected.sum(axis=0)
                second += len(chosen) * remaining + centred.T @ centred
            exchangeable = self._exchangeable(second) + _PRIOR_WEIGHT * prior
            exchangeable /= _PRIOR_WEIGHT + count
            rungs = total.reshape(self._rival.shape).mean(axis=0) / (_PRIOR_WEIGHT + count)
            mean = np.tile(rungs, self._num_scenes)
            self._mean = (_EXCHANGEABLE_WEIGHT * mean + total) / (_EXCHANGEABLE_WEIGHT + count)
            self._covariance = _EXCHANGEABLE_WEIGHT * exchangeable + second
            self._covariance /= _EXCHANGEABLE_WEIGHT + count

    def _exchangeable(self, matrix: Array) -> Array:
        """The covariance averaged over all permutations of the scenes."""
        scenes, rungs = self._num_scenes, self._num_rungs
        blocks = matrix.reshape(scenes, rungs, scenes, rungs)
        within = np.einsum("srsq->rq", blocks)
        between = (blocks.sum(axis=(0, 2)) - within) / max(scenes * (scenes - 1), 1)
        one, eye = np.ones((scenes, scenes)), np.eye(scenes)
        return np.kron(one, between) + np.kron(eye, within / scenes - between)


def _spread_and_bounds(differences: Array, scale: float) -> tuple[float, tuple[Array, Array]]:
    """Spread of configurations at the first rung, and bounds [r] of differences at each rung.

    Medians are robust to diverged configurations; `scale` has the prior's pseudo-count.
    """
    weight, num_rungs = _PRIOR_WEIGHT / (_PRIOR_WEIGHT + len(differences)), differences.shape[-1]
    median, deviation = np.zeros(num_rungs), np.full(num_rungs, scale)
    effect: float = scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rungs without a value
        if len(differences):
            effect = float(_robust_deviation(np.nanmean(differences[:, :, 0], axis=1), axis=0))
            median = np.nan_to_num(np.nanmedian(differences, axis=(0, 1)))
            deviation = np.fmax(_robust_deviation(differences, axis=(0, 1)), scale)
    spread = scale**weight * max(effect, scale / 100) ** (1 - weight)
    return spread, (median - _CLIP * deviation, median + _CLIP * deviation)


def _robust_deviation(values: Array, axis: int | tuple[int, ...]) -> Array:
    """Standard deviation of a Gaussian with the values' median absolute deviation."""
    median = np.nanmedian(values, axis=axis, keepdims=True)
    return np.asarray(1.4826 * np.nanmedian(abs(values - median), axis=axis))
