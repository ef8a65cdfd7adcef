"""What a search costs: recorded trainings replayed under the platform's search and under others.

    python benchmarks/search.py

`search_table.py` has recorded what random configurations reach. Here whole searches run against
that table in simulated time, with the state, racing and sampler that real searches run with; a
proposed configuration gets the row of its nearest recorded neighbour. `naive` trains both stages of
every scene for every configuration; all others train stage 1 once per scene.
"""

import gzip
import heapq
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import tyro
from provenance import provenance

from cbnerf.config import flatten
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import Choices, Sampler, Stopping, load_spec
from cbnerf.search.state import StudyState

TARGETS = (0.05, 0.02, 0.01)
"""dB below the best of the table that a search has to come within."""


class Method(NamedTuple):
    stopping: Stopping
    sampler: Sampler = "tpe"
    cached: bool = True
    """Stage 1 is trained once per scene instead of once per configuration and scene."""


METHODS = {
    "naive random": Method(Stopping(rule="none"), "random", cached=False),
    "naive TPE": Method(Stopping(rule="none"), cached=False),
    "cache + TPE": Method(Stopping(rule="none")),
    "cache + TPE + ASHA": Method(Stopping(rule="asha", grace_period=1)),
    "cache + TPE + Wilcoxon, p .10": Method(Stopping(rule="wilcoxon", threshold=0.1)),
    "cache + TPE + Wilcoxon, p .26": Method(Stopping(rule="wilcoxon", threshold=0.26)),
    "cache + TPE + race": Method(Stopping()),
    "cache + Sobol and TPE": Method(Stopping(rule="none"), "sobol-tpe"),
    "cache + Sobol and TPE + race of three rungs": Method(Stopping(grace_period=1), "sobol-tpe"),
    "cache + Sobol and TPE + race (ours)": Method(Stopping(), "sobol-tpe"),
}


@dataclass(kw_only=True)
class Options:
    table: Path = Path("benchmarks/results/search/table.json.gz")
    space: Path = Path("benchmarks/search_space.yaml")
    trials: int = 60
    """Configurations of a search."""
    repetitions: int = 30
    """Seeds of the sampler."""
    workers: tuple[int, ...] = (1, 8, 64)
    processes: int = 2
    output: Path = Path("benchmarks/results/search")
    """Receives replay.md and replay.json."""
    name: str = "replay"


class Table(NamedTuple):
    """Recorded trainings."""

    points: np.ndarray
    """[configurations, coordinates] in the unit cube of the space."""
    psnr: np.ndarray
    """[configurations, scenes, rungs, seeds] in dB."""
    ssim: np.ndarray
    seconds: np.ndarray
    """From the rung below."""
    straight: np.ndarray
    """[configurations, scenes]: seconds of a training that is not judged on its way."""
    field_seconds: np.ndarray
    """[scenes]."""
    scenes: tuple[str, ...]
    truth: np.ndarray
    """[configurations]: mean over scenes and seeds of the last rung."""


class Trace(NamedTuple):
    """One replayed search."""

    busy: list[float]
    """Worker seconds until the best so far is, and stays, within each target; inf if never."""
    wall: list[float]
    """The same on the clock."""
    total: float
    """Worker seconds of the whole search."""
    last_regret: float
    """In dB, of the configuration that it ends with."""
    regret_area: float
    """Mean regret in dB over the worker seconds of a naive search."""
    wrong_stops: float
    """Share of stopped configurations that lead the best finished one by more than the margin."""


def load_table(file: Path, plan: Plan) -> Table:
    content = json.loads(gzip.decompress(file.read_bytes()))
    defaults = flatten(plan.base)
    points = np.array([_coordinates(plan, defaults | c) for c in content["configurations"]])
    scenes = tuple(content["fields"])
    rows = content["rows"]
    seeds = 1 + max(row["seed"] for row in rows)
    shape = (len(points), len(scenes), len(rows[0]["rungs"]), seeds)
    arrays = {name: np.full(shape, np.nan) for name in ("val/psnr", "val/ssim", "seconds")}
    straight = np.full(shape[:2], np.nan)
    for row in rows:
        if "straight" in row:
            straight[row["configuration"], scenes.index(row["scene"])] = row["straight"]
        for name, array in arrays.items():
            place = (row["configuration"], scenes.index(row["scene"]), slice(None), row["seed"])
            array[place] = [rung[name] for rung in row["rungs"]]
    whole = ~np.isnan(arrays["val/psnr"]).any(axis=(1, 2, 3))
    psnr, ssim, seconds = (array[whole] for array in arrays.values())
    field_seconds = np.array([content["fields"][scene]["seconds"] for scene in scenes])
    truth = psnr[:, :, -1].mean(axis=(1, 2))
    return Table(points[whole], psnr, ssim, seconds, straight[whole], field_seconds, scenes, truth)


def _coordinates(plan: Plan, knobs: dict[str, Any]) -> np.ndarray:
    """A configuration in the unit cube; each choice has an axis of its own."""
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


def replay(options: Options, name: str, workers: int, repetition: int) -> Trace:
    """One search on the table in simulated time."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    method = METHODS[name]
    spec = load_spec(options.space)
    spec = replace(
        spec, stopping=method.stopping, trials=options.trials, seed=repetition,
        sampler=method.sampler,
    )  # fmt: skip
    plan = make_plan(
        spec, scenes="all", data=None, name="replay", storage=Path("replay"), has_gpu=False
    )
    table = load_table(options.table, plan)
    plan = replace(plan, scenes=table.scenes)
    # Without the preset, which lies within 0.02 dB of the best: nothing would be left to find.
    state = StudyState(plan, optuna.create_study(direction="maximize"))
    seed = repetition % table.psnr.shape[-1]
    first_rung = table.psnr.shape[2] - plan.rungs
    rows: dict[int, int] = {}
    busy = float(table.field_seconds.sum()) if method.cached else 0.0
    clock = busy / min(workers, len(table.scenes)) if method.cached else 0.0
    running: list[tuple[float, int, Any]] = []
    history: list[tuple[float, float, float]] = []
    wrong, count = 0, 0
    while not state.is_over:
        while len(running) < workers and (unit := state.next_unit()):
            row = rows.setdefault(unit.configuration, _nearest(plan, table, unit.overrides))
            scene = table.scenes.index(unit.scene)
            rungs = slice(unit.rung + first_rung if unit.rung else 0, unit.rung + first_rung + 1)
            seconds = float(
                table.straight[row, scene]
                if plan.rungs == 1
                else table.seconds[row, scene, rungs, seed].sum()
            )
            if not method.cached:
                seconds += float(table.field_seconds[scene])
            count += 1
            heapq.heappush(running, (clock + seconds, count, (unit, scene, seconds)))
        clock, _, (unit, scene, seconds) = heapq.heappop(running)
        busy += seconds
        row, rung = rows[unit.configuration], unit.rung + first_rung
        before = state.best()
        state.record(unit, {
            "val/psnr": table.psnr[row, scene, rung, seed],
            "val/ssim": table.ssim[row, scene, rung, seed],
            "seconds": seconds,
        })  # fmt: skip
        best = state.best()
        if unit.configuration in state.pruned and before is not None:
            ahead = table.truth[row] - table.truth[rows[before.number]]
            wrong += ahead > Stopping().margin
        if best is not None:
            regret = float(table.truth.max() - table.truth[rows[best.number]])
            history.append((busy, clock, regret))
    return _trace(history, busy, wrong / max(len(state.pruned), 1), table, options.trials)


def _trace(
    history: list[tuple[float, float, float]], busy: float, wrong: float, table: Table, trials: int
) -> Trace:
    at, clock, regret = map(np.array, zip(*history, strict=True))
    reached = [np.flatnonzero(np.append(regret > target, True)) for target in TARGETS]
    reached = [late[-2] + 1 if len(late) > 1 else 0 for late in reached]
    refiners = float(table.straight.mean()) * len(table.scenes)
    horizon = trials * (float(table.field_seconds.sum()) + refiners)  # of a naive search
    grid = np.linspace(0, horizon, 2000)
    worst = float(table.truth.max() - np.median(table.truth))
    index = np.searchsorted(at, grid, side="right") - 1
    curve = np.where(index >= 0, regret[index.clip(0)], worst)
    return Trace(
        [float(at[i]) if i < len(at) else np.inf for i in reached],
        [float(clock[i]) if i < len(at) else np.inf for i in reached],
        busy,
        float(regret[-1]),
        float(curve.mean()),
        float(wrong),
    )


def _nearest(plan: Plan, table: Table, overrides: dict[str, Any]) -> int:
    distance = table.points - _coordinates(plan, overrides)
    return int((distance**2).sum(axis=1).argmin())


def _job(job: tuple[Options, str, int, int]) -> Trace:
    return replay(*job)


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean with a 95 % bootstrap interval."""
    draws = rng.choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def main(options: Options) -> None:
    started = time.perf_counter()
    traces: dict[tuple[int, str], list[Trace]] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for workers in options.workers:
            for name in METHODS:
                jobs = [(options, name, workers, r) for r in range(options.repetitions)]
                traces[workers, name] = list(pool.map(_job, jobs))
                print(f"{workers} workers, {name}: done", flush=True)
    lines = list(_report(options, traces))
    print("\n".join(lines), f"\n{time.perf_counter() - started:.0f} s")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = [
        {"workers": workers, "method": name, **trace._asdict()}
        for (workers, name), found in traces.items()
        for trace in found
    ]
    (options.output / f"{options.name}.json").write_text(json.dumps(plain), encoding="utf-8")


def _report(options: Options, traces: dict[tuple[int, str], list[Trace]]) -> Iterator[str]:
    rng = np.random.default_rng(0)
    yield "# Searches replayed on recorded trainings\n"
    yield provenance(1)
    yield (
        f"{options.repetitions} repetitions of {options.trials} configurations, without the "
        "preset. *To D dB*: worker seconds, on average and with 95 % bootstrap intervals, until "
        "the best so far is, and stays, within D dB of the table's best; the whole search where "
        "that never comes. *less*: than naive TPE. *Wrong stops*: stopped, but truly ahead of the "
        "best finished one by more than the margin.\n"
    )
    goals = "".join(f"| to {target} dB | less " for target in TARGETS)
    for workers in options.workers:
        yield f"## {workers} workers\n"
        yield (
            f"| method {goals}| wall to {TARGETS[-1]} dB, median s | reached by | whole search "
            "| less | regret at its end, dB | mean regret, dB | wrong stops |"
        )
        yield "|---" * (2 * len(TARGETS) + 8) + "|"
        naive = traces[workers, "naive TPE"]
        for name in METHODS:
            found, cells = traces[workers, name], [name]
            for goal in range(len(TARGETS)):
                cost, low, high = interval(_to_target(found, goal), rng)
                cells += [
                    f"{cost:.0f} ({low:.0f} - {high:.0f})",
                    f"{_to_target(naive, goal).mean() / cost:.1f}x",
                ]
            walls = np.array([trace.wall[-1] for trace in found])
            total = np.mean([trace.total for trace in found])
            cells += [
                f"{np.median(walls):.0f}",
                f"{np.isfinite(walls).mean():.0%}",
                f"{total:.0f}",
                f"{np.mean([trace.total for trace in naive]) / total:.1f}x",
                f"{np.mean([trace.last_regret for trace in found]):.4f}",
                f"{np.mean([trace.regret_area for trace in found]):.4f}",
                f"{np.mean([trace.wrong_stops for trace in found]):.1%}",
            ]
            yield "| " + " | ".join(cells) + " |"
        yield ""


def _to_target(traces: list[Trace], goal: int) -> np.ndarray:
    return np.array([min(trace.busy[goal], trace.total) for trace in traces])


if __name__ == "__main__":
    main(tyro.cli(Options))
