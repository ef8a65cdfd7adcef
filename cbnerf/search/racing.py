"""When to prune a configuration: a paired Bayesian race against the incumbent.

Pure decisions on arrays, without Ray or Optuna. Names of this file:

- `values[c, s, r]`: score of configuration c on scene s at rung r; NaN if it was not trained there;
  higher is better. The last rung is a full training.
- The *worth* of a configuration is the mean over scenes of its values at the last rung.
- The *incumbent* is the finished configuration with the best first objective. With several
  objectives a configuration races against every *rival*: a finished configuration on the Pareto
  front that costs no more.
- A *difference* is the value of a configuration minus that of its rival at the same scene and rung.
  All configurations train with the same random numbers, so differences have less noise than values.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from cbnerf.search.plan import Plan
from cbnerf.search.spec import QUALITIES

Array = NDArray[np.floating]
Metrics = dict[str, float]
SceneRung = tuple[str, int]

_SCALES = {"val/psnr": 0.3, "val/ssim": 0.01}
"""Typical differences between two configurations, before any have been seen."""
_PRIOR_WEIGHT = 2.0
"""Pseudo-count of the prior, in configurations."""
_EXCHANGEABLE_WEIGHT = 8.0
"""Pseudo-count shrinking towards exchangeable scenes, in configurations."""
_PRIOR_CORRELATION = 0.7
"""Prior correlation between the differences at adjacent rungs."""
_LEARN_FROM = 200
"""Number of most recent configurations that mean and covariance are learned from."""
_BOUND = 4.0
"""Differences are clipped at this many standard deviations from their median."""
_EM_ITERATIONS = 4


class Verdict(NamedTuple):
    """The posterior of a configuration's worth against one rival."""

    chance: float
    """Probability that the configuration beats its rival by more than the margin."""
    expected: float
    """Posterior mean of its worth."""


class Pruned(NamedTuple):
    """Why a configuration was pruned."""

    reason: str
    values: list[float]
    """Expected objectives, never better than those of the rival that pruned it."""


class PairedRace:
    """A Gaussian model of the differences between configurations and one finished rival.

    The differences of a configuration at all scenes and rungs are jointly Gaussian. Their mean and
    covariance are learned from all configurations, including unfinished ones, by expectation
    maximisation, and shrunk twice: towards exchangeable scenes (one covariance of rungs within a
    scene, another one between scenes), and those towards a prior. Conditioning on the observed
    differences gives the posterior of the others. Chances use Student's t, because a covariance
    learned from few configurations is uncertain.
    """

    def __init__(self, values: Array, rival: Array, *, scale: float):
        """`values` [c, s, r] of the configurations to learn from; `rival` [s, r] is complete;
        `scale` is a typical difference between two configurations."""
        self._rival = rival
        self._num_scenes, self._num_rungs = rival.shape
        differences = values - rival
        started = ~np.isnan(differences).all(axis=(1, 2))
        others = started & (differences != 0).any(axis=(1, 2))  # not the rival itself
        differences = differences[others][-_LEARN_FROM:]
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
            self._learn(self._clip(differences), prior)

    def verdict(self, values: Array, margin: float = 0.0) -> Verdict:
        """The posterior of a configuration with these values [s, r] so far."""
        difference = self._clip(values[None] - self._rival)
        gain, left = self._condition(~np.isnan(difference[0]))
        expected = self._expected(difference, gain)[0, self._last].mean()
        spread = np.sqrt(max(left[np.ix_(self._last, self._last)].mean(), 1e-18))
        chance = student.sf((margin - expected) / spread, self._degrees)
        return Verdict(float(chance), float(self._rival[:, -1].mean() + expected))

    def variance_reduction(self, known: NDArray[np.bool_]) -> Array:
        """[s, r]: how much observing each value would reduce the posterior variance of a
        configuration's worth, given that the values `known` [s, r] have been observed."""
        _, left = self._condition(known.ravel())
        shared = left[:, self._last].mean(axis=1)
        return (shared**2 / (left.diagonal() + 1e-12)).reshape(known.shape)

    def _clip(self, differences: Array) -> Array:
        """[configurations, entries]: clipped, because one diverged training would dominate the
        covariance."""
        return differences.clip(*self._bounds).reshape(len(differences), self._rival.size)

    def _condition(self, known: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Regression gain [all, known] of all entries on the known ones, posterior covariance."""
        covariance = self._covariance
        between = covariance[np.ix_(known, known)] + 1e-12 * np.eye(known.sum())
        gain = np.linalg.solve(between, covariance[known]).T
        return gain, covariance - gain @ covariance[known]

    def _expected(self, differences: Array, gain: Array) -> Array:
        """Posterior means of all entries; all rows must have the same known entries."""
        known = ~np.isnan(differences[0])
        return self._mean + (differences[:, known] - self._mean[known]) @ gain.T

    def _learn(self, differences: Array, prior: Array) -> None:
        """Expectation maximisation of mean and covariance."""
        count = len(differences)
        patterns, members = np.unique(~np.isnan(differences), axis=0, return_inverse=True)
        for _ in range(_EM_ITERATIONS):
            total, second = np.zeros_like(self._mean), np.zeros_like(prior)
            for index, known in enumerate(patterns):
                chosen = differences[members == index]
                gain, left = self._condition(known)
                expected = self._expected(chosen, gain)
                centred = expected - self._mean
                total += expected.sum(axis=0)
                second += len(chosen) * left + centred.T @ centred
            exchangeable = _PRIOR_WEIGHT * prior + self._symmetrize(second)
            exchangeable /= _PRIOR_WEIGHT + count
            rungs = total.reshape(self._rival.shape).mean(axis=0) / (_PRIOR_WEIGHT + count)
            weight = _EXCHANGEABLE_WEIGHT
            self._mean = (weight * np.tile(rungs, self._num_scenes) + total) / (weight + count)
            self._covariance = (weight * exchangeable + second) / (weight + count)

    def _symmetrize(self, matrix: Array) -> Array:
        """A covariance averaged over all permutations of the scenes."""
        scenes, rungs = self._num_scenes, self._num_rungs
        blocks = matrix.reshape(scenes, rungs, scenes, rungs)
        within = np.einsum("srsq->rq", blocks)
        between = (blocks.sum(axis=(0, 2)) - within) / max(scenes * (scenes - 1), 1)
        one, eye = np.ones((scenes, scenes)), np.eye(scenes)
        return np.kron(one, between) + np.kron(eye, within / scenes - between)


def _spread_and_bounds(differences: Array, scale: float) -> tuple[float, tuple[Array, Array]]:
    """Standard deviation over configurations at the first rung, and bounds [r] for clipping.

    Both from medians, because some configurations diverge; `scale` has the weight of the prior.
    """
    weight, num_rungs = _PRIOR_WEIGHT / (_PRIOR_WEIGHT + len(differences)), differences.shape[-1]
    middle, reach = np.zeros(num_rungs), np.full(num_rungs, scale)
    effect: float = scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rungs without any value
        if len(differences):
            firsts = np.nanmean(differences[:, :, 0], axis=1)
            effect = float(_deviation(firsts, axis=0))
            middle = np.nan_to_num(np.nanmedian(differences, axis=(0, 1)))
            reach = np.fmax(_deviation(differences, axis=(0, 1)), scale)
    spread = scale**weight * max(effect, scale / 100) ** (1 - weight)
    return spread, (middle - _BOUND * reach, middle + _BOUND * reach)


def _deviation(values: Array, axis: int | tuple[int, ...]) -> Array:
    """Standard deviation of the Gaussian with the values' median absolute deviation."""
    middle = np.nanmedian(values, axis=axis, keepdims=True)
    return np.asarray(1.4826 * np.nanmedian(abs(values - middle), axis=axis))


class Racing:
    """The values of all configurations of a study, and which configurations to prune."""

    def __init__(self, plan: Plan, num_configurations: int):
        self._plan = plan
        self._objectives = plan.spec.objectives
        self._stopping = plan.spec.stopping
        shape = (num_configurations, len(plan.trainings), plan.rungs)
        self._values = {q: np.full(shape, np.nan) for q in self.qualities}
        self._seconds = np.full(shape, np.nan)
        self._races: dict[tuple[str, int], PairedRace] = {}
        self.finished: dict[int, Metrics] = {}
        """Objectives of the finished configurations, by number."""

    @property
    def qualities(self) -> list[str]:
        return [name for name in self._objectives if name in QUALITIES]

    def add(self, number: int, at: SceneRung, metrics: Metrics) -> None:
        """Add the metrics of a unit."""
        index = (number, *self._index(at))
        for quality in self.qualities:
            self._values[quality][index] = metrics[quality]
        self._seconds[index] = metrics.get("seconds", math.nan)
        self._races.clear()

    def finish(self, number: int, costs: Metrics) -> list[float]:
        """The objectives of a configuration with all its units: means over scenes."""
        about = costs | {"seconds": self._expected_seconds(number)}
        about |= {q: float(values[number, :, -1].mean()) for q, values in self._values.items()}
        self.finished[number] = {name: about[name] for name in self._objectives}
        return list(self.finished[number].values())

    def best(self) -> int | None:
        """The incumbent: the finished configuration with the highest first objective."""
        first = self._objectives[0]
        return max(self.finished, key=lambda n: self.finished[n][first], default=None)

    def front(self) -> list[int]:
        """The Pareto front: finished configurations that no other one dominates."""
        signs = np.array([1 if name in QUALITIES else -1 for name in self._objectives])
        numbers = list(self.finished)
        points = np.array([[*self.finished[n].values()] for n in numbers]).reshape(-1, len(signs))
        points = points * signs
        return [
            number
            for number, point in zip(numbers, points, strict=True)
            if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
        ]

    def prune(self, number: int, costs: Metrics) -> Pruned | None:
        """The reason to prune a configuration, or None.

        It is pruned if some rival is likely to be better in every quality.
        """
        if self._stopping.rule == "none" or np.isnan(self._seen(number)).all():
            return None
        costs = costs | {"seconds": self._expected_seconds(number)}
        for rival in self._rivals(costs):
            if not any(self.keeps(quality, number, rival) for quality in self.qualities):
                return self._pruned_by(number, rival, costs)
        return None

    def keeps(self, quality: str, number: int, rival: int) -> bool:
        """Whether a configuration may still beat a rival in one quality."""
        return self._verdict(quality, number, rival).chance >= self._stopping.threshold

    def reason(self, number: int, rival: int) -> str:
        """Why `keeps` refuses a configuration in all qualities."""
        chance = max(self._verdict(quality, number, rival).chance for quality in self.qualities)
        margin = f" by {self._stopping.margin:g}" if self._stopping.margin else ""
        return f"{chance:.1%} to beat #{rival:02d}{margin}"

    def next(self, number: int, waiting: list[SceneRung], in_flight: set[SceneRung]) -> SceneRung:
        """Which of the waiting units to train next: the pair of scene and rung that reduces the
        posterior variance most per training step; without an incumbent the first one."""
        best = self.best()
        if self._stopping.rule != "race" or best is None:
            return waiting[0]
        known = ~np.isnan(self._seen(number))
        for at in in_flight:
            known[self._index(at)] = True
        reduction = self._race(self._objectives[0], best).variance_reduction(known)
        steps = float(self._stopping.eta) ** np.arange(self._plan.rungs)
        reduction /= np.diff(steps, prepend=0)
        return max(waiting, key=lambda at: reduction[self._index(at)])

    def _index(self, at: SceneRung) -> tuple[int, int]:
        scene, rung = at
        return self._plan.trainings.index(scene), rung

    def _seen(self, number: int) -> Array:
        return self._values[self._objectives[0]][number]

    def _rivals(self, costs: Metrics) -> list[int]:
        if len(self._objectives) == 1:
            best = self.best()
            return [] if best is None else [best]
        names = [name for name in self._objectives if name not in QUALITIES]
        return [
            number
            for number in self.front()
            if all(self.finished[number][name] <= costs[name] for name in names)
        ]

    def _pruned_by(self, number: int, rival: int, costs: Metrics) -> Pruned:
        about = dict(costs)
        for quality in self.qualities:
            bound = math.nextafter(self.finished[rival][quality], -math.inf)
            about[quality] = min(self._verdict(quality, number, rival).expected, bound)
        num_units = int((~np.isnan(self._seen(number))).sum())
        reason = f"{self.reason(number, rival)} after {num_units} units"
        return Pruned(reason, [about[name] for name in self._objectives])

    def _verdict(self, quality: str, number: int, rival: int) -> Verdict:
        margin = self._stopping.margin * _SCALES[quality] / _SCALES["val/psnr"]
        return self._race(quality, rival).verdict(self._values[quality][number], margin)

    def _race(self, quality: str, rival: int) -> PairedRace:
        if (quality, rival) not in self._races:
            values = self._values[quality]
            race = PairedRace(values, values[rival], scale=_SCALES[quality])
            self._races[quality, rival] = race
        return self._races[quality, rival]

    def _expected_seconds(self, number: int) -> float:
        """Mean seconds of a full training, extrapolated from the highest rung on each scene."""
        factors = float(self._stopping.eta) ** np.arange(self._plan.rungs - 1, -1, -1)
        scaled = self._seconds[number] * factors
        highest = [scene[~np.isnan(scene)][-1] for scene in scaled if not np.isnan(scene).all()]
        return float(np.mean(highest)) if highest else math.inf
