"""What is written down while a study runs: lines on the screen, runs in MLflow, the state.

MLflow is written behind the search, which does not wait for it. A search that is killed may leave
MLflow behind the state; `catch_up` mends that when the study goes on.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from ray import tune
from tqdm import tqdm

from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.searcher import unit_metrics
from cbnerf.search.state import StudyState
from cbnerf.search.tasks import reason
from cbnerf.search.tracking import Tracker
from cbnerf.search.writer import Writer
from cbnerf.training.stages import read_metrics

_LOSSES = 5
"""How often a unit may lose its process before it has begun, until it counts as failed."""


class Diary(tune.Callback):
    """Follows the units of a study: progress on the screen, runs in MLflow."""

    def __init__(self, state: StudyState, tracker: Tracker, write: Writer, bar: "tqdm[Any]"):
        self._state = state
        self._tracker = tracker
        self._write = write
        self._bar = bar
        self._begun: set[tuple[Any, ...]] = set()
        self._losses: Counter[tuple[Any, ...]] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks; this one lives on the driver only.

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for unit in _units(trial):
            self._begun.add(_place(unit))
            self._write(self._tracker.start_unit, unit)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begun.difference_update(map(_place, _units(trial)))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "step" in result:
            unit = _units(trial)[result["unit"]]
            about = unit_metrics(result), result["step"], result["hostname"]
            self._write(self._tracker.log_step, unit, *about)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "failure" in trial.last_result:
            self._explain(_units(trial), trial.last_result["failure"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # `trial.get_error` reads a copy in the storage, which Tune makes later.
        # Ray writes it in the encoding of the locale.
        why = reason(Path(trial.error_file).read_text(encoding="utf-8", errors="replace"))
        if units := [unit for unit in _units(trial) if _place(unit) in self._begun]:
            self._explain(units, why)

    def end_unit(self, unit: Unit, metrics: Metrics | None) -> None:
        """Book a unit; what the state has booked is never done again.

        Tune tries a training again whose process has died, but not one that was about to begin:
        that is handed out anew.
        """
        if metrics is None:
            self._state.plan.check_disk()  # A full disk says nothing about a configuration.
            if _place(unit) not in self._begun:
                self._losses[_place(unit)] += 1
                if self._losses[_place(unit)] <= _LOSSES:
                    self._state.release(unit)
                    return
                self._write(self._tracker.start_unit, unit)
        self._write(self._tracker.end_unit, unit, metrics)
        told = self._state.num_ended
        self._state.record(unit, metrics)
        if self._state.num_ended > told:
            self._end_configuration(unit)

    def lose_unit(self, unit: Unit, why: str) -> None:
        """Hand a unit out anew that has lost its process with all of Tune, if not too often."""
        self._bar.write(f"  #{unit.configuration:02d}  {unit.scene}: {why}")
        if self._losses[_place(unit)] >= _LOSSES:
            self._write(self._tracker.explain_failure, unit, why)
        self._begun.discard(_place(unit))
        self.end_unit(unit, None)

    def _end_configuration(self, unit: Unit) -> None:
        self._write(*_closing(self._state, self._tracker, unit.configuration))
        self._bar.update(self._state.num_ended - self._bar.n)
        self._announce(unit)

    def _explain(self, units: list[Unit], reason: str) -> None:
        reason = " ".join(reason.split())[-300:]
        for unit in units:
            self._write(self._tracker.explain_failure, unit, reason)
        scenes = ", ".join(unit.scene for unit in units)
        self._bar.write(f"  #{units[0].configuration:02d}  {scenes} failed: {reason}")

    def _announce(self, unit: Unit) -> None:
        best, stop = self._state.best(), self._state.pruned.get(unit.configuration)
        trial = self._state.study.get_trials(deepcopy=False)[unit.configuration]
        if stop is not None:
            value = f"stopped, {stop.reason}"
        elif trial.values is None:
            value = "failed"
        else:
            value = " ".join(f"{value:.3f}" for value in trial.values)
        mark = " *" if best is not None and best.number == trial.number else ""
        knobs = " ".join(
            f"{name.split('.')[-1]}={setting:.3g}" if isinstance(setting, float)
            else f"{name.split('.')[-1]}={setting}"
            for name, setting in unit.overrides.items()
        )  # fmt: skip
        self._bar.write(f"  #{unit.configuration:02d}  {value}{mark}  {knobs}")


def _place(unit: Unit) -> tuple[Any, ...]:
    """A unit without its knobs."""
    return unit.configuration, unit.scene, unit.rung


def _units(trial: Any) -> list[Unit]:
    """The units of a Tune trial."""
    return [Unit(**unit) for unit in trial.config["units"]]


def catch_up(state: StudyState, tracker: Tracker) -> None:
    """Write what a killed search had booked and MLflow had not heard of yet."""
    for scene, entry in state.fields.items():
        folder = state.plan.cache.folder / entry
        if (metrics := read_metrics(folder)) is not None:  # None: it was removed
            tracker.log_field(scene, folder, metrics)
    for number in state.started:
        if tracker.is_closed(number):
            continue
        for unit, metrics in state.recorded_units(number):
            tracker.start_unit(unit)
            tracker.end_unit(unit, metrics)
        if number in state.ended:
            close, *about = _closing(state, tracker, number)
            close(*about)


def _closing(state: StudyState, tracker: Tracker, number: int) -> tuple[Any, ...]:
    """The call that closes the run of a configuration, and its arguments."""
    if (stop := state.pruned.get(number)) is not None:
        return tracker.prune_configuration, number, stop.reason
    return tracker.end_configuration, number, state.full_results(number)
