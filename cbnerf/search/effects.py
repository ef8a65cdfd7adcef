"""The effect of each knob on the objective, in its own unit, with a 95 % interval.

The effect is the highest minus the lowest value of the knob's function in `effect_model` over the
searched range, for the mean of the scenes after a full training. On a single scene it is larger or
smaller by the scale of the scene, which all knobs share: a knob that acts on some scenes alone is
not described by it.
"""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbnerf.search.effect_model import AdditiveModel, Basis
from cbnerf.search.spec import Choices, Range, shown_knob, with_unit
from cbnerf.search.state import StudyState

Array = NDArray[np.floating]

ENOUGH = 4
"""Number of configurations below which no effect is estimated."""
_SWEEPS, _BURN_IN = 1500, 300
"""Sweeps of the Gibbs sampler, and how many of them are discarded."""


class Bounds(NamedTuple):
    """Posterior mean and 95 % interval."""

    size: float
    low: float
    high: float

    def describe(self, quality: str) -> str:
        """As `1.39 dB (1.13 to 1.89)`, in the unit of a quality."""
        low, high = (with_unit(end, quality).split()[0] for end in (self.low, self.high))
        return f"{with_unit(self.size, quality)} ({low} to {high})"


class Effect(NamedTuple):
    """The effect of one knob, in units of the objective."""

    knob: str
    size: float
    """Posterior mean of the highest minus the lowest value of the knob's function."""
    low: float
    """Lower end of the 95 % interval; 0 where no effect is seen."""
    high: float
    best: Any
    """The value that was trained at which the posterior mean of the knob's function is highest."""
    is_bounded: bool
    """Whether `high` is below two deviations of the configurations; else these are too few."""
    by_scene: tuple[Bounds, ...] = ()
    """On each scene; below zero where the knob acts there the other way round."""

    @property
    def is_seen(self) -> bool:
        """Whether the interval does not hold zero."""
        return self.low > 0

    def describe(self, quality: str) -> str:
        """The effect in words."""
        if self.is_seen:
            return f"{with_unit(self.size, quality)}, best at {shown_knob(self.best)}"
        within = f"(within +-{with_unit(self.high, quality)})"
        return f"no effect seen {within}" if self.is_bounded else f"too few configurations {within}"


def study_effects(state: StudyState) -> list[Effect]:
    """Effects on the first objective, the largest first; none with fewer than `ENOUGH`
    configurations, or if nothing differs."""
    space, plan = state.plan.spec.space, state.plan
    trials = state.study.get_trials(deepcopy=False)
    numbers = [n for n in state.started if space.keys() <= trials[n].params.keys()]
    values = np.full((len(numbers), len(plan.trainings), plan.rungs), np.nan)
    for row, number in enumerate(numbers):
        for (scene, rung), metrics in state.results(number).items():
            if metrics is not None:
                quality = metrics[plan.spec.objectives[0]]
                values[row, plan.trainings.index(scene), rung] = quality
    knobs = {name: [trials[n].params[name] for n in numbers] for name in space}
    return estimate_effects(values, knobs, space)


def estimate_effects(
    values: Array, knobs: dict[str, list[Any]], space: dict[str, Range | Choices]
) -> list[Effect]:
    """Effects of the `knobs`, the largest first.

    `values` [configuration, scene, rung] are NaN where a unit has not been measured; `knobs` holds
    the values of each knob, one per configuration. A fixed seed makes equal calls equal.
    """
    trained = ~np.isnan(values).all(axis=(1, 2))
    values = values[trained]
    if len(values) < ENOUGH or (unit := _deviation(values)) == 0:
        return []
    bases = {name: Basis(space[name]) for name in knobs}
    tried = [[own[c] for c in np.flatnonzero(trained)] for own in knobs.values()]
    columns = [basis.at(own) for basis, own in zip(bases.values(), tried, strict=True)]
    leads = [
        block[:, : basis.num_leads] for block, basis in zip(columns, bases.values(), strict=True)
    ]
    products = [
        np.einsum("cp,cq->cpq", one, other).reshape(len(values), -1)
        for one, other in combinations(leads, 2)
    ]
    model = AdditiveModel(values / unit, columns, products, np.random.default_rng(0))
    draws, scales = zip(*[model.sweep() for _ in range(_SWEEPS)][_BURN_IN:], strict=True)
    scales = np.array(scales)
    of_mean = scales.mean(axis=1, keepdims=True)
    effects = []
    for name, own, column, weights in zip(
        knobs, tried, columns, zip(*draws, strict=True), strict=True
    ):
        weights = np.array(weights) * of_mean
        ranges = np.ptp(weights @ bases[name].functions.T * unit, axis=1)
        size, low, high = _bounds(ranges)
        scenes = tuple(map(_bounds, (ranges[:, None] * scales / of_mean).T))
        best = own[int((column @ weights.mean(axis=0)).argmax())]
        effects.append(Effect(name, size, low, high, best, high < 2 * unit, scenes))
    return sorted(effects, key=lambda effect: -effect.size)


def _bounds(draws: Array) -> Bounds:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Bounds(float(draws.mean()), float(low), float(high))


def _deviation(values: Array) -> float:
    """Robust standard deviation of the configurations, each represented by the median of its paired
    differences from the median configuration; of all differences if these medians are equal."""
    paired = values - np.nanmedian(values, axis=0)
    medians = np.nanmedian(paired, axis=(1, 2))
    for differences in (medians, paired[~np.isnan(paired)]):
        robust = 1.4826 * float(np.median(abs(differences - np.median(differences))))
        if deviation := max(robust, float(differences.std()) / 3):
            return deviation
    return 0.0
