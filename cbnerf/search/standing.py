"""How far the best configuration leads, and which others are not significantly worse."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from cbnerf.search.spec import with_unit
from cbnerf.search.state import StudyState

_SPREAD_WEIGHT = 4
"""Pseudo-count, in scenes, of the seed-to-seed spread that `stopping.margin` gives."""
_LISTED = 5
"""Maximum number of ties that are named."""


class Standing(NamedTuple):
    """The best fully trained configuration, compared with the others."""

    quality: str
    """The first objective, in which they are compared."""
    best: int
    runner_up: int | None
    """None if no other has been trained to its end."""
    lead: float
    """Lead over the runner-up, in the mean of the scenes."""
    noise: float
    """A lead below this is not significant: chance exceeds it in 2.5 % of cases."""
    ties: list[int]
    """Others whose distance from the best is not significant, the closest first."""
    cheapest: int
    """The one of the best and its ties with the fewest training seconds."""
    seconds: dict[int, float]
    """Training seconds of the best and its ties."""
    num_seeds: int
    """Number of other seeds over which configurations are compared; 0: by the search's own seed."""

    def describe(self) -> str:
        """One sentence, after the name of the configuration."""
        if self.runner_up is None:
            return "the only one that was trained to its end"
        lead, noise = (with_unit(value, self.quality) for value in (self.lead, self.noise))
        verdict = "more than" if self.lead > self.noise else "within"
        text = f"{lead} ahead of number {self.runner_up}, {verdict} the noise ({noise})"
        if self.num_seeds:
            text += f", over other seeds ({self.num_seeds})"
        if not self.ties:
            return text
        text += f"; ties: {_listed(self.ties)}; the cheapest is "
        if self.cheapest == self.best:
            return text + "the best itself"
        costs = f"{self.seconds[self.cheapest]:.0f} s instead of {self.seconds[self.best]:.0f} s"
        return text + f"number {self.cheapest} ({costs})"


def find_standing(state: StudyState) -> Standing | None:
    """The standing of the best configuration; None before one has finished.

    Configurations are compared by paired differences over the scenes of a full training. A spread
    of differences from few scenes is uncertain: it is pooled with the seed-to-seed spread that
    `stopping.margin` gives, and the quantile is of Student's t. Once the leaders are confirmed by
    other seeds, they alone are compared, by their means over those seeds.
    """
    best = state.best()
    if best is None:
        return None
    quality = state.plan.spec.objectives[0]
    values: dict[int, np.ndarray] = {}
    seconds: dict[int, float] = {}
    confirmed = state.confirmed()
    num_seeds = len(state.confirmation.seeds(state.leaders())) if confirmed else 0
    for number in confirmed or state.ranking():
        results = [m for m in state.full_results(number).values() if m is not None]
        scores = confirmed[number].values() if confirmed else [m[quality] for m in results]
        values[number] = np.array(list(scores))
        seconds[number] = sum(metrics.get("seconds", math.nan) for metrics in results)
    spread = state.plan.spec.stopping.margin_of(quality) / math.sqrt(max(num_seeds, 1))
    others = []
    for number, scores in values.items():
        differences = values[best.number] - scores
        if number != best.number:
            others.append((float(differences.mean()), _noise(differences, spread), number))
    others.sort()
    lead, noise, runner_up = others[0] if others else (math.inf, 0.0, None)
    ties = [number for lead, noise, number in others if lead <= noise]
    known = {number: seconds[number] for number in (best.number, *ties)}
    cheapest = min(known, key=lambda number: known[number])
    return Standing(quality, best.number, runner_up, lead, noise, ties, cheapest, known, num_seeds)


def _listed(numbers: list[int]) -> str:
    """The first few numbers."""
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return ", ".join(map(str, numbers[:_LISTED])) + more


def _noise(differences: np.ndarray, spread: float) -> float:
    """Value that the mean of the differences exceeds by chance in 2.5 % of cases."""
    degrees = len(differences) - 1 + _SPREAD_WEIGHT
    squares = ((differences - differences.mean()) ** 2).sum() + _SPREAD_WEIGHT * spread**2
    return float(student.ppf(0.975, degrees) * math.sqrt(squares / degrees / len(differences)))
