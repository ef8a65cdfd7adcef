"""What a search costs: recorded trainings replayed under the platform's search and under others.

    python benchmarks/search.py

`search_table.py` has recorded what random configurations reach. Here whole searches run in
simulated time (`replay.py`) on what these recordings predict (`recorded.py`). `naive` trains both
stages of every scene for every configuration; all others train stage 1 once per scene. `rivals.py`
has the searches by Optuna and by Ray's ASHA, in which a worker trains whole configurations.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optuna
import tyro
from provenance import provenance
from recorded import SPACE, TABLE, Surrogate, load_table, plan_of
from replay import TARGETS, Replay, Trace, run_ours, run_rival
from rivals import RIVALS

from cbnerf.search.plan import Plan
from cbnerf.search.spec import Sampler, Stopping, load_spec


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


@dataclass(frozen=True, kw_only=True)
class Options:
    table: Path = TABLE
    trials: int = 60
    """Configurations of a search."""
    repetitions: int = 30
    """Seeds of the sampler."""
    workers: tuple[int, ...] = (1, 8, 64)
    processes: int = 2
    output: Path = Path("benchmarks/results/search")
    """Receives replay.md and replay.json."""
    name: str = "replay"


@cache
def _surrogate(options: Options) -> tuple[Plan, Surrogate]:
    plan = plan_of(replace(load_spec(SPACE), trials=options.trials))
    return plan, Surrogate(plan, load_table(options.table, plan))


def _search(options: Options, name: str, workers: int, repetition: int) -> Trace:
    """One search in simulated time."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    plan, surrogate = _surrogate(options)
    run = Replay(surrogate, workers, repetition, with_fields=name != NAIVE)
    spec = replace(plan.spec, seed=repetition)
    if name in OURS:
        spec = replace(spec, stopping=OURS[name].stopping, sampler=OURS[name].sampler)
        return run_ours(run, replace(plan, spec=spec))
    rival = RIVALS["TPE" if name == NAIVE else name]
    return run_rival(run, replace(plan, spec=spec), rival, is_naive=name == NAIVE)


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
                each = (repeat(options), repeat(name), repeat(workers), range(options.repetitions))
                traces[workers, name] = list(pool.map(_search, *each))
                seconds = time.perf_counter() - started
                print(f"{workers} workers, {name}: done at {seconds:.0f} s", flush=True)
    lines = list(_report(options, traces))
    print("\n".join(lines))
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
    plan, surrogate = _surrogate(options)
    table = surrogate.table
    explained, correlation = surrogate.quality
    yield (
        f"{len(table.points)} configurations were recorded; for one that it has not seen the "
        f"surrogate explains {explained:.0%} of the variance of the mean over scenes, with a rank "
        f"correlation of {correlation:.2f}. Best configuration of the space: {surrogate.best:.2f} "
        f"dB; that of the middle rank: {np.median(table.psnr[:, :, -1].mean(axis=(1, 2))):.2f} dB. "
        f"Space: {SPACE}, {len(plan.spec.space)} knobs.\n"
    )
    yield (
        f"{options.repetitions} repetitions of {options.trials} configurations, without the "
        "preset. *To D dB*: worker seconds, on average and with 95 % bootstrap intervals, until "
        "the best so far is, and stays, within D dB of that best; the whole search where "
        "that never comes. *less*: than naive TPE. *Wrong stops*: stopped, but truly ahead of the "
        "best finished one by more than the margin.\n"
    )
    goals = "".join(f"| to {target} dB | less " for target in TARGETS)
    for workers in options.workers:
        yield f"## {workers} workers\n"
        yield (
            f"| method {goals}| wall to {TARGETS[-1]} dB, median s | reached by | whole search "
            "| less | regret at its end, dB | wrong stops |"
        )
        yield "|---" * (2 * len(TARGETS) + 7) + "|"
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
                f"{np.mean([trace.last_regret for trace in found]):.3f}",
                f"{np.mean([trace.wrong_stops for trace in found]):.1%}",
            ]
            yield "| " + " | ".join(cells) + " |"
        yield ""


def _to_target(traces: list[Trace], goal: int) -> np.ndarray:
    return np.array([min(trace.busy[goal], trace.total) for trace in traces])


if __name__ == "__main__":
    main(tyro.cli(Options))
