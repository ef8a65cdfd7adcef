"""What configurations have reached, which of them are best, and who is given up.

Pure decisions on arrays: knows neither Ray nor Optuna.
"""

import math
from typing import NamedTuple

import numpy as np

from cbnerf.search.plan import Plan
from cbnerf.search.race import Race, Verdict, halving_keeps, signed_ranks_keep
from cbnerf.search.spec import QUALITIES

Metrics = dict[str, float]
Place = tuple[str, int]
"""Scene and rung."""

_SCALES = {"val/psnr": 0.3, "val/ssim": 0.01}
"""Differences between configurations that a search starts to expect, before it has seen any."""


class Stop(NamedTuple):
    """Why a configuration was given up."""

    reason: str
    values: list[float]
    """What it would have reached, by objective; never better than what stopped it."""


class Judge:
    """Keeps values by configuration, scene and rung, and judges by the plan's rule."""

    def __init__(self, plan: Plan, num_configurations: int):
        self._plan = plan
        self._objectives = plan.spec.objectives
        self._stopping = plan.spec.stopping
        shape = (num_configurations, len(plan.trainings), plan.rungs)
        self._values = {q: np.full(shape, np.nan) for q in self.qualities}
        self._seconds = np.full(shape, np.nan)
        self._races: dict[tuple[str, int], Race] = {}
        self.finished: dict[int, Metrics] = {}
        """Objectives of the configurations that were trained to their end, by number."""

    @property
    def qualities(self) -> list[str]:
        return [name for name in self._objectives if name in QUALITIES]

    def enter(self, number: int, place: Place, metrics: Metrics) -> None:
        """Take note of what a configuration reached."""
        at = (number, *self._at(place))
        for quality in self.qualities:
            self._values[quality][at] = metrics[quality]
        self._seconds[at] = metrics.get("seconds", math.nan)
        self._races.clear()  # There is more to learn from.

    def finish(self, number: int, costs: Metrics) -> list[float]:
        """Its objectives, once all of its entries are there: means over scenes."""
        about = costs | {"seconds": self._expected_seconds(number)}
        about |= {q: float(values[number, :, -1].mean()) for q, values in self._values.items()}
        self.finished[number] = {name: about[name] for name in self._objectives}
        return list(self.finished[number].values())

    def best(self) -> int | None:
        """The finished configuration with the highest first objective."""
        first = self._objectives[0]
        return max(self.finished, key=lambda n: self.finished[n][first], default=None)

    def front(self) -> list[int]:
        """Finished configurations that no other one beats in all objectives."""
        signs = np.array([1 if name in QUALITIES else -1 for name in self._objectives])
        numbers = list(self.finished)
        points = np.array([[*self.finished[n].values()] for n in numbers]).reshape(-1, len(signs))
        points = points * signs
        return [
            number
            for number, point in zip(numbers, points, strict=True)
            if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
        ]

    def stop(self, number: int, costs: Metrics) -> Stop | None:
        """Whether a finished configuration makes it needless to go on with this one.

        With several objectives that is one that costs no more and is better in every quality.
        """
        if self._stopping.rule == "none" or np.isnan(self._seen(number)).all():
            return None
        costs = costs | {"seconds": self._expected_seconds(number)}
        for rival in self._rivals(costs):
            if not any(self._keeps(quality, number, rival) for quality in self.qualities):
                return self._give_up(number, rival, costs)
        return None

    def next_place(self, number: int, open_places: list[Place], in_flight: set[Place]) -> Place:
        """Which of the open places to fill next: in a race the one that will leave least doubt
        about the configuration, for the steps that it takes; else the first."""
        best = self.best()
        if self._stopping.rule != "race" or best is None:
            return open_places[0]
        known = ~np.isnan(self._seen(number))
        for place in in_flight:
            known[self._at(place)] = True
        telling = self._race(self._objectives[0], best).telling(known)
        heights = float(self._stopping.eta) ** np.arange(self._plan.rungs)
        telling /= np.diff(heights, prepend=0)
        return max(open_places, key=lambda place: telling[self._at(place)])

    def _at(self, place: Place) -> tuple[int, int]:
        scene, rung = place
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

    def _give_up(self, number: int, rival: int, costs: Metrics) -> Stop:
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
        return Stop(reason, [about[name] for name in self._objectives])

    def _verdict(self, quality: str, number: int, rival: int) -> Verdict:
        margin = self._stopping.margin * _SCALES[quality] / _SCALES["val/psnr"]
        return self._race(quality, rival).verdict(self._values[quality][number], margin)

    def _race(self, quality: str, rival: int) -> Race:
        if (quality, rival) not in self._races:
            values = self._values[quality]
            self._races[quality, rival] = Race(values, values[rival], scale=_SCALES[quality])
        return self._races[quality, rival]

    def _expected_seconds(self, number: int) -> float:
        """Mean seconds of a whole training, from the highest rung seen on each scene."""
        climbs = float(self._stopping.eta) ** np.arange(self._plan.rungs - 1, -1, -1)
        scaled = self._seconds[number] * climbs
        highest = [scene[~np.isnan(scene)][-1] for scene in scaled if not np.isnan(scene).all()]
        return float(np.mean(highest)) if highest else math.inf
