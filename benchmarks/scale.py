"""How far one driver reaches: a search on simulated workers, with everything else real.

    python benchmarks/scale.py                                     # without MLflow
    python benchmarks/scale.py --tracking sqlite
    python benchmarks/scale.py --tracking http://127.0.0.1:5000    # a server, on any database

Trials do not train: each ends after a simulated time with a value that depends on its knobs. The
rest is what a study on a cluster runs: the searcher that Tune asks, the state with Optuna's journal
on disk, the race, and the synchronisation with MLflow in its own thread.
"""

import heapq
import math
import os
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import optuna
import torch
import tyro
from provenance import provenance
from tqdm import tqdm

from cbnerf.overrides import save_config
from cbnerf.search.curves import append_point, begin_curves
from cbnerf.search.periodic import repeated
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.searcher import Recorder, TuneSearcher
from cbnerf.search.spec import load_spec
from cbnerf.search.state import StudyState, Unit
from cbnerf.search.tracking import Tracker
from cbnerf.training.checkpoint import Checkpoint, save_checkpoint


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
    """Trials handed out and trials recorded, a second."""
    suggest: float
    """Milliseconds to the next trial, on average."""
    record: float
    """Milliseconds to record a result, judge its configuration and tell Optuna."""
    written: float
    """Units that MLflow has received, a second."""
    backlog: float
    """Recorded units that MLflow has not received at the end."""
    memory: float
    """MiB of the driver, resident."""


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


def simulate(
    options: Options, plan: Plan, state: StudyState, tracker: Tracker | None
) -> tuple[list[Tenth], float]:
    """The tenths of a search, and the simulated seconds that it took."""
    watch, recorder = Stopwatch(), Recorder(state, tqdm(disable=True))
    searcher = TuneSearcher(state, recorder.end_unit, limit=lambda: options.workers)
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
            recorder.on_trial_start(0, [], trial)
            share = 3.0 ** (Unit(**config["units"][0]).rung - plan.rungs + 1)
            seconds = 60 * share * rng.uniform(0.7, 1.3)
            heapq.heappush(running, (clock + seconds, handed, trial))
            handed += 1
        clock, _, trial = heapq.heappop(running)
        metrics = _train(options, plan, Unit(**trial.config["units"][0]))
        with watch("record"):
            result = {f"metrics/{name}": value for name, value in metrics.items()}
            searcher.on_trial_complete(trial.trial_id, result | {"unit": 0, "ended": True})
        if ended % (options.trials // 10) == 0:
            seconds = time.perf_counter() - since
            tenths.append(_tenth(watch, state, tracker, options.trials // 10, seconds))
            since = time.perf_counter()
            print(tenths[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    return tenths, clock


def _train(options: Options, plan: Plan, unit: Unit) -> dict[str, float]:
    """Leave the files of a simulated training; the weights are far smaller than real ones."""
    psnr = value(unit, 3.0 ** (unit.rung - plan.rungs + 1))
    metrics = {"val/psnr": psnr, "val/ssim": psnr / 40, "val/gain": 0.1, "train/loss": 0.1,
               "train/refine": 0.1, "train/recon": 0.1, "codebook/perplexity": 100.0}  # fmt: skip
    folder, config = plan.trial_folder(unit.configuration, unit.scene), plan.config_of(unit)
    begin_curves(folder)
    for step in range(1, options.reports + 1):
        append_point(folder, 1000 * unit.rung + step, metrics)
    if unit.rung == plan.rungs - 1:
        save_config(config, folder / "config.yaml")
        weights = {"weight": torch.zeros(2500)}
        checkpoint = Checkpoint("refiner", unit.scene, 1, config, "float32", weights, {}, {})
        save_checkpoint(checkpoint, folder / "refiner.pt")
        iio.imwrite(folder / "strip.png", np.full((96, 384, 3), 99, np.uint8))
    return metrics | {"seconds": 20.0}


def _tenth(
    watch: Stopwatch, state: StudyState, tracker: Tracker | None, trials: int, seconds: float
) -> Tenth:
    suggest, record = (watch.seconds.pop(name, 0.0) for name in ("suggest", "record"))
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    backlog = len(state.recorded) - tracker.num_written if tracker else 0
    before = watch.seconds["backlog"]
    watch.seconds["backlog"] = backlog
    return Tenth(
        decisions=2 * trials / seconds,
        suggest=1e3 * suggest / trials,
        record=1e3 * record / trials,
        written=(trials + before - backlog) / seconds,
        backlog=backlog,
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
        state = StudyState(plan)
        tracker = None if options.tracking == "none" else Tracker(state)
        with nullcontext() if tracker is None else repeated(tracker.sync):
            tenths, clock = simulate(options, plan, state, tracker)
            started, behind = time.perf_counter(), int(tenths[-1].backlog)
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
        + (f" At the end MLflow lacked {behind} units, for {late:.0f} s." if behind else "")
        + "\n"
    )
    yield (
        "| tenth | decisions / s | next trial, ms | recording, ms | units to MLflow / s | backlog "
        "| driver, MiB |"
    )
    yield "|---|---|---|---|---|---|---|"
    for index, tenth in enumerate(tenths, 1):
        cells = {name: f"{number:.1f}" for name, number in tenth._asdict().items()}
        if options.tracking == "none":
            cells |= {"written": "-", "backlog": "-"}
        yield f"| {index} | " + " | ".join(cells.values()) + " |"


if __name__ == "__main__":
    main(tyro.cli(Options))
