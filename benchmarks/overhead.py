"""What the platform adds to training: per unit, per report, per start of an actor.

    python benchmarks/overhead.py

A study of many tiny units runs one at a time, as `tune.py` runs it, on a real Ray with a real
MLflow store. The *gap* of a unit is the time since the previous unit was recorded, minus its own
training: Tune's turn-around, reading scene and renders, Optuna. The cost of a report is measured by
the same units with more evaluations, minus their time without the platform.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any, NamedTuple

import ray
import torch
import tyro
from provenance import provenance

from cbnerf.config import Config
from cbnerf.data.renders import load_renders
from cbnerf.overrides import with_overrides
from cbnerf.search.driver import quieten_libraries, run_study
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import parse_spec
from cbnerf.search.state import StudyState, Unit
from cbnerf.search.tracking import Tracker
from cbnerf.training.stages import RENDERS_FILE, run_refiner

FEW, MANY = 1, 11
"""Evaluations, and so reports, of a unit."""


@dataclass(kw_only=True)
class Options:
    scenes: str = "arcade,blinds"
    configurations: int = 20
    output: Path = Path("benchmarks/results/overhead")
    name: str = "cpu"


class Recorded(NamedTuple):
    """A recorded unit."""

    at: float
    training: float
    writing: float
    """Seconds of state and tracker so far; the tracker runs in its own thread."""


def watch(recorded: list[Recorded]) -> None:
    """Add an entry for each unit recorded from now on; sum the time of state and tracker."""
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent += time.perf_counter() - started

        return call

    for owner, names in {
        Tracker: ("sync",),
        StudyState: ("next_unit",),
    }.items():
        for name in names:
            setattr(owner, name, timed(getattr(owner, name)))
    record = timed(StudyState.record)

    def record_and_note(state: StudyState, unit: Unit, metrics: dict[str, float] | None) -> None:
        record(state, unit, metrics)
        recorded.append(Recorded(time.perf_counter(), (metrics or {})["seconds"], spent))

    StudyState.record = record_and_note  # type: ignore[method-assign]


def study(options: Options, storage: Path, evaluations: int) -> Plan:
    spec = parse_spec({
        "resolution": "tiny", "trials": options.configurations, "stopping": {"rule": "none"},
        "fixed": {"refiner.optim.steps": MANY, "refiner.optim.evaluations": evaluations},
        "space": {"refiner.optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
    })  # fmt: skip
    plan = make_plan(
        spec, scenes=options.scenes, data=None, name=f"overhead-{evaluations}", storage=storage,
        has_gpu=False,
    )  # fmt: skip
    run_study(plan, print, 1)
    return plan


def alone(plan: Plan, config: Config, folder: Path) -> float:
    """Median seconds of a unit without the platform."""
    seconds = []
    scene = plan.load_scene(plan.scenes[0], config.data)
    (entry,) = plan.cache.folder.glob(f"field-{scene.name}-*")
    renders = load_renders(entry / RENDERS_FILE)
    for repetition in range(10):
        target = folder / f"{config.refiner.optim.evaluations}-{repetition}"
        metrics = run_refiner(config, scene, renders, target, device=torch.device("cpu"))
        seconds.append(metrics["seconds"])
    return median(seconds)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    quieten_libraries()
    recorded: list[Recorded] = []
    watch(recorded)
    gaps, writing, training, bare = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
        for evaluations in (FEW, MANY):
            recorded.clear()
            plan = study(options, storage, evaluations)
            pairs = list(zip(recorded, recorded[1:], strict=False))
            gaps[evaluations] = [b.at - a.at - b.training for a, b in pairs]
            writing[evaluations] = [b.writing - a.writing for a, b in pairs]
            training[evaluations] = median(b.training for b in recorded[2:])
            bare[evaluations] = alone(plan, with_overrides(plan.base, {}), storage / "alone")
        ray.shutdown()
    reports = MANY - FEW
    evaluation = (bare[MANY] - bare[FEW]) / reports
    report = (training[MANY] - training[FEW]) / reports - evaluation
    gap = gaps[FEW][1:]  # the first one meets a cold actor
    lines = [
        "# What the platform adds to training\n",
        provenance(1),
        f"{len(gap)} units one at a time on a reused actor, {options.scenes} at `tiny`.\n",
        "| | seconds |",
        "|---|---|",
        f"| from a unit's end to the next one's training, median | {median(gap):.3f} |",
        f"| the same, 90th percentile | {quantiles(gap, n=10)[-1]:.3f} |",
        f"| MLflow and Optuna, written meanwhile, mean | {mean(writing[FEW][1:]):.3f} |",
        f"| a unit's own training, for comparison | {training[FEW]:.3f} |",
        f"| a report, beyond its evaluation and checkpoint | {report:.4f} |",
        f"| an evaluation and a checkpoint | {evaluation:.4f} |",
    ]
    print("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
