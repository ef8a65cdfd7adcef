"""Which configurations to prune, and which unit of a configuration to train next.

Pure decisions on arrays; no Ray, no Optuna. Names in this file:

    values[c, s, r]      quality of configuration c on scene s at rung r (dB for PSNR); NaN where it
                         has not been measured. Larger is better; the last rung is a full training.
    worth of c           mean over scenes of values[c, :, -1], the objective of the search
    rival                a finished configuration that c is compared with
    differences[c, e]    values of c minus those of the rival, scenes and rungs flattened to entries
    mean[e]              expected differences of a new configuration
    covariance[e, e]     their covariance
    gain[e, k]           regression of all entries on the k known ones
    left[e, e]           covariance given the known entries

All configurations train with the same random numbers, so their differences have less noise than
their values.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from cbnerf.search.plan import Plan
from cbnerf.search.rivals import halving_keeps, signed_ranks_keep
from cbnerf.search.spec import QUALITIES

Array = NDArray[np.floating]
Metrics = dict[str, float]
SceneRung = tuple[str, int]
"""Scene and rung."""

_PRIOR_WEIGHT = 2.0
"""Pseudo-count of the prior, in configurations."""
_EXCHANGEABLE_WEIGHT = 8.0
"""Pseudo-count, in configurations, shrinking mean and covariance towards exchangeable scenes."""
_PRIOR_CORRELATION = 0.7
"""Prior correlation between the effects at neighbouring rungs."""
_LEARN_FROM = 200
"""Mean and covariance are learned from this many of the latest configurations."""
_BOUND = 4.0
"""Differences are clipped to this many deviations from their median."""
_ITERATIONS = 4
"""Of expectation maximisation."""
_SCALES = {"val/psnr": 0.3, "val/ssim": 0.01}
"""Prior scale of the difference between two configurations, by quality."""


class Verdict(NamedTuple):
    """Prediction for a configuration."""

    chance: float
    """Posterior probability that it beats its rival by more than the margin."""
    expected: float
    """Expected worth at the end of training."""


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
        started = ~np.isnan(differences).all(axis=(1, 2))
        behind = started & (differences != 0).any(axis=(1, 2))  # excludes the rival itself
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
        """Posterior of a configuration, given its `values` [s, r] so far."""
        difference = self._bounded(values[None] - self._rival)
        gain, left = self._conditioning(~np.isnan(difference[0]))
        expected = self._expected(difference, gain)[0, self._last].mean()
        spread = np.sqrt(max(left[np.ix_(self._last, self._last)].mean(), 1e-18))
        chance = student.sf((margin - expected) / spread, self._degrees)
        return Verdict(float(chance), float(self._rival[:, -1].mean() + expected))

    def variance_reduction(self, known: NDArray[np.bool_]) -> Array:
        """Expected variance reduction [s, r]: by how much measuring each entry would reduce the
        posterior variance of a configuration's worth, given the entries `known` [s, r]."""
        _, left = self._conditioning(known.ravel())
        shared = left[:, self._last].mean(axis=1)
        return (shared**2 / (left.diagonal() + 1e-12)).reshape(known.shape)

    def _bounded(self, differences: Array) -> Array:
        """Clipped differences [c, e]: the size of a diverged training's deficit carries no
        information and would dominate the covariance."""
        return differences.clip(*self._bounds).reshape(len(differences), self._rival.size)

    def _conditioning(self, known: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Gain [e, k] and covariance [e, e] given the known entries."""
        covariance = self._covariance
        between = covariance[np.ix_(known, known)] + 1e-12 * np.eye(known.sum())
        gain = np.linalg.solve(between, covariance[known]).T
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
                gain, left = self._conditioning(known)
                expected = self._expected(chosen, gain)
                centred = expected - self._mean
                total += expected.sum(axis=0)
                second += len(chosen) * left + centred.T @ centred
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


def _typical(differences: Array, scale: float) -> tuple[float, tuple[Array, Array]]:
    """Spread of configurations at the first rung, and bounds of differences at each rung.

    Medians are robust to diverged configurations; `scale` has the prior's pseudo-count.
    """
    weight, num_rungs = _PRIOR_WEIGHT / (_PRIOR_WEIGHT + len(differences)), differences.shape[-1]
    middle, reach = np.zeros(num_rungs), np.full(num_rungs, scale)
    effect: float = scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rungs without a value
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


class Pruned(NamedTuple):
    """Why a configuration was pruned."""

    reason: str
    values: list[float]
    """Expected objectives at the end of training; never better than those of its rival."""


class Racing:
    """The values of all configurations, and the pruning rule of the plan applied to them."""

    def __init__(self, plan: Plan, num_configurations: int):
        self._plan = plan
        self._objectives = plan.spec.objectives
        self._stopping = plan.spec.stopping
        shape = (num_configurations, len(plan.trainings), plan.rungs)
        self._values = {q: np.full(shape, np.nan) for q in self.qualities}
        self._seconds = np.full(shape, np.nan)
        self._races: dict[tuple[str, int], PairedRace] = {}
        self.finished: dict[int, Metrics] = {}
        """Objectives of fully trained configurations, by number."""

    @property
    def qualities(self) -> list[str]:
        return [name for name in self._objectives if name in QUALITIES]

    def make_room(self, number: int) -> None:
        """Accept the number of a configuration beyond those that were planned."""
        more = number + 1 - len(self._seconds)
        if more > 0:
            pad = [(0, more), (0, 0), (0, 0)]
            self._seconds = np.pad(self._seconds, pad, constant_values=np.nan)
            for quality, values in self._values.items():
                self._values[quality] = np.pad(values, pad, constant_values=np.nan)

    def add(self, number: int, pair: SceneRung, metrics: Metrics) -> None:
        """Add the metrics of a finished unit."""
        at = (number, *self._at(pair))
        for quality in self.qualities:
            self._values[quality][at] = metrics[quality]
        self._seconds[at] = metrics.get("seconds", math.nan)
        self._races.clear()  # They were learned without it.

    def finish(self, number: int, costs: Metrics) -> list[float]:
        """Objectives of a configuration whose units have all finished: means over scenes."""
        about = costs | {"seconds": self._expected_seconds(number)}
        about |= {q: float(values[number, :, -1].mean()) for q, values in self._values.items()}
        self.finished[number] = {name: about[name] for name in self._objectives}
        return list(self.finished[number].values())

    def best(self) -> int | None:
        """The finished configuration with the highest first objective."""
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

    def verdict(self, number: int) -> Verdict | None:
        """What is expected of a configuration in the first objective, compared with the best
        finished one; None for that one, and before a unit has finished."""
        best = self.best()
        if best in (None, number) or np.isnan(self._seen(number)).all():
            return None
        return self._verdict(self._objectives[0], number, best)

    def prune(self, number: int, costs: Metrics) -> Pruned | None:
        """Whether to prune a configuration, compared with the best finished one.

        With several objectives the rivals are those on the front that cost no more, and one of them
        must be better in every quality.
        """
        if self._stopping.rule == "none" or np.isnan(self._seen(number)).all():
            return None
        costs = costs | {"seconds": self._expected_seconds(number)}
        for rival in self._rivals(costs):
            if not any(self._keeps(quality, number, rival) for quality in self.qualities):
                return self._describe(number, rival, costs)
        return None

    def next(self, number: int, waiting: list[SceneRung], in_flight: set[SceneRung]) -> SceneRung:
        """Which of the waiting pairs of scene and rung to train next.

        In a race that is the pair that reduces the posterior variance most per training step, else
        the first one. Pairs in flight count as known.
        """
        best = self.best()
        if self._stopping.rule != "race" or best is None:
            return waiting[0]
        known = ~np.isnan(self._seen(number))
        for pair in in_flight:
            known[self._at(pair)] = True
        reduction = self._race(self._objectives[0], best).variance_reduction(known)
        steps = np.diff(float(self._stopping.eta) ** np.arange(self._plan.rungs), prepend=0)
        per_step = reduction / steps
        return max(waiting, key=lambda pair: per_step[self._at(pair)])

    def _at(self, pair: SceneRung) -> tuple[int, int]:
        scene, rung = pair
        return self._plan.trainings.index(scene), rung

    def _seen(self, number: int) -> np.ndarray:
        return self._values[self._objectives[0]][number]

    def _rivals(self, costs: Metrics) -> list[int]:
        if len(self._objectives) == 1:
            best = self.best()
            return [] if best is None else [best]
        cheap = [name for name in self._objectives if name not in QUALITIES]
        return [
            number
            for number in self.front()
            if all(self.finished[number][name] <= costs[name] for name in cheap)
        ]

    def _keeps(self, quality: str, number: int, rival: int) -> bool:
        values, threshold = self._values[quality], self._stopping.threshold
        match self._stopping.rule:
            case "asha":
                return halving_keeps(values, number, self._stopping.eta)
            case "wilcoxon":
                return signed_ranks_keep(values, number, rival, threshold)
            case _:
                return self._verdict(quality, number, rival).chance >= threshold

    def _describe(self, number: int, rival: int, costs: Metrics) -> Pruned:
        about = dict(costs)
        chances = []
        for quality in self.qualities:
            verdict = self._verdict(quality, number, rival)
            bound = math.nextafter(self.finished[rival][quality], -math.inf)
            about[quality] = min(verdict.expected, bound)
            chances.append(verdict.chance)
        num_units = int((~np.isnan(self._seen(number))).sum())
        margin = f" by {self._stopping.margin:g}" if self._stopping.margin else ""
        match self._stopping.rule:
            case "asha":
                reason = f"not among the best 1/{self._stopping.eta} of its rung"
            case "wilcoxon":
                reason = f"signed ranks against #{rival:02d}"
            case _:
                reason = f"{max(chances):.1%} to beat #{rival:02d}{margin}"
        reason += f" after {num_units} units"
        return Pruned(reason, [about[name] for name in self._objectives])

    def _verdict(self, quality: str, number: int, rival: int) -> Verdict:
        margin = self._stopping.margin_of(quality)
        return self._race(quality, rival).verdict(self._values[quality][number], margin)

    def _race(self, quality: str, rival: int) -> PairedRace:
        if (quality, rival) not in self._races:
            values = self._values[quality]
            self._races[quality, rival] = PairedRace(values, values[rival], scale=_SCALES[quality])
        return self._races[quality, rival]

    def _expected_seconds(self, number: int) -> float:
        """Mean seconds of a full training, extrapolated from the highest rung on each scene."""
        scales = float(self._stopping.eta) ** np.arange(self._plan.rungs - 1, -1, -1)
        scaled = self._seconds[number] * scales
        highest = [scene[~np.isnan(scene)][-1] for scene in scaled if not np.isnan(scene).all()]
        return float(np.mean(highest)) if highest else math.inf
