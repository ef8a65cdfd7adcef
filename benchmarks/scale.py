"""How far one driver reaches: a search on simulated workers, with everything else real.

    python benchmarks/scale.py                                     # without MLflow
    python benchmarks/scale.py --tracking sqlite
    python benchmarks/scale.py --tracking http://127.0.0.1:5000    # a server, on any database

Trials do not train: each comes back after a simulated time with a value that its knobs decide.
What stands between them is what a study on a cluster runs with: the searcher that Tune asks, the
state with Optuna's journal on disk, the race, the diary and MLflow's runs.
"""

import heapq
import math
import os
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import imageio.v3 as iio
import numpy as np
import optuna
import tyro
from provenance import provenance
from tqdm import tqdm

from cbnerf.overrides import save_config, with_overrides
from cbnerf.search.diary import Diary
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.searcher import TuneSearcher
from cbnerf.search.spec import load_spec
from cbnerf.search.state import StudyState, Unit
from cbnerf.search.tracking import Tracker
from cbnerf.search.writer import Writer


@dataclass(kw_only=True)
class Options:
    trials: int = 10_000
    """Trials of Tune: one configuration on one scene up to one rung."""
    workers: int = 256
    """Trials that run at a time."""
    reports: int = 2
    """Evaluations that a trial reports."""
    tracking: str = "none"
    """`none`, `sqlite` (a new file), or the URI of an MLflow server."""
    space: Path = Path("tune_configs/default.yaml")
    output: Path = Path("benchmarks/results/scale")
    """Receives NAME.md."""
    name: str = "none"


class Tenth(NamedTuple):
    """A tenth of the search."""

    decisions: float
    """A second: trials handed out and trials booked."""
    suggest: float
    """Milliseconds to the next trial, on average."""
    book: float
    """Milliseconds to note a result, judge and tell Optuna."""
    writes: float
    """Calls that the writer's thread makes for MLflow in a second of its time."""
    backlog: float
    """Calls that wait for it at the end."""
    memory: float
    """MiB of the driver, resident."""


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


def value(unit: Unit, rung_share: float) -> float:
    """A PSNR in dB with one best configuration, scenes of their own and noise."""
    knobs = np.array([math.log(float(knob)) for knob in unit.overrides.values()])
    rng = np.random.default_rng([unit.configuration, len(unit.scene), unit.rung])
    depth = 0.01 * float(((knobs - 0.5) ** 2).sum())
    return 20 + len(unit.scene) - depth - 0.5 * (1 - rung_share) + 0.02 * rng.standard_normal()


class Stopwatch:
    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started


class TimedWriter(Writer):
    """A writer whose calls are timed and counted."""

    def __init__(self, watch: Stopwatch):
        super().__init__(limit=10**9)
        self._watch, self.calls = watch, 0

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__call__(self._timed, function, *arguments)

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> None:
        with self._watch("write"):
            function(*arguments)
        self.calls += 1


def simulate(
    options: Options, plan: Plan, tracker: Any, write: TimedWriter, watch: Stopwatch
) -> tuple[list[Tenth], StudyState, float]:
    """The tenths of a search, its state, and the simulated seconds that it took."""
    state = StudyState(plan)
    diary = Diary(state, tracker, write, tqdm(disable=True))
    searcher = TuneSearcher(state, diary.end_unit, limit=lambda: options.workers)
    rng = np.random.default_rng(0)
    running: list[tuple[float, int, SimpleNamespace]] = []
    handed, clock, tenths = 0, 0.0, []
    started, since = time.perf_counter(), time.perf_counter()
    for ended in range(1, options.trials + 1):
        while len(running) < options.workers:
            with watch("suggest"):
                config = searcher.suggest(str(handed))
            if not isinstance(config, dict):
                break
            trial = SimpleNamespace(trial_id=str(handed), config=config, last_result={})
            diary.on_trial_start(0, [], trial)
            share = 3.0 ** (Unit(**config["units"][0]).rung - plan.rungs + 1)
            seconds = 60 * share * rng.uniform(0.7, 1.3)
            heapq.heappush(running, (clock + seconds, handed, trial))
            handed += 1
        clock, _, trial = heapq.heappop(running)
        _report(options, plan, diary, searcher, trial, watch)
        if ended % (options.trials // 10) == 0:
            tenths.append(_tenth(watch, write, options.trials // 10, time.perf_counter() - since))
            since = time.perf_counter()
            print(tenths[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    return tenths, state, clock


def _report(
    options: Options,
    plan: Plan,
    diary: Diary,
    searcher: TuneSearcher,
    trial: SimpleNamespace,
    watch: Stopwatch,
) -> None:
    """A trial's reports and its end, as Tune passes them on."""
    (about,) = trial.config["units"]
    unit = Unit(**about)
    psnr = value(unit, 3.0 ** (unit.rung - plan.rungs + 1))
    metrics = {"val/psnr": psnr, "val/ssim": psnr / 40, "val/gain": 0.1, "train/loss": 0.1,
               "train/refine": 0.1, "train/recon": 0.1, "codebook/perplexity": 100.0}  # fmt: skip
    if unit.rung == plan.rungs - 1:
        _leave(plan, unit)
    for step in range(1, options.reports + 1):
        result = metrics | {"unit": 0, "step": 1000 * unit.rung + step, "hostname": "simulated"}
        diary.on_trial_result(0, [], trial, result)
    with watch("book"):
        searcher.on_trial_complete(
            trial.trial_id, metrics | {"seconds": 20.0, "unit": 0, "ended": True}
        )
    diary.on_trial_complete(0, [], trial)


def _leave(plan: Plan, unit: Unit) -> None:
    """What a whole training leaves in its folder; the weights are far smaller than real ones."""
    folder = plan.trial_folder(unit.configuration, unit.scene)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(with_overrides(plan.base, unit.overrides), folder / "config.yaml")
    (folder / "refiner.pt").write_bytes(bytes(10_000))
    iio.imwrite(folder / "strip.png", np.full((96, 384, 3), 99, np.uint8))


def _tenth(watch: Stopwatch, write: TimedWriter, trials: int, seconds: float) -> Tenth:
    suggest, book, writing = (watch.seconds.pop(name, 0.0) for name in ("suggest", "book", "write"))
    calls, write.calls = write.calls, 0
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return Tenth(
        decisions=2 * trials / seconds,
        suggest=1e3 * suggest / trials,
        book=1e3 * book / trials,
        writes=calls / writing if writing else 0.0,
        backlog=len(write),
        memory=pages * resource.getpagesize() / 2**20,
    )


def main(options: Options) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if options.tracking not in ("none", "sqlite"):
        os.environ["MLFLOW_TRACKING_URI"] = options.tracking
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(
            replace(load_spec(options.space), trials=options.trials, resolution="x2-504"),
            scenes="all", data=None, name=f"scale-{int(time.time())}", storage=Path(folder),
            has_gpu=False,
        )  # fmt: skip
        tracker = Silent() if options.tracking == "none" else Tracker(plan, "scale")
        watch = Stopwatch()
        write = TimedWriter(watch)
        with write:
            tenths, state, clock = simulate(options, plan, tracker, write, watch)
            started, behind = time.perf_counter(), len(write)
        late = time.perf_counter() - started
        journal = (plan.folder / "optuna.journal").stat().st_size / 2**20
    lines = list(_lines(options, tenths, state, clock, journal, behind, late))
    print("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(
    options: Options,
    tenths: list[Tenth],
    state: StudyState,
    clock: float,
    journal: float,
    behind: int,
    late: float,
) -> Iterator[str]:
    yield f"# {options.trials} trials on {options.workers} simulated workers\n"
    yield provenance(1)
    yield (
        f"Tracking: {options.tracking.split('://')[0]}. {state.num_ended} configurations ended, "
        f"{len(state.pruned)} of them stopped; {clock / 60:.0f} simulated minutes; Optuna's "
        f"journal {journal:.0f} MiB."
        + (f" At the end {behind} calls were left for MLflow, for {late:.0f} s." if behind else "")
        + "\n"
    )
    yield (
        "| tenth | decisions / s | next trial, ms | booking, ms | MLflow calls / s | waiting calls "
        "| driver, MiB |"
    )
    yield "|---|---|---|---|---|---|---|"
    for index, tenth in enumerate(tenths, 1):
        cells = {name: f"{number:.1f}" for name, number in tenth._asdict().items()}
        if options.tracking == "none":
            cells |= {"writes": "-", "backlog": "-"}
        yield f"| {index} | " + " | ".join(cells.values()) + " |"


if __name__ == "__main__":
    main(tyro.cli(Options))
