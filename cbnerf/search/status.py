"""The status of a running search, in one line: best so far, time left, units and cost.

Steps are counted in full trainings: a unit weighs the part of the steps that its rung adds.
"""

import time
from statistics import fmean
from typing import Any, NamedTuple

from ray import tune
from tqdm import tqdm

from cbnerf.progress import duration
from cbnerf.search.plan import Plan
from cbnerf.search.state import StudyState

_INTERVAL = 30.0
"""Seconds between two lines where there is no terminal."""


class Status(NamedTuple):
    """Progress of a search."""

    ended: int
    """Configurations that have ended."""
    trials: int
    """Configurations of the study."""
    objective: str
    """Name of the first objective."""
    ranking: list[tuple[int, float]]
    """Number and first objective of fully trained configurations, the best first."""
    running: int
    """Units in training."""
    done: int
    """Units that have been trained."""
    pruned: int
    """Units that are not trained because their configuration was pruned."""
    seconds_left: float | None
    """Until the end of the search; None before the first unit has ended."""
    spent: float
    """Seconds of all trainings so far, stage 1 included; with GPUs, times the GPUs of each."""
    price: float | None
    """The same for the whole study without pruning, which `--dry-run` estimates; None before the
    first unit has ended."""
    has_gpus: bool


def describe(status: Status) -> str:
    """One line for a status."""
    parts = [_describe_best(status), f"{status.ended}/{status.trials} ended"]
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    parts.append(f"units: {status.running} running, {status.done} done, {status.pruned} pruned")
    price = "" if status.price is None else f" of {duration(status.price)} unpruned"
    what = "GPU time" if status.has_gpus else "training time"
    parts.append(f"{what} {duration(status.spent)}{price}")
    return " | ".join(parts)


def _describe_best(status: Status) -> str:
    if not status.ranking:
        return "none finished yet"
    (best, value), *others = status.ranking
    text = f"best #{best:02d} {status.objective} {value:.3f}"
    if others:
        rival, second = others[0]
        text += f", +{value - second:.3f} to #{rival:02d}"
    return text


def find_status(state: StudyState, plan: Plan, *, running: int, pace: float | None) -> Status:
    """The status of a state; `plan` names the resources of a training.

    `pace` is the number of seconds per full training of one configuration on one scene since the
    search was started or resumed; None if nothing has ended since.
    """
    trials = state.study.get_trials(deepcopy=False)
    gpus = plan.gpus_per_worker * plan.spec.resources.max_workers
    pairs = plan.rungs * len(plan.trainings)
    left = plan.spec.trials * len(plan.trainings) - settled(state)
    spent, price = _seconds(state)
    return Status(
        ended=state.num_ended,
        trials=plan.spec.trials,
        objective=plan.spec.objectives[0],
        ranking=[(number, trials[number].values[0]) for number in state.ranking()],
        running=running,
        done=len(state.recorded),
        pruned=sum(pairs - len(state.results(number)) for number in state.pruned),
        seconds_left=None if pace is None else pace * left,
        spent=spent * (gpus or 1),
        price=None if price is None else price * (gpus or 1),
        has_gpus=gpus > 0,
    )


def settled(state: StudyState) -> float:
    """Number of full trainings that need no more work: all those of ended configurations, and the
    trained part of the others."""
    plan, trainings = state.plan, len(state.plan.trainings)
    under_way = [number for number in state.started if not state.has_ended(number)]
    rungs = [rung for number in under_way for _, rung in state.results(number)]
    parts = [1 / plan.part(rung) - (1 / plan.part(rung - 1) if rung else 0) for rung in rungs]
    return min(state.num_ended, plan.spec.trials) * trainings + sum(parts, 0.0)


def _seconds(state: StudyState) -> tuple[float, float | None]:
    """Training seconds so far, and those of the whole study without pruning, extrapolated from the
    units of the highest rung that has been reached."""
    plan, fields = state.plan, sum(state.field_seconds.values(), 0.0)
    spent = fields + sum(training_seconds(state, number) for number in state.started)
    units = [(unit.rung, m.get("seconds", 0.0)) for unit, m in state.recorded if m is not None]
    highest = max((rung for rung, _ in units), default=None)
    if highest is None:
        return spent, None
    each = fmean(seconds for rung, seconds in units if rung == highest) * plan.part(highest)
    return spent, fields + plan.spec.trials * len(plan.trainings) * each


def training_seconds(state: StudyState, configuration: int) -> float:
    """Training seconds of a configuration so far, without stage 1 that others share."""
    last: dict[str, float] = {}
    for (scene, _), metrics in state.results(configuration).items():
        if metrics is not None:  # The seconds of a rung include those of lower ones.
            last[scene] = max(last.get(scene, 0.0), metrics.get("seconds", 0.0))
    return sum(last.values(), 0.0)


class StatusLine(tune.Callback):
    """Shows the status while Tune runs: in a terminal as the last line, updated every second;
    elsewhere as a new line every half minute."""

    def __init__(self, state: StudyState, plan: Plan, *, interval: float = _INTERVAL):
        self._state, self._plan = state, plan
        self._line: tqdm[Any] = tqdm(bar_format="{desc}", position=1, leave=False, disable=None)
        self._interval = interval if self._line.disable else 1.0
        self._started = self._shown = time.monotonic()
        self._settled = settled(state)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks; this one is used on the driver only.

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *error: object) -> None:
        self._line.close()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now - self._shown < self._interval:
            return
        self._shown = now
        running = sum(trial.status == "RUNNING" for trial in trials)
        trained = settled(self._state) - self._settled
        pace = (now - self._started) / trained if trained else None
        text = describe(find_status(self._state, self._plan, running=running, pace=pace))
        if self._line.disable:
            tqdm.write(text)
        else:
            self._line.set_description_str(text)
