"""The state of a search: configurations are handed out unit by unit, results are booked.

A configuration climbs rung by rung on each scene, in the order that the judge chooses; after each
unit it is judged, and stopped once it is unlikely to become the best. The Optuna study is all that
is kept: results of units stand in its user attributes, so a killed search goes on from there,
whatever Tune remembers.
Knows Optuna, not Ray.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from cbnerf.config import KnobError, with_overrides
from cbnerf.search.judge import Judge, Metrics, Place, Stop
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.proposals import make_sampler, open_study, propose, read_study, suggest
from cbnerf.training.models import count_parameters


@dataclass
class _Open:
    """A configuration that has been asked for and not been told."""

    number: int
    overrides: dict[str, Any]
    costs: Metrics
    """What is known of it before it is trained."""
    in_flight: set[Place] = field(default_factory=set)


class Ledger:
    """Hands out units, books their results, tells Optuna."""

    def __init__(self, plan: Plan, study: optuna.Study | None = None, *, adopt: bool = True):
        """With `adopt` it goes on with the configurations that a killed search had open; without
        it writes nothing, and another process may be at the search, which must have begun."""
        self.plan = plan
        if study is None:
            study = open_study(plan) if adopt else read_study(plan)
        self.study = study
        self.stopped: dict[int, Stop] = {}
        """The configurations that were given up, by number."""
        trials = self.study.get_trials(deepcopy=False)
        self._judge = Judge(plan, max(plan.spec.trials, len(trials)))
        self._places = [(scene, rung) for rung in range(plan.rungs) for scene in plan.trainings]
        self._results: dict[int, dict[Place, Metrics | None]] = {}
        self._open: dict[int, _Open] = {}
        begun = [trial for trial in trials if trial.state != TrialState.WAITING]
        under_way = [trial for trial in begun if trial.state == TrialState.RUNNING]
        self._elsewhere = set() if adopt else {trial.number for trial in under_way}
        booked = self.study.user_attrs
        for trial in begun:
            self._restore(trial, booked)
        for trial in under_way if adopt else ():  # Now that all is known they can be judged.
            self._reopen(trial)

    @property
    def id(self) -> str:
        """Tells the study from another one of the same name, made after this one was deleted."""
        return self.study.user_attrs["id"]

    @property
    def num_booked(self) -> int:
        """Units that have ended."""
        return sum(len(results) for results in self._results.values())

    @property
    def begun(self) -> list[int]:
        """Configurations of which a unit has ended."""
        return [number for number, results in self._results.items() if results]

    @property
    def told(self) -> list[int]:
        """Configurations that were trained and have ended."""
        return [number for number in self.begun if number not in self._under_way]

    @property
    def num_told(self) -> int:
        """Configurations that have ended, those beyond a limit among them."""
        return len(self._results) - len(self._under_way)

    @property
    def _under_way(self) -> set[int]:
        return {*self._open, *self._elsewhere}

    @property
    def is_over(self) -> bool:
        return self.num_told >= self.plan.spec.trials

    def results(self, configuration: int) -> dict[Place, Metrics | None]:
        """Metrics of the units booked so far."""
        return self._results[configuration]

    def booked_units(self, configuration: int) -> list[tuple[Unit, Metrics | None]]:
        """The same, by unit."""
        knobs = self.study.get_trials(deepcopy=False)[configuration].params
        return [
            (Unit(configuration, *place, knobs), metrics)
            for place, metrics in self._results[configuration].items()
        ]

    def whole_results(self, configuration: int) -> dict[str, Metrics | None]:
        """Metrics of the whole trainings, by scene."""
        last = self.plan.rungs - 1
        return {s: m for (s, rung), m in self._results[configuration].items() if rung == last}

    @property
    def field_seconds(self) -> dict[str, float]:
        """What stage 1 took, by scene, where all configurations share it."""
        return self.study.user_attrs.get("field_seconds", {})

    @property
    def fields(self) -> dict[str, str]:
        """Names of the cache's entries that all configurations refine, by scene."""
        return self.study.user_attrs.get("fields", {})

    def note_field(self, scene: str, entry: str, seconds: float) -> None:
        """What all configurations refine; it must stay the same for as long as the study goes."""
        entries = self.fields
        if entries.get(scene, entry) != entry:
            raise ValueError(
                f"study {self.plan.name}: photographs of {scene}, or the code of stage 1, have "
                "changed since it was started; give another --name"
            )
        self.study.set_user_attr("fields", entries | {scene: entry})
        self.study.set_user_attr("field_seconds", self.field_seconds | {scene: seconds})

    def best(self) -> FrozenTrial | None:
        """The configuration with the highest first objective of those trained to their end."""
        best = self._judge.best()
        return None if best is None else self.study.get_trials(deepcopy=False)[best]

    def front(self) -> list[int]:
        """Numbers of the finished configurations that no other one beats in all objectives."""
        return self._judge.front()

    def how_it_ended(self, trial: FrozenTrial) -> str:
        """Of a configuration; what was stopped has expected objectives, not measured ones."""
        if trial.number in self.stopped:
            return f"stopped: {self.stopped[trial.number].reason}"
        ends = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "beyond a limit"}
        return ends.get(trial.state, trial.state.name.lower())

    def next_unit(self) -> Unit | None:
        """The next unit to run; None when there is none now, or never more (`is_over`)."""
        waiting = [one for one in self._open.values() if self._open_places(one)]
        # One unit of each configuration at a time wastes least; but nothing can be judged before
        # one has finished, and at the end there is nothing else to do.
        chosen = next((o for o in waiting if not (o.in_flight and self._judge.finished)), None)
        chosen = chosen or self._ask() or next(iter(waiting), None)
        if chosen is None:
            return None
        open_places = self._open_places(chosen)
        place = self._judge.next_place(chosen.number, open_places, chosen.in_flight)
        chosen.in_flight.add(place)
        return Unit(chosen.number, *place, chosen.overrides)

    def next_walk(self) -> list[Unit]:
        """The next unit and its rung on all scenes that wait for it, for the same processes."""
        unit = self.next_unit()
        if unit is None:
            return []
        one = self._open[unit.configuration]
        more = [place for place in self._open_places(one) if place[1] == unit.rung]
        one.in_flight.update(more)
        return [unit, *(unit._replace(scene=scene) for scene, _ in more)]

    def book(self, unit: Unit, metrics: Metrics | None) -> None:
        """Record a unit's metrics, None for a failure; tell Optuna when its configuration ends."""
        if metrics is not None and not all(
            math.isfinite(metrics[q]) for q in self._judge.qualities
        ):
            metrics = None
        place = (unit.scene, unit.rung)
        self.study.set_user_attr(_key(unit.configuration, place), metrics)
        self._enter(unit.configuration, place, metrics)
        if one := self._open.get(unit.configuration):  # It may have been stopped meanwhile.
            one.in_flight.discard(place)
            self._settle(one)

    def take_back(self, unit: Unit) -> None:
        """Hand a unit out again that nobody has begun."""
        if one := self._open.get(unit.configuration):
            one.in_flight.discard((unit.scene, unit.rung))

    def _restore(self, trial: FrozenTrial, booked: dict[str, Any]) -> None:
        number = trial.number
        self._results[number] = {}
        for place in self._places:
            if (key := _key(number, place)) in booked:
                self._enter(number, place, booked[key])
        if (key := f"{number}/stopped") in booked:
            self.stopped[number] = Stop(*booked[key])
        if trial.state == TrialState.COMPLETE and number not in self.stopped:
            objectives = zip(self.plan.spec.objectives, trial.values, strict=True)
            self._judge.finished[number] = dict(objectives)

    def _reopen(self, trial: FrozenTrial) -> None:
        # A search killed while it asked has stored some of the knobs; the rest comes now.
        # Optuna has no public way to go on with a trial it has handed out.
        self.study.sampler = make_sampler(self.plan, trial.number)
        if one := self._admit(optuna.Trial(self.study, trial._trial_id)):
            self._settle(one)

    def _ask(self) -> _Open | None:
        """A new configuration, if there may be one more."""
        while len(self._results) < self.plan.spec.trials:
            trial = propose(self.plan, self.study, len(self._results))
            self._results[trial.number] = {}
            if one := self._admit(trial):
                return one
        return None

    def _admit(self, trial: optuna.Trial) -> _Open | None:
        """Open a configuration; what lies beyond a limit, or has knobs that do not fit each other
        where its costs are asked for, is told instead, untrained."""
        overrides = suggest(trial, self.plan)
        try:
            costs = self._known_costs(overrides)
        except KnobError:
            self.study.tell(trial.number, state=TrialState.FAIL)
            return None
        excess = {name: costs[name] - limit for name, limit in self.plan.spec.limits.items()}
        for name, value in excess.items():
            trial.set_constraint(name, value)
        if any(value > 0 for value in excess.values()):
            self.study.tell(trial.number, state=TrialState.PRUNED)
            return None
        self._open[trial.number] = _Open(trial.number, overrides, costs)
        return self._open[trial.number]

    def _known_costs(self, overrides: dict[str, Any]) -> Metrics:
        if not {"parameters", "codebook.size"} & {
            *self.plan.spec.objectives,
            *self.plan.spec.limits,
        }:
            return {}
        config = with_overrides(self.plan.base, overrides)
        return {
            "codebook.size": float(config.codebook.size),
            "parameters": float(count_parameters(config)),
        }

    def _open_places(self, one: _Open) -> list[Place]:
        """What can be run now: not booked, not in flight, and the rung below is booked."""
        done = self._results[one.number]
        return [
            (scene, rung)
            for scene, rung in self._places
            if (scene, rung) not in done
            and (scene, rung) not in one.in_flight
            and (rung == 0 or (scene, rung - 1) in done)
        ]

    def _enter(self, number: int, place: Place, metrics: Metrics | None) -> None:
        self._results[number][place] = metrics
        if metrics is not None:
            self._judge.enter(number, place, metrics)

    def _settle(self, one: _Open) -> None:
        """Tell Optuna if a configuration has failed, is finished or hopeless."""
        results = self._results[one.number]
        if None in results.values():
            self._tell(one, state=TrialState.FAIL)
        elif len(results) == len(self._places):
            self._tell(one, values=self._judge.finish(one.number, one.costs))
        elif stop := self.stopped.get(one.number) or self._judge.stop(one.number, one.costs):
            self.study.set_user_attr(f"{one.number}/stopped", stop)
            self.stopped[one.number] = stop
            self._tell(one, values=stop.values)

    def _tell(self, one: _Open, **outcome: Any) -> None:
        del self._open[one.number]
        self.study.tell(one.number, **outcome)


def _key(configuration: int, place: Place) -> str:
    scene, rung = place
    return f"{configuration}/{scene}/{rung}"
