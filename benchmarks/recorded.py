"""Recorded trainings (`search_table.py`), and what they predict for any configuration.

The forest is a surrogate benchmark (Eggensperger et al., "Efficient benchmarking of hyperparameter
optimizers via surrogates", AAAI 2015): searches see its predictions and the noise of recorded
seeds in place of trainings.
"""

import gzip
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr
from sklearn.ensemble import RandomForestRegressor

from cbnerf.config import flatten
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import Choices, SearchSpec

TABLE = Path("benchmarks/results/search/table.json.gz")
SPACE = Path("tune_configs/codebook.yaml")
RESOLUTION = "x2-128"
"""At which a CPU trains a configuration in seconds."""


class Table(NamedTuple):
    """Recorded trainings."""

    points: np.ndarray
    """[configurations, coordinates] in the unit cube of the space."""
    psnr: np.ndarray
    """[configurations, scenes, rungs, seeds]: validation PSNR in dB."""
    seconds: np.ndarray
    """The same shape: CPU seconds from the rung below."""
    straight: float
    """Seconds of a training that is not judged on its way, as a share of those of all rungs."""
    field_seconds: np.ndarray
    """[scenes]: CPU seconds of stage 1."""
    scenes: tuple[str, ...]


class Outcome(NamedTuple):
    """What training a configuration gives."""

    psnr: np.ndarray
    """[scenes, rungs] in dB."""
    seconds: np.ndarray
    """[scenes, rungs]: CPU seconds from the rung below."""
    straight: np.ndarray
    """[scenes]: CPU seconds of a training that is not judged on its way."""
    truth: float
    """Mean over scenes of the last rung, without noise."""


def plan_of(spec: SearchSpec) -> Plan:
    """The plan of a search at the recorded resolution, of the recorded scenes."""
    spec = replace(spec, resolution=RESOLUTION)
    return make_plan(
        spec, scenes="all", data=None, name="replay", storage=Path("replay"), has_gpu=False
    )


def load_table(file: Path, plan: Plan) -> Table:
    content = json.loads(gzip.decompress(file.read_bytes()))
    points = np.array([coordinates(plan, knobs) for knobs in content["configurations"]])
    scenes = tuple(content["fields"])
    rows = content["rows"]
    shape = (len(points), len(scenes), len(rows[0]["rungs"]), 1 + max(row["seed"] for row in rows))
    psnr, seconds = np.full(shape, np.nan), np.full(shape, np.nan)
    for row in rows:
        place = (row["configuration"], scenes.index(row["scene"]), slice(None), row["seed"])
        psnr[place] = [rung["val/psnr"] for rung in row["rungs"]]
        seconds[place] = [rung["seconds"] for rung in row["rungs"]]
    both = [row for row in rows if "straight" in row]
    in_rungs = sum(rung["seconds"] for row in both for rung in row["rungs"])
    straight = sum(row["straight"] for row in both) / in_rungs
    field_seconds = np.array([content["fields"][scene]["seconds"] for scene in scenes])
    return Table(points, psnr, seconds, straight, field_seconds, scenes)


def coordinates(plan: Plan, overrides: dict[str, Any]) -> np.ndarray:
    """A configuration in the unit cube; each word of a choice has an axis of its own."""
    knobs = flatten(plan.base) | overrides
    parts: list[float] = []
    for name, domain in plan.spec.space.items():
        value = knobs[name]
        if isinstance(domain, Choices) and not isinstance(value, str):
            order = sorted(domain.choices)
            parts.append(order.index(value) / (len(order) - 1))
        elif isinstance(domain, Choices):
            parts += [0.5 * (value == choice) for choice in domain.choices]
        else:
            ends = np.array([domain.low, domain.high, value], float)
            low, high, here = np.log(ends) if domain.log else ends
            parts.append((here - low) / (high - low))
    return np.array(parts)


class Surrogate:
    """Predicts from recorded trainings what any configuration of their space reaches."""

    def __init__(self, plan: Plan, table: Table):
        self._plan = plan
        self.table = table
        self._psnr = _forest(table.points, table.psnr.mean(axis=3))
        self._seconds = _forest(table.points, np.log(table.seconds.mean(axis=3)))
        deviations = (table.psnr[..., 0] - table.psnr[..., 1]) / np.sqrt(2)
        self._noise_of_all = deviations.mean(axis=0)
        self._noise = deviations - self._noise_of_all

    def train(self, overrides: dict[str, Any], seed: int, number: int) -> Outcome:
        """Train configuration `number` of a search with this seed."""
        shape = self.table.psnr.shape[1:3]
        point = coordinates(self._plan, overrides)[None]
        psnr = self._psnr.predict(point).reshape(shape)
        seconds = np.exp(self._seconds.predict(point).reshape(shape))
        # Signed deviations between recorded seeds, of one configuration on all scenes and rungs.
        rng = np.random.default_rng((seed, number))
        row = rng.integers(len(self._noise))
        noise = self._noise_of_all * (1 - 2 * (seed % 2)) + self._noise[row] * rng.choice([-1, 1])
        straight = seconds.sum(axis=1) * self.table.straight
        return Outcome(psnr + noise, seconds, straight, float(psnr[:, -1].mean()))

    @cached_property
    def best(self) -> float:
        """The highest `truth` that hill climbing finds from many random points, in dB."""
        rng = np.random.default_rng(0)
        knobs = self._draw(20_000, rng)
        for _ in range(30):
            top = np.argsort(-self._truths(knobs))[:30].repeat(30)
            parents = [values[top] for values in knobs]
            # Two knobs of a child change, on average; of the first of 30 none does.
            moves = rng.random((len(knobs), len(top), 1)) < 2 / len(knobs)
            moves[:, ::30] = False
            drawn = self._draw(len(top), rng)
            knobs = [np.where(*blocks) for blocks in zip(moves, drawn, parents, strict=True)]
        return float(self._truths(knobs).max())

    @property
    def quality(self) -> tuple[float, float]:
        """R2 and rank correlation of means over scenes, each predicted without its configuration:
        by the trees that have not seen it."""
        measured = self.table.psnr[:, :, -1].mean(axis=(1, 2))
        predicted = self._mean(self._psnr.oob_prediction_)
        unexplained = ((measured - predicted) ** 2).mean() / measured.var()
        return 1 - float(unexplained), float(np.asarray(spearmanr(measured, predicted))[0])

    def _draw(self, count: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Random coordinates [count, axes of the knob] of each knob."""
        blocks = []
        for domain in self._plan.spec.space.values():
            if not isinstance(domain, Choices):
                blocks.append(rng.random((count, 1)))
                continue
            drawn, last = rng.integers(len(domain.choices), size=count), len(domain.choices) - 1
            is_word = isinstance(domain.choices[0], str)
            blocks.append(0.5 * np.eye(last + 1)[drawn] if is_word else drawn[:, None] / last)
        return blocks

    def _truths(self, knobs: list[np.ndarray]) -> np.ndarray:
        return self._mean(self._psnr.predict(np.hstack(knobs)))

    def _mean(self, psnr: np.ndarray) -> np.ndarray:
        """Mean over scenes of the last rung."""
        return psnr.reshape(-1, *self.table.psnr.shape[1:3])[:, :, -1].mean(axis=1)


def _forest(points: np.ndarray, values: np.ndarray) -> RandomForestRegressor:
    """Fitted to values [configurations, scenes, rungs]."""
    forest = RandomForestRegressor(100, max_features=0.5, oob_score=True, random_state=0)
    return forest.fit(points, values.reshape(len(values), -1))
