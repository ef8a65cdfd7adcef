"""What a search costs: recorded trainings replayed under the platform's search and under others.

    python benchmarks/search.py

`search_table.py` has recorded what random configurations reach. Here whole searches run against
that table in simulated time, with the state, racing and sampler that real searches run with; a
proposed configuration gets the row of its nearest recorded neighbour. `naive` trains both stages of
every scene for every configuration; all others train stage 1 once per scene. `rivals.py` has the
searches by Optuna and by Ray's ASHA, in which a worker trains whole configurations.
"""

import gzip
import heapq
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import optuna
import tyro
from optuna.trial import TrialState
from provenance import provenance
from rivals import RIVALS, Rival

from cbnerf.config import flatten
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.sampler import suggest
from cbnerf.search.spec import Choices, Sampler, Stopping, load_spec
from cbnerf.search.state import StudyState

TARGETS = (0.05, 0.02, 0.01)
"""dB below the best of the table that a search has to come within."""


class Ours(NamedTuple):
    """A search by this platform."""

    sampler: Sampler
    stopping: Stopping


NAIVE = "naive TPE"
OURS: dict[str, Ours] = {
    "Sobol and TPE": Ours("sobol-tpe", Stopping(rule="none")),
    "TPE + race": Ours("tpe", Stopping()),
    "Sobol and TPE + race of three rungs": Ours("sobol-tpe", Stopping(grace_period=1)),
    "Sobol and TPE + race (ours)": Ours("sobol-tpe", Stopping()),
}
METHODS = (NAIVE, *RIVALS, *OURS)


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


class Replay:
    """What searches by any method on the table have in common: costs, clock and regret."""

    def __init__(self, table: Table, workers: int, *, with_fields: bool):
        """`with_fields`: stage 1 is trained once per scene, before the first configuration."""
        self.table = table
        self.workers = workers
        self.busy = float(table.field_seconds.sum()) if with_fields else 0.0
        self.clock = self.busy / min(workers, len(table.scenes))
        self.rows: dict[int, int] = {}
        """Row of the table by number of a configuration."""
        self.history: list[tuple[float, float, float]] = []
        self._running: list[tuple[float, int, Any, float]] = []
        self._count = 0
        self._num_pruned = 0
        self._wrong = 0

    @property
    def has_idle(self) -> bool:
        return len(self._running) < self.workers

    def start(self, work: Any, seconds: float) -> None:
        self._count += 1
        heapq.heappush(self._running, (self.clock + seconds, self._count, work, seconds))

    def finish_next(self) -> Any:
        """Advance the clock to the end of the next training and return its work."""
        self.clock, _, work, seconds = heapq.heappop(self._running)
        self.busy += seconds
        return work

    def note_pruned(self, number: int, best: int | None) -> None:
        self._num_pruned += 1
        if best is not None:
            ahead = self.table.truth[self.rows[number]] - self.table.truth[self.rows[best]]
            self._wrong += bool(ahead > Stopping().margin)

    def note_best(self, best: int | None) -> None:
        if best is not None:
            regret = float(self.table.truth.max() - self.table.truth[self.rows[best]])
            self.history.append((self.busy, self.clock, regret))

    def trace(self, trials: int) -> Trace:
        wrong = self._wrong / max(self._num_pruned, 1)
        return _trace(self.history, self.busy, wrong, self.table, trials)


def replay(options: Options, name: str, workers: int, repetition: int) -> Trace:
    """One search on the table in simulated time."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spec = replace(load_spec(options.space), trials=options.trials, seed=repetition)
    if name in OURS:
        spec = replace(spec, stopping=OURS[name].stopping, sampler=OURS[name].sampler)
    plan = make_plan(
        spec, scenes="all", data=None, name="replay", storage=Path("replay"), has_gpu=False
    )
    table = load_table(options.table, plan)
    plan = replace(plan, scenes=table.scenes)
    run = Replay(table, workers, with_fields=name != NAIVE)
    seed = repetition % table.psnr.shape[-1]
    if name in OURS:
        _run_ours(run, plan, seed)
    else:
        _run_rival(run, plan, RIVALS["TPE" if name == NAIVE else name], seed, name == NAIVE)
    return run.trace(options.trials)


def _run_ours(run: Replay, plan: Plan, seed: int) -> None:
    # Without the preset, which lies within 0.02 dB of the best: nothing would be left to find.
    state = StudyState(plan, optuna.create_study(direction="maximize"))
    table = run.table
    first_rung = table.psnr.shape[2] - plan.rungs
    while not state.is_over:
        while run.has_idle and (unit := state.next_unit()):
            row = run.rows.setdefault(unit.configuration, _nearest(plan, table, unit.overrides))
            scene = table.scenes.index(unit.scene)
            rungs = slice(unit.rung + first_rung if unit.rung else 0, unit.rung + first_rung + 1)
            if plan.rungs == 1:
                seconds = float(table.straight[row, scene])
            else:
                seconds = float(table.seconds[row, scene, rungs, seed].sum())
            run.start((unit, row, scene, seconds), seconds)
        unit, row, scene, seconds = run.finish_next()
        rung = unit.rung + first_rung
        before = state.best()
        metrics = {
            "val/psnr": table.psnr[row, scene, rung, seed],
            "val/ssim": table.ssim[row, scene, rung, seed],
            "seconds": seconds,
        }
        state.record(unit, metrics)
        if unit.configuration in state.pruned:
            run.note_pruned(unit.configuration, before.number if before else None)
        best = state.best()
        run.note_best(best.number if best else None)


def _run_rival(run: Replay, plan: Plan, rival: Rival, seed: int, naive: bool) -> None:
    """Workers train whole configurations, scene by scene, until the rule prunes them."""
    table, num_scenes = run.table, len(run.table.scenes)
    rule = rival.rule(num_scenes)
    sampler = rival.sampler(plan.spec.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=rule.pruner)
    best: tuple[float, int] | None = None

    def start(trial: optuna.Trial, values: list[float]) -> None:
        row, scene = run.rows[trial.number], len(values)
        extra = float(table.field_seconds[scene]) if naive else 0.0
        run.start((trial, values), float(table.straight[row, scene]) + extra)

    num_asked = num_ended = 0
    while num_ended < plan.spec.trials:
        while run.has_idle and num_asked < plan.spec.trials:
            trial = study.ask()
            num_asked += 1
            run.rows[trial.number] = _nearest(plan, table, suggest(trial, plan))
            start(trial, [])
        trial, values = run.finish_next()
        values.append(float(table.psnr[run.rows[trial.number], len(values), -1, seed]))
        is_kept = rule.keeps(trial, values)
        if len(values) == num_scenes:
            value = fmean(values)
            study.tell(trial, value)
            best = max(best or (value, trial.number), (value, trial.number))
        elif is_kept:
            start(trial, values)
            continue
        else:
            study.tell(trial, state=TrialState.PRUNED)
            run.note_pruned(trial.number, best[1] if best else None)
        num_ended += 1
        run.note_best(best[1] if best else None)


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
        naive = traces[workers, NAIVE]
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
