"""What each knob of a study does to the objective, in its own unit, with a 95 % interval.

An additive model of the measured units, never of what was imputed for pruned configurations:

    values[c, s, r] = baseline[s, r] + scale[s, r] (f_1(c) + ... + f_K(c) + products[c]
                      + residual[c]) + by_scene[c, s] + by_rung[c, r] + noise[c, s, r]

f_k is a smooth function of knob k (of a category: one value each), or zero; its effect is the
highest minus the lowest value over the searched range, on the mean of the scenes and after a full
training. The scales say that some scenes and rungs tell configurations further apart than others.
Products of two knobs, about one a study a priori, keep an interaction from passing for an effect
where the sampler has searched only a corner; other interactions are in the residual. Noise and
deviations are Student's t, for some trainings diverge. A unit that the race left out is missing at
random: whether it was trained depended on measured units alone, so pruning does not bias the
posterior.

A Gibbs sampler with a fixed seed draws from the posterior. Names in this file:

    values[c, s, r]     quality of configuration c on scene s at rung r; NaN where not measured
    worth[c]            sum of all f and the residual
    seen[c], sure[c]    the worth as c's units tell it, and the precision of that
    columns[k][c, p]    basis functions of knob or pair k at the configurations
    weights[k][p]       their coefficients, a priori N(0, spread^2)
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbnerf.search.spec import UNITS, Choices, Range, shown_knob, with_unit
from cbnerf.search.state import StudyState

Array = NDArray[np.floating]

ENOUGH = 4
"""Number of configurations below which no effect is estimated."""
_WAVES = 6
"""Cosines of a function of an ordered knob beside a parabola, which makes up for their level ends;
wave j has the prior deviation 1 / j, as in Brownian motion, so steps are as likely as slopes."""
_GRID = 33
"""Points of a range at which its function is evaluated."""
_SPREADS = np.array([0.0, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
"""Prior deviations of a function, in deviations of the configurations."""
_ACTS = 0.75
"""Prior probability that a knob has an effect."""
_DEGREES = 3.0
"""Of Student's t."""
_SURE_OF_SCALE = 8.0
"""Prior precision of a scale around what its scene and its rung lead to expect."""
_SWEEPS, _BURN = 1500, 300


class Effect(NamedTuple):
    """The effect of one knob, in units of the objective."""

    knob: str
    size: float
    """Posterior mean of the highest minus the lowest value of the knob's function."""
    low: float
    """Lower end of the 95 % interval; 0 where no effect is seen."""
    high: float
    best: Any
    """The value of the knob at which the posterior mean of its function is highest."""
    is_bounded: bool
    """Whether the study says anything: else the knob could explain all that differs."""

    @property
    def is_seen(self) -> bool:
        """Whether the interval does not hold zero."""
        return self.low > 0

    def describe(self, quality: str) -> str:
        """What the study says of the knob."""
        if self.is_seen:
            return f"{with_unit(self.size, quality)}, best at {shown_knob(self.best)}"
        within = f"(within +-{with_unit(self.high, quality)})"
        return f"no effect seen {within}" if self.is_bounded else f"too few configurations {within}"


def title_of(quality: str) -> str:
    """Heading of the effects on a quality."""
    return f"Effect of each knob ({UNITS[quality]}, 95 % interval)"


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
    values: Array, knobs: dict[str, list[Any]], space: dict[str, Range | Choices], *, seed: int = 0
) -> list[Effect]:
    """Effects of the `knobs`, of which each configuration has a value, the largest first."""
    trained = ~np.isnan(values).all(axis=(1, 2))
    values = values[trained]
    if len(values) < ENOUGH or (unit := _deviation(values)) == 0:
        return []
    bases = {name: _Basis(space[name]) for name in knobs}
    columns = [
        basis.at([knobs[name][c] for c in np.flatnonzero(trained)]) for name, basis in bases.items()
    ]
    leads = [
        block[:, : basis.num_leads] for block, basis in zip(columns, bases.values(), strict=True)
    ]
    products = [
        np.einsum("cp,cq->cpq", one, other).reshape(len(values), -1)
        for one, other in combinations(leads, 2)
    ]
    sampler = _Sampler(values / unit, columns, products, np.random.default_rng(seed))
    draws = [sampler.sweep() for _ in range(_SWEEPS)][_BURN:]
    effects = []
    for (name, basis), weights in zip(bases.items(), zip(*draws, strict=True), strict=True):
        functions = np.array(weights) @ basis.functions.T * unit
        reach = np.ptp(functions, axis=1)
        low, high = map(float, np.quantile(reach, [0.025, 0.975]))
        best = basis.levels[int(functions.mean(axis=0).argmax())]
        effects.append(Effect(name, float(reach.mean()), low, high, best, high < 2 * unit))
    return sorted(effects, key=lambda effect: -effect.size)


def _deviation(values: Array) -> float:
    """Robust standard deviation of the configurations, each the median of its paired differences
    from the median configuration; of all differences where those are equal."""
    paired = values - np.nanmedian(values, axis=0)
    each = np.nanmedian(paired, axis=(1, 2))
    for deviations in (each, paired[~np.isnan(paired)]):
        typical = 1.4826 * float(np.median(abs(deviations - np.median(deviations))))
        if spread := max(typical, float(deviations.std()) / 3):
            return spread
    return 0.0


class _Basis:
    """The basis functions of a knob, with mean zero over its levels."""

    def __init__(self, domain: Range | Choices):
        self._domain = domain
        if isinstance(domain, Range):
            ends = np.array([domain.low, domain.high], float)
            low, high = np.log(ends) if domain.log else ends
            places = np.linspace(low, high, _GRID)
            self.levels: list[Any] = list(np.exp(places) if domain.log else places)
        else:
            self.levels = list(domain.choices)
        self._is_ordered = all(type(level) in (int, float, np.float64) for level in self.levels)
        if self._is_ordered:
            self.levels.sort()
        raw = self._raw(self.levels)
        self._mean = raw.mean(axis=0)
        self._size = math.sqrt(((raw - self._mean) ** 2).sum(axis=1).mean()) or 1.0
        self.functions = self.at(self.levels)
        """[level, p]"""
        self.num_leads = 1 if self._is_ordered else len(self.levels)
        """So many of them, from the first one, have products with those of other knobs."""

    def at(self, values: Sequence[Any]) -> Array:
        """The basis functions [value, p]; the sum of their squares is 1 on average."""
        return (self._raw(values) - self._mean) / self._size

    def _raw(self, values: Sequence[Any]) -> Array:
        if not self._is_ordered:
            return np.array([[float(value == level) for level in self.levels] for value in values])
        where = np.array([self._place(value) for value in values])
        waves = np.arange(1, _WAVES + 1)
        cosines = np.cos(np.pi * where[:, None] * waves) / waves
        slope = 2 * where - 1
        return np.column_stack([slope, slope**2, cosines])

    def _place(self, value: Any) -> float:
        """From 0 to 1 over the range, or over the order of the choices."""
        domain = self._domain
        if isinstance(domain, Choices):
            return self.levels.index(value) / max(len(self.levels) - 1, 1)
        scaled = np.array([domain.low, domain.high, value], float)
        low, high, here = np.log(scaled) if domain.log else scaled
        return float((here - low) / (high - low))


class _Tails:
    """Student's t as Gaussians of different variances; one scale for each part of the last axis."""

    def __init__(self, shape: tuple[int, ...], rng: np.random.Generator):
        self._rng, self._variance = rng, np.full(shape[-1], 0.01)
        self.precision = np.full(shape, 100.0)
        """Of each deviation."""

    def draw(self, deviations: Array, known: NDArray[np.bool_]) -> None:
        """Draw scales and precisions given the known deviations."""
        squares = np.where(known, deviations**2, 0.0)
        rates = (_DEGREES + squares / self._variance) / 2
        mixing = self._rng.gamma((_DEGREES + 1) / 2, 1 / rates)
        axes = tuple(range(deviations.ndim - 1))
        rate = (mixing * squares).sum(axis=axes) / 2 + 1e-3
        self._variance = rate / self._rng.gamma(known.sum(axis=axes) / 2 + 1.0)
        self.precision = mixing / self._variance


class _Sampler:
    """Gibbs sampling of the additive model, on values with a deviation of about 1."""

    def __init__(
        self, values: Array, knobs: list[Array], products: list[Array], rng: np.random.Generator
    ):
        self._known: NDArray[np.bool_] = ~np.isnan(values)
        self._rng, self._columns = rng, [*knobs, *products]
        self._num_knobs = len(knobs)
        acts = np.repeat([_ACTS, 1 / (1 + len(products))], [len(knobs), len(products)])
        others = np.outer(acts, np.ones(len(_SPREADS) - 1)) / (len(_SPREADS) - 1)
        self._chances = np.log(np.column_stack([1 - acts, others]))
        count, scenes, rungs = values.shape
        self._baseline = np.nan_to_num(np.nansum(values, axis=0) / self._known.sum(axis=0).clip(1))
        self._values = np.where(self._known, values, 0.0)
        self._weights: list[Array] = [np.zeros(block.shape[1]) for block in self._columns]
        self._scale, self._of_rung = np.ones((scenes, rungs)), np.zeros(rungs)
        self._worth = np.zeros(count)
        self._by_scene, self._by_rung = np.zeros((count, scenes)), np.zeros((count, rungs))
        self._noise = _Tails(values.shape, rng)
        self._of_scenes, self._of_rungs = _Tails((count, scenes), rng), _Tails((count, rungs), rng)

    def sweep(self) -> list[Array]:
        """Draw every parameter once, given all others; returns the weights of the knobs for the
        mean of the scenes at the last rung."""
        precision = np.where(self._known, self._noise.precision, 0.0)
        self._draw_worth(precision)
        self._draw_levels(precision)
        rest = self._values - self._baseline - self._worth[:, None, None] * self._scale
        rest -= self._by_scene[:, :, None] + self._by_rung[:, None]
        self._noise.draw(rest, self._known)
        self._of_scenes.draw(self._by_scene, np.asarray(self._known.any(axis=2)))
        self._of_rungs.draw(self._by_rung, np.asarray(self._known.any(axis=1)))
        scale = self._scale[:, -1].mean()
        return [weights * scale for weights in self._weights[: self._num_knobs]]

    def _draw_worth(self, precision: Array) -> None:
        """What a configuration is worth, with its deviations integrated out, and then these.

        Integrating out those by scene leaves precisions [c, s, r, r]; with them those by rung have
        the precision `of_rungs` [c, r, r].
        """
        total = precision.sum(axis=2) + self._of_scenes.precision
        left = -np.einsum("csr,csq->csrq", precision, precision / total[:, :, None])
        left += precision[..., None] * np.eye(len(self._by_rung[0]))
        rest = self._values - self._baseline
        of_scale = np.einsum("csrq,sq->csr", left, self._scale)
        of_rest = np.einsum("csrq,csq->csr", left, rest)
        prior = self._of_rungs.precision
        prior[:, -1] = 1e9  # deviations at the last rung are part of the residual
        of_rungs = left.sum(axis=1) + prior[..., None] * np.eye(prior.shape[1])
        sides = np.stack([of_scale.sum(axis=1), of_rest.sum(axis=1)], axis=2)
        solved = np.linalg.solve(of_rungs, sides)
        sure = (of_scale * self._scale).sum(axis=(1, 2)) + 1e-9
        sure -= (sides[..., 0] * solved[..., 0]).sum(axis=1)
        pull = (of_rest * self._scale).sum(axis=(1, 2))
        pull -= (sides[..., 0] * solved[..., 1]).sum(axis=1)
        self._worth, shift = self._draw_functions(pull / sure, sure)
        self._baseline = self._baseline + shift * self._scale

        spread = np.linalg.inv(np.linalg.cholesky(of_rungs)).swapaxes(1, 2)
        worth = (self._worth + shift)[:, None]
        self._by_rung = solved[..., 1] - worth * solved[..., 0]
        self._by_rung += (spread @ self._rng.normal(size=(*prior.shape, 1)))[..., 0]
        rest = rest - worth[..., None] * self._scale - self._by_rung[:, None]
        self._by_scene = self._normal(total, (precision * rest).sum(axis=2))

    def _draw_functions(self, seen: Array, sure: Array) -> tuple[Array, float]:
        """The worth of the configurations and a shift of all: the functions of knobs and pairs, and
        the variance of the residuals, with these integrated out; and then these."""
        total = sum(
            (block @ w for block, w in zip(self._columns, self._weights, strict=True) if w.any()),
            np.zeros(len(sure)),
        )
        variances = _SPREADS[1:] ** 2
        spread = variances[:, None] + 1 / sure
        logs = -0.5 * (np.log(spread) + (seen - total) ** 2 / spread).sum(axis=1)
        variance = variances[self._choose(logs)]
        sharp = 1 / (variance + 1 / sure)
        shift = self._normal(sharp.sum(), (sharp * (seen - total)).sum())
        seen = seen - shift
        for k in self._blocks():
            columns = self._columns[k]
            total = total - columns @ self._weights[k]
            self._weights[k] = self._draw_weights(k, seen - total, sharp)
            total = total + columns @ self._weights[k]
        residuals = self._normal(sure + 1 / variance, sure * (seen - total))
        return total + residuals, float(shift)

    def _blocks(self) -> list[int]:
        """The knobs and as many pairs, for a study has more of those, in any order."""
        pairs = np.arange(self._num_knobs, len(self._columns))
        some = self._rng.permutation(pairs)[: self._num_knobs]
        return self._rng.permutation([*range(self._num_knobs), *some]).tolist()

    def _draw_weights(self, k: int, left: Array, sharp: Array) -> Array:
        """Coefficients of one block, whose spread is drawn with them integrated out."""
        columns = self._columns[k]
        lengths, axes = np.linalg.eigh((columns.T * sharp) @ columns)
        pull = axes.T @ (columns.T @ (sharp * left))
        variances, lengths = _SPREADS[:, None] ** 2, lengths.clip(0)
        given = variances / (1 + variances * lengths)
        logs = 0.5 * (given * pull**2 - np.log1p(variances * lengths)).sum(axis=1)
        chosen = given[self._choose(logs + self._chances[k])]
        return axes @ (chosen * pull + np.sqrt(chosen) * self._rng.normal(size=len(pull)))

    def _draw_levels(self, precision: Array) -> None:
        """The baselines, and how large differences are on each scene and rung."""
        rest = self._values - self._by_scene[:, :, None] - self._by_rung[:, None]
        worth = self._worth[:, None, None]
        left = (precision * (rest - worth * self._scale)).sum(axis=0)
        self._baseline = self._normal(precision.sum(axis=0) + 1e-9, left)
        left = (precision * worth * (rest - self._baseline)).sum(axis=0)
        sharp = (precision * worth**2).sum(axis=0)
        self._scale = self._normal(sharp + _SURE_OF_SCALE, left + _SURE_OF_SCALE * self._usual())

    def _usual(self) -> Array:
        """What the scales [s, r] are expected to be: the sum of a value of the scene, a priori
        N(1, 1), and one of the rung, N(0, 1/4)."""
        scenes, rungs = self._scale.shape
        left = _SURE_OF_SCALE * (self._scale - self._of_rung).sum(axis=1, keepdims=True)
        of_scene = self._normal(np.full((scenes, 1), 1 + _SURE_OF_SCALE * rungs), 1 + left)
        left = _SURE_OF_SCALE * (self._scale - of_scene).sum(axis=0)
        self._of_rung = self._normal(np.full(rungs, 4 + _SURE_OF_SCALE * scenes), left)
        return of_scene + self._of_rung

    def _normal(self, precision: Any, pull: Any) -> Any:
        """Gaussian draws with the mean `pull / precision`."""
        noise = self._rng.normal(size=np.shape(precision))
        return pull / precision + noise / np.sqrt(precision)

    def _choose(self, logs: Array) -> int:
        """An index, with chances proportional to exp(`logs`)."""
        chances = np.exp(logs - logs.max()).cumsum()
        return int(np.searchsorted(chances, self._rng.random() * chances[-1]))
