"""The state of a search: which unit to train next, and what finished units have reached.

Names in this file:

    configuration   number of the Optuna trial that holds its knobs
    unit            (configuration, scene, rung), and the knobs as overrides
    recorded        a unit whose metrics, or whose failure, the study holds
    pair            (scene, rung) of a unit
    started         at least one unit of the configuration has finished
    ended           told to Optuna: finished, pruned, failed, beyond a limit or too large
    too large       at least as large as a configuration that ran out of memory; not trained
    in flight       handed out, and neither recorded nor released

A configuration trains rung by rung on each scene, in the order that `racing` chooses, and is pruned
once it is unlikely to become the best. The Optuna study is the only persistent state: metrics of
units are stored in its user attributes, so a search resumes from there, independently of Tune.
Uses Optuna, not Ray.
"""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from cbnerf.config import Config
from cbnerf.overrides import with_overrides
from cbnerf.search.confirmation import LEADERS, Confirmation
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics, Pruned, Racing, SceneRung, Verdict
from cbnerf.search.sampler import (
    end_unfit,
    make_sampler,
    open_study,
    propose,
    read_study,
    suggest,
)
from cbnerf.search.sizes import needs_as_much


@dataclass
class _Running:
    """A configuration that has not ended."""

    number: int
    overrides: dict[str, Any]
    costs: Metrics
    """Costs known before training."""
    in_flight: set[SceneRung] = field(default_factory=set)


class StudyState:
    """Hands out units, records their metrics and tells Optuna the ends of configurations."""

    def __init__(self, plan: Plan, study: optuna.Study | None = None, *, adopt: bool = True):
        """With `adopt` the search resumes, including what a killed driver left running.

        Without it nothing is written: another process may be running the search, which must have
        started.
        """
        self.plan = plan
        if study is None:
            study = open_study(plan) if adopt else read_study(plan)
        self.study = study
        self.pruned: dict[int, Pruned] = {}
        """Pruned configurations, by number."""
        self.recorded: list[tuple[Unit, Metrics | None]] = []
        """Recorded units and their metrics (None: it failed), in the order of recording."""
        self.failures: list[tuple[Unit, str]] = []
        """Failed units and the reasons."""
        self.too_large: dict[int, int] = {}
        """Configurations that are too large, and which one ran out of memory."""
        self._out_of_memory: dict[int, Config] = {}
        trials = self.study.get_trials(deepcopy=False)
        self._racing = Racing(plan, max(plan.spec.trials, len(trials)))
        self._pairs = [(scene, rung) for rung in range(plan.rungs) for scene in plan.trainings]
        self._results: dict[int, dict[SceneRung, Metrics | None]] = {}
        self._running: dict[int, _Running] = {}
        begun = [trial for trial in trials if trial.state != TrialState.WAITING]
        under_way = [trial for trial in begun if trial.state == TrialState.RUNNING]
        self._elsewhere = set() if adopt else {trial.number for trial in under_way}
        attributes = self.study.user_attrs
        self.fields: dict[str, str] = attributes.get("fields", {})
        """Cache entries of the fields that all configurations refine, by scene."""
        self.field_seconds: dict[str, float] = attributes.get("field_seconds", {})
        """Training seconds of these fields, by scene."""
        self.confirmation = Confirmation(plan, self.study)
        for trial in begun:
            self._restore(trial, attributes)
        for trial in under_way if adopt else ():  # Once all results are known.
            self._reopen(trial)

    @property
    def id(self) -> str:
        """Distinguishes the study from a later one with the same name."""
        return self.study.user_attrs["id"]

    @property
    def started(self) -> list[int]:
        """Configurations with a recorded unit."""
        return [number for number, results in self._results.items() if results]

    @property
    def ended(self) -> list[int]:
        """Started configurations that have ended."""
        return [number for number in self.started if number not in self._under_way]

    @property
    def num_ended(self) -> int:
        """Number of ended configurations, including those beyond a limit."""
        return len(self._results) - len(self._under_way)

    @property
    def _under_way(self) -> set[int]:
        return {*self._running, *self._elsewhere}

    @property
    def is_over(self) -> bool:
        return self.num_ended >= self.plan.spec.trials

    def results(self, configuration: int) -> dict[SceneRung, Metrics | None]:
        """Metrics of the recorded units; None for a failed one."""
        return self._results[configuration]

    def full_results(self, configuration: int) -> dict[str, Metrics | None]:
        """Metrics at the last rung, by scene, in the order of the plan."""
        results, last = self._results[configuration], self.plan.rungs - 1
        return {s: results[s, last] for s in self.plan.trainings if (s, last) in results}

    def has_ended(self, configuration: int) -> bool:
        return configuration not in self._under_way

    def in_flight(self) -> list[Unit]:
        """The units that are handed out. Another thread may call it."""
        return [
            Unit(one.number, *pair, one.overrides)
            for one in list(self._running.values())
            for pair in sorted(one.in_flight)
        ]

    def record_field(self, scene: str, entry: str, seconds: float) -> None:
        """Record the field that all configurations refine; it must not change during a study."""
        if self.fields.get(scene, entry) != entry:
            raise ValueError(
                f"study {self.plan.name}: photographs of {scene}, or the code of stage 1, have "
                "changed since it was started; give another --name"
            )
        self.fields = self.fields | {scene: entry}
        self.field_seconds = self.field_seconds | {scene: seconds}
        self.study.set_user_attr("fields", self.fields)
        self.study.set_user_attr("field_seconds", self.field_seconds)

    def best(self) -> FrozenTrial | None:
        """The first of the `ranking`."""
        ranking = self.ranking()
        return self.study.get_trials(deepcopy=False)[ranking[0]] if ranking else None

    def ranking(self) -> list[int]:
        """The fully trained configurations, the highest first objective first; the leaders by their
        means over other seeds, once all of them are confirmed."""
        leaders, means = self.leaders(), self.confirmed()
        if means:
            leaders.sort(key=lambda number: -fmean(means.get(number, {"": -math.inf}).values()))
        return leaders + list(self.results_of_search())[len(leaders) :]

    def leaders(self) -> list[int]:
        """The best configurations by the seed of the search, which others confirm."""
        return list(self.results_of_search())[:LEADERS]

    def confirmed(self) -> dict[int, dict[str, float]]:
        """`Confirmation.means` of the leaders."""
        return self.confirmation.means(self.leaders())

    def results_of_search(self) -> dict[int, float]:
        """The first objective of the fully trained configurations, the best first."""
        first = self.plan.spec.objectives[0]
        # A copy: MLflow is written in another thread while the search continues.
        values = {number: about[first] for number, about in list(self._racing.finished.items())}
        return dict(sorted(values.items(), key=lambda pair: -pair[1]))

    def verdict(self, configuration: int) -> Verdict | None:
        """What the race expects of a configuration; None for the incumbent and without one."""
        return self._racing.verdict(configuration)

    def describe_end(self, trial: FrozenTrial) -> str:
        """How a configuration ended; the objectives of a pruned one are expected, not measured."""
        if trial.number in self.pruned:
            return f"stopped: {self.pruned[trial.number].reason}"
        if (other := self.too_large.get(trial.number)) is not None:
            return f"not trained: at least as large as #{other}, which ran out of memory"
        ends = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "beyond a limit"}
        return ends.get(trial.state, trial.state.name.lower())

    def next_unit(self) -> Unit | None:
        """The next unit to train; None if there is none now, or the search `is_over`."""
        waiting = [one for one in self._running.values() if self._waiting(one)]
        # One unit per configuration at a time wastes least work on pruned configurations. Several
        # run only before the first one has finished, and at the end, when no others are left.
        chosen = next((o for o in waiting if not (o.in_flight and self._racing.finished)), None)
        chosen = chosen or self._ask() or next(iter(waiting), None)
        if chosen is None:
            return None
        waiting_pairs = self._waiting(chosen)
        pair = self._racing.next(chosen.number, waiting_pairs, chosen.in_flight)
        chosen.in_flight.add(pair)
        return Unit(chosen.number, *pair, chosen.overrides)

    def next_walk(self) -> list[Unit]:
        """The next unit and the same rung on all other waiting scenes, for one group of workers."""
        unit = self.next_unit()
        if unit is None:
            return []
        one = self._running[unit.configuration]
        more = [pair for pair in self._waiting(one) if pair[1] == unit.rung]
        one.in_flight.update(more)
        return [unit, *(unit._replace(scene=scene) for scene, _ in more)]

    def record(self, unit: Unit, metrics: Metrics | None) -> None:
        """Record the metrics of a unit (None: it failed); tell Optuna if its configuration ends."""
        if metrics is not None and not all(
            math.isfinite(metrics[q]) for q in self._racing.qualities
        ):
            metrics = None
        self.study.set_user_attr(unit.key, metrics)
        self._add(unit, metrics)
        if one := self._running.get(unit.configuration):  # else it has been pruned meanwhile
            one.in_flight.discard((unit.scene, unit.rung))
            self._settle(one)

    def explain(self, unit: Unit, reason: str) -> None:
        """Record why a unit has failed."""
        self.study.set_user_attr(f"{unit.key}/failure", reason)
        self.failures.append((unit, reason))

    def record_out_of_memory(self, unit: Unit) -> bool:
        """From now on configurations at least as large as that of a failed unit are not trained;
        False if one has been trained there, so that the unit did not fail for its size."""
        config = self.plan.config_of(unit)
        for other, metrics in self.recorded:
            was_trained = metrics is not None and other.scene == unit.scene
            if was_trained and needs_as_much(self.plan.config_of(other), config):
                return False
        self._out_of_memory[unit.configuration] = config
        self.study.set_user_attr(f"{unit.configuration}/out_of_memory", True)
        return True

    def smaller_without_memory(self, overrides: dict[str, Any]) -> int | None:
        """A configuration that ran out of memory and that is not larger than these knobs."""
        if not self._out_of_memory:
            return None
        config = with_overrides(self.plan.base, overrides)
        found = (n for n, other in self._out_of_memory.items() if needs_as_much(config, other))
        return next(found, None)

    def release(self, unit: Unit) -> None:
        """Return a unit that was handed out and has not started."""
        if one := self._running.get(unit.configuration):
            one.in_flight.discard((unit.scene, unit.rung))

    def _restore(self, trial: FrozenTrial, attributes: dict[str, Any]) -> None:
        number = trial.number
        self._results[number] = {}
        for pair in self._pairs:
            unit = Unit(number, *pair, trial.params)
            if unit.key in attributes:
                self._add(unit, attributes[unit.key])
            if (key := f"{unit.key}/failure") in attributes:
                self.failures.append((unit, attributes[key]))
        if (key := f"{number}/pruned") in attributes:
            self.pruned[number] = Pruned(*attributes[key])
        if (key := f"{number}/too_large") in attributes:
            self.too_large[number] = attributes[key]
        if f"{number}/out_of_memory" in attributes:
            self._out_of_memory[number] = with_overrides(self.plan.base, trial.params)
        if trial.state == TrialState.COMPLETE and number not in self.pruned:
            objectives = zip(self.plan.spec.objectives, trial.values, strict=True)
            self._racing.finished[number] = dict(objectives)

    def _reopen(self, trial: FrozenTrial) -> None:
        # A driver killed while it asked has stored only some of the knobs; the others are suggested
        # now. Optuna has no public way to resume a running trial.
        self.study.sampler = make_sampler(self.plan, trial.number)
        if one := self._admit(optuna.Trial(self.study, trial._trial_id)):
            self._settle(one)

    def _ask(self) -> _Running | None:
        """A new configuration, if the budget of trials allows one."""
        while len(self._results) < self.plan.spec.trials:
            trial = propose(self.plan, self.study, len(self._results))
            self._results[trial.number] = {}
            if one := self._admit(trial):
                return one
        return None

    def _admit(self, trial: optuna.Trial) -> _Running | None:
        """Start a configuration, or end it untrained: as failed if its knobs are incompatible, as
        pruned if its costs exceed a limit or it is too large."""
        overrides = suggest(trial, self.plan)
        costs = end_unfit(self.plan, self.study, trial, overrides)
        if costs is None:
            return None
        if (other := self.smaller_without_memory(overrides)) is not None:
            self.too_large[trial.number] = other
            self.study.set_user_attr(f"{trial.number}/too_large", other)
            self.study.tell(trial.number, state=TrialState.PRUNED)
            return None
        self._racing.make_room(trial.number)  # Others may have queued configurations meanwhile.
        self._running[trial.number] = _Running(trial.number, overrides, costs)
        return self._running[trial.number]

    def _waiting(self, one: _Running) -> list[SceneRung]:
        """Pairs to train now: not recorded, not in flight, and the rung below is recorded."""
        done = self._results[one.number]
        return [
            (scene, rung)
            for scene, rung in self._pairs
            if (scene, rung) not in done
            and (scene, rung) not in one.in_flight
            and (rung == 0 or (scene, rung - 1) in done)
        ]

    def _add(self, unit: Unit, metrics: Metrics | None) -> None:
        pair = (unit.scene, unit.rung)
        self._results[unit.configuration][pair] = metrics
        if metrics is not None:
            self._racing.add(unit.configuration, pair, metrics)
        self.recorded.append((unit, metrics))

    def _settle(self, one: _Running) -> None:
        """Tell Optuna if a configuration has failed, finished or is pruned."""
        results = self._results[one.number]
        if None in results.values():
            self._tell(one, state=TrialState.FAIL)
        elif len(results) == len(self._pairs):
            self._tell(one, values=self._racing.finish(one.number, one.costs))
        elif stop := self.pruned.get(one.number) or self._racing.prune(one.number, one.costs):
            self.study.set_user_attr(f"{one.number}/pruned", stop)
            self.pruned[one.number] = stop
            self._tell(one, values=stop.values)

    def _tell(self, one: _Running, **outcome: Any) -> None:
        del self._running[one.number]
        self.study.tell(one.number, **outcome)
