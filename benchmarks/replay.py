"""Searches in simulated time, on trainings that a surrogate predicts (`recorded.py`).

A rival trains whole configurations, scene by scene; ours trains units of a configuration, scene and
rung, with the state, racing and sampler that real searches run with.
"""

import heapq
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.trial import TrialState
from recorded import Outcome, Surrogate
from rivals import Rival

from cbnerf.search.plan import Plan
from cbnerf.search.sampler import suggest
from cbnerf.search.spec import Stopping
from cbnerf.search.state import StudyState

TARGETS = (0.5, 0.2, 0.05)
"""dB below the best of the space that a search has to come within."""


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
    wrong_stops: float
    """Share of stopped configurations that lead the best finished one by more than the margin."""


class Replay:
    """What searches by any method have in common: trainings, costs, clock and regret."""

    def __init__(self, surrogate: Surrogate, workers: int, seed: int, *, with_fields: bool):
        """`with_fields`: stage 1 is trained once per scene, before the first configuration."""
        self.table = table = surrogate.table
        self.workers = workers
        self._surrogate = surrogate
        self._seed = seed
        self.busy = float(table.field_seconds.sum()) if with_fields else 0.0
        self.clock = self.busy / min(workers, len(table.scenes))
        self._outcomes: dict[int, Outcome] = {}
        self.history: list[tuple[float, float, float]] = []
        self._running: list[tuple[float, int, Any, float]] = []
        self._count = 0
        self._num_pruned = 0
        self._wrong = 0

    def outcome(self, number: int, overrides: dict[str, Any]) -> Outcome:
        """What configuration `number` of the search reaches."""
        if number not in self._outcomes:
            self._outcomes[number] = self._surrogate.train(overrides, self._seed, number)
        return self._outcomes[number]

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
            ahead = self._outcomes[number].truth - self._outcomes[best].truth
            self._wrong += bool(ahead > Stopping().margin)

    def note_best(self, best: int | None) -> None:
        if best is not None:
            regret = self._surrogate.best - self._outcomes[best].truth
            self.history.append((self.busy, self.clock, regret))

    def trace(self) -> Trace:
        at, clock, regret = map(np.array, zip(*self.history, strict=True))
        reached = [np.flatnonzero(np.append(regret > target, True)) for target in TARGETS]
        reached = [late[-2] + 1 if len(late) > 1 else 0 for late in reached]
        return Trace(
            [float(at[i]) if i < len(at) else np.inf for i in reached],
            [float(clock[i]) if i < len(at) else np.inf for i in reached],
            self.busy,
            float(regret[-1]),
            self._wrong / max(self._num_pruned, 1),
        )


def run_ours(run: Replay, plan: Plan) -> Trace:
    """A search by this platform."""
    state = StudyState(plan, optuna.create_study(direction="maximize"))
    scenes = run.table.scenes
    first_rung = run.table.psnr.shape[2] - plan.rungs
    while not state.is_over:
        while run.has_idle and (unit := state.next_unit()):
            outcome = run.outcome(unit.configuration, unit.overrides)
            scene, rung = scenes.index(unit.scene), unit.rung + first_rung
            first = rung if unit.rung else 0
            if plan.rungs == 1:
                seconds = float(outcome.straight[scene])
            else:
                seconds = float(outcome.seconds[scene, first : rung + 1].sum())
            psnr = float(outcome.psnr[scene, rung])
            run.start((unit, psnr, seconds), seconds)
        unit, psnr, seconds = run.finish_next()
        before = state.best()
        state.record(unit, {"val/psnr": psnr, "seconds": seconds})
        if unit.configuration in state.pruned:
            run.note_pruned(unit.configuration, before.number if before else None)
        best = state.best()
        run.note_best(best.number if best else None)
    return run.trace()


def run_rival(run: Replay, plan: Plan, rival: Rival, *, is_naive: bool) -> Trace:
    """A search whose workers train whole configurations until the rule prunes them; a naive one
    trains stage 1 for each of them."""
    num_scenes = len(run.table.scenes)
    rule = rival.rule(num_scenes)
    sampler = rival.sampler(plan.spec.seed)
    # Hyperband draws its brackets from the name.
    study = optuna.create_study(
        study_name=str(plan.spec.seed), direction="maximize", sampler=sampler, pruner=rule.pruner
    )
    best: tuple[float, int] | None = None

    def start(trial: optuna.Trial, outcome: Outcome, values: list[float]) -> None:
        scene = len(values)
        extra = float(run.table.field_seconds[scene]) if is_naive else 0.0
        run.start((trial, outcome, values), float(outcome.straight[scene]) + extra)

    num_asked = num_ended = 0
    while num_ended < plan.spec.trials:
        while run.has_idle and num_asked < plan.spec.trials:
            trial = study.ask()
            num_asked += 1
            start(trial, run.outcome(trial.number, suggest(trial, plan)), [])
        trial, outcome, values = run.finish_next()
        values.append(float(outcome.psnr[len(values), -1]))
        is_kept = rule.keeps(trial, values)
        if len(values) == num_scenes:
            value = fmean(values)
            study.tell(trial, value)
            best = max(best or (value, trial.number), (value, trial.number))
        elif is_kept:
            start(trial, outcome, values)
            continue
        else:
            study.tell(trial, state=TrialState.PRUNED)
            run.note_pruned(trial.number, best[1] if best else None)
        num_ended += 1
        run.note_best(best[1] if best else None)
    return run.trace()
