"""How far the effects that a report names can be trusted: studies whose effects are known.

    python benchmarks/effects.py

Synthetic studies over the space of the recorded trainings, with the platform's sampler and race.
What a configuration is worth is made up; how scenes, rungs and seeds differ from that is drawn from
the recorded trainings (`search_table.py`), in proportion to the effects. Two generators: `smooth`
adds up monotone or bent functions of the knobs; `rough` has steps, narrow valleys and products of
two knobs. The true effect of a knob is the highest minus the lowest mean over all other knobs.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import tyro
from optuna.importance import (
    FanovaImportanceEvaluator,
    PedAnovaImportanceEvaluator,
    get_param_importances,
)  # fmt: skip
from provenance import provenance
from recorded import SPACE, TABLE, Table, load_table, plan_of

from cbnerf.search.effects import Effect, study_effects
from cbnerf.search.plan import Plan
from cbnerf.search.spec import Choices, Stopping, load_spec
from cbnerf.search.state import StudyState

_POINTS = 41
"""Of the grid on which functions of a knob are given."""


@dataclass(kw_only=True)
class Options:
    table: Path = TABLE
    sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Configurations of a study."""
    studies: int = 12
    """Of each size and generator."""
    output: Path = Path("benchmarks/results/search/effects.md")


class World(NamedTuple):
    """What configurations are worth, in dB."""

    functions: dict[str, np.ndarray]
    """Main effect of each knob: on a grid over its range, or by choice; mean zero."""
    products: list[tuple[str, str, float]]
    """Pairs of knobs and the sizes of their interactions, which have no main effects."""

    def effect(self, knob: str) -> float:
        return float(np.ptp(self.functions[knob]))


class Outcome(NamedTuple):
    """One study: what is true and what is said."""

    truth: dict[str, float]
    effects: list[Effect]
    firsts: dict[str, str]
    """The knob that each rival ranks first."""
    num_pruned: int


def smooth(count: int, rng: np.random.Generator) -> np.ndarray:
    """A monotone or bent function on `count` points."""
    t = np.linspace(0, 1, count)
    shapes = (t, t**2, np.sqrt(t), 1 - (t - rng.uniform(0.2, 0.8)) ** 2, np.tanh(4 * t - 2))
    return shapes[rng.integers(len(shapes))] * rng.choice([-1, 1])


def rough(count: int, rng: np.random.Generator) -> np.ndarray:
    """A step, or a valley of a fifth of the range."""
    t, edge = np.linspace(0, 1, count), rng.uniform(0.2, 0.8)
    step = (t > edge) * rng.choice([-1.0, 1.0])
    return step if rng.random() < 0.6 else -np.exp(-(((t - edge) / 0.1) ** 2))


GENERATORS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "smooth": smooth,
    "rough": rough,
}


def make_world(plan: Plan, generator: str, rng: np.random.Generator) -> World:
    """A third of the knobs, one at least, have effects between .03 and 1 dB."""
    functions = {}
    sizes = np.exp(rng.uniform(np.log(0.03), 0, len(plan.spec.space)))
    acts = rng.random(len(sizes)) < 1 / 3
    acts[rng.integers(len(sizes))] = True
    for (name, domain), size, has_effect in zip(plan.spec.space.items(), sizes, acts, strict=True):
        count = len(domain.choices) if isinstance(domain, Choices) else _POINTS
        # A category has as many levels as choices, in any order.
        is_word = isinstance(domain, Choices) and isinstance(domain.choices[0], str)
        shape = rng.permutation(count) if is_word else GENERATORS[generator](count, rng)
        if np.ptp(shape) == 0:  # The step lies between two choices.
            shape = np.arange(count)
        function = size * has_effect * shape / np.ptp(shape)
        functions[name] = function - function.mean()
    ordered = [name for name in functions if len(functions[name]) == _POINTS]
    rng.shuffle(ordered)
    pairs = list(pairwise(ordered))[::2][:2] if generator == "rough" else []
    return World(functions, [(a, b, sizes.max() / 3) for a, b in pairs])


def worth(plan: Plan, world: World, knobs: dict[str, Any]) -> float:
    """What a configuration is worth after a full training."""
    places = {name: _place(plan, name, knobs[name]) for name in world.functions}
    total = 0.0
    for name, function in world.functions.items():
        total += float(
            np.interp(places[name] * (len(function) - 1), range(len(function)), function)
        )
    return total + sum(
        size * (2 * places[a] - 1) * (2 * places[b] - 1) for a, b, size in world.products
    )


def _place(plan: Plan, name: str, value: Any) -> float:
    """From 0 to 1 over the range, or over the list of choices."""
    domain = plan.spec.space[name]
    if isinstance(domain, Choices):
        return domain.choices.index(value) / (len(domain.choices) - 1)
    low, high, here = np.log([domain.low, domain.high, value])
    return float((here - low) / (high - low))


class Noise:
    """Deviations of recorded units from what their configuration is worth."""

    def __init__(self, table: Table):
        psnr = table.psnr - table.psnr.mean(axis=0)
        mean = psnr.mean(axis=3)
        overall = mean.mean(axis=1)
        self.spread = float(overall[:, -1].std())
        self.scales = np.tensordot(overall[:, -1], mean, 1) / (overall[:, -1] ** 2).sum()
        """[scenes, rungs]: how large differences are there; 1 on average at the last rung."""
        self._of_units = mean - overall[:, -1, None, None] * self.scales
        self._of_seeds = (psnr[..., 0] - psnr[..., 1]) / np.sqrt(2)

    def draw(self, size: float, rng: np.random.Generator) -> np.ndarray:
        """[scenes, rungs] of a configuration; interactions in proportion to `size` in dB."""
        rows = rng.integers(len(self._of_units), size=2)
        return self._of_units[rows[0]] * size / self.spread + self._of_seeds[rows[1]]


def run_study(plan: Plan, generator: str, noise: Noise, seed: int) -> Outcome:
    rng = np.random.default_rng(seed)
    world = make_world(plan, generator, rng)
    state = StudyState(plan, optuna.create_study(direction="maximize"))
    drawn: dict[int, np.ndarray] = {}
    sizes = np.array([function.std() for function in world.functions.values()])
    size = float(np.sqrt((sizes**2).sum()))
    while unit := state.next_unit():
        if (number := unit.configuration) not in drawn:
            value = worth(plan, world, unit.overrides)
            drawn[number] = 25 + value * noise.scales + noise.draw(size, rng)
        psnr = float(drawn[number][plan.scenes.index(unit.scene), unit.rung])
        state.record(unit, {"val/psnr": psnr, "val/ssim": 0.5, "seconds": 1.0})
    truth = {name: world.effect(name) for name in plan.spec.space}
    firsts = {}
    for name, evaluator in {
        "PED-ANOVA": PedAnovaImportanceEvaluator(),
        "fANOVA": FanovaImportanceEvaluator(seed=0),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PED-ANOVA warns that it minimises.
            shares = get_param_importances(
                state.study, evaluator=evaluator, target=lambda trial: -trial.values[0]
            )
        firsts[name] = max(shares, key=lambda knob: shares[knob])
    return Outcome(truth, study_effects(state), firsts, len(state.pruned))


def main(options: Options) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    started = time.perf_counter()
    spec = replace(load_spec(SPACE), stopping=Stopping(grace_period=1))
    plan = plan_of(spec)
    spec, noise = plan.spec, Noise(load_table(options.table, plan))
    lines = ["# Effects of knobs in studies where they are known\n", provenance(1), _ABOUT]
    for generator in GENERATORS:
        lines += [f"## {generator}\n", *_HEADER]
        for size in options.sizes:
            outcomes = []
            for seed in range(options.studies):
                spec = replace(spec, trials=size, seed=seed)
                outcomes.append(run_study(replace(plan, spec=spec), generator, noise, seed))
            lines.append("| " + " | ".join(_cells(size, outcomes)) + " |")
            print(generator, lines[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
        lines.append("")
    options.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


_ABOUT = (
    "*Holds*: the 95 % interval holds the true effect, of all knobs, of those without an effect, "
    "of those with one, and of those with one that is seen. *Seen*: the interval does not hold "
    "zero. *First*: the knob with the largest effect is ranked first.\n"
)
_HEADER = (
    "| configurations | pruned | holds | without effect | with effect | seen ones | seen, without "
    "effect | with effect | with one above .1 dB | median width, dB | first: ours | PED-ANOVA "
    "| fANOVA |",
    "|---" * 13 + "|",
)


def _cells(size: int, outcomes: list[Outcome]) -> Iterator[str]:
    pairs = [(outcome.truth[e.knob], e) for outcome in outcomes for e in outcome.effects]
    none = [(t, e) for t, e in pairs if t == 0]
    real = [(t, e) for t, e in pairs if t > 0]
    yield str(size)
    yield f"{np.mean([outcome.num_pruned for outcome in outcomes]) / size:.0%}"
    for group in (pairs, none, real, [(t, e) for t, e in real if e.is_seen]):
        yield _share([e.low <= t <= e.high for t, e in group])
    for group in (none, real, [(t, e) for t, e in real if t > 0.1]):
        yield _share([e.is_seen for _, e in group])
    yield f"{np.median([e.high - e.low for _, e in pairs]):.2f}"
    firsts = [max(outcome.truth, key=lambda k, o=outcome: o.truth[k]) for outcome in outcomes]
    yield _share([o.effects[0].knob == f for o, f in zip(outcomes, firsts, strict=True)])
    for rival in ("PED-ANOVA", "fANOVA"):
        yield _share([o.firsts[rival] == f for o, f in zip(outcomes, firsts, strict=True)])


def _share(hits: list[bool]) -> str:
    return f"{np.mean(hits):.0%}" if hits else "-"


if __name__ == "__main__":
    main(tyro.cli(Options))
