"""Which configurations to prune, and which unit of a configuration to train next.

Applies `paired_race` to the values that the units of a plan have reached. Pure decisions on
arrays; no Ray, no Optuna.
"""

import math
from typing import NamedTuple

import numpy as np

from cbnerf.search.paired_race import PairedRace, Verdict
from cbnerf.search.plan import Plan
from cbnerf.search.spec import QUALITIES

Metrics = dict[str, float]
SceneRung = tuple[str, int]
"""Scene and rung."""

_SCALES = {"val/psnr": 0.3, "val/ssim": 0.01}
"""Prior scale of the difference between two configurations, by quality."""


class Pruned(NamedTuple):
    """Why a configuration was pruned."""

    reason: str
    values: list[float]
    """Expected objectives at the end of training; never better than those of its rival."""


class Racing:
    """The values of all configurations, and the race between them."""

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
        """Extend the arrays if a configuration has a number beyond those that were planned."""
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
        metrics = costs | {"seconds": self._expected_seconds(number)}
        metrics |= {q: float(values[number, :, -1].mean()) for q, values in self._values.items()}
        self.finished[number] = {name: metrics[name] for name in self._objectives}
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
        """Prediction for the first objective of a configuration, compared with the incumbent; None
        for the incumbent itself, without one, and before a unit has finished."""
        best = self.best()
        if best in (None, number) or not self._is_measured(number).any():
            return None
        return self._verdict(self._objectives[0], number, best)

    def prune(self, number: int, costs: Metrics) -> Pruned | None:
        """The reason to prune a configuration, compared with the incumbent; None to keep it.

        With several objectives the rivals are those on the front that cost no more, and a
        configuration is pruned if it is unlikely to beat one of them in any quality.
        """
        if self._stopping.rule == "none" or not self._is_measured(number).any():
            return None
        costs = costs | {"seconds": self._expected_seconds(number)}
        for rival in self._rivals(costs):
            verdicts = {q: self._verdict(q, number, rival) for q in self.qualities}
            if all(verdict.chance < self._stopping.threshold for verdict in verdicts.values()):
                return self._describe(number, rival, verdicts, costs)
        return None

    def next(self, number: int, waiting: list[SceneRung], in_flight: set[SceneRung]) -> SceneRung:
        """Which of the waiting pairs of scene and rung to train next.

        In a race it is the pair that reduces the posterior variance most per training step, else
        the first one. Pairs in flight count as known.
        """
        best = self.best()
        if self._stopping.rule != "race" or best is None:
            return waiting[0]
        known = self._is_measured(number)
        for pair in in_flight:
            known[self._at(pair)] = True
        reduction = self._race(self._objectives[0], best).variance_reduction(known)
        steps = np.diff(float(self._stopping.eta) ** np.arange(self._plan.rungs), prepend=0)
        per_step = reduction / steps
        return max(waiting, key=lambda pair: per_step[self._at(pair)])

    def _at(self, pair: SceneRung) -> tuple[int, int]:
        scene, rung = pair
        return self._plan.trainings.index(scene), rung

    def _is_measured(self, number: int) -> np.ndarray:
        """Which scenes and rungs [s, r] of a configuration have been measured."""
        return ~np.isnan(self._values[self._objectives[0]][number])

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

    def _describe(
        self, number: int, rival: int, verdicts: dict[str, Verdict], costs: Metrics
    ) -> Pruned:
        worse = {q: math.nextafter(self.finished[rival][q], -math.inf) for q in self.qualities}
        expected = costs | {q: min(verdicts[q].expected, worse[q]) for q in self.qualities}
        chance = max(verdict.chance for verdict in verdicts.values())
        num_units = self._is_measured(number).sum()
        margin = f" by {self._stopping.margin:g}" if self._stopping.margin else ""
        reason = f"{chance:.1%} to beat #{rival:02d}{margin} after {num_units} units"
        return Pruned(reason, [expected[name] for name in self._objectives])

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
