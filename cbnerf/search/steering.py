"""Steer a study from outside, also while its driver runs: queue configurations, see what is next.

Both go through Optuna's journal, which any process may append to; the driver asks it for every new
configuration. Knows Optuna, not Ray.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from cbnerf.overrides import read_knob, with_overrides
from cbnerf.report.tables import Cell, Table, to_markdown
from cbnerf.search.limits import check_limits
from cbnerf.search.plan import Plan
from cbnerf.search.request import plan_study
from cbnerf.search.sampler import (
    end_unfit,
    join_study,
    open_study,
    propose,
    read_study,
    suggest,
)
from cbnerf.search.spec import Choices
from cbnerf.search.state import StudyState
from cbnerf.strict_yaml import shown


class Queued(NamedTuple):
    """A configuration that waits in a study."""

    number: int
    ahead: int
    """Configurations that the study starts before it."""
    left: int
    """Configurations that the study may still start."""


def enqueue(storage: Path, name: str, settings: Sequence[str]) -> Queued:
    """Let a study try `knob=value` settings next; its sampler proposes the knobs that are not
    named.

    ValueError for a setting outside the space or beyond a limit, or a configuration that the study
    already holds.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan = plan_study(storage, name)
    read_study(plan)  # It must have begun.
    values = _values(plan, settings)
    try:
        with FileLock(plan.lock_file, timeout=0):  # No driver runs that could be disturbed.
            return _append(plan, open_study(plan), values)
    except Timeout:
        return _append(plan, join_study(plan), values)


def _append(plan: Plan, study: optuna.Study, values: dict[str, Any]) -> Queued:
    before = len(study.get_trials(deepcopy=False))
    study.enqueue_trial(values, skip_if_exists=True)
    trials = study.get_trials(deepcopy=False)
    if len(trials) == before:
        raise ValueError(f"study {plan.name}: it holds this configuration already")
    waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
    begun = len(trials) - len(waiting)
    return Queued(waiting[-1], len(waiting) - 1, max(plan.spec.trials - begun, 0))


def _values(plan: Plan, settings: Sequence[str]) -> dict[str, Any]:
    """The values of `knob=value` settings, checked against the space of a study."""
    values: dict[str, Any] = {}
    space = plan.spec.space
    for setting in settings:
        knob, equals, text = setting.partition("=")
        if not equals or knob in values:
            wrong = "named twice" if equals else "not of the form knob=value"
            raise ValueError(f"{shown(setting)} is {wrong}")
        if knob not in space:
            read_knob(knob, text)  # An unknown knob has a better message.
            raise ValueError(f"study {plan.name} does not search {knob}, but {', '.join(space)}")
        value, domain = read_knob(knob, text), space[knob]
        if value not in domain:
            allowed = (
                f"one of {', '.join(map(str, domain.choices))}"
                if isinstance(domain, Choices)
                else f"between {domain.low:g} and {domain.high:g}"
                + (f" in steps of {domain.step:g}" if domain.step else "")
            )
            raise ValueError(f"{knob} = {shown(value)} is not in the space: {allowed}")
        values[knob] = value
    with_overrides(plan.base, values)  # They may be incompatible.
    check_limits(plan.base, plan.spec, values)
    return values


def suggestions(storage: Path, name: str, count: int) -> dict[str, Any]:
    """What a study would try next if nothing ended until then, and what the race thinks of each
    configuration; plain values. Writes nothing.

    `chance` is the posterior probability that a configuration beats the incumbent by more than the
    margin, `expected` its expected quality at the end of training; None without an incumbent.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Its notes are not for the reader.
    plan = plan_study(storage, name)
    state = StudyState(plan, adopt=False)
    return {
        "study": name,
        "trials": plan.spec.trials,
        "ended": state.num_ended,
        "incumbent": None if (best := state.best()) is None else best.number,
        "next": _next_proposals(plan, state, count),
        "configurations": [_describe(state, trial) for trial in _begun(state)],
    }


def _next_proposals(plan: Plan, state: StudyState, count: int) -> list[dict[str, Any]]:
    """Asked of a copy of the study: a proposal depends on its number and the trials so far. Leaves
    out those that the study would not train."""
    copy = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(), directions=state.study.directions
    )
    copy.add_trials(state.study.get_trials())
    proposals: list[dict[str, Any]] = []
    for number in range(len(_begun(state)), plan.spec.trials):
        if len(proposals) == count:
            break
        trial = propose(plan, copy, number)
        knobs = suggest(trial, plan)
        if end_unfit(plan, copy, trial, knobs) is None:
            continue
        if state.smaller_without_memory(knobs) is None:
            proposals.append(knobs)
        else:
            copy.tell(trial, state=TrialState.PRUNED)
    return proposals


def _begun(state: StudyState) -> list[optuna.trial.FrozenTrial]:
    trials = state.study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state != TrialState.WAITING]


def _describe(state: StudyState, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    verdict = state.verdict(trial.number)
    return {
        "number": trial.number,
        "knobs": trial.params,
        "end": state.describe_end(trial),
        "units": len(state.results(trial.number)),
        "chance": verdict and verdict.chance,
        "expected": verdict and verdict.expected,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """Suggestions as two tables, the most promising configurations first."""
    knobs = list(dict.fromkeys(k for one in found["configurations"] for k in one["knobs"]))
    header = ["#", "end", "units", "chance", "expected", *knobs]
    order = sorted(found["configurations"], key=lambda one: -(one["expected"] or -math.inf))
    rows = [
        [str(one["number"]), one["end"], str(one["units"]), _short(one["chance"]),
         _short(one["expected"]), *(_short(one["knobs"].get(knob)) for knob in knobs)]
        for one in order
    ]  # fmt: skip
    upcoming = [
        [str(place), *map(_short, proposal.values())]
        for place, proposal in enumerate(found["next"], start=1)
    ]
    names = list(found["next"][0]) if found["next"] else []
    tables = [("Configurations", header, rows), ("Next", ["", *names], upcoming)]
    return "\n\n".join(
        to_markdown(Table(title, head, [[Cell(text) for text in row] for row in body]))
        for title, head, body in tables
        if body
    )


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
