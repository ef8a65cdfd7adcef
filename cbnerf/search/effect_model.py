"""The additive model of a study's units, from which the effects of its knobs are estimated.

It describes measured units, never what was imputed for pruned configurations:

    values[c, s, r] = baseline[s, r] + scale[s, r] (f_1(c) + ... + f_K(c) + products[c]
                      + residual[c]) + by_scene[c, s] + by_rung[c, r] + noise[c, s, r]

f_k is a smooth function of knob k (one value per category), or zero. The scales let configurations
differ more on some scenes and rungs than on others. Products of two knobs (a priori about one in a
study is not zero) prevent that an interaction is mistaken for an effect where the sampler has
searched only a part of the space; other interactions are part of the residual. Noise and deviations
follow Student's t because some trainings diverge. Units that the race did not train are missing at
random: the decision depended on measured units alone, so pruning does not bias the posterior.

A Gibbs sampler draws from the posterior. Names in this file:

    values[c, s, r]     quality of configuration c on scene s at rung r; NaN where not measured
    worth[c]            sum of all f, the products and the residual
    estimate[c]         the worth estimated from c's units alone, with the precision `certainty[c]`
    columns[k][c, p]    basis functions of knob or pair k at the configurations
    weights[k][p]       their coefficients, a priori N(0, spread^2)
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbnerf.search.spec import Choices, Range

Array = NDArray[np.floating]

_WAVES = 6
"""Number of cosines in the function of an ordered knob, beside a parabola: cosines are flat at both
ends. Cosine j has the prior deviation 1 / j, as in Brownian motion, which also allows steps."""
_GRID = 33
"""Points of a range at which its function is evaluated."""
_SPREADS = np.array([0.0, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
"""Possible prior deviations of a function, in deviations of the configurations."""
_EFFECT_PROBABILITY = 0.75
"""Prior probability that a knob has an effect."""
_DEGREES = 3.0
"""Degrees of freedom of Student's t."""
_SCALE_PRECISION = 8.0
"""Prior precision of a scale around the sum of a value of its scene and one of its rung."""


class Basis:
    """The basis functions of a knob, with mean zero over its levels."""

    def __init__(self, domain: Range | Choices):
        self._domain = domain
        if isinstance(domain, Range):
            ends = np.array([domain.low, domain.high], float)
            low, high = np.log(ends) if domain.log else ends
            grid = np.linspace(low, high, _GRID)
            self.levels: list[Any] = list(np.exp(grid) if domain.log else grid)
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
        """The first `num_leads` functions enter products with those of other knobs."""

    def at(self, values: Sequence[Any]) -> Array:
        """The basis functions [value, p]; the sum of their squares is 1 on average."""
        return (self._raw(values) - self._mean) / self._size

    def _raw(self, values: Sequence[Any]) -> Array:
        if not self._is_ordered:
            return np.array([[float(value == level) for level in self.levels] for value in values])
        positions = np.array([self._position(value) for value in values])
        waves = np.arange(1, _WAVES + 1)
        cosines = np.cos(np.pi * positions[:, None] * waves) / waves
        slope = 2 * positions - 1
        return np.column_stack([slope, slope**2, cosines])

    def _position(self, value: Any) -> float:
        """Position of a value in its range, or in the order of the choices, from 0 to 1."""
        domain = self._domain
        if isinstance(domain, Choices):
            return self.levels.index(value) / max(len(self.levels) - 1, 1)
        numbers = np.array([domain.low, domain.high, value], float)
        low, high, scaled = np.log(numbers) if domain.log else numbers
        return float((scaled - low) / (high - low))


class _StudentNoise:
    """Student's t as a scale mixture of Gaussians, with a scale for each index of the last axis."""

    def __init__(self, shape: tuple[int, ...], rng: np.random.Generator):
        self._rng, self._variance = rng, np.full(shape[-1], 0.01)
        self.precision = np.full(shape, 100.0)
        """Precision of each deviation."""

    def draw(self, deviations: Array, known: NDArray[np.bool_]) -> None:
        """Draw scales and precisions given the known deviations."""
        squares = np.where(known, deviations**2, 0.0)
        rates = (_DEGREES + squares / self._variance) / 2
        mixing = self._rng.gamma((_DEGREES + 1) / 2, 1 / rates)
        axes = tuple(range(deviations.ndim - 1))
        rate = (mixing * squares).sum(axis=axes) / 2 + 1e-3
        self._variance = rate / self._rng.gamma(known.sum(axis=axes) / 2 + 1.0)
        self.precision = mixing / self._variance


class AdditiveModel:
    """Gibbs sampler of the model's posterior, for values with a deviation of about 1."""

    def __init__(
        self, values: Array, knobs: list[Array], products: list[Array], rng: np.random.Generator
    ):
        self._known: NDArray[np.bool_] = ~np.isnan(values)
        self._rng, self._columns = rng, [*knobs, *products]
        self._num_knobs = len(knobs)
        has_effect = np.repeat(
            [_EFFECT_PROBABILITY, 1 / (1 + len(products))], [len(knobs), len(products)]
        )
        spreads = np.outer(has_effect, np.ones(len(_SPREADS) - 1)) / (len(_SPREADS) - 1)
        self._log_prior = np.log(np.column_stack([1 - has_effect, spreads]))
        """Of each spread of each block."""
        count, scenes, rungs = values.shape
        self._baseline = np.nan_to_num(np.nansum(values, axis=0) / self._known.sum(axis=0).clip(1))
        self._values = np.where(self._known, values, 0.0)
        self._weights: list[Array] = [np.zeros(block.shape[1]) for block in self._columns]
        self._scale, self._of_rung = np.ones((scenes, rungs)), np.zeros(rungs)
        self._worth = np.zeros(count)
        self._by_scene, self._by_rung = np.zeros((count, scenes)), np.zeros((count, rungs))
        self._noise = _StudentNoise(values.shape, rng)
        self._of_scenes, self._of_rungs = (
            _StudentNoise((count, scenes), rng),
            _StudentNoise((count, rungs), rng),
        )

    def sweep(self) -> tuple[list[Array], Array]:
        """Draw each parameter once given all others; returns the weights of each knob and the scale
        of each scene at the last rung."""
        precision = np.where(self._known, self._noise.precision, 0.0)
        self._draw_worth(precision)
        self._draw_levels(precision)
        rest = self._values - self._baseline - self._worth[:, None, None] * self._scale
        rest -= self._by_scene[:, :, None] + self._by_rung[:, None]
        self._noise.draw(rest, self._known)
        self._of_scenes.draw(self._by_scene, np.asarray(self._known.any(axis=2)))
        self._of_rungs.draw(self._by_rung, np.asarray(self._known.any(axis=1)))
        return self._weights[: self._num_knobs], self._scale[:, -1]

    def _draw_worth(self, precision: Array) -> None:
        """Draw the worths with the deviations integrated out, then the deviations.

        Integrating out the deviations by scene leaves precisions `left` [c, s, r, r]; with these,
        the deviations by rung have the precision `of_rungs` [c, r, r].
        """
        total = precision.sum(axis=2) + self._of_scenes.precision
        left = -np.einsum("csr,csq->csrq", precision, precision / total[:, :, None])
        left += precision[..., None] * np.eye(len(self._by_rung[0]))
        rest = self._values - self._baseline
        of_scale = np.einsum("csrq,sq->csr", left, self._scale)
        of_rest = np.einsum("csrq,csq->csr", left, rest)
        prior = self._of_rungs.precision
        prior[:, -1] = 1e9  # At the last rung a deviation is part of the residual.
        of_rungs = left.sum(axis=1) + prior[..., None] * np.eye(prior.shape[1])
        sides = np.stack([of_scale.sum(axis=1), of_rest.sum(axis=1)], axis=2)
        solved = np.linalg.solve(of_rungs, sides)
        certainty = (of_scale * self._scale).sum(axis=(1, 2)) + 1e-9
        certainty -= (sides[..., 0] * solved[..., 0]).sum(axis=1)
        pull = (of_rest * self._scale).sum(axis=(1, 2))
        pull -= (sides[..., 0] * solved[..., 1]).sum(axis=1)
        self._worth, shift = self._draw_functions(pull / certainty, certainty)
        self._baseline = self._baseline + shift * self._scale

        spread = np.linalg.inv(np.linalg.cholesky(of_rungs)).swapaxes(1, 2)
        worth = (self._worth + shift)[:, None]
        self._by_rung = solved[..., 1] - worth * solved[..., 0]
        self._by_rung += (spread @ self._rng.normal(size=(*prior.shape, 1)))[..., 0]
        rest = rest - worth[..., None] * self._scale - self._by_rung[:, None]
        self._by_scene = self._normal(total, (precision * rest).sum(axis=2))

    def _draw_functions(self, estimate: Array, certainty: Array) -> tuple[Array, float]:
        """Draw the functions of knobs and pairs and the variance of the residuals, with the
        residuals integrated out, then the residuals; returns the worths and a shift of all."""
        total = sum(
            (block @ w for block, w in zip(self._columns, self._weights, strict=True) if w.any()),
            np.zeros(len(certainty)),
        )
        variances = _SPREADS[1:] ** 2
        spread = variances[:, None] + 1 / certainty
        logs = -0.5 * (np.log(spread) + (estimate - total) ** 2 / spread).sum(axis=1)
        variance = variances[self._choose(logs)]
        sharp = 1 / (variance + 1 / certainty)
        shift = self._normal(sharp.sum(), (sharp * (estimate - total)).sum())
        estimate = estimate - shift
        for k in self._blocks():
            columns = self._columns[k]
            total = total - columns @ self._weights[k]
            self._weights[k] = self._draw_weights(k, estimate - total, sharp)
            total = total + columns @ self._weights[k]
        residuals = self._normal(certainty + 1 / variance, certainty * (estimate - total))
        return total + residuals, float(shift)

    def _blocks(self) -> list[int]:
        """All knobs and as many random pairs, of which there are more, in random order."""
        pairs = np.arange(self._num_knobs, len(self._columns))
        chosen = self._rng.permutation(pairs)[: self._num_knobs]
        return self._rng.permutation([*range(self._num_knobs), *chosen]).tolist()

    def _draw_weights(self, k: int, left: Array, sharp: Array) -> Array:
        """Draw the spread of one block with its coefficients integrated out, then these."""
        columns = self._columns[k]
        eigenvalues, axes = np.linalg.eigh((columns.T * sharp) @ columns)
        pull = axes.T @ (columns.T @ (sharp * left))
        variances, eigenvalues = _SPREADS[:, None] ** 2, eigenvalues.clip(0)
        posterior = variances / (1 + variances * eigenvalues)
        logs = 0.5 * (posterior * pull**2 - np.log1p(variances * eigenvalues)).sum(axis=1)
        chosen = posterior[self._choose(logs + self._log_prior[k])]
        return axes @ (chosen * pull + np.sqrt(chosen) * self._rng.normal(size=len(pull)))

    def _draw_levels(self, precision: Array) -> None:
        """Draw the baselines and the scales."""
        rest = self._values - self._by_scene[:, :, None] - self._by_rung[:, None]
        worth = self._worth[:, None, None]
        left = (precision * (rest - worth * self._scale)).sum(axis=0)
        self._baseline = self._normal(precision.sum(axis=0) + 1e-9, left)
        left = (precision * worth * (rest - self._baseline)).sum(axis=0)
        sharp = (precision * worth**2).sum(axis=0)
        self._scale = self._normal(
            sharp + _SCALE_PRECISION, left + _SCALE_PRECISION * self._expected_scales()
        )

    def _expected_scales(self) -> Array:
        """Draw the prior means [s, r] of the scales: the sum of a value of the scene, a priori
        N(1, 1), and one of the rung, N(0, 1/4)."""
        scenes, rungs = self._scale.shape
        left = _SCALE_PRECISION * (self._scale - self._of_rung).sum(axis=1, keepdims=True)
        of_scene = self._normal(np.full((scenes, 1), 1 + _SCALE_PRECISION * rungs), 1 + left)
        left = _SCALE_PRECISION * (self._scale - of_scene).sum(axis=0)
        self._of_rung = self._normal(np.full(rungs, 4 + _SCALE_PRECISION * scenes), left)
        return of_scene + self._of_rung

    def _normal(self, precision: Any, pull: Any) -> Any:
        """Gaussian draws with the mean `pull / precision`."""
        noise = self._rng.normal(size=np.shape(precision))
        return pull / precision + noise / np.sqrt(precision)

    def _choose(self, logs: Array) -> int:
        """A random index, with probabilities proportional to exp(`logs`)."""
        cumulative = np.exp(logs - logs.max()).cumsum()
        return int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1]))
